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
"""Share of the learning rate at a progress in [0, 1): 0 is the end of the warm-up, 1 the end of the run."""

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
"""Key of a parameter group: what it multiplies the step's learning rate by."""

HIDDEN = "use_muon"
"""Key of a parameter group of a whole model: whether its matrices lie inside the blocks. The name is that of
pytorch_optimizer's Muons, which look for it."""

PRESET: dict[str, dict[str, Any]] = {
    "adamw": {"fused": True},  # one kernel for all the small adapter tensors, on the CPU too
    "muon": {"adjust_lr_fn": "match_rms_adamw"},  # so that rates which suit adamw suit it (arXiv 2502.16982)
}
"""Arguments that are ours and not the library's own; `optimizer_config` wins over them."""


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """The rate of `step` (from 1) of `steps`: warm-up first, then the shape over what is left, down to `lr_end`.

    The first of n warm-up steps uses 1/n of the rate and the last all of it. `constant` has no warm-up.
    """
    rate, warmup = options.learning_rate * options.rate_scale, options.lr_warmup_steps
    if options.lr_scheduler != "constant" and step <= warmup:
        return rate * step / warmup
    if options.lr_scheduler in FLAT:
        return rate
    progress = (step - 1 - warmup) / max(1, steps - warmup)
    share = SCHEDULES[options.lr_scheduler](min(progress, 1.0), options)
    end = options.lr_end * options.rate_scale
    return end + (rate - end) * share


