"""Which engine is advised, and what a plan of several processes says."""

from pathlib import Path
from typing import Any

import pytest
import torch

from simpletuner.base.sizes import GIB
from simpletuner.config.flavours import FLAVOURS
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Workload
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.world import World
from simpletuner.train.budget import Budget, free_resources, ladder, least_free_resources, with_processes

CPU = torch.device("cpu")
WORK = Workload((1024, 1024), 1, samples_images=False)
DEV = {"model_flavour": "dev", **FLAVOURS["dev"].option_defaults, "mixed_precision": "bf16"}


def budget(vram_gib: int, ranks: int, ram_gib: int = 256, **options: object) -> Budget:
    config = RunConfig.model_validate({**DEV, "num_processes": ranks, **options})
    return Budget(config, WORK, MachineMemory.of_size(float(vram_gib * GIB), float(ram_gib * GIB)))


def test_copies_are_taken_where_one_gpu_holds_the_run() -> None:
    advice = budget(80, 2).advice
    assert advice.engine == "ddp"
    assert advice.text.startswith("Use DDP: each process holds the whole run, 65.")
    assert advice.peaks["fsdp2"] < advice.peaks["ddp"]
    other = budget(80, 2, fsdp_enable=True)
    assert other.advice.text.startswith("Use DDP (without --fsdp_enable): ")
    assert other.lines()[-1] == other.advice.text
    assert budget(80, 2).lines()[-1] != advice.text


def test_shards_are_taken_where_copies_do_not_fit() -> None:
    own = budget(48, 2)
    assert own.advice.engine == "fsdp2"
    assert own.advice.text.startswith("Use FSDP2 (--fsdp_enable): whole copies take 65.")
    assert own.remedy is not None
    assert str(own.remedy).startswith("--fsdp_enable=true: 65.")
    assert own.remedy.after == own.advice.peaks["fsdp2"]
    assert budget(48, 2, fsdp_enable=True).plan.fits


@pytest.mark.parametrize("vram_gib", [24, 32])
def test_the_fewest_gpus_that_fit_are_the_fewest(vram_gib: int) -> None:
    own = budget(vram_gib, 2)
    advice = own.advice
    assert (advice.engine, own.plan.fits) == (None, False)
    fewest = advice.fewest_gpus
    assert fewest is not None
    assert f"These options fit on {fewest} such GPUs or more, with --fsdp_enable." in advice.text
    assert budget(vram_gib, fewest, fsdp_enable=True).plan.fits
    assert not budget(vram_gib, fewest - 1, fsdp_enable=True).plan.fits
    assert own.remedy is not None, "or quantize, or stream the blocks"


def test_of_one_gpu_it_says_whether_it_is_enough_and_how_many_are() -> None:
    assert budget(80, 1).advice.text.startswith("One process holds the run: ")
    advice = budget(48, 1).advice
    assert (advice.engine, advice.fewest_gpus) == (None, 2)
    assert budget(2, 1, ram_gib=4).advice.fewest_gpus is None


def test_zero_is_compared_with_the_others_and_kept_where_it_sends_less() -> None:
    lora = budget(48, 2)
    assert set(lora.advice.plans) == {"ddp", "fsdp2", "zero1", "zero2", "zero3"}
    sent = lora.advice.summary()["sent"]
    assert sent["ddp"] < sent["zero1"] == sent["zero2"] < sent["fsdp2"] < sent["zero3"]
    own = budget(48, 2, deepspeed_config="zero3")
    assert own.advice.text.startswith("Use ZeRO-3 (--deepspeed_config=zero3): whole copies take 65.")
    idle = budget(80, 2, deepspeed_config="zero2").advice.text
    assert idle.startswith("Use DDP (without --deepspeed_config): each process holds the whole run, ")
    assert " a step, with ZeRO-2 " in idle
    full = {"model_type": "full", "model_flavour": "klein-4b", **FLAVOURS["klein-4b"].option_defaults}
    assert budget(80, 8, **full).advice.engine == "ddp"
    assert budget(80, 8, **full, deepspeed_config="zero2").advice.engine == "zero2"
    refused = budget(48, 2, enable_group_offload=True).advice
    assert "fsdp2" not in refused.plans
    assert refused.summary()["peaks"]["fsdp2"] is None


def test_a_stage_that_does_not_fit_is_changed_for_a_higher_one() -> None:
    own = budget(48, 2, deepspeed_config="zero1")
    assert str(own.remedy).startswith("--deepspeed_config=zero3: 6")
    assert own.remedy is not None
    assert own.remedy.after == budget(48, 2, deepspeed_config="zero3").plan.peak("accelerator")
    rungs = [(change.option, change.value) for change in ladder(own.config, WORK)]
    assert rungs[:2] == [("deepspeed_config", "zero2"), ("deepspeed_config", "zero3")]
    assert "fsdp_enable" not in dict(rungs)


