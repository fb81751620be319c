"""What a config of DeepSpeed may say here: DeepSpeed gets its `zero_optimization`; this program's options decide the
rest, and the config may repeat them or leave them to the trainer ("auto").
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simpletuner.base.commandline import command_text, flag
from simpletuner.base.errors import Problem
from simpletuner.config.given import Checked, Given, Known, check_givens, unaliased
from simpletuner.config.optimisers import optimiser
from simpletuner.config.options.ranks import ZERO_STAGES
from simpletuner.config.options.zero import OFFLOADS, DeepSpeedDocument, ZeroOffload, ZeroSettings, without_auto
from simpletuner.config.other_keys import DEEPSPEED_KEYS, OFFLOAD_KEYS, ZERO_KEYS
from simpletuner.config.run import RunConfig
from simpletuner.config.values import join_names, no_effect, shown

OPTION = "deepspeed_config"
LEAST_VERSION = (0, 19, 8)
"""The one that was tried. Older ones ignore `managed_gradient_accumulation` in silence, and would step too often."""
INSTALL_DEEPSPEED = "pip install -e '.[deepspeed]'"

_DOCUMENT = Known(DeepSpeedDocument, DEEPSPEED_KEYS, noun="key of DeepSpeed")
_ZERO = Known(ZeroSettings, ZERO_KEYS, noun="key of DeepSpeed's zero_optimization")
_OFFLOAD = Known(ZeroOffload, OFFLOAD_KEYS, noun="key of DeepSpeed's offload")

_OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "lion": "lion", "muon": "muon"}
"""DeepSpeed's, in small letters. Its Adam decouples the weight decay by default, as AdamW does."""
_SCHEDULERS = {"warmuplr": "constant_with_warmup", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}
"""In small letters too. Their warm-up is the one of this program, linear."""
_ASKS_FOR_NOTHING: Mapping[str, tuple[object, ...]] = {
    "optimizer.params.adam_w_mode": (True,),
    "optimizer.params.bias_correction": (True,),
    "optimizer.params.torch_adam": (True, False),
    "scheduler.params.warmup_min_lr": (0,),
    "scheduler.params.warmup_min_ratio": (0,),
    "scheduler.params.warmup_type": ("linear",),
    "scheduler.params.last_batch_iteration": (-1,),
}
"""Values that change nothing, of keys that no option of this program decides."""
_OF_STAGE_3 = tuple(name for name in ZeroSettings.model_fields if name.startswith("stage3_"))
_IDLE = {
    1: ("overlap_comm", *_OF_STAGE_3),
    2: _OF_STAGE_3,
    3: ("allgather_partitions", "allgather_bucket_size", "use_multi_rank_bucket_allreduce"),
}
"""Settings that do nothing, by the stage."""

DeepSpeedFinding = tuple[tuple[str, ...], Problem]
"""The options that a problem is about, and the problem."""


@dataclass
class _Document:
    """A config of DeepSpeed as far as it is right."""

    known: dict[str, Any] = field(default_factory=dict)
    """The valid keys of a `DeepSpeedDocument`."""
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def read(self, values: Mapping[str, Any], known: Known, where: str) -> dict[str, Any]:
        """Those of `values` that `known` takes; what is said of the others is added."""
        checked = Checked()
        givens = unaliased(((key, Given(value, "file", key)) for key, value in values.items()), known, checked)
        check_givens(givens, known, checked, where=f"{where}: ")
        self.problems += checked.problems.values()
        self.notices += checked.notices
        return checked.valid


def _read(config: RunConfig) -> _Document:
    document = without_auto(config.deepspeed_config or {})
    found = _Document()
    if "zero_stage" in document or "deepspeed_config_file" in document:
        found.problems.append(_of_accelerate(document))
        return found
    asked = {key: value for key, value in document.items() if not _is_disabled(key, value)}
    found.known = found.read(asked, _DOCUMENT, OPTION)
    where = f"{OPTION}: zero_optimization"
    zero = found.read(found.known.get("zero_optimization", {}), _ZERO, where)
    stage = zero.get("stage", 0)
    for name in OFFLOADS:
        found.read(zero.get(name, {}), _OFFLOAD, f"{where}.{name}")
    idle = [name for name in _IDLE.get(stage, ()) if name in zero]
    if idle:
        found.notices.append(f"{where}: {no_effect(idle, f'its stage is {stage}')}")
    return found


def _is_disabled(key: str, value: object) -> bool:
    """Whether a part of the document is turned off. What it says of precision must agree either way."""
    return isinstance(value, dict) and value.get("enabled") is False and key not in ("bf16", "bfloat16", "fp16")


def _of_accelerate(document: Mapping[str, Any]) -> Problem:
    """The problem that these are the settings of accelerate's plugin, with what they mean here."""
    value: object = document.get("deepspeed_config_file")
    if value is None:
        zero: dict[str, Any] = {"stage": document["zero_stage"]}
        devices = {name: document.get(f"{name}_device", "none") for name in OFFLOADS}
        zero |= {name: {"device": device} for name, device in devices.items() if device != "none"}
        name = f"zero{zero['stage']}"
        value = name if name in ZERO_STAGES and len(zero) == 1 else {"zero_optimization": zero}
    found, expected = f"{OPTION} has settings of accelerate", "DeepSpeed's own, or zero1, zero2 or zero3"
    return Problem(found, expected, f"Give {command_text(flag(OPTION, value))}.")


