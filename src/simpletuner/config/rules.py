"""Checks of combinations of options and datasets, and notices about options that have no effect."""

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from simpletuner.base.errors import Problem
from simpletuner.config.datasets import Datasets
from simpletuner.config.deepspeed import deepspeed_findings, deepspeed_notices
from simpletuner.config.flavours import FLAVOURS, Flavour, sibling
from simpletuner.config.given import CheckedKeys, GivenValue, KnownKeys, check_givens
from simpletuner.config.optimizers import ADAM, OPTIMIZERS, known_optimizer
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.options.conditioning import ConditioningOptions
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.preservation import with_trigger_replaced
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.options.tread import TreadRoute
from simpletuner.config.options.validation import AUTO_PREVIEW
from simpletuner.config.precisions import NO_CHANGE, PRECISIONS
from simpletuner.config.previews import preview_flavour, sampling_flavour
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names, no_effect, value_text

PRODIGY_RATE = 0.1
"""A lower `learning_rate` is probably a mistake with prodigy and similar optimizers, because it multiplies the learning
rate that they estimate."""

USUAL_SHARE = 0.01
"""Suggested learning rate, as a share of the lowest rate at which training diverges."""
SHARE_OF_WHOLE_MODEL = 0.1
"""Lowest learning rate at which full training diverges, as a share of that for a LoRA."""

ROUTE = KnownKeys(TreadRoute, noun="key of a route")
"""Keys of a route in `tread_config`."""

Finding = tuple[tuple[str, ...], Problem]
"""The options that a problem concerns, and the problem."""


