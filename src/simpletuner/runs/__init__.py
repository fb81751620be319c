"""A run and its directory: layout, events, checkpoints, queue, processes and requests. Does not import torch."""
