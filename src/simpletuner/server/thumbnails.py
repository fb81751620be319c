"""Make thumbnails, and detect an image file's type by its content."""

import errno
import io
import os
import stat
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

from simpletuner.server.faults import Fault
from simpletuner.server.uploads import DAMAGED_IMAGE_ERRORS, LARGEST_PIXELS, known_formats

QUALITY = 85
WIDTHS = (16, 2048)
"""The narrowest and the widest thumbnail that a request may ask for."""

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
# Each thumbnail decodes a whole image into memory.
_AT_ONCE = threading.BoundedSemaphore(2)


def picture_type(path: Path) -> str | None:
    """Return the media type of a PNG, JPEG or WebP file by its content; None for anything else.

    Raises:
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)


def thumbnail(path: Path, width: int, *, is_mask: bool = False) -> bytes:
    """Return a JPEG of the image: upright, at most `width` pixels wide, with white behind transparent parts.

    Args:
        is_mask: put black behind transparent parts instead, as training does with masks.

    Raises:
        Fault: 422, the file is not a readable image, or too large.
    """
    # Slow to import, and the first page needs no thumbnail.
    from PIL import Image, ImageOps

    try:
        with _AT_ONCE, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(path) as file, Image.open(file, formats=known_formats()) as opened:
                if opened.width * opened.height > LARGEST_PIXELS:
                    raise Fault.of(
                        422, f"{path.name} has {opened.width} × {opened.height} pixels", f"at most {LARGEST_PIXELS:,}"
                    )
                opened.draft("RGB", (width, width))
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):
                    image = image.point(lambda level: level * (1 / 257))  # `convert` would clip at 255
                image.thumbnail((width, image.height), Image.Resampling.LANCZOS)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    background = Image.new("RGBA", image.size, "black" if is_mask else "white")
                    image = Image.alpha_composite(background, image)
                encoded = io.BytesIO()
                image.convert("RGB").save(encoded, "JPEG", quality=QUALITY)
                return encoded.getvalue()
    except (*DAMAGED_IMAGE_ERRORS, Image.DecompressionBombError) as error:
        raise Fault.of(422, f"{path.name} cannot be read as an image ({type(error).__name__})") from None


def _opened(path: Path) -> BinaryIO:
    """Open a regular file; reading a pipe or device would block.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a pipe or a device", str(path))
    return os.fdopen(handle, "rb")
