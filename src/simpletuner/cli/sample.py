"""`simpletuner sample`: pictures of prompts, with one or several LoRAs."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, MinLen, MultipleOf
from pydantic import BeforeValidator

from simpletuner.base.commandline import command_text
from simpletuner.base.console import complain, say, work_goes_on
from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import with_home
from simpletuner.base.tensorfile import read_metadata
from simpletuner.cli.help import option_entries, requested_help
from simpletuner.cli.printing import fitted
from simpletuner.config.documents import read_document
from simpletuner.config.flags import Flags, parse
from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.given import Checked, Given, Known, check_givens
from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.config.options.kinds import Count, NotNegative, PathText, Says, Slice, Text
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.validation import SIDE_MULTIPLE_PX, ValidationOptions
from simpletuner.config.other_keys import LATER_OPTIONS, OTHER_OPTIONS, OtherKeys
from simpletuner.config.paths import filled, is_local_model
from simpletuner.config.prompts import reference_faults
from simpletuner.config.rules import (
    encoder_findings,
    guidance_findings,
    guidance_without_effect,
    layer_findings,
    precision_findings,
)
from simpletuner.config.values import kinds, no_effect, shown
from simpletuner.flux2.origin import base_model_of
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.server.reach import Reach, of_the_page

_USAGE = """usage: simpletuner sample --lora FILE[:STRENGTH] --prompt TEXT [--option value ...]
       simpletuner sample --run FOLDER --prompt TEXT [--option value ...]
       simpletuner sample --pretrained_model_name_or_path FOLDER --prompt TEXT [--option value ...]"""

_ANSWERS = """How the answer comes

  --json  for each picture, in place of its path, a line of JSON: path, prompt, seed, width, height, steps, guidance,
  model, and the LoRAs with their strengths

  --serve  load the model once, then read requests from standard input: see docs/lora.md"""

_WHICH_MODEL = """Which model

  --config PATH  take the model, and the settings of the validation pictures, from this configuration of `train`

  --model_flavour, --pretrained_model_name_or_path, --seed and all other options of `simpletuner train` about the model
  (simpletuner train --help model), precision (--help precision) and memory (--help memory)."""

PictureSide = Annotated[
    int, Ge(SIDE_MULTIPLE_PX), MultipleOf(SIDE_MULTIPLE_PX), Says(f"a multiple of {SIDE_MULTIPLE_PX} pixels")
]


def _factors(value: object) -> object:
    """("0,0.5", "1") or [0, 0.5, 1] as a tuple of numbers; anything else is left for the type to refuse."""
    if not isinstance(value, tuple):
        return value
    parts = [part for item in value for part in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return value


class SampleOptions(Slice):
    """What to draw."""

    prompt: Annotated[tuple[Text, ...], MinLen(1), Says("a text after it")]
    """What a picture shows. Give it several times for several pictures."""

    references: Annotated[tuple[Text, ...], Says("an image file after it")] = ()
    """A reference image that each picture is drawn with, such as the one to edit. Give it up to ten times for several,
    in their order. One above 1024² pixels is scaled down to them; `width` and `height` stay those of the picture."""

    reference_attention: ReferenceView = "full"
    """What reference tokens attend to, as in the training of the LoRA or model; a run's config says it."""

    lora: Annotated[tuple[Text, ...], Says("a file after it")] = ()
    """A LoRA, LoKr or LoHa file, or a folder with `pytorch_lora_weights.safetensors`. `FILE:0.8` gives it a strength
    other than 1. Given several times, they add up. Without any, the base model draws. Where no option names the
    model, a LoRA names it: by the config of the run it lies in, or by its own header."""

    strength: Annotated[tuple[float, ...], BeforeValidator(_factors), Says("numbers such as 0,0.5,1")] = ()
    """Draw each picture once at each of these strengths, as for a grid: `0,0.5,1`. They multiply the strengths of all
    LoRAs; at 0 the base model draws."""

    run: PathText | None = None
    """The folder of a run: its model and its finished LoRA (unless `lora` names others), or the model that it
    finished, and the settings of its validation pictures."""

    width: PictureSide = 1024
    """Width in pixels."""

    height: PictureSide = 1024
    """Height in pixels."""

    steps: Count | None = None
    """Sampler steps; by default what suits the model."""

    guidance: NotNegative | None = None
    """Guidance; by default what suits the model, 4 for dev and klein. dev takes it as an input. On klein it is true
    classifier-free guidance against `negative`, at twice the time; 1 turns it off. Distilled models ignore it."""

    guidance_real: Annotated[float, Ge(1)] = 1.0
    """For dev: true classifier-free guidance against `negative` on top of `guidance`, at twice the time; 1 is none."""

    negative: str = ""
    """What true guidance steers away from."""

    num: Count = 1
    """Pictures of each prompt, with the seeds `seed`, `seed` + 1 and so on."""

    out: PathText = "samples"
    """The folder for the pictures. None that is there is overwritten."""

    progress: bool = False
    """In place of the bar, a JSON line on standard error after each sampler step: what, done and total."""


