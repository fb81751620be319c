"""The first GPU measurements: what is measured stays, whatever becomes of the rest."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks/gpu"

GOOD = """
import json
for number in range(2):
    print(json.dumps({"kind": "ceiling", "what": "a rate", "rate": number + 0.5, "unit": "GB/s"}), flush=True)
print("a library's remark")
"""
RAISES = GOOD + "raise RuntimeError('the driver is gone')\n"
KILLED = GOOD + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
HANGS = GOOD + "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu/all.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("gpu_all", FOLDER / "all.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_all", module)
    spec.loader.exec_module(module)
    return module


def written(folder: Path, **scripts: str) -> dict[str, Path]:
    """Scripts in files, by name."""
    paths = {}
    for name, text in scripts.items():
        paths[name] = folder / f"{name}.py"
        paths[name].write_text(text)
    return paths


def of(rows: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a kind, by measurement."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == kind:
            grouped.setdefault(row["measurement"], []).append(row)
    return grouped


@pytest.mark.slow
def test_what_is_measured_survives_what_comes_after_it(tmp_path: Path, gpu: ModuleType) -> None:
    scripts = written(tmp_path, good=GOOD, raises=RAISES, killed=KILLED, hangs=HANGS)
    # A hang is given what is left of the limits before it: little.
    limits = {"hangs": 3.0, "raises": 0.1, "killed": 9.0, "good": 9.0}
    measurements = [gpu.Measurement(name, limit, name, str(scripts[name])) for name, limit in limits.items()]
    gpu.LEAST_S = 0.01
    out = tmp_path / "out"
    began = time.monotonic()
    rows = gpu.measure(measurements, out, 60.0)
    assert 2.9 < time.monotonic() - began < 20

    outcomes = {name: rows[0] for name, rows in of(rows, "outcome").items()}
    assert outcomes["hangs"]["outcome"] == "stopped"
    assert outcomes["raises"]["outcome"] in ("failed", "stopped")  # it had a tenth of a second
    assert outcomes["killed"]["outcome"] == "failed"
    assert outcomes["killed"]["note"] == f"killed by signal {signal.SIGKILL.value}"
    assert outcomes["good"]["outcome"] == "done"
    rates = {name: [row["rate"] for row in rows] for name, rows in of(rows, "ceiling").items()}
    for name in ("hangs", "killed", "good"):
        assert rates[name] == [0.5, 1.5]

    # As written, line by line, they are what was returned; and the table has them all.
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    table = (out / "table.md").read_text()
    assert table.count("| a rate | 1.5 GB/s |") >= 3
    assert "killed by signal 9" in table


def test_the_error_of_one_that_raises_is_told_and_its_rows_stay(tmp_path: Path, gpu: ModuleType) -> None:
    script = written(tmp_path, raises=RAISES)["raises"]
    rows = gpu.measure([gpu.Measurement("raises", 30, "raises", str(script))], tmp_path / "out", 30.0)
    assert [row["rate"] for row in rows[:-1]] == [0.5, 1.5]
    assert rows[-1]["outcome"] == "failed"
    assert rows[-1]["note"] == "RuntimeError: the driver is gone"


def test_without_time_left_a_measurement_is_left_out_and_said(tmp_path: Path, gpu: ModuleType) -> None:
    script = written(tmp_path, good=GOOD)["good"]
    rows = gpu.measure([gpu.Measurement("good", 30, "good", str(script))], tmp_path / "out", 2.0)
    assert [(row["outcome"], row["note"]) for row in rows] == [("left out", "no time was left")]


def test_the_list_and_an_unknown_name() -> None:
    listed = subprocess.run([sys.executable, FOLDER / "all.py", "--list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names[:4] == ["machine", "smoke", "dev", "attention"]
    assert names[-1] == "soak"
    refused = subprocess.run([sys.executable, FOLDER / "all.py", "--only", "dev,kline"], capture_output=True, text=True)  # noqa: PLW1510
    assert refused.returncode == 2
    assert "--only kline: known are machine, smoke" in refused.stderr


@pytest.mark.slow
def test_a_rehearsal_ends_with_its_table(tmp_path: Path) -> None:
    """Two measurements of the real ones, as a machine without a GPU can make them."""
    flags = ["--tiny", "--device", "cpu", "--out", tmp_path / "out", "--only", "machine,attention"]
    done = subprocess.run([sys.executable, FOLDER / "all.py", *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("## Machine\n")
    assert "| product of large bf16 matrices |" in done.stdout
    assert "| 1, 4, 80, 32 | torch's choice |" in done.stdout
    assert "| attention | done |" in done.stdout
