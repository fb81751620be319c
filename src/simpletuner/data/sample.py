"""What the other files of this room hand to each other: a picture that is trained, or the reason why it is
not."""

from dataclasses import dataclass

from simpletuner.base.storage import Storage
from simpletuner.data.geometry import Geometry


@dataclass(frozen=True)
class Crop:
    """A part of an image file: with its bytes, everything that decides its pixels."""

    dataset: str
    """`id` of its set."""
    images: Storage
    """Where the set's files lie."""
    name: str
    """Path relative to the set's folder, with forward slashes."""
    content: str
    """sha256 of the file's bytes."""
    width: int
    """Pixels, upright (after the EXIF orientation)."""
    height: int
    geometry: Geometry

    @property
    def is_flattened(self) -> bool:
        """Whether transparency is laid on white; otherwise the pixels are the colors below the alpha channel."""
        return True

    @property
    def shown(self) -> str:
        """The file as a person would type it: its path, or its URL."""
        return self.images.shown(self.name)

    def read(self, most: int | None = None) -> bytes:
        """The file's bytes, as they are now, or the first `most` of them.

        Raises:
            OSError: it is gone, or cannot be read.
        """
        return self.images.read(self.name, 0, most)


@dataclass(frozen=True)
class Sample(Crop):
    """One picture that is trained, with everything that decides its pixels, its prompt and its conditions."""

    captions: tuple[str, ...]
    """The exact prompts; one is drawn at each visit."""
    references: tuple[Crop, ...] = ()
    """Reference images, in the order of their positions."""
    mask: Crop | None = None
    """The weights of the loss; with `mask_source` alpha, the image itself where it is transparent anywhere."""

    @property
    def is_flattened(self) -> bool:
        return self.mask is None or self.mask.dataset != self.dataset


@dataclass(frozen=True)
class Rejection:
    """One file that is not trained."""

    name: str
    """Path relative to the set's folder, with forward slashes."""
    reason: str
    """The class it is counted under: "truncated", "no caption", "below minimum_image_size", …"""
    detail: str
    """What exactly was found, and the remedy where there is one."""
