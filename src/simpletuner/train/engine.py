"""Advise an engine for several GPUs: DDP (whole copies of the model), FSDP2 (shards) or DeepSpeed's ZeRO stages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from simpletuner.base.sizes import format_size
from simpletuner.config.options.ranks import ZERO_STAGES, RankOptions
from simpletuner.config.rules import findings
from simpletuner.config.run import RunConfig
from simpletuner.memory.planner import ENGINES, TIER_TITLES, Engine, MemoryPlan, MemoryTier

if TYPE_CHECKING:
    from simpletuner.train.budget import Budget

MAX_SOUGHT_GPUS = 64
MAX_SOUGHT_MACHINES = 64
"""Upper limits of the search for the smallest sufficient number of GPUs of one machine, or of equal machines."""

SHARDING_ENGINES: tuple[Engine, ...] = ("fsdp2", "zero1", "zero2", "zero3")
"""Engines that shard tensors over processes, in the order in which they are advised. FSDP2 comes first because it needs
no other package."""


@dataclass(frozen=True)
class EngineAdvice:
    """The engine that a run should use: DDP if it fits, else the one in the options, else the first of
    `SHARDING_ENGINES`.
    """

    engine: Engine | None
    """None if the run does not fit with any engine."""
    text: str
    fewest_gpus: int | None
    """The fewest GPUs, over all machines, with which FSDP2 shards fit; searched only if `engine` is None."""
    plans: Mapping[Engine, MemoryPlan]
    """The memory plan of each engine that the options allow."""

    @property
    def peaks(self) -> dict[Engine, int]:
        """Peak bytes of the accelerator by engine, or of RAM without an accelerator."""
        return {engine: plan.peak(_tier(plan)) for engine, plan in self.plans.items()}

    def summary(self) -> dict[str, Any]:
        """The advice as JSON values."""
        sent = {engine: _sent(plan) for engine, plan in self.plans.items()}
        nulls = dict.fromkeys(("ddp", *SHARDING_ENGINES))
        return {
            "advised": self.engine,
            "text": self.text,
            "fewest_gpus": self.fewest_gpus,
            "peaks": {**nulls, **self.peaks},
            "sent": {**nulls, **sent},
        }


def advise(budget: "Budget") -> EngineAdvice:
    """Compare the engines for `budget.config.ranks` processes; all of them train the same result. DDP is advised if it
    fits, unless the engine in the options fits too and communicates less.
    """
    config, ranks = budget.config, budget.config.ranks
    ddp_plan = _planned(budget, _with_engine(config, "ddp"))
    plans = {ddp_plan.engine: ddp_plan}
    for engine in SHARDING_ENGINES if ranks > 1 else ():
        plan = _allowed(budget, _with_engine(config, engine))
        if plan is not None:
            plans[engine] = plan
    configured = plans.get(budget.plan.engine, ddp_plan)
    if _fits(ddp_plan) and not (_fits(configured) and _sent(configured) < _sent(ddp_plan)):
        return EngineAdvice(ddp_plan.engine, _ddp_text(budget, ddp_plan), None, plans)
    for engine in (budget.plan.engine, *SHARDING_ENGINES):
        if engine in plans and _fits(plans[engine]):
            option = "--fsdp_enable" if engine == "fsdp2" else f"--deepspeed_config={engine}"
            name, tier = "shards" if engine == "fsdp2" else ENGINES[engine], _tier(ddp_plan)
            use = f"whole copies take {_use(ddp_plan, tier) if _fits(ddp_plan) else _lack(ddp_plan)}, "
            use += f"{name} {_use(plans[engine], tier)}"
            return EngineAdvice(engine, f"Use {ENGINES[engine]} ({option}): {use}.", None, plans)
    fewest = _fewest(budget)
    finding = "One process does not fit" if ranks == 1 else f"{ranks} processes do not fit with any engine"
    shards = plans.get("fsdp2")
    sentences = [
        f"{finding}: whole copies take {_lack(ddp_plan)}{'' if shards is None else f', shards {_lack(shards)}'}."
    ]
    if fewest is not None:
        noun = "processes" if budget.machine.accelerator is None else "such GPUs"
        machines = "" if config.num_machines == 1 else f" on {fewest // config.ranks_per_machine} machines"
        sentences.append(f"These options fit on {fewest} {noun}{machines} or more, with --fsdp_enable.")
    return EngineAdvice(None, " ".join(sentences), fewest, plans)


def _with_engine(config: RunConfig, engine: Engine) -> RunConfig:
    """`config` with `engine`. DeepSpeed settings in the options are kept if they are for the same stage."""
    if engine == f"zero{config.zero_stage}":
        return with_options(config, {"fsdp_enable": False})
    stage = engine if engine in ZERO_STAGES else None
    return with_options(config, {"fsdp_enable": engine == "fsdp2", "deepspeed_config": stage})


def with_options(config: RunConfig, options: Mapping[str, object]) -> RunConfig:
    """`config` with other option values. For `deepspeed_config`, the name of a stage is converted to its settings."""
    stage = options.get("deepspeed_config")
    if isinstance(stage, str):
        options = {
            **options,
            "deepspeed_config": RankOptions.model_validate({"deepspeed_config": stage}).deepspeed_config,
        }
    return config.model_copy(update=options)


def _ddp_text(budget: "Budget", ddp_plan: MemoryPlan) -> str:
    use, plan = _use(ddp_plan, _tier(ddp_plan)), budget.plan
    if plan.wire is None or ddp_plan.wire is None:
        return f"One process holds the run: {use}."
    sent = f"and sends {format_size(ddp_plan.wire.total)} a step"
    if plan.engine == "ddp":
        return f"Use DDP: each process holds the whole run, {use}, {sent}."
    option = "--fsdp_enable" if plan.engine == "fsdp2" else "--deepspeed_config"
    sent = f"{sent}, with {ENGINES[plan.engine]} {format_size(plan.wire.total)}"
    return f"Use DDP (without {option}): each process holds the whole run, {use}, {sent}."


def _fewest(budget: "Budget") -> int | None:
    """The smallest number of processes, above the budget's, whose shards fit; None if none does. On several machines
    each machine has as many processes as the options say. More processes take less memory of each accelerator but more
    host memory, so binary search finds the first count that fits accelerators; that count must fit host memory too.
    """
    config = budget.config
    processes_per_unit, limit, low = 1, MAX_SOUGHT_GPUS, config.ranks
    if config.num_machines > 1:
        processes_per_unit, limit, low = config.ranks_per_machine, MAX_SOUGHT_MACHINES, config.num_machines

    def planned(count: int) -> MemoryPlan | None:
        machines = 1 if config.num_machines == 1 else count
        options = {"num_processes": count * processes_per_unit, "num_machines": machines}
        return _allowed(budget, _with_engine(config, "fsdp2").model_copy(update=options))

    def is_enough(count: int) -> bool:
        plan = planned(count)
        if plan is None:
            return False
        capacity = plan.machine.available(_tier(plan))
        return capacity is not None and plan.peak(_tier(plan)) <= capacity

    high = limit  # `low` is too small; `high` may be enough
    if low >= high or not is_enough(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    plan = planned(high)
    return high * processes_per_unit if plan is not None and _fits(plan) else None


def is_possible(config: RunConfig) -> bool:
    """Whether the options are compatible. A finding about `deepspeed_config` alone is ignored: it says that DeepSpeed
    is not installed here, but the plan may be for another machine.
    """
    return all(options == ("deepspeed_config",) for options, _ in findings(config, None))


def _allowed(budget: "Budget", config: RunConfig) -> MemoryPlan | None:
    """The plan of `config`; None if its options are incompatible."""
    return _planned(budget, config) if is_possible(config) else None


def _planned(budget: "Budget", config: RunConfig) -> MemoryPlan:
    return replace(budget, config=config).plan


def _fits(plan: MemoryPlan) -> bool:
    return all(lack.place == "disk" for lack in plan.lacks)


def _sent(plan: MemoryPlan) -> int:
    return 0 if plan.wire is None else plan.wire.total


def _tier(plan: MemoryPlan) -> MemoryTier:
    return "ram" if plan.machine.accelerator is None else "accelerator"


def _use(plan: MemoryPlan, tier: MemoryTier) -> str:
    return f"{format_size(plan.peak(tier))} of {format_size(plan.machine.available(tier) or 0)} {TIER_TITLES[tier]}"


def _lack(plan: MemoryPlan) -> str:
    lack = next(lack for lack in plan.lacks if lack.place != "disk")
    return _use(plan, lack.place)
