"""Seconds from typing `simpletuner train` to the end of step 1, with warm caches, and the peak memory of it.

    python benchmarks/start_up.py [--times 5]

The pictures and settings of the example tiny-lora, without validation. The first start, which makes the model and
the caches, is not counted; each of the others is a new run. Measured from before the process starts to the time
of its first step's event.
"""

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path

from example import lay_out, peak_gib, train
from simpletuner.runs.events import read_events

BUDGET_S = 6.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory(prefix="simpletuner-start-up-") as folder:
        work = Path(folder)
        lay_out(work)
        train(work, "cold", steps=1)
        seconds = [first_step(work, f"warm-{index}") for index in range(times)]
    print("seconds to the end of step 1:", *(f"{value:.2f}" for value in seconds))
    print(f"median {statistics.median(seconds):.2f} s (budget {BUDGET_S:.0f} s), peak {peak_gib():.2f} GiB")


def first_step(work: Path, name: str) -> float:
    """Seconds from now to the end of the first step of a new run."""
    began = time.time()
    events = read_events(train(work, name, steps=1) / "events.jsonl")
    ended = next(event["time"] for event in events if event["type"] == "step")
    return datetime.datetime.fromisoformat(ended).timestamp() - began


if __name__ == "__main__":
    main()
