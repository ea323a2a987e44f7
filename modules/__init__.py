"""A packed, quantized KV cache for Hugging Face transformers and the attention over it."""
