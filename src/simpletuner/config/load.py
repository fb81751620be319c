"""Load a configuration: merge defaults, file, environment and flags, then validate the result or report every problem.

Defaults have the lowest precedence, flags the highest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import command_text, with_flags
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.datasets import Datasets, ImageSet
from simpletuner.config.documents import document_text, read_document
from simpletuner.config.flags import ParsedFlags, parse
from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.given import (
    ORIGINS,
    CheckedKeys,
    GivenValue,
    KnownKeys,
    Origin,
    by_canonical_name,
    check_givens,
)
from simpletuner.config.launched import with_launched_processes
from simpletuner.config.listing import DatasetListing, PathContext, read_datasets
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.other_keys import OPTION_ALIASES, OTHER_OPTIONS
from simpletuner.config.other_trainers import (
    TEXT_FORMATS,
    is_text_format,
    other_format,
    other_text_problem,
    other_trainer_problem,
)
from simpletuner.config.paths import PathRule, allow_any_path, fill_placeholders, is_local_model, join_working_folder
from simpletuner.config.previews import with_preview_defaults
from simpletuner.config.prompts import Prompt, load_prompts
from simpletuner.config.rules import findings, notices, validation_image_notices
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.values import join_names, kinds, nearest, value_text

RUN = KnownKeys(
    RunConfig,
    OTHER_OPTIONS,
    foreign_keys=ImageSet.model_fields,
    other_place="multidatabackend.json, in each image set",
)

ENVIRONMENT_PREFIX = "SIMPLETUNER_"
PAGE_ROOTS_VARIABLE = f"{ENVIRONMENT_PREFIX}PAGE_ROOTS"
"""Environment variable for commands that the page starts: folders that their configuration may refer to. It is not an
option."""
CONFIG_NAMES = ("config.json", "config.toml")
TEXT_NAMES = tuple(f"config{suffix}" for suffix in TEXT_FORMATS)
"""Configs of other formats, which are recognized but not read, if there is no other config."""
DATASETS_NAME = "multidatabackend.json"
PROMPTS_NAME = "user_prompt_library.json"
NO_CONFIGURATION = "no configuration here"
"""Message if no config is named and the usual places have none."""
EXAMPLES_FOLDER = Path(__file__).parents[1] / "examples"

_MODEL_PATHS = (
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_text_encoder_model_name_or_path",
)


@dataclass(frozen=True)
class ExaminedConfig:
    """A run's configuration, which may have problems."""

    config: RunConfig
    """The options, with defaults for missing and faulty ones."""

    datasets: Datasets | None
    """None if they have problems."""

    prompts: dict[str, Prompt]
    """Prompts of validation images by name, with `<subject>` replaced."""

    notices: tuple[str, ...]
    """One line each: options without effect, aliases, the license."""

    origins: dict[str, Origin]
    """Source of each option's value."""

    config_file: Path | None
    """The config that was read."""

    datasets_file: Path | None
    """The dataset list that was read."""

    prompts_file: Path | None
    """The prompt library that was read."""

    arguments: tuple[str, ...]
    """Arguments after `simpletuner train`."""

    problems: tuple[Problem, ...]

    def loaded(self) -> "LoadedConfig":
        """The configuration, if it has no problems.

        Raises:
            ConfigError: lists every problem.
        """
        ConfigError.raise_if(self.problems)
        return LoadedConfig(**vars(self))


