"""Pair images with the files of a conditioning set that have the same path, apart from the suffix."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import pairwise

from simpletuner.base.imagefiles import caption_key, find_partners
from simpletuner.base.storage import Storage
from simpletuner.config.datasets import ConditioningSet
from simpletuner.data.discover import discover
from simpletuner.data.geometry import has_aspect_of, reference_geometry
from simpletuner.data.index import IndexEntry, read_images
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Crop
from simpletuner.data.storages import image_storage, latent_storage


@dataclass(frozen=True)
class Pairing:
    """The files of a conditioning set, by the images to which they belong."""

    conditioning_set: ConditioningSet
    files: Storage
    entries: dict[str, IndexEntry | Rejected]
    """The facts or the rejection of each file, by name."""
    partners: dict[str, list[tuple[int, str]]]
    """Numbers and names of the partners, sorted, by the `caption_key` of their image."""

    @property
    def unpaired(self) -> list[str]:
        """Names of the files that belong to no image, sorted."""
        paired = {name for partners in self.partners.values() for _, name in partners}
        return sorted(self.entries.keys() - paired)

    def crops(self, image: Crop, seed: int) -> list[Crop]:
        """The crops of the partners of `image`, in the order of their numbers; empty if it has no partner.

        Raises:
            Rejected: a partner cannot be used, or two files have the same number.
        """
        partners = self.partners.get(caption_key(image.name), [])
        dataset = self.conditioning_set.id
        for (number, name), (next_number, next_name) in pairwise(partners):
            if number == next_number:
                raise Rejected("more than one partner", f"{dataset} has {name} and {next_name}: keep one of them")
        crops = []
        for _, name in partners:
            try:
                crops.append(self._crop(name, image, seed))
            except Rejected as rejected:
                raise Rejected(f"{dataset}: {rejected.reason}", f"{name}: {rejected.detail}") from rejected
        return crops

    def _crop(self, name: str, image: Crop, seed: int) -> Crop:
        dataset, entry = self.conditioning_set, self.entries[name]
        if isinstance(entry, Rejected):
            raise entry
        size = (entry.width, entry.height)
        if dataset.conditioning_type == "reference_loose":
            geometry = reference_geometry(size, dataset, seed=seed, content=entry.content)
        elif has_aspect_of(size, (image.width, image.height)):
            # With the same resize and crop, both show the same part.
            geometry = image.geometry
        else:
            shapes = f"{size[0]}x{size[1]}, its image is {image.width}x{image.height}"
            raise Rejected("aspect differs from its image's", f"{shapes}; give both the same shape")
        return Crop(dataset.id, self.files, name, entry.content, *size, geometry)


def pair(
    conditioning_set: ConditioningSet,
    names: Collection[str],
    *,
    workers: int,
    report: Callable[[int, int], None],
) -> Pairing:
    """Scan the files of `conditioning_set`, and pair them with the images `names` by `find_partners`. Only
    references may be numbered.

    Raises:
        DataError: no such folder.
    """
    files = image_storage(conditioning_set)
    listed = discover(files)
    entries = read_images(listed.pictures, files, latent_storage(conditioning_set), workers=workers, report=report)
    partners = find_partners(names, entries, is_numbered=conditioning_set.is_reference)
    return Pairing(conditioning_set, files, entries, partners)
