"""Sets over a folder that the test fills."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.config.datasets import ImageSet
from simpletuner.data.manifest import Manifest, scan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the set's pictures lie."""
    path = tmp_path / "pictures"
    path.mkdir()
    return path


@pytest.fixture
def make_set(tmp_path: Path, folder: Path) -> Callable[..., ImageSet]:
    """An image set over `folder` with crops of 64 pixels; keys as in the dataset file."""

    def make(**keys: Any) -> ImageSet:
        own = {"id": "photos", "instance_data_dir": str(folder), "cache_dir_vae": str(tmp_path / "vae")}
        return ImageSet.model_validate(own | {"resolution": 64} | keys)

    return make


@pytest.fixture
def scanned(make_set: Callable[..., ImageSet]) -> Callable[..., Manifest]:
    """The manifest of `folder`; keys as in the dataset file."""

    def scan_it(seed: int = 42, **keys: Any) -> Manifest:
        return scan(make_set(**keys), seed=seed, workers=2, report=lambda _done, _total: None)

    return scan_it


@pytest.fixture
def save(folder: Path) -> Callable[..., Path]:
    """Save a plain picture as `name` in the set's folder."""

    def save_it(name: str, size: tuple[int, int] = (80, 64), color: str = "teal", **options: Any) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path, **options)
        return path

    return save_it
