"""Default < file < environment < flag, held against the schema: a frozen config, or every problem at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner.base.commandline import command_text, with_flags
from simpletuner.base.errors import ConfigError, Problem
from simpletuner.config.datasets import Datasets, ImageSet
from simpletuner.config.documents import document_text, read_document
from simpletuner.config.flags import Flags, parse
from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.given import ORIGINS, Checked, Given, Known, Origin, check_givens, unaliased
from simpletuner.config.listing import Listing, Surroundings, read_datasets
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.other_keys import OPTION_ALIASES, OTHER_OPTIONS
from simpletuner.config.other_trainers import (
    TEXT_FORMATS,
    is_text_format,
    of_other_text,
    of_other_trainer,
    other_format,
)
from simpletuner.config.paths import PathRule, filled, is_local_model, joined
from simpletuner.config.previews import with_preview_defaults
from simpletuner.config.prompts import Prompt, load_prompts
from simpletuner.config.rules import drawing_notices, findings, notices
from simpletuner.config.run import OPTION_NAMES, RunConfig
from simpletuner.config.started import with_started
from simpletuner.config.values import join_names, kinds, nearest, shown

RUN = Known(
    RunConfig,
    OTHER_OPTIONS,
    elsewhere=ImageSet.model_fields,
    other_place="multidatabackend.json, with each set of pictures",
)

ENVIRONMENT_PREFIX = "SIMPLETUNER_"
PAGE_ROOTS_VARIABLE = f"{ENVIRONMENT_PREFIX}PAGE_ROOTS"
"""Set for the commands that the page starts, and no option: the folders that their configuration is held to."""
CONFIG_NAMES = ("config.json", "config.toml")
TEXT_NAMES = tuple(f"config{suffix}" for suffix in TEXT_FORMATS)
"""Configs that are recognized and not read, where there are no others."""
DATASETS_NAME = "multidatabackend.json"
PROMPTS_NAME = "user_prompt_library.json"
NO_CONFIGURATION = "no configuration here"
"""What is found where no config is named and none lies in the usual places."""
EXAMPLES_FOLDER = Path(__file__).parents[1] / "examples"

_MODEL_PLACES = (
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "pretrained_text_encoder_model_name_or_path",
)


@dataclass(frozen=True)
class Loaded:
    """Everything a run is told."""

    config: RunConfig
    datasets: Datasets
    prompts: dict[str, Prompt]
    """Prompts to make pictures of, by name, `<subject>` replaced."""

    notices: tuple[str, ...]
    """One line each: options without effect, aliases, the license."""

    origins: dict[str, Origin]
    """Where each option's value comes from."""

    config_file: Path | None
    """The config that was read."""

    datasets_file: Path
    """The list of datasets that was read."""

    prompts_file: Path | None
    """The prompt library that was read."""

    arguments: tuple[str, ...]
    """What was typed after `simpletuner train`."""

    @property
    def drawn_prompts(self) -> tuple[Prompt, ...]:
        """The prompts of validation images; empty where none are drawn."""
        return () if self.config.validation_disable else tuple(self.prompts.values())

    def command(self, **changes: object) -> str:
        """The command that was typed, with other values of some options: to be printed, and typed again."""
        return command_text("simpletuner", "train", *with_flags(self.arguments, changes, OPTION_ALIASES))


@dataclass(frozen=True)
class Examined:
    """A configuration that may have problems, and what of it is right."""

    config: RunConfig
    """Defaults where an option is missing or wrong."""
    datasets: Datasets | None
    """None where there are problems with them."""
    prompts: dict[str, Prompt]
    notices: tuple[str, ...]
    origins: dict[str, Origin]
    config_file: Path | None
    datasets_file: Path | None
    prompts_file: Path | None
    arguments: tuple[str, ...]
    problems: tuple[Problem, ...]

    def loaded(self) -> Loaded:
        """What a run is told.

        Raises:
            ConfigError: every problem.
        """
        ConfigError.raise_if(self.problems)
        return Loaded(**{name: value for name, value in vars(self).items() if name != "problems"})


def load(arguments: Sequence[str], *, folder: Path, environ: Mapping[str, str]) -> Loaded:
    """The configuration that `arguments` (what follows `simpletuner train`) ask for.

    Relative paths are joined to `folder`: the command gives `Path()`, so that they stay as typed.

    Raises:
        ConfigError: every problem of flags, environment, config, datasets and prompts together.
    """
    return examine(arguments, folder=folder, environ=environ).loaded()


