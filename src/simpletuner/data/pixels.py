"""Decode image files to upright sRGB pixels, and render their training crops with one resample."""

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
from simpletuner.data.png import MAX_INFLATION, SIGNATURE, split_profile
from simpletuner.data.rejected import OUT_OF_MEMORY, Rejected

PIXELS_VERSION = 1
"""Increase it when the same file would give other pixels, so that cached latents are made again."""

PIXEL_LIMIT = 180_000_000
"""Images with more pixels are rejected: decoded and converted, each would take gigabytes."""

LARGE_PIXELS = 48_000_000
"""Images with more pixels are decoded one at a time, regardless of the number of workers."""

FILE_LIMIT = 8 * PIXEL_LIMIT
"""In bytes. Larger files are rejected unread: `PIXEL_LIMIT` pixels of four 16-bit samples do not take more."""

LARGE_FILE = 4 * LARGE_PIXELS
"""In bytes. Larger files are read one at a time, too."""

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
"""Formats that Pillow may open. Without a list, a PostScript file named .jpg would run Ghostscript."""

PLUGINS = {
    ".heic": ("pillow_heif", "pillow-heif"),
    ".heif": ("pillow_heif", "pillow-heif"),
    ".hif": ("pillow_heif", "pillow-heif"),
    ".jxl": ("pillow_jxl", "pillow-jxl-plugin"),
}
"""Suffixes that Pillow reads only with a plug-in: its module, and the package to install."""

DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    RuntimeError, struct.error, zlib.error,
)  # fmt: skip
"""Exceptions that Pillow's decoders raise on damaged files, collected from their sources; they have no common class.
Catch them only around calls to Pillow: in our own code the same exceptions are bugs."""

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the transposition that makes the image upright."""

ORIENTATION_TAG = 0x0112

PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Color space of an ICC profile → Pillow's mode of the pixels that it describes."""

Remark = Literal["transparent", "animated", "odd profile"]

MaskKind = Literal["mask", "segmentation", "alpha"]
"""Source of a mask's weights: the gray levels of a file, whether a level is above 0, or an image's alpha channel."""

# We check `PIXEL_LIMIT` ourselves, with a reason for each file; Pillow would warn from a worker thread, or raise.
Image.MAX_IMAGE_PIXELS = None
# Training does not need metadata: ignore warnings about, for example, a corrupt EXIF block beside sound pixels.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_one_large_image = threading.RLock()
_srgb = ImageCms.createProfile("sRGB")


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image that one full decode yields."""

    width: int
    """Pixels, upright."""
    height: int
    remarks: tuple[Remark, ...]
    """Properties for which `upright_rgb` changes the image beyond decoding, for notices to the user."""


def require_plugin(name: str) -> None:
    """Load the plug-in that an image with this suffix needs, if any.

    Raises:
        Rejected: the plug-in is not installed; the message has the command that installs it.
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
    """Lock to hold while a file of `size` bytes is in memory: large files wait for each other, which bounds memory."""
    return _one_large_image if size > LARGE_FILE else contextlib.nullcontext()


def check_size(size: int) -> None:
    """Raise Rejected if a file of `size` bytes exceeds `FILE_LIMIT`."""
    if size > FILE_LIMIT:
        raise Rejected("too large", f"{size / 1e9:.1f} GB; the limit is {FILE_LIMIT / 1e9:.1f} GB; shrink it")


def inspect(data: bytes) -> ImageFacts:
    """Decode an image once in full, so that damage is detected before training.

    Raises:
        Rejected: "empty file", "not an image", "truncated", "damaged", "too large", "unknown sample format" or
        "out of memory".
    """
    with _opened(data) as image:
        width, height = image.size
        appearance = _appearance(image)
        if appearance.orientation >= 5:
            width, height = height, width
        remarks: list[Remark] = []
        if appearance.alpha is not None and appearance.alpha.getextrema()[0] != 255:
            remarks.append("transparent")
        if appearance.profile == "odd":
            remarks.append("odd profile")
        if _is_animated(image):
            remarks.append("animated")
        return ImageFacts(width, height, tuple(remarks))


def render(data: bytes, geometry: Geometry, *, is_flattened: bool = True) -> UInt8[np.ndarray, "h w 3"]:
    """Render the training pixels of an image: upright sRGB, one Lanczos resample from the original, one crop.

    Args:
        is_flattened: composite transparency on white; otherwise use the stored colors and ignore the alpha channel.

    Raises:
        Rejected: as `inspect`.
    """
    with _opened(data) as image:
        upright = upright_rgb(image, is_flattened=is_flattened).resize(geometry.resize, Image.Resampling.LANCZOS)
    return np.array(upright.crop(geometry.box))


