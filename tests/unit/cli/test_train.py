"""How many processes `simpletuner train` starts, before torch is imported."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.cli import train
from simpletuner.config.options.ranks import RankOptions
from simpletuner.runs.machines import Machines
from simpletuner.runs.ranks import RANKS_FOLDER, Supervisor

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}
EXAMPLE = ("--example", "tiny-lora")


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        ({}, 0, 1),
        ({}, 4, 1),
        ({"fsdp_enable": True}, 4, 4),
        ({"fsdp_enable": True}, 0, 1),
        ({"deepspeed_config": "zero1"}, 4, 4),
        ({"deepspeed_config": {}}, 4, 1),
        ({"num_processes": 2}, 4, 2),
        ({"num_processes": 4}, 4, 4),
        ({"num_processes": 4}, 0, 4),
    ],
)
def test_processes_are_those_asked_for_or_one_a_gpu(options: dict[str, Any], gpus: int, expected: int) -> None:
    assert train.processes(RankOptions(**options), gpus) == expected


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_processes = 2 with 1 visible GPU: .* Give --num_processes=1,"):
        train.processes(RankOptions(num_processes=2), 1)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the supervisors that are started, in place of starting them."""
    sizes: list[int] = []

    def start(self: Supervisor, *_: object) -> int:
        sizes.append(self.size)
        return 0

    monkeypatch.setattr(Supervisor, "__call__", start)
    monkeypatch.setattr(train, "visible_gpus", lambda _: 0)
    return sizes


def test_processes_are_started_once_the_configuration_is_known_to_be_good(started: list[int], own_folder: Path) -> None:
    assert train.run(["--help"]) == 0
    with pytest.raises(ConfigError, match="lora_rank"):
        train.run([*EXAMPLE, "--num_processes=2", "--lora_rank=none"])
    assert started == []
    assert train.run([*EXAMPLE, "--num_processes=2"]) == 0
    assert started == [2]
    assert not (own_folder / "output").exists()


def test_a_run_that_has_all_its_steps_is_no_reason_to_start_several(own_folder: Path, started: list[int]) -> None:
    finished = own_folder / "output" / "run" / "finished.json"
    finished.parent.mkdir(parents=True)
    arguments = [*EXAMPLE, "--num_processes=2", "--output_dir=output/run"]
    finished.write_text(json.dumps({"step": 3}))
    assert train.run([*arguments, "--max_train_steps=4"]) == 0
    assert started == [2]
    loaded = train.load_here([*arguments, "--max_train_steps=3"])
    assert train._is_trained(loaded.config)
    finished.write_text("torn")
    assert not train._is_trained(loaded.config)


def test_idle_gpus_are_noted_unless_one_process_was_asked_for() -> None:
    def noted(gpus: int, *flags: str) -> str | None:
        return train._idle_gpus(train.load_here([*EXAMPLE, *flags]).config, gpus)

    assert noted(1) is None
    assert noted(4, "--num_processes=1") is None
    assert noted(4) == (
        "4 GPUs are visible, one trains, and 3 stay idle. --num_processes=4 trains on all, with 4 times the effective "
        "batch."
    )
    two = ("--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1")
    assert noted(1, *two, "--fsdp_enable") is None, "one on each machine shares with the other"
    assert noted(4, *two, "--fsdp_enable") is None
    assert noted(4, *two) == (
        "4 GPUs are visible on machine 1, one trains, and 3 stay idle. --num_processes=8 trains on all, with 4 times "
        "the effective batch."
    )


def test_under_torchrun_its_number_of_processes_counts(monkeypatch: pytest.MonkeyPatch, started: list[int]) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(RANKS_FOLDER, raising=False)
    with pytest.raises(ConfigError, match="num_processes = 4, and torchrun started 2 processes"):
        train.run([*EXAMPLE, "--num_processes=4"])
    assert started == []


def test_the_supervisor_needs_no_torch() -> None:
    code = "import simpletuner.cli.train, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.usefixtures("said_deepspeed")
@pytest.mark.parametrize(("gpus", "said"), [(0, "no GPU is visible"), (1, "one GPU is visible")])
@pytest.mark.parametrize("engine", ["fsdp_enable", "deepspeed_config"])
def test_one_process_shards_nothing_and_says_so(engine: str, gpus: int, said: str) -> None:
    loaded = train.load_here([*EXAMPLE, f"--{engine}={'true' if engine == 'fsdp_enable' else 'zero2'}"])
    assert train.processes(loaded.config, gpus) == 1
    notice = f"{engine} has no effect: {said}, and one process trains."
    assert train._idle_gpus(loaded.config, gpus) == notice
    assert train._settled(loaded, 1).config.zero_stage == 0


@pytest.mark.usefixtures("said_deepspeed")
def test_a_batch_of_deepspeed_is_held_against_the_processes_that_are_counted(
    started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"train_batch_size": 4, "zero_optimization": {"stage": 2}}
    asked = [*EXAMPLE, "--train_batch_size=2", f"--deepspeed_config={json.dumps(document)}"]
    monkeypatch.setattr(train, "visible_gpus", lambda _: 2)
    train.run(asked)
    assert started == [2]
    monkeypatch.setattr(train, "visible_gpus", lambda _: 4)
    with pytest.raises(ConfigError, match=r"train_batch_size = 4, and train_batch_size × .* × num_processes is 8"):
        train.run(asked)
    assert started == [2]


@pytest.mark.parametrize(
    ("options", "gpus", "expected"),
    [
        ({"num_machines": 2}, 4, 2),
        ({"num_machines": 2, "fsdp_enable": True}, 4, 8),
        ({"num_machines": 2, "num_processes": 8}, 4, 8),
        ({"num_machines": 2, "num_processes": 8}, 0, 8),
    ],
)
def test_processes_are_those_of_all_machines(options: dict[str, Any], gpus: int, expected: int) -> None:
    assert train.processes(RankOptions(**options), gpus) == expected


def test_more_processes_than_gpus_of_the_machines_are_refused() -> None:
    found = "num_processes = 10 with 4 visible GPUs on each of 2 machines: .* Give --num_processes=8,"
    with pytest.raises(ConfigError, match=found):
        train.processes(RankOptions(num_processes=10, num_machines=2), 4)


def test_machines_meet_before_the_processes_start(
    started: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    met: list[tuple[Any, ...]] = []

    def meet(*arguments: Any) -> Machines:
        met.append(arguments)
        return Machines(1, 2, "10.0.0.1", 60)

    monkeypatch.setattr(train, "meet", meet)
    flags = (*EXAMPLE, "--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1", "--main_process_port=4000")
    assert train.run([*flags, "--num_processes=6"]) == 0
    assert started == [3]
    [(machine, count, address, port, terms, timeout_s)] = met
    assert (machine, count, address, port, timeout_s) == (1, 2, "10.0.0.1", 4000, 600)
    assert (terms["num_processes"], terms["num_machines"], terms["lora_rank"]) == (6, 2, 32)
    assert not terms.keys() & {"machine_rank", "main_process_port", "main_process_ip", "output_dir"}
    assert json.loads(json.dumps(terms)) == terms
    capsys.readouterr()
    monkeypatch.setattr(train, "visible_gpus", lambda _: 4)
    assert train.run([*flags]) == 0
    assert capsys.readouterr().out.startswith("Note: 4 GPUs are visible on machine 1, one trains, and 3 stay idle.")
    assert train.run([*flags, "--machine_rank=0"]) == 0
    assert "Note:" not in capsys.readouterr().out, "rank 0 prints it"