def examine(
    arguments: Sequence[str], *, folder: Path, environ: Mapping[str, str], rule: PathRule | None = None
) -> Examined:
    """The same, with the problems told and not raised.

    `rule` is asked about every path before anything is read there; with one, `{env:NAME}` is refused.
    """
    flags = parse(arguments)
    problems = list(flags.problems)
    config_file = _found(flags, folder, environ, problems)
    if refused := _refusal(rule, "config", config_file):
        problems.append(refused)
        config_file = None
    checked = Checked()
    from_file = _from_file(config_file, folder, problems)
    if from_file is None:  # of another trainer: there is nothing beside it to be read
        config_file = None
    sources = [
        from_file or [],
        _from_environment(environ),
        list(flags.options.items()),
    ]
    givens: dict[str, Given] = {}
    for source in sources:
        givens |= unaliased(source, RUN, checked)
    _let_the_flavour_win(givens, checked)
    givens = _with_json_files(givens, folder, checked, rule)
    check_givens(givens, RUN, checked)

    flavour = FLAVOURS[checked.valid.get("model_flavour", DEFAULT_FLAVOUR)]
    config = RunConfig(**flavour.option_defaults | checked.valid)
    config = with_started(config, givens, checked, environ)
    variables = environ if rule is None else None
    config, names = _with_paths(config, givens, checked, Surroundings(folder, {}, variables, rule))
    datasets_file = _datasets_file(config, config_file)
    config = with_preview_defaults(config, set(checked.valid))
    around = Surroundings(folder, names, variables, rule)
    listing = _datasets(config, datasets_file, checked, around, givens)
    prompts_file = _prompts_file(config, config_file, folder)
    if refused := _refusal(rule, "user_prompt_library", prompts_file):
        problems.append(refused)
        prompts_file = None
    prompts, prompt_notices = _prompts(config, listing, prompts_file, around, problems)
    found = {key: [replace(problem, key=key)] for key, problem in checked.problems.items()}
    for keys, problem in findings(config, listing.datasets):
        # A rule about a value that is refused anyway would speak of the default.
        if not any(key in checked.problems for key in keys):
            found.setdefault(keys[0], []).append(replace(_as_typed(problem, keys[0], givens), key=keys[0]))

    in_typed_order = [problem for key in dict.fromkeys([*givens, *found]) for problem in found.get(key, [])]
    problems += [*in_typed_order, *listing.problems]
    origins: dict[str, Origin] = dict.fromkeys(OPTION_NAMES, "default")
    origins |= {key: givens[key].origin for key in checked.valid}
    typed = [key for key in checked.valid if key in givens]
    # Only said of options that fit together.
    more = () if problems else notices(config, listing.datasets, typed)
    return Examined(
        config=config,
        datasets=listing.datasets,
        prompts=prompts,
        notices=(
            *_flavour_notice(givens),
            *checked.notices,
            *more,
            *listing.notices,
            *prompt_notices,
            *(() if problems else drawing_notices(config, prompts)),
        ),
        origins=origins,
        config_file=config_file,
        datasets_file=datasets_file,
        prompts_file=prompts_file,
        arguments=tuple(arguments),
        problems=tuple(problems),
    )


def _found(flags: Flags, folder: Path, environ: Mapping[str, str], problems: list[Problem]) -> Path | None:
    """The config to read: the one named, else the first of the usual places. None where flags say it all,
    and with an entry in `problems` where none is there, or two are named."""
    try:
        return _chosen(flags, folder, environ)
    except ConfigError as error:
        problems.extend(error.problems)
        return None


def _chosen(flags: Flags, folder: Path, environ: Mapping[str, str]) -> Path | None:
    named = flags.selectors
    if len(named) > 1:
        given = join_names([f"--{name}" for name in named], "and")
        raise ConfigError.of(f"{given} are given", "one of them, since each says which config is read")
    if "config" in named:
        path = Path(joined(folder, named["config"]))
        if path.is_dir():
            raise ConfigError.of(f"--config {named['config']}: this is a folder", "the config file in it")
        if not _is_there(path):
            raise ConfigError.of(f"--config {named['config']}: no such file")
        return path
    if "env" in named:
        return _in_folder(folder / "config" / named["env"], f"--env {named['env']}")
    if "example" in named:
        return _in_folder(EXAMPLES_FOLDER / named["example"], f"--example {named['example']}")
    found = _in_usual_places(folder, CONFIG_NAMES)
    lists_datasets = "data_backend_config" in flags.options or f"{ENVIRONMENT_PREFIX}DATA_BACKEND_CONFIG" in environ
    if found is None and not lists_datasets:
        found = _in_usual_places(folder, TEXT_NAMES)
        if found is not None:
            return found
        raise ConfigError.of(
            NO_CONFIGURATION,
            f"{join_names(['config.json', 'config.toml', 'config/config.json', 'config/config.toml'])}",
            "Write one with `simpletuner init`, name one with --config or --env, or try the program with --example "
            "tiny-lora.",
        )
    return found


