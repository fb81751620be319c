"""`simpletuner init`: three questions, a look at the images, and the three files that a project starts from."""

import os
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from simpletuner.base.commandline import command_text
from simpletuner.base.console import answer_to, say
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.files import file_errors_reported, json_bytes, with_home, write_atomic
from simpletuner.base.imagefiles import PICTURE_SUFFIXES, caption_key
from simpletuner.base.machine import gpus, host_memory
from simpletuner.base.sizes import GIB
from simpletuner.base.storage import storage_of
from simpletuner.base.text import does_as_file_name, is_visible
from simpletuner.cli.arguments import Flag, one_of, parse_command
from simpletuner.cli.printing import table
from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.load import CONFIG_NAMES, Examined, examine
from simpletuner.config.recipes import CARDS, RECIPES, Card, RecipeName, card_of, resident_flavour
from simpletuner.config.starter import FoundImages, Starter
from simpletuner.config.values import join_names
from simpletuner.data.discover import discover
from simpletuner.data.manifest import Manifest, scan

USAGE = """usage: simpletuner init [--images FOLDER] [--card SIZE] [--model NAME] [--recipe subject|style]
                        [--trigger WORD] [--env NAME] [--yes]

  Asks where the images are, which card trains them, and whether they show a subject or a style; looks at the images,
  says what training them takes, and writes config.json, multidatabackend.json and user_prompt_library.json into
  config/, with a comment on every value. A question whose flag is given is not asked.
"""

NO_CARD = "none"
ON_CARDS: tuple[FlavourName, ...] = ("dev", "klein-9b", "klein-4b")
WITHOUT_CARD: tuple[FlavourName, ...] = ("tiny", "tiny-klein")
READY: tuple[RecipeName, ...] = tuple(dict.fromkeys(each.name for each in RECIPES if each.is_ready))
WRITTEN_NOTHING = "Nothing was written."

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class ChosenCard:
    """The answer to the second question: a card, or none."""

    card: Card | None


def _card(text: str) -> ChosenCard:
    """ "24", "24 GB", "none"; a size between two cards is the smaller one."""
    plain = text.strip().lower()
    if plain in (NO_CARD, "cpu", "no"):
        return ChosenCard(None)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gi?b?)?", plain)
    card = card_of(float(size[1])) if size else None
    if card is None:
        raise ValueError(text)
    return ChosenCard(card)


def _images(text: str) -> Path:
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
_EXPECTS_CARD = f"{_CARD_NAMES} (to try everything with the embedded model)"


@dataclass(frozen=True)
class InitCommand:
    """Arguments of `simpletuner init`."""

    images: Path | None = Flag(
        "the folder of images", "FOLDER", convert=_images, expects="a folder that is there", follows="a folder"
    ).default(None)
    card: ChosenCard | None = Flag(
        "the GPU's memory, such as 24, or none for the embedded model, which needs no GPU",
        "SIZE",
        convert=_card,
        expects=_EXPECTS_CARD,
        follows="the card's memory, such as 24",
    ).default(None)
    model: FlavourName | None = Flag(
        "what is trained; by default dev, and without a card tiny",
        "NAME",
        convert=lambda text: one_of((*ON_CARDS, *WITHOUT_CARD))(text.strip().lower()),
        expects=join_names((*ON_CARDS, *WITHOUT_CARD)),
        follows="a model, such as klein-4b",
    ).default(None)
    recipe: RecipeName | None = Flag(
        "subject (a person, an animal, a thing) or style",
        "NAME",
        convert=_recipe,
        expects=join_names(READY),
        follows=join_names(READY),
    ).default(None)
    trigger: str | None = Flag(
        "the word by which prompts ask for it; by default the folder's name",
        "WORD",
        convert=_trigger,
        expects="a word or a few",
        follows="a word",
    ).default(None)
    env: str = Flag("write into config/NAME/ instead, for `--env NAME`", "NAME", follows="a name").default("")
    yes: bool = Flag("ask nothing: take what would be proposed, and replace files that are there").default(False)

    def problems(self) -> Iterator[Problem]:
        """Problems that parsing alone does not find."""
        if self.env and not does_as_file_name(self.env):
            yield Problem(f"--env = {self.env!r}", "a name that can be a folder's")


FORMS = {"": InitCommand}


