"""Memory only: how tokens lie in a cache, and how many there are. The store knows no kernel."""
