"""Options for validation images and for the held-out loss."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.options.kinds import (
    Count,
    Expects,
    IsJson,
    ModelText,
    NotNegative,
    PathText,
    Seed,
    Slice,
    Text,
    Whole,
    list_as_tuple,
    whole_as_text,
)

AUTO_PREVIEW = "auto"
"""Value of `validation_preview_model` that means the flavour's distilled sibling."""

_SIZE = re.compile(r"\s*(\d+)\s*(?:[xX×]\s*(\d+)\s*)?")
SIDE_MULTIPLE_PX = 16
"""An image's sides are multiples of this many pixels, the side of one latent."""


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        match = _SIZE.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a size")
        width, height = int(match[1]), int(match[2] or match[1])
        if not width or not height or width % SIDE_MULTIPLE_PX or height % SIDE_MULTIPLE_PX:
            raise ValueError(f"{width}x{height} is not divisible by {SIDE_MULTIPLE_PX}")
        sizes.append((width, height))
    return tuple(sizes)


def _is_sizes(text: str) -> str:
    _sizes(text)
    return text


class ValidationOptions(Slice):
    """Validation."""

    validation_prompt: Text | None = None
    """A prompt for validation images, in addition to the prompt libraries."""

    validation_prompt_library: bool = False
    """Also use the program's built-in prompts."""

    user_prompt_library: PathText | None = None
    """A JSON file of prompts for validation images: `{"name": "prompt"}`, or with reference images
    `{"name": {"prompt": "text", "references": ["a.png"]}}`. By default `user_prompt_library.json` beside the config or
    in `config/`, if it exists. `<subject>` in a prompt is replaced by `validation_subject`."""

    validation_subject: Text | None = None
    """Text that replaces `<subject>` in prompts. By default the first dataset's `instance_prompt`. Without either,
    `<subject>` stays in the prompt, with a notice."""

    validation_step_interval: Whole = 100
    """Number of steps between validation images. 0 turns this off."""

    validation_epoch_interval: Count | None = None
    """Number of epochs between validation images."""

    validation_on_startup: bool = False
    """Generate validation images before the first step too."""

    validation_disable: bool = False
    """Generate no validation images."""

    validation_preview_model: ModelText | None = None
    """Generate validation images with the LoRA on this model, such as the distilled sibling of a klein base, which
    needs 4 steps. Takes `auto` (that sibling), a flavour, a folder, a Hub id or a `.safetensors` file. Only its
    transformer is used. See [fast previews](klein.md#fast-previews)."""

    validation_resolution: Annotated[
        str,
        BeforeValidator(whole_as_text),
        AfterValidator(_is_sizes),
        Expects("a size such as 1024, 1024x768 or a comma list of them, each side divisible by 16"),
    ] = "1024x1024"
    """Sizes of the validation images in pixels: `1024`, `1024x768` (width x height), or a comma list."""

    validation_num_inference_steps: Count = FLAVOURS[DEFAULT_FLAVOUR].validation_steps
    """Sampler steps per validation image."""

    validation_guidance: NotNegative = FLAVOURS[DEFAULT_FLAVOUR].guidance
    """Guidance of the validation images. dev takes it as an input. On klein it is true classifier-free guidance
    against `validation_negative_prompt`, which takes twice the time; 1 turns it off. Distilled models ignore it."""

    validation_guidance_real: Annotated[float, Ge(1)] = 1.0
    """True classifier-free guidance of dev's validation images against `validation_negative_prompt`, in addition to
    `validation_guidance`. Takes twice the time; 1 turns it off."""

    validation_negative_prompt: str = ""
    """Prompt that classifier-free guidance steers away from."""

    validation_seed: Seed | None = None
    """Seed of the validation images' noise. By default `seed`."""

    num_validation_images: Count = 1
    """Number of validation images for each prompt and size."""

    validation_image_format: Literal["png", "jpg"] = "png"
    """File format of the validation images."""

    disable_benchmark: bool = False
    """Do not generate the base model's images. Otherwise they are generated once and shown beside the validation
    images."""

    validation_drift_prompts: (
        Annotated[
            tuple[Text, ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(list_as_tuple),
            Expects('a list of prompts, ["a cat", "a street"], or the path of a JSON file with one'),
        ]
        | None
    ) = None
    """Prompts whose images should not change. Their images' distance from the base model's images is measured with each
    contact sheet, at the first size of `validation_resolution` and in at most 8 steps."""

    eval_dataset_id: Text | None = None
    """The `eval` dataset to measure the held-out loss on. By default all of them."""

    eval_steps_interval: Count | None = None
    """Number of steps between measurements of the held-out loss. By default it is measured whenever validation images
    are due."""

    num_eval_images: Count | None = None
    """Maximum number of images to use from each `eval` dataset."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, height) in pixels of every size in `validation_resolution`."""
        return _sizes(self.validation_resolution)
