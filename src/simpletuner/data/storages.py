"""Which storage holds the images of a set, and which ones its caches."""

from simpletuner.base.storage import Storage, storage_of
from simpletuner.config.datasets import ImageSet, TextStore


def image_storage(image_set: ImageSet) -> Storage:
    """The storage of a set's images and caption files."""
    return storage_of(image_set.instance_data_dir)


def latent_storage(image_set: ImageSet) -> Storage:
    """The storage of a set's latents, and of what was learned about its images."""
    return storage_of(image_set.cache_dir_vae)


def text_storage(store: TextStore) -> Storage:
    """The storage of text contexts."""
    return storage_of(store.cache_dir)
