"""Check `deepspeed_config`. Only its `zero_optimization` is passed on to DeepSpeed. This program's options determine
all other keys; `deepspeed_config` may only repeat those values or say "auto".
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le, MultipleOf
from pydantic import BeforeValidator, create_model

from simpletuner.base.commandline import command_text, flag
from simpletuner.base.errors import Problem
from simpletuner.config.given import CheckedKeys, GivenValue, KnownKeys, check_givens, refused
from simpletuner.config.optimizers import known_optimizer
from simpletuner.config.options.kinds import Expects, Slice
from simpletuner.config.other_keys import DEEPSPEED_KEYS
from simpletuner.config.values import no_effect, value_text

if TYPE_CHECKING:
    from simpletuner.config.run import RunConfig

OPTION = "deepspeed_config"
MIN_VERSION = (0, 19, 8)
"""The tested version. Older ones silently ignore `managed_gradient_accumulation` and would step too often."""

_WholeFloat = BeforeValidator(lambda n: int(n) if isinstance(n, float) and n.is_integer() else n)
"""Converts floats such as 5e8 to integers."""
ElementCount = Annotated[int, Ge(0), _WholeFloat]
"""A buffer's size in elements (not bytes)."""


class ZeroOffload(Slice):
    """Where a shard is kept: `device` `cpu` is host memory."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


_Offload = Annotated[ZeroOffload, Expects('an object of "device", none or cpu, and "pin_memory", true or false')]


class ZeroSettings(Slice, extra="ignore"):
    """`zero_optimization` with the defaults of `DeepSpeedZeroConfig`, deepspeed/runtime/zero/config.py."""

    stage: Annotated[int, Ge(0), Le(3)] = 0
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[int, Ge(1), _WholeFloat] = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Annotated[ElementCount, MultipleOf(2), Expects("an even whole number")] = 500_000_000
    stage3_prefetch_bucket_size: ElementCount = 50_000_000
    stage3_param_persistence_threshold: ElementCount = 100_000
    stage3_model_persistence_threshold: ElementCount | None = None
    stage3_max_live_parameters: ElementCount = 1_000_000_000
    stage3_max_reuse_distance: ElementCount = 1_000_000_000
    stage3_module_granularity_threshold: ElementCount = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False


_BATCH = "train_batch_size × gradient_accumulation_steps × num_processes"
_OPTION_OF_KEY = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "mixed_precision",
    "optimizer.type": "optimizer",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.betas.0": "optimizer_beta1",
    "optimizer.params.betas.1": "optimizer_beta2",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "adam_weight_decay",
    "scheduler.type": "lr_scheduler",
}
"""The option of this program that determines each key of DeepSpeed's config."""
_OUR_NAMES = {
    "adam": "adamw",
    "warmuplr": "constant_with_warmup",
    "warmupdecaylr": "linear",
    "warmupcosinelr": "cosine",
}
"""This program's names for DeepSpeed's optimizers and schedules, where they differ. DeepSpeed's Adam decouples the
weight decay too."""

_INCOMPATIBLE = (
    ("fsdp_enable", True, False, "which shards in another way"),
    ("mixed_precision", "fp16", "bf16", "which does not scale the loss here"),
    ("base_model_default_dtype", "fp16", "bf16", "which does not scale the loss here"),
    ("dynamo_backend", "inductor", "no", "which gathers weights inside the blocks at stage 3"),
)
"""Options with a value that is incompatible with DeepSpeed, the value to give instead, and the reason."""

_FIELDS: Any = {key.partition(".")[0]: (Any, None) for key in ("zero_optimization", "fp16", *_OPTION_OF_KEY)}
_DOCUMENT = create_model("_DOCUMENT", __base__=Slice, **_FIELDS)


def _checks(config: "RunConfig") -> Iterator[CheckedKeys]:
    """Yield the checked keys of the document, then those of its `zero_optimization`."""
    document = config.deepspeed_config or {}
    zero = document.get("zero_optimization")
    levels = (document, _DOCUMENT, OPTION), (zero, ZeroSettings, f"{OPTION}: zero_optimization")
    for values, model, prefix in levels:
        givens = (
            {key: GivenValue(value, "file", key) for key, value in values.items()} if isinstance(values, dict) else {}
        )
        known = KnownKeys(model, DEEPSPEED_KEYS, "DeepSpeed setting here")
        yield check_givens(givens, known, CheckedKeys(), prefix=f"{prefix}: ")