@dataclass(frozen=True)
class LoadedConfig(ExaminedConfig):
    """A run's complete, valid configuration. It has no problems."""

    datasets: Datasets
    datasets_file: Path

    @property
    def validation_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of validation images; empty if `validation_disable` is set."""
        return () if self.config.validation_disable else tuple(self.prompts.values())

    def command(self, **changes: object) -> str:
        """The command that the user typed, with `changes` to some options, as text that can be typed again."""
        return command_text("simpletuner", "train", *with_flags(self.arguments, changes, OPTION_ALIASES))


def load(arguments: Sequence[str], *, folder: Path, environ: Mapping[str, str]) -> LoadedConfig:
    """Load the configuration for `arguments`, which follow `simpletuner train`.

    Relative paths are joined to `folder`. The command passes `Path()`, which leaves them as typed.

    Raises:
        ConfigError: lists every problem of flags, environment, config, datasets and prompts.
    """
    return examine(arguments, folder=folder, environ=environ).loaded()


def examine(
    arguments: Sequence[str], *, folder: Path, environ: Mapping[str, str], rule: PathRule = allow_any_path
) -> ExaminedConfig:
    """The same as `load`, but with the problems in the result instead of raised.

    `rule` checks every path before it is read. With a rule of its own, the placeholder `{env:NAME}` is rejected.
    """
    flags = parse(arguments)
    problems = list(flags.problems)
    config_file = _config_file(flags, folder, environ, problems)
    if refused := _refusal(rule, "config", config_file):
        problems.append(refused)
        config_file = None
    checked = CheckedKeys()
    from_file = _from_file(config_file, folder, problems)
    if from_file is None:  # another trainer's config: ignore the files beside it
        config_file = None
    sources = [
        from_file or [],
        _from_environment(environ),
        list(flags.options.items()),
    ]
    givens: dict[str, GivenValue] = {}
    for source in sources:
        givens |= by_canonical_name(source, RUN, checked)
    _drop_overridden_paths(givens, checked)
    givens = _with_json_files(givens, folder, checked, rule)
    check_givens(givens, RUN, checked)

    flavour = FLAVOURS[checked.valid.get("model_flavour", DEFAULT_FLAVOUR)]
    config = RunConfig(**flavour.option_defaults | checked.valid)
    config = with_launched_processes(config, givens, checked, environ)
    variables = environ if rule is allow_any_path else None
    config, names = _with_paths(config, givens, checked, PathContext(folder, {}, variables, rule))
    datasets_file = _datasets_file(config, config_file)
    config = with_preview_defaults(config, set(checked.valid))
    path_context = PathContext(folder, names, variables, rule)
    listing = _datasets(config, datasets_file, checked, path_context, givens)
    prompts_file = _prompts_file(config, config_file, folder)
    if refused := _refusal(rule, "user_prompt_library", prompts_file):
        problems.append(refused)
        prompts_file = None
    prompts, prompt_notices = _prompts(config, listing, prompts_file, path_context, problems)
    by_key = {key: [replace(problem, key=key)] for key, problem in checked.problems.items()}
    for keys, problem in findings(config, listing.datasets):
        # For a rejected value `config` has the default, so a rule about it would be misleading.
        if not any(key in checked.problems for key in keys):
            by_key.setdefault(keys[0], []).append(replace(_as_typed(problem, keys[0], givens), key=keys[0]))

    in_typed_order = [problem for key in dict.fromkeys([*givens, *by_key]) for problem in by_key.get(key, [])]
    problems += [*in_typed_order, *listing.problems]
    origins: dict[str, Origin] = dict.fromkeys(OPTION_NAMES, "default")
    origins |= {key: givens[key].origin for key in checked.valid}
    typed = [key for key in checked.valid if key in givens]
    # Notices assume options without problems.
    rule_notices = () if problems else notices(config, listing.datasets, typed)
    return ExaminedConfig(
        config=config,
        datasets=listing.datasets,
        prompts=prompts,
        notices=(
            *_flavour_notice(givens),
            *checked.notices,
            *rule_notices,
            *listing.notices,
            *prompt_notices,
            *(() if problems else validation_image_notices(config, prompts)),
        ),
        origins=origins,
        config_file=config_file,
        datasets_file=datasets_file,
        prompts_file=prompts_file,
        arguments=tuple(arguments),
        problems=tuple(problems),
    )


def _config_file(flags: ParsedFlags, folder: Path, environ: Mapping[str, str], problems: list[Problem]) -> Path | None:
    """The config to read: the named one, else the first in the usual places.

    None if flags alone configure the run; also None, with an entry in `problems`, if no config exists or two are named.
    """
    try:
        return _chosen(flags, folder, environ)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _chosen(flags: ParsedFlags, folder: Path, environ: Mapping[str, str]) -> Path | None:
    selectors = flags.selectors
    if len(selectors) > 1:
        names = join_names([f"--{name}" for name in selectors], "and")
        raise ConfigError.of(f"{names} are given", "one of them, since each selects the config")
    if "config" in selectors:
        path = Path(join_working_folder(folder, selectors["config"]))
        if path.is_dir():
            raise ConfigError.of(f"--config {selectors['config']}: this is a folder", "the config file in it")
        if not _exists(path):
            raise ConfigError.of(f"--config {selectors['config']}: no such file")
        return path
    if "env" in selectors:
        return _in_folder(folder / "config" / selectors["env"], f"--env {selectors['env']}")
    if "example" in selectors:
        return _in_folder(EXAMPLES_FOLDER / selectors["example"], f"--example {selectors['example']}")
    config_file = _in_usual_places(folder, CONFIG_NAMES)
    lists_datasets = "data_backend_config" in flags.options or f"{ENVIRONMENT_PREFIX}DATA_BACKEND_CONFIG" in environ
    if config_file is None and not lists_datasets:
        config_file = _in_usual_places(folder, TEXT_NAMES)
        if config_file is not None:
            return config_file
        raise ConfigError.of(
            NO_CONFIGURATION,
            f"{join_names(['config.json', 'config.toml', 'config/config.json', 'config/config.toml'])}",
            "Write one with `simpletuner init`, name one with --config or --env, or try the program with --example "
            "tiny-lora.",
        )
    return config_file


def _in_usual_places(folder: Path, names: Sequence[str]) -> Path | None:
    usual = [folder / subfolder / name for subfolder in ("", "config") for name in names]
    # Include a folder or a pipe of that name: reading it reports the error.
    return next((path for path in usual if _exists(path)), None)


def _exists(path: Path) -> bool:
    """Whether `path` exists; True too for a broken link.

    Raises:
        OSError: this user may not enter a folder of the path.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _in_folder(folder: Path, flag: str) -> Path:
    for name in (*CONFIG_NAMES, *TEXT_NAMES):
        if _exists(folder / name):
            return folder / name
    config_names = sorted({path.parent.name for name in CONFIG_NAMES for path in folder.parent.glob(f"*/{name}")})
    near = nearest(folder.name, config_names)
    raise ConfigError.of(
        f"{flag}: there is no {folder.name}",
        join_names(config_names) if config_names else f"a config in {folder}",
        f"Did you mean {near}?" if near and len(config_names) > 1 else "",
    )


