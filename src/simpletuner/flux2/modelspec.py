"""Header fields that programs show of a model file: Stability AI's ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec).

Its date is left out: the same run would leave other bytes on another day, and a resumed one must not.
"""

from collections.abc import Iterable, Mapping

from simpletuner.config.flavours import Flavour

ImageSize = tuple[int, int]
"""Width and height in pixels."""

_PREFIX = "modelspec."
_FIELDS = (
    "sai_model_spec",
    "architecture",
    "implementation",
    "title",
    "description",
    "license",
    "resolution",
    "trigger_phrase",
    "usage_hint",
)
MODELSPEC_FIELDS = frozenset(_PREFIX + name for name in _FIELDS)
"""What a file of ours may have."""
_IMPLEMENTATION = "https://github.com/black-forest-labs/flux2"
"""As musubi-tuner writes it, and the architectures too."""


def modelspec(
    flavour: Flavour,
    *,
    is_lora: bool,
    resolution: ImageSize | None,
    comment: str | None = None,
    trigger: str | None = None,
) -> dict[str, str]:
    """The fields of what was trained on `flavour`."""
    what = "LoRA" if is_lora else "fine-tune"
    fields: Mapping[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"Flux.2-{flavour.family}{'/lora' if is_lora else ''}",
        "implementation": _IMPLEMENTATION,
        "title": f"{what} of {flavour.title}" + (f": {trigger}" if trigger else ""),
        "description": comment,
        "license": flavour.license,
        "resolution": None if resolution is None else "{}x{}".format(*resolution),
        "trigger_phrase": trigger,
        "usage_hint": None if trigger is None else f"Say {trigger!r} in the prompt.",
    }
    return {_PREFIX + name: value for name, value in fields.items() if value is not None}


def usual_size(buckets: Iterable[Mapping[ImageSize, list[int]]]) -> ImageSize | None:
    """The size that most images of all data sets are trained at; of equally many, the largest."""
    counts: dict[ImageSize, int] = {}
    for each in buckets:
        for size, images in each.items():
            counts[size] = counts.get(size, 0) + len(images)
    return max(counts, key=lambda size: (counts[size], size[0] * size[1], size), default=None)
