"""The embedded model: a complete small FLUX.2 that generates simple scenes and works like dev. Needs no download."""

from simpletuner.flux2.tiny.make import default_folder, make

__all__ = ["default_folder", "make"]