def _in_usual_places(folder: Path, names: Sequence[str]) -> Path | None:
    usual = [folder / place / name for place in ("", "config") for name in names]
    # A folder or a pipe of that name counts too: reading it says what is wrong.
    return next((path for path in usual if _is_there(path)), None)


def _is_there(path: Path) -> bool:
    """Whether anything has this name, a link to nothing included.

    Raises:
        OSError: a folder on the way to it may not be entered.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _in_folder(folder: Path, flag: str) -> Path:
    for name in (*CONFIG_NAMES, *TEXT_NAMES):
        if _is_there(folder / name):
            return folder / name
    others = sorted({path.parent.name for name in CONFIG_NAMES for path in folder.parent.glob(f"*/{name}")})
    near = nearest(folder.name, others)
    raise ConfigError.of(
        f"{flag}: there is no {folder.name}",
        join_names(others) if others else f"a config in {folder}",
        f"Did you mean {near}?" if near and len(others) > 1 else "",
    )


def _from_file(path: Path | None, folder: Path, problems: list[Problem]) -> list[tuple[str, Given]] | None:
    """What the config says; None where it is one of another trainer, which is then a problem."""
    if path is None:
        return []
    label = _label(path, folder)
    try:
        if is_text_format(path):
            problems.append(of_other_text(label, path.suffix, document_text(path, label)))
            return None
        values = read_document(path, label)
    except ConfigError as error:
        problems.extend(error.problems)
        return []
    if not isinstance(values, dict):
        problems.append(Problem(f"{label}: {shown(values)}", 'an object {"option": value}'))
        return []
    name = other_format(values)
    if name is not None:
        problems.append(of_other_trainer(label, name, values))
        return None
    return [(key.lstrip("-"), Given(value, "file", key)) for key, value in values.items()]


def _from_environment(environ: Mapping[str, str]) -> list[tuple[str, Given]]:
    names = sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX) and name != PAGE_ROOTS_VARIABLE)
    return [
        (name.removeprefix(ENVIRONMENT_PREFIX).lower(), Given(environ[name], "environment", name)) for name in names
    ]


def _label(path: Path, folder: Path) -> str:
    """A path as messages name it: from the working folder where it lies in there."""
    for start, prefix in ((folder, Path()), (EXAMPLES_FOLDER, Path("examples"))):
        if path.is_relative_to(start):
            return str(prefix / path.relative_to(start))
    return str(path)


def _refusal(rule: PathRule | None, key: str, path: Path | None) -> Problem | None:
    """What `rule` says against reading `path`. The program's own examples may always be read."""
    if rule is None or path is None or path.is_relative_to(EXAMPLES_FOLDER):
        return None
    return rule(key, str(path))


def _with_json_files(
    givens: dict[str, Given], folder: Path, checked: Checked, rule: PathRule | None
) -> dict[str, Given]:
    """`givens`, with what a JSON-valued option's file holds in place of the file's name."""
    found = dict(givens)
    for key, kind in kinds(RunConfig).items():
        value = givens[key].value if key in givens else None
        if kind.is_json and isinstance(value, str) and value.endswith(".json"):
            if refused := None if rule is None else rule(key, joined(folder, value)):
                checked.problems[key] = _as_typed(refused, key, givens)
                del found[key]
                continue
            try:
                content = read_document(Path(joined(folder, value)), f"{givens[key].spelled} = {shown(value)}")
                found[key] = replace(givens[key], value=content)
            except ConfigError as error:
                checked.problems[key] = error.problems[0]
                del found[key]
    return found


def _let_the_flavour_win(givens: dict[str, Given], checked: Checked) -> None:
    """Drop model paths that were given with lower precedence than the flavour."""
    flavour = givens.get("model_flavour")
    if flavour is None or flavour.value is None:
        return
    rank = ORIGINS.index(flavour.origin)
    beaten = [
        key
        for key in _MODEL_PLACES
        if key in givens and givens[key].value is not None and ORIGINS.index(givens[key].origin) < rank
    ]
    for key in beaten:
        del givens[key]
    if beaten:
        checked.notices.append(
            f"{flavour.spelled} {flavour.value} wins over {join_names(beaten, 'and')}, which comes before it."
        )


