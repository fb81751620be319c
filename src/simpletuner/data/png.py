"""The chunks of a PNG: what decides its pixels is kept, other metadata is left out before a decoder may stumble on
it."""

import zlib

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MOST_INFLATED = 1032
"""Deflate makes at most so many bytes of one."""

TEXT_LIMIT = 16 * 1024**2
"""Bytes of inflated text that may say how a picture is turned."""

PROFILE_LIMIT = 16 * 1024**2
"""Bytes of an inflated color profile; printers' profiles take a few megabytes."""

DAMAGED_PROFILE = b"damaged"
"""In place of a profile that cannot be read: no color management takes it for one."""

PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT")
"""Ancillary chunks that decide pixels: transparency and frames."""

TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")

ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Text in which Pillow looks for an orientation."""

# Pillow refuses a file for text beyond its own limit of 1 MiB.
PngImagePlugin.MAX_TEXT_CHUNK = TEXT_LIMIT


def split_profile(data: bytes) -> tuple[bytes, bytes | None]:
    """A PNG without the metadata that has no part in its pixels, and its ICC profile.

    Text (workflows of ComfyUI have megabytes), times, previews and private chunks go, whatever is wrong with them. What
    says how the picture is turned stays, unless it is damaged. The profile is `DAMAGED_PROFILE` where it cannot be
    inflated.
    """
    kept: list[bytes] = []
    profile: bytes | None = None
    copied, at, text_left = 0, len(SIGNATURE), TEXT_LIMIT
    is_checked = True  # Pillow compares no checksums behind the pixels
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], memoryview(data)[at + 8 : end - 4]
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
            kept.append(data[copied:at])
            copied = end
        at = end
    return (b"".join((*kept, data[copied:])) if kept else data), profile


def _profile(body: bytes) -> bytes:
    compressed = body.partition(b"\0")[2][1:]
    try:
        profile = zlib.decompressobj().decompress(compressed, PROFILE_LIMIT + 1)
    except zlib.error:
        return DAMAGED_PROFILE
    return profile if len(profile) <= PROFILE_LIMIT else DAMAGED_PROFILE


def _text_size(kind: bytes, body: bytes, most: int) -> int:
    """Bytes of a text once it is inflated; more than `most` where it has more."""
    text = body.partition(b"\0")[2]
    if kind == b"tEXt" or (kind == b"iTXt" and text[:1] == b"\0"):
        return len(text)
    compressed = text[1:] if kind == b"zTXt" else text[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return len(zlib.decompressobj().decompress(compressed, most + 1))
    except zlib.error:
        return len(compressed)
