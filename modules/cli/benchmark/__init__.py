"""`kivi benchmark`: the time of a decode step."""
