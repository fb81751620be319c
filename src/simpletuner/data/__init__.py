"""From a folder of pictures and captions to batches: what is trained, which pixels of it, in which order."""
