"""A server over a workspace of its own."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from simpletuner.server.app import create_app
from simpletuner.server.roots import Roots

ORIGIN = "http://localhost:8001"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """An empty workspace, its links resolved."""
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder.resolve()


@pytest.fixture
def client(workspace: Path) -> Iterator[TestClient]:
    """A browser on this machine."""
    with TestClient(create_app(Roots(workspace)), base_url=ORIGIN) as browser:
        yield browser


@pytest.fixture
def environment(workspace: Path, pictures: Path) -> str:
    """An environment that the shell accepts, with the six pictures of every test in `pictures`."""
    shutil.copytree(pictures, workspace / "pictures")
    folder = workspace / "config" / "mine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_flavour": "tiny", "output_dir": "output/mine", "max_train_steps": 3, "lora_rank": 4})
    )
    (folder / "multidatabackend.json").write_text(
        json.dumps([{"id": "set", "instance_data_dir": "pictures", "resolution": 128, "caption_strategy": "textfile"}])
    )
    return "mine"