def _from_file(path: Path | None, folder: Path, problems: list[Problem]) -> list[tuple[str, GivenValue]] | None:
    """The config's keys and values; None, with an entry in `problems`, if it is another trainer's config."""
    if path is None:
        return []
    label = _label(path, folder)
    try:
        if is_text_format(path):
            problems.append(other_text_problem(label, path.suffix, document_text(path, label)))
            return None
        values = read_document(path, label)
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    if not isinstance(values, dict):
        problems.append(Problem(f"{label}: {value_text(values)}", 'an object {"option": value}'))
        return []
    name = other_format(values)
    if name is not None:
        problems.append(other_trainer_problem(label, name, values))
        return None
    return [(key.lstrip("-"), GivenValue(value, "file", key)) for key, value in values.items()]


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, GivenValue]]:
    names = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name != PAGE_ROOTS_VARIABLE)
    return [
        (name.removeprefix(ENVIRONMENT_PREFIX).lower(), GivenValue(environ[name], "environment", name))
        for name in names
    ]


def _label(path: Path, folder: Path) -> str:
    """A path for messages, relative to the working folder if it is inside."""
    for start, prefix in ((folder, Path()), (EXAMPLES_FOLDER, Path("examples"))):
        if path.is_relative_to(start):
            return str(prefix / path.relative_to(start))
    return str(path)


def _refusal(rule: PathRule, key: str, path: Path | None) -> Problem | None:
    """The problem that `rule` has with reading `path`; None if it may be read, as the program's examples always may."""
    return None if path is None or path.is_relative_to(EXAMPLES_FOLDER) else rule(key, str(path))


def _with_json_files(
    givens: dict[str, GivenValue], folder: Path, checked: CheckedKeys, rule: PathRule
) -> dict[str, GivenValue]:
    """`givens`, with the names of JSON files replaced by the files' contents for options with a JSON value."""
    resolved_givens = dict(givens)
    for key, kind in kinds(RunConfig).items():
        value = givens[key].value if key in givens else None
        if kind.is_json and isinstance(value, str) and value.endswith(".json"):
            if refused := rule(key, join_working_folder(folder, value)):
                checked.problems[key] = _as_typed(refused, key, givens)
                del resolved_givens[key]
                continue
            try:
                content = read_document(
                    Path(join_working_folder(folder, value)), f"{givens[key].spelled} = {value_text(value)}"
                )
                resolved_givens[key] = replace(givens[key], value=content)
            except ConfigError as error:
                checked.problems[key] = error.problems[0]
                del resolved_givens[key]
    return resolved_givens


def _drop_overridden_paths(givens: dict[str, GivenValue], checked: CheckedKeys) -> None:
    """Drop model paths with lower precedence than the flavour."""
    flavour = givens.get("model_flavour")
    if flavour is None or flavour.value is None:
        return
    precedence = ORIGINS.index(flavour.origin)
    overridden = [
        key
        for key in _MODEL_PATHS
        if key in givens and givens[key].value is not None and ORIGINS.index(givens[key].origin) < precedence
    ]
    for key in overridden:
        del givens[key]
    if overridden:
        checked.notices.append(
            f"{flavour.spelled} {flavour.value} overrides {join_names(overridden, 'and')}, given with lower precedence."
        )


def _flavour_notice(givens: Mapping[str, GivenValue]) -> Iterator[str]:
    """A notice for a config that sets the family, as SimpleTuner's do, but neither flavour nor model path."""
    family = givens.get("model_family")
    selects_model = any(givens[key].value is not None for key in ("model_flavour", *_MODEL_PATHS) if key in givens)
    if family is not None and family.value is not None and family.origin == "file" and not selects_model:
        yield (
            f"model_flavour is not set, so this run trains {DEFAULT_FLAVOUR}. SimpleTuner would train klein-9b: "
            f"add --model_flavour klein-9b for that, or --model_flavour {DEFAULT_FLAVOUR}."
        )


def _with_paths(
    config: RunConfig, givens: Mapping[str, GivenValue], checked: CheckedKeys, path_context: PathContext
) -> tuple[RunConfig, dict[str, str]]:
    """The config with placeholders in its paths filled in and the paths joined to the folder, and the placeholders for
    the datasets.
    """
    names: dict[str, str] = {"model_family": config.model_family}
    update: dict[str, Any] = {}
    # output_dir first: other paths may refer to it.
    keys = sorted(kinds(RunConfig), key=lambda key: key != "output_dir")
    for key in keys:
        kind = kinds(RunConfig)[key]
        text = getattr(config, key)
        if not (kind.is_path or kind.is_model) or not text or (key, text) == ("resume_from_checkpoint", LATEST):
            continue
        try:
            text = fill_placeholders(text, names, path_context.environ)
        except ValueError as error:
            spelled = givens[key].spelled if key in givens else key
            checked.problems[key] = Problem(f"{spelled} = {value_text(text)}: {error}")
            continue
        if key == "output_dir":
            names["output_dir"] = text
        if kind.is_path or is_local_model(path_context.folder, text):
            update[key] = join_working_folder(path_context.folder, text)
            if refused := path_context.rule(key, update[key]):
                checked.problems[key] = _as_typed(refused, key, givens)
                update[key] = RunConfig.model_fields[key].default
    names.setdefault("output_dir", "output")
    return config.model_copy(update=update), names


def _datasets_file(config: RunConfig, config_file: Path | None) -> Path | None:
    """The dataset list to read; None if neither an option nor a config determines it, which is reported elsewhere."""
    if config.data_backend_config is not None:
        return Path(config.data_backend_config)
    return None if config_file is None else config_file.with_name(DATASETS_NAME)


def _datasets(
    config: RunConfig,
    path: Path | None,
    checked: CheckedKeys,
    path_context: PathContext,
    givens: Mapping[str, GivenValue],
) -> DatasetListing:
    if "data_backend_config" in checked.problems or path is None:
        return DatasetListing()
    label = _label(path, path_context.folder)
    if refused := _refusal(path_context.rule, "data_backend_config", path):
        return DatasetListing(problems=[refused])
    if _exists(path):
        return read_datasets(path, label, path_context)
    if config.data_backend_config is not None:
        typed = f"{givens['data_backend_config'].spelled} = {value_text(givens['data_backend_config'].value)}"
        return DatasetListing(problems=[Problem(f"{typed}: no such file")])
    missing = Problem(
        f"{label}: no such file",
        "the dataset list",
        "Write it, or name another with data_backend_config.",
    )
    return DatasetListing(problems=[missing])


def _prompts_file(config: RunConfig, config_file: Path | None, folder: Path) -> Path | None:
    """The prompt library to read; None if there is none."""
    if config.user_prompt_library is not None:
        return Path(config.user_prompt_library)
    beside = [config_file.with_name(PROMPTS_NAME)] if config_file is not None else []
    usual = [*beside, folder / "config" / PROMPTS_NAME]
    return next((path for path in usual if _exists(path)), None)


def _prompts(
    config: RunConfig, listing: DatasetListing, library: Path | None, path_context: PathContext, problems: list[Problem]
) -> tuple[dict[str, Prompt], list[str]]:
    label = "" if library is None else _label(library, path_context.folder)
    try:
        return load_prompts(config, listing.datasets, library, label, path_context)
    except ConfigError as error:
        problems.extend(error.problems)
        return {}, []


def _as_typed(problem: Problem, key: str, givens: Mapping[str, GivenValue]) -> Problem:
    """`problem` with the option spelled as the user typed it."""
    if key not in givens or not problem.found.startswith(key):
        return problem
    return replace(problem, found=givens[key].spelled + problem.found.removeprefix(key))
