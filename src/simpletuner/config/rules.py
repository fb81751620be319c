"""What no option can tell alone: checks across options and datasets, and options that have no effect."""

from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

from simpletuner.base.errors import Problem
from simpletuner.config.datasets import Datasets
from simpletuner.config.deepspeed import deepspeed_findings, deepspeed_notices
from simpletuner.config.flavours import FLAVOURS, Flavour, sibling
from simpletuner.config.given import Checked, Given, Known, check_givens
from simpletuner.config.optimizers import ADAM, OPTIMIZERS, known_optimizer
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.options.conditioning import ConditioningOptions
from simpletuner.config.options.guidance import GuidanceOptions
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.preservation import replaced
from simpletuner.config.options.process import ProcessOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.options.tread import TreadRoute
from simpletuner.config.options.validation import AUTO_PREVIEW
from simpletuner.config.precisions import NO_CHANGE, PRECISIONS
from simpletuner.config.previews import drawing_flavour, preview_flavour
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names, no_effect, shown

PRODIGY_RATE = 0.1
"""Below this the rate that prodigy or its kin find is scaled down to what is hardly ever meant."""

USUAL_SHARE = 0.01
"""Of the rate from which training diverges: what to begin with."""
SHARE_OF_WHOLE_MODEL = 0.1
"""Of the same rate: from where training a whole model diverges."""

ROUTE = Known(TreadRoute, noun="key of a route")
"""What a route of `tread_config` may hold."""

Finding = tuple[tuple[str, ...], Problem]
"""The options that a problem is about, and the problem."""