class SampleConfig(ModelOptions, PrecisionOptions, OffloadOptions, SampleOptions):
    """Every option of `sample`."""


OPTIONS = Known(SampleConfig, OtherKeys(LATER_OPTIONS, values=OTHER_OPTIONS.values))
REPEATED = ("prompt", "references", "lora", "strength")
FROM_RUN = (*ModelOptions.model_fields, *PrecisionOptions.model_fields, *OffloadOptions.model_fields)
"""What the model is, and how it is held: read from a config of `train` under the same names."""
SUITS_A_FLAVOUR = ("steps", "guidance", "guidance_real")
"""What a config says of its own flavour's images: none of it is read to draw with another flavour."""
NAMES_A_MODEL = (
    "model_flavour",
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
)
"""With one of these, or a run or a config, no LoRA is asked for its base model."""
AS_JSON, SERVED = "--json", "--serve"
"""How the answer comes: words of the command line that take no value."""


@dataclass(frozen=True)
class Wanted:
    """A LoRA file and how strongly it acts."""

    path: Path
    strength: float


def run(arguments: list[str]) -> int:
    """Draw what `arguments` ask for and print where the pictures are. Returns the exit code.

    Raises:
        UserError: a problem the user can mend.
    """
    if requested_help(arguments) is not None:
        say(sample_help())
        return 0
    options = [word for word in arguments if word not in (AS_JSON, SERVED)]
    if SERVED in arguments:
        read_request(options, os.environ, {"prompt": ["checks the other options"]})
        # Brings torch: only once the options are known to be good.
        from simpletuner.cli.serving import serve

        return serve(lambda request: read_request(options, os.environ, request))
    config = read_request(options, os.environ, report=complain)
    loras = wanted_loras(config)
    # As above.
    from simpletuner.cli.drawing import Sampler
    from simpletuner.cli.progress import progress_of

    with work_goes_on(), progress_of(config) as report:
        for drawing in Sampler().draw(config, loras, report):
            say(json.dumps(drawing.described, ensure_ascii=False) if AS_JSON in arguments else str(drawing.path))
    return 0


def sample_help() -> str:
    """Help for the options that `sample` has of its own."""
    own = option_entries(list(SampleOptions.documentation()), [SampleOptions])
    return "\n\n".join((fitted(_USAGE), f"What to draw\n{own}", fitted(_ANSWERS), fitted(_WHICH_MODEL)))


