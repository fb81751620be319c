"""simpletuner: fine-tunes FLUX.2 from a folder of images and captions."""

__version__ = "0.1.0"