def run(arguments: list[str]) -> int:
    """Ask, look, say what it takes, and write the files.

    Raises:
        ConfigError: a flag is wrong, or nobody can be asked and a flag is missing.
        DataError: nothing in the folder can be trained.
        DiskError: no space for the files.
    """
    command = parse_command(InitCommand, arguments, check=InitCommand.problems)
    folder = Path("config", command.env) if command.env else Path("config")
    if not command.env:
        _check_not_shadowed()
    starter, notices = _looked_at(_asked(command))
    _say_found(starter, notices)
    for line in _previewed(starter):
        say(line)
    if not _may_write(starter, folder, command):
        say(WRITTEN_NOTHING)
        return 0
    for name, content in starter.files().items():
        write_atomic(folder / name, json_bytes(content))
    say("\n".join(_next_steps(starter, folder, command)))
    return 0


def _check_not_shadowed() -> None:
    """Raise a ConfigError where a config in the working folder would be read instead of what is written."""
    for name in CONFIG_NAMES:
        if Path(name).exists():
            raise ConfigError.of(
                f"{name} is read before config/{CONFIG_NAMES[0]}",
                remedy=f"{WRITTEN_NOTHING} Move it away, or give --env NAME to write into config/NAME/.",
            )


# The questions


def _asked(command: InitCommand) -> Starter:
    """The answers: flags first, then what is typed, then, with --yes, what would be proposed."""
    missing: list[str] = []

    def ask(
        flag: str, given: Answer | None, question: str, convert: Callable[[str], Answer], expects: str, proposed: str
    ) -> Answer | None:
        if given is not None:
            return given
        while not command.yes:
            typed = answer_to(f"{question} [{proposed}]: " if proposed else f"{question}: ")
            if typed is None:
                missing.append(flag)
                return None
            try:
                return convert(typed or proposed)
            except ValueError:
                say(f"{typed!r} was not understood: expected {expects}.")
        try:
            return convert(proposed)
        except ValueError:
            missing.append(flag)
            return None

    folder = ask("--images FOLDER", command.images, "1. Where are the images", _images, "a folder", _likely_folder())
    card = ask("--card SIZE", command.card, f"2. Which card ({_CARD_NAMES})", _card, _EXPECTS_CARD, _own_card())
    name: RecipeName | None = ask(
        "--recipe NAME", command.recipe, "3. A subject or a style", _recipe, join_names(READY), READY[0]
    )
    if folder is None or card is None or name is None:
        raise ConfigError.of(
            f"{join_names(missing, 'and')}: not given, and nobody can be asked",
            remedy=f'{WRITTEN_NOTHING} Type: simpletuner init --images FOLDER --card "24 GB" --recipe subject --yes',
        )
    usual = WITHOUT_CARD if card.card is None else ON_CARDS
    flavour = command.model or usual[0]
    if flavour not in usual:
        where = "without a card" if card.card is None else "with a card"
        raise ConfigError.of(
            f"--model = {flavour} {where}", join_names(usual), f"{WRITTEN_NOTHING} Give another --model or --card."
        )
    word = ask(
        "--trigger WORD",
        command.trigger,
        f"   The word by which prompts ask for the {name}",
        _trigger,
        "a word or a few",
        folder.resolve().name.replace("_", " "),
    )
    if word is None:
        raise ConfigError.of("--trigger WORD: not given, and nobody can be asked", remedy=WRITTEN_NOTHING)
    return Starter(folder, card.card, flavour, name, word, command.env, FoundImages(0, 0, 0, 0.0))


def _likely_folder() -> str:
    """A folder of images here: the first below datasets/ that has any."""
    for folder in sorted(Path("datasets").glob("*/")):
        if any(file.suffix.lower() in PICTURE_SUFFIXES for file in folder.iterdir()):
            return str(folder)
    return ""


def _own_card() -> str:
    """The name of this machine's largest card; none without one that a recipe fits on."""
    sizes = [gpu.total_bytes / GIB for gpu in gpus() if gpu.total_bytes is not None]
    card = card_of(max(sizes, default=0.0))
    return card.name if card else NO_CARD


# The images


def _looked_at(starter: Starter) -> tuple[Starter, tuple[str, ...]]:
    """`starter` with what its folder holds, and what a person should know of it.

    Raises:
        DataError: nothing in it can be trained.
    """
    files = discover(storage_of(str(starter.folder)))
    with_text = {name for name in files.pictures if caption_key(name) in files.captions}
    # Decides which captions are read, and so comes before they are.
    starter = replace(starter, found=FoundImages(len(files.pictures), len(with_text), len(with_text), 0.0))
    manifest = _scanned(starter)
    trigger = starter.trigger.lower()
    own = [sample for sample in manifest.samples if sample.name in with_text]
    found = FoundImages(
        images=len(manifest.samples),
        captions=len(own),
        with_trigger=sum(any(trigger in caption.lower() for caption in sample.captions) for sample in own),
        median_side=statistics.median((sample.width * sample.height) ** 0.5 for sample in manifest.samples),
    )
    starter = replace(starter, found=found)
    manifest = _scanned(starter)  # at the resolution that follows from their sizes
    left_out = [f"{each.name} is left out: {each.reason} ({each.detail})." for each in manifest.rejections]
    return starter, (*left_out, *manifest.notices)


