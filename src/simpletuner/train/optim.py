"""Optimizers and learning-rate schedules."""

import contextlib
import importlib
import inspect
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from simpletuner.base.errors import ConfigError
from simpletuner.config.optimizers import LIBRARIES, OURS, KnownOptimizer, known_optimizer
from simpletuner.config.options.optim import OptimOptions
from simpletuner.config.values import similar
from simpletuner.memory.masters import SteppedParameters
from simpletuner.memory.world import World
from simpletuner.train import optimizer_state
from simpletuner.train.adafactor_bf16 import AdafactorBf16
from simpletuner.train.adamw_bf16 import AdamWBf16
from simpletuner.train.muon import MuonAndAdamW

ScheduleShape = Callable[[float, OptimOptions], float]
"""(progress, options) → factor of the learning rate. Progress 0 is the end of the warm-up, 1 the end of the run."""

SCHEDULES: dict[str, ScheduleShape] = {
    "constant": lambda progress, options: 1.0,
    "constant_with_warmup": lambda progress, options: 1.0,
    "linear": lambda progress, options: 1 - progress,
    "cosine": lambda progress, options: (1 + math.cos(math.pi * progress)) / 2,
    "cosine_with_restarts": lambda progress, options: (
        (1 + math.cos(math.pi * (progress * options.lr_num_cycles % 1))) / 2
    ),
    "sine": lambda progress, options: math.sin(math.pi * (progress * options.lr_num_cycles % 1)),
    "polynomial": lambda progress, options: (1 - progress) ** options.lr_power,
}
FLAT = ("constant", "constant_with_warmup")

RATIO = "lr_ratio"
"""Key of a parameter group: the factor by which the step's learning rate is multiplied."""

HIDDEN = "use_muon"
"""Key of a parameter group of a whole model: whether it holds the hidden matrices, those inside the blocks. The Muon
optimizers of pytorch_optimizer read this key."""

PRESET: dict[str, dict[str, Any]] = {
    "adamw": {"fused": True},  # one kernel for all the small adapter tensors, on the CPU too
    "muon": {"adjust_lr_fn": "match_rms_adamw"},  # so that AdamW's learning rates suit it (arXiv 2502.16982)
}
"""Arguments that differ from the library's defaults; `optimizer_config` overrides them."""


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """The learning rate of `step` (from 1) of `steps`: warm-up, then the schedule over the remaining steps, down to
    `lr_end`.

    The first of n warm-up steps uses 1/n of the learning rate, the last all of it. `constant` has no warm-up.
    """
    peak, warmup = options.learning_rate * options.rate_scale, options.lr_warmup_steps
    if options.lr_scheduler != "constant" and step <= warmup:
        return peak * step / warmup
    if options.lr_scheduler in FLAT:
        return peak
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    factor = SCHEDULES[options.lr_scheduler](min(progress, 1.0), options)
    lowest = options.lr_end * options.rate_scale
    return lowest + (peak - lowest) * factor


@runtime_checkable
class Averaging(Protocol):
    """A schedule-free optimizer, which evaluates and saves averaged weights but takes gradients at others."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def lora_plus(named: Iterable[tuple[str, nn.Parameter]], ratio: float) -> list[dict[str, Any]]:
    """Parameter groups that give the B matrices, whose names end with ".b", `ratio` times the learning rate of the
    others (LoRA+, arXiv 2402.12354).
    """
    everything = list(named)
    if ratio == 1:
        return [{"params": [parameter for _, parameter in everything]}]
    fast = [parameter for name, parameter in everything if name.endswith(".b")]
    slow = [parameter for name, parameter in everything if not name.endswith(".b")]
    return [{"params": slow, RATIO: 1.0}, {"params": fast, RATIO: ratio}]


def by_role(inner: list[nn.Parameter], outer: list[nn.Parameter], scales: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of a whole model: the matrices inside its blocks, those outside, and its norm scales. Norm
    scales have no weight decay: their neutral value is one, not zero.
    """
    return [
        {"params": inner, RATIO: 1.0, HIDDEN: True},
        {"params": outer, RATIO: 1.0, HIDDEN: False},
        {"params": scales, RATIO: 1.0, HIDDEN: False, "weight_decay": 0.0},
    ]


