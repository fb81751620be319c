"""Memory plans: sum parts into phases, compare the phases with a machine, and find the smallest change that fits.

Independent of models and of torch.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from simpletuner.base.sizes import GIB, format_seconds, format_size
from simpletuner.memory.wire import Wire

MemoryTier = Literal["accelerator", "ram", "disk"]
PlannedPhase = Literal["text", "latents", "train", "validation", "preview"]
Engine = Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"]
MEMORY_TIERS: tuple[MemoryTier, ...] = ("accelerator", "ram", "disk")

ENGINES: Mapping[Engine, str] = {
    "single": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
}
"""Display names of the engines."""

GPU_OVERHEAD_BYTES = 1.5 * GIB
SYSTEM_OVERHEAD_BYTES = 4 * GIB
"""Bytes of a GPU and of host memory that other things use: driver, CUDA context, screen, system, this program. At most
an eighth of the memory. A GPU of 24, 16, 12 or 8 GiB has 22.5, 14.5, 10.5 or 7 GiB for a model."""

KEPT_FREE = 1 / 20
"""Share of the accelerator that `auto` choices leave free. Measured peaks differ from the plan by less than this."""


def plannable_bytes(accelerator: int) -> int:
    """Bytes that an `auto` choice may plan to use, with `accelerator` bytes free.

    With an idle GPU of 24, 16, 12 or 8 GiB it is less than the 22.5, 14.5, 10.5 or 7 GiB above.
    """
    return int(accelerator - max(KEPT_FREE * accelerator, min(GPU_OVERHEAD_BYTES, accelerator / 8)))


@dataclass(frozen=True)
class MemoryPart:
    """An item that takes memory: its name, its memory tier, and its size in bytes."""

    name: str
    place: MemoryTier
    size: int


@dataclass(frozen=True)
class PhasePlan:
    """Memory at the worst moment of a phase, and the files that the phase leaves on disk.

    Accelerator memory is that of one process; RAM and disk are those of all processes of one machine.
    """

    phase: PlannedPhase
    what: str
    """Short description of the phase."""
    parts: tuple[MemoryPart, ...]
    read: int
    """Bytes of weights that the phase reads from disk."""

    def total(self, tier: MemoryTier) -> int:
        return sum(part.size for part in self.parts if part.place == tier)


@dataclass(frozen=True)
class MachineMemory:
    """Memory and disk space available to a run, in bytes."""

    accelerator: int | None
    """None: there is no accelerator, and everything is in RAM."""
    ram: int
    disk: int | None
    """None: unknown."""

    @classmethod
    def of_size(cls, vram: float | None, ram: float) -> "MachineMemory":
        """A machine with a GPU of `vram` bytes (None or 0: no GPU) and `ram` bytes of host memory."""
        accelerator = int(vram - min(GPU_OVERHEAD_BYTES, vram / 8)) if vram else None
        return cls(accelerator, int(ram - min(SYSTEM_OVERHEAD_BYTES, ram / 8)), None)

    def available(self, tier: MemoryTier) -> int | None:
        """Bytes available in a tier; None if the tier is missing or unknown."""
        return {"accelerator": self.accelerator, "ram": self.ram, "disk": self.disk}[tier]


@dataclass(frozen=True)
class Shortage:
    """A memory tier that is too small for a phase; `needed` and `there` (available) are bytes."""

    phase: PhasePlan
    place: MemoryTier
    needed: int
    there: int


@dataclass(frozen=True)
class MemoryPlan:
    """All phases of a run on one machine, or on several equal machines."""

    machine: MachineMemory
    phases: tuple[PhasePlan, ...]
    processes: int = 1
    """Number of processes on all machines. Each has an accelerator; those of one machine share its RAM and disk."""
    engine: Engine = "single"
    wire: Wire | None = None
    """Bytes that a process sends in a step; None for a single process."""
    machines: int = 1

    @property
    def processes_per_machine(self) -> int:
        return self.processes // self.machines

    @property
    def described_processes(self) -> str:
        """Such as "one process", "2 processes, FSDP2", or "16 processes on 2 machines, FSDP2"."""
        if self.processes == 1:
            return ENGINES[self.engine]
        machines = "" if self.machines == 1 else f" on {self.machines} machines"
        return f"{self.processes} processes{machines}, {ENGINES[self.engine]}"

    def peak(self, tier: MemoryTier) -> int:
        """Bytes of a tier that the run needs: the maximum over the phases, or for the disk their sum."""
        totals = [phase.total(tier) for phase in self.phases]
        return sum(totals) if tier == "disk" else max(totals)

    def worst(self, tier: MemoryTier) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.total(tier))

    def phase(self, name: PlannedPhase) -> PhasePlan | None:
        return next((phase for phase in self.phases if phase.phase == name), None)

    @property
    def lacks(self) -> tuple[Shortage, ...]:
        """Each tier that is too small, with the phase that takes most of it."""
        lacks = []
        for tier in MEMORY_TIERS:
            available = self.machine.available(tier)
            if available is not None and self.peak(tier) > available:
                lacks.append(Shortage(self.worst(tier), tier, self.peak(tier), available))
        return tuple(lacks)

    @property
    def fits(self) -> bool:
        return not self.lacks

    def summary(self) -> dict[str, Any]:
        """The plan as JSON, in bytes; docs/plan.md explains each key."""
        return {
            "processes": self.processes,
            "machines": self.machines,
            "engine": self.engine,
            "wire": None if self.wire is None else self.wire.summary(),
            "machine": {tier: self.machine.available(tier) for tier in MEMORY_TIERS},
            "phases": [
                {
                    "phase": phase.phase,
                    "what": phase.what,
                    **{tier: phase.total(tier) for tier in MEMORY_TIERS},
                    "read": phase.read,
                    "parts": [{"name": part.name, "place": part.place, "bytes": part.size} for part in phase.parts],
                }
                for phase in self.phases
            ],
            "peak": {tier: self.peak(tier) for tier in MEMORY_TIERS},
            "fits": self.fits,
            "lacks": [
                {"phase": lack.phase.phase, "place": lack.place, "needed": lack.needed, "there": lack.there}
                for lack in self.lacks
            ],
        }


@dataclass(frozen=True)
class OptionValue:
    """A new value of an option."""

    option: str
    value: str | int | bool | None
    where: str = ""
    """Where the option is set, if not on the command line."""

    def __str__(self) -> str:
        """The flag as it is typed."""
        if self.value is None:
            return f"no --{self.option}"
        assignment = f"{self.option}={self.value if isinstance(self.value, str) else json.dumps(self.value)}"
        return f"{assignment} {self.where}" if self.where else f"--{assignment}"


@dataclass(frozen=True)
class Remedy:
    """Changes that make a plan fit, and the bytes that one tier needed before and needs after them."""

    changes: tuple[OptionValue, ...]
    place: MemoryTier
    before: int
    after: int

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.changes))}: {format_size(self.before)} → {format_size(self.after)}"

    def summary(self) -> dict[str, Any]:
        """The remedy as JSON."""
        changes = {change.option: change.value for change in self.changes}
        return {"changes": changes, "place": self.place, "before": self.before, "after": self.after}


Replan = Callable[[Mapping[str, object]], MemoryPlan]
"""Returns the plan with the given values of options."""

MAX_CHANGES = 4
"""Maximum number of changes in a remedy."""


def smallest_change(plan: MemoryPlan, ladder: Sequence[OptionValue], replan: Replan) -> Remedy | None:
    """The fewest changes, at most `MAX_CHANGES`, with which the accelerator's memory and RAM suffice; else None.

    `ladder` is ordered from the cheapest change to the most expensive. Of equally many changes the first in its order
    are returned. None also if nothing has to change. A full disk has no remedy here.
    """
    lacking = [lack for lack in plan.lacks if lack.place != "disk"]
    if not lacking:
        return None
    first, tiers = lacking[0], {lack.place for lack in lacking}

    def saves(change: OptionValue) -> bool:
        changed_plan = replan({change.option: change.value})
        return any(
            after.total(tier) < before.total(tier)
            for tier in tiers
            for before, after in zip(plan.phases, changed_plan.phases, strict=True)
        )

    def is_enough(changed_plan: MemoryPlan) -> bool:
        return all(lack.place == "disk" for lack in changed_plan.lacks)

    helpful = [change for change in ladder if saves(change)]
    for count in range(1, MAX_CHANGES + 1):
        for changes in itertools.combinations(helpful, count):
            values = {change.option: change.value for change in changes}
            if len(values) < count:
                continue
            changed_plan = replan(values)
            if is_enough(changed_plan):
                return Remedy(changes, first.place, first.needed, changed_plan.peak(first.place))
    return None


def with_less_memory(plan: MemoryPlan, phase: PlannedPhase, tier: MemoryTier, available: int) -> MemoryPlan:
    """`plan` reduced to `phase`, on a machine with `available` bytes in `tier`. For explaining a failed allocation."""
    only = tuple(each for each in plan.phases if each.phase == phase)
    limits = {"accelerator": plan.machine.accelerator, "ram": plan.machine.ram, tier: available}
    return replace(plan, phases=only, machine=MachineMemory(limits["accelerator"], limits["ram"] or 0, None))


TIER_TITLES: Mapping[MemoryTier, str] = {"accelerator": "GPU", "ram": "RAM", "disk": "disk"}


def plan_title(plan: MemoryPlan) -> str:
    """Heading of a plan: "Memory plan, worst moment of each phase", and with several processes which share is shown."""
    title = "Memory plan, worst moment of each phase"
    if plan.processes == 1:
        return title
    scope = "RAM of all" if plan.machines == 1 else "RAM of each machine"
    if plan.machine.accelerator is not None:
        scope = f"GPU of each process, {scope}"
    return f"{title} ({plan.described_processes}; {scope})"


def phase_line(phase: PhasePlan) -> str:
    """One line about a phase: "train (1024x1024 × 1): GPU 19.40 GiB (weights 16.91, activations 2.33, …)"."""
    tiers = []
    for tier in MEMORY_TIERS:
        parts = sorted((part for part in phase.parts if part.place == tier), key=lambda part: -part.size)
        if phase.total(tier):
            part_list = ", ".join(f"{part.name} {format_size(part.size)}" for part in parts[:4] if part.size)
            tiers.append(f"{TIER_TITLES[tier]} {format_size(phase.total(tier))} ({part_list})")
    return f"{phase.phase} ({phase.what}): {'; '.join(tiers)}"


def plan_table(plan: MemoryPlan) -> list[str]:
    """Table of every part of every phase, for a terminal."""
    rows: list[tuple[str, ...]] = [("", *(TIER_TITLES[tier] for tier in MEMORY_TIERS), "read")]
    for phase in plan.phases:
        totals = (format_size(phase.total(tier)) for tier in MEMORY_TIERS)
        rows.append((f"{phase.phase}: {phase.what}", *totals, format_size(phase.read)))
        for name in dict.fromkeys(part.name for part in phase.parts):
            sizes = {part.place: part.size for part in phase.parts if part.name == name}
            rows.append(
                (f"  {name}", *(format_size(sizes[tier]) if tier in sizes else "" for tier in MEMORY_TIERS), "")
            )
    return aligned_rows(rows)


def engine_table(plans: Mapping[Engine, MemoryPlan]) -> list[str]:
    """Table of the engines: memory, bytes sent per step, and the estimated time to send them, for a terminal."""
    rows: list[tuple[str, ...]] = []
    for engine, plan in plans.items():
        tiers = [tier for tier in MEMORY_TIERS[:2] if plan.machine.available(tier) is not None]
        wire = plan.wire or Wire(0, 0)
        if not rows:
            rows.append(("engine", *(TIER_TITLES[tier] for tier in tiers), "sent per step", *wire.links))
        times = map(format_seconds, wire.seconds().values())
        rows.append(
            (ENGINES[engine], *(format_size(plan.peak(tier)) for tier in tiers), format_size(wire.total), *times)
        )
    return aligned_rows(rows)


def aligned_rows(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def verdict(plan: MemoryPlan) -> str:
    """One sentence that says whether the plan fits."""
    sizes = []
    for tier in MEMORY_TIERS:
        available = plan.machine.available(tier)
        if available is not None and (plan.peak(tier) or tier != "disk"):
            phase = "" if tier == "disk" else f" ({plan.worst(tier).phase})"
            scope = "" if plan.machines == 1 else f" on each of {plan.machines} machines"
            if tier == "accelerator":
                scope = "" if plan.processes == 1 else f" in each of {plan.processes}"
            sizes.append(
                f"{TIER_TITLES[tier]} {format_size(plan.peak(tier))}{phase} of {format_size(available)}{scope}"
            )
    if plan.fits:
        return f"It fits: {', '.join(sizes)}."
    names = " and ".join(TIER_TITLES[lack.place] for lack in plan.lacks)
    return f"It does not fit, for lack of {names}: {', '.join(sizes)}."
