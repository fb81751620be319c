"""From a folder of images and captions to batches: which images are used, which of their pixels, and in which order."""