def findings(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """Problems with combinations of options. `datasets` is None if they are faulty."""
    yield from _length(config)
    if config.max_train_steps is not None:
        yield from profile_findings(config, config.max_train_steps)
    yield from _densities(config)
    yield from guidance_findings(
        sampling_flavour(config), config.validation_guidance, config.validation_guidance_real, prefix="validation_"
    )
    yield from _preview(config)
    yield from layer_findings(config)
    yield from _rollout(config)
    yield from _optimizer(config)
    if config.optimizer_release_gradients:
        yield from _release(config)
    yield from precision_findings(config)
    yield from _precision(config)
    yield from _offload(config)
    yield from _ranks(config)
    if config.deepspeed_config is not None:
        yield from deepspeed_findings(config)
    yield from _machines(config)
    yield from _paths(config)
    yield from _trackers(config)
    yield from _routes(config)
    if datasets is not None:
        yield from _windows(config, datasets)
    yield from _preservation(config, datasets)
    if datasets is not None and config.eval_dataset_id is not None:
        ids = [eval_set.id for eval_set in datasets.eval_sets]
        if config.eval_dataset_id not in ids:
            message = f"eval_dataset_id = {value_text(config.eval_dataset_id)}"
            expected = (
                f"an enabled eval set: {join_names(ids)}" if ids else "a dataset with dataset_type eval in the list"
            )
            yield ("eval_dataset_id",), Problem(message, expected)


def _length(config: RunConfig) -> Iterator[Finding]:
    if config.max_train_steps is None and not config.num_train_epochs:
        message = "num_train_epochs = 0 without max_train_steps: the run would have no steps"
        yield ("num_train_epochs", "max_train_steps"), Problem(message, "one of them to be at least 1")


def profile_findings(options: ProcessOptions, steps: int) -> Iterator[Finding]:
    """A problem if `profile_steps` exceeds a run of `steps` steps."""
    if options.profiled.stop - 1 > steps:
        message = f"profile_steps = {options.profile_steps} in a run of {steps} steps"
        yield ("profile_steps", "max_train_steps"), Problem(message, f"steps from 1 to {steps}")


def _windows(config: RunConfig, datasets: Datasets) -> Iterator[Finding]:
    """Problems with steps of the run that no image set covers, or with epochs if the number of steps is unknown. Gaps
    between windows in steps and windows in epochs are found later, when the images are counted.
    """
    is_in_steps = config.max_train_steps is not None
    noun, option = ("step", "max_train_steps") if is_in_steps else ("epoch", "num_train_epochs")
    end = config.max_train_steps or config.num_train_epochs
    covered = 0
    for first, last in sorted((each.windows[noun] for each in datasets.train_sets), key=lambda window: window[0]):
        if covered + 1 < first and covered < end:
            yield (option, "data_backend_config"), gap_problem(noun, (covered + 1, first - 1), end)
        covered = max(covered, end if last is None else last)
    if covered < end:
        yield (option, "data_backend_config"), gap_problem(noun, (covered + 1, None), end)


def gap_problem(noun: str, gap: tuple[int, int | None], end: int | None) -> Problem:
    """The problem that no image set is active in `gap`, the first and last "step" or "epoch" (`noun`) of the gap. The
    last is None if no set follows. The run has `end` steps or epochs; None if the gap keeps it from reaching its last
    epoch.
    """
    first, last = gap
    last = end if last is None else last if end is None else min(last, end)
    span = f"from {noun} {first} on" if last is None else f"in {noun}s {first} to {last}"
    remedy = "Change start_step, end_step, start_epoch or end_epoch of an image set in the dataset list"
    if last == end and first > 1:
        option = "max_train_steps" if noun == "step" else "num_train_epochs"
        remedy += f", or give --{option}={first - 1}"
    return Problem(
        f"no image set is active {f'in {noun} {first}' if first == last else span}",
        f"at least one set in each {noun}",
        f"{remedy}.",
    )


def _densities(config: RunConfig) -> Iterator[Finding]:
    densities = {
        "flow_use_uniform_schedule": config.flow_use_uniform_schedule,
        "flow_use_beta_schedule": config.flow_use_beta_schedule,
        "flow_custom_timesteps": config.flow_custom_timesteps is not None,
    }
    chosen = tuple(key for key, is_on in densities.items() if is_on)
    if len(chosen) > 1:
        yield (
            chosen,
            Problem(f"{join_names(chosen, 'and')} are {'both' if len(chosen) == 2 else 'all'} on", "one at most"),
        )
    if config.flux_guidance_mode == "random-range" and config.flux_guidance_min > config.flux_guidance_max:
        keys = ("flux_guidance_min", "flux_guidance_max")
        message = f"flux_guidance_min = {config.flux_guidance_min:g}"
        yield keys, Problem(message, f"at most flux_guidance_max, {config.flux_guidance_max:g}")


def guidance_findings(
    flavour: Flavour, guidance: float | None, guidance_real: float, *, prefix: str = ""
) -> Iterator[Finding]:
    """Problems with guidance values that the flavour does not support. `prefix` begins the options' names in a config
    of `train`."""
    key, real_key = f"{prefix}guidance", f"{prefix}guidance_real"
    if flavour.guidance_kind != "embedded" and guidance_real != 1:
        message = f"{real_key} = {guidance_real:g}: only for models that take guidance as an input, such as dev"
        remedy = f"Remove it: {flavour.name} is distilled and needs no guidance."
        if flavour.guidance_kind == "classifier-free":
            remedy = f"Give --{key}={guidance_real:g} instead, which is true guidance on {flavour.name}."
        yield (real_key,), Problem(message, "1", remedy)
    if flavour.guidance_kind == "classifier-free" and guidance is not None and guidance < 1:
        message = f"{key} = {guidance:g}: on {flavour.name} it is true guidance"
        yield (key,), Problem(message, "at least 1, which turns it off")


def _preview(config: RunConfig) -> Iterator[Finding]:
    """A problem if the preview model cannot generate the validation images."""
    key, model = "validation_preview_model", config.validation_preview_model
    if model is None:
        return
    trained, named = FLAVOURS[config.model_flavour], preview_flavour(config)
    message = f"{key} = {value_text(model)}"
    if config.model_type == "full":
        remedy = f"Remove {key}: validation images then use the trained weights."
        yield (key, "model_type"), Problem(f"{message} with model_type = full, which trains no adapter", remedy=remedy)
    elif model == AUTO_PREVIEW and named is None:
        expected = f"one of {join_names([each.name for each in FLAVOURS.values() if each.preview])}"
        remedy = f"Remove it: validation images then use {trained.name} itself."
        yield (key, "model_flavour"), Problem(f"{message}: {trained.name} has no distilled sibling", expected, remedy)
    elif named is not None and named.family != trained.family:
        fitting = sibling(trained)
        expected = f"a model that a LoRA of {trained.name} fits" + (f": {fitting.name}" if fitting else "")
        yield (key, "model_flavour"), Problem(message, expected)


def idle_guidance_options(
    flavour: Flavour, guidance: float, guidance_real: float, *, prefix: str = "", negative: str = "negative"
) -> tuple[tuple[str, ...], str]:
    """Guidance options without effect on the flavour, and the reason. `negative` names the negative prompt's option."""
    if flavour.guidance_kind == "none":
        return (f"{prefix}guidance", negative), f"{flavour.name} is distilled: guidance is built into its weights"
    acting = "guidance_real" if flavour.guidance_kind == "embedded" else "guidance"
    is_off = flavour.guidance_scales(guidance, guidance_real).real == 1
    return (negative,) if is_off else (), f"{prefix}{acting} is 1"


def layer_findings(options: ModelOptions, context_dim: int | None = None) -> Iterator[Finding]:
    """A problem if the text encoder layers differ from those that a published flavour was trained with. `context_dim`
    is the width of the transformer's context, if its files are known: a model of another width is not a published one.
    """
    flavour, layers = FLAVOURS[options.model_flavour], options.custom_text_encoder_intermediary_layers
    source = options.pretrained_transformer_model_name_or_path or options.pretrained_model_name_or_path
    is_published = source in (None, flavour.repo) or context_dim == flavour.transformer.context_dim
    if flavour.repo is not None and is_published and layers not in (None, flavour.text.layers):
        key = "custom_text_encoder_intermediary_layers"
        usual = ",".join(map(str, flavour.text.layers))
        message = f"{key} = {','.join(map(str, layers or ()))}: {flavour.title} was trained with other layers"
        yield (key,), Problem(message, usual, "Remove it.")


def _rollout(config: RunConfig) -> Iterator[Finding]:
    beta1, beta2 = config.scheduled_sampling_reflexflow_beta1, config.scheduled_sampling_reflexflow_beta2
    if config.has_reflexflow and not beta1 and not beta2:
        keys = ("scheduled_sampling_reflexflow_beta1", "scheduled_sampling_reflexflow_beta2")
        message = f"{join_names(keys, 'and')} are both 0: rollouts would train nothing"
        yield (
            keys,
            Problem(
                message,
                "one of them above 0",
                "To train rollouts without ReflexFlow, give --scheduled_sampling_reflexflow=false.",
            ),
        )


def _optimizer(config: RunConfig) -> Iterator[Finding]:
    name = config.optimizer
    optimizer = known_optimizer(name)
    for argument in config.optimizer_config or {}:
        if optimizer.arguments is not None and argument not in optimizer.arguments:
            message = f"optimizer_config: {name} takes no {value_text(argument)} here"
            expected = join_names(optimizer.arguments) if optimizer.arguments else "no arguments"
            yield ("optimizer_config", "optimizer"), Problem(message, expected)
    if not optimizer.is_installed:
        message = f"optimizer = {value_text(name)}: {optimizer.library} is not installed"
        yield ("optimizer",), Problem(message, remedy="pip install -e '.[optimizers]'")
    is_fp16 = config.model_type == "full" and config.base_dtype == "fp16"
    if optimizer.rounds_stochastically and is_fp16 and not config.optimizer_release_gradients:
        keys = ("optimizer", "mixed_precision")
        message = f"optimizer = {value_text(name)} with model_type = full and fp16 weights, which it cannot step"
        yield keys, Problem(message, remedy="Give --base_model_default_dtype=bf16, or take adamw.")
    if name == "prodigy" and config.lora_plus_ratio != 1 and config.model_type == "lora":
        keys = ("lora_plus_ratio", "optimizer")
        message = f"lora_plus_ratio = {config.lora_plus_ratio:g} with prodigy, which estimates a single learning rate"
        yield keys, Problem(message, "1, or another optimizer")
    rate = config.learning_rate * config.rate_scale
    if rate > 1:
        message = f"learning_rate = {config.learning_rate:g}"
        if config.rate_scale != 1:
            message += f", {rate:g} scaled by the effective batch"
        usual = f"Set 1 for {name}." if optimizer.estimates_rate else "1e-5 to 1e-3 is usual: is a minus sign missing?"
        yield ("learning_rate",), Problem(message, "at most 1", usual)
    if not config.lr_scheduler.startswith("constant") and config.lr_end > config.learning_rate:
        message = f"lr_end = {config.lr_end:g}"
        yield ("lr_end", "learning_rate"), Problem(message, f"at most learning_rate, {config.learning_rate:g}")


def _release(config: RunConfig) -> Iterator[Finding]:
    """Problems with options that prevent stepping parameters inside the backward pass."""
    key = "optimizer_release_gradients"
    supported = [name for name, known in OPTIMIZERS.items() if known.releases_gradients]
    if config.model_type != "full":
        message = f"{key} with model_type = {config.model_type}, whose gradients are small"
        yield (key, "model_type"), Problem(message, "full", f"Give --{key}=false.")
        return
    if config.optimizer not in supported:
        message = f"{key} with optimizer = {value_text(config.optimizer)}"
        remedy = f"Give --optimizer=adafactor, or --{key}=false."
        yield (key, "optimizer"), Problem(message, join_names(supported), remedy)
    if config.base_dtype != "bf16" or config.is_autocast:
        names = ("mixed_precision", "base_model_default_dtype")
        keys = [name for name in names if vars(config)[name] not in ("bf16", None)]
        message = f"{key} with {' and '.join(f'{name} = {vars(config)[name]}' for name in keys)}"
        remedy = f"Give {' '.join(f'--{name}=bf16' for name in keys)}."
        yield (key, *keys), Problem(message, "bf16 weights that compute in bf16", remedy)
    if config.max_grad_norm and config.grad_clip_method == "norm":
        message = f"{key} with max_grad_norm = {config.max_grad_norm:g}: the norm is known only after the last gradient"
        remedy = "Give --max_grad_norm=0, or --grad_clip_method=value, which clips each value by itself."
        yield (key, "max_grad_norm", "grad_clip_method"), Problem(message, remedy=remedy)
    if config.gradient_accumulation_steps > 1:
        message = f"{key} with gradient_accumulation_steps = {config.gradient_accumulation_steps}, which sums gradients"
        remedy = "Give --gradient_accumulation_steps=1; a larger train_batch_size also averages over more images."
        yield (key, "gradient_accumulation_steps"), Problem(message, remedy=remedy)


def precision_findings(options: PrecisionOptions) -> Iterator[Finding]:
    """Problems with quantization formats whose library is missing or too old."""
    for key, name in _precisions(options).items():
        reason = None if name == NO_CHANGE else PRECISIONS[name].unusable_reason()
        if reason is not None:
            yield (key,), Problem(f"{key} = {value_text(name)}: {reason}", remedy="pip install -e '.[quantization]'")


def _precisions(options: PrecisionOptions) -> dict[str, str]:
    return {
        "base_model_precision": options.base_model_precision,
        "text_encoder_1_precision": options.text_encoder_1_precision,
    }


def _precision(config: RunConfig) -> Iterator[Finding]:
    if config.model_type == "full" and config.base_model_precision != NO_CHANGE:
        message = f"base_model_precision = {value_text(config.base_model_precision)} with model_type = full"
        expected = "no_change: quantized weights cannot be trained"
        remedy = "Train a LoRA on top of them, or give --base_model_precision=no_change."
        yield ("base_model_precision", "model_type"), Problem(message, expected, remedy)


def _offload(config: RunConfig) -> Iterator[Finding]:
    if config.enable_group_offload and config.model_type == "full":
        message = "enable_group_offload with model_type = full, whose weights all change with each step"
        remedy = "Offloaded weights are read-only: remove enable_group_offload, or train a LoRA."
        yield ("enable_group_offload", "model_type"), Problem(message, remedy=remedy)
    conflict = streaming_conflict(config)
    if config.dynamo_backend == "inductor" and conflict is not None:
        key, reason, remedy = conflict
        message = (
            f"enable_group_offload with dynamo_backend = inductor and {key} = {value_text(vars(config)[key])}: {reason}"
        )
        remedy = f"{remedy}, or give --dynamo_backend=no to train uncompiled."
        yield ("enable_group_offload", "dynamo_backend", key), Problem(message, remedy=remedy)
    yield from encoder_findings(config, config)
    folder = config.group_offload_to_disk_path
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        message = f"group_offload_to_disk_path = {value_text(folder)}: this is a file"
        yield ("group_offload_to_disk_path",), Problem(message, "a folder")


def _ranks(config: RunConfig) -> Iterator[Finding]:
    """Problems with options that conflict with training on several processes."""
    engine = "fsdp_enable" if config.may_shard else "deepspeed_config" if config.zero_stage else None
    key = "num_processes" if config.ranks > 1 else engine
    if config.optimizer_release_gradients and config.model_type == "full" and key is not None:
        value = value_text(vars(config)[key])
        message = f"optimizer_release_gradients with {key} = {value}, where gradients are reduced first"
        remedy = "Give --optimizer_release_gradients=false, or --num_processes=1."
        yield ("optimizer_release_gradients", key), Problem(message, remedy=remedy)
    if engine is None:
        return
    if config.enable_group_offload and config.model_type != "full":  # full training has its own problem
        in_host_memory = "--fsdp_cpu_offload" if config.may_shard else "offload_param of stage 3"
        message = f"enable_group_offload with {engine}, which places the blocks itself"
        remedy = f"Remove enable_group_offload; {in_host_memory} keeps the shards in host memory."
        yield ("enable_group_offload", engine), Problem(message, remedy=remedy)
    preview = config.validation_preview_model
    if preview is not None and config.model_type != "full" and (config.may_shard or config.zero_stage == 3):
        message = (
            f"validation_preview_model = {value_text(preview)} with {engine}: each process would hold that whole model"
        )
        remedy = "Remove validation_preview_model: validation images then use the sharded model itself."
        yield ("validation_preview_model", engine), Problem(message, remedy=remedy)
    if not known_optimizer(config.optimizer).is_elementwise and (config.model_type == "full" or config.zero_stage):
        supported = [name for name, known in OPTIMIZERS.items() if known.is_elementwise]
        message = (
            f"optimizer = {value_text(config.optimizer)} with {'model_type = full and ' * config.may_shard}{engine}"
        )
        yield ("optimizer", engine), Problem(f"{message}, where each process steps a shard", join_names(supported))


def _machines(config: RunConfig) -> Iterator[Finding]:
    """Problems with the number of processes per machine and this machine's rank."""
    count = config.num_machines
    if remainder := config.ranks % count:
        next_multiple = config.ranks - remainder + count
        message = f"num_processes = {config.ranks} with num_machines = {count}"
        remedy = f"Give --num_processes={next_multiple}, {next_multiple // count} on each."
        yield ("num_processes", "num_machines"), Problem(message, "the same number on each machine", remedy)
    if config.machine_rank >= count:
        message = f"machine_rank = {config.machine_rank} with num_machines = {count}"
        yield ("machine_rank", "num_machines"), Problem(message, f"a number below {count}")


def streaming_conflict(config: RunConfig) -> tuple[str, str, str] | None:
    """The option that prevents compiling offloaded blocks, the reason, and a remedy; None if nothing prevents it or no
    blocks are offloaded. See docs/decisions/0020-compiled-blocks.md.
    """
    if not config.enable_group_offload:
        return None
    if config.group_offload_type == "leaf_level":
        reason = "a compiled block is one graph, and single layers cannot be loaded inside it"
        return "group_offload_type", reason, "Give --group_offload_type=block_level"
    reason = "a compiled block that is not recomputed may keep copies of its weights on the accelerator"
    if not config.gradient_checkpointing:
        return "gradient_checkpointing", reason, "Give --gradient_checkpointing=true"
    if config.gradient_checkpointing_interval is not None:
        return "gradient_checkpointing_interval", reason, "Remove gradient_checkpointing_interval"
    return None


def encoder_findings(precision: PrecisionOptions, offload: OffloadOptions) -> Iterator[Finding]:
    """Problems with the options for loading the text encoder."""
    if offload.group_offload_text_encoder and precision.text_encoder_mode == "resident":
        message = "group_offload_text_encoder with text_encoder_mode = resident, which loads it whole"
        yield ("group_offload_text_encoder", "text_encoder_mode"), Problem(message, remedy="Remove one of the two.")


def _paths(config: RunConfig) -> Iterator[Finding]:
    if Path(config.output_dir).is_file():
        yield ("output_dir",), Problem(f"output_dir = {value_text(config.output_dir)}: this is a file", "a folder")
    if config.init_lora is not None and config.model_type == "full":
        message = "init_lora with model_type = full, which trains no adapter"
        yield ("init_lora", "model_type"), Problem(message, remedy="Remove one of the two.")
    elif config.init_lora is not None and not Path(config.init_lora).is_file():
        expected = "a .safetensors file or a run's folder"
        yield ("init_lora",), Problem(f"init_lora = {value_text(config.init_lora)}: no such file", expected)
    resume = config.resume_from_checkpoint
    # Machine 0 sends it to the others.
    if resume not in ("", LATEST) and config.machine_rank == 0 and not Path(resume).is_dir():
        message = f"resume_from_checkpoint = {value_text(resume)}: no such folder"
        yield ("resume_from_checkpoint",), Problem(message, "latest, a checkpoint's folder, or an empty string")


def _trackers(config: RunConfig) -> Iterator[Finding]:
    for name in config.trackers:
        spec = find_spec(name)
        # find_spec also returns a spec for a plain folder of that name, such as wandb's log folder, without an origin.
        if spec is None or spec.origin is None:
            message = f"report_to = {value_text(config.report_to)}: {name} is not installed"
            yield ("report_to",), Problem(message, remedy=f"pip install -e '.[{name}]'")


def _routes(config: RunConfig) -> Iterator[Finding]:
    """Problems in `tread_config` itself; `simpletuner.flux2.routes` checks its routes against the model's blocks."""
    key = ("tread_config",)
    document = config.tread_config
    if document is None:
        return
    for name in document:
        if name != "routes":
            yield key, Problem(f"tread_config: no such key: {value_text(name)}", "only routes")
    routes = document.get("routes")
    if not isinstance(routes, list) or not routes:
        yield key, Problem(f"tread_config: routes = {value_text(routes)}", "a list of at least one route, in [ ]")
        return
    for number, route in enumerate(routes, start=1):
        prefix = f"tread_config, route {number}: "
        if not isinstance(route, dict):
            yield key, Problem(f"{prefix}{value_text(route)}", "an object, in { }")
            continue
        givens = {name: GivenValue(value, "file", name) for name, value in route.items()}
        for problem in check_givens(givens, ROUTE, CheckedKeys(), prefix=prefix).problems.values():
            yield key, problem


def _preservation(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """Problems with options that preserve the base model's predictions but cannot work in this run."""
    train_sets = () if datasets is None else datasets.train_sets
    regularization_sets = [image_set.id for image_set in train_sets if image_set.is_regularisation_data]
    if config.model_type == "full":
        reason = "with model_type = full, which changes the base model: its original predictions are lost"
        remedy = "Train a LoRA (--model_type=lora), or give"
        if config.preserves:
            message = f"preservation = {config.preservation} {reason}"
            yield ("preservation", "model_type"), Problem(message, remedy=f"{remedy} --preservation=none.")
        if config.masked_loss_prior:
            message = f"masked_loss_prior = {config.masked_loss_prior:g} {reason}"
            yield ("masked_loss_prior", "model_type"), Problem(message, remedy=f"{remedy} --masked_loss_prior=0.")
        if regularization_sets:
            message = f"is_regularisation_data in {join_names(regularization_sets, 'and')} {reason}"
            yield ("model_type",), Problem(message, remedy=f"{remedy} no set is_regularisation_data.")
    if config.preserves and config.preservation == "class":
        yield from _class_preservation(config, datasets)


def _class_preservation(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """Problems with the trigger and class, which `preservation` class needs to rewrite captions."""
    trigger = config.preservation_trigger
    if trigger is None:
        expected = "the trigger word in captions"
        remedy = "Give --preservation_trigger, such as the instance_prompt's rare word, or --preservation=blank."
        message = "preservation = class without preservation_trigger"
        yield ("preservation_trigger", "preservation"), Problem(message, expected, remedy)
    names = {} if config.preservation_class is None else {"preservation_class": config.preservation_class}
    if datasets is not None:
        learned = [image_set for image_set in datasets.train_sets if not image_set.is_regularisation_data]
        names |= {f"class_prompt of {each.id}": each.class_prompt for each in learned if each.class_prompt is not None}
        without_class = [each.id for each in learned if each.class_prompt is None]
        if without_class and config.preservation_class is None:
            sets = join_names(without_class, "and")
            message = f"preservation = class without preservation_class, and no class_prompt in {sets}"
            remedy = "Give --preservation_class, such as dog, or --preservation=blank."
            yield ("preservation_class", "preservation"), Problem(message, "the word that replaces the trigger", remedy)
    for key, name in names.items():
        if trigger is not None and with_trigger_replaced(name, trigger, "") is not None:
            message = f"{key} = {value_text(name)} contains preservation_trigger, {value_text(trigger)}"
            yield ("preservation_class", "preservation_trigger"), Problem(message, "a class without the trigger")


def notices(config: RunConfig, datasets: Datasets | None, given_options: Collection[str]) -> Iterator[str]:
    """Notices before the run: the license, options in `given_options` without effect, unusual combinations."""
    flavour, train_sets = FLAVOURS[config.model_flavour], () if datasets is None else datasets.train_sets
    if flavour.license_notice is not None:
        yield flavour.license_notice
    base = sibling(flavour)
    if base is not None and flavour.is_distilled:
        yield (
            f"model_flavour = {flavour.name} has distilled weights, made for sampling: training them gives gray, "
            f"smooth blobs. Train --model_flavour {base.name}; its LoRAs also work on {flavour.title}."
        )
    yield from deepspeed_notices(config)
    for keys, has_no_effect, reason in _ignored(config, datasets):
        typed = [key for key in keys if has_no_effect and key in given_options]
        if typed:
            yield no_effect(typed, reason)
    scale = config.alpha / config.lora_rank
    if scale <= 1 / 8 and config.model_type == "lora":
        yield (
            f"lora_alpha = {config.alpha:g} at rank {config.lora_rank} scales the adapter by {scale:.3g}: "
            "its effect may be too weak to see. Without lora_alpha the scale is 1."
        )
    for image_set in train_sets:
        if image_set.is_regularisation_data and datasets is not None and datasets.is_masked(image_set):
            yield (
                f"{image_set.id}: its masks have no effect: with is_regularisation_data the base model's prediction is "
                "preserved everywhere."
            )
    offset = [each.id for each in train_sets if each.timestep_sampling_offset]
    if offset and has_other_distribution(config):
        yield f"{join_names(offset, 'and')}: {no_effect(['timestep_sampling_offset'], 'another distribution is used')}"
    for route in config.tread_routes:
        if route.selection_ratio != 0.5:
            yield (
                f"selection_ratio = {route.selection_ratio:g} is the share of image tokens that is kept. Programs that "
                f"set the share that is dropped would have {1 - route.selection_ratio:g}."
            )
    if flavour.guidance_kind == "classifier-free" and config.caption_dropout_probability == 0:
        yield (
            f"caption_dropout_probability = 0: guidance steers {flavour.name} away from the empty prompt, which this "
            "run then never trains. Images may get worse: give --caption_dropout_probability=0.1."
        )
    if (
        config.model_type == "full"
        and "learning_rate" not in given_options
        and not known_optimizer(config.optimizer).estimates_rate
    ):
        yield (
            f"learning_rate is {config.learning_rate:g}, which suits a LoRA: 1e-6 to 5e-5 is usual for full training."
        )
    if config.rate_scale != 1:
        yield (
            f"learning_rate {config.learning_rate:g} × {config.rate_scale:.4g} for the effective batch of "
            f"{config.effective_batch}: {config.learning_rate * config.rate_scale:.4g}."
        )
    named = [each.id for each in train_sets if each.class_prompt is not None]
    if named and not (config.preserves and config.preservation == "class"):
        yield f"class_prompt in {join_names(named, 'and')} has no effect: preservation class is off."
    yield from _odd_rates(config)
    if config.optimizer == "adamw_schedulefree" and not config.lr_scheduler.startswith("constant"):
        yield (
            f"lr_scheduler = {config.lr_scheduler}: adamw_schedulefree averages the weights instead of decaying the "
            "learning rate, and is meant for constant_with_warmup."
        )
    if config.max_train_steps is not None and config.lr_warmup_steps >= config.max_train_steps:
        yield (
            f"lr_warmup_steps = {config.lr_warmup_steps} is the whole run of {config.max_train_steps} steps: "
            "the learning rate never reaches its peak."
        )


def validation_image_notices(config: RunConfig, prompts: Collection[str]) -> Iterator[str]:
    """Notices about the validation images of `prompts`: the preview model, and sizes that do not suit the flavour."""
    flavour = FLAVOURS[config.model_flavour]
    if config.validation_preview_model is not None and not config.validation_disable and prompts:
        steps = f"{config.validation_num_inference_steps} steps"
        preview = sampling_flavour(config)
        scale = f"guidance {config.validation_guidance:g}"
        yield (
            f"Validation images are generated with the LoRA on validation_preview_model = "
            f"{config.validation_preview_model}: {steps}, "
            f"{'no guidance' if preview.guidance_kind == 'none' else scale}. The held-out loss is still measured on "
            f"{flavour.name}."
        )
    side = flavour.fixed_side
    if side is None or config.pretrained_model_name_or_path is not None or config.validation_disable or not prompts:
        return
    unsuitable = [size for size in config.sizes if not all(2 / 3 <= edge / side <= 3 / 2 for edge in size)]
    if unsuitable:
        size = f"{side}x{side}"
        yield (
            f"validation_resolution = {config.validation_resolution}: {flavour.title} was trained at {size}, and its "
            f"images at other sizes are flat areas. Give --validation_resolution={size}, and resolution {side} in the "
            "image sets."
        )


def _odd_rates(config: RunConfig) -> Iterator[str]:
    """Notices about a learning rate that is too low to learn or so high that training diverges."""
    name, optimizer = config.optimizer, known_optimizer(config.optimizer)
    if optimizer.estimates_rate and config.learning_rate < PRODIGY_RATE:
        yield (
            f"learning_rate = {config.learning_rate:g} multiplies the learning rate that {name} estimates: 1 is usual, "
            "and this is too low to learn. Give --learning_rate=1."
        )
    limit = optimizer.diverges_from
    if limit is None:
        return
    model = "a LoRA"
    if config.model_type == "full":
        model, limit = "a whole model", limit * SHARE_OF_WHOLE_MODEL
    rate = config.learning_rate * config.rate_scale
    if rate >= limit:
        scaled = "" if config.rate_scale == 1 else f", {rate:.4g} scaled by the effective batch"
        usual = limit * USUAL_SHARE / config.rate_scale
        yield (
            f"learning_rate = {config.learning_rate:g}{scaled}: training {model} with {name} usually diverges at "
            f"{limit:g} or more. Begin with --learning_rate={float(f'{usual:.2g}'):g}."
        )


def has_other_distribution(config: RunConfig) -> bool:
    """Whether another distribution replaces the default one of sigma, the sigmoid of a normal draw."""
    is_listed = config.flow_custom_timesteps is not None
    return config.flow_use_uniform_schedule or config.flow_use_beta_schedule or is_listed


def _ignored(config: RunConfig, datasets: Datasets | None) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """Yields (options, whether they have no effect, the reason)."""
    flavour = FLAVOURS[config.model_flavour]
    if flavour.guidance_kind == "embedded":
        is_constant = config.flux_guidance_mode == "constant"
        yield ("flux_guidance_min", "flux_guidance_max"), is_constant, "flux_guidance_mode is constant"
        yield ("flux_guidance_value",), not is_constant, "flux_guidance_mode is random-range"
    else:
        yield tuple(GuidanceOptions.model_fields), True, f"{flavour.name} takes no guidance as an input"
    is_qwen = flavour.text.kind == "qwen3"
    yield ("tokenizer_fix_regex",), is_qwen, f"it corrects Mistral's tokenizer, and {flavour.name} has Qwen's"

    beta = ("flow_beta_schedule_alpha", "flow_beta_schedule_beta")
    yield beta, not config.flow_use_beta_schedule, "flow_use_beta_schedule is false"
    is_listed = config.flow_custom_timesteps is not None
    yield ("flow_sigmoid_scale",), has_other_distribution(config), "another distribution is used"
    yield ("flow_schedule_shift", "flow_schedule_auto_shift"), is_listed, "flow_custom_timesteps overrides it"
    is_auto = config.flow_schedule_auto_shift and not is_listed
    yield ("flow_schedule_shift",), is_auto, "flow_schedule_auto_shift is true"
    yield ("huber_c", "huber_schedule"), config.loss_type == "l2", "loss_type is l2"

    yield from _ignored_of_rollout(config)
    is_class = config.preservation == "class"
    yield ("preservation_weight",), config.preservation == "none", "preservation is none"
    reason = f"preservation is {config.preservation}"
    yield ("preservation_trigger", "preservation_class"), not is_class, reason

    shape = config.lr_scheduler
    yield ("lr_warmup_steps",), shape == "constant", "lr_scheduler is constant; constant_with_warmup has a warm-up"
    has_cycles = shape in ("cosine_with_restarts", "sine")
    yield ("lr_num_cycles",), not has_cycles, f"lr_scheduler is {shape}"
    yield ("lr_power",), shape != "polynomial", f"lr_scheduler is {shape}"
    yield ("lr_end",), shape.startswith("constant"), f"lr_scheduler is {shape}"
    known = known_optimizer(config.optimizer)
    reason = "takes its arguments in optimizer_config" if known.arguments is None else "does not use it"
    yield tuple(key for key in ADAM if key not in known.reads), True, f"{config.optimizer} {reason}"
    yield ("lr_scale",), config.lr_scale and config.lr_scale_sqrt, "lr_scale_sqrt overrides it"
    averages = ("ema_decay", "ema_device", "ema_update_interval", "ema_validation")
    yield averages, not config.use_ema, "use_ema is false"
    has_both = config.max_train_steps is not None and config.num_train_epochs > 0
    yield ("num_train_epochs",), has_both, "max_train_steps overrides it"
    yield ("grad_clip_method",), not config.max_grad_norm, "max_grad_norm is 0"
    interval = ("gradient_checkpointing_interval",)
    yield interval, not config.gradient_checkpointing, "gradient_checkpointing is false"

    is_plain = config.base_model_precision == NO_CHANGE
    yield ("base_model_cache_dir",), is_plain, "base_model_precision is no_change"
    is_unused = config.quantize_via == "cpu" and set(_precisions(config).values()) == {NO_CHANGE}
    yield ("quantize_via",), is_unused, "nothing is quantized"

    yield ("dynamo_mode",), config.dynamo_backend == "no", "dynamo_backend is no"
    yield from _ignored_of_offload(config)

    is_alone = config.num_processes in (None, 1)
    shards = ("fsdp_reshard_after_forward", "fsdp_cpu_offload")
    yield shards, not config.fsdp_enable, "fsdp_enable is false"
    yield ("fsdp_enable", *shards), config.fsdp_enable and config.num_processes == 1, "num_processes is 1"
    yield ("deepspeed_config",), config.num_processes == 1, "num_processes is 1"
    yield ("distributed_timeout_s",), is_alone and not config.may_shard and not config.zero_stage, "one process trains"

    source = config.pretrained_model_name_or_path
    is_local = FLAVOURS[config.model_flavour].repo is None if source is None else Path(source).exists()
    yield ("revision", "variant"), is_local, "the model does not come from the Hub"
    if config.model_type == "full":
        yield tuple(LoraOptions.model_fields), True, "model_type is full, which trains no adapter"
    else:
        yield ("model_save_dtype",), True, "model_type is lora, which uses lora_save_dtype"
        has_targets = config.peft_lora_target_modules is not None
        yield ("flux_lora_target",), has_targets, "peft_lora_target_modules overrides it"
        starts_from_file = config.init_lora is not None
        from_file = ("lora_rank", "lora_alpha", "lora_init_type")
        yield from_file, starts_from_file, "init_lora is given: the values of its file apply"

    image_options = (
        "validation_preview_model",
        "validation_drift_prompts",
        "validation_prompt",
        "validation_prompt_library",
        "user_prompt_library",
        "validation_subject",
        "validation_on_startup",
        "validation_epoch_interval",
        "validation_negative_prompt",
        "validation_guidance_real",
        "num_validation_images",
    )
    yield image_options, config.validation_disable, "validation_disable is true"
    keys, reason = idle_guidance_options(
        sampling_flavour(config),
        config.validation_guidance,
        config.validation_guidance_real,
        prefix="validation_",
        negative="validation_negative_prompt",
    )
    yield keys, True, reason
    trackers = ("tracker_project_name", "tracker_run_name")
    yield trackers, not config.trackers, "report_to is none"
    if datasets is not None:
        has_references = any(each.is_reference for each in datasets.conditioning_sets)
        yield ("reference_dropout_probability", "reference_attention"), not has_references, "no dataset has references"
        held_out = ("eval_steps_interval", "num_eval_images")
        yield held_out, not datasets.eval_sets, "no dataset has dataset_type eval"
        yield from _ignored_of_masks(config, datasets)


def _ignored_of_masks(config: RunConfig, datasets: Datasets) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    first, *others = (key for key in ConditioningOptions.model_fields if key.startswith("masked_loss_"))
    if not any(datasets.is_masked(image_set) for image_set in (*datasets.train_sets, *datasets.eval_sets)):
        yield (first, *others), True, "no dataset has masks"
        return
    if not any(datasets.is_masked(image_set) for image_set in datasets.train_sets):
        yield (first, "masked_loss_prior"), True, "no training dataset has masks"
    yield ("masked_loss_prior",), not config.masked_loss_probability, f"{first} is 0"
    yield (
        ("masked_loss_invert",),
        config.masked_loss_floor == 1 and not config.masked_loss_prior,
        "masked_loss_floor is 1",
    )


def _ignored_of_offload(config: RunConfig) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    of_groups = (
        "group_offload_type",
        "group_offload_blocks_per_group",
        "group_offload_resident_blocks",
        "group_offload_to_disk_path",
    )
    yield of_groups, not config.enable_group_offload, "enable_group_offload is false"
    is_by_leaf = config.enable_group_offload and config.group_offload_type == "leaf_level"
    yield ("group_offload_blocks_per_group",), is_by_leaf, "group_offload_type is leaf_level"
    is_used = config.enable_group_offload or config.group_offload_vae or config.activation_offload
    yield ("group_offload_use_stream",), not is_used, "nothing that it applies to is offloaded"
    is_streamed = config.text_encoder_mode == "streamed"
    yield ("group_offload_text_encoder",), is_streamed, "text_encoder_mode is streamed already"
    recomputes = config.gradient_checkpointing
    yield ("activation_offload",), not recomputes, "gradient_checkpointing is false: no block is recomputed"
    reason = "no validation images are generated, and models that prepare data are always freed after their phase"
    yield ("offload_during_startup",), config.validation_disable, reason


def _ignored_of_rollout(config: RunConfig) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    first, *others = RolloutOptions.model_fields
    if not config.scheduled_sampling_max_step_offset:
        yield tuple(others), True, f"{first} is 0"
        return
    has_ramp = config.scheduled_sampling_ramp_steps > 0
    ramp = tuple(f"scheduled_sampling_{name}" for name in ("prob_start", "prob_end", "ramp_shape", "start_step"))
    yield ramp, not has_ramp, "scheduled_sampling_ramp_steps is 0"
    yield ("scheduled_sampling_probability",), has_ramp, "scheduled_sampling_ramp_steps is above 0: the ramp is used"
    terms = tuple(f"scheduled_sampling_reflexflow_{name}" for name in ("alpha", "beta1", "beta2"))
    yield terms, not config.scheduled_sampling_reflexflow, "scheduled_sampling_reflexflow is false"
