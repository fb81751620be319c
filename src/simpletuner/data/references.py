"""Reference images that are named by their paths: those of prompts, and of `simpletuner sample`."""

from collections.abc import Iterable
from pathlib import Path

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ConditioningSet
from simpletuner.data.geometry import LEAST_REFERENCE_PX, MOST_REFERENCE_ASPECT, aligned_square, place_reference
from simpletuner.data.pixels import check_size, inspect, require_plugin
from simpletuner.data.rejected import Rejected
from simpletuner.data.sample import Crop

_SIZES = ConditioningSet(
    id="references",
    dataset_type="conditioning",
    conditioning_type="reference_loose",
    instance_data_dir=".",
    resolution=1024,
    resolution_type="pixel_area",
)
"""A reference keeps its shape, and above 1024² pixels it is scaled down to them, as diffusers' pipelines do."""

LARGEST_REFERENCE = aligned_square(_SIZES)
"""(width, height) of one that is square and as large as they come."""


def reference_crops(paths: Iterable[str]) -> dict[str, Crop]:
    """The reference images at `paths`, each once, by its path.

    Raises:
        ConfigError: every file that is no image, or of a size that no reference has.
    """
    problems, crops = [], {}
    for path in dict.fromkeys(paths):
        try:
            crops[path] = _crop(Path(path))
        except OSError as error:
            problems.append(Problem(f"reference {path} cannot be read ({error.strerror})", "an image"))
        except Rejected as rejected:
            shape = f"at least {LEAST_REFERENCE_PX} pixels a side and at most {MOST_REFERENCE_ASPECT}:1"
            problems.append(Problem(f"reference {path}: {rejected}", f"an image of {shape}"))
    ConfigError.raise_if(problems)
    return crops


def _crop(path: Path) -> Crop:
    require_plugin(path.name)
    check_size(path.stat().st_size)
    data = path.read_bytes()
    facts, content = inspect(data), sha256_bytes(data)
    return Crop(
        dataset=_SIZES.id,
        images=LocalStorage(path.parent),
        name=path.name,
        content=content,
        width=facts.width,
        height=facts.height,
        geometry=place_reference((facts.width, facts.height), _SIZES, seed=0, content=content),
    )