@runtime_checkable
class Averaging(Protocol):
    """An optimizer that trains other weights than it gives: schedule-free ones."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def lora_plus(named: Iterable[tuple[str, nn.Parameter]], ratio: float) -> list[dict[str, Any]]:
    """Parameter groups in which each "….b" learns `ratio` times as fast as the others (LoRA+, arXiv 2402.12354)."""
    everything = list(named)
    if ratio == 1:
        return [{"params": [parameter for _, parameter in everything]}]
    fast = [parameter for name, parameter in everything if name.endswith(".b")]
    slow = [parameter for name, parameter in everything if not name.endswith(".b")]
    return [{"params": slow, RATIO: 1.0}, {"params": fast, RATIO: ratio}]


def by_role(inner: list[nn.Parameter], outer: list[nn.Parameter], scales: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameter groups of a whole model: the matrices of its blocks, those around them, and its norms' scales. The last
    are not decayed: at rest they are near one, not near zero.
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
    """The optimizer that `options` names, over `parameters` or groups of them as `lora_plus` or `by_role` makes them.

    One of `library:name` is first rehearsed on a few tensors, for not every optimizer can be driven by gradients alone
    or goes on exactly where it was saved.

    Args:
        seed: of the draws of stochastic rounding.
        first_elements: where parameters are one rank's rows of sharded ones, as `RowShards` has them.

    Raises:
        ConfigError: the library does not have that name, `optimizer_config` has an argument that it does not take, or
            it cannot be used here.
    """
    known = known_optimizer(options.optimizer)
    if options.optimizer_release_gradients and options.optimizer == "adafactor":
        make: type[torch.optim.Optimizer] = AdafactorBf16
    else:
        make = AdamWBf16 if known.library == OURS else _found(known)
    arguments = _arguments(options, known, make, seed)

    def construct(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        groups = [{HIDDEN: True, **group} for group in groups]
        with contextlib.redirect_stdout(io.StringIO()):  # prodigy announces its weight decay
            made = _made(known, make, groups, arguments)
        for group in made.param_groups:
            group.setdefault(RATIO, 1.0)
            group["lr"] = arguments["lr"] * group[RATIO]
        if isinstance(made, Averaging):
            made.train()
        if isinstance(made, AdamWBf16) and first_elements is not None:
            made.first_elements = first_elements
        return made

    groups = [each for each in parameters if isinstance(each, dict)] or [{"params": list(parameters)}]
    if known.arguments is None:
        _rehearse(options.optimizer, construct, groups)
    try:
        return construct(groups)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise _refused(options, error) from None


def _made(
    known: KnownOptimizer, make: type[torch.optim.Optimizer], groups: list[dict[str, Any]], arguments: dict[str, Any]
) -> torch.optim.Optimizer:
    """`make` over `groups`, each of which says whether it is `HIDDEN`."""
    if known.arguments is None and known.library == "pytorch_optimizer":
        return make(groups, **arguments)  # its Muons ask each group; others do not look
    hidden, others = (
        [
            {key: value for key, value in group.items() if key != HIDDEN}
            for group in groups
            if group[HIDDEN] is is_hidden
        ]
        for is_hidden in (True, False)
    )
    if make is torch.optim.Muon and others:
        shared = {key: arguments[key] for key in ("lr", "weight_decay")}
        return MuonAndAdamW(hidden, others, muon=arguments, adamw=shared | PRESET["adamw"])
    return make([*hidden, *others], **arguments)


def _refused(options: OptimOptions, error: Exception) -> ConfigError:
    return ConfigError.of(
        f"optimizer_config = {options.optimizer_config}: {options.optimizer} refuses it ({error})",
        "the optimizer's own arguments",
    )


def _found(known: KnownOptimizer) -> type[torch.optim.Optimizer]:
    """The class in its library, by its name in any case. Loads the library."""
    # On some processors bitsandbytes warns that a kernel for quantized weights is missing, which no optimizer uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    module = importlib.import_module(LIBRARIES[known.library])
    classes = {
        name.lower(): value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if known.name.lower() not in classes:
        near = similar(known.name, classes) or ", ".join(sorted(classes)[:8])
        raise ConfigError.of(
            f"optimizer = {known.library}:{known.name}: {known.library} has no such optimizer",
            remedy=f"It has {len(classes)}, such as {known.library}:{near}.",
        )
    return classes[known.name.lower()]


def _arguments(
    options: OptimOptions, known: KnownOptimizer, make: type[torch.optim.Optimizer], seed: int
) -> dict[str, Any]:
    """What to make it with: the options that it reads, then `optimizer_config`, which wins."""
    given = options.optimizer_config or {}
    parameters = inspect.signature(make).parameters
    takes = {name for name, value in parameters.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
    takes -= {"params", "lr"}
    unknown = given.keys() - takes
    if unknown:  # many of pytorch_optimizer's take any argument and forget it
        raise _refused(options, TypeError(f"no {', '.join(sorted(unknown))}; it takes {', '.join(sorted(takes))}"))
    arguments: dict[str, Any] = {"lr": options.learning_rate * options.rate_scale}
    if "optimizer_beta1" in known.reads:
        first, second, *more = known.betas
        chosen = options.optimizer_beta1, options.optimizer_beta2
        first, second = (own if value is None else value for value, own in zip(chosen, (first, second), strict=True))
        arguments["betas"] = (first, second, *more)
    if "adam_weight_decay" in known.reads:
        arguments["weight_decay"] = options.adam_weight_decay
    if "adam_epsilon" in known.reads:
        arguments["eps"] = options.adam_epsilon
    if make in (AdamWBf16, AdafactorBf16):
        arguments["seed"] = seed
    return arguments | PRESET.get(options.optimizer, {}) | given


REHEARSED_STEPS = 3
REHEARSED_SIDE = 320
"""Of the largest tensor of a rehearsal, a square: bitsandbytes pages states from 100,000 numbers on, and quantizes them
from 4096."""

Construct = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _rehearse(
    name: str, construct: Construct, groups: Sequence[dict[str, Any]], *, side: int | None = REHEARSED_SIDE
) -> None:
    """Try the optimizer where `groups` are: train, save, restore into a fresh one and go on with both. The bits must
    agree, or, where the device's own sums vary from run to run, those of the same on the CPU.

    Args:
        side: of a large matrix beside the small ones; None for none.

    Raises:
        ConfigError: they do not, or it wants more than gradients.
    """
    try:
        device = groups[0]["params"][0].device
        straight, resumed = _rehearsed(construct, groups, device, side)
        if device.type != "cpu" and not _are_equal(straight, resumed):
            repeated, _ = _rehearsed(construct, groups, device, side)
            if not _are_equal(straight, repeated):
                straight, resumed = _rehearsed(construct, groups, torch.device("cpu"), side)
    except Exception as error:  # noqa: BLE001  whatever a stranger raises, it cannot be used
        if side is not None and all(parameter.numel() < side**2 for group in groups for parameter in group["params"]):
            # It may need the square of a tensor's size, or fail with large ones only, and the run has none.
            _rehearse(name, construct, groups, side=None)
            return
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ConfigError.of(
            f"optimizer = {name}: it cannot be used here ({type(error).__name__}: {reason})",
            "one that is driven by gradients alone, with arguments that it takes",
            "See optimizer_config, or take another.",
        ) from None
    if not _are_equal(straight, resumed):
        raise ConfigError.of(
            f"optimizer = {name}: saved and restored it does not go on where it was",
            "one whose whole state can be saved",
            "A killed run could not be resumed exactly: take another.",
        )


def _rehearsed(
    construct: Construct, groups: Sequence[dict[str, Any]], device: torch.device, side: int | None
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What twice `REHEARSED_STEPS` steps make of a few tensors, in one go and with a restart between.

    They are in groups like `groups`: two small matrices each, or a vector where those are vectors; and a square of
    `side` in the first group of matrices.
    """
    start: dict[str, torch.Tensor] = {}
    members: list[list[str]] = []
    for index, group in enumerate(groups):
        own = {f"c{index}": torch.linspace(0.5, 1.5, 24)}
        if group["params"][0].ndim > 1:
            own = {f"a{index}": torch.linspace(-1, 1, 4 * 24).reshape(4, 24), f"b{index}": torch.zeros(24, 4)}
            if side is not None and "large" not in start:
                own["large"] = torch.linspace(-1, 1, side**2).reshape(side, side)
        start |= own
        members.append(list(own))

    def fresh(values: Mapping[str, torch.Tensor]) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
        made = {key: nn.Parameter(value.detach().to(device, copy=True)) for key, value in values.items()}
        return made, construct(
            [{**group, "params": [made[key] for key in own]} for group, own in zip(groups, members, strict=True)]
        )

    def train(parameters: Mapping[str, nn.Parameter], made: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + REHEARSED_STEPS):
            for parameter in parameters.values():
                gradient = torch.sin(torch.arange(parameter.numel()) * float(step)).view_as(parameter)
                parameter.grad = gradient.to(device)
            made.step()

    torch.manual_seed(0)
    straight, made = fresh(start)
    train(straight, made, 1)
    tensors, rest = optimizer_state.pack(made, straight)
    resumed, again = fresh(straight)
    optimizer_state.unpack(again, resumed, {key: value.clone() for key, value in tensors.items()}, rest)
    torch.manual_seed(0)
    train(straight, made, 1 + REHEARSED_STEPS)
    torch.manual_seed(0)
    train(resumed, again, 1 + REHEARSED_STEPS)
    return straight, resumed


def _are_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


@contextlib.contextmanager
def as_given(built: torch.optim.Optimizer, masters: SteppedParameters | None = None) -> Iterator[None]:
    """Inside, the parameters are those that the optimizer gives: looked at, measured, saved, exported. Afterwards
    they are again, bit for bit, those that it trains. For most both are the same, and nothing happens.

    Schedule-free optimizers take gradients at y and give the average x. Their own way back from x to y rounds, and
    then how often a run is looked at would change its weights; so y is kept aside and put back. Where it trains
    `masters`, the model's weights follow.
    """
    if not isinstance(built, Averaging):
        yield
        return
    trained = [parameter for group in built.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in trained]
    built.eval()
    if masters is not None:
        masters.settle()
    try:
        yield
    finally:
        built.train()
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        if masters is not None:
            masters.settle()


def clip(parameters: Sequence[torch.Tensor], options: OptimOptions, world: World | None = None) -> torch.Tensor:
    """Bound the gradients as `max_grad_norm` and `grad_clip_method` say; returns their norm before, a scalar.

    Args:
        world: where given, `parameters` are this rank's rows of sharded ones, and the norm is that of all ranks' rows.
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