def build(
    parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]],
    options: OptimOptions,
    *,
    seed: int = 0,
    first_elements: Mapping[torch.Tensor, int] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer that `options` names, for `parameters` or for parameter groups of `lora_plus` or `by_role`.

    An optimizer given as `library:name` is first rehearsed on a few tensors: some need more than gradients, and some do
    not resume exactly.

    Args:
        seed: seed of stochastic rounding.
        first_elements: for parameters that are one rank's rows of a sharded tensor, `RowShards.first_elements`.

    Raises:
        ConfigError: the library has no such optimizer, the optimizer does not take an argument in `optimizer_config`,
            or it cannot be used here.
    """
    spec = known_optimizer(options.optimizer)
    if options.optimizer_release_gradients and options.optimizer == "adafactor":
        optimizer_class: type[torch.optim.Optimizer] = AdafactorBf16
    else:
        optimizer_class = AdamWBf16 if spec.library == OURS else _library_class(spec)
    arguments = _arguments(options, spec, optimizer_class, seed)

    def construct(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        groups = [{HIDDEN: True, **group} for group in groups]
        with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints its weight decay
            optimizer = _construct(spec, optimizer_class, groups, arguments)
        for group in optimizer.param_groups:
            group.setdefault(RATIO, 1.0)
            group["lr"] = arguments["lr"] * group[RATIO]
        if isinstance(optimizer, Averaging):
            optimizer.train()
        if isinstance(optimizer, AdamWBf16) and first_elements is not None:
            optimizer.first_elements = first_elements
        return optimizer

    groups = [each for each in parameters if isinstance(each, dict)] or [{"params": list(parameters)}]
    if spec.arguments is None:
        _rehearse(options.optimizer, construct, groups)
    try:
        return construct(groups)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise _rejected(options, error) from None


def _construct(
    spec: KnownOptimizer,
    optimizer_class: type[torch.optim.Optimizer],
    groups: list[dict[str, Any]],
    arguments: dict[str, Any],
) -> torch.optim.Optimizer:
    """Construct the optimizer for `groups`, each of which has the key `HIDDEN`."""
    if spec.arguments is None and spec.library == "pytorch_optimizer":
        return optimizer_class(groups, **arguments)  # its Muons read `HIDDEN`; its other optimizers ignore it
    hidden, outer = (
        [
            {key: value for key, value in group.items() if key != HIDDEN}
            for group in groups
            if group[HIDDEN] is is_hidden
        ]
        for is_hidden in (True, False)
    )
    if optimizer_class is torch.optim.Muon and outer:
        shared = {key: arguments[key] for key in ("lr", "weight_decay")}
        return MuonAndAdamW(hidden, outer, muon=arguments, adamw=shared | PRESET["adamw"])
    return optimizer_class([*hidden, *outer], **arguments)


def _rejected(options: OptimOptions, error: Exception) -> ConfigError:
    return ConfigError.of(
        f"optimizer_config = {options.optimizer_config}: {options.optimizer} rejects it ({error})",
        "the optimizer's own arguments",
    )


def _library_class(spec: KnownOptimizer) -> type[torch.optim.Optimizer]:
    """Import the library and return the optimizer class, whose name is matched without regard to case."""
    # On some processors bitsandbytes warns that a kernel for quantized weights is missing, which no optimizer uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    module = importlib.import_module(LIBRARIES[spec.library])
    classes = {
        name.lower(): value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if spec.name.lower() not in classes:
        suggestion = similar(spec.name, classes) or ", ".join(sorted(classes)[:8])
        raise ConfigError.of(
            f"optimizer = {spec.library}:{spec.name}: {spec.library} has no such optimizer",
            remedy=f"It has {len(classes)} optimizers, such as {spec.library}:{suggestion}.",
        )
    return classes[spec.name.lower()]


def _arguments(
    options: OptimOptions, spec: KnownOptimizer, optimizer_class: type[torch.optim.Optimizer], seed: int
) -> dict[str, Any]:
    """The constructor's arguments: the options that the optimizer reads, overridden by `optimizer_config`."""
    configured = options.optimizer_config or {}
    parameters = inspect.signature(optimizer_class).parameters
    accepted = {name for name, value in parameters.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
    accepted -= {"params", "lr"}
    unknown = configured.keys() - accepted
    if unknown:  # many of pytorch_optimizer's accept any argument and ignore it
        raise _rejected(options, TypeError(f"no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(accepted))}"))
    arguments: dict[str, Any] = {"lr": options.learning_rate * options.rate_scale}
    if "optimizer_beta1" in spec.reads:
        first, second, *extra_betas = spec.betas
        chosen = options.optimizer_beta1, options.optimizer_beta2
        first, second = (beta if value is None else value for value, beta in zip(chosen, (first, second), strict=True))
        arguments["betas"] = (first, second, *extra_betas)
    if "adam_weight_decay" in spec.reads:
        arguments["weight_decay"] = options.adam_weight_decay
    if "adam_epsilon" in spec.reads:
        arguments["eps"] = options.adam_epsilon
    if optimizer_class in (AdamWBf16, AdafactorBf16):
        arguments["seed"] = seed
    return arguments | PRESET.get(options.optimizer, {}) | configured


REHEARSED_STEPS = 3
REHEARSED_SIDE = 320
"""Side of the largest, square tensor of a rehearsal: large enough for bitsandbytes to page its state (from 100,000
elements) and to quantize it (from 4096)."""

Construct = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _rehearse(
    name: str, construct: Construct, groups: Sequence[dict[str, Any]], *, side: int | None = REHEARSED_SIDE
) -> None:
    """Check on the device of `groups` that the optimizer resumes exactly: train, save, restore into a fresh optimizer
    and continue with both. Results must be bit-identical. If the device itself is not deterministic, repeat on the CPU.

    Args:
        side: side of a large square matrix to train with the small tensors; None for none.

    Raises:
        ConfigError: the results differ, or the optimizer needs more than gradients.
    """
    try:
        device = groups[0]["params"][0].device
        uninterrupted, resumed = _rehearsed(construct, groups, device, side)
        if device.type != "cpu" and not _are_equal(uninterrupted, resumed):
            repeated, _ = _rehearsed(construct, groups, device, side)
            if not _are_equal(uninterrupted, repeated):
                uninterrupted, resumed = _rehearsed(construct, groups, torch.device("cpu"), side)
    except Exception as error:  # noqa: BLE001  a library may raise anything; the optimizer is unusable then
        if side is not None and all(parameter.numel() < side**2 for group in groups for parameter in group["params"]):
            # The run has no tensor that large, and the optimizer may fail only there: its memory may be quadratic.
            _rehearse(name, construct, groups, side=None)
            return
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ConfigError.of(
            f"optimizer = {name}: it cannot be used here ({type(error).__name__}: {reason})",
            "an optimizer that needs only gradients, with arguments that it takes",
            "Check optimizer_config, or choose another optimizer.",
        ) from None
    if not _are_equal(uninterrupted, resumed):
        raise ConfigError.of(
            f"optimizer = {name}: after saving and restoring, it does not continue exactly",
            "an optimizer whose whole state can be saved",
            "A killed run could not be resumed exactly: choose another optimizer.",
        )


def _rehearsed(
    construct: Construct, groups: Sequence[dict[str, Any]], device: torch.device, side: int | None
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """A few tensors after twice `REHEARSED_STEPS` steps: trained without, and with, a restart halfway.

    The tensors are in groups like `groups`: two small matrices in a group of matrices, a vector in a group of vectors.
    The first group of matrices also has a square one of `side`.
    """
    start: dict[str, torch.Tensor] = {}
    members: list[list[str]] = []
    for index, group in enumerate(groups):
        tensors_of_group = {f"c{index}": torch.linspace(0.5, 1.5, 24)}
        if group["params"][0].ndim > 1:
            tensors_of_group = {
                f"a{index}": torch.linspace(-1, 1, 4 * 24).reshape(4, 24),
                f"b{index}": torch.zeros(24, 4),
            }
            if side is not None and "large" not in start:
                tensors_of_group["large"] = torch.linspace(-1, 1, side**2).reshape(side, side)
        start |= tensors_of_group
        members.append(list(tensors_of_group))

    def fresh(values: Mapping[str, torch.Tensor]) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        parameters = {key: nn.Parameter(value.detach().to(device, copy=True)) for key, value in values.items()}
        return parameters, construct(
            [
                {**group, "params": [parameters[key] for key in keys]}
                for group, keys in zip(groups, members, strict=True)
            ]
        )

    def train(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + REHEARSED_STEPS):
            for parameter in parameters.values():
                gradient = torch.sin(torch.arange(parameter.numel()) * float(step)).view_as(parameter)
                parameter.grad = gradient.to(device)
            optimizer.step()

    torch.manual_seed(0)
    uninterrupted, optimizer = fresh(start)
    train(uninterrupted, optimizer, 1)
    tensors, scalars = optimizer_state.pack(optimizer, uninterrupted)
    resumed, resumed_optimizer = fresh(uninterrupted)
    optimizer_state.unpack(resumed_optimizer, resumed, {key: value.clone() for key, value in tensors.items()}, scalars)
    torch.manual_seed(0)
    train(uninterrupted, optimizer, 1 + REHEARSED_STEPS)
    torch.manual_seed(0)
    train(resumed, resumed_optimizer, 1 + REHEARSED_STEPS)
    return uninterrupted, resumed


def _are_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


@contextlib.contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer, masters: SteppedParameters | None = None) -> Iterator[None]:
    """Switch a schedule-free optimizer to its averaged weights for evaluation or saving; restore the training weights
    on exit, bit for bit. For other optimizers nothing happens.

    Schedule-free optimizers take gradients at y and evaluate the average x. Their own conversion from x back to y
    rounds, so each evaluation would change the training weights; hence y is copied and restored. If the optimizer steps
    `masters`, the model's weights are updated too.
    """
    if not isinstance(optimizer, Averaging):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    training_values = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    if masters is not None:
        masters.update_weights()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, training_values, strict=True):
                parameter.copy_(value)
        if masters is not None:
            masters.update_weights()


def clip(parameters: Sequence[torch.Tensor], options: OptimOptions, world: World | None = None) -> torch.Tensor:
    """Clip the gradients per `max_grad_norm` and `grad_clip_method`. Returns their norm before clipping, a scalar.

    Args:
        world: if not None, `parameters` are this rank's rows of sharded tensors, and the norm is over all ranks.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if world is not None:
        square = norm.double().square()
        world.sum_([square])
        norm = square.sqrt().to(norm.dtype)
    if options.max_grad_norm > 0:
        if options.grad_clip_method == "norm":
            torch.nn.utils.clip_grads_with_norm_(parameters, options.max_grad_norm, norm)
        else:
            torch.nn.utils.clip_grad_value_(parameters, options.max_grad_norm)
    return norm