def test_the_fewest_machines_that_fit_are_the_fewest() -> None:
    own = budget(24, 4, num_machines=2)
    fewest = own.advice.fewest_gpus
    assert fewest is not None
    assert fewest % 2 == 0
    text = f"These options fit on {fewest} such GPUs on {fewest // 2} machines or more, with --fsdp_enable."
    assert text in own.advice.text
    assert budget(24, fewest, num_machines=fewest // 2, fsdp_enable=True).plan.fits
    assert not budget(24, fewest - 2, num_machines=fewest // 2 - 1, fsdp_enable=True).plan.fits


def test_between_machines_the_network_counts() -> None:
    lines = budget(48, 16, fsdp_enable=True, num_machines=2).lines()
    assert lines[0].endswith("(16 processes on 2 machines, FSDP2; GPU of each process, RAM of each machine):")
    (sent,) = [line for line in lines if line.startswith("Each process sends ")]
    assert " over 400 Gbit/s InfiniBand (50 GB/s), " in sent
    assert "NVLink" not in sent
    assert " usable RAM on each of 2 machines" in budget(48, 16, num_machines=2).sentence()


def test_a_lack_of_ram_is_no_gpus() -> None:
    own = budget(24, 2, ram_gib=8, base_model_precision="int8-quanto", enable_group_offload=True)
    assert own.advice.engine != "ddp"
    assert " of 7.00 GiB RAM" in own.advice.text


def test_a_plan_says_whose_memory_it_is_and_what_travels() -> None:
    lines = budget(48, 2, fsdp_enable=True).lines()
    title = "Memory plan, worst moment of each phase (2 processes, FSDP2; GPU of each process, RAM of all):"
    assert lines[0] == title
    assert any("of 46.50 GiB in each of 2, RAM " in line for line in lines)
    assert any(line.startswith("2 processes together take ") for line in lines)
    (sent,) = [line for line in lines if line.startswith("Each process sends ")]
    assert sent == (
        "Each process sends 59.26 GiB of weights and 384.0 MiB of gradients a step; estimated, not measured: "
        "142 ms over NVLink (450 GB/s), 2.56 s over PCIe 4 x16 (25 GB/s)."
    )
    assert " usable VRAM on each of 2 GPUs and " in budget(48, 2).sentence()
    assert budget(48, 1).lines()[0] == "Memory plan, worst moment of each phase:"


def test_one_process_has_no_rung_of_several() -> None:
    rungs = [change.option for change in ladder(budget(24, 1).config, WORK)]
    assert not [option for option in rungs if "fsdp" in option]
    own = budget(24, 2, fsdp_enable=True, fsdp_reshard_after_forward=False)
    rungs = [change.option for change in ladder(own.config, WORK)]
    assert {"fsdp_reshard_after_forward", "fsdp_cpu_offload"} <= set(rungs)


@pytest.mark.parametrize(
    ("options", "gpus", "ranks"),
    [
        ({}, 4, 1),
        ({"fsdp_enable": True}, 4, 4),
        ({"fsdp_enable": True}, 0, 1),
        ({"num_processes": 2, "fsdp_enable": True}, 4, 2),
        ({"num_processes": 3}, 0, 3),
        ({"num_machines": 2}, 4, 2),
        ({"num_machines": 2, "fsdp_enable": True}, 4, 8),
        ({"deepspeed_config": "zero2"}, 4, 4),
    ],
)
def test_processes_are_as_many_as_train_would_start(options: dict[str, object], gpus: int, ranks: int) -> None:
    assert with_processes(RunConfig.model_validate(options), gpus).ranks == ranks


def test_alone_the_machine_is_this_one(tmp_path: Path) -> None:
    world = World.single()
    own, found = free_resources(world.device, tmp_path), least_free_resources(world, tmp_path)
    assert (found.accelerator, found.disk is None) == (own.accelerator, False)


class Beside(World):
    """A world of two, whose other rank has a card with 5 bytes left, and 7 bytes of RAM."""

    def gather_json(self, value: Any) -> list[Any]:
        return [value, {"accelerator": 5, "ram": 7, "disk": 1 << 62}]


def test_all_ranks_plan_for_what_is_free_to_any(tmp_path: Path) -> None:
    own = free_resources(CPU, tmp_path)
    found = least_free_resources(Beside(rank=0, size=2, device=CPU), tmp_path)
    assert (found.accelerator, found.ram) == (5, 7)
    assert found.disk is not None
    assert own.disk is not None
    assert found.disk <= 1.1 * own.disk
