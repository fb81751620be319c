"""Measure seconds a step with and without compiled blocks, in interleaved pairs, and the time of the start.

    python benchmarks/compile.py [--pairs 4] [--steps 30] [-- FLAGS of `simpletuner train`]

Each run is a separate process. A pair is one run of each kind; every other pair runs in the opposite order, so that a
change in the machine's speed affects both alike. The result of a run is its median step without the first three. The
start is the time from the command to the end of step 1: once with an empty compiler cache, then with a filled one.
Flags after `--` apply to both kinds, for example `-- --mixed_precision=no --gradient_checkpointing=true`.
"""

import argparse
import datetime
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

from example import lay_out, train
from simpletuner.runs.events import read_events

WARM_UP = 3
BACKENDS = ("no", "inductor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simpletuner-compile-") as folder:
        work = Path(folder)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        lay_out(work)
        train(work, "caches", steps=1)
        start, _ = measured(work, "first", arguments.steps, "inductor", arguments.flags)
        print(f"start with the compiler's cache empty: {start:.1f} s")
        found: dict[str, list[tuple[float, float]]] = {backend: [] for backend in BACKENDS}
        for pair in range(arguments.pairs):
            for backend in BACKENDS if pair % 2 else reversed(BACKENDS):
                found[backend].append(measured(work, f"{backend}-{pair}", arguments.steps, backend, arguments.flags))
            (eager_start, eager), (start, step) = (found[backend][-1] for backend in BACKENDS)
            print(
                f"pair {pair + 1}: eager {eager:.4f} s/step, compiled {step:.4f} s/step, ratio {step / eager:.3f}; "
                f"start {eager_start:.1f} s and {start:.1f} s"
            )
    ratios = [step / eager for (_, eager), (_, step) in zip(*found.values(), strict=True)]
    extra = [start - eager for (eager, _), (start, _) in zip(*found.values(), strict=True)]
    print(
        f"median ratio {statistics.median(ratios):.3f}, {statistics.median(extra):.1f} s more at the start with the "
        "compiler's cache filled"
    )


def measured(work: Path, name: str, steps: int, backend: str, flags: list[str]) -> tuple[float, float]:
    """Seconds from the command to the end of step 1, and seconds of the median step."""
    began = time.time()
    root = train(work, name, f"--dynamo_backend={backend}", *flags, steps=steps)
    times = [
        datetime.datetime.fromisoformat(event["time"])
        for event in read_events(root / "events.jsonl")
        if event["type"] == "step"
    ]
    gaps = [(after - before).total_seconds() for before, after in itertools.pairwise(times)]
    return times[0].timestamp() - began, statistics.median(gaps[WARM_UP:])


if __name__ == "__main__":
    main()
