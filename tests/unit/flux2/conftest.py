"""A Hub on this machine, and the embedded models as a `Source`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.loopback_hub import LoopbackHub, linked_copy, loopback_hub

from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.source import Source, locate


@pytest.fixture
def repository(tiny_folder: Path, tmp_path: Path) -> Path:
    """The embedded model's folder, to be changed at will: the files are hard links until they are replaced."""
    return linked_copy(tiny_folder, tmp_path / "repository")


@pytest.fixture
def hub(repository: Path) -> Iterator[LoopbackHub]:
    """Serves the embedded model as acme/flux2."""
    with loopback_hub({"acme/flux2": repository}) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_source(tiny_folder: Path) -> Source:
    """The embedded model, as every loader wants it."""
    options = ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder))
    return locate(options, report=print)


@pytest.fixture(scope="session", params=["tiny", pytest.param("tiny-klein", marks=pytest.mark.slow)])
def embedded_source(request: pytest.FixtureRequest) -> Source:
    """Each of the embedded models: Mistral padded on the left, and Qwen3 padded on the right."""
    folder = request.getfixturevalue(f"{request.param.replace('-', '_')}_folder")
    return locate(ModelOptions(model_flavour=request.param, pretrained_model_name_or_path=str(folder)), report=print)
