"""Run the GPU measurements: correctness, speed and memory, the most valuable first.

    python benchmarks/gpu/all.py --minutes 9 --out DIR      everything that fits into nine minutes
    python benchmarks/gpu/all.py --list                     all measurements in order, with time limits
    python benchmarks/gpu/all.py --only dev,attention       some of them
    python benchmarks/gpu/all.py --only soak --minutes 9    the long tests of correctness, in a separate call
    python benchmarks/gpu/all.py --tiny --device cpu        the rehearsal: every line on small models, without a GPU

Measurements run one after the other, each in a separate process. A measurement may also use time that earlier ones
left unused; after that it is killed. Results are JSON lines, and each is appended to DIR/results.jsonl at once, so a
measurement that raises, hangs or is killed loses only its own remaining results. DIR/table.md is rewritten after each
measurement and printed at the end. DIR/profile.json.gz is a trace of one step, 16 MiB at most.

README.md beside this file lists what a machine without a network needs. Exit code: 0, or 1 if a measurement or a check
failed.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import EXPANDABLE_SEGMENTS, WORK, markdown

HERE = Path(__file__).resolve().parent
LEAST_S = 8.0
"""Seconds; with less time left a measurement does not begin, because starting Python and torch takes as long."""

REHEARSED_SLOWER = 3.0
"""Factor on the time limits in a rehearsal."""


@dataclass(frozen=True)
class Measurement:
    """A script of this folder, run once in a separate process."""

    name: str
    limit_s: float
    title: str
    script: str
    arguments: tuple[str, ...] = ()
    is_asked_for: bool = False
    """Whether it runs only if `--only` names it."""

    def command(self, flags: Sequence[str], seconds: float) -> list[str]:
        """The command line, with the number of seconds that it may take."""
        return [sys.executable, str(HERE / self.script), *self.arguments, *flags, "--seconds", f"{seconds:.0f}"]


MEASUREMENTS = (
    Measurement("machine", 20, "what the machine is; its rates of products and copies", "machine.py"),
    Measurement("smoke", 60, "results against the CPU; streamed, quantized and compiled steps", "smoke.py"),
    Measurement("dev", 100, "dev at 1024², bf16, resident: eager, compiled, its kernels", "training.py", ("dev",)),
    Measurement("attention", 20, "attention kernels at dev's and klein's shapes", "attention.py"),
    Measurement("klein", 60, "klein-9b and klein-4b at 1024², bf16, resident", "training.py", ("klein",)),
    Measurement("int8", 30, "dev in 8 bits, resident", "training.py", ("int8",)),
    Measurement("int4", 30, "dev in 4 bits, resident", "training.py", ("int4",)),
    Measurement("streamed", 90, "dev in bf16 under 22.5 and 10.5 GiB", "training.py", ("streamed",)),
    Measurement("variants", 40, "TREAD at 0.5; LoRA on every Linear against one", "training.py", ("variants",)),
    Measurement("encoders", 60, "captions a second, images a second of the VAE", "encoders.py"),
    Measurement(
        "streamed-int8", 60, "dev in 8 bits under 22.5, 14.5, 10.5 and 7 GiB", "training.py", ("streamed-int8",)
    ),
    Measurement("small", 30, "dev at 512², batch 2", "training.py", ("small",)),
    Measurement("streamed-more", 90, "dev in bf16 under 14.5 and 7 GiB", "training.py", ("streamed-more",)),
    Measurement(
        "resident-blocks",
        60,
        "dev in 8 bits under 22.5 GiB, as many blocks resident as fit",
        "training.py",
        ("resident-blocks",),
    ),
    Measurement("two-gpus", 300, "several GPUs: parity, steps, a rank that dies", "two_gpus.py", is_asked_for=True),
    Measurement("soak", 900, "tests/gpu, the long ones too", "soak.py", is_asked_for=True),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", metavar="NAME,…", help="only these measurements, in the order of --list")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="use small models, to test the scripts")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.list:
        for measurement in MEASUREMENTS:
            note = " (only where --only names it)" if measurement.is_asked_for else ""
            print(f"{measurement.name:<14} {measurement.limit_s:>4.0f} s  {measurement.title}{note}")
        return 0
    known = {measurement.name for measurement in MEASUREMENTS}
    wanted = None if arguments.only is None else set(arguments.only.split(","))
    if wanted is not None and not wanted <= known:
        parser.error(f"--only {','.join(sorted(wanted - known))}: known are {', '.join(m.name for m in MEASUREMENTS)}")
    chosen = [m for m in MEASUREMENTS if (not m.is_asked_for if wanted is None else m.name in wanted)]
    flags = ["--device", arguments.device, "--out", str(arguments.out), *(["--tiny"] if arguments.tiny else [])]
    if arguments.tiny:  # a CPU may be slow, and busy with other things
        chosen = [dataclasses.replace(m, limit_s=REHEARSED_SLOWER * m.limit_s) for m in chosen]
    rows = measure(chosen, arguments.out, 60 * arguments.minutes, flags)
    print((arguments.out / "table.md").read_text(encoding="utf-8"))
    failed = any(row.get("outcome") in ("failed", "stopped") or row.get("passed") is False for row in rows)
    return 1 if failed else 0


def measure(
    measurements: Sequence[Measurement], out: Path, seconds: float, flags: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run the measurements one after the other within `seconds`; returns all rows.

    The n-th must end by the sum of the first n limits, and all by `seconds`: later ones may use the time that earlier
    ones left.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    results.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []

    def keep(row: Mapping[str, Any]) -> None:
        rows.append(dict(row))
        if row.get("name") == EXPANDABLE_SEGMENTS and row["value"] == WORK:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if row["kind"] == "outcome":
            (out / "table.md").write_text(markdown(rows), encoding="utf-8")

    began, limits = time.monotonic(), 0.0
    for measurement in measurements:
        limits += measurement.limit_s
        left = began + min(limits, seconds) - time.monotonic()
        outcome = {"kind": "outcome", "measurement": measurement.name, "limit_s": left}
        if left < LEAST_S:
            keep(outcome | {"outcome": "left out", "seconds": 0.0, "limit_s": None, "note": "no time was left"})
            continue
        sys.stderr.write(f"{measurement.name}: {measurement.title}, at most {left:.0f} s\n")
        start = time.monotonic()
        with tempfile.TemporaryFile() as errors:
            process = started(measurement.command(flags, left), errors)
            for row in lines(process, start + left):
                keep({"measurement": measurement.name, **row})
            ended = {None: "stopped", 0: "done"}.get(process.poll(), "failed")
            stop(process)
            errors.seek(0)
            said = errors.read().decode(errors="replace")
        sys.stderr.write(said)
        note = {"done": "", "stopped": "at its limit; what it had measured is kept"}.get(ended, last_line(said))
        if process.returncode < 0 and ended == "failed":
            note = f"killed by signal {-process.returncode}"
        keep(outcome | {"outcome": ended, "seconds": time.monotonic() - start, "note": note})
    return rows


def started(command: Sequence[str], errors: Any) -> "subprocess.Popen[str]":
    """Start the command in its own process group, with our package importable whether it is installed or not."""
    source = HERE.parents[1] / "src"
    paths = [str(source), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True, env=environment
    )


def lines(process: "subprocess.Popen[str]", deadline: float) -> Iterator[dict[str, Any]]:
    """Yield results as the process prints them, until it ends or the deadline (of `time.monotonic`) has passed."""
    printed: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                printed.put(line)
        printed.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = printed.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            return
        if line is None:
            # Closed by its end, or a moment before it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
            return
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "kind" in row:
            yield row
        else:
            sys.stderr.write(line)  # what a library prints


def stop(process: "subprocess.Popen[str]") -> None:
    """End the process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(said: str) -> str:
    """The last line that a failed process wrote to stderr: the error itself, if it was a traceback."""
    written = [line.strip() for line in said.splitlines() if line.strip()]
    return written[-1][:300] if written else "it said nothing"


if __name__ == "__main__":
    sys.exit(main())
