"""Which engine a run should take on several GPUs: copies of the model that sum gradients (DDP), shards (FSDP2), or
DeepSpeed's stages (ZeRO).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simpletuner.base.sizes import format_size
from simpletuner.config.options.ranks import ZERO_STAGES, RankOptions
from simpletuner.config.rules import findings
from simpletuner.config.run import RunConfig
from simpletuner.memory.planner import ENGINES, NAMES, Engine, MemoryPlan, MemoryTier

if TYPE_CHECKING:
    from simpletuner.train.budget import Budget

MOST_SOUGHT_GPUS = 64
MOST_SOUGHT_MACHINES = 64
"""Up to which the fewest that hold a run are looked for: GPUs of one machine, or machines like those of the options."""

SHARED: tuple[Engine, ...] = ("fsdp2", "zero1", "zero2", "zero3")
"""Engines with which processes share what copies hold several times, in the order in which they are advised: FSDP2
needs no other package."""


@dataclass(frozen=True)
class EngineAdvice:
    """The engine with which a run fits: DDP, else the one of the options, else the first of `SHARED`."""

    engine: Engine | None
    """None: the run fits with none."""
    text: str
    fewest_gpus: int | None
    """The fewest GPUs, of all machines, whose shards fit; looked for only where the run does not fit."""
    plans: Mapping[Engine, MemoryPlan]
    """With each engine that the options allow."""

    @property
    def peaks(self) -> dict[Engine, int]:
        """Bytes of the accelerator, or of RAM where there is none."""
        return {engine: plan.peak(_place(plan)) for engine, plan in self.plans.items()}

    def summary(self) -> dict[str, Any]:
        """For a JSON reader."""
        sent = {engine: _sent(plan) for engine, plan in self.plans.items()}
        none = dict.fromkeys(("ddp", *SHARED))
        return {
            "advised": self.engine,
            "text": self.text,
            "fewest_gpus": self.fewest_gpus,
            "peaks": {**none, **self.peaks},
            "sent": {**none, **sent},
        }


def advise(budget: "Budget") -> EngineAdvice:
    """Compare the engines for `budget.config.ranks` processes; the trained result is the same. Copies are taken where
    they fit, unless the engine of the options fits too and sends less.
    """
    config, ranks = budget.config, budget.config.ranks
    copies = _planned(budget, _with_engine(config, "ddp"))
    plans = {copies.engine: copies}
    for engine in SHARED if ranks > 1 else ():
        plan = _allowed(budget, _with_engine(config, engine))
        if plan is not None:
            plans[engine] = plan
    own = plans.get(budget.plan.engine, copies)
    if _fits(copies) and not (_fits(own) and _sent(own) < _sent(copies)):
        return EngineAdvice(copies.engine, _copies_fit(budget, copies), None, plans)
    for engine in (budget.plan.engine, *SHARED):
        if engine in plans and _fits(plans[engine]):
            option = "--fsdp_enable" if engine == "fsdp2" else f"--deepspeed_config={engine}"
            name, place = "shards" if engine == "fsdp2" else ENGINES[engine], _place(copies)
            use = f"whole copies take {_use(copies, place) if _fits(copies) else _lack(copies)}, "
            use += f"{name} {_use(plans[engine], place)}"
            return EngineAdvice(engine, f"Take {ENGINES[engine]} ({option}): {use}.", None, plans)
    fewest = _fewest(budget)
    engines = "One process does not fit" if ranks == 1 else f"{ranks} processes fit with no engine"
    shards = plans.get("fsdp2")
    told = [f"{engines}: whole copies take {_lack(copies)}{'' if shards is None else f', shards {_lack(shards)}'}."]
    if fewest is not None:
        noun = "processes" if budget.machine.accelerator is None else "such GPUs"
        where = "" if config.num_machines == 1 else f" on {fewest // config.ranks_per_machine} machines"
        told.append(f"With these options {fewest} {noun}{where} are the fewest that fit, with --fsdp_enable.")
    return EngineAdvice(None, " ".join(told), fewest, plans)


def _with_engine(config: RunConfig, engine: Engine) -> RunConfig:
    """`config` with `engine`: with the options' own settings of DeepSpeed where they have that stage."""
    if engine == f"zero{config.zero_stage}":
        return with_options(config, {"fsdp_enable": False})
    stage = engine if engine in ZERO_STAGES else None
    return with_options(config, {"fsdp_enable": engine == "fsdp2", "deepspeed_config": stage})


