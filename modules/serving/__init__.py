"""`kivi serve`: an endpoint that speaks OpenAI's API, over packed caches.

`transformers serve` loads its models itself, through its Auto classes without an option of ours, and its handlers pass no cache to
`generate()`: it cannot take these models without private patches.
"""
