"""The plan's phase of a preview model."""

from simpletuner.base.sizes import GIB
from simpletuner.config.run import RunConfig
from simpletuner.flux2.footprint import Architecture, Footprint, Workload
from simpletuner.memory.planner import MachineMemory

KLEIN = {
    "model_flavour": "klein-9b",
    "gradient_checkpointing": True,
    "validation_preview_model": "auto",
    "validation_num_inference_steps": 4,
}


def footprint(machine: MachineMemory, **options: object) -> Footprint:
    config = RunConfig.model_validate({**KLEIN, **options})
    return Footprint(config, Architecture.of(config), Workload((1024, 1024), 1), machine)


def weights_in(foot: Footprint, place: str) -> dict[str, int]:
    phase = foot.plan().phase("preview")
    assert phase is not None
    return {part.name: part.size for part in phase.parts if part.place == place}


def test_the_base_leaves_the_gpu_for_a_preview_where_both_do_not_fit_and_stays_where_they_do() -> None:
    small, large = (footprint(MachineMemory.of_size(float(gib * GIB), 64.0 * GIB), use_ema=True) for gib in (24, 80))
    assert (small.offloads_base, large.offloads_base) == (True, False)
    assert small.plan().fits
    on_gpu, waiting = weights_in(small, "accelerator"), weights_in(small, "ram")
    assert on_gpu.keys() & {"weights", "optimizer", "average"} == set()
    parts = weights_in(large, "accelerator")
    assert waiting["offloaded base"] == parts["weights"] + parts["optimizer"] + parts["average"]
    assert on_gpu["preview weights"] == parts["preview weights"] == parts["weights"]
    phase = small.plan().phase("preview")
    assert phase is not None
    assert phase.what == "1024x1024, 4 passes, base in RAM"


def test_a_streamed_run_streams_its_preview_model_within_the_same_card() -> None:
    foot = footprint(
        MachineMemory.of_size(12.0 * GIB, 64.0 * GIB), enable_group_offload=True, base_model_precision="int8-quanto"
    )
    assert foot.plan().fits
    parts = weights_in(foot, "accelerator")
    assert parts["preview slots for blocks"] == parts["slots for blocks"]


def test_without_a_preview_model_validation_is_planned_as_before() -> None:
    foot = footprint(MachineMemory.of_size(24.0 * GIB, 64.0 * GIB), validation_preview_model=None)
    assert [phase.phase for phase in foot.plan().phases] == ["text", "latents", "train", "validation"]
