"""`simpletuner init`: ask three questions, scan the images, and write the three files of a project."""

import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from simpletuner.base.commandline import command_text
from simpletuner.base.console import ask_user, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported, json_bytes, with_home, write_atomic
from simpletuner.base.imagefiles import IMAGE_SUFFIXES, caption_key
from simpletuner.base.machine import gpus, host_memory
from simpletuner.base.sizes import GIB
from simpletuner.base.storage import storage_of
from simpletuner.base.text import is_file_name, is_visible
from simpletuner.cli.arguments import Flag, one_of, parse_command
from simpletuner.cli.printing import table
from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.load import CONFIG_NAMES, ExaminedConfig, examine
from simpletuner.config.recipes import CARDS, RECIPES, Card, RecipeName, card_of, resident_flavour
from simpletuner.config.starter import ImageStatistics, Starter
from simpletuner.config.values import join_names
from simpletuner.data.discover import discover
from simpletuner.data.manifest import Manifest, scan

USAGE = """usage: simpletuner init [--images FOLDER] [--card SIZE] [--model NAME] [--recipe subject|style]
                        [--trigger WORD] [--env NAME] [--yes]

  Asks for the folder of images, the size of the GPU, and whether the images show a subject or a style. Then it scans
  the images, prints the memory that training needs, and writes config.json, multidatabackend.json and
  user_prompt_library.json into config/, with a comment on every value. A flag answers its question in advance.
"""

NO_CARD = "none"
ON_CARDS: tuple[FlavourName, ...] = ("dev", "klein-9b", "klein-4b")
WITHOUT_CARD: tuple[FlavourName, ...] = ("tiny", "tiny-klein")
READY: tuple[RecipeName, ...] = tuple(dict.fromkeys(each.name for each in RECIPES if each.is_ready))
WRITTEN_NOTHING = "Nothing was written."

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ChosenCard:
    """The answer to the question which GPU to train on. `card` is None without a GPU."""

    card: Card | None


def _card(text: str) -> ChosenCard:
    """Parse "24", "24 GB" or "none". A size between two cards selects the smaller card."""
    plain = text.strip().lower()
    if plain in (NO_CARD, "cpu", "no"):
        return ChosenCard(None)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", plain)
    card = card_of(float(size[1])) if size else None
    if card is None:
        raise ValueError(text)
    return ChosenCard(card)


def _image_folder(text: str) -> Path:
    folder = Path(with_home(text))
    if not text or not folder.is_dir():
        raise ValueError(text)
    return folder


def _recipe(text: str) -> RecipeName:
    return one_of(READY)(text.strip().lower())


def _trigger(text: str) -> str:
    if not is_visible(text) or len(text) > 100:
        raise ValueError(text)
    return text.strip()


_CARD_NAMES = f"{join_names((*(card.name for card in CARDS), NO_CARD))}"
_EXPECTS_CARD = f"{_CARD_NAMES} (for the embedded model)"


@dataclass(frozen=True)
class InitCommand:
    """Arguments of `simpletuner init`."""

    images: Path | None = Flag(
        "the folder of images", "FOLDER", convert=_image_folder, expects="an existing folder", follows="a folder"
    ).default(None)
    card: ChosenCard | None = Flag(
        "the GPU's memory, such as 24, or none for the embedded model, which needs no GPU",
        "SIZE",
        convert=_card,
        expects=_EXPECTS_CARD,
        follows="the GPU's memory, such as 24",
    ).default(None)
    model: FlavourName | None = Flag(
        "the model to train; by default dev, or tiny without a GPU",
        "NAME",
        convert=lambda text: one_of((*ON_CARDS, *WITHOUT_CARD))(text.strip().lower()),
        expects=join_names((*ON_CARDS, *WITHOUT_CARD)),
        follows="a model, such as klein-4b",
    ).default(None)
    recipe: RecipeName | None = Flag(
        "subject (a person, an animal, an object) or style",
        "NAME",
        convert=_recipe,
        expects=join_names(READY),
        follows=join_names(READY),
    ).default(None)
    trigger: str | None = Flag(
        "the trigger word, which names the subject or style in prompts; by default the folder's name",
        "WORD",
        convert=_trigger,
        expects="one or a few words",
        follows="a word",
    ).default(None)
    env: str = Flag("write into config/NAME/ instead, for `--env NAME`", "NAME", follows="a name").default("")
    yes: bool = Flag("ask nothing: use the proposed answers, and replace existing files").default(False)

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.env and not is_file_name(self.env):
            yield Problem(f"--env = {self.env!r}", "a valid folder name")


FORMS = {"": InitCommand}