def findings(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """Problems between options. `datasets` is None where they are faulty themselves."""
    yield from _length(config)
    if config.max_train_steps is not None:
        yield from profile_findings(config, config.max_train_steps)
    yield from _densities(config)
    yield from guidance_findings(
        drawing_flavour(config), config.validation_guidance, config.validation_guidance_real, prefix="validation_"
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
        ids = [held.id for held in datasets.eval_sets]
        if config.eval_dataset_id not in ids:
            found = f"eval_dataset_id = {shown(config.eval_dataset_id)}"
            expected = f"an enabled eval set: {join_names(ids)}" if ids else "a set with dataset_type eval to be listed"
            yield ("eval_dataset_id",), Problem(found, expected)


def _length(config: RunConfig) -> Iterator[Finding]:
    if config.max_train_steps is None and not config.num_train_epochs:
        found = "num_train_epochs = 0 without max_train_steps: nothing would be trained"
        yield ("num_train_epochs", "max_train_steps"), Problem(found, "one of them to be at least 1")


def profile_findings(options: ProcessOptions, steps: int) -> Iterator[Finding]:
    """Profiled steps that a run of `steps` does not have."""
    if options.profiled.stop - 1 > steps:
        found = f"profile_steps = {options.profile_steps} in a run of {steps} steps"
        yield ("profile_steps", "max_train_steps"), Problem(found, f"steps from 1 to {steps}")


def _windows(config: RunConfig, datasets: Datasets) -> Iterator[Finding]:
    """Steps of the run that no image set covers, as far as its length is known; else its epochs. What windows in steps
    and epochs leave together shows when the images are counted.
    """
    is_in_steps = config.max_train_steps is not None
    noun, option = ("step", "max_train_steps") if is_in_steps else ("epoch", "num_train_epochs")
    end = config.max_train_steps or config.num_train_epochs
    covered = 0
    for first, last in sorted((each.windows[noun] for each in datasets.train_sets), key=lambda window: window[0]):
        if covered + 1 < first and covered < end:
            yield (option, "data_backend_config"), uncovered(noun, (covered + 1, first - 1), end)
        covered = max(covered, end if last is None else last)
    if covered < end:
        yield (option, "data_backend_config"), uncovered(noun, (covered + 1, None), end)


def uncovered(noun: str, gap: tuple[int, int | None], end: int | None) -> Problem:
    """What to say of a gap, its first and last "step" or "epoch", between the windows of the image sets. The last is
    None where no set follows. The run has `end` of them; None where that would need more epochs than there are.
    """
    first, last = gap
    last = end if last is None else last if end is None else min(last, end)
    which = f"from {noun} {first} on" if last is None else f"in {noun}s {first} to {last}"
    remedy = "Change start_step, end_step, start_epoch or end_epoch of a set in the list of datasets"
    if last == end and first > 1:
        option = "max_train_steps" if noun == "step" else "num_train_epochs"
        remedy += f", or give --{option}={first - 1}"
    return Problem(
        f"no image set is active {f'in {noun} {first}' if first == last else which}",
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
        found = f"flux_guidance_min = {config.flux_guidance_min:g}"
        yield keys, Problem(found, f"at most flux_guidance_max, {config.flux_guidance_max:g}")


def guidance_findings(
    flavour: Flavour, guidance: float | None, guidance_real: float, *, prefix: str = ""
) -> Iterator[Finding]:
    """Guidance that the flavour does not have. `prefix` stands before the options' names in a config of `train`."""
    key, real_key = f"{prefix}guidance", f"{prefix}guidance_real"
    if flavour.guidance_kind != "embedded" and guidance_real != 1:
        found = f"{real_key} = {guidance_real:g}: that is for models that take guidance as an input, such as dev"
        remedy = f"Take it out: {flavour.name} is distilled and needs no guidance."
        if flavour.guidance_kind == "classifier-free":
            remedy = f"Give --{key}={guidance_real:g} instead, which is true guidance on {flavour.name}."
        yield (real_key,), Problem(found, "1", remedy)
    if flavour.guidance_kind == "classifier-free" and guidance is not None and guidance < 1:
        found = f"{key} = {guidance:g}: on {flavour.name} it is true guidance"
        yield (key,), Problem(found, "at least 1, which turns it off")


def _preview(config: RunConfig) -> Iterator[Finding]:
    """A model to draw validation images on that cannot be."""
    key, asked = "validation_preview_model", config.validation_preview_model
    if asked is None:
        return
    own, named = FLAVOURS[config.model_flavour], preview_flavour(config)
    found = f"{key} = {shown(asked)}"
    if config.model_type == "full":
        remedy = f"Take {key} out: the images are then drawn with the weights that are trained."
        yield (key, "model_type"), Problem(f"{found} with model_type = full, which trains no adapter", remedy=remedy)
    elif asked == AUTO_PREVIEW and named is None:
        expected = f"one of {join_names([each.name for each in FLAVOURS.values() if each.preview])}"
        remedy = f"Take it out: the images are then drawn with {own.name} itself."
        yield (key, "model_flavour"), Problem(f"{found}: {own.name} has no distilled sibling", expected, remedy)
    elif named is not None and named.family != own.family:
        other = sibling(own)
        expected = f"a model that a LoRA of {own.name} fits" + (f": {other.name}" if other else "")
        yield (key, "model_flavour"), Problem(found, expected)


def guidance_without_effect(
    flavour: Flavour, guidance: float, guidance_real: float, *, prefix: str = "", negative: str = "negative"
) -> tuple[tuple[str, ...], str]:
    """Options of guidance that have no effect on the flavour, and the reason. `negative` is the negative prompt's."""
    if flavour.guidance_kind == "none":
        return (f"{prefix}guidance", negative), f"{flavour.name} is distilled: guidance is built into its weights"
    acting = "guidance_real" if flavour.guidance_kind == "embedded" else "guidance"
    is_off = flavour.scales(guidance, guidance_real).real == 1
    return (negative,) if is_off else (), f"{prefix}{acting} is 1"


def layer_findings(options: ModelOptions, context_dim: int | None = None) -> Iterator[Finding]:
    """Layers of the text encoder other than those that a published flavour was trained with. `context_dim` is the width
    of the transformer's context where its files are known: a model of another width is none of the published ones.
    """
    flavour, layers = FLAVOURS[options.model_flavour], options.custom_text_encoder_intermediary_layers
    place = options.pretrained_transformer_model_name_or_path or options.pretrained_model_name_or_path
    is_published = place in (None, flavour.repo) or context_dim == flavour.transformer.context_dim
    if flavour.repo is not None and is_published and layers not in (None, flavour.text.layers):
        key = "custom_text_encoder_intermediary_layers"
        usual = ",".join(map(str, flavour.text.layers))
        found = f"{key} = {','.join(map(str, layers or ()))}: {flavour.title} was trained with others"
        yield (key,), Problem(found, usual, "Take it out.")


def _rollout(config: RunConfig) -> Iterator[Finding]:
    beta1, beta2 = config.scheduled_sampling_reflexflow_beta1, config.scheduled_sampling_reflexflow_beta2
    if config.has_reflexflow and not beta1 and not beta2:
        keys = ("scheduled_sampling_reflexflow_beta1", "scheduled_sampling_reflexflow_beta2")
        found = f"{join_names(keys, 'and')} are both 0: nothing would be learned from what is rolled out"
        yield keys, Problem(found, "one of them above 0", "Without ReflexFlow: scheduled_sampling_reflexflow=false.")


def _optimizer(config: RunConfig) -> Iterator[Finding]:
    name = config.optimizer
    known = known_optimizer(name)
    for argument in config.optimizer_config or {}:
        if known.arguments is not None and argument not in known.arguments:
            found = f"optimizer_config: {name} takes no {shown(argument)} here"
            expected = join_names(known.arguments) if known.arguments else "nothing"
            yield ("optimizer_config", "optimizer"), Problem(found, expected)
    if not known.is_installed:
        found = f"optimizer = {shown(name)}: {known.library} is not installed"
        yield ("optimizer",), Problem(found, remedy="pip install -e '.[optimizers]'")
    is_fp16 = config.model_type == "full" and config.base_dtype == "fp16"
    if known.rounds_stochastically and is_fp16 and not config.optimizer_release_gradients:
        keys = ("optimizer", "mixed_precision")
        found = f"optimizer = {shown(name)} with model_type = full and fp16 weights, which it cannot step on"
        yield keys, Problem(found, remedy="Give --base_model_default_dtype=bf16, or take adamw.")
    if name == "prodigy" and config.lora_plus_ratio != 1 and config.model_type == "lora":
        keys = ("lora_plus_ratio", "optimizer")
        found = f"lora_plus_ratio = {config.lora_plus_ratio:g} with prodigy, which finds one rate for all"
        yield keys, Problem(found, "1, or another optimizer")
    rate = config.learning_rate * config.rate_scale
    if rate > 1:
        found = f"learning_rate = {config.learning_rate:g}"
        if config.rate_scale != 1:
            found += f", {rate:g} scaled by the effective batch"
        usual = f"{name} wants 1." if known.estimates_rate else "Usual are 1e-5 to 1e-3: is a minus missing?"
        yield ("learning_rate",), Problem(found, "at most 1", usual)
    if not config.lr_scheduler.startswith("constant") and config.lr_end > config.learning_rate:
        found = f"lr_end = {config.lr_end:g}"
        yield ("lr_end", "learning_rate"), Problem(found, f"at most learning_rate, {config.learning_rate:g}")


def _release(config: RunConfig) -> Iterator[Finding]:
    """Options with which a parameter cannot be stepped inside the backward pass."""
    key = "optimizer_release_gradients"
    able = [name for name, known in OPTIMIZERS.items() if known.releases_gradients]
    if config.model_type != "full":
        found = f"{key} with model_type = {config.model_type}, whose gradients are small"
        yield (key, "model_type"), Problem(found, "full", f"Give --{key}=false.")
        return
    if config.optimizer not in able:
        found = f"{key} with optimizer = {shown(config.optimizer)}"
        remedy = f"Give --optimizer=adafactor, or --{key}=false."
        yield (key, "optimizer"), Problem(found, join_names(able), remedy)
    if config.base_dtype != "bf16" or config.is_autocast:
        names = ("mixed_precision", "base_model_default_dtype")
        keys = [name for name in names if vars(config)[name] not in ("bf16", None)]
        found = f"{key} with {' and '.join(f'{name} = {vars(config)[name]}' for name in keys)}"
        remedy = f"Give {' '.join(f'--{name}=bf16' for name in keys)}."
        yield (key, *keys), Problem(found, "bf16 weights that compute in bf16", remedy)
    if config.max_grad_norm and config.grad_clip_method == "norm":
        found = f"{key} with max_grad_norm = {config.max_grad_norm:g}: the norm is known after the last gradient"
        remedy = "Give --max_grad_norm=0, or --grad_clip_method=value, which bounds each number."
        yield (key, "max_grad_norm", "grad_clip_method"), Problem(found, remedy=remedy)
    if config.gradient_accumulation_steps > 1:
        found = f"{key} with gradient_accumulation_steps = {config.gradient_accumulation_steps}, which adds them up"
        remedy = "Give --gradient_accumulation_steps=1; a larger train_batch_size averages as well."
        yield (key, "gradient_accumulation_steps"), Problem(found, remedy=remedy)


def precision_findings(options: PrecisionOptions) -> Iterator[Finding]:
    """Quantized weights whose library is not here."""
    for key, name in _precisions(options).items():
        lack = None if name == NO_CHANGE else PRECISIONS[name].lack()
        if lack is not None:
            yield (key,), Problem(f"{key} = {shown(name)}: {lack}", remedy="pip install -e '.[quantization]'")


def _precisions(options: PrecisionOptions) -> dict[str, str]:
    return {
        "base_model_precision": options.base_model_precision,
        "text_encoder_1_precision": options.text_encoder_1_precision,
    }


def _precision(config: RunConfig) -> Iterator[Finding]:
    if config.model_type == "full" and config.base_model_precision != NO_CHANGE:
        found = f"base_model_precision = {shown(config.base_model_precision)} with model_type = full"
        expected = "no_change: quantized weights cannot be trained"
        remedy = "Train a LoRA beside them, or give --base_model_precision=no_change."
        yield ("base_model_precision", "model_type"), Problem(found, expected, remedy)


def _offload(config: RunConfig) -> Iterator[Finding]:
    if config.enable_group_offload and config.model_type == "full":
        found = "enable_group_offload with model_type = full, whose weights all change with each step"
        remedy = "What is streamed is only read: take enable_group_offload out, or train a LoRA."
        yield ("enable_group_offload", "model_type"), Problem(found, remedy=remedy)
    conflict = streaming_conflict(config)
    if config.dynamo_backend == "inductor" and conflict is not None:
        key, reason, remedy = conflict
        found = f"enable_group_offload with dynamo_backend = inductor and {key} = {shown(vars(config)[key])}: {reason}"
        remedy = f"{remedy}, or give --dynamo_backend=no to train uncompiled."
        yield ("enable_group_offload", "dynamo_backend", key), Problem(found, remedy=remedy)
    yield from encoder_findings(config, config)
    place = config.group_offload_to_disk_path
    if place is not None and Path(place).exists() and not Path(place).is_dir():
        found = f"group_offload_to_disk_path = {shown(place)}: this is a file"
        yield ("group_offload_to_disk_path",), Problem(found, "a folder")


def _ranks(config: RunConfig) -> Iterator[Finding]:
    """Options that several processes cannot train with."""
    engine = "fsdp_enable" if config.may_shard else "deepspeed_config" if config.zero_stage else None
    key = "num_processes" if config.ranks > 1 else engine
    if config.optimizer_release_gradients and config.model_type == "full" and key is not None:
        found = (
            f"optimizer_release_gradients with {key} = {shown(vars(config)[key])}, where gradients are reduced first"
        )
        remedy = "Give --optimizer_release_gradients=false, or --num_processes=1."
        yield ("optimizer_release_gradients", key), Problem(found, remedy=remedy)
    if engine is None:
        return
    if config.enable_group_offload and config.model_type != "full":  # which has a problem of its own
        in_host_memory = "--fsdp_cpu_offload" if config.may_shard else "offload_param of stage 3"
        found = f"enable_group_offload with {engine}, which places the blocks itself"
        remedy = f"Take enable_group_offload out; {in_host_memory} keeps what is sharded in host memory."
        yield ("enable_group_offload", engine), Problem(found, remedy=remedy)
    preview = config.validation_preview_model
    if preview is not None and config.model_type != "full" and (config.may_shard or config.zero_stage == 3):
        found = f"validation_preview_model = {shown(preview)} with {engine}: each process would hold that model whole"
        remedy = "Take validation_preview_model out: the images are then drawn with the sharded model itself."
        yield ("validation_preview_model", engine), Problem(found, remedy=remedy)
    if not known_optimizer(config.optimizer).is_elementwise and (config.model_type == "full" or config.zero_stage):
        able = [name for name, known in OPTIMIZERS.items() if known.is_elementwise]
        found = f"optimizer = {shown(config.optimizer)} with {'model_type = full and ' * config.may_shard}{engine}"
        yield ("optimizer", engine), Problem(f"{found}, where each process steps a share", join_names(able))


def _machines(config: RunConfig) -> Iterator[Finding]:
    """Numbers that do not share out the processes over the machines."""
    count = config.num_machines
    if left := config.ranks % count:
        more = config.ranks - left + count
        found = f"num_processes = {config.ranks} with num_machines = {count}"
        remedy = f"Give --num_processes={more}, {more // count} on each."
        yield ("num_processes", "num_machines"), Problem(found, "as many on each machine", remedy)
    if config.machine_rank >= count:
        found = f"machine_rank = {config.machine_rank} with num_machines = {count}"
        yield ("machine_rank", "num_machines"), Problem(found, f"a number below {count}")


def streaming_conflict(config: RunConfig) -> tuple[str, str, str] | None:
    """The option because of which streamed blocks cannot be compiled, why, and what would help; None where they can be,
    or nothing is streamed. See docs/decisions/0020-compiled-blocks.md.
    """
    if not config.enable_group_offload:
        return None
    if config.group_offload_type == "leaf_level":
        reason = "a compiled block is one graph, and layers cannot come and go inside it"
        return "group_offload_type", reason, "Give --group_offload_type=block_level"
    reason = "a compiled block that is not recomputed may keep copies of its weights on the accelerator"
    if not config.gradient_checkpointing:
        return "gradient_checkpointing", reason, "Give --gradient_checkpointing=true"
    if config.gradient_checkpointing_interval is not None:
        return "gradient_checkpointing_interval", reason, "Take gradient_checkpointing_interval out"
    return None


def encoder_findings(precision: PrecisionOptions, offload: OffloadOptions) -> Iterator[Finding]:
    """Problems in how the text encoder is to be held."""
    if offload.group_offload_text_encoder and precision.text_encoder_mode == "resident":
        found = "group_offload_text_encoder with text_encoder_mode = resident, which holds all of it at once"
        yield ("group_offload_text_encoder", "text_encoder_mode"), Problem(found, remedy="Take one of the two out.")


def _paths(config: RunConfig) -> Iterator[Finding]:
    if Path(config.output_dir).is_file():
        yield ("output_dir",), Problem(f"output_dir = {shown(config.output_dir)}: this is a file", "a folder")
    if config.init_lora is not None and config.model_type == "full":
        found = "init_lora with model_type = full, which trains no adapter"
        yield ("init_lora", "model_type"), Problem(found, remedy="Take one of the two out.")
    elif config.init_lora is not None and not Path(config.init_lora).is_file():
        expected = "a .safetensors file or a run's folder"
        yield ("init_lora",), Problem(f"init_lora = {shown(config.init_lora)}: no such file", expected)
    resume = config.resume_from_checkpoint
    # Machine 0 sends it to the others.
    if resume not in ("", LATEST) and config.machine_rank == 0 and not Path(resume).is_dir():
        found = f"resume_from_checkpoint = {shown(resume)}: no such folder"
        yield ("resume_from_checkpoint",), Problem(found, "latest, a checkpoint's folder, or nothing")


def _trackers(config: RunConfig) -> Iterator[Finding]:
    for name in config.trackers:
        spec = find_spec(name)
        # A bare folder of that name, such as the one wandb leaves behind, is found too; it has no origin.
        if spec is None or spec.origin is None:
            found = f"report_to = {shown(config.report_to)}: {name} is not installed"
            yield ("report_to",), Problem(found, remedy=f"pip install -e '.[{name}]'")


def _routes(config: RunConfig) -> Iterator[Finding]:
    """What is wrong with the routes in themselves; `simpletuner.flux2.routes` holds them against the blocks."""
    key = ("tread_config",)
    document = config.tread_config
    if document is None:
        return
    for name in document:
        if name != "routes":
            yield key, Problem(f"tread_config: no such key: {shown(name)}", "routes alone")
    routes = document.get("routes")
    if not isinstance(routes, list) or not routes:
        yield key, Problem(f"tread_config: routes = {shown(routes)}", "a list of at least one route, in [ ]")
        return
    for number, route in enumerate(routes, start=1):
        where = f"tread_config, route {number}: "
        if not isinstance(route, dict):
            yield key, Problem(f"{where}{shown(route)}", "an object, in { }")
            continue
        givens = {name: Given(value, "file", name) for name, value in route.items()}
        for problem in check_givens(givens, ROUTE, Checked(), where=where).problems.values():
            yield key, problem


def _preservation(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """Losses toward the base model that a run cannot have."""
    train_sets = () if datasets is None else datasets.train_sets
    held = [image_set.id for image_set in train_sets if image_set.is_regularisation_data]
    if config.model_type == "full":
        why = "with model_type = full, which changes the base model itself: it cannot predict beside it"
        remedy = "Train a LoRA (--model_type=lora), or give"
        if config.preserves:
            found = f"preservation = {config.preservation} {why}"
            yield ("preservation", "model_type"), Problem(found, remedy=f"{remedy} --preservation=none.")
        if config.masked_loss_prior:
            found = f"masked_loss_prior = {config.masked_loss_prior:g} {why}"
            yield ("masked_loss_prior", "model_type"), Problem(found, remedy=f"{remedy} --masked_loss_prior=0.")
        if held:
            found = f"is_regularisation_data in {join_names(held, 'and')} {why}"
            yield ("model_type",), Problem(found, remedy=f"{remedy} no set is_regularisation_data.")
    if config.preserves and config.preservation == "class":
        yield from _class_preservation(config, datasets)


def _class_preservation(config: RunConfig, datasets: Datasets | None) -> Iterator[Finding]:
    """What `preservation` class needs to make another prompt of each caption."""
    trigger = config.preservation_trigger
    if trigger is None:
        expected = "the word in captions that stands for what is learned"
        remedy = "Give --preservation_trigger, such as the instance_prompt's rare word, or --preservation=blank."
        found = "preservation = class without preservation_trigger"
        yield ("preservation_trigger", "preservation"), Problem(found, expected, remedy)
    names = {} if config.preservation_class is None else {"preservation_class": config.preservation_class}
    if datasets is not None:
        learned = [image_set for image_set in datasets.train_sets if not image_set.is_regularisation_data]
        names |= {f"class_prompt of {each.id}": each.class_prompt for each in learned if each.class_prompt is not None}
        lacking = [each.id for each in learned if each.class_prompt is None]
        if lacking and config.preservation_class is None:
            sets = join_names(lacking, "and")
            found = f"preservation = class without preservation_class, and no class_prompt in {sets}"
            remedy = "Give --preservation_class, such as dog, or --preservation=blank."
            yield ("preservation_class", "preservation"), Problem(found, "what replaces the trigger", remedy)
    for key, name in names.items():
        if trigger is not None and replaced(name, trigger, "") is not None:
            found = f"{key} = {shown(name)} contains preservation_trigger, {shown(trigger)}"
            yield ("preservation_class", "preservation_trigger"), Problem(found, "a class without the trigger")


def notices(config: RunConfig, datasets: Datasets | None, given: Collection[str]) -> Iterator[str]:
    """What to say before the run: the license, options in `given` that have no effect, odd combinations."""
    flavour = FLAVOURS[config.model_flavour]
    if flavour.license_notice is not None:
        yield flavour.license_notice
    base = sibling(flavour)
    if base is not None and flavour.is_distilled:
        yield (
            f"model_flavour = {flavour.name} has distilled weights, made for drawing: training them gives gray, smooth "
            f"blobs. Train --model_flavour {base.name}; a LoRA of it fits {flavour.title} too."
        )
    yield from deepspeed_notices(config)
    for keys, has_no_effect, reason in _ignored(config, datasets):
        typed = [key for key in keys if has_no_effect and key in given]
        if typed:
            yield no_effect(typed, reason)
    scale = config.alpha / config.lora_rank
    if scale <= 1 / 8 and config.model_type == "lora":
        yield (
            f"lora_alpha = {config.alpha:g} at rank {config.lora_rank} scales the adapter by {scale:.3g}: "
            "it may learn too little to see. Without lora_alpha the scale is 1."
        )
    for image_set in () if datasets is None else datasets.train_sets:
        if image_set.is_regularisation_data and datasets is not None and datasets.is_masked(image_set):
            yield (
                f"{image_set.id}: its masks have no effect: with is_regularisation_data the base model's prediction is "
                "held everywhere."
            )
    offset = [each.id for each in datasets.train_sets if each.timestep_sampling_offset] if datasets is not None else []
    if offset and has_other_density(config):
        yield f"{join_names(offset, 'and')}: {no_effect(['timestep_sampling_offset'], 'another density is chosen')}"
    for route in config.tread_routes:
        if route.selection_ratio != 0.5:
            yield (
                f"selection_ratio = {route.selection_ratio:g} is the share of image tokens that is kept. Where others "
                f"mean the share that is left out, this is {1 - route.selection_ratio:g}."
            )
    if flavour.guidance_kind == "classifier-free" and config.caption_dropout_probability == 0:
        yield (
            f"caption_dropout_probability = 0: {flavour.name} draws away from the empty prompt, which this run then "
            "never trains. Images may come out worse than what was learned: give --caption_dropout_probability=0.1."
        )
    if (
        config.model_type == "full"
        and "learning_rate" not in given
        and not known_optimizer(config.optimizer).estimates_rate
    ):
        yield (
            f"learning_rate is {config.learning_rate:g}, which suits a LoRA: a whole model is mostly trained at "
            "1e-6 to 5e-5."
        )
    if config.rate_scale != 1:
        yield (
            f"learning_rate {config.learning_rate:g} × {config.rate_scale:.4g} by the effective batch of "
            f"{config.effective_batch}: {config.learning_rate * config.rate_scale:.4g}."
        )
    train_sets = () if datasets is None else datasets.train_sets
    named = [each.id for each in train_sets if each.class_prompt is not None]
    if named and not (config.preserves and config.preservation == "class"):
        yield f"class_prompt in {join_names(named, 'and')} has no effect: preservation class is off."
    yield from _odd_rates(config)
    if config.optimizer == "adamw_schedulefree" and not config.lr_scheduler.startswith("constant"):
        yield (
            f"lr_scheduler = {config.lr_scheduler}: adamw_schedulefree averages in place of a falling rate, and is "
            "meant for constant_with_warmup."
        )
    if config.max_train_steps is not None and config.lr_warmup_steps >= config.max_train_steps:
        yield (
            f"lr_warmup_steps = {config.lr_warmup_steps} is the whole run of {config.max_train_steps} steps: "
            "the learning rate never arrives."
        )


def validation_image_notices(config: RunConfig, prompts: Collection[str]) -> Iterator[str]:
    """What to say of the validation images that will be made of `prompts`."""
    flavour = FLAVOURS[config.model_flavour]
    if config.validation_preview_model is not None and not config.validation_disable and prompts:
        steps = f"{config.validation_num_inference_steps} steps"
        drawing = drawing_flavour(config)
        scale = f"guidance {config.validation_guidance:g}"
        yield (
            f"Validation images are drawn on validation_preview_model = {config.validation_preview_model} with the "
            f"LoRA: {steps}, {'no guidance' if drawing.guidance_kind == 'none' else scale}. The held-out loss stays "
            f"that of {flavour.name}."
        )
    side = flavour.only_side
    if side is None or config.pretrained_model_name_or_path is not None or config.validation_disable or not prompts:
        return
    far = [size for size in config.sizes if not all(2 / 3 <= edge / side <= 3 / 2 for edge in size)]
    if far:
        size = f"{side}x{side}"
        yield (
            f"validation_resolution = {config.validation_resolution}: {flavour.title} was trained at {size}, and at "
            f"other sizes it draws flat areas. Give --validation_resolution={size}, and resolution {side} in the "
            "image sets."
        )


def _odd_rates(config: RunConfig) -> Iterator[str]:
    """A learning rate at which hardly anything is learned, or training diverges."""
    name, own = config.optimizer, known_optimizer(config.optimizer)
    if own.estimates_rate and config.learning_rate < PRODIGY_RATE:
        yield (
            f"learning_rate = {config.learning_rate:g} multiplies the rate that {name} finds: 1 is usual, and with "
            "this it learns next to nothing. Give --learning_rate=1."
        )
    limit = own.diverges_from
    if limit is None:
        return
    what = "a LoRA"
    if config.model_type == "full":
        what, limit = "a whole model", limit * SHARE_OF_WHOLE_MODEL
    rate = config.learning_rate * config.rate_scale
    if rate >= limit:
        scaled = "" if config.rate_scale == 1 else f", {rate:.4g} scaled by the effective batch"
        usual = limit * USUAL_SHARE / config.rate_scale
        yield (
            f"learning_rate = {config.learning_rate:g}{scaled}: training {what} with {name} usually diverges from "
            f"{limit:g} on. Begin with --learning_rate={float(f'{usual:.2g}'):g}."
        )


def has_other_density(config: RunConfig) -> bool:
    """Whether sigma is drawn otherwise than by a sigmoid of a normal draw."""
    is_listed = config.flow_custom_timesteps is not None
    return config.flow_use_uniform_schedule or config.flow_use_beta_schedule or is_listed


def _ignored(config: RunConfig, datasets: Datasets | None) -> Iterator[tuple[tuple[str, ...], bool, str]]:
    """(options, whether they have no effect, the reason)."""
    flavour = FLAVOURS[config.model_flavour]
    if flavour.guidance_kind == "embedded":
        is_constant = config.flux_guidance_mode == "constant"
        yield ("flux_guidance_min", "flux_guidance_max"), is_constant, "flux_guidance_mode is constant"
        yield ("flux_guidance_value",), not is_constant, "flux_guidance_mode is random-range"
    else:
        yield tuple(GuidanceOptions.model_fields), True, f"{flavour.name} takes no guidance as an input"
    is_qwen = flavour.text.kind == "qwen3"
    yield ("tokenizer_fix_regex",), is_qwen, f"it mends Mistral's tokenizer, and {flavour.name} has Qwen's"

    beta = ("flow_beta_schedule_alpha", "flow_beta_schedule_beta")
    yield beta, not config.flow_use_beta_schedule, "flow_use_beta_schedule is false"
    is_listed = config.flow_custom_timesteps is not None
    yield ("flow_sigmoid_scale",), has_other_density(config), "another density is chosen"
    yield ("flow_schedule_shift", "flow_schedule_auto_shift"), is_listed, "flow_custom_timesteps is given, and wins"
    is_auto = config.flow_schedule_auto_shift and not is_listed
    yield ("flow_schedule_shift",), is_auto, "flow_schedule_auto_shift is true"
    yield ("huber_c", "huber_schedule"), config.loss_type == "l2", "loss_type is l2"

    yield from _ignored_of_rollout(config)
    is_class = config.preservation == "class"
    yield ("preservation_weight",), config.preservation == "none", "preservation is none"
    reason = f"preservation is {config.preservation}"
    yield ("preservation_trigger", "preservation_class"), not is_class, reason

    shape = config.lr_scheduler
    yield ("lr_warmup_steps",), shape == "constant", "lr_scheduler is constant; constant_with_warmup warms up"
    has_cycles = shape in ("cosine_with_restarts", "sine")
    yield ("lr_num_cycles",), not has_cycles, f"lr_scheduler is {shape}"
    yield ("lr_power",), shape != "polynomial", f"lr_scheduler is {shape}"
    yield ("lr_end",), shape.startswith("constant"), f"lr_scheduler is {shape}"
    own = known_optimizer(config.optimizer)
    where = "takes its own in optimizer_config" if own.arguments is None else "has no use for it"
    yield tuple(key for key in ADAM if key not in own.reads), True, f"{config.optimizer} {where}"
    yield ("lr_scale",), config.lr_scale and config.lr_scale_sqrt, "lr_scale_sqrt is true, and wins"
    averages = ("ema_decay", "ema_device", "ema_update_interval", "ema_validation")
    yield averages, not config.use_ema, "use_ema is false"
    has_both = config.max_train_steps is not None and config.num_train_epochs > 0
    yield ("num_train_epochs",), has_both, "max_train_steps is given, and wins"
    yield ("grad_clip_method",), not config.max_grad_norm, "max_grad_norm is 0"
    interval = ("gradient_checkpointing_interval",)
    yield interval, not config.gradient_checkpointing, "gradient_checkpointing is false"

    is_plain = config.base_model_precision == NO_CHANGE
    yield ("base_model_cache_dir",), is_plain, "base_model_precision is no_change"
    has_no_place = config.quantize_via == "cpu" and set(_precisions(config).values()) == {NO_CHANGE}
    yield ("quantize_via",), has_no_place, "nothing is quantized"

    yield ("dynamo_mode",), config.dynamo_backend == "no", "dynamo_backend is no"
    yield from _ignored_of_offload(config)

    is_alone = config.num_processes in (None, 1)
    shards = ("fsdp_reshard_after_forward", "fsdp_cpu_offload")
    yield shards, not config.fsdp_enable, "fsdp_enable is false"
    yield ("fsdp_enable", *shards), config.fsdp_enable and config.num_processes == 1, "num_processes is 1"
    yield ("deepspeed_config",), config.num_processes == 1, "num_processes is 1"
    yield ("distributed_timeout_s",), is_alone and not config.may_shard and not config.zero_stage, "one process trains"

    place = config.pretrained_model_name_or_path
    is_local = FLAVOURS[config.model_flavour].repo is None if place is None else Path(place).exists()
    yield ("revision", "variant"), is_local, "the model does not come from the Hub"
    if config.model_type == "full":
        yield tuple(LoraOptions.model_fields), True, "model_type is full, and trains no adapter"
    else:
        yield ("model_save_dtype",), True, "model_type is lora; lora_save_dtype is its own"
        has_targets = config.peft_lora_target_modules is not None
        yield ("flux_lora_target",), has_targets, "peft_lora_target_modules is given, and wins"
        starts_from_file = config.init_lora is not None
        from_file = ("lora_rank", "lora_alpha", "lora_init_type")
        yield from_file, starts_from_file, "init_lora is given, and its file decides"

    pictures = (
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
    yield pictures, config.validation_disable, "validation_disable is true"
    keys, reason = guidance_without_effect(
        drawing_flavour(config),
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
        yield (first, "masked_loss_prior"), True, "no dataset that is trained has masks"
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
    yield ("group_offload_use_stream",), not is_used, "nothing is offloaded that it could copy"
    is_streamed = config.text_encoder_mode == "streamed"
    yield ("group_offload_text_encoder",), is_streamed, "text_encoder_mode is streamed already"
    recomputes = config.gradient_checkpointing
    yield ("activation_offload",), not recomputes, "gradient_checkpointing is false: no block is recomputed"
    reason = "no pictures are drawn, and what prepares the data is always let go before the next phase"
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