def read_request(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    request: Mapping[str, Any] | None = None,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> SampleConfig:
    """What is asked for: defaults < the run's config < `--config` < flags < `request`, options by their names.

    `report` is called with a line that says which model a LoRA names, where nothing else does.

    Raises:
        ConfigError: every problem at once.
    """
    flags = parse(arguments, REPEATED)
    given = flags.options | {
        name: Given(tuple(value) if isinstance(value, list) else value, "file", name)
        for name, value in (request or {}).items()
    }
    problems = list(flags.problems)
    problems += [
        Problem(f"--{name}: not for sample", remedy="Give --config PATH.")
        for name in flags.selectors
        if name != "config"
    ]
    files: dict[str, Given] = {}
    reach = of_the_page(environ)
    for path, label in _config_files(given, flags, problems, report):
        try:
            if reach is not None:
                reach.real(str(path))
            files |= _from_config(path, label)
            if path == _config_of_run(given):
                files |= _finished_model(path.parent, files)
        except ConfigError as error:
            problems += error.problems
    if not files and not problems:
        files = _named_by_lora(given, report)
    if "model_flavour" in given:  # which wins over paths of lower precedence, as in `train`
        files = {name: value for name, value in files.items() if not kinds(SampleConfig)[name].is_model}
        of_config = files["model_flavour"].value if "model_flavour" in files else DEFAULT_FLAVOUR
        if given["model_flavour"].value != of_config:
            files = {name: value for name, value in files.items() if name not in SUITS_A_FLAVOUR}
    checked = check_givens({**files, **given}, OPTIONS, Checked())
    paths = _filled_paths(checked, environ, reach)
    problems += checked.problems.values()
    references = _filled_references(checked, environ, reach, problems)
    ConfigError.raise_if(problems)
    config = SampleConfig(**checked.valid, **paths, references=references)
    flavour = FLAVOURS[config.model_flavour]
    findings = (
        *precision_findings(config),
        *encoder_findings(config, config),
        *guidance_findings(flavour, config.guidance, config.guidance_real),
        *layer_findings(config),
    )
    ConfigError.raise_if(problem for _, problem in findings)
    guidance = flavour.guidance if config.guidance is None else config.guidance
    keys, reason = guidance_without_effect(flavour, guidance, config.guidance_real)
    typed = [key for key in keys if key in given]
    if typed:
        report(no_effect(typed, reason))
    return config


def _config_files(
    given: Mapping[str, Given], flags: Flags, problems: list[Problem], report: Callable[[str], None]
) -> list[tuple[Path, str]]:
    """The configs to read and what messages call them, the one that wins last."""
    found = []
    path = _config_of_run(given)
    if path is not None and path.is_file():
        found.append((path, str(path)))
    elif path is not None:
        problems.append(Problem(f"--run {given['run'].value}: no config.json there", "the folder of a run"))
    if "config" in flags.selectors:
        named = flags.selectors["config"]
        found.append((Path(with_home(named)), f"--config {named}"))
    if found or not _asks_loras(given):
        return found
    for lora in _loras_of(given):
        run = _run_around(lora.path)
        if run is not None:
            report(f"{lora.path} lies in the run {run.root}: its model and its validation settings are used.")
            return [(run.config, str(run.config))]
    return []


def _asks_loras(given: Mapping[str, Given]) -> bool:
    """Whether nothing but a LoRA says which model draws."""
    return not any(name in given for name in ("run", *NAMES_A_MODEL))


def _loras_of(given: Mapping[str, Given]) -> list[Wanted]:
    texts = given["lora"].value if "lora" in given else ()
    return [with_strength(text) for text in texts if isinstance(text, str)] if isinstance(texts, tuple) else []


def _run_around(lora: Path) -> RunDirectory | None:
    """The run whose result or checkpoint `lora` is."""
    file = lora / LORA_NAME if os.path.isdir(lora) else lora
    for folder in file.absolute().parents[:4]:  # of RUN/checkpoints/STEP/ema/FILE the last is RUN
        run = RunDirectory(folder)
        if os.path.isfile(run.config) and os.path.isfile(run.events):
            return run
    return None


def _named_by_lora(given: Mapping[str, Given], report: Callable[[str], None]) -> dict[str, Given]:
    """The flavour of the base model that a LoRA's header names, whichever program wrote it, where nothing else names a
    model. Other models are named there by a folder's name alone, which does not say where that is.
    """
    if not _asks_loras(given):
        return {}
    for lora in _loras_of(given):
        file = lora.path / LORA_NAME if os.path.isdir(lora.path) else lora.path
        if not os.path.isfile(file):
            continue
        with contextlib.suppress(AccessError):  # which reading the whole file reports
            header = read_metadata(file)
            if (flavour := FLAVOURS.get(base_model_of(header) or "")) is not None:
                base = header.get("simpletuner.base_model", flavour.title)
                report(f"{lora.path} names {base} as its base model: drawing with --model_flavour {flavour.name}.")
                return {"model_flavour": Given(flavour.name, "file", "model_flavour")}
    return {}


def _config_of_run(given: Mapping[str, Given]) -> Path | None:
    if "run" not in given or not isinstance(given["run"].value, str):
        return None
    return RunDirectory(Path(with_home(given["run"].value))).config


def _finished_model(folder: Path, config: Mapping[str, Given]) -> dict[str, Given]:
    """Where a full run left its model: a whole pipeline, or, where that could not be made, the transformer alone."""
    if "model_type" not in config or config["model_type"].value != "full":
        return {}
    model = RunDirectory(folder).model
    key, place = "pretrained_model_name_or_path", model
    if not (model / "model_index.json").is_file():
        key, place = "pretrained_transformer_model_name_or_path", model / "transformer"
    return {key: Given(str(place), "file", key)}


def _from_config(path: Path, label: str) -> dict[str, Given]:
    """What a config of `train` says about the model and about drawing, under the names of `SampleConfig`."""
    document = read_document(path, label)
    if not isinstance(document, dict):
        raise ConfigError.of(f"{label}: {shown(document)}", 'an object {"option": value}')
    values: dict[str, Any] = {key.lstrip("-"): value for key, value in document.items()}
    # An option with a JSON value may name a file, and says nothing of how to draw.
    read = {key for key, kind in kinds(ValidationOptions).items() if not kind.is_json}
    givens = {key: Given(value, "file", key) for key, value in values.items() if key in read}
    checked = check_givens(givens, Known(ValidationOptions), Checked(), where=f"{label}: ")
    ConfigError.raise_if(checked.problems.values())
    named = values.get("model_flavour", DEFAULT_FLAVOUR)
    flavour = FLAVOURS[named if isinstance(named, str) and named in FLAVOURS else DEFAULT_FLAVOUR]
    usual = {key: value for key, value in flavour.option_defaults.items() if key in ValidationOptions.model_fields}
    validation = ValidationOptions(**usual | checked.valid)
    width, height = validation.sizes[0]
    found = {key: value for key, value in values.items() if key in FROM_RUN}
    found |= {
        "width": width,
        "height": height,
        "steps": validation.validation_num_inference_steps,
        "guidance": validation.validation_guidance,
        "guidance_real": validation.validation_guidance_real,
        "negative": validation.validation_negative_prompt,
    }
    if "reference_attention" in values:
        found["reference_attention"] = values["reference_attention"]
    if validation.validation_seed is not None:
        found["seed"] = validation.validation_seed
    return {name: Given(value, "file", name) for name, value in found.items()}


def _filled_paths(checked: Checked, environ: Mapping[str, str], reach: Reach | None) -> dict[str, Any]:
    """Takes the paths out of `checked.valid` and gives them back with placeholders and `~` filled in."""
    paths: dict[str, Any] = {}
    for name, kind in kinds(SampleConfig).items():
        if not (kind.is_path or kind.is_model) or name not in checked.valid:
            continue
        text = checked.valid.pop(name)
        try:
            paths[name] = with_home(filled(text, {"model_family": "flux2"}, environ if reach is None else None))
        except ValueError as error:
            checked.problems[name] = Problem(f"{name} = {shown(text)}: {error}")
            continue
        if reach is not None and (kind.is_path or is_local_model(Path(), paths[name])):
            refused = reach.refusal(name, paths[name])
            checked.problems |= {} if refused is None else {name: refused}
    return paths


def _filled_references(
    checked: Checked, environ: Mapping[str, str], reach: Reach | None, problems: list[Problem]
) -> tuple[str, ...]:
    """Takes the references out of `checked.valid` and gives them back with placeholders and `~` filled in. What is
    wrong with them is added to `problems`.
    """
    paths = []
    for text in checked.valid.pop("references", ()):
        try:
            path = with_home(filled(text, {"model_family": "flux2"}, environ if reach is None else None))
        except ValueError as error:
            problems.append(Problem(f"references = {shown(text)}: {error}"))
            continue
        refused = None if reach is None else reach.refusal("references", path)
        if refused is not None:
            problems.append(refused)
        else:
            paths.append(path)
    problems += reference_faults("references", tuple(paths))
    return tuple(paths)


def wanted_loras(config: SampleConfig) -> list[Wanted]:
    """The LoRAs that `config` names, or its run's.

    Raises:
        ConfigError: a file that is not there, or a run that is not finished.
    """
    wanted = [with_strength(text) for text in config.lora]
    problems = [
        Problem(f"--lora {lora.path}: no such file", "a .safetensors file, or a folder with one")
        for lora in wanted
        if not (os.path.isfile(lora.path) or os.path.isdir(lora.path))
    ]
    problems += [
        Problem(
            f"--lora {text}: a strength of {lora.strength}", "a finite number, such as 0.8; below 0 it is subtracted"
        )
        for text, lora in zip(config.lora, wanted, strict=True)
        if not math.isfinite(lora.strength)
    ]
    if config.run is not None:
        directory = RunDirectory(Path(config.run))
        if config.model_type == "lora" and "lora" not in config.model_fields_set:
            wanted = [Wanted(directory.lora, 1.0)]
            problems += _unfinished(directory, directory.lora, "LoRA", "lora", "")
        if config.model_type == "full" and config.pretrained_transformer_model_name_or_path == str(
            directory.model / "transformer"
        ):
            option = "pretrained_transformer_model_name_or_path"
            problems += _unfinished(directory, directory.model, "model", option, "transformer")
    ConfigError.raise_if(problems)
    return wanted


def _unfinished(directory: RunDirectory, result: Path, noun: str, option: str, below: str) -> list[Problem]:
    """The problem of a run that has not got to its end; `option` takes what lies `below` a checkpoint instead."""
    if result.exists():
        return []
    checkpoints = sorted(directory.checkpoints.glob("step-*"))
    text = "It has no checkpoint either."
    if checkpoints:
        text = f"Give {command_text(f'--{option}', checkpoints[-1] / below)}."
    return [Problem(f"--run {directory.root} has no finished {noun}", remedy=text)]


def with_strength(text: str) -> Wanted:
    """`FILE` or `FILE:STRENGTH`. What exists is the path; a colon that no number follows belongs to it too."""
    path, colon, number = text.rpartition(":")
    if colon and not os.path.exists(with_home(text)):
        with contextlib.suppress(ValueError):
            return Wanted(Path(with_home(path)), float(number))
    return Wanted(Path(with_home(text)), 1.0)
