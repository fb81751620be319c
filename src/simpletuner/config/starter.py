"""The three files that a new project starts from: config, datasets and prompts, each value with a comment on why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.text import does_as_file_name
from simpletuner.config.documents import COMMENT
from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.load import CONFIG_NAMES, DATASETS_NAME, PROMPTS_NAME
from simpletuner.config.prompts import SUBJECT
from simpletuner.config.recipes import Card, Recipe, RecipeName, recipe

VALIDATIONS = 8
"""About how often a run makes images and saves, beside its end."""
RESOLUTIONS = (1024, 768, 512)
"""To choose from by the images' sizes, in pixels."""
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
_WITHOUT = {"without": "a photograph of a red bicycle against a brick wall"}
_TINY_PROMPTS = {
    "large": f"a large {SUBJECT} on a green background, middle",
    "small": f"a small {SUBJECT} on a purple background, left",
    "without": "a large yellow star on a blue background, left",
}


@dataclass(frozen=True)
class FoundImages:
    """What a folder holds, as far as the files depend on it."""

    images: int
    captions: int
    """Images that have a caption of their own."""
    with_trigger: int
    """Those of them whose caption has the trigger in it."""
    median_side: float
    """Side in pixels of a square as large as the image in the middle."""


@dataclass(frozen=True)
class Starter:
    """The answers to three questions, and what was found in the folder."""

    folder: Path
    """Of the images, as typed."""
    card: Card | None
    """None trains an embedded model, which needs no GPU."""
    flavour: FlavourName
    recipe_name: RecipeName
    trigger: str
    """The word or words by which prompts ask for the subject or the style."""
    env: str
    """Of `--env`; empty for config/ itself."""
    found: FoundImages

    @property
    def recipe(self) -> Recipe:
        return recipe(self.recipe_name, self.flavour)

    @property
    def name(self) -> str:
        """The folder's, for the set and its caches."""
        name = self.folder.resolve().name
        return name if does_as_file_name(name) else "images"

    @property
    def resolution(self) -> int:
        """Pixels of a side: the largest to which the image in the middle need not be enlarged."""
        only_side = FLAVOURS[self.flavour].only_side
        if only_side is not None:
            return only_side
        return next((side for side in RESOLUTIONS if side <= self.found.median_side), RESOLUTIONS[-1])

    @property
    def epochs(self) -> int:
        return self.recipe.epochs(self.found.images)

    @property
    def steps(self) -> int:
        """Of the run, about."""
        return self.epochs * self.recipe.batches(self.found.images)

    def files(self) -> dict[str, Any]:
        """The content of each file by its name. The config comes last: without it nothing is read."""
        return {PROMPTS_NAME: self._prompts(), DATASETS_NAME: self._datasets(), CONFIG_NAMES[0]: self._config()}

    def _config(self) -> dict[str, Any]:
        every = max(50, round(self.steps / VALIDATIONS / 50) * 50)
        words = FLAVOURS[self.flavour].title + (f" on a card of {self.card.name}" if self.card else "")
        size = f"{self.resolution}x{self.resolution}"
        card_options: Mapping[str, Any] = {} if self.card is None else self.card.fits[self.flavour].options
        sources = dict(self.recipe.sources)
        sources["num_train_epochs"] += f". {self.found.images} images: about {self.steps:,} steps"
        said = {
            "model_type": ("lora", "a small file beside the model; full would train all of its weights"),
            "model_family": ("flux2", ""),
            "model_flavour": (self.flavour, f"its license: {FLAVOURS[self.flavour].license}"),
            "output_dir": (self._output, "everything that the run leaves"),
            **{option: (value, sources[option]) for option, value in self.recipe.options.items()},
            "num_train_epochs": (self.epochs, sources["num_train_epochs"]),
            **{option: (value, self._why_card()) for option, value in card_options.items()},
            "validation_subject": (self.trigger, f"what {SUBJECT} stands for in {PROMPTS_NAME}"),
            "validation_resolution": (size, "as the images are trained"),
            "validation_step_interval": (every, "images are made so often; watch them and stop when they are good"),
            "checkpoint_step_interval": (every, "a checkpoint for each set of images, to go back to"),
        }
        head = f"Made by `simpletuner init`: {self.recipe.title.lower()} with {words}."
        if not self.recipe.is_tested:
            head += " Untested on real weights; docs/recipes.md has the sources."
        return {COMMENT: head, **dict(_commented(said))}

    @property
    def _output(self) -> str:
        """A run directory of its own for each project, and for the embedded model."""
        return f"output/{self.env or self.name}{'-tiny' if self.card is None else ''}"

    def _why_card(self) -> str:
        assert self.card is not None
        summary = self.card.fits[self.flavour].summary
        return f"for a card of {self.card.name}: {summary}; `simpletuner plan` computes what it takes"

    def _datasets(self) -> list[dict[str, Any]]:
        found = self.found
        family = self.flavour if self.card is None or self.flavour != "dev" else "flux2"
        said: dict[str, tuple[Any, str]] = {
            "id": (self.name, ""),
            "type": ("local", ""),
            "instance_data_dir": (str(self.folder), ""),
        }
        if found.captions:
            said["caption_strategy"] = ("textfile", "NAME.txt beside NAME.jpg is the caption")
            without = found.images - found.captions
            why = f"the caption of the {without} images without one" if without else "the caption of an image without"
            said["instance_prompt"] = (self.trigger, why)
            if found.with_trigger < found.captions / 2:
                said["prepend_instance_prompt"] = (True, f"most captions do not say {self.trigger}, so it goes first")
        else:
            said["caption_strategy"] = ("instanceprompt", "no image has a caption, so all get instance_prompt")
            said["instance_prompt"] = (self.trigger, "")
        said["metadata_backend"] = ("discovery", "")
        said["resolution"] = (self.resolution, self._why_resolution())
        said["resolution_type"] = ("pixel_area", "other shapes keep their shape and get as many pixels")
        if self.card is None:
            said["crop"] = (True, "the embedded model draws squares")
            said["crop_aspect"] = ("square", "")
            said["crop_style"] = ("center", "")
        else:
            said["crop"] = (False, "nothing is cut off but a few pixels")
        said["cache_dir_vae"] = (f"cache/vae/{family}/{self.name}", "")
        said["repeats"] = (0, "extra passes in an epoch: to balance several folders")
        text = {
            "id": "text-embeds",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": f"cache/text/{family}",
        }
        return [dict(_commented(said)), {COMMENT: "where encoded captions are kept", **text}]

    def _why_resolution(self) -> str:
        if self.card is None:
            return "what the embedded model was trained at"
        side = f"{self.found.median_side:.0f}x{self.found.median_side:.0f}"
        if self.found.median_side < self.resolution:
            return f"the smallest size offered: half of the images have no more pixels than {side} and are enlarged"
        return f"half of the images have at least as many pixels as {side}"

    def _prompts(self) -> dict[str, str]:
        if self.card is None:
            prompts = _TINY_PROMPTS
        else:
            prompts = (_STYLE_PROMPTS if self.recipe_name == "style" else _SUBJECT_PROMPTS) | _WITHOUT
        head = f"Each prompt gets an image along the way. {SUBJECT} is validation_subject of config.json; "
        return {COMMENT: f"{head}the prompt without it shows what else the LoRA changes.", **prompts}


def _commented(said: Mapping[str, tuple[Any, str]]) -> Iterator[tuple[str, Any]]:
    """Each value behind a comment key, where there is something to say."""
    for key, (value, why) in said.items():
        if why:
            yield f"{COMMENT} {key}", why
        yield key, value
