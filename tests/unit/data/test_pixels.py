"""Odd files, made here: each becomes upright sRGB pixels or is rejected with the reason."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from simpletuner.data import pixels
from simpletuner.data.geometry import Geometry
from simpletuner.data.pixels import inspect, render, require_plugin
from simpletuner.data.rejected import Rejected

RED, WHITE = [255, 0, 0], [255, 255, 255]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(data: bytes) -> np.ndarray:
    """The picture's pixels, neither resized nor cropped."""
    facts = inspect(data)
    size = (facts.width, facts.height)
    return render(data, Geometry(size, size, (0, 0)))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16(samples: np.ndarray, color_type: int) -> bytes:
    """A PNG with 16 bits a sample, which Pillow itself writes for gray only."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png(width: int, height: int, body: bytes) -> bytes:
    """An RGB PNG whose one IDAT is `body`, whether or not it fits."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("color_type", "channels"), [(0, ()), (2, (3,))])
def test_a_16_bit_ramp_stays_a_ramp(color_type: int, channels: tuple[int, ...]) -> None:
    ramp = (np.arange(256, dtype=np.uint16) * 257).reshape((1, 256, *(1 for _ in channels)))
    found = whole(png16(np.broadcast_to(ramp, (2, 256, *channels)), color_type))
    assert np.array_equal(found, np.broadcast_to(np.arange(256)[None, :, None], (2, 256, 3)))


def test_16_bit_grays_are_rounded() -> None:
    found = whole(png16(np.array([[0, 128, 129, 65406, 65407, 65535]], dtype=np.uint16), 0))
    assert found[0, :, 0].tolist() == [0, 0, 1, 254, 255, 255]


def test_samples_without_an_agreed_white_are_rejected() -> None:
    with pytest.raises(Rejected, match="mode F") as caught:
        inspect(saved(Image.new("F", (8, 8), 0.5), "TIFF"))
    assert caught.value.reason == "unknown sample format"


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "YCbCr"])
def test_plain_modes(mode: str) -> None:
    image = Image.new("RGB", (8, 8), "white").convert(mode)
    assert (whole(saved(image, "JPEG" if mode == "YCbCr" else "PNG")) == 255).all()


def test_cmyk_is_converted() -> None:
    data = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(whole(data).astype(int) - RED).max() <= 2


def test_transparency_is_laid_on_white_and_told() -> None:
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 255, 0))
    image.putpixel((1, 0), (255, 0, 0, 128))
    data = saved(image)
    assert whole(data)[0].tolist() == [WHITE, [255, 127, 127], RED, RED]
    assert inspect(data).remarks == ("transparent",)
    assert inspect(saved(Image.new("RGBA", (4, 1), "red"))).remarks == (), "opaque throughout"


def test_a_palette_with_alpha() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert whole(saved(image, transparency=b"\xff\x00"))[0].tolist() == [RED, WHITE]


def test_gray_with_alpha() -> None:
    image = Image.merge("LA", (Image.new("L", (1, 1), 0), Image.new("L", (1, 1), 0)))
    assert whole(saved(image))[0, 0].tolist() == WHITE


