"""The prompts that pictures are made of during training."""

import unicodedata
from pathlib import Path
from typing import Any

from simpletuner.base.errors import ConfigError, Problem
from simpletuner.base.text import FILE_NAME, does_as_file_name, is_visible
from simpletuner.config.datasets import Datasets
from simpletuner.config.documents import read_document
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.values import shown

SUBJECT = "<subject>"
SINGLE = "validation_prompt"
"""The name under which the option of the same name makes its pictures."""

BUILT_IN = {
    "portrait": "a portrait photograph of <subject> by a window, soft daylight, shallow depth of field",
    "outdoors": "a wide photograph of <subject> on a hillside at golden hour, long shadows",
    "still_life": "<subject> on a wooden table beside a blue vase, studio light, plain background",
    "drawing": "a pencil drawing of <subject> on rough paper, visible strokes",
    "lettering": 'a shop window with the words "open late" and <subject> behind the glass, at night',
}
"""`validation_prompt_library`."""


def load_prompts(
    options: ValidationOptions, datasets: Datasets | None, library: Path | None, label: str
) -> tuple[dict[str, str], list[str]]:
    """Prompts by name, `<subject>` replaced, and notices.

    `library` is the user's file, which messages call `label`; `datasets` may be None where they are faulty.

    Raises:
        ConfigError: every fault of the library.
    """
    prompts = dict(BUILT_IN) if options.validation_prompt_library else {}
    if options.validation_prompt is not None:
        prompts[SINGLE] = options.validation_prompt
    if library is not None:
        prompts.update(_library(read_document(library, label), label, taken=tuple(prompts)))
    subject = options.validation_subject or _subject_of(datasets)
    if subject is not None:
        return {name: prompt.replace(SUBJECT, subject) for name, prompt in prompts.items()}, []
    if datasets is not None and any(SUBJECT in prompt for prompt in prompts.values()):
        return prompts, [f"{SUBJECT} stays in the prompts as typed: validation_subject says what it stands for."]
    return prompts, []


def _subject_of(datasets: Datasets | None) -> str | None:
    sets = () if datasets is None else datasets.train_sets
    return next((image_set.instance_prompt for image_set in sets if image_set.instance_prompt), None)


def _library(value: Any, label: str, taken: tuple[str, ...]) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ConfigError.of(f"{label}: {shown(value)}", 'an object {"name": "prompt"}')
    problems = []
    prompts: dict[str, Any] = {}
    seen = {_as_read(name): name for name in taken}
    for typed, prompt in value.items():
        name = unicodedata.normalize("NFC", typed)
        same = seen.setdefault(_as_read(name), typed)
        if not does_as_file_name(name):
            problems.append(Problem(f"{label}: the name {shown(typed)}", f"{FILE_NAME}: it becomes a file's name"))
        elif same is not typed:
            found = f"{label}: the name {shown(typed)} is taken by {shown(same)}"
            problems.append(Problem(found, remedy="Rename one of them."))
        if not isinstance(prompt, str) or not is_visible(prompt):
            problems.append(Problem(f"{label}: {name} = {shown(prompt)}", "a prompt, as text"))
        prompts[name] = prompt
    ConfigError.raise_if(problems)
    return prompts


def _as_read(name: str) -> str:
    """Equal for names that a file system may take for one: other case, accents composed differently."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
