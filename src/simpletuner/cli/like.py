"""`--like FILE`: repeat the training of a LoRA or model with the options in its header; typed flags override them."""

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
from simpletuner.config.values import join_names, value_text
from simpletuner.runs.layout import LORA_NAME, TRANSFORMER_NAME

_SHOWN_NAME = 80
_OVERRIDDEN_BY: Mapping[str, tuple[str, ...]] = {
    "flow_schedule_shift": ("flow_schedule_auto_shift", "flow_custom_timesteps"),
    "flux_lora_target": ("peft_lora_target_modules",),
    "num_train_epochs": ("max_train_steps",),
}
"""Options, each with the options that would override it. If the user types an option, the file's values of the options
that override it are left out."""


@dataclass(frozen=True)
class LikeOptions:
    """The training options of the file that `--like` names, and the typed arguments."""

    file: Path
    options: Mapping[str, Any]
    """Options that affect the weights and differ from the current defaults, without those that are typed or overridden
    by a typed one. `max_train_steps` is the number of steps that the file was trained for."""
    left_out: tuple[str, ...]
    """Options in the header that this release does not have."""
    base_model: str | None
    """Name of the base weights if they are not those of a flavour, but the author's own file or folder."""
    typed: tuple[str, ...]
    """The command's arguments without `--like`."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments that repeat the training. The typed ones come last and therefore win."""
        return (*(flag(name, value) for name, value in self.options.items()), *self.typed)

    def lines(self, local_options: Mapping[str, object]) -> tuple[str, ...]:
        """Lines of text that list the options from the file, and `local_options`, which do not come from the file."""
        from_file = ", ".join(
            f"{name} = {value_text(v)}" for name, v in self.options.items() if name not in local_options
        )
        from_here = ", ".join(f"{name} = {value_text(value)}" for name, value in local_options.items())
        lines = [
            f"From {self.file}: {from_file or 'only defaults'}.",
            f"Set here: {from_here or 'nothing'}.",
        ]
        if self.left_out:
            lines.append(f"Left out, because this release lacks these options: {join_names(self.left_out, 'and')}.")
        if self.base_model is not None and "pretrained_model_name_or_path" not in local_options:
            lines.append(
                f"It was trained on {self.base_model[:_SHOWN_NAME]!r}, whose location the header does not contain. "
                "The weights of model_flavour are used; name others with --pretrained_model_name_or_path."
            )
        return tuple(lines)


def like_options(arguments: Sequence[str]) -> LikeOptions | None:
    """The training options of the file that `--like` names in `arguments`; None without `--like`.

    Raises:
        ConfigError: `--like` names no file, or one whose header lacks the training options.
        AccessError: the file is not a safetensors file.
    """
    file: Path | None = None
    typed: list[str] = []
    for argument in split_arguments(arguments):
        if argument.name != LIKE:
            typed += argument.typed
        elif not argument.value:
            raise ConfigError.of(f"--{LIKE}: no file is named", "a LoRA or model that simpletuner trained")
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
    # Imported late, so that mistakes in a configuration are reported at once.
    from simpletuner.config.record import adoptable_options, recorded_options

    recorded, left_out = adoptable_options(_recorded(file, header))
    flavour = FLAVOURS.get(str(recorded.get("model_flavour")))
    defaults = recorded_options(RunConfig(**({} if flavour is None else flavour.option_defaults)))
    changed = {
        name: value
        for name, value in recorded.items()
        if value is not None and (name == "model_flavour" or value != defaults.get(name))
    }
    step = header.get("simpletuner.step", "")
    if step.isdecimal() and len(step) < 10 and int(step) > 0:
        changed["max_train_steps"] = int(step)
    flags = [argument.name for argument in split_arguments(typed) if argument.name is not None]
    for name in [OPTION_ALIASES.get(flag_name, flag_name) for flag_name in flags]:
        for overridden in (name, *_OVERRIDDEN_BY.get(name, ())):
            changed.pop(overridden, None)
    base = header.get("simpletuner.base_model")
    is_named = base is None or flavour_of_base(base) is not None or "pretrained_model_name_or_path" in changed
    return LikeOptions(file, changed, left_out, None if is_named else base, tuple(typed))


def _recorded(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    text = header.get("simpletuner.options")
    if text is None:
        raise ConfigError.of(
            f"the header of {file} lacks the training options",
            "a LoRA or model of simpletuner",
            "Files of earlier releases lack them: give the config.json of the file's run with --config.",
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError.of(f"{file}: simpletuner.options in its header is damaged", "an object of options, in JSON")
    return value
