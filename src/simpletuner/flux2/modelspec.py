"""Header fields by which programs describe a model file: Stability AI's ModelSpec 1.0.1
(https://github.com/Stability-AI/ModelSpec).

Its date is omitted: it would change the bytes of a file from day to day, but a resumed run must write the same bytes.
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
"""The ModelSpec fields that our files may have."""
_IMPLEMENTATION = "https://github.com/black-forest-labs/flux2"
"""The value that musubi-tuner writes; the architectures are also musubi-tuner's."""


def modelspec(
    flavour: Flavour,
    *,
    is_lora: bool,
    resolution: ImageSize | None,
    comment: str | None = None,
    trigger: str | None = None,
) -> dict[str, str]:
    """The ModelSpec fields of a LoRA or full model trained on `flavour`."""
    product = "LoRA" if is_lora else "fine-tune"
    fields: Mapping[str, str | None] = {
        "sai_model_spec": "1.0.1",
        "architecture": f"Flux.2-{flavour.family}{'/lora' if is_lora else ''}",
        "implementation": _IMPLEMENTATION,
        "title": f"{product} of {flavour.title}" + (f": {trigger}" if trigger else ""),
        "description": comment,
        "license": flavour.license,
        "resolution": None if resolution is None else "{}x{}".format(*resolution),
        "trigger_phrase": trigger,
        "usage_hint": None if trigger is None else f"Say {trigger!r} in the prompt.",
    }
    return {_PREFIX + name: value for name, value in fields.items() if value is not None}


def most_common_size(buckets: Iterable[Mapping[ImageSize, list[int]]]) -> ImageSize | None:
    """The most common training size over all datasets; the largest, if several are equally common."""
    counts: dict[ImageSize, int] = {}
    for each in buckets:
        for size, images in each.items():
            counts[size] = counts.get(size, 0) + len(images)
    return max(counts, key=lambda size: (counts[size], size[0] * size[1], size), default=None)
