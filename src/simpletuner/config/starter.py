"""Write the three files of a new project: config, datasets and prompts, with a comment that explains each value."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.text import is_file_name
from simpletuner.config.documents import COMMENT
from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.load import CONFIG_NAMES, DATASETS_NAME, PROMPTS_NAME
from simpletuner.config.prompts import SUBJECT
from simpletuner.config.recipes import Card, Recipe, RecipeName, recipe

VALIDATIONS = 8
"""Approximate number of validations and of checkpoints in a run, without those at its end."""
RESOLUTIONS = (1024, 768, 512)
"""Training resolutions in pixels. The images' sizes determine which one is used."""
_SUBJECT_PROMPTS = {
    "portrait": f"a photograph of {SUBJECT} by a window, soft daylight",
    "outdoors": f"{SUBJECT} on a hillside at golden hour, seen from afar",
    "drawing": f"a pencil drawing of {SUBJECT}",
}
_STYLE_PROMPTS = {
    "person": f"{SUBJECT}, a woman reading on a bench",
    "place": f"{SUBJECT}, a harbor at night",
    "thing": f"{SUBJECT}, a teapot on a wooden table",
}
_PROMPT_WITHOUT_SUBJECT = {"without": "a photograph of a red bicycle against a brick wall"}
_TINY_PROMPTS = {
    "large": f"a large {SUBJECT} on a green background, middle",
    "small": f"a small {SUBJECT} on a purple background, left",
    "without": "a large yellow star on a blue background, left",
}


@dataclass(frozen=True)
class ImageStatistics:
    """Statistics of an image folder, which determine values in the files."""

    images: int
    captions: int
    """Number of images with a caption file."""
    with_trigger: int
    """Number of captions that contain the trigger."""
    median_side: float
    """Side in pixels of a square with the area of the median image."""


