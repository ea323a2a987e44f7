"""Compiled backends: attention over packed codes, and packing."""
