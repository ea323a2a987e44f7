"""How states become bytes and back."""