def _flavour_notice(givens: Mapping[str, Given]) -> Iterator[str]:
    """What to say of a file that names the family, as SimpleTuner's do, and leaves the rest to defaults."""
    family = givens.get("model_family")
    says_which = any(givens[key].value is not None for key in ("model_flavour", *_MODEL_PLACES) if key in givens)
    if family is not None and family.value is not None and family.origin == "file" and not says_which:
        yield (
            f"model_flavour is not given, so {DEFAULT_FLAVOUR} is trained. SimpleTuner trains klein-9b where it is not "
            f"given: add --model_flavour klein-9b for that, or --model_flavour {DEFAULT_FLAVOUR}."
        )


def _with_paths(
    config: RunConfig, givens: Mapping[str, Given], checked: Checked, around: Surroundings
) -> tuple[RunConfig, dict[str, str]]:
    """The config with its paths filled in and joined to the folder, and the datasets' placeholders."""
    names: dict[str, str] = {"model_family": config.model_family}
    update: dict[str, Any] = {}
    # output_dir first: the others may refer to it.
    keys = sorted(kinds(RunConfig), key=lambda key: key != "output_dir")
    for key in keys:
        kind = kinds(RunConfig)[key]
        text = getattr(config, key)
        if not (kind.is_path or kind.is_model) or not text or (key, text) == ("resume_from_checkpoint", LATEST):
            continue
        try:
            text = filled(text, names, around.environ)
        except ValueError as error:
            spelled = givens[key].spelled if key in givens else key
            checked.problems[key] = Problem(f"{spelled} = {shown(text)}: {error}")
            continue
        if key == "output_dir":
            names["output_dir"] = text
        if kind.is_path or is_local_model(around.folder, text):
            update[key] = joined(around.folder, text)
            refused = None if around.rule is None else around.rule(key, update[key])
            if refused is not None:
                checked.problems[key] = _as_typed(refused, key, givens)
                update[key] = RunConfig.model_fields[key].default
    names.setdefault("output_dir", "output")
    return config.model_copy(update=update), names


def _datasets_file(config: RunConfig, config_file: Path | None) -> Path | None:
    """The list of datasets to read; None where nothing tells, which is a problem of its own."""
    if config.data_backend_config is not None:
        return Path(config.data_backend_config)
    return None if config_file is None else config_file.with_name(DATASETS_NAME)


def _datasets(
    config: RunConfig, path: Path | None, checked: Checked, around: Surroundings, givens: Mapping[str, Given]
) -> Listing:
    if "data_backend_config" in checked.problems or path is None:
        return Listing()
    label = _label(path, around.folder)
    if refused := _refusal(around.rule, "data_backend_config", path):
        return Listing(problems=[refused])
    if _is_there(path):
        return read_datasets(path, label, around)
    if config.data_backend_config is not None:
        found = f"{givens['data_backend_config'].spelled} = {shown(givens['data_backend_config'].value)}"
        return Listing(problems=[Problem(f"{found}: no such file")])
    missing = Problem(
        f"{label}: no such file",
        "the list of datasets",
        "Write it, or name another with data_backend_config.",
    )
    return Listing(problems=[missing])


def _prompts_file(config: RunConfig, config_file: Path | None, folder: Path) -> Path | None:
    """The prompt library to read, if there is one."""
    if config.user_prompt_library is not None:
        return Path(config.user_prompt_library)
    beside = [config_file.with_name(PROMPTS_NAME)] if config_file is not None else []
    usual = [*beside, folder / "config" / PROMPTS_NAME]
    return next((path for path in usual if _is_there(path)), None)


def _prompts(
    config: RunConfig, listing: Listing, library: Path | None, around: Surroundings, problems: list[Problem]
) -> tuple[dict[str, Prompt], list[str]]:
    label = "" if library is None else _label(library, around.folder)
    try:
        return load_prompts(config, listing.datasets, library, label, around)
    except ConfigError as error:
        problems.extend(error.problems)
        return {}, []


def _as_typed(problem: Problem, key: str, givens: Mapping[str, Given]) -> Problem:
    """`problem` with the option spelled as it was typed."""
    if key not in givens or not problem.found.startswith(key):
        return problem
    return replace(problem, found=givens[key].spelled + problem.found.removeprefix(key))
