"""Attention over packed layers, appending to them and packing: a protocol, a registry, and a folder a backend."""
