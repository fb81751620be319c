"""`--like FILE`: the options with which a LoRA or model was trained, from its header, as flags before those typed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import flag, split_arguments
from simpletuner.base.errors import ConfigError
from simpletuner.base.files import file_errors_reported, with_home
from simpletuner.base.tensorfile import read_metadata
from simpletuner.config.flags import LIKE
from simpletuner.config.flavours import FLAVOURS, flavour_of_base
from simpletuner.config.other_keys import OPTION_ALIASES
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names, shown
from simpletuner.runs.layout import LORA_NAME, TRANSFORMER_NAME

_SHOWN_NAME = 80
_REPLACED_BY: Mapping[str, tuple[str, ...]] = {
    "flow_schedule_shift": ("flow_schedule_auto_shift", "flow_custom_timesteps"),
    "flux_lora_target": ("peft_lora_target_modules",),
    "num_train_epochs": ("max_train_steps",),
}
"""Options, each with those that leave it without effect. Where it is typed, the file's values of those are left out."""


@dataclass(frozen=True)
class Likeness:
    """What the file that `--like` names says of its training."""

    file: Path
    options: Mapping[str, Any]
    """Options that decide the weights and have other values than the present defaults; `max_train_steps` as many as
    it was trained. Without those that are typed, or replaced by one that is."""
    left_out: tuple[str, ...]
    """Options in the header that this release does not have."""
    base_model: str | None
    """Name of the weights it was trained on, where these are none of the flavours' own: a file or folder of its
    author's."""
    typed: tuple[str, ...]
    """The command's arguments without `--like`."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments that ask for the same training. What is typed comes last, and so wins."""
        return (*(flag(name, value) for name, value in self.options.items()), *self.typed)

    def lines(self, given: Mapping[str, object]) -> tuple[str, ...]:
        """What comes from the file, and what is `given` here, for people."""
        own = ", ".join(f"{name} = {shown(value)}" for name, value in self.options.items() if name not in given)
        here = ", ".join(f"{name} = {shown(value)}" for name, value in given.items())
        told = [f"From {self.file}: {own or 'nothing but defaults'}.", f"From here: {here or 'nothing'}."]
        if self.left_out:
            told.append(f"Left out, since this release has no such options: {join_names(self.left_out, 'and')}.")
        if self.base_model is not None and "pretrained_model_name_or_path" not in given:
            told.append(
                f"It was trained on {self.base_model[:_SHOWN_NAME]!r}, which its header cannot say where to find. "
                "Weights of model_flavour are used; name others with --pretrained_model_name_or_path."
            )
        return tuple(told)


def likeness(arguments: Sequence[str]) -> Likeness | None:
    """What the file that `--like` names in `arguments` says, except what they replace; None where there is no `--like`.

    Raises:
        ConfigError: it names nothing, or a file whose header says nothing of how it was trained.
        AccessError: no safetensors file.
    """
    file: Path | None = None
    typed: list[str] = []
    for argument in split_arguments(arguments):
        if argument.name != LIKE:
            typed += argument.typed
        elif not argument.value:
            raise ConfigError.of(f"--{LIKE}: nothing is named", "a LoRA or model that simpletuner trained")
        else:
            file = Path(with_home(argument.value))
    if file is None:
        return None
    with file_errors_reported(file, ConfigError, doing="read"):
        names = (LORA_NAME, TRANSFORMER_NAME) if file.is_dir() else ()
        file = next((file / name for name in names if (file / name).is_file()), file)
        if not file.is_file():
            raise ConfigError.of(f"--{LIKE} {file}: no such file", "a LoRA or model that simpletuner trained")
        header = read_metadata(file)
    # Only where it is asked for: a mistake in a configuration is answered at once.
    from simpletuner.config.record import resolved, reusable

    known, left_out = reusable(_recorded(file, header))
    flavour = FLAVOURS.get(str(known.get("model_flavour")))
    defaults = resolved(RunConfig(**({} if flavour is None else flavour.option_defaults)))
    changed = {
        name: value
        for name, value in known.items()
        if value is not None and (name == "model_flavour" or value != defaults.get(name))
    }
    step = header.get("simpletuner.step", "")
    if step.isdecimal() and len(step) < 10 and int(step) > 0:
        changed["max_train_steps"] = int(step)
    flags = [argument.name for argument in split_arguments(typed) if argument.name is not None]
    for name in [OPTION_ALIASES.get(flag_name, flag_name) for flag_name in flags]:
        for replaced in (name, *_REPLACED_BY.get(name, ())):
            changed.pop(replaced, None)
    base = header.get("simpletuner.base_model")
    is_named = base is None or flavour_of_base(base) is not None or "pretrained_model_name_or_path" in changed
    return Likeness(file, changed, left_out, None if is_named else base, tuple(typed))


def _recorded(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    text = header.get("simpletuner.options")
    if text is None:
        raise ConfigError.of(
            f"the header of {file} does not have the options it was trained with",
            "a LoRA or model of simpletuner",
            "Files of earlier releases lack them: give the config.json of their run with --config.",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError.of(f"{file}: simpletuner.options in its header is damaged", "an object of options, in JSON")
    return value
