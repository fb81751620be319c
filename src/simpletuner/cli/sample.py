"""`simpletuner sample`: generate images from prompts, with LoRAs or a trained model."""

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
from simpletuner.base.console import complain, output_failures_ignored, say
from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import with_home
from simpletuner.base.tensorfile import read_metadata
from simpletuner.cli.help import option_entries, requested_help
from simpletuner.cli.printing import fitted
from simpletuner.config.documents import read_document
from simpletuner.config.flags import ParsedFlags, parse
from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS
from simpletuner.config.given import CheckedKeys, GivenValue, KnownKeys, check_givens
from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.config.options.kinds import Count, Expects, NotNegative, PathText, Slice, Text
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.validation import SIDE_MULTIPLE_PX, ValidationOptions
from simpletuner.config.other_keys import LATER_OPTIONS, OTHER_OPTIONS, OtherKeys
from simpletuner.config.paths import fill_placeholders, is_local_model
from simpletuner.config.prompts import reference_faults
from simpletuner.config.rules import (
    encoder_findings,
    guidance_findings,
    idle_guidance_options,
    layer_findings,
    precision_findings,
)
from simpletuner.config.values import kinds, no_effect, value_text
from simpletuner.flux2.origin import base_model_of
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.server.reach import Reach, page_reach

_USAGE = """usage: simpletuner sample --lora FILE[:STRENGTH] --prompt TEXT [--option value ...]
       simpletuner sample --run FOLDER --prompt TEXT [--option value ...]
       simpletuner sample --pretrained_model_name_or_path FOLDER --prompt TEXT [--option value ...]"""

_OUTPUT_HELP = """Output

  --json  print a line of JSON for each image instead of its path: path, prompt, seed, width, height, steps, guidance,
  model, and the LoRAs with their strengths

  --serve  load the model once, then read requests from standard input: see docs/lora.md"""

_MODEL_HELP = """Model

  --config PATH  use the model and the settings of the validation images of this configuration of `train`

  --model_flavour, --pretrained_model_name_or_path, --seed and all other options of `simpletuner train` about the model
  (simpletuner train --help model), precision (--help precision) and memory (--help memory)."""

ImageSide = Annotated[
    int, Ge(SIDE_MULTIPLE_PX), MultipleOf(SIDE_MULTIPLE_PX), Expects(f"a multiple of {SIDE_MULTIPLE_PX} pixels")
]


