"""Reference images given by their paths: those of validation prompts, and of `simpletuner sample`."""

from collections.abc import Iterable
from pathlib import Path

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import sha256_bytes
from simpletuner.base.storage import LocalStorage
from simpletuner.config.datasets import ConditioningSet
from simpletuner.data.geometry import MAX_REFERENCE_ASPECT, MIN_REFERENCE_PX, aligned_square, reference_geometry
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
"""References keep their shape; above 1024² pixels they are scaled down to 1024², as in diffusers' pipelines."""

LARGEST_REFERENCE = aligned_square(_SIZES)
"""(width, height) of the largest square reference."""


def reference_crops(paths: Iterable[str]) -> dict[str, Crop]:
    """Read the reference images at `paths`. Returns their crops by path.

    Raises:
        ConfigError: some files are not images, or have an unsupported size; the error lists all of them.
    """
    problems, crops = [], {}
    for path in dict.fromkeys(paths):
        try:
            crops[path] = _crop(Path(path))
        except OSError as error:
            problems.append(Problem(f"reference {path} cannot be read ({error.strerror})", "an image"))
        except Rejected as rejected:
            shape = f"at least {MIN_REFERENCE_PX} pixels per side and at most {MAX_REFERENCE_ASPECT}:1"
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
        geometry=reference_geometry((facts.width, facts.height), _SIZES, seed=0, content=content),
    )