def with_options(config: RunConfig, options: Mapping[str, object]) -> RunConfig:
    """`config` with other values of options; the name of a stage of DeepSpeed stands for its settings."""
    stage = options.get("deepspeed_config")
    if isinstance(stage, str):
        options = {
            **options,
            "deepspeed_config": RankOptions.model_validate({"deepspeed_config": stage}).deepspeed_config,
        }
    return config.model_copy(update=options)


def _copies_fit(budget: "Budget", copies: MemoryPlan) -> str:
    use, other = _use(copies, _place(copies)), budget.plan
    if other.wire is None or copies.wire is None:
        return f"One process holds the run: {use}."
    sent = f"and sends {format_size(copies.wire.total)} a step"
    if other.engine == "ddp":
        return f"Take DDP: each process holds the whole run, {use}, {sent}."
    option = "--fsdp_enable" if other.engine == "fsdp2" else "--deepspeed_config"
    sent = f"{sent}, with {ENGINES[other.engine]} {format_size(other.wire.total)}"
    return f"Take DDP (without {option}): each process holds the whole run, {use}, {sent}."


def _fewest(budget: "Budget") -> int | None:
    """The fewest processes, more than the budget's, whose shards fit; None where none do. On several machines there
    are as many on each as the options say. With more processes each accelerator holds less, and all of a machine more
    of its memory: where the former is enough the latter must be.
    """
    config = budget.config
    one, most, low = 1, MOST_SOUGHT_GPUS, config.ranks
    if config.num_machines > 1:
        one, most, low = config.ranks_per_machine, MOST_SOUGHT_MACHINES, config.num_machines

    def planned(count: int) -> MemoryPlan | None:
        machines = 1 if config.num_machines == 1 else count
        options = {"num_processes": count * one, "num_machines": machines}
        return _allowed(budget, _with_engine(config, "fsdp2").model_copy(update=options))

    def is_enough(count: int) -> bool:
        plan = planned(count)
        if plan is None:
            return False
        there = plan.machine.has(_place(plan))
        return there is not None and plan.peak(_place(plan)) <= there

    high = most  # `low` is too few; `high` is maybe enough
    if low >= high or not is_enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    plan = planned(high)
    return high * one if plan is not None and _fits(plan) else None


def is_possible(config: RunConfig) -> bool:
    """Whether the options go together. That DeepSpeed is not installed here, which is said of `deepspeed_config` alone,
    forbids nothing: the plan may be for another machine.
    """
    return all(options == ("deepspeed_config",) for options, _ in findings(config, None))


def _allowed(budget: "Budget", config: RunConfig) -> MemoryPlan | None:
    """The plan; None where the other options forbid it."""
    return _planned(budget, config) if is_possible(config) else None


def _planned(budget: "Budget", config: RunConfig) -> MemoryPlan:
    return replace(budget, config=config).plan


def _fits(plan: MemoryPlan) -> bool:
    return all(lack.place == "disk" for lack in plan.lacks)


def _sent(plan: MemoryPlan) -> int:
    return 0 if plan.wire is None else plan.wire.total


def _place(plan: MemoryPlan) -> MemoryTier:
    return "ram" if plan.machine.accelerator is None else "accelerator"


def _use(plan: MemoryPlan, place: MemoryTier) -> str:
    return f"{format_size(plan.peak(place))} of {format_size(plan.machine.has(place) or 0)} {NAMES[place]}"


def _lack(plan: MemoryPlan) -> str:
    lack = next(lack for lack in plan.lacks if lack.place != "disk")
    return _use(plan, lack.place)
