"""Small pictures: upright, on white, within bounds, of nothing but pictures."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from simpletuner.data.geometry import Geometry
from simpletuner.data.pixels import render_mask
from simpletuner.server import thumbnails
from simpletuner.server.faults import Fault
from simpletuner.server.thumbnails import picture_type, thumbnail


def small(path: Path, width: int) -> Image.Image:
    image = Image.open(io.BytesIO(thumbnail(path, width)))
    assert (image.format, image.mode) == ("JPEG", "RGB")
    return image


@pytest.mark.parametrize(("suffix", "kind"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")])
def test_a_picture_is_known_by_its_content(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (400, 200), "red").save(path)
    other = path.rename(tmp_path / "a.txt")
    assert picture_type(other) == kind
    image = small(other, 100)
    assert image.size == (100, 50)
    red, green, blue = image.getpixel((50, 25))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 20
    assert small(other, 1000).size == (400, 200)  # never larger than it is


def test_it_is_upright(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (400, 200)).save(path, exif=exif)
    assert small(path, 100).size == (100, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).convert(mode).save(path, transparency=0 if mode == "P" else None)
    assert small(path, 16).getpixel((8, 8)) == (255, 255, 255)


def test_a_deep_picture_is_scaled(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)).save(path)
    assert small(path, 16).getpixel((8, 8)) == (128, 128, 128)


def test_a_mask_has_the_levels_that_training_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    painted = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    painted.paste((255, 255, 255, 255), (0, 0, 32, 64))
    deep = Image.fromarray(np.repeat(np.array([[32768] * 32 + [2000] * 32], np.uint16), 64, 0))
    for image in (painted, deep):
        image.save(path)
        trained = render_mask(path.read_bytes(), Geometry((64, 64), (64, 64), (0, 0)), "mask")
        with Image.open(io.BytesIO(thumbnail(path, 64, is_mask=True))) as shown:
            levels = np.asarray(shown.convert("L"))
        assert np.abs(levels[32, [16, 48]].astype(int) - trained[32, [16, 48]]).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "P", "I;16", "CMYK"])
def test_any_mode_will_do(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (32, 32)).save(path)
    assert small(path, 16).size == (16, 16)


@pytest.mark.parametrize("content", [b"", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(Fault) as refused:
        thumbnail(path, 16)
    assert refused.value.status == 422


def test_a_torn_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Fault):
        thumbnail(path, 16)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_damaged_avif_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.avif"
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    head, mark, content = path.read_bytes().partition(b"mdat")
    path.write_bytes(head + mark + bytes(len(content)))  # libavif raises a RuntimeError
    with pytest.raises(Fault) as refused:
        thumbnail(path, 16)
    assert refused.value.status == 422


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    os.mkfifo(path)
    with pytest.raises(Fault) as refused:
        thumbnail(path, 16)
    assert refused.value.status == 422
    with pytest.raises(OSError, match="a pipe or a device"):
        picture_type(path)


def test_one_that_is_too_large_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (300, 300)).save(path)
    monkeypatch.setattr(thumbnails, "LARGEST_PIXELS", 300 * 300 - 1)
    with pytest.raises(Fault, match="300 × 300 pixels"):
        thumbnail(path, 16)