def deepspeed_findings(config: RunConfig) -> Iterator[DeepSpeedFinding]:
    """What is wrong with `deepspeed_config`, in itself and beside other options."""
    document = _read(config)
    for problem in document.problems:
        yield (OPTION,), problem
    yield from _contradictions(config, document.known)
    moved = [name for name in OFFLOADS if config.num_processes == 1 and config.offloads(name)]
    if moved:
        found = f"{OPTION}: {join_names(moved, 'and')} with one process, which holds no share"
        remedy = f"Take {OPTION} out; `simpletuner plan` names what fits into one GPU."
        yield (OPTION, "num_processes"), Problem(found, "at least 2 processes", remedy)
    lack = deepspeed_lack() if config.zero_stage else None
    if lack is not None:
        yield (OPTION,), replace(lack, found=f"{OPTION}: {lack.found}")


def deepspeed_notices(config: RunConfig) -> Iterator[str]:
    """What `deepspeed_config` has that does nothing."""
    yield from _read(config).notices
    if config.deepspeed_config is not None and not config.zero_optimization:
        yield no_effect([OPTION], "its zero_optimization has no stage above 0")


def deepspeed_lack() -> Problem | None:
    """What is missing for DeepSpeed; None where nothing is. Nothing is imported. DeepSpeed needs no compiler, since
    nothing that it would compile is used.
    """
    from importlib.metadata import PackageNotFoundError, version  # not on every start

    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return Problem("deepspeed is not installed", remedy=INSTALL_DEEPSPEED)
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) < LEAST_VERSION:
        least = ".".join(map(str, LEAST_VERSION))
        return Problem(f"deepspeed {installed} is installed", f"{least} or newer", INSTALL_DEEPSPEED)
    return None


def _contradictions(config: RunConfig, document: Mapping[str, Any]) -> Iterator[DeepSpeedFinding]:
    """What the document says otherwise than the options that decide it."""
    total = document.get("train_batch_size")
    if config.num_processes is not None and total not in (None, config.effective_batch):
        product = "train_batch_size × gradient_accumulation_steps × num_processes"
        found = f"{OPTION}: train_batch_size = {total}, and here {product} is {config.effective_batch}"
        yield (OPTION, "num_processes"), Problem(found, remedy=f"Take train_batch_size out of {OPTION}.")
    decided = _decided(config)
    others = {name: each for name, each in document.items() if name not in ("zero_optimization", "train_batch_size")}
    for key, value in _leaves(others):
        if value in _ASKS_FOR_NOTHING.get(key, ()) or (key.startswith("fp16.") and key != "fp16.enabled"):
            continue
        found, own = f"{OPTION}: {key} = {shown(value)}", decided.get(key)
        if own is None:
            yield (OPTION,), Problem(f"{found}: this is decided by options of this program", remedy="Take it out.")
        elif not own.agrees(value):
            asked = own.asked(value)
            remedy = "Take it out" + (f", or give {command_text(*asked)}" if asked else "")
            yield (OPTION, *own.options), Problem(f"{found}, and {own.told}", remedy=f"{remedy}.")


@dataclass(frozen=True)
class _Decided:
    """A key of DeepSpeed's that options of this program decide."""

    options: tuple[str, ...]
    values: tuple[object, ...]
    """Of these options."""
    meanings: Mapping[Any, object] | None = None
    """The option's value for each of the key's; None where they are the same."""

    def _meant(self, value: object) -> tuple[object, ...]:
        """The values of the options that the key's `value` asks for; empty where there are none."""
        if self.meanings is None:
            return tuple(value) if isinstance(value, list) and len(value) == len(self.options) else (value,)
        name = value.lower() if isinstance(value, str) else value
        return (self.meanings[name],) if isinstance(name, str | bool) and name in self.meanings else ()

    def agrees(self, value: object) -> bool:
        return self._meant(value) == self.values

    def asked(self, value: object) -> list[str]:
        """The flags that would make it agree."""
        meant = self._meant(value)
        if len(meant) != len(self.options):
            return []
        return [flag(option, each) for option, each in zip(self.options, meant, strict=True)]

    @property
    def told(self) -> str:
        pairs = zip(self.options, self.values, strict=True)
        return join_names([f"{option} is {shown(value)}" for option, value in pairs], "and")


def _decided(config: RunConfig) -> dict[str, _Decided]:
    def same(option: str) -> _Decided:
        return _Decided((option,), (vars(config)[option],))

    betas = optimiser(config.optimizer).betas
    precision = {True: "bf16", False: "no"}
    return {
        "train_micro_batch_size_per_gpu": same("train_batch_size"),
        "gradient_accumulation_steps": same("gradient_accumulation_steps"),
        "gradient_clipping": same("max_grad_norm"),
        "bf16.enabled": _Decided(("mixed_precision",), (config.mixed_precision,), precision),
        "fp16.enabled": _Decided(("mixed_precision",), (config.mixed_precision,), {False: config.mixed_precision}),
        "optimizer.type": _Decided(("optimizer",), (config.optimizer,), _OPTIMIZERS),
        "optimizer.params.lr": same("learning_rate"),
        "optimizer.params.betas": _Decided(
            ("optimizer_beta1", "optimizer_beta2"),
            (
                betas[0] if config.optimizer_beta1 is None else config.optimizer_beta1,
                betas[1] if config.optimizer_beta2 is None else config.optimizer_beta2,
            ),
        ),
        "optimizer.params.eps": same("adam_epsilon"),
        "optimizer.params.weight_decay": same("adam_weight_decay"),
        "scheduler.type": _Decided(("lr_scheduler",), (config.lr_scheduler,), _SCHEDULERS),
        "scheduler.params.warmup_max_lr": same("learning_rate"),
        "scheduler.params.warmup_num_steps": same("lr_warmup_steps"),
        "scheduler.params.total_num_steps": same("max_train_steps"),
    }


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of `values` that is no object, under its keys with dots between."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
