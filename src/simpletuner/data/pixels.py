"""From a file to upright sRGB pixels, and to the one resample and crop that are trained."""

import contextlib
import functools
import importlib
import importlib.util
import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, ImageCms, ImageFile, UnidentifiedImageError

from simpletuner.data.geometry import Geometry
from simpletuner.data.png import MOST_INFLATED, SIGNATURE, split_profile
from simpletuner.data.rejected import OUT_OF_MEMORY, Rejected

PIXELS_VERSION = 1
"""Raised when the same file would give other pixels, so that cached latents are made again."""

PIXEL_LIMIT = 180_000_000
"""Larger pictures are rejected: decoded and converted, each would take gigabytes."""

LARGE_PIXELS = 48_000_000
"""Pictures above this are decoded one at a time, whatever the number of workers."""

FILE_LIMIT = 8 * PIXEL_LIMIT
"""Larger files are rejected unread: `PIXEL_LIMIT` pixels of four 16-bit samples take no more bytes."""

LARGE_FILE = 4 * LARGE_PIXELS
"""Files above this are read one at a time, too."""

FORMATS = (
    "JPEG",
    "MPO",
    "PNG",
    "WEBP",
    "AVIF",
    "BMP",
    "DIB",
    "TIFF",
    "GIF",
    "PPM",
    "JPEG2000",
    "TGA",
    "HEIF",
    "JXL",
)
"""What Pillow may take a file for. Without a list, a PostScript file named .jpg would run Ghostscript."""

