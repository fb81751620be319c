"""Records shared by this package: a crop of an image, a training sample, a rejected file."""

from dataclasses import dataclass

from simpletuner.base.storage import Storage
from simpletuner.data.geometry import Geometry


@dataclass(frozen=True)
class Crop:
    """A crop of an image file. With the file's bytes, it determines the pixels completely."""

    dataset: str
    """`id` of its dataset."""
    images: Storage
    """Storage of the dataset's files."""
    name: str
    """Path relative to the dataset's folder, with forward slashes."""
    content: str
    """sha256 of the file's bytes."""
    width: int
    """Pixels, upright (after the EXIF orientation)."""
    height: int
    geometry: Geometry

    @property
    def is_flattened(self) -> bool:
        """Whether to composite transparency on white; otherwise the alpha channel is ignored."""
        return True

    @property
    def location(self) -> str:
        """The file's path or URL, for messages."""
        return self.images.text(self.name)

    def read(self, limit: int | None = None) -> bytes:
        """Read the file's current bytes, or only the first `limit` bytes.

        Raises:
            OSError: it does not exist, or cannot be read.
        """
        return self.images.read(self.name, 0, limit)


@dataclass(frozen=True)
class Sample(Crop):
    """A training image with everything that determines its pixels, its prompt and its conditions."""

    captions: tuple[str, ...]
    """The exact prompts; one is drawn each time the image is used."""
    references: tuple[Crop, ...] = ()
    """Reference images, in the order of their positions."""
    mask: Crop | None = None
    """The mask of loss weights; with `mask_source` alpha, the image itself if any of its pixels is transparent."""

    @property
    def is_flattened(self) -> bool:
        return self.mask is None or self.mask.dataset != self.dataset


@dataclass(frozen=True)
class Rejection:
    """A file that is not used for training."""

    name: str
    """Path relative to the dataset's folder, with forward slashes."""
    reason: str
    """Category by which rejections are counted: "truncated", "no caption", "below minimum_image_size", …"""
    detail: str
    """The exact finding, and a remedy if there is one."""
