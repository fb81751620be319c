"""Parts, places, verdicts, and what to change."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from simpletuner.base.sizes import GIB
from simpletuner.memory.planner import (
    MachineMemory,
    MemoryPart,
    MemoryPlan,
    OptionValue,
    PhasePlan,
    engine_table,
    phase_line,
    plan_table,
    plan_title,
    smallest_change,
    verdict,
    with_less_memory,
)
from simpletuner.memory.wire import Wire


def plan(train: float, *, ram: float = 2.0, machine: MachineMemory | None = None) -> MemoryPlan:
    """A plan of two phases, in GiB."""
    phases = (
        PhasePlan("text", "8 × 512", (MemoryPart("weights", "accelerator", GIB), MemoryPart("cache", "disk", GIB)), 0),
        PhasePlan(
            "train",
            "1024x1024 × 1",
            (
                MemoryPart("weights", "accelerator", int(train * GIB) - GIB),
                MemoryPart("activations", "accelerator", GIB),
                MemoryPart("average", "ram", int(ram * GIB)),
                MemoryPart("checkpoints", "disk", 3 * GIB),
            ),
            64,
        ),
    )
    return MemoryPlan(machine or MachineMemory(22 * GIB, 28 * GIB, 100 * GIB), phases)


def test_memory_is_the_worst_phase_and_the_disk_all_of_them() -> None:
    own = plan(20)
    assert [own.peak(place) for place in ("accelerator", "ram", "disk")] == [20 * GIB, 2 * GIB, 4 * GIB]
    assert own.fits
    assert own.lacks == ()


def test_every_place_that_is_too_small_is_named() -> None:
    own = plan(30, ram=40, machine=MachineMemory(22 * GIB, 28 * GIB, 3 * GIB))
    assert [(lack.place, lack.phase.phase, lack.needed, lack.there) for lack in own.lacks] == [
        ("accelerator", "train", 30 * GIB, 22 * GIB),
        ("ram", "train", 40 * GIB, 28 * GIB),
        ("disk", "train", 4 * GIB, 3 * GIB),
    ]
    assert verdict(own) == (
        "It does not fit, for lack of GPU and RAM and disk: GPU 30.00 GiB (train) of 22.00 GiB, "
        "RAM 40.00 GiB (train) of 28.00 GiB, disk 4.00 GiB of 3.00 GiB."
    )


def test_of_several_machines_it_says_whose_memory_it_is() -> None:
    own = replace(plan(20), processes=16, machines=2, engine="zero2", wire=Wire(GIB, GIB, 2))
    assert own.processes_per_machine == 8
    assert plan_title(own) == (
        "Memory plan, worst moment of each phase (16 processes on 2 machines, ZeRO-2; GPU of each process, RAM of each "
        "machine)"
    )
    assert verdict(own) == (
        "It fits: GPU 20.00 GiB (train) of 22.00 GiB in each of 16, RAM 2.00 GiB (train) of 28.00 GiB on each of 2 "
        "machines, disk 4.00 GiB of 100.00 GiB on each of 2 machines."
    )
    assert own.summary()["machines"] == 2
    head, row = engine_table({"zero2": own})
    assert head.split()[:4] == ["engine", "GPU", "RAM", "sent"]
    assert row.split() == [
        "ZeRO-2",
        "20.00",
        "GiB",
        "2.00",
        "GiB",
        "2.00",
        "GiB",
        "42.9",
        "ms",
        "172",
        "ms",
        "1.72",
        "s",
    ]


@pytest.mark.parametrize(("vram", "left"), [(24.0, 22.5), (16.0, 14.5), (12.0, 10.5), (8.0, 7.0)])
def test_a_card_leaves_less_than_it_has(vram: float, left: float) -> None:
    machine = MachineMemory.of_size(vram * GIB, 32.0 * GIB)
    assert machine == MachineMemory(int(left * GIB), 28 * GIB, None)


def test_a_machine_without_a_card() -> None:
    assert (
        MachineMemory.of_size(0.0, 8.0 * GIB)
        == MachineMemory.of_size(None, 8.0 * GIB)
        == MachineMemory(None, 7 * GIB, None)
    )
    own = MemoryPlan(
        MachineMemory(None, 7 * GIB, None), (PhasePlan("train", "", (MemoryPart("weights", "ram", 8 * GIB),), 0),)
    )
    assert [lack.place for lack in own.lacks] == ["ram"]


LADDER = (
    OptionValue("gradient_checkpointing", True),
    OptionValue("base_model_precision", "int8"),
    OptionValue("base_model_precision", "int4"),
    OptionValue("useless", 1),
    OptionValue("train_batch_size", 1),
)
SAVED = {"gradient_checkpointing": 4, "int8": 10, "int4": 15, "train_batch_size": 6, "useless": 0}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (25, "--gradient_checkpointing=true: 25.00 GiB → 21.00 GiB"),
        (30, "--base_model_precision=int8: 30.00 GiB → 20.00 GiB"),
        (35, "--base_model_precision=int4: 35.00 GiB → 20.00 GiB"),
        (40, "--gradient_checkpointing=true --base_model_precision=int4: 40.00 GiB → 21.00 GiB"),
        (47, "--gradient_checkpointing=true --base_model_precision=int4 --train_batch_size=1: 47.00 GiB → 22.00 GiB"),
        (49, "None"),
        (20, "None"),
    ],
)
def test_the_first_rung_then_the_first_few_together(start: float, expected: str) -> None:
    def replan(changes: Mapping[str, object]) -> MemoryPlan:
        saved = sum(SAVED[str(value) if str(value) in SAVED else option] for option, value in changes.items())
        return plan(start - saved)

    assert str(smallest_change(plan(start), LADDER, replan)) == expected


def test_a_change_is_told_as_it_is_typed() -> None:
    assert str(OptionValue("enable_group_offload", True)) == "--enable_group_offload=true"
    assert str(OptionValue("gradient_checkpointing_interval", None)) == "no --gradient_checkpointing_interval"
    assert str(OptionValue("resolution", 768, "in each image set")) == "resolution=768 in each image set"


def test_the_disk_is_nobodys_to_mend() -> None:
    own = plan(20, machine=MachineMemory(22 * GIB, 28 * GIB, GIB))
    assert not own.fits
    assert smallest_change(own, LADDER, lambda changes: own) is None
    short = plan(30, machine=MachineMemory(22 * GIB, 28 * GIB, GIB))
    remedy = smallest_change(short, LADDER, lambda changes: own if changes else short)
    assert remedy is not None
    assert remedy.summary() == {
        "changes": {"gradient_checkpointing": True},
        "place": "accelerator",
        "before": 30 * GIB,
        "after": 20 * GIB,
    }


def test_a_failed_allocation_corrects_the_phase_it_was_in() -> None:
    less = with_less_memory(plan(20), "train", "accelerator", 15 * GIB)
    assert [phase.phase for phase in less.phases] == ["train"]
    assert [(lack.place, lack.there) for lack in less.lacks] == [("accelerator", 15 * GIB)]


def test_it_reads_as_one_line_as_a_table_and_as_json() -> None:
    own = plan(20)
    assert phase_line(own.phases[1]) == (
        "train (1024x1024 × 1): GPU 20.00 GiB (weights 19.00 GiB, activations 1.00 GiB); RAM 2.00 GiB "
        "(average 2.00 GiB); disk 3.00 GiB (checkpoints 3.00 GiB)"
    )
    lines = plan_table(own)
    assert lines[0].split() == ["GPU", "RAM", "disk", "read"]
    assert lines[1].split("  ")[0] == "text: 8 × 512"
    assert len({line.index(" GiB") for line in lines[1:] if line.count("GiB") >= 2}) == 1
    summary = own.summary()
    assert summary["peak"] == {"accelerator": 20 * GIB, "ram": 2 * GIB, "disk": 4 * GIB}
    assert summary["phases"][1]["parts"][1] == {"name": "activations", "place": "accelerator", "bytes": GIB}
    assert summary["fits"] is True