def _scanned(starter: Starter) -> Manifest:
    examined = _examined(starter)
    assert examined.datasets is not None
    (image_set,) = examined.datasets.train_sets
    return scan(image_set, seed=examined.config.seed, workers=examined.config.workers)


def _examined(starter: Starter) -> Examined:
    """What the files say, read as `train` would read them, before they are written."""
    with tempfile.TemporaryDirectory() as folder, file_errors_reported(Path(folder)):
        for name, content in starter.files().items():
            (Path(folder) / name).write_bytes(json_bytes(content))
        return examine(["--config", str(Path(folder) / CONFIG_NAMES[0])], folder=Path(), environ=os.environ)


# What is said


def _say_found(starter: Starter, notices: tuple[str, ...]) -> None:
    found = starter.found
    say(f"{found.images} images in {starter.folder}, {found.captions} with a caption; trained at {starter.resolution}.")
    without = found.images - found.captions
    if without:
        subject = "1 image without a caption gets" if without == 1 else f"{without} images without a caption get"
        say(
            f"{subject} “{starter.trigger}”. A text that says what is to be seen, in NAME.txt beside NAME.jpg, makes a "
            "LoRA that follows prompts better."
        )
    elif found.with_trigger < found.captions / 2:
        say(f"Most captions do not say “{starter.trigger}”: it is put before each.")
    for notice in notices:
        say(f"Note: {notice}")
    if starter.card is None:
        say(
            f"Note: {FLAVOURS[starter.flavour].title} draws "
            f"{'colored shapes' if starter.flavour == 'tiny' else 'patterns'} at 128x128 and nothing else. It shows "
            "whether the files are right, not what a LoRA will look like."
        )
    else:
        say("Note: this recipe's numbers come from others' runs (docs/recipes.md); nobody has judged one here.")
        say(f"Note: license of the model: {FLAVOURS[starter.flavour].license}.")
        if starter.flavour == "dev" and (smaller := resident_flavour(starter.card)):
            flavour = FLAVOURS[smaller]
            say(
                f"Note: {flavour.title} fits on this card without streaming, and trains much faster: add "
                f"--model {smaller}. Its license: {flavour.license}."
            )


def _previewed(starter: Starter) -> Iterator[str]:
    """What training will do and take, and what is missing for it here."""
    # torch, which the questions do without.
    from simpletuner.memory.planner import Machine
    from simpletuner.train.budget import Budget, looked_at

    examined = _examined(starter)
    loaded = replace(examined, problems=()).loaded()
    memory = host_memory()
    vram = None if starter.card is None else starter.card.vram_gib * GIB
    machine = Machine.of_size(vram, float(memory.total_bytes if memory else 32 * GIB))
    yield Budget(loaded.config, looked_at(loaded), machine).sentence()
    for problem in examined.problems:
        yield f"Missing here: {problem}"


def _may_write(starter: Starter, folder: Path, command: InitCommand) -> bool:
    """Whether the files may be written: asked, and asked about what would be replaced or no longer read."""
    if command.yes:
        return True
    names = [folder / name for name in starter.files()]
    there = [path for path in (*names, folder / CONFIG_NAMES[1]) if path.exists()]
    listed = join_names(map(str, there or names), "and")
    answer = answer_to(f"Replace {listed}? [y/N] " if there else f"Write {listed}? [Y/n] ")
    if answer is None:
        raise ConfigError.of("nobody can be asked", remedy=f"{WRITTEN_NOTHING} Add --yes.")
    return answer.lower() in ("y", "yes") if there else answer.lower() in ("", "y", "yes")


def _next_steps(starter: Starter, folder: Path, command: InitCommand) -> list[str]:
    selector = ("--env", command.env) if command.env else ()

    steps = {"doctor": "is everything there", "dataset show": "the crops, with their captions", "train": "train"}
    rows = [(command_text("simpletuner", *words.split(), *selector), meaning) for words, meaning in steps.items()]
    return [
        f"Written: {join_names([str(folder / name) for name in starter.files()], 'and')}.",
        "Next:",
        table(rows, "  "),
    ]