def render_mask(data: bytes, geometry: Geometry, kind: MaskKind) -> UInt8[np.ndarray, "h w"]:
    """Render the gray levels of a mask, upright, with the crop of its image: loss weight 0 at level 0 and 1 at 255.

    Levels are used as stored; color profiles are ignored. Transparent parts of a mask file are black, and with `alpha`
    an image without alpha channel is white. The resample is bilinear: Lanczos overshoots at edges, so black would not
    stay 0.

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
    rgb = color.convert("RGB")  # Pillow cannot convert CMYK to gray
    if kind == "mask":
        return rgb.convert("L") if alpha is None else ImageChops.multiply(rgb.convert("L"), alpha)
    # Test the file's own samples: level 1 of 16 bits would become 0 in 8 bits, as would a dark blue in gray.
    is_deep = image.mode.startswith("I")
    is_marked = np.asarray(image) > 0 if is_deep else np.asarray(rgb).any(axis=2)
    if alpha is not None:
        is_marked &= np.asarray(alpha) > 0
    return Image.fromarray(is_marked.astype(np.uint8) * np.uint8(255))


def small_image(data: bytes, side: int) -> Image.Image:
    """The whole image as a square of `side` pixels, upright in sRGB, for comparison with other images.

    Raises:
        Rejected: as `inspect`.
    """
    with _opened(data, draft_px=side) as image:
        return upright_rgb(image).resize((side, side), Image.Resampling.BOX)


def upright_rgb(image: ImageFile.ImageFile, *, is_flattened: bool = True) -> Image.Image:
    """Convert a loaded image to RGB in sRGB, turned upright by its EXIF orientation.

    An ICC profile is applied (phones use Display P3); a profile that does not match the pixels is ignored, and without
    a profile the values are read as sRGB. 16-bit samples are scaled, CMYK is converted, transparency is composited on
    white (ignored unless `is_flattened`), and only the first frame of an animation is used.

    Raises:
        Rejected: a sample format without a defined white.
    """
    appearance = _appearance(image)
    color, profile = appearance.color, appearance.profile
    if isinstance(profile, ImageCms.ImageCmsTransform):
        in_profile_mode = color if color.mode == profile.input_mode else color.convert(profile.input_mode)
        rgb = ImageCms.applyTransform(in_profile_mode, profile)
        if rgb is None:
            raise TypeError("a transform that is not in place returns an image")
    else:
        rgb = color if color.mode == "RGB" else color.convert("RGB")
    if appearance.alpha is not None and is_flattened:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), appearance.alpha)
    return rgb.transpose(TRANSPOSITIONS[appearance.orientation]) if appearance.orientation in TRANSPOSITIONS else rgb


@contextlib.contextmanager
def _opened(data: bytes, draft_px: int | None = None) -> Iterator[ImageFile.ImageFile]:
    """Open an image and decode its first frame. Large images wait for each other, which bounds memory. With `draft_px`,
    a JPEG may be decoded at a smaller size whose sides are at least `draft_px`."""
    if not data:
        raise Rejected("empty file", "0 bytes")
    Image.init()
    pixel_data, profile = split_profile(data) if data.startswith(SIGNATURE) else (data, None)
    try:
        image = _open(pixel_data)
    except UnidentifiedImageError as error:
        raise Rejected("not an image", "no supported image format") from error
    except MemoryError as error:
        raise Rejected(OUT_OF_MEMORY, "its header asks for more memory than is available") from error
    except DECODE_ERRORS as error:
        raise _damage(error) from error
    with image:
        if profile is not None:
            image.info["icc_profile"] = profile
        pixels = image.width * image.height
        if pixels > PIXEL_LIMIT:
            limit = f"the limit is {PIXEL_LIMIT // 1_000_000} megapixels; shrink it"
            raise Rejected("too large", f"{image.width}x{image.height}: {limit}")
        if image.format == "PNG" and pixels > 8 * MAX_INFLATION * len(data):  # a pixel takes at least a bit
            raise Rejected("truncated", f"{len(data)} bytes cannot hold {image.width}x{image.height} pixels")
        with _one_large_image if pixels > LARGE_PIXELS else contextlib.nullcontext():
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
        # libavif rejects an AVIF with damaged EXIF, but ignores items of an unknown type: rename the EXIF item.
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
    """A decoded image with its evaluated metadata; scanning and rendering share this evaluation."""

    color: Image.Image
    """8 bits per sample, as L, RGB or CMYK."""
    alpha: Image.Image | None
    profile: "ImageCms.ImageCmsTransform | Literal['none', 'odd']"
    """Conversion of the colors to sRGB: a transform, or none because there is no profile or an unusable one (`odd`)."""
    orientation: int
    """1…8; 1 is upright."""


def _appearance(image: ImageFile.ImageFile) -> _Appearance:
    color, alpha = _color_and_alpha(image)
    profile = image.info.get("icc_profile")
    conversion: ImageCms.ImageCmsTransform | Literal["none", "odd"]
    conversion = _profile_use_of(profile, color.mode) if profile else "none"
    return _Appearance(color, alpha, conversion, _orientation(image))


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1…8; 1 (upright) if it is missing or invalid. Call it after decoding, since Pillow turns a
    TIFF itself."""
    try:
        orientation = int(image.getexif().get(ORIENTATION_TAG, 1))
    except (MemoryError, *DECODE_ERRORS):  # metadata, not pixels
        return 1
    return orientation if orientation in TRANSPOSITIONS else 1


def _color_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image in 8 bits as L, RGB or CMYK, and its alpha channel as L if it has one."""
    mode = image.mode
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        samples = np.asarray(image).astype(np.uint32)
        # `convert` would clip at 255, so a 16-bit ramp would turn white.
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


@functools.lru_cache(maxsize=16)  # images of one camera share a profile
def _profile_use_of(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | Literal["none", "odd"]:
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(parsed).startswith("sRGB"):
            return "none"  # use the stored values: converting sRGB to sRGB could be off by one
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
    """Whether the image has a second frame. Seeks to it, so call this last. An MPO's other frames are previews."""
    if image.format in ("MPO", "JPEG"):
        return False
    try:
        image.seek(1)
    except (MemoryError, *DECODE_ERRORS):
        return False
    return True
