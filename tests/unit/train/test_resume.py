"""How a resumed run may divide the effective batch: what is said, refused and remembered."""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import in_ranks
from tests.thread_ranks import on_ranks

from simpletuner.base.errors import CheckpointError
from simpletuner.config.load import LoadedConfig, load
from simpletuner.config.record import recorded_options
from simpletuner.config.run import RunConfig
from simpletuner.data.manifest import Manifest
from simpletuner.memory.machines import with_writers
from simpletuner.memory.world import World
from simpletuner.runs.checkpoints import building
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.checkpoint import on_each_machine
from simpletuner.train.report import Reporter
from simpletuner.train.resume import (
    RestartCommands,
    ResumePoint,
    check_content,
    check_machines,
    find_checkpoint,
    resumed_config,
)
from simpletuner.train.state import TrainState

Given = Callable[..., LoadedConfig]


@pytest.fixture
def given(tmp_path: Path) -> Given:
    """The configuration of a folder, with these keys of the image set and flags of train."""

    def loaded(*flags: str, environ: dict[str, str] | None = None, **keys: Any) -> LoadedConfig:
        images = {"id": "cats", "type": "local", "instance_data_dir": "cats", "caption_strategy": "textfile"}
        text = {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "text"}
        (tmp_path / "cats").mkdir(exist_ok=True)
        (tmp_path / "config.json").write_text(json.dumps({"model_flavour": "tiny", "max_train_steps": 10}))
        (tmp_path / "multidatabackend.json").write_text(json.dumps([images | keys, text]))
        return load(flags, folder=tmp_path, environ=environ or {})

    return loaded


def state(size: int, accumulation: int, processes: int | None = None) -> TrainState:
    divided = RunConfig(
        model_flavour="tiny",
        train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_processes=processes,
        max_train_steps=10,
    )
    return TrainState(step=3, config=json.loads(json.dumps(recorded_options(divided))))


def resumed(loaded: LoadedConfig, before: TrainState) -> RunConfig:
    return resumed_config(
        Path("step-3"), before, RestartCommands(RunDirectory(Path("output")), loaded), Reporter()
    ).config


