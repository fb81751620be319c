"""Which engine a run should take on several GPUs: copies of the model that sum gradients (DDP), or shards (FSDP2)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simpletuner.base.sizes import format_size
from simpletuner.config.rules import findings
from simpletuner.config.run import RunConfig
from simpletuner.memory.planner import NAMES, Engine, MemoryPlan, MemoryTier

if TYPE_CHECKING:
    from simpletuner.train.budget import Budget

MOST_SOUGHT_GPUS = 64
"""Up to which the fewest GPUs that hold a run are looked for."""


@dataclass(frozen=True)
class EngineAdvice:
    """The engine with which a run fits, DDP before FSDP2."""

    engine: Engine | None
    """None: the run fits with neither."""
    text: str
    fewest_gpus: int | None
    """The fewest GPUs whose shards fit; looked for only where the run does not fit."""
    peaks: Mapping[Engine, int]
    """Bytes of the accelerator, or of RAM where there is none, with each engine that the options allow."""

    def summary(self) -> dict[str, Any]:
        """For a JSON reader."""
        return {
            "advised": self.engine,
            "text": self.text,
            "fewest_gpus": self.fewest_gpus,
            "peaks": {"ddp": None, "fsdp2": None, **self.peaks},
        }


def advise(budget: "Budget") -> EngineAdvice:
    """Compare the engines for `budget.config.ranks` processes. Copies send less than shards and are taken where they
    fit; the trained result is the same.
    """
    config, place = budget.config, _place(budget)
    ranks = config.ranks
    copies = _planned(budget, config.model_copy(update={"fsdp_enable": False}))
    shards = None if ranks == 1 else _sharded(budget, ranks)
    peaks: dict[Engine, int] = {"single" if ranks == 1 else "ddp": copies.peak(place)}
    if shards is not None:
        peaks["fsdp2"] = shards.peak(place)
    if _fits(copies):
        return EngineAdvice(copies.engine, _copies_fit(budget, copies), None, peaks)
    if shards is not None and _fits(shards):
        text = f"Take FSDP2 (--fsdp_enable): whole copies take {_lack(copies)}, shards {_use(shards, place)}."
        return EngineAdvice("fsdp2", text, None, peaks)
    fewest = _fewest(budget)
    engines = "One process does not fit" if ranks == 1 else f"{ranks} processes fit with neither engine"
    told = [f"{engines}: whole copies take {_lack(copies)}{'' if shards is None else f', shards {_lack(shards)}'}."]
    if fewest is not None:
        noun = "processes" if budget.machine.accelerator is None else "such GPUs"
        told.append(f"With these options {fewest} {noun} are the fewest that fit, with --fsdp_enable.")
    return EngineAdvice(None, " ".join(told), fewest, peaks)


def _copies_fit(budget: "Budget", copies: MemoryPlan) -> str:
    use = _use(copies, _place(budget))
    if copies.processes == 1:
        return f"One process holds the run: {use}."
    option = " (without --fsdp_enable)" if budget.config.fsdp_enable else ""
    return f"Take DDP{option}: each process holds the whole run, {use}, and sends less than with FSDP2."


def _fewest(budget: "Budget") -> int | None:
    """The fewest processes, more than the budget's, whose shards fit; None where none do. With more of them each
    accelerator holds less, and all of them more of the host's memory: where the former is enough the latter must be.
    """
    place, there = _place(budget), budget.machine.has(_place(budget))

    def is_enough(ranks: int) -> bool:
        plan = _sharded(budget, ranks)
        return plan is not None and there is not None and plan.peak(place) <= there

    low, high = budget.config.ranks, MOST_SOUGHT_GPUS  # too few; maybe enough
    if low >= high or not is_enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    plan = _sharded(budget, high)
    return high if plan is not None and _fits(plan) else None


def _sharded(budget: "Budget", ranks: int) -> MemoryPlan | None:
    """The plan of shards over `ranks` processes; None where the other options forbid them."""
    config = budget.config.model_copy(update={"fsdp_enable": True, "num_processes": ranks})
    return None if any(findings(config, None)) else _planned(budget, config)


def _planned(budget: "Budget", config: RunConfig) -> MemoryPlan:
    return replace(budget, config=config).plan


def _fits(plan: MemoryPlan) -> bool:
    return all(lack.place == "disk" for lack in plan.lacks)


def _place(budget: "Budget") -> MemoryTier:
    return "ram" if budget.machine.accelerator is None else "accelerator"


def _use(plan: MemoryPlan, place: MemoryTier) -> str:
    return f"{format_size(plan.peak(place))} of {format_size(plan.machine.has(place) or 0)} {NAMES[place]}"


def _lack(plan: MemoryPlan) -> str:
    lack = next(lack for lack in plan.lacks if lack.place != "disk")
    return _use(plan, lack.place)
