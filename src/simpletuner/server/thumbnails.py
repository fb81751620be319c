"""Small pictures, and what kind of picture a file is by its content."""

import errno
import io
import os
import stat
import threading
import warnings
from pathlib import Path
from typing import BinaryIO

from simpletuner.server.faults import Fault
from simpletuner.server.uploads import DAMAGED_PICTURE, LARGEST_PIXELS, known_formats

QUALITY = 85
WIDTHS = (16, 2048)
"""The narrowest and the widest thumbnail that may be asked for."""

_SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))
# Each holds a whole picture in memory.
_AT_ONCE = threading.BoundedSemaphore(2)


def picture_type(path: Path) -> str | None:
    """The media type of a PNG, JPEG or WebP file, by its content; None for anything else.

    Raises:
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return "image/webp"
    return next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)


def thumbnail(path: Path, width: int, *, is_mask: bool = False) -> bytes:
    """A JPEG of the picture, upright, at most `width` pixels wide, on white where it is transparent.

    Args:
        is_mask: lay it on black, as training reads a mask.

    Raises:
        Fault: 422, it is no picture that can be read, or too large.
    """
    # Takes a moment to import: the first page needs none.
    from PIL import Image, ImageOps

    try:
        with _AT_ONCE, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with _opened(path) as file, Image.open(file, formats=known_formats()) as opened:
                if opened.width * opened.height > LARGEST_PIXELS:
                    raise Fault.of(422, f"{path.name} has {opened.width} × {opened.height} pixels", "fewer")
                opened.draft("RGB", (width, width))
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):
                    image = image.point(lambda level: level * (1 / 257))  # `convert` would clip at 255
                image.thumbnail((width, image.height), Image.Resampling.LANCZOS)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    ground = Image.new("RGBA", image.size, "black" if is_mask else "white")
                    image = Image.alpha_composite(ground, image)
                made = io.BytesIO()
                image.convert("RGB").save(made, "JPEG", quality=QUALITY)
                return made.getvalue()
    except (*DAMAGED_PICTURE, Image.DecompressionBombError) as error:
        raise Fault.of(422, f"{path.name} cannot be read as a picture ({type(error).__name__})") from None


def _opened(path: Path) -> BinaryIO:
    """A file, and no pipe or device, which would be waited for.

    Raises:
        OSError: it cannot be opened, or is none.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "a pipe or a device", str(path))
    return os.fdopen(handle, "rb")