def test_the_same_batch_on_other_processes_is_said_in_a_line(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    config = resumed(given("--num_processes=2"), state(2, 4))
    assert (config.train_batch_size, config.gradient_accumulation_steps, config.num_processes) == (2, 2, 2)
    assert capsys.readouterr().out.splitlines() == [
        "Note: Not set, so kept at the values of step-3: train_batch_size = 2.",
        "Changed since step 3: gradient_accumulation_steps = 2 (was 4), num_processes = 2 (was 1).",
    ]
    # Processes of torchrun, and of a run that has no torchrun any more.
    config = resumed(given(environ={"RANK": "0", "WORLD_SIZE": "4"}), state(1, 4))
    assert config.gradient_accumulation_steps == 1
    assert resumed(given(), state(1, 1, 4)).gradient_accumulation_steps == 4
    capsys.readouterr()
    resumed(given("--gradient_accumulation_steps=4"), state(1, 4))
    assert capsys.readouterr().out == ""


def test_another_batch_size_is_a_notice(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    config = resumed(given("--train_batch_size=2", "--gradient_accumulation_steps=2"), state(1, 4))
    assert config.effective_batch == 4
    assert capsys.readouterr().out.splitlines() == [
        "Note: From step 4 on, this run is trained with train_batch_size = 2 (was 1), gradient_accumulation_steps = 2 "
        "(was 4). A step still has 4 images, in another order; this epoch continues with its remaining images.",
    ]


@pytest.mark.parametrize(
    ("flags", "before", "said", "remedy"),
    [
        (
            ["--num_processes=2", "--gradient_accumulation_steps=4", "--lora_rank=8"],
            (1, 4, None),
            "lora_rank = 8 (was 16), num_processes = 2 (was 1). A step had 4 images",
            ["--num_processes=2", "--lora_rank=16", "--gradient_accumulation_steps=2"],
        ),
        (["--num_processes=3"], (1, 4, None), "num_processes = 3 (was 1). A step had 4 images", ["--num_processes=1"]),
        (["--train_batch_size=2"], (1, 1, None), "A step had 1 image:", ["--train_batch_size=1"]),
    ],
)
def test_another_effective_batch_is_refused_and_the_remedy_works(
    given: Given, flags: list[str], before: tuple[int, int, int | None], said: str, remedy: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resumed(given(*flags), state(*before))
    text = str(caught.value)
    assert said in text
    typed = shlex.split(text.split("`")[1])
    assert typed == ["simpletuner", "train", *remedy]
    assert resumed(given(*typed[2:]), state(*before)).effective_batch == before[0] * before[1]


def test_beside_a_set_with_its_own_batch_size_the_runs_stays(given: Given) -> None:
    flags = ["--train_batch_size=1", "--gradient_accumulation_steps=4"]
    with pytest.raises(CheckpointError) as caught:
        resumed(given(*flags, train_batch_size=3), state(2, 2))
    assert "A step had 4 images, and cats has its own train_batch_size" in str(caught.value)
    typed = shlex.split(str(caught.value).split("`")[1])
    assert {*typed[2:]} == {"--train_batch_size=2", "--gradient_accumulation_steps=2"}
    assert resumed(given(*typed[2:], train_batch_size=3), state(2, 2)).train_batch_size == 2
    # Its batches are as many with other processes.
    assert resumed(given("--num_processes=2", train_batch_size=3), state(2, 2)).gradient_accumulation_steps == 1


def test_an_elastic_run_says_what_its_effective_batch_is(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = given("--gradient_accumulation_steps=2", environ={"RANK": "0", "WORLD_SIZE": "2"})

    def restarted(before: TrainState) -> tuple[int, list[str]]:
        commands = RestartCommands(RunDirectory(Path("output")), loaded)
        config = resumed_config(Path("step-3"), before, commands, Reporter(), is_elastic=True).config
        return config.gradient_accumulation_steps, capsys.readouterr().out.splitlines()

    assert restarted(state(1, 2, 2)) == (2, [])
    assert restarted(state(1, 2, 4)) == (
        4,
        [
            "Changed since step 3: gradient_accumulation_steps = 4 (was 2), num_processes = 2 (was 4).",
            "2 processes with gradient_accumulation_steps = 4: a step has 8 images, as before.",
        ],
    )
    assert restarted(state(1, 1, 3)) == (
        2,
        [
            "Changed since step 3: gradient_accumulation_steps = 2 (was 1), num_processes = 2 (was 3).",
            "Note: From step 4 on, 2 processes with gradient_accumulation_steps = 2: a step has 4 images instead of "
            "3. The loss is no longer that of a run without the change.",
        ],
    )


def test_a_later_step_on_another_machine_is_not_passed_over(tmp_path: Path) -> None:
    def check(own: str) -> None:
        def work(world: World) -> None:
            run = RunDirectory(tmp_path / (f"{own}{world.machine}" if own else "shared"))
            run.checkpoint(20 * (world.machine + 1)).mkdir(parents=True, exist_ok=True)
            check_machines(run, 20, with_writers(world, run.root))

        on_ranks(2, work, machines=2)

    check("")
    with pytest.raises(CheckpointError) as caught:
        check("own-")
    assert str(caught.value).replace("own-1", "own-0") == (
        f"machine 1 has {tmp_path}/own-0/checkpoints/step-000040, and machine 0 has step 20: expected the newest "
        "checkpoint on machine 0, whose output_dir is not shared. Copy it to machine 0, start machine 1 with "
        "--machine_rank=0, or delete it there."
    )


def test_machine_0_alone_chooses_the_checkpoint(given: Given, tmp_path: Path) -> None:
    loaded = [given("--resume_from_checkpoint="), given("--resume_from_checkpoint=latest")]

    def work(world: World) -> ResumePoint | None:
        run = RunDirectory(tmp_path / f"own-{world.machine}")
        return find_checkpoint(run, loaded[world.rank], Reporter(), with_writers(world, run.root))[0]

    assert on_ranks(2, work, machines=2) == []


def seen_of_checkpoint(world: World, folder: str) -> list[str]:
    """Files of machine 0's checkpoint outside of the run's folder as this machine sees them, and what is left then."""
    run = RunDirectory(Path(folder) / "run")
    os.chdir(Path(folder) / f"machine-{world.machine}")
    with on_each_machine(Path("saved/step-000003"), run, world) as checkpoint:
        texts = [path.read_text() for path in checkpoint.glob("*.txt")]
    world.barrier("the other machine's deletion of its copy")
    return [*texts, *map(str, Path().rglob("*.txt")), *map(str, run.root.rglob("*.txt"))]


@pytest.mark.slow
def test_a_checkpoint_that_only_machine_0_has_is_sent_to_a_run_that_all_share(tmp_path: Path) -> None:
    for machine in range(2):
        (tmp_path / f"machine-{machine}").mkdir()
    with building(tmp_path / "machine-0" / "saved" / "step-000003") as part:
        (part / "weights.txt").write_text("of machine 0")
    assert in_ranks(2, seen_of_checkpoint, str(tmp_path), machines=2) == [
        ["of machine 0", "saved/step-000003/weights.txt"],
        ["of machine 0"],
    ]
    assert not (tmp_path / "machine-1" / "saved").exists()


def test_every_key_that_may_have_changed_a_set_is_named(given: Given) -> None:
    loaded = given()
    before = TrainState(step=3, data={"cats": "one", "dogs": "one"})
    with pytest.raises(CheckpointError) as caught:
        check_content(
            ResumePoint(Path("step-3"), before),
            RestartCommands(RunDirectory(Path("output")), loaded),
            data={"cats": "another", "dogs": "one"},
            model={},
        )
    text = str(caught.value)
    assert (
        "cats: images, captions, crops, references or masks have changed since step-3, or a key of the dataset: "
        in text
    )
    assert "dogs" not in text
    own = loaded.datasets.train_sets[0]
    manifest = Manifest(own, (), (), ())
    decisive = [
        name
        for name, value in {
            "repeats": 1,
            "probability": 0.5,
            "train_batch_size": 3,
            "is_regularisation_data": True,
            "class_prompt": "a cat",
            "loss_weight": 0.5,
            "timestep_sampling_offset": 1.0,
        }.items()
        if Manifest(own.model_copy(update={name: value}), (), (), ()).fingerprint != manifest.fingerprint
    ]
    assert len(decisive) == 7
    assert all(name in text for name in decisive)
