"""Strip a PNG's metadata before decoding: keep only the chunks that affect the pixels, so that damage in
other chunks cannot fail the decoder."""

import zlib

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_INFLATION = 1032
"""Maximum ratio of inflated to compressed bytes of Deflate."""

TEXT_LIMIT = 16 * 1024**2
"""Maximum number of inflated bytes of text chunks with an orientation."""

PROFILE_LIMIT = 16 * 1024**2
"""Maximum number of inflated bytes of a color profile; printers' profiles take a few megabytes."""

DAMAGED_PROFILE = b"damaged"
"""Stands for a profile that cannot be read; color management rejects it."""

PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
"""Ancillary chunks that affect the pixels: transparency and frames."""

TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")

ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Keywords of the text chunks in which Pillow looks for an orientation."""

# Pillow rejects a file whose text exceeds Pillow's own limit of 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = TEXT_LIMIT


def split_profile(data: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG without the metadata that does not affect its pixels, and its ICC profile.

    Text (ComfyUI workflows take megabytes), times, previews and private chunks are removed, damaged or not. Chunks with
    the orientation are kept unless they are damaged. The profile is `DAMAGED_PROFILE` if it cannot be inflated.
    """
    pieces: list[bytes] = []
    profile: bytes | None = None
    copied, position, text_left = 0, len(SIGNATURE), TEXT_LIMIT
    is_checked = True  # Pillow does not verify checksums after the pixels
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4])
        kind, body = data[position + 4 : position + 8], memoryview(data)[position + 8 : end - 4]
        if end > len(data) or not kind.isalpha():
            break
        is_checked = is_checked and kind != b"IDAT"
        is_kept = kind[:1].isupper() or kind in PIXEL_CHUNKS
        if not is_kept:
            is_sound = not is_checked or zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end])
            if kind == b"iCCP":
                profile = _profile(bytes(body)) if is_sound else DAMAGED_PROFILE
            elif is_sound and kind in TEXT_CHUNKS and bytes(body[:80]).split(b"\0")[0] in ORIENTATION_KEYWORDS:
                text_left -= _text_size(kind, bytes(body), text_left)
                is_kept = text_left >= 0
            else:
                is_kept = is_sound and kind == b"eXIf"
        if not is_kept:
            pieces.append(data[copied:position])
            copied = end
        position = end
    return (b"".join((*pieces, data[copied:])) if pieces else data), profile


def _profile(body: bytes) -> bytes:
    compressed = body.partition(b"\0")[2][1:]
    try:
        profile = zlib.decompressobj().decompress(compressed, PROFILE_LIMIT + 1)
    except zlib.error:
        return DAMAGED_PROFILE
    return profile if len(profile) <= PROFILE_LIMIT else DAMAGED_PROFILE


def _text_size(kind: bytes, body: bytes, limit: int) -> int:
    """Number of bytes of an inflated text; some number above `limit` if it is longer."""
    text = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return len(text)
    compressed = text[1:] if kind == b"zTXt" else text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return len(zlib.decompressobj().decompress(compressed, limit + 1))
    except zlib.error:
        return len(compressed)