def run(arguments: list[str]) -> int:
    """Ask the questions, scan the images, print the needed memory, and write the files.

    Raises:
        ConfigError: a mistake in the arguments, or a flag is missing and there is no terminal to ask for it.
        DataError: the folder contains no image that can be trained on.
        DiskError: no space for the files.
    """
    command = parse_command(InitCommand, arguments, check=InitCommand.problems)
    folder = Path("config", command.env) if command.env else Path("config")
    if not command.env:
        _check_not_shadowed()
    starter, notices = _with_images(_ask_questions(command))
    _print_images(starter, notices)
    for line in _training_preview(starter):
        say(line)
    if not _may_write(starter, folder, command):
        say(WRITTEN_NOTHING)
        return 0
    for name, content in starter.files().items():
        write_atomic(folder / name, json_bytes(content))
    say("\n".join(_next_steps(starter, folder, command)))
    return 0


def _check_not_shadowed() -> None:
    """Raise a ConfigError if a config in the working folder takes precedence over the files to write."""
    for name in CONFIG_NAMES:
        if Path(name).exists():
            raise ConfigError.of(
                f"{name} is read before config/{CONFIG_NAMES[0]}",
                remedy=f"{WRITTEN_NOTHING} Move it away, or give --env NAME to write into config/NAME/.",
            )


# The questions


def _ask_questions(command: InitCommand) -> Starter:
    """The answers from flags or, without the flag, from the terminal; with --yes, the proposed answers."""
    missing: list[str] = []

    def ask(
        flag: str, value: Answer | None, question: str, convert: Callable[[str], Answer], expects: str, proposed: str
    ) -> Answer | None:
        if value is not None:
            return value
        while not command.yes:
            typed = ask_user(f"{question} [{proposed}]: " if proposed else f"{question}: ")
            if typed is None:
                missing.append(flag)
                return None
            try:
                return convert(typed or proposed)
            except ValueError:
                say(f"{typed!r} is not understood: expected {expects}.")
        try:
            return convert(proposed)
        except ValueError:
            missing.append(flag)
            return None

    folder = ask(
        "--images FOLDER", command.images, "1. Where are the images", _image_folder, "a folder", _likely_folder()
    )
    card = ask("--card SIZE", command.card, f"2. Which GPU ({_CARD_NAMES})", _card, _EXPECTS_CARD, _local_card())
    name: RecipeName | None = ask(
        "--recipe NAME", command.recipe, "3. A subject or a style", _recipe, join_names(READY), READY[0]
    )
    if folder is None or card is None or name is None:
        raise ConfigError.of(
            f"{join_names(missing, 'and')}: not given, and there is no terminal to ask for it",
            remedy=f'{WRITTEN_NOTHING} Type: simpletuner init --images FOLDER --card "24 GB" --recipe subject --yes',
        )
    usual = WITHOUT_CARD if card.card is None else ON_CARDS
    flavour = command.model or usual[0]
    if flavour not in usual:
        condition = "without a GPU" if card.card is None else "with a GPU"
        raise ConfigError.of(
            f"--model = {flavour} {condition}", join_names(usual), f"{WRITTEN_NOTHING} Give another --model or --card."
        )
    word = ask(
        "--trigger WORD",
        command.trigger,
        f"   The trigger word for the {name} in prompts",
        _trigger,
        "one or a few words",
        folder.resolve().name.replace("_", " "),
    )
    if word is None:
        raise ConfigError.of(
            "--trigger WORD: not given, and there is no terminal to ask for it", remedy=WRITTEN_NOTHING
        )
    return Starter(folder, card.card, flavour, name, word, command.env, ImageStatistics(0, 0, 0, 0.0))


def _likely_folder() -> str:
    """The first folder in datasets/ that contains images; "" if there is none."""
    for folder in sorted(Path("datasets").glob("*/")):
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in folder.iterdir()):
            return str(folder)
    return ""


def _local_card() -> str:
    """The name of this machine's largest GPU; "none" if no recipe fits on it."""
    sizes = [gpu.total_bytes / GIB for gpu in gpus() if gpu.total_bytes is not None]
    card = card_of(max(sizes, default=0.0))
    return card.name if card else NO_CARD


# The images


def _with_images(starter: Starter) -> tuple[Starter, tuple[str, ...]]:
    """`starter` with the statistics of its images, and notices about them.

    Raises:
        DataError: the folder contains no image that can be trained on.
    """
    files = discover(storage_of(str(starter.folder)))
    with_text = {name for name in files.pictures if caption_key(name) in files.captions}
    # These counts determine which captions the scan reads.
    starter = replace(
        starter, image_statistics=ImageStatistics(len(files.pictures), len(with_text), len(with_text), 0.0)
    )
    manifest = _scan(starter)
    trigger = starter.trigger.lower()
    captioned = [sample for sample in manifest.samples if sample.name in with_text]
    images = ImageStatistics(
        images=len(manifest.samples),
        captions=len(captioned),
        with_trigger=sum(any(trigger in caption.lower() for caption in sample.captions) for sample in captioned),
        median_side=statistics.median((sample.width * sample.height) ** 0.5 for sample in manifest.samples),
    )
    starter = replace(starter, image_statistics=images)
    manifest = _scan(starter)  # at the resolution that the images' sizes determine
    left_out = [f"{each.name} is left out: {each.reason} ({each.detail})." for each in manifest.rejections]
    return starter, (*left_out, *manifest.notices)


