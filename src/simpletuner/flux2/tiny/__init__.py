"""The embedded model: a whole FLUX.2 that draws a small world and goes wherever dev goes. No download."""

from simpletuner.flux2.tiny.make import default_folder, make

__all__ = ["default_folder", "make"]