PLUGINS = {
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".hif": ("pillow_heif", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
"""Suffixes that Pillow reads with a plug-in only: its module, and what to install."""

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files, by reading their sources; it has no common class for them. Only calls
of Pillow stand below an `except` of these: the same from our own code is a bug."""

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what makes the picture upright."""

ORIENTATION_TAG = 0x0112

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Color space of an ICC profile → the mode of the pixels it describes."""

Remark = Literal["transparent", "animated", "odd profile"]

MaskKind = Literal["mask", "segmentation", "alpha"]
"""Where a mask's weights are: in the gray levels of a file, in which of them are above 0, or in an image's alpha."""

# The limit above is checked by us, with a reason for each file; Pillow would warn from a worker thread, or
# raise.
Image.MAX_IMAGE_PIXELS = None
# Odd metadata beside sound pixels (a corrupt EXIF block, say) is no concern of training.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_one_large_picture = threading.RLock()
_srgb = ImageCms.createProfile("sRGB")


@dataclass(frozen=True)
class Facts:
    """What one full decode of a picture tells."""

    width: int
    """Pixels, upright."""
    height: int
    remarks: tuple[Remark, ...]
    """What `upright_rgb` does to it beyond decoding that a person may want to know."""


def require_plugin(name: str) -> None:
    """Load the plug-in that a picture with this suffix needs, if any.

    Raises:
        Rejected: it is not installed, with the command that installs it.
    """
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in PLUGINS and not _plugin_is_loaded(PLUGINS[suffix][0]):
        raise Rejected(f"{suffix[1:].upper()} needs a plug-in", f"pip install {PLUGINS[suffix][1]}")


@functools.cache
def _plugin_is_loaded(module: str) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    plugin = importlib.import_module(module)
    if module == "pillow_heif":
        plugin.register_heif_opener()
    return True


def one_at_a_time(size: int) -> contextlib.AbstractContextManager[object]:
    """Held while a file of `size` bytes is in memory: large ones wait for each other, so memory stays bounded."""
    return _one_large_picture if size > LARGE_FILE else contextlib.nullcontext()


def check_size(size: int) -> None:
    """Raise Rejected if a file of `size` bytes is too large to be read."""
    if size > FILE_LIMIT:
        raise Rejected("too large", f"{size / 1e9:.1f} GB; the limit is {FILE_LIMIT / 1e9:.1f} GB; shrink it")


def inspect(data: bytes) -> Facts:
    """Decode the picture once, in full, so that damage is found before training.

    Raises:
        Rejected: "empty file", "not an image", "truncated", "damaged", "too large", "unknown sample format" or
        "out of memory".
    """
    with _opened(data) as image:
        width, height = image.size
        shown = _appearance(image)
        if shown.orientation >= 5:
            width, height = height, width
        remarks: list[Remark] = []
        if shown.alpha is not None and shown.alpha.getextrema()[0] != 255:
            remarks.append("transparent")
        if shown.profile == "odd":
            remarks.append("odd profile")
        if _is_animated(image):
            remarks.append("animated")
        return Facts(width, height, tuple(remarks))


def render(data: bytes, geometry: Geometry, *, is_flattened: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels that are trained: upright sRGB, one Lanczos resample from the original, one crop.

    Args:
        is_flattened: lay transparency on white; otherwise the colors are those below the alpha channel.

    Raises:
        Rejected: as `inspect`.
    """
    with _opened(data) as image:
        picture = upright_rgb(image, is_flattened=is_flattened).resize(geometry.resize, Image.Resampling.LANCZOS)
    return np.array(picture.crop(geometry.box))


def render_mask(data: bytes, geometry: Geometry, kind: MaskKind) -> UInt8[np.ndarray, "h w"]:
    """The gray levels of a mask in the crop of its image, upright: 0 takes no part in the loss, 255 counts in full.

    Levels are taken as stored, whatever the color profile; what is transparent in a mask file is black, and an image
    without alpha is white. The resample is bilinear: Lanczos overshoots at edges, so black would not stay 0.

    Raises:
        Rejected: as `inspect`.
    """
    with _opened(data) as image:
        levels, orientation = _mask_levels(image, kind), _orientation(image)
        if orientation in TRANSPOSITIONS:
            levels = levels.transpose(TRANSPOSITIONS[orientation])
        resized = levels.resize(geometry.resize, Image.Resampling.BILINEAR)
    return np.array(resized.crop(geometry.box))


def _mask_levels(image: ImageFile.ImageFile, kind: MaskKind) -> Image.Image:
    color, alpha = _color_and_alpha(image)
    if kind == "alpha":
        return Image.new("L", color.size, 255) if alpha is None else alpha
    rgb = color.convert("RGB")  # Pillow has no way from CMYK to gray
    if kind == "mask":
        return rgb.convert("L") if alpha is None else ImageChops.multiply(rgb.convert("L"), alpha)
    # The samples of the file: level 1 of 16 bits is above 0, and would be 0 in 8; so would a dark blue in gray.
    is_deep = image.mode.startswith("I")
    is_marked = np.asarray(image) > 0 if is_deep else np.asarray(rgb).any(axis=2)
    if alpha is not None:
        is_marked &= np.asarray(alpha) > 0
    return Image.fromarray(is_marked.astype(np.uint8) * np.uint8(255))


def small_image(data: bytes, side: int) -> Image.Image:
    """The whole picture as a square of `side` pixels, upright in sRGB: to compare it with others.

    Raises:
        Rejected: as `inspect`.
    """
    with _opened(data, draft_px=side) as image:
        return upright_rgb(image).resize((side, side), Image.Resampling.BOX)


def upright_rgb(image: ImageFile.ImageFile, *, is_flattened: bool = True) -> Image.Image:
    """A loaded picture as RGB in sRGB, turned upright by its EXIF orientation.

    An ICC profile is honored (phones shoot Display P3); one that does not fit the pixels is passed over, and
    without one the numbers are taken for sRGB. 16-bit samples are scaled, CMYK is converted, transparency is
    laid on white (passed over unless `is_flattened`), and of an animation the first frame counts.

    Raises:
        Rejected: samples without an agreed white.
    """
    shown = _appearance(image)
    color, use = shown.color, shown.profile
    if isinstance(use, ImageCms.ImageCmsTransform):
        in_profile_mode = color if color.mode == use.input_mode else color.convert(use.input_mode)
        rgb = ImageCms.applyTransform(in_profile_mode, use)
        if rgb is None:
            raise TypeError("a transform that is not in place returns a picture")
    else:
        rgb = color if color.mode == "RGB" else color.convert("RGB")
    if shown.alpha is not None and is_flattened:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), shown.alpha)
    return rgb.transpose(TRANSPOSITIONS[shown.orientation]) if shown.orientation in TRANSPOSITIONS else rgb