def deepspeed_notices(config: "RunConfig") -> Iterator[str]:
    """Notices about settings in `deepspeed_config` that have no effect."""
    for checked in _checks(config):
        yield from checked.notices
    if config.deepspeed_config is not None and not config.zero_optimization:
        yield no_effect([OPTION], "its zero_optimization has no stage above 0")


def deepspeed_findings(config: "RunConfig") -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Problems with `deepspeed_config` and with its combination with other options, each with these options."""
    for checked in _checks(config):
        yield from (((OPTION,), problem) for problem in checked.problems.values())
    yield from _contradictions(config)
    stage = config.zero_stage
    unusable = deepspeed_problem() if stage else None
    if unusable is not None:
        yield (OPTION,), replace(unusable, found=f"{OPTION}: {unusable.found}")
    for name, value, instead, reason in _INCOMPATIBLE:
        if vars(config)[name] == value and stage >= (3 if name == "dynamo_backend" else 1):
            message = f"{name} = {value_text(value)} with {OPTION}, {reason}"
            yield (name, OPTION), Problem(message, remedy=f"Give {flag(name, instead)}, or remove {OPTION}.")
    fetches = "stage3_use_all_reduce_for_fetch_params"
    if stage == 3 and config.model_type != "full" and config.zero_optimization.get(fetches):
        message = f"{OPTION}: {fetches} with a LoRA, whose dtype differs from the base's"
        yield (OPTION,), Problem(message, remedy="Remove it.")
    if config.offloads("offload_param") and 0 < stage < 3:
        message = f"{OPTION}: offload_param at stage {stage}, which does not shard the weights"
        yield (OPTION,), Problem(message, "stage 3", f"Remove offload_param from {OPTION}, or change its stage.")


def _contradictions(config: "RunConfig") -> Iterator[tuple[tuple[str, ...], Problem]]:
    """Values in the document that contradict the options that determine them."""
    option_values = {**vars(config), _BATCH: config.effective_batch}
    for name, beta in zip(
        ("optimizer_beta1", "optimizer_beta2"), known_optimizer(config.optimizer).betas, strict=False
    ):
        option_values[name] = beta if option_values[name] is None else option_values[name]
    for key, value in _leaves(config.deepspeed_config):
        option, requested = _OPTION_OF_KEY.get(key, ""), value
        if isinstance(value, str):
            requested = _OUR_NAMES.get(value.lower(), value.lower())
        elif option == "mixed_precision":
            requested = "bf16" if value else "no"
        is_off = key.startswith("fp16.") and value is not True
        if requested == option_values.get(option) or is_off or (option == _BATCH and config.num_processes is None):
            continue
        contradiction = (
            f", and {option} is {value_text(option_values[option])}" if option else ": this is not supported"
        )
        options = (OPTION, option) if option in vars(config) else (OPTION,)
        remedy = "Remove it"
        if option in vars(config) and option not in refused(type(config), {option: requested}):
            remedy += f", or give {command_text(flag(option, requested))}"
        yield options, Problem(f"{OPTION}: {key} = {value_text(value)}{contradiction}", remedy=f"{remedy}.")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (keys joined by dots, value) for each number or text in `value` that an option of this program
    determines."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    elif key.partition(".")[0] in _DOCUMENT.model_fields and not key.startswith("zero_optimization."):
        yield key, value


def deepspeed_problem() -> Problem | None:
    """The problem that DeepSpeed is missing or too old; None if it is usable. Does not import DeepSpeed."""
    from importlib.metadata import PackageNotFoundError, version  # not on every start

    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        installed = ""
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) >= MIN_VERSION:
        return None
    message = f"deepspeed {installed} is installed" if installed else "deepspeed is not installed"
    return Problem(message, f"{'.'.join(map(str, MIN_VERSION))} or newer", "pip install -e '.[deepspeed]'")
