"""The arithmetic of a memory plan: parts add up to phases, phases meet a machine, and what does not fit gets the
smallest change that would. Knows no model, and needs no torch.
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
"""What people call them."""

LEFT_BY_A_CARD = 1.5 * GIB
LEFT_BY_A_SYSTEM = 4 * GIB
"""What of a card, and of a machine's memory, others hold: driver, context, screen, system, this program. An eighth of
small ones. A card of 24, 16, 12 or 8 GiB has 22.5, 14.5, 10.5 or 7 for a model."""


KEPT_FREE = 1 / 20
"""Share of the accelerator that choices made to fill it leave free: measured peaks lie within it of the plan."""


def bytes_to_fill(accelerator: int) -> int:
    """Bytes that a choice made to fill the accelerator may plan for. Of what is free of a whole card of 24, 16, 12 or
    8 GiB that is less than the 22.5, 14.5, 10.5 or 7 GiB above.
    """
    return int(accelerator - max(KEPT_FREE * accelerator, min(LEFT_BY_A_CARD, accelerator / 8)))


@dataclass(frozen=True)
class MemoryPart:
    """What takes memory, where, and how much of it, in bytes."""

    name: str
    place: MemoryTier
    size: int


@dataclass(frozen=True)
class PhasePlan:
    """What is in memory at the worst moment of a phase, and what the phase leaves on the disk: accelerator memory of
    one process, RAM and disk of all processes of one machine.
    """

    phase: PlannedPhase
    what: str
    """What the phase does, in a few words."""
    parts: tuple[MemoryPart, ...]
    read: int
    """Bytes of weights that it reads from the disk."""

    def total(self, place: MemoryTier) -> int:
        return sum(part.size for part in self.parts if part.place == place)


@dataclass(frozen=True)
class Machine:
    """What a run may take, in bytes."""

    accelerator: int | None
    """None: there is none, and everything is in RAM."""
    ram: int
    disk: int | None
    """None: not known."""

    @classmethod
    def of_size(cls, vram: float | None, ram: float) -> "Machine":
        """A machine with a card of `vram` bytes (None or 0: without one) and `ram` bytes of memory."""
        card = int(vram - min(LEFT_BY_A_CARD, vram / 8)) if vram else None
        return cls(card, int(ram - min(LEFT_BY_A_SYSTEM, ram / 8)), None)

    def has(self, place: MemoryTier) -> int | None:
        return {"accelerator": self.accelerator, "ram": self.ram, "disk": self.disk}[place]


@dataclass(frozen=True)
class Lack:
    """A place that is too small for a phase."""

    phase: PhasePlan
    place: MemoryTier
    needed: int
    there: int


@dataclass(frozen=True)
class MemoryPlan:
    """All phases of a run on a machine, or on several that are alike."""

    machine: Machine
    phases: tuple[PhasePlan, ...]
    processes: int = 1
    """Of all machines. Each has an accelerator like the machine's; those of a machine share its RAM and disk."""
    engine: Engine = "single"
    wire: Wire | None = None
    """What a process sends in a step; None for a single process."""
    machines: int = 1

    @property
    def processes_per_machine(self) -> int:
        return self.processes // self.machines

    @property
    def described_processes(self) -> str:
        """Such as "2 processes, FSDP2", or "16 processes on 2 machines, FSDP2"; of a single one "one process"."""
        if self.processes == 1:
            return ENGINES[self.engine]
        where = "" if self.machines == 1 else f" on {self.machines} machines"
        return f"{self.processes} processes{where}, {ENGINES[self.engine]}"

    def peak(self, place: MemoryTier) -> int:
        """Of memory, what the hungriest phase takes; of the disk, what all leave there together."""
        totals = [phase.total(place) for phase in self.phases]
        return sum(totals) if place == "disk" else max(totals)

    def worst(self, place: MemoryTier) -> PhasePlan:
        return max(self.phases, key=lambda phase: phase.total(place))

    def phase(self, name: PlannedPhase) -> PhasePlan | None:
        return next((phase for phase in self.phases if phase.phase == name), None)

    @property
    def lacks(self) -> tuple[Lack, ...]:
        """Each place that is too small, with the phase that takes most of it."""
        found = []
        for place in MEMORY_TIERS:
            there = self.machine.has(place)
            if there is not None and self.peak(place) > there:
                found.append(Lack(self.worst(place), place, self.peak(place), there))
        return tuple(found)

    @property
    def fits(self) -> bool:
        return not self.lacks

    def summary(self) -> dict[str, Any]:
        """For a JSON reader, in bytes; docs/plan.md says what each key means."""
        return {
            "processes": self.processes,
            "machines": self.machines,
            "engine": self.engine,
            "wire": None if self.wire is None else self.wire.summary(),
            "machine": {place: self.machine.has(place) for place in MEMORY_TIERS},
            "phases": [
                {
                    "phase": phase.phase,
                    "what": phase.what,
                    **{place: phase.total(place) for place in MEMORY_TIERS},
                    "read": phase.read,
                    "parts": [{"name": part.name, "place": part.place, "bytes": part.size} for part in phase.parts],
                }
                for phase in self.phases
            ],
            "peak": {place: self.peak(place) for place in MEMORY_TIERS},
            "fits": self.fits,
            "lacks": [
                {"phase": lack.phase.phase, "place": lack.place, "needed": lack.needed, "there": lack.there}
                for lack in self.lacks
            ],
        }


