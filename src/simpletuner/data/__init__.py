"""From a folder of images and captions to batches: which images are trained, which of their pixels, in which order."""
