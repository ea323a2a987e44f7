"""Compiled backends, one file a kernel. Imported only when used; none imports transformers."""
