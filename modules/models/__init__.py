"""What ties a model of transformers to a KIVI cache."""
