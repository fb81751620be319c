"""Pictures made along the way, and the loss on held-out pictures."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.options.kinds import (
    Count,
    IsJson,
    ModelText,
    NotNegative,
    PathText,
    Says,
    Seed,
    Slice,
    Text,
    Whole,
    list_as_tuple,
    whole_as_text,
)

AUTO_PREVIEW = "auto"
"""The `validation_preview_model` that stands for the distilled sibling of the flavour."""

_SIZE = re.compile(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?")
SIDE_MULTIPLE_PX = 16
"""A picture's sides are multiples of this many pixels: one latent each."""


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a size")
        width, height = int(match[1]), int(match[2] or match[1])
        if not width or not height or width % SIDE_MULTIPLE_PX or height % SIDE_MULTIPLE_PX:
            raise ValueError(f"{width}x{height} does not divide by {SIDE_MULTIPLE_PX}")
        found.append((width, height))
    return tuple(found)


def _is_sizes(text: str) -> str:
    _sizes(text)
    return text


class ValidationOptions(Slice):
    """Validation."""

    validation_prompt: Text | None = None
    """A prompt to make pictures of, beside those of the library."""

    validation_prompt_library: bool = False
    """Also use the prompts that come with the program."""

    user_prompt_library: PathText | None = None
    """A JSON file `{"name": "prompt"}`, or with reference images `{"name": {"prompt": "text", "references":
    ["a.png"]}}`; by default `user_prompt_library.json` beside the config or in `config/`, if there. `<subject>` in a
    prompt stands for `validation_subject`."""

    validation_subject: Text | None = None
    """What `<subject>` stands for; by default the first dataset's `instance_prompt`. Without either the text
    stays as typed, with a notice."""

    validation_step_interval: Whole = 100
    """Make pictures every so many steps; 0 means never by steps."""

    validation_epoch_interval: Count | None = None
    """Make pictures every so many epochs."""

    validation_on_startup: bool = False
    """Make pictures before the first step too."""

    validation_disable: bool = False
    """Make no pictures."""

    validation_preview_model: ModelText | None = None
    """Draw the validation images on this model with the LoRA, such as a klein base's distilled sibling, in 4 steps:
    `auto`, that sibling; a flavour; or a folder, Hub id or `.safetensors` file. Only its transformer is used: see
    [fast previews](klein.md#fast-previews)."""

    validation_resolution: Annotated[
        str,
        BeforeValidator(whole_as_text),
        AfterValidator(_is_sizes),
        Says("a size such as 1024, 1024x768 or a comma list of them, each side divisible by 16"),
    ] = "1024x1024"
    """Sizes of the pictures in pixels: `1024`, `1024x768` (width x height), or a comma list."""

    validation_num_inference_steps: Count = FLAVOURS[DEFAULT_FLAVOUR].validation_steps
    """Sampler steps of a picture."""

    validation_guidance: NotNegative = FLAVOURS[DEFAULT_FLAVOUR].guidance
    """Guidance of the validation images. dev takes it as an input. On klein it is true classifier-free guidance
    against `validation_negative_prompt`, at twice the time; 1 turns it off. Distilled models ignore it."""

    validation_guidance_real: Annotated[float, Ge(1)] = 1.0
    """For dev: true classifier-free guidance against `validation_negative_prompt` on top of `validation_guidance`, at
    twice the time; 1 is none."""

    validation_negative_prompt: str = ""
    """What true guidance steers away from."""

    validation_seed: Seed | None = None
    """Seed of the pictures' noise; by default `seed`."""

    num_validation_images: Count = 1
    """Pictures of each prompt and size."""

    validation_image_format: Literal["png", "jpg"] = "png"
    """File format of the pictures."""

    disable_benchmark: bool = False
    """Leave out the base model's own pictures, which are otherwise made once and shown beside."""

    validation_drift_prompts: (
        Annotated[
            tuple[Text, ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(list_as_tuple),
            Says('a list of prompts, ["a cat", "a street"], or the path of a JSON file with one'),
        ]
        | None
    ) = None
    """Prompts whose images should not move: how far they are from the base model's is measured with each sheet, at the
    first size of `validation_resolution` and in at most 8 steps."""

    eval_dataset_id: Text | None = None
    """The `eval` dataset whose held-out loss is measured; by default all of them."""

    eval_steps_interval: Count | None = None
    """Measure the held-out loss every so many steps; by default whenever pictures are due."""

    num_eval_images: Count | None = None
    """Use at most so many pictures of an `eval` dataset."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of every size in `validation_resolution`."""
        return _sizes(self.validation_resolution)
