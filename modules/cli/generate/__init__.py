"""`kivi generate`: prompts and conversations over a quantized cache."""
