import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from simpletuner.base.errors import DiskError
from simpletuner.runs import checkpoints, finished
from simpletuner.runs.finished import missing_result, write_finished
from simpletuner.runs.layout import LORA_NAME, RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A finished run of three steps: a LoRA as a copy, a model as a hard link, and a file of the base model's."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    with checkpoints.building(run.checkpoint(3)) as folder:
        (folder / LORA_NAME).write_bytes(b"lora")
        (folder / "weights").write_bytes(b"weights")
    run.lora.write_bytes(b"lora")
    run.model.mkdir()
    os.link(run.checkpoint(3) / "weights", run.model / "weights")
    (run.model / "tokens.json").write_text("{}")
    write_finished(
        run,
        3,
        run.checkpoint(3),
        {
            run.lora: run.checkpoint(3) / LORA_NAME,
            run.model / "weights": run.checkpoint(3) / "weights",
            run.model / "tokens.json": None,
        },
    )
    return run


def test_a_complete_run_lacks_nothing(run: RunDirectory) -> None:
    value = json.loads(run.finished.read_text())
    assert (value["version"], value["step"]) == (1, 3)
    assert set(value["products"]) == {LORA_NAME, "model/weights", "model/tokens.json"}
    assert value["products"][LORA_NAME]["bytes"] == 4
    assert missing_result(run, 3) is None


def changed(**values: object) -> Callable[[RunDirectory], None]:
    return lambda run: run.finished.write_text(json.dumps(json.loads(run.finished.read_text()) | values)) and None


def made_a_folder(run: RunDirectory) -> None:
    run.lora.unlink()
    run.lora.mkdir()


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        (lambda run: run.lora.write_bytes(b"lorA"), f"{LORA_NAME} differs from the exported file"),
        (lambda run: run.lora.write_bytes(b""), f"{LORA_NAME} differs from the exported file"),
        (lambda run: run.lora.unlink(), f"{LORA_NAME} is missing"),
        (made_a_folder, f"{LORA_NAME} is missing"),
        (lambda run: (run.model / "tokens.json").unlink(), "model/tokens.json is missing"),
        (lambda run: run.finished.unlink(), "finished.json is missing"),
        (lambda run: run.finished.write_bytes(b"\0\xff"), "finished.json cannot be read"),
        (lambda run: run.finished.write_text("[]"), "finished.json cannot be read"),
        (changed(products={"a": 1}), "finished.json cannot be read"),
        (changed(version=9), "version 9, this program reads version 1"),
        (changed(step=2), "belongs to step 2, the last checkpoint to step 3"),
        (changed(products={"../x": {"sha256": "", "bytes": 0, "mtime_ns": 0}}), "../x is outside the run directory"),
    ],
    ids=[
        "changed",
        "emptied",
        "gone",
        "a folder",
        "one of the base",
        "no list",
        "no JSON",
        "a JSON list",
        "odd entries",
        "newer",
        "other step",
        "outside",
    ],
)
def test_what_a_finished_run_lacks_is_named(
    run: RunDirectory, hurt: Callable[[RunDirectory], None], reason: str
) -> None:
    hurt(run)
    assert reason in str(missing_result(run, 3))


def test_a_product_that_is_not_the_checkpoints_is_an_error_and_the_run_is_not_finished(run: RunDirectory) -> None:
    run.finished.unlink()
    run.lora.write_bytes(b"lorA")
    with pytest.raises(DiskError, match="reads back differently"):
        write_finished(run, 3, run.checkpoint(3), {run.lora: run.checkpoint(3) / LORA_NAME})
    assert not run.finished.exists()


def test_a_large_file_is_read_again_only_where_its_time_has_changed(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "HASHED_BYTES", 2)
    recorded = run.lora.stat().st_mtime_ns
    run.lora.write_bytes(b"lorA")
    os.utime(run.lora, ns=(recorded, recorded))
    assert missing_result(run, 3) is None
    os.utime(run.lora, ns=(recorded, recorded + 1))
    assert "differs from the exported file" in str(missing_result(run, 3))
    run.lora.write_bytes(b"lora")
    assert missing_result(run, 3) is None
