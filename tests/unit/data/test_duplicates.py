"""Images that are the same, or nearly."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from simpletuner.data.duplicates import find_duplicates


def photograph(seed: int) -> Image.Image:
    """Blobs of color, as large as those of a photograph."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((240, 160), Image.Resampling.BICUBIC)


def groups(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(group.kind, group.names) for group in find_duplicates(folder, workers=1)[0]]


def test_exact_and_near_duplicates_are_told_apart(tmp_path: Path) -> None:
    for seed in range(12):
        photograph(seed).save(tmp_path / f"{seed:02}.png")
    shutil.copy(tmp_path / "03.png", tmp_path / "copy.png")
    photograph(5).resize((120, 80)).save(tmp_path / "small.jpg", quality=60)
    ImageEnhance.Brightness(photograph(7)).enhance(1.05).save(tmp_path / "bright.webp")
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(9).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned)
    assert groups(tmp_path) == [
        ("exact", ("03.png", "copy.png")),
        ("near", ("05.png", "small.jpg")),
        ("near", ("07.png", "bright.webp")),
        ("near", ("09.png", "turned.jpg")),
    ]


def test_plain_images_and_different_gradients_are_near_to_nothing(tmp_path: Path, pictures: Path) -> None:
    for value in (10, 200, 201):
        Image.new("RGB", (64, 64), (value, value, value)).save(tmp_path / f"{value}.png")
    assert groups(tmp_path) == []
    assert groups(pictures) == []


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    photograph(0).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    _, unread = find_duplicates(tmp_path, workers=2)
    assert [(each.name, each.reason) for each in unread] == [("broken.png", "not an image")]