@contextlib.contextmanager
def _opened(data: bytes, draft_px: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """The first frame of a picture, decoded. Large ones wait for each other, so memory stays bounded. With `draft_px`
    a JPEG may be decoded smaller, with sides that are not below it."""
    if not data:
        raise Rejected("empty file", "0 bytes")
    Image.init()
    pixel_data, profile = split_profile(data) if data.startswith(SIGNATURE) else (data, None)
    try:
        image = _open(pixel_data)
    except UnidentifiedImageError as error:
        raise Rejected("not an image", "no picture format that is read here") from error
    except MemoryError as error:
        raise Rejected(OUT_OF_MEMORY, "its header asks for more than there is") from error
    except DECODE_ERRORS as error:
        raise _damage(error) from error
    with image:
        if profile is not None:
            image.info["icc_profile"] = profile
        pixels = image.width * image.height
        if pixels > PIXEL_LIMIT:
            limit = f"the limit is {PIXEL_LIMIT // 1_000_000} megapixels; shrink it"
            raise Rejected("too large", f"{image.width}x{image.height}: {limit}")
        if image.format == "PNG" and pixels > 8 * MOST_INFLATED * len(data):  # a pixel takes a bit or more
            raise Rejected("truncated", f"{len(data)} bytes cannot hold {image.width}x{image.height} pixels")
        with _one_large_picture if pixels > LARGE_PIXELS else contextlib.nullcontext():
            try:
                if draft_px is not None:
                    image.draft("RGB", (draft_px, draft_px))
                _load(image)
                yield image
            except MemoryError as error:
                raise Rejected(OUT_OF_MEMORY, f"{image.width}x{image.height} pixels do not fit") from error


def _open(data: bytes) -> ImageFile.ImageFile:
    formats = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except ValueError as error:
        if "Exif payload" not in str(error):
            raise
        # libavif refuses an AVIF for damaged EXIF; it passes over items of a type that it does not know.
        return Image.open(io.BytesIO(data.replace(b"Exif", b"skip")), formats=formats)


def _load(image: ImageFile.ImageFile) -> None:
    try:
        image.load()
    except DECODE_ERRORS as error:
        raise _damage(error) from error


def _damage(error: Exception) -> Rejected:
    text = str(error) or type(error).__name__
    return Rejected("truncated" if isinstance(error, EOFError) or "truncat" in text.lower() else "damaged", text)


@dataclass(frozen=True)
class _Appearance:
    """A decoded picture, and what its metadata says about showing it: one judgment for planning and rendering."""

    color: Image.Image
    """In 8 bits, as L, RGB or CMYK."""
    alpha: Image.Image | None
    profile: "ImageCms.ImageCmsTransform | Literal['none', 'odd']"
    """How the colors come to sRGB: by a transform, as they are, or as they are because the profile is no use."""
    orientation: int
    """1…8; 1 is upright."""


def _appearance(image: ImageFile.ImageFile) -> _Appearance:
    color, alpha = _color_and_alpha(image)
    profile = image.info.get("icc_profile")
    use: ImageCms.ImageCmsTransform | Literal["none", "odd"]
    use = _profile_use_of(profile, color.mode) if profile else "none"
    return _Appearance(color, alpha, use, _orientation(image))


def _orientation(image: ImageFile.ImageFile) -> int:
    """1…8; 1, upright, where nothing else that has a meaning is said. Read after decoding: Pillow turns a TIFF by
    itself."""
    try:
        orientation = int(image.getexif().get(ORIENTATION_TAG, 1))
    except (MemoryError, *DECODE_ERRORS):  # metadata, not pixels
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _color_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The picture in 8 bits as L, RGB or CMYK, and its transparency as L if it can have any."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        samples = np.asarray(image).astype(np.uint32)
        # `convert` would clip at 255: a 16-bit ramp turns white.
        return Image.fromarray(((samples + 128) // 257).astype(np.uint8)), None
    if mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if mode in ("L", "RGB", "CMYK"):
        return image, None
    if mode == "1":
        return image.convert("L"), None
    if mode in ("P", "YCbCr", "HSV", "RGBX"):
        return image.convert("RGB"), None
    raise Rejected("unknown sample format", f"Pillow's mode {mode}; save it with 8 or 16 bits as RGB or gray")


@functools.lru_cache(maxsize=16)  # a camera's pictures share one profile
def _profile_use_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | Literal["none", "odd"]:
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(parsed).startswith("sRGB"):
            return "none"  # exactly as stored, rather than off by one after a round trip
        described = PROFILE_MODES.get(parsed.profile.xcolor_space.strip())
        if described is None or mode not in (described, {"RGB": "L"}.get(described)):
            return "odd"
        return ImageCms.buildTransform(
            parsed,
            _srgb,
            described,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return "odd"


def _is_animated(image: ImageFile.ImageFile) -> bool:
    """Whether there is a second frame. Moves to it, so this comes last. (A camera's MPO holds previews.)"""
    if image.format in ("MPO", "JPEG"):
        return False
    try:
        image.seek(1)
    except (MemoryError, *DECODE_ERRORS):
        return False
    return True
