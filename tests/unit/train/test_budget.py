"""What a run says before it takes memory, when it refuses, and what it says when memory ran out."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.tiers import others_slow
from torch.optim import Optimizer

from simpletuner.base.errors import ConfigError, MemoryBudgetError
from simpletuner.base.sizes import GIB
from simpletuner.cli.main import main
from simpletuner.config.load import LoadedConfig, load
from simpletuner.data.manifest import scan
from simpletuner.flux2.source import locate
from simpletuner.flux2.text import TextEncoder
from simpletuner.memory.peak import PeakMemory
from simpletuner.memory.planner import MachineMemory
from simpletuner.memory.world import World
from simpletuner.runs.events import Phase, read_events
from simpletuner.train.budget import (
    RESOLUTION,
    Budget,
    configured_workload,
    free_resources,
    ladder,
    quick_workload,
    scanned_workload,
)
from simpletuner.train.caches import EncoderKeys, PreparedData, fill_text
from simpletuner.train.job import Attempt, build, memory_is_explained, run
from simpletuner.train.report import Reporter

CARD = MachineMemory(int(22.5 * GIB), 28 * GIB, None)
CPU = torch.device("cpu")


@pytest.fixture
def project(own_folder: Path) -> Path:
    """Two pictures of 128 × 64, trained at their own shape."""
    folder = own_folder / "datasets"
    folder.mkdir()
    for index in range(2):
        Image.new("RGB", (128, 64), (90 * index, 0, 0)).save(folder / f"number {index}.png")
    (own_folder / "config").mkdir()
    config = {"model_flavour": "tiny", "output_dir": "out", "tokenizer_max_length": 160, "validation_disable": True}
    config |= {"max_train_steps": 1, "text_encoder_mode": "resident", "mixed_precision": "no", "max_workers": 1}
    (own_folder / "config" / "config.json").write_text(json.dumps(config))
    datasets: list[dict[str, Any]] = [
        {"id": "pictures", "type": "local", "instance_data_dir": "datasets", "resolution": 64, "crop": False}
    ]
    (own_folder / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    return own_folder


def loaded(*flags: str) -> LoadedConfig:
    return load(list(flags), folder=Path(), environ={})


def budget(machine: MachineMemory = CARD, *flags: str, **work: Any) -> Budget:
    found = loaded(*flags)
    return Budget(found.config, replace(configured_workload(found), **work), machine)


DEV = ("--model_flavour=dev", "--mixed_precision=bf16", "--text_encoder_mode=auto", "--tokenizer_max_length=512")


@pytest.mark.usefixtures("project")
def test_the_work_is_configured_then_seen() -> None:
    found = loaded("--train_batch_size=2")
    assert (
        configured_workload(found).bucket,
        configured_workload(found).batch,
        configured_workload(found).cached_images,
    ) == ((64, 64), 2, None)
    seen = quick_workload(found)
    assert (seen.bucket, seen.batch, seen.cached_images, seen.captions) == ((80, 48), 2, 2, 3)
    manifests = [scan(each, seed=0, workers=1, report=lambda *_: None) for each in found.datasets.train_sets]
    assert scanned_workload(found, manifests) == seen


@pytest.mark.usefixtures("project")
def test_many_new_pictures_are_not_looked_at_and_known_ones_are() -> None:
    assert quick_workload(loaded(), limit=1).cached_images is None
    assert quick_workload(loaded()).cached_images == 2
    assert quick_workload(loaded(), limit=0).cached_images == 2


def test_references_of_validation_prompts_are_counted(project: Path) -> None:
    for name, size in (("wide", (2048, 512)), ("small", (64, 96))):
        Image.new("RGB", size, (0, 90, 0)).save(project / f"{name}.png")
    prompts = {
        "both": {"prompt": "a ball", "references": ["wide.png", "small.png"]},
        "one": {"prompt": "a box", "references": ["wide.png"]},
        "none": "a cone",
    }
    (project / "prompts.json").write_text(json.dumps(prompts))
    flags = ("--validation_disable=false", "--validation_prompt_library=false", "--user_prompt_library=prompts.json")
    assert configured_workload(loaded(*flags)).prompt_reference_tokens == 2 * 64 * 64
    seen = quick_workload(loaded(*flags))
    assert (seen.prompt_reference_tokens, seen.cached_images, seen.largest_encoded_size) == (
        128 * 32 + 4 * 6,
        4,
        (2048, 512),
    )
    held = [Budget(loaded(*flags).config, work, CARD) for work in (seen, replace(seen, prompt_reference_tokens=0))]
    assert held[0].summary()["workload"]["pictures"] == 2  # its images: references are none
    assert "(2 images)" in held[0].table()[0]
    assert (
        quick_workload(loaded()).prompt_reference_tokens == configured_workload(loaded()).prompt_reference_tokens == 0
    )
    drawing, without = (each.plan.phase("validation") for each in held)
    assert drawing is not None
    assert without is not None
    assert drawing.total("accelerator") > without.total("accelerator")
    (project / "small.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"reference .*small\.png"):
        quick_workload(loaded(*flags))


@pytest.mark.usefixtures("project")
def test_a_smaller_resolution_has_smaller_strict_references() -> None:
    given = budget(CARD, bucket=(1024, 1024), references=3 * 4096, strict_references=2 * 4096)
    smaller = replace(given.workload, bucket=(512, 512), references=4096 + 2 * 1024, strict_references=2 * 1024)
    assert given.with_changes({RESOLUTION: 512.0}) == replace(given, workload=smaller).plan


def test_sets_of_strict_references_are_counted_with_the_image(project: Path) -> None:
    path = project / "config" / "multidatabackend.json"
    (images,) = json.loads(path.read_text())
    sets = [images | {"conditioning_data": ["strict", "loose"]}]
    for name in ("strict", "loose"):
        (project / name).mkdir()
        Image.new("RGB", (64, 64) if name == "loose" else (128, 64)).save(project / name / "number 1.png")
        keys = {"id": name, "dataset_type": "conditioning", "conditioning_type": f"reference_{name}"}
        sets.append(
            keys | {"instance_data_dir": name, "resolution": 128}
            if name == "loose"
            else keys | {"instance_data_dir": name}
        )
    path.write_text(json.dumps(sets))
    assumed, seen = configured_workload(loaded()), quick_workload(loaded())
    assert (assumed.references, assumed.strict_references) == (64 // 16 * 4 + 8 * 8, 16)
    assert (seen.references, seen.strict_references) == (5 * 3 + 16, 5 * 3)


@pytest.mark.usefixtures("project")
def test_it_refuses_where_training_does_not_fit_and_says_what_would() -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        budget(CARD, *DEV, bucket=(1024, 1024)).check()
    told = str(caught.value)
    assert told.startswith("train (1024x1024 × 1): GPU 65.")
    fitting = "--base_model_precision=int8-quanto --enable_group_offload=true"
    assert f"but only 22.50 GiB of the GPU are free. It would fit with {fitting}" in told
    assert caught.value.exit_code == 5


@pytest.mark.usefixtures("project")
def test_it_refuses_neither_ram_nor_what_fills_caches_nor_a_cpu() -> None:
    budget(MachineMemory(80 * GIB, 1, 1), *DEV).check()
    budget(MachineMemory(None, 1, 1), *DEV).check()
    small = budget(MachineMemory(GIB // 8, GIB, None), "--validation_disable=false", bucket=(64, 64))
    assert small.plan.lacks == ()
    resident = budget(MachineMemory(70 * GIB, 28 * GIB, None), *DEV)
    wide = replace(resident, machine=MachineMemory(resident.plan.phases[2].total("accelerator"), 28 * GIB, None))
    assert wide.plan.phases[0].total("accelerator") < wide.plan.phases[2].total("accelerator")
    wide.check()


@pytest.mark.slow
@pytest.mark.usefixtures("project")
def test_every_rung_lowers_something_and_leads_where_it_says() -> None:
    own = budget(
        CARD,
        *DEV,
        "--text_encoder_mode=resident",
        "--gradient_checkpointing_interval=2",
        "--use_ema",
        "--ema_device=accelerator",
        "--vae_batch_size=2",
        bucket=(1280, 1280),
        batch=2,
        samples_images=True,
    )
    before = own.plan
    rungs = list(ladder(own.config, own.workload))
    assert RESOLUTION in [rung.option for rung in rungs]
    for rung in rungs:
        after = own.with_changes({rung.option: rung.value})
        assert any(
            new.total("accelerator") < old.total("accelerator")
            for old, new in zip(before.phases, after.phases, strict=True)
        ), rung
    remedy = own.remedy
    assert remedy is not None
    other = own.with_changes({change.option: change.value for change in remedy.changes})
    assert not [lack for lack in other.lacks if lack.place != "disk"]
    assert other.peak("accelerator") == remedy.after


RUNS = [
    (),
    ("--gradient_checkpointing=false",),
    ("--gradient_checkpointing_interval=2", "--use_ema", "--ema_device=accelerator", "--vae_batch_size=2"),
    ("--base_model_precision=int8-quanto", "--train_batch_size=2"),
    ("--enable_group_offload",),
    ("--dynamo_backend=inductor",),
    ("--model_type=full", "--optimizer=muon"),
]


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("flags", others_slow(RUNS, (), RUNS[2], RUNS[4]), ids=" ".join)
def test_every_rung_works_as_it_is_typed(flags: tuple[str, ...]) -> None:
    work = {"bucket": (1280, 1280), "samples_images": True}
    own = budget(CARD, *DEV, *flags, **work)
    for rung in own.rungs:
        typed = str(rung)
        if typed.startswith("--"):
            there = budget(CARD, *DEV, *flags, typed, **work)
        elif typed.startswith("no --"):
            there = budget(CARD, *DEV, *(flag for flag in flags if not flag.startswith(typed[3:])), **work)
        else:
            assert typed == f"{rung.option}={rung.value} in each image set"
            continue
        assert there.plan.summary() == own.with_changes({rung.option: rung.value}).summary(), typed


@pytest.mark.usefixtures("project")
def test_a_batch_of_an_image_set_is_changed_there() -> None:
    rungs = [str(rung) for rung in budget(CARD, *DEV, "--train_batch_size=2", batch=4).rungs]
    assert "train_batch_size=1 in each image set" in rungs
    assert "--train_batch_size=1" not in rungs


GPU_PEAK = PeakMemory(4 * GIB, int(22.4 * GIB), 22 * GIB)


@pytest.mark.usefixtures("project")
def test_a_failed_allocation_is_explained() -> None:
    own = budget(CARD, *DEV, "--base_model_precision=int4-quanto", bucket=(512, 512))
    assert own.plan.fits
    told = " ".join(own.explain("train", "accelerator", GPU_PEAK, has_checkpoint=False))
    assert told.startswith("The plan was train (512x512 × 1): GPU 20.")
    assert (
        "; the measured peak is 22.00 GiB, 22.40 GiB reserved. Use less memory with --enable_group_offload=true: "
        in told
    )
    assert own.explain("export", "accelerator", GPU_PEAK, has_checkpoint=False) == []
    assert own.explain(None, "accelerator", GPU_PEAK, has_checkpoint=False) == []


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("phase", "line", "change"),
    [
        ("text", "text (resident, 8 × 512 tokens): GPU 33", "--text_encoder_mode=streamed: 33"),
        ("latents", "latents (1024x1024 × 4): GPU 5", "--vae_batch_size=1: 5"),
        ("load", "train (1024x1024 × 1): GPU 2", "--enable_group_offload=true: 2"),
        ("validation", "validation (1024x1024, 20 passes): GPU 2", "--enable_group_offload=true: 2"),
    ],
)
def test_each_phase_is_explained_by_its_own_plan(phase: Phase, line: str, change: str) -> None:
    flags = ("--text_encoder_mode=resident", "--vae_batch_size=4", "--base_model_precision=int4-quanto")
    own = budget(CARD, *DEV, *flags, "--validation_resolution=1024x1024", bucket=(1024, 1024), samples_images=True)
    planned, remedy = own.explain(phase, "accelerator", GPU_PEAK, has_checkpoint=False)
    assert planned.startswith(f"The plan was {line}")
    assert remedy.startswith(f"Use less memory with {change}")


@pytest.mark.usefixtures("project")
def test_full_host_memory_beside_a_gpu_is_explained_by_the_plan_for_ram() -> None:
    own = budget(CARD, *DEV, "--enable_group_offload", bucket=(512, 512))
    told = " ".join(own.explain("train", "ram", PeakMemory(60 * GIB, GIB, GIB), has_checkpoint=False))
    assert "the measured peak is 60.00 GiB of RAM. Use less memory with --base_model_precision=int8-quanto: 4" in told


@pytest.mark.usefixtures("project")
def test_a_run_with_checkpoints_is_told_what_a_resumed_run_may_change() -> None:
    own = budget(MachineMemory(90 * GIB, 128 * GIB, None), *DEV, "--gradient_checkpointing=false", bucket=(1024, 1024))
    peak = PeakMemory(GIB, 90 * GIB, 90 * GIB)
    fresh, resumed = (own.explain("train", "accelerator", peak, has_checkpoint=saved)[1] for saved in (False, True))
    assert fresh.startswith("Use less memory with --gradient_checkpointing=true: ")
    assert resumed.startswith("Use less memory with --enable_group_offload=true: ")
    offloaded = budget(
        own.machine, *DEV, "--gradient_checkpointing=false", "--enable_group_offload", bucket=(2048, 2048)
    )
    resumed = offloaded.explain("train", "accelerator", peak, has_checkpoint=True)[1]
    assert resumed.startswith("Use less memory with --gradient_checkpointing=true: ")
    assert resumed.endswith(", in a new run: give another --output_dir too.")


STREAMED = ("--base_model_precision=int8-quanto", "--enable_group_offload")


@pytest.mark.usefixtures("project")
def test_fewer_resident_blocks_are_the_first_remedy() -> None:
    own = budget(replace(CARD, ram=64 * GIB), *DEV, *STREAMED, "--group_offload_resident_blocks=40", bucket=(512, 512))
    with pytest.raises(
        MemoryBudgetError, match=r"40 of 56 blocks resident.*It would fit with --group_offload_res"
    ) as told:
        own.check()
    assert own.remedy is not None
    (change,) = own.remedy.changes
    assert f"{change}: " in str(told.value)
    # What is named works when it is typed, and is what `auto` takes.
    typed = budget(own.machine, *DEV, *STREAMED, str(change), bucket=(512, 512))
    typed.check()
    auto = budget(own.machine, *DEV, *STREAMED, bucket=(512, 512))
    assert auto.plan.peak("accelerator") == typed.plan.peak("accelerator") == own.remedy.after
    assert auto.remedy is None


@pytest.mark.usefixtures("project")
def test_after_a_failed_allocation_auto_is_told_to_keep_fewer() -> None:
    own = budget(replace(CARD, ram=64 * GIB), *DEV, *STREAMED, bucket=(512, 512))
    count = own.footprint.resolved_config.resident_blocks
    told = own.explain("train", "accelerator", PeakMemory(GIB, 21 * GIB, 21 * GIB), has_checkpoint=False)[-1]
    fewer = int(told.partition("Use less memory with --group_offload_resident_blocks=")[2].partition(":")[0])
    assert count is not None
    assert 0 < fewer < count


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_ends_with_the_plan_and_exit_code_5(error: Exception) -> None:
    attempt = attempted()
    attempt.reporter.last_phase = "train"
    attempt.reporter.activity = "training step 3 (2 × 64x64)"
    with pytest.raises(MemoryBudgetError) as caught, memory_is_explained(attempt):
        raise error
    told = str(caught.value)
    assert told.startswith(str(error).splitlines()[0] if str(error) else "out of memory")
    assert "It happened while training step 3 (2 × 64x64). The plan was train (64x64 × 1): RAM " in told
    assert "the measured peak is " in told
    assert told.endswith("Caches and checkpoints are kept.")


class Exhausting(Optimizer):
    """Runs out of memory at its second step."""

    def __init__(self, params: Any, lr: float, **_given: Any) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0

    def step(self) -> None:  # type: ignore[override]
        self.steps += 1
        if self.steps == 2:
            torch.empty(2**50)


@pytest.mark.usefixtures("project")
def test_memory_that_runs_out_in_mid_run_names_the_step_and_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", Exhausting)
    with pytest.raises(MemoryBudgetError) as caught:
        run(build(loaded("--max_train_steps=3", "--checkpoint_step_interval=1"), World.single()))
    told = str(caught.value)
    assert "DefaultCPUAllocator: can't allocate memory" in told
    assert "It happened while training step 2 (1 × 80x48). The plan was train (80x48 × 1): RAM " in told
    (error,) = [event for event in read_events(Path("out/events.jsonl")) if event["type"] == "error"]
    assert (error["exit_code"], error["text"]) == (5, told)


@pytest.mark.usefixtures("project")
def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_is_explained(attempted()):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="illegal memory access"), memory_is_explained(attempted()):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def attempted() -> Attempt:
    from simpletuner.runs.process import Requests

    job = build(loaded(), World.single())
    job.run.create()
    return Attempt(job, Reporter(), Requests(job.run.control))


@pytest.mark.usefixtures("project")
def test_this_machine_has_what_is_free_here() -> None:
    machine = free_resources(CPU, Path("nowhere/yet"))
    assert machine.accelerator is None
    assert machine.ram > 0
    assert machine.disk is not None


@pytest.mark.usefixtures("project")
def test_a_run_begins_with_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Memory plan, worst moment of each phase:")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["text", "latents", "train"]
    assert lines[start + 4].startswith("It fits: RAM ")
    assert any(line.startswith("Planned with the largest images: train (80x48 × 1)") for line in lines)
    plans = [event for event in read_events(Path("out/events.jsonl")) if event["type"] == "plan"]
    assert [len(event["plan"]["phases"]) for event in plans] == [3, 3]
    assert plans[0]["remedy"] is None
    peak = plans[1]["plan"]["peak"]["ram"]
    assert 0 < peak < GIB


def text_encoders() -> list[TextEncoder]:
    """Those that are alive in this process."""
    return [each for each in gc.get_objects() if issubclass(type(each), TextEncoder)]


@pytest.mark.usefixtures("project")
def test_the_text_encoder_is_gone_when_pictures_are_encoded(tiny_folder: Path) -> None:
    found = loaded(f"--pretrained_model_name_or_path={tiny_folder}")
    source = locate(found.config, report=print)
    manifests = tuple(scan(each, seed=0, workers=1, report=lambda *_: None) for each in found.datasets.train_sets)
    prepared = PreparedData(found, EncoderKeys.of(found.config, source), manifests, ())
    gc.collect()
    before = text_encoders()  # of fixtures that other tests in this process share
    gc.disable()  # so that only the function's own collection counts
    try:
        fill_text(prepared, source, World(0, 1, CPU), Reporter(), verify=False)
        assert not [each for each in text_encoders() if not any(each is other for other in before)]
    finally:
        gc.enable()


@pytest.mark.usefixtures("project")
def test_captions_that_spell_control_tokens_are_told_once_with_their_number(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = loaded(f"--pretrained_model_name_or_path={tiny_folder}")
    next(Path("datasets").glob("*.png")).rename("datasets/a sign, [INST].png")
    source = locate(found.config, report=print)
    manifests = tuple(scan(each, seed=0, workers=1, report=lambda *_: None) for each in found.datasets.train_sets)
    prepared = PreparedData(found, EncoderKeys.of(found.config, source), manifests, ())
    fill_text(prepared, source, World(0, 1, CPU), Reporter(), verify=False)
    told = [line for line in "".join(capsys.readouterr()).splitlines() if "control tokens" in line]
    assert len(told) == 1
    assert "1 caption spells control tokens" in told[0]
    assert told[0].endswith(
        "[INST]. Unless that is intended, spell them differently (with a space inside): a sign, [INST]"
    )


@pytest.mark.usefixtures("project")
def test_the_plan_says_what_is_left_out_of_the_longest_caption() -> None:
    assert budget(CARD, *DEV)._longest_caption() == []
    (told,) = budget(CARD, *DEV, caption_tokens=512, tokenizer=Path("tokenizer"))._longest_caption()
    assert told.endswith("counted with tokenizer/tokenizer.json.")
    (told,) = budget(CARD, *DEV, caption_tokens=513, tokenizer=Path("tokenizer"))._longest_caption()
    assert told.endswith("tokenizer.json; tokens beyond 512 are truncated.")
    (told,) = budget(CARD, *DEV, caption_tokens=513)._longest_caption()
    assert told.endswith("this disk; tokens beyond 512 would be truncated.")
