"""A run is a directory: its layout, its events, its checkpoints, and the requests it obeys. No torch."""