@dataclass(frozen=True)
class Starter:
    """The user's answers to `simpletuner init`, and the statistics of the image folder."""

    folder: Path
    """The folder of images, as typed."""
    card: Card | None
    """GPU size; None to train an embedded model, which needs no GPU."""
    flavour: FlavourName
    recipe_name: RecipeName
    trigger: str
    """The trigger word or words, which name the subject or style in prompts."""
    env: str
    """Value of `--env`; empty for config/ itself."""
    image_statistics: ImageStatistics

    @property
    def recipe(self) -> Recipe:
        return recipe(self.recipe_name, self.flavour)

    @property
    def name(self) -> str:
        """The folder's name, for the dataset and its caches."""
        name = self.folder.resolve().name
        return name if is_file_name(name) else "images"

    @property
    def resolution(self) -> int:
        """Training resolution as a side in pixels: the largest that does not enlarge the median image."""
        only_side = FLAVOURS[self.flavour].fixed_side
        if only_side is not None:
            return only_side
        return next((side for side in RESOLUTIONS if side <= self.image_statistics.median_side), RESOLUTIONS[-1])

    @property
    def epochs(self) -> int:
        return self.recipe.epochs(self.image_statistics.images)

    @property
    def steps(self) -> int:
        """Approximate number of optimizer steps of the run."""
        return self.epochs * self.recipe.batches(self.image_statistics.images)

    def files(self) -> dict[str, Any]:
        """The content of each file by its name, the config last: until it exists, the other files are not read."""
        return {PROMPTS_NAME: self._prompts(), DATASETS_NAME: self._datasets(), CONFIG_NAMES[0]: self._config()}

    def _config(self) -> dict[str, Any]:
        interval = max(50, round(self.steps / VALIDATIONS / 50) * 50)
        model_and_card = FLAVOURS[self.flavour].title + (f" on a {self.card.name} GPU" if self.card else "")
        size = f"{self.resolution}x{self.resolution}"
        card_options: Mapping[str, Any] = {} if self.card is None else self.card.fits[self.flavour].options
        sources = dict(self.recipe.sources)
        sources["num_train_epochs"] += f". {self.image_statistics.images} images: about {self.steps:,} steps"
        commented = {
            "model_type": ("lora", "a small file beside the model; full would train all of the model's weights"),
            "model_family": ("flux2", ""),
            "model_flavour": (self.flavour, f"its license: {FLAVOURS[self.flavour].license}"),
            "output_dir": (self._output, "folder for all files of the run"),
            **{option: (value, sources[option]) for option, value in self.recipe.options.items()},
            "num_train_epochs": (self.epochs, sources["num_train_epochs"]),
            **{option: (value, self._card_comment()) for option, value in card_options.items()},
            "validation_subject": (self.trigger, f"replaces {SUBJECT} in {PROMPTS_NAME}"),
            "validation_resolution": (size, "the training resolution"),
            "validation_step_interval": (interval, "steps between validation images: stop when they are good"),
            "checkpoint_step_interval": (interval, "a checkpoint with each contact sheet, to return to"),
        }
        head = f"Made by `simpletuner init`: {self.recipe.title.lower()} with {model_and_card}."
        if not self.recipe.is_tested:
            head += " Untested on real weights; docs/recipes.md has the sources."
        return {COMMENT: head, **dict(_with_comments(commented))}

    @property
    def _output(self) -> str:
        """The run directory: a separate one for each project, and for the embedded model."""
        return f"output/{self.env or self.name}{'-tiny' if self.card is None else ''}"

    def _card_comment(self) -> str:
        assert self.card is not None
        summary = self.card.fits[self.flavour].summary
        return f"for a {self.card.name} GPU: {summary}; `simpletuner plan` computes the memory it takes"

    def _datasets(self) -> list[dict[str, Any]]:
        images = self.image_statistics
        family = self.flavour if self.card is None or self.flavour != "dev" else "flux2"
        commented: dict[str, tuple[Any, str]] = {
            "id": (self.name, ""),
            "type": ("local", ""),
            "instance_data_dir": (str(self.folder), ""),
        }
        if images.captions:
            commented["caption_strategy"] = ("textfile", "NAME.txt beside NAME.jpg is the caption")
            uncaptioned = images.images - images.captions
            comment = (
                f"the caption of the {uncaptioned} images without a caption file"
                if uncaptioned
                else "the caption of images without a caption file"
            )
            commented["instance_prompt"] = (self.trigger, comment)
            if images.with_trigger < images.captions / 2:
                commented["prepend_instance_prompt"] = (True, f"most captions lack {self.trigger}, so it goes first")
        else:
            commented["caption_strategy"] = ("instanceprompt", "no image has a caption, so all get instance_prompt")
            commented["instance_prompt"] = (self.trigger, "")
        commented["metadata_backend"] = ("discovery", "")
        commented["resolution"] = (self.resolution, self._resolution_comment())
        commented["resolution_type"] = ("pixel_area", "images keep their shape and get the area of this square")
        if self.card is None:
            commented["crop"] = (True, "the embedded model generates squares")
            commented["crop_aspect"] = ("square", "")
            commented["crop_style"] = ("center", "")
        else:
            commented["crop"] = (False, "images lose only a few pixels")
        commented["cache_dir_vae"] = (f"cache/vae/{family}/{self.name}", "")
        commented["repeats"] = (0, "extra passes in an epoch, to balance several folders")
        text = {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": f"cache/text/{family}",
        }
        return [dict(_with_comments(commented)), {COMMENT: "cache of encoded captions", **text}]

    def _resolution_comment(self) -> str:
        if self.card is None:
            return "the embedded model's only resolution"
        side = f"{self.image_statistics.median_side:.0f}x{self.image_statistics.median_side:.0f}"
        if self.image_statistics.median_side < self.resolution:
            return f"the smallest resolution offered: half of the images have at most {side} pixels and are enlarged"
        return f"half of the images have at least as many pixels as {side}"

    def _prompts(self) -> dict[str, str]:
        if self.card is None:
            prompts = _TINY_PROMPTS
        else:
            prompts = (_STYLE_PROMPTS if self.recipe_name == "style" else _SUBJECT_PROMPTS) | _PROMPT_WITHOUT_SUBJECT
        head = f"Prompts of the validation images. {SUBJECT} is replaced by validation_subject of config.json; "
        return {COMMENT: f"{head}the prompt without it shows what else the LoRA changes.", **prompts}


def _with_comments(commented: Mapping[str, tuple[Any, str]]) -> Iterator[tuple[str, Any]]:
    """Each key and value of `commented` (key to value and comment), after a comment key if the comment is not empty."""
    for key, (value, comment) in commented.items():
        if comment:
            yield f"{COMMENT} {key}", comment
        yield key, value