def _scan(starter: Starter) -> Manifest:
    examined = _examined(starter)
    assert examined.datasets is not None
    (image_set,) = examined.datasets.train_sets
    return scan(image_set, seed=examined.config.seed, workers=examined.config.workers)


def _examined(starter: Starter) -> ExaminedConfig:
    """The configuration of the files to write, read from a temporary folder as `train` reads them."""
    with tempfile.TemporaryDirectory() as folder, file_errors_reported(Path(folder)):
        for name, content in starter.files().items():
            (Path(folder) / name).write_bytes(json_bytes(content))
        return examine(["--config", str(Path(folder) / CONFIG_NAMES[0])], folder=Path(), environ=os.environ)


# The output


def _print_images(starter: Starter, notices: tuple[str, ...]) -> None:
    stats = starter.image_statistics
    say(f"{stats.images} images in {starter.folder}, {stats.captions} with a caption; resolution {starter.resolution}.")
    without = stats.images - stats.captions
    if without:
        subject = "1 image without a caption gets" if without == 1 else f"{without} images without a caption get"
        say(
            f"{subject} the caption “{starter.trigger}”. With captions that describe the images, in NAME.txt next to "
            "NAME.jpg, the LoRA follows prompts better."
        )
    elif stats.with_trigger < stats.captions / 2:
        say(f"Most captions do not contain “{starter.trigger}”: training adds it before each caption.")
    for notice in notices:
        say(f"Note: {notice}")
    if starter.card is None:
        say(
            f"Note: {FLAVOURS[starter.flavour].title} generates only "
            f"{'colored shapes' if starter.flavour == 'tiny' else 'patterns'} at 128x128. It tests the configuration, "
            "but does not show the quality of a LoRA."
        )
    else:
        say("Note: this recipe's values come from other projects' runs (docs/recipes.md) and are untested here.")
        say(f"Note: license of the model: {FLAVOURS[starter.flavour].license}.")
        if starter.flavour == "dev" and (smaller := resident_flavour(starter.card)):
            flavour = FLAVOURS[smaller]
            say(
                f"Note: {flavour.title} fits on this GPU without streaming and trains much faster: add "
                f"--model {smaller}. Its license: {flavour.license}."
            )


def _training_preview(starter: Starter) -> Iterator[str]:
    """The planned training and its memory, and the requirements that this machine lacks."""
    # Imported late, because it loads torch, which the questions do not need.
    from simpletuner.memory.planner import MachineMemory
    from simpletuner.train.budget import Budget, quick_workload

    examined = _examined(starter)
    loaded = replace(examined, problems=()).loaded()
    memory = host_memory()
    vram = None if starter.card is None else starter.card.vram_gib * GIB
    machine = MachineMemory.of_size(vram, float(memory.total_bytes if memory else 32 * GIB))
    yield Budget(loaded.config, quick_workload(loaded), machine).sentence()
    for problem in examined.problems:
        yield f"Missing on this machine: {problem}"


def _may_write(starter: Starter, folder: Path, command: InitCommand) -> bool:
    """Ask whether to write the files. The question names existing files that would be replaced or no longer be read."""
    if command.yes:
        return True
    names = [folder / name for name in starter.files()]
    existing = [path for path in (*names, folder / CONFIG_NAMES[1]) if path.exists()]
    listed = join_names(map(str, existing or names), "and")
    answer = ask_user(f"Replace {listed}? [y/N] " if existing else f"Write {listed}? [Y/n] ")
    if answer is None:
        raise ConfigError.of("there is no terminal to ask for confirmation", remedy=f"{WRITTEN_NOTHING} Add --yes.")
    return answer.lower() in ("y", "yes") if existing else answer.lower() in ("", "y", "yes")


def _next_steps(starter: Starter, folder: Path, command: InitCommand) -> list[str]:
    selector = ("--env", command.env) if command.env else ()

    steps = {"doctor": "check this machine", "dataset show": "show the crops with their captions", "train": "train"}
    rows = [(command_text("simpletuner", *words.split(), *selector), meaning) for words, meaning in steps.items()]
    return [
        f"Written: {join_names([str(folder / name) for name in starter.files()], 'and')}.",
        "Next:",
        table(rows, "  "),
    ]