@dataclass(frozen=True)
class Change:
    """Another value of an option."""

    option: str
    value: str | int | bool | None
    where: str = ""
    """Where it is written, if not on the command line."""

    def __str__(self) -> str:
        """As it is typed."""
        if self.value is None:
            return f"no --{self.option}"
        told = f"{self.option}={self.value if isinstance(self.value, str) else json.dumps(self.value)}"
        return f"{told} {self.where}" if self.where else f"--{told}"


@dataclass(frozen=True)
class Remedy:
    """Changes that make a plan fit, and what they do to the place that was too small."""

    changes: tuple[Change, ...]
    place: MemoryTier
    before: int
    after: int

    def __str__(self) -> str:
        return f"{' '.join(map(str, self.changes))}: {format_size(self.before)} → {format_size(self.after)}"

    def summary(self) -> dict[str, Any]:
        """For a JSON reader."""
        changes = {change.option: change.value for change in self.changes}
        return {"changes": changes, "place": self.place, "before": self.before, "after": self.after}


Replan = Callable[[Mapping[str, object]], MemoryPlan]
"""The plan with other values of options."""

MOST_CHANGES = 4


def smallest_change(plan: MemoryPlan, ladder: Sequence[Change], replan: Replan) -> Remedy | None:
    """The first of `ladder`, else the first two, three or four together, with which all memory is enough. None if
    nothing helps, or nothing has to. `ladder` goes from what costs least to what costs most; the disk has no rung.
    """
    lacking = [lack for lack in plan.lacks if lack.place != "disk"]
    if not lacking:
        return None
    first, places = lacking[0], {lack.place for lack in lacking}

    def saves(change: Change) -> bool:
        other = replan({change.option: change.value})
        return any(
            after.total(place) < before.total(place)
            for place in places
            for before, after in zip(plan.phases, other.phases, strict=True)
        )

    def is_enough(other: MemoryPlan) -> bool:
        return all(lack.place == "disk" for lack in other.lacks)

    helpful = [change for change in ladder if saves(change)]
    for count in range(1, MOST_CHANGES + 1):
        for changes in itertools.combinations(helpful, count):
            values = {change.option: change.value for change in changes}
            if len(values) < count:
                continue
            other = replan(values)
            if is_enough(other):
                return Remedy(changes, first.place, first.needed, other.peak(first.place))
    return None