def _factors(value: object) -> object:
    """Convert ("0,0.5", "1") or [0, 0.5, 1] to a tuple of numbers; return other values unchanged, for the type to
    reject."""
    if not isinstance(value, tuple):
        return value
    parts = [part for item in value for part in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        return value


class SampleOptions(Slice):
    """Images to generate."""

    prompt: Annotated[tuple[Text, ...], MinLen(1), Expects("a text after it")]
    """The prompt of an image. Repeat the option for several images."""

    references: Annotated[tuple[Text, ...], Expects("an image file after it")] = ()
    """A reference image for every generated image, such as the image to edit. Repeat the option for up to ten; their
    order counts. A reference with more than 1024² pixels is scaled down to 1024² pixels; `width` and `height` apply to
    the generated image."""

    reference_attention: ReferenceView = "full"
    """The tokens that reference tokens attend to. Use the value with which the LoRA or model was trained, which is in
    the run's config."""

    lora: Annotated[tuple[Text, ...], Expects("a file after it")] = ()
    """A LoRA, LoKr or LoHa file, or a folder with `pytorch_lora_weights.safetensors`. `FILE:0.8` sets a strength other
    than 1. Repeat the option to add several. Without it, the base model generates the images. If no option names the
    model, the config of the LoRA's run names it, or else the LoRA's header."""

    strength: Annotated[tuple[float, ...], BeforeValidator(_factors), Expects("numbers such as 0,0.5,1")] = ()
    """Generate each image once at each of these strengths, such as `0,0.5,1`, to compare them in a grid. They multiply
    the strengths of all LoRAs; at 0 the base model generates the image."""

    run: PathText | None = None
    """The folder of a run. `sample` uses its model, its finished LoRA (unless `lora` names others) or finished model,
    and the settings of its validation images."""

    width: ImageSide = 1024
    """Width in pixels."""

    height: ImageSide = 1024
    """Height in pixels."""

    steps: Count | None = None
    """Sampler steps; the default depends on the model."""

    guidance: NotNegative | None = None
    """Guidance; the default depends on the model: 4 for dev and klein. dev takes it as an input. On klein it is
    classifier-free guidance against `negative`, at twice the time; 1 turns it off. Distilled models ignore it."""

    guidance_real: Annotated[float, Ge(1)] = 1.0
    """For dev: classifier-free guidance against `negative` in addition to `guidance`, at twice the time; 1 turns it
    off."""

    negative: str = ""
    """The negative prompt of classifier-free guidance."""

    num: Count = 1
    """Number of images for each prompt, with the seeds `seed`, `seed` + 1 and so on."""

    out: PathText = "samples"
    """The folder for the images. Existing files are not overwritten."""

    progress: bool = False
    """Print a JSON line on standard error after each sampler step instead of the progress bar: what, done and total."""


class SampleConfig(ModelOptions, PrecisionOptions, OffloadOptions, SampleOptions):
    """Every option of `sample`."""


OPTIONS = KnownKeys(SampleConfig, OtherKeys(LATER_OPTIONS, values=OTHER_OPTIONS.values))
REPEATED = ("prompt", "references", "lora", "strength")
FROM_RUN = (*ModelOptions.model_fields, *PrecisionOptions.model_fields, *OffloadOptions.model_fields)
"""Options of the model, its precision and its memory, which a config of `train` has under the same names."""
FLAVOUR_SETTINGS = ("steps", "guidance", "guidance_real")
"""Settings that a config gives for its own flavour. They are ignored if the request names another flavour."""
MODEL_NAMING_OPTIONS = (
    "model_flavour",
    "pretrained_model_name_or_path",
    "pretrained_transformer_model_name_or_path",
)
"""Options that name the model. With one of them, a run or a config, no LoRA's header is read for its base model."""
AS_JSON, SERVED = "--json", "--serve"
"""Flags of the output that take no value."""


@dataclass(frozen=True)
class LoraWithStrength:
    """A LoRA file, or a folder with one, and its strength."""

    path: Path
    strength: float


def run(arguments: list[str]) -> int:
    """Generate the requested images and print their paths. Returns the exit code.

    Raises:
        UserError: a problem that the user can fix.
    """
    if requested_help(arguments) is not None:
        say(sample_help())
        return 0
    options = [word for word in arguments if word not in (AS_JSON, SERVED)]
    if SERVED in arguments:
        read_request(options, os.environ, {"prompt": ["checks the other options"]})
        # Imported late, because it loads torch: mistakes in the options are reported first.
        from simpletuner.cli.serving import serve

        return serve(lambda request: read_request(options, os.environ, request))
    config = read_request(options, os.environ, report=complain)
    loras = requested_loras(config)
    # Imported late, as above.
    from simpletuner.cli.progress import progress_of
    from simpletuner.cli.sampler import Sampler

    with output_failures_ignored(), progress_of(config) as report:
        for image in Sampler().sample(config, loras, report):
            say(json.dumps(image.fields, ensure_ascii=False) if AS_JSON in arguments else str(image.path))
    return 0


def sample_help() -> str:
    """The help of `simpletuner sample`."""
    entries = option_entries(list(SampleOptions.documentation()), [SampleOptions])
    return "\n\n".join((fitted(_USAGE), f"Images to generate\n{entries}", fitted(_OUTPUT_HELP), fitted(_MODEL_HELP)))


def read_request(
    arguments: Sequence[str],
    environ: Mapping[str, str],
    request: Mapping[str, Any] | None = None,
    *,
    report: Callable[[str], None] = lambda _: None,
) -> SampleConfig:
    """The options of a request. Precedence: defaults < the run's config < `--config` < flags < `request`, which maps
    the names of options to values.

    `report` is called with a line that names the model if a LoRA selects it, and with notices.

    Raises:
        ConfigError: all problems together.
    """
    flags = parse(arguments, REPEATED)
    typed_options = flags.options | {
        name: GivenValue(tuple(value) if isinstance(value, list) else value, "file", name)
        for name, value in (request or {}).items()
    }
    problems = list(flags.problems)
    problems += [
        Problem(f"--{name}: not an option of sample", remedy="Give --config PATH.")
        for name in flags.selectors
        if name != "config"
    ]
    files: dict[str, GivenValue] = {}
    reach = page_reach(environ)
    for path, label in _config_files(typed_options, flags, problems, report):
        try:
            if reach is not None:
                reach.checked_path(str(path))
            files |= _from_config(path, label)
            if path == _config_of_run(typed_options):
                files |= _finished_model(path.parent, files)
        except ConfigError as error:
            problems += error.problems
    if not files and not problems:
        files = _named_by_lora(typed_options, report)
    if "model_flavour" in typed_options:  # overrides model paths of lower precedence, as in `train`
        files = {name: value for name, value in files.items() if not kinds(SampleConfig)[name].is_model}
        of_config = files["model_flavour"].value if "model_flavour" in files else DEFAULT_FLAVOUR
        if typed_options["model_flavour"].value != of_config:
            files = {name: value for name, value in files.items() if name not in FLAVOUR_SETTINGS}
    checked = check_givens({**files, **typed_options}, OPTIONS, CheckedKeys())
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
    keys, reason = idle_guidance_options(flavour, guidance, config.guidance_real)
    typed = [key for key in keys if key in typed_options]
    if typed:
        report(no_effect(typed, reason))
    return config


def _config_files(
    typed_options: Mapping[str, GivenValue], flags: ParsedFlags, problems: list[Problem], report: Callable[[str], None]
) -> list[tuple[Path, str]]:
    """The configs to read, each with its name for messages; a later config overrides an earlier one."""
    configs = []
    path = _config_of_run(typed_options)
    if path is not None and path.is_file():
        configs.append((path, str(path)))
    elif path is not None:
        problems.append(Problem(f"--run {typed_options['run'].value}: no config.json in it", "the folder of a run"))
    if "config" in flags.selectors:
        named = flags.selectors["config"]
        configs.append((Path(with_home(named)), f"--config {named}"))
    if configs or not _loras_name_model(typed_options):
        return configs
    for lora in _loras_of(typed_options):
        run = _containing_run(lora.path)
        if run is not None:
            report(f"{lora.path} belongs to the run {run.root}: its model and its validation settings are used.")
            return [(run.config, str(run.config))]
    return []


def _loras_name_model(typed_options: Mapping[str, GivenValue]) -> bool:
    """Whether only a LoRA can name the model."""
    return not any(name in typed_options for name in ("run", *MODEL_NAMING_OPTIONS))


def _loras_of(typed_options: Mapping[str, GivenValue]) -> list[LoraWithStrength]:
    texts = typed_options["lora"].value if "lora" in typed_options else ()
    return [parse_lora(text) for text in texts if isinstance(text, str)] if isinstance(texts, tuple) else []


def _containing_run(lora: Path) -> RunDirectory | None:
    """The run that wrote `lora` as its result or in a checkpoint; None if there is none."""
    file = lora / LORA_NAME if os.path.isdir(lora) else lora
    for folder in file.absolute().parents[:4]:  # the deepest file is RUN/checkpoints/STEP/ema/FILE
        run = RunDirectory(folder)
        if os.path.isfile(run.config) and os.path.isfile(run.events):
            return run
    return None


def _named_by_lora(typed_options: Mapping[str, GivenValue], report: Callable[[str], None]) -> dict[str, GivenValue]:
    """The flavour of the base model that a LoRA's header names, if nothing else names a model. Any program may have
    written the LoRA. A header that names another model contains only its folder's name, not its path, and is ignored.
    """
    if not _loras_name_model(typed_options):
        return {}
    for lora in _loras_of(typed_options):
        file = lora.path / LORA_NAME if os.path.isdir(lora.path) else lora.path
        if not os.path.isfile(file):
            continue
        with contextlib.suppress(AccessError):  # reported later, when the whole file is read
            header = read_metadata(file)
            if (flavour := FLAVOURS.get(base_model_of(header) or "")) is not None:
                base = header.get("simpletuner.base_model", flavour.title)
                report(f"{lora.path} names {base} as its base model: sampling with --model_flavour {flavour.name}.")
                return {"model_flavour": GivenValue(flavour.name, "file", "model_flavour")}
    return {}


def _config_of_run(typed_options: Mapping[str, GivenValue]) -> Path | None:
    if "run" not in typed_options or not isinstance(typed_options["run"].value, str):
        return None
    return RunDirectory(Path(with_home(typed_options["run"].value))).config


def _finished_model(folder: Path, config: Mapping[str, GivenValue]) -> dict[str, GivenValue]:
    """The option that names the model of a finished full run: a whole pipeline or, if the run could not write one, the
    transformer alone."""
    if "model_type" not in config or config["model_type"].value != "full":
        return {}
    model = RunDirectory(folder).model
    key, path = "pretrained_model_name_or_path", model
    if not (model / "model_index.json").is_file():
        key, path = "pretrained_transformer_model_name_or_path", model / "transformer"
    return {key: GivenValue(str(path), "file", key)}


def _from_config(path: Path, label: str) -> dict[str, GivenValue]:
    """The model options and validation settings of a config of `train`, under the names of `SampleConfig`."""
    document = read_document(path, label)
    if not isinstance(document, dict):
        raise ConfigError.of(f"{label}: {value_text(document)}", 'an object {"option": value}')
    values: dict[str, Any] = {key.lstrip("-"): value for key, value in document.items()}
    # An option with a JSON value may name a file, and does not affect sampling.
    read = {key for key, kind in kinds(ValidationOptions).items() if not kind.is_json}
    givens = {key: GivenValue(value, "file", key) for key, value in values.items() if key in read}
    checked = check_givens(givens, KnownKeys(ValidationOptions), CheckedKeys(), prefix=f"{label}: ")
    ConfigError.raise_if(checked.problems.values())
    named = values.get("model_flavour", DEFAULT_FLAVOUR)
    flavour = FLAVOURS[named if isinstance(named, str) and named in FLAVOURS else DEFAULT_FLAVOUR]
    usual = {key: value for key, value in flavour.option_defaults.items() if key in ValidationOptions.model_fields}
    validation = ValidationOptions(**usual | checked.valid)
    width, height = validation.sizes[0]
    settings = {key: value for key, value in values.items() if key in FROM_RUN}
    settings |= {
        "width": width,
        "height": height,
        "steps": validation.validation_num_inference_steps,
        "guidance": validation.validation_guidance,
        "guidance_real": validation.validation_guidance_real,
        "negative": validation.validation_negative_prompt,
    }
    if "reference_attention" in values:
        settings["reference_attention"] = values["reference_attention"]
    if validation.validation_seed is not None:
        settings["seed"] = validation.validation_seed
    return {name: GivenValue(value, "file", name) for name, value in settings.items()}


def _filled_paths(checked: CheckedKeys, environ: Mapping[str, str], reach: Reach | None) -> dict[str, Any]:
    """Remove the paths from `checked.valid` and return them with placeholders and `~` filled in."""
    paths: dict[str, Any] = {}
    for name, kind in kinds(SampleConfig).items():
        if not (kind.is_path or kind.is_model) or name not in checked.valid:
            continue
        text = checked.valid.pop(name)
        try:
            paths[name] = with_home(
                fill_placeholders(text, {"model_family": "flux2"}, environ if reach is None else None)
            )
        except ValueError as error:
            checked.problems[name] = Problem(f"{name} = {value_text(text)}: {error}")
            continue
        if reach is not None and (kind.is_path or is_local_model(Path(), paths[name])):
            refused = reach.refusal(name, paths[name])
            checked.problems |= {} if refused is None else {name: refused}
    return paths


def _filled_references(
    checked: CheckedKeys, environ: Mapping[str, str], reach: Reach | None, problems: list[Problem]
) -> tuple[str, ...]:
    """Remove the references from `checked.valid` and return them with placeholders and `~` filled in. Their problems
    are added to `problems`.
    """
    paths = []
    for text in checked.valid.pop("references", ()):
        try:
            path = with_home(fill_placeholders(text, {"model_family": "flux2"}, environ if reach is None else None))
        except ValueError as error:
            problems.append(Problem(f"references = {value_text(text)}: {error}"))
            continue
        refused = None if reach is None else reach.refusal("references", path)
        if refused is not None:
            problems.append(refused)
        else:
            paths.append(path)
    problems += reference_faults("references", tuple(paths))
    return tuple(paths)


def requested_loras(config: SampleConfig) -> list[LoraWithStrength]:
    """The LoRAs that `config` names, or the LoRA of its run.

    Raises:
        ConfigError: a file does not exist, or the run is not finished.
    """
    loras = [parse_lora(text) for text in config.lora]
    problems = [
        Problem(f"--lora {lora.path}: no such file", "a .safetensors file, or a folder with one")
        for lora in loras
        if not (os.path.isfile(lora.path) or os.path.isdir(lora.path))
    ]
    problems += [
        Problem(
            f"--lora {text}: a strength of {lora.strength}", "a finite number, such as 0.8; below 0 it is subtracted"
        )
        for text, lora in zip(config.lora, loras, strict=True)
        if not math.isfinite(lora.strength)
    ]
    if config.run is not None:
        directory = RunDirectory(Path(config.run))
        if config.model_type == "lora" and "lora" not in config.model_fields_set:
            loras = [LoraWithStrength(directory.lora, 1.0)]
            problems += _unfinished(directory, directory.lora, "LoRA", "lora", "")
        if config.model_type == "full" and config.pretrained_transformer_model_name_or_path == str(
            directory.model / "transformer"
        ):
            option = "pretrained_transformer_model_name_or_path"
            problems += _unfinished(directory, directory.model, "model", option, "transformer")
    ConfigError.raise_if(problems)
    return loras


def _unfinished(directory: RunDirectory, result: Path, noun: str, option: str, below: str) -> list[Problem]:
    """The problem that a run has no finished result. The remedy gives `option` the path `below` in the last
    checkpoint."""
    if result.exists():
        return []
    checkpoints = sorted(directory.checkpoints.glob("step-*"))
    text = "It has no checkpoint either."
    if checkpoints:
        text = f"Give {command_text(f'--{option}', checkpoints[-1] / below)}."
    return [Problem(f"--run {directory.root} has no finished {noun}", remedy=text)]


def parse_lora(text: str) -> LoraWithStrength:
    """Parse `FILE` or `FILE:STRENGTH`. The whole text is the path if that exists, or if no number follows its colon."""
    path, colon, number = text.rpartition(":")
    if colon and not os.path.exists(with_home(text)):
        with contextlib.suppress(ValueError):
            return LoraWithStrength(Path(with_home(path)), float(number))
    return LoraWithStrength(Path(with_home(text)), 1.0)