@pytest.mark.parametrize(("kind", "suffix"), [("WEBP", "webp"), ("GIF", "gif"), ("PNG", "png"), ("TIFF", "tif")])
def test_of_an_animation_the_first_frame_counts(kind: str, suffix: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)
    assert whole(data)[0, 0].tolist() == RED, suffix
    assert inspect(data).remarks == ("animated",)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind: str, orientation: int) -> None:
    """Upright: red above, blue below, the left edge black. Stored as a camera would that was held otherwise."""
    upright = Image.new("RGB", (48, 32), "blue")
    upright.paste("red", (0, 0, 48, 16))
    upright.paste("black", (0, 0, 16, 32))
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = pixels.TRANSPOSITIONS.get(orientation)
    turned = upright if stored is None else upright.transpose(undo.get(orientation, stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(turned, kind, exif=exif, **({} if kind in ("PNG", "TIFF") else {"quality": 100}))
    facts = inspect(data)
    assert (facts.width, facts.height) == (48, 32)
    found = whole(data).astype(int)
    for (x, y), color in {(8, 8): [0, 0, 0], (40, 4): RED, (40, 28): [0, 0, 255]}.items():
        assert np.abs(found[y, x] - color).max() <= 24


def display_p3() -> bytes:
    """An RGB profile with Display P3's primaries and sRGB's curve, from sRGB's own by exchanging the colorants."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    colorants = {  # XYZ adapted to D50, https://www.color.org/chardata/rgb/DisplayP3.xalter
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    for entry in range(int.from_bytes(profile[128:132])):
        at = 132 + 12 * entry
        if values := colorants.get(bytes(profile[at : at + 4])):
            start = int.from_bytes(profile[at + 4 : at + 8]) + 8
            profile[start : start + 12] = struct.pack(">3i", *(round(value * 65536) for value in values))
    # The name decides whether pixels are taken as they are; both spellings are UTF-16 in this profile.
    return bytes(profile).replace("sRGB".encode("utf-16-be"), "P3 D".encode("utf-16-be"))


def test_display_p3_becomes_srgb() -> None:
    """P3 (200, 100, 60) is (214, 97, 49) in sRGB, by the matrices of CSS Color 4; without the profile, it is duller."""
    data = saved(Image.new("RGB", (8, 8), (200, 100, 60)), icc_profile=display_p3())
    expected = np.array(in_srgb_of_p3((200, 100, 60)))
    assert np.abs(whole(data)[0, 0] - expected).max() <= 2
    assert np.abs(expected - (200, 100, 60)).max() > 8, "the profile matters"


def in_srgb_of_p3(color: tuple[int, int, int]) -> list[float]:
    """By hand: CSS Color 4, sections 10.4 and 17 (linear P3 → XYZ → linear sRGB)."""
    value = np.array(color) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.486571, 0.265668, 0.198217], [0.228975, 0.691739, 0.079287], [0.0, 0.045113, 1.043944]]
    to_srgb = [[3.240970, -1.537383, -0.498611], [-0.969244, 1.875968, 0.041555], [0.055630, -0.203977, 1.056972]]
    linear = np.clip(np.array(to_srgb) @ np.array(to_xyz) @ linear, 0, 1)
    curved = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [round(float(channel) * 255) for channel in curved]


def test_srgb_by_profile_is_taken_as_it_is() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(whole(saved(Image.fromarray(noise), icc_profile=srgb)), noise)


@pytest.mark.parametrize("profile", [b"no profile at all", display_p3()])
def test_a_profile_that_does_not_fit_is_passed_over_and_told(profile: bytes) -> None:
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    data = saved(image, "JPEG", icc_profile=profile)
    assert inspect(data).remarks == ("odd profile",)
    assert (whole(data) == 255).all()


def test_gray_in_an_rgb_profile_stays_gray() -> None:
    data = saved(Image.new("L", (8, 8), 100), icc_profile=display_p3())
    assert np.abs(whole(data).astype(int) - 100).max() <= 1


def noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"these are words", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (noise_jpeg()[:2000], "truncated"),
        (noise_jpeg()[:-2], "truncated"),
        (saved(Image.effect_noise((64, 64), 50))[:-400], "truncated"),
        (saved(Image.effect_noise((64, 64), 50), "WEBP")[:-400], "damaged"),
    ],
    ids=["zero bytes", "text", "postscript", "half a jpeg", "jpeg without its end", "png", "webp"],
)
def test_damage_is_found(data: bytes, reason: str) -> None:
    with pytest.raises(Rejected) as caught:
        inspect(data)
    assert caught.value.reason == reason


def test_what_a_decoder_raises_costs_its_picture() -> None:
    """libavif's failure is a RuntimeError; Pillow's own refusal of a long row is a MemoryError."""
    damaged = bytearray(saved(Image.effect_noise((64, 64), 50), "AVIF"))
    start = damaged.index(b"mdat") + 4
    damaged[start : start + 40] = bytes(byte ^ 0xFF for byte in damaged[start : start + 40])
    with pytest.raises(Rejected, match="Failed to decode") as caught:
        inspect(bytes(damaged))
    assert caught.value.reason == "damaged"
    with pytest.raises(Rejected, match="do not fit") as caught:
        inspect(b"P6 179999999 1 255 ")
    assert caught.value.reason == "out of memory"


def test_a_png_cannot_claim_more_pixels_than_its_bytes_inflate_to() -> None:
    with pytest.raises(Rejected, match="74 bytes cannot hold 179999999x1 pixels") as caught:
        inspect(png(179_999_999, 1, zlib.compress(bytes(9)) + bytes(6)))
    assert caught.value.reason == "truncated"
    blank = zlib.compress(bytes(1 + 2_000 * 3) * 2_000)
    assert inspect(png(2_000, 2_000, blank)).width == 2_000, "the most that deflate can do"


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x22\0\2\x11\1\3\x11\1",
        b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 65_535, 65_535, 1, 24, 0, 0, 0, 0, 0, 0),
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", 6)
        + b"".join(
            struct.pack("<HHII", tag, 4, 1, value)
            for tag, value in ((256, 65_535), (257, 65_535), (258, 8), (262, 1), (273, 8), (279, 4_000_000_000))
        )
        + bytes(4),
        b"P6 65535 65535 255 ",
    ],
    ids=["jpeg", "gif", "bmp", "tiff", "ppm"],
)
def test_a_header_alone_takes_no_memory(data: bytes) -> None:
    with pytest.raises(Rejected, match=r"65535x65535: the limit is 180 megapixels"):
        inspect(data)


def test_many_frames_cost_no_more_than_two() -> None:
    frames = [Image.new("L", (8, 8), shade) for shade in range(200)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert inspect(data).remarks == ("animated",)


NOISE = Image.effect_noise((16, 16), 50).convert("RGB")
LONG = zlib.compress(b"workflow " * 200_000)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"prompt\0\0" + LONG),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(20_000_000))),
        chunk(b"zTXt", b"prompt\0\x09" + LONG),
        chunk(b"tEXt", b"prompt\0hello")[:-1] + b"?",
        chunk(b"eXIf", b"no EXIF"),
        chunk(b"pHYs", b"short"),
        chunk(b"prVt", b"a private one")[:-1] + b"?",
        chunk(b"zTXt", b"prompt\0\0" + LONG) * 70,
    ],
    ids=["zTXt", "iTXt", "a bomb", "unknown method", "checksum", "EXIF", "resolution", "private", "64 MiB in all"],
)
def test_metadata_of_a_png_never_costs_its_pixels(metadata: bytes) -> None:
    data = saved(NOISE)
    for place in (33, len(data) - 12):  # behind the header, and behind the pixels
        odd = data[:place] + metadata + data[place:]
        assert inspect(odd).remarks == ()
        assert np.array_equal(whole(odd), np.asarray(NOISE))


def test_damaged_exif_of_an_avif_does_not_cost_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a description"
    data = saved(NOISE, "AVIF", exif=exif)
    assert data.count(b"MM\0*") == 1
    odd = data.replace(b"MM\0*", b"XXXX")
    assert np.array_equal(whole(odd), whole(data))


def test_a_large_profile_of_a_png_is_read_and_an_odd_one_is_told() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    color, p3 = Image.new("RGB", (8, 8), (200, 100, 60)), display_p3()
    large = p3 + bytes(2_000_000)
    large = struct.pack(">I", len(large)) + large[4:]
    assert np.array_equal(whole(saved(color, icc_profile=large)), whole(saved(color, icc_profile=p3)))
    sound = saved(color, icc_profile=srgb)
    start = sound.index(b"iCCP")
    wrong_sum = bytearray(sound)
    wrong_sum[start + 60] ^= 1
    for odd in (
        bytes(wrong_sum),
        saved(color, icc_profile=b"no profile" * 200_000),
        saved(color, icc_profile=bytes(20_000_000)),
        sound[: start - 4] + chunk(b"iCCP", b"icc\0\0not deflated") + sound[sound.index(b"IDAT") - 4 :],
    ):
        assert inspect(odd).remarks == ("odd profile",)
        assert np.array_equal(whole(odd), np.asarray(color))


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
def test_xmp_of_a_png_turns_it_however_long_it_is(behind: bool) -> None:
    xmp = b'<x tiff:Orientation="6"/>' + b" " * 2_000_000
    metadata = chunk(b"zTXt", b"prompt\0\0" + LONG) + chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)
    )
    data = saved(NOISE.crop((0, 0, 16, 8)))
    place = len(data) - 12 if behind else 33
    facts = inspect(data[:place] + metadata + data[place:])
    assert (facts.width, facts.height) == (8, 16)


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_without_a_meaning_turns_neither_the_plan_nor_the_pixels(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = NOISE.crop((0, 0, 16, 8))
    data = saved(image, exif=exif)
    facts = inspect(data)
    assert (facts.width, facts.height) == (16, 8)
    assert np.array_equal(whole(data), np.asarray(image))


def test_a_bomb_is_rejected_before_it_is_decoded() -> None:
    """400 megapixels in a few hundred kilobytes; decoding would take 1.2 GB."""
    rows = zlib.compressobj(1)
    width = height = 20_000
    blank = b"\0" + bytes(width // 8)
    body = b"".join(rows.compress(blank) for _ in range(height)) + rows.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    with pytest.raises(Rejected, match="20000x20000: the limit is 180 megapixels") as caught:
        inspect(data)
    assert caught.value.reason == "too large"


def test_large_pictures_that_are_allowed_make_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "LARGE_PIXELS", 100)
    assert inspect(saved(Image.new("1", (12_000, 8_000)))).width == 12_000


@pytest.mark.parametrize(("name", "plugin"), [("a.HEIC", "pillow-heif"), ("a.jxl", "pillow-jxl-plugin")])
def test_a_missing_plugin_is_named(name: str, plugin: str) -> None:
    require_plugin("a.jpg")
    with pytest.raises(Rejected, match=f"needs a plug-in: pip install {plugin}"):
        require_plugin(name)


def test_one_resample_then_the_crop(folder: Path) -> None:
    """From a file, and equal to Pillow's own resize and crop of the upright picture."""
    noise = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.save(folder / "a.png")
    found = render((folder / "a.png").read_bytes(), Geometry((48, 32), (64, 48), (5, 7)))
    expected = image.resize((64, 48), Image.Resampling.LANCZOS).crop((5, 7, 53, 39))
    assert found.shape == (32, 48, 3)
    assert np.array_equal(found, np.asarray(expected))