def with_less(plan: MemoryPlan, phase: PlannedPhase, place: MemoryTier, there: int) -> MemoryPlan:
    """`plan` as a failed allocation has corrected it: `phase` alone, on a machine with `there` bytes in `place`."""
    only = tuple(each for each in plan.phases if each.phase == phase)
    limits = {"accelerator": plan.machine.accelerator, "ram": plan.machine.ram, place: there}
    return replace(plan, phases=only, machine=Machine(limits["accelerator"], limits["ram"] or 0, None))


NAMES: Mapping[MemoryTier, str] = {"accelerator": "GPU", "ram": "RAM", "disk": "disk"}


def plan_title(plan: MemoryPlan) -> str:
    """What the sizes of a plan are of: "Memory plan, worst moment of each phase", with several processes whose."""
    title = "Memory plan, worst moment of each phase"
    if plan.processes == 1:
        return title
    whose = "RAM of all" if plan.machines == 1 else "RAM of each machine"
    if plan.machine.accelerator is not None:
        whose = f"GPU of each process, {whose}"
    return f"{title} ({plan.described_processes}; {whose})"


def phase_line(phase: PhasePlan) -> str:
    """A phase in one line: "train (1024x1024 × 1): GPU 19.40 GiB (weights 16.91, activations 2.33, …)"."""
    told = []
    for place in MEMORY_TIERS:
        parts = sorted((part for part in phase.parts if part.place == place), key=lambda part: -part.size)
        if phase.total(place):
            shown = ", ".join(f"{part.name} {format_size(part.size)}" for part in parts[:4] if part.size)
            told.append(f"{NAMES[place]} {format_size(phase.total(place))} ({shown})")
    return f"{phase.phase} ({phase.what}): {'; '.join(told)}"


def plan_table(plan: MemoryPlan) -> list[str]:
    """Every part of every phase, for a terminal."""
    rows: list[tuple[str, ...]] = [("", *(NAMES[place] for place in MEMORY_TIERS), "read")]
    for phase in plan.phases:
        totals = (format_size(phase.total(place)) for place in MEMORY_TIERS)
        rows.append((f"{phase.phase}: {phase.what}", *totals, format_size(phase.read)))
        for name in dict.fromkeys(part.name for part in phase.parts):
            own = {part.place: part.size for part in phase.parts if part.name == name}
            rows.append((f"  {name}", *(format_size(own[place]) if place in own else "" for place in MEMORY_TIERS), ""))
    return aligned_rows(rows)


def engine_table(plans: Mapping[Engine, MemoryPlan]) -> list[str]:
    """What each engine takes and sends, and the estimated time of that, for a terminal."""
    rows: list[tuple[str, ...]] = []
    for engine, plan in plans.items():
        places = [place for place in MEMORY_TIERS[:2] if plan.machine.has(place) is not None]
        wire = plan.wire or Wire(0, 0)
        if not rows:
            rows.append(("engine", *(NAMES[place] for place in places), "sent a step", *wire.links))
        times = map(format_seconds, wire.seconds().values())
        rows.append(
            (ENGINES[engine], *(format_size(plan.peak(place)) for place in places), format_size(wire.total), *times)
        )
    return aligned_rows(rows)


def aligned_rows(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def verdict(plan: MemoryPlan) -> str:
    """Whether it fits, in a sentence."""
    said = []
    for place in MEMORY_TIERS:
        there = plan.machine.has(place)
        if there is not None and (plan.peak(place) or place != "disk"):
            at = "" if place == "disk" else f" ({plan.worst(place).phase})"
            each = "" if plan.machines == 1 else f" on each of {plan.machines} machines"
            if place == "accelerator":
                each = "" if plan.processes == 1 else f" in each of {plan.processes}"
            said.append(f"{NAMES[place]} {format_size(plan.peak(place))}{at} of {format_size(there)}{each}")
    if plan.fits:
        return f"It fits: {', '.join(said)}."
    names = " and ".join(NAMES[lack.place] for lack in plan.lacks)
    return f"It does not fit, for want of {names}: {', '.join(said)}."
