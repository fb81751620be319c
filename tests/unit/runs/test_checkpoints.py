import signal
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner.base.errors import CheckpointError
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create()
    return run


def save(run: RunDirectory, step: int, content: bytes = b"weights") -> Path:
    with checkpoints.building(run.checkpoint(step)) as folder:
        (folder / "weights").write_bytes(content)
        (folder / "state.json").write_text("{}")
    return run.checkpoint(step)


def test_a_checkpoint_appears_whole_and_verifies(run: RunDirectory) -> None:
    folder = save(run, 500)
    assert folder.name == "step-000500"
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "state.json", "weights"]
    assert checkpoints.damage(folder) is None


def test_a_failure_while_building_leaves_nothing_and_keeps_what_was_there(run: RunDirectory) -> None:
    save(run, 1, b"first")

    def fail() -> None:
        with checkpoints.building(run.checkpoint(1)) as folder:
            (folder / "weights").write_bytes(b"second")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert (run.checkpoint(1) / "weights").read_bytes() == b"first"
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]


def test_the_same_step_is_replaced(run: RunDirectory) -> None:
    save(run, 1, b"first")
    save(run, 1, b"second")
    assert (run.checkpoint(1) / "weights").read_bytes() == b"second"
    assert checkpoints.damage(run.checkpoint(1)) is None


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"weightz"), "weights does not have the hash"),
        (lambda folder: (folder / "weights").write_bytes(b""), "weights does not have the hash"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"version": 9, "files": {}}'), "version 9"),
    ],
    ids=["changed", "emptied", "gone", "no manifest", "torn manifest", "odd manifest", "newer manifest"],
)
def test_damage_is_found_and_named(run: RunDirectory, hurt, reason: str) -> None:  # type: ignore[no-untyped-def]
    folder = save(run, 1)
    hurt(folder)
    assert reason in str(checkpoints.damage(folder))


def test_the_newest_comes_first_with_its_verdict(run: RunDirectory) -> None:
    for step in (5, 1_000_000, 40):
        save(run, step)
    (run.checkpoint(1_000_000) / "weights").write_bytes(b"")
    found = list(checkpoints.newest_first(run))
    assert [entry.step for entry in found] == [1_000_000, 40, 5]
    assert [entry.damage is None for entry in found] == [False, True, True]


def test_pruning_keeps_the_newest_that_verifies_and_what_is_protected(run: RunDirectory) -> None:
    for step in range(1, 7):
        save(run, step)
    for step in (5, 6):
        (run.checkpoint(step) / "weights").write_bytes(b"")
    assert checkpoints.prune(run, keep=2, protect=frozenset({2})) == [1, 3]
    assert checkpoints.steps(run) == [2, 4, 5, 6]


def test_keep_zero_keeps_all(run: RunDirectory) -> None:
    for step in range(1, 4):
        save(run, step)
    assert checkpoints.prune(run, keep=0, protect=frozenset()) == []
    assert checkpoints.steps(run) == [1, 2, 3]


def test_what_a_killed_process_left_is_cleared(run: RunDirectory) -> None:
    (run.checkpoints / ".tmp-step-000007").mkdir()
    (run.checkpoints / ".tmp-step-000007" / "weights").write_bytes(b"half")
    checkpoints.clear_unfinished(run)
    assert list(run.checkpoints.iterdir()) == []


def test_a_kill_while_a_checkpoint_is_replaced_keeps_the_one_before(run: RunDirectory) -> None:
    """Between the two renames the old one lies aside and the new one is not in place yet."""
    save(run, 1, b"first")
    killed = f"""
import os, signal
from pathlib import Path
from simpletuner.runs import checkpoints
replace = os.replace
def replace_and_die(source, target):
    replace(source, target)
    if ".tmp-replaced-" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_and_die
with checkpoints.building(Path({str(run.checkpoint(1))!r})) as folder:
    (folder / "weights").write_bytes(b"second")
"""
    assert subprocess.run([sys.executable, "-P", "-c", killed], check=False).returncode == -signal.SIGKILL
    assert checkpoints.steps(run) == []
    checkpoints.clear_unfinished(run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert checkpoints.damage(run.checkpoint(1)) is None
    assert (run.checkpoint(1) / "weights").read_bytes() == b"first"


def test_a_file_in_place_of_a_checkpoint_is_replaced(run: RunDirectory) -> None:
    run.checkpoint(1).write_text("no folder")
    save(run, 1)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-000001"]
    assert checkpoints.damage(run.checkpoint(1)) is None


def test_what_a_killed_process_left_half_written_in_a_run_is_swept(run: RunDirectory) -> None:
    swept = (
        ".config.json.41.part", "ema/.pytorch_lora_weights.safetensors.41.part", ".tmp-model/tokenizer/vocabulary",
        "ema/.tmp-old-model/model_index.json", "validation/step-000002/.sheet.part.png",
        "validation/step-000002/ema/.one_32x32_0.part.jpg", "profile/.steps-1-2.41.part.json.gz",
    )  # fmt: skip
    kept = ("film.part", ".hidden", ".tmp-other/file", "validation/step-000002/one.png", "model/model_index.json")
    for name in (*swept, *kept):
        (run.root / name).parent.mkdir(parents=True, exist_ok=True)
        (run.root / name).touch()
    run.sweep()
    files = {str(path.relative_to(run.root)) for path in run.root.rglob("*") if path.is_file()}
    assert files == set(kept)


def test_a_second_holder_is_refused_with_the_first_ones_pid(run: RunDirectory) -> None:
    import os

    with run.lock(), pytest.raises(CheckpointError, match=f"process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass
