"""Measure seconds from typing `simpletuner train` to the end of step 1, with warm caches, and its peak memory; then the
time until a faulty configuration is refused.

    python benchmarks/start_up.py [--times 5]

The images and settings of the example tiny-lora, without validation. The first start, which makes the model and the
caches, does not count; each of the others is a new run. The time is from before the process starts to the event of its
first step. A refusal is measured in processor time, with that of importing pydantic alone for comparison.
"""

import argparse
import datetime
import resource
import statistics
import subprocess
import sys
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
        refusals = [processor_seconds(work, "-m", "simpletuner", "train", "--lora_rnak=1") for _ in range(times)]
        imports = [processor_seconds(work, "-c", "import pydantic.main") for _ in range(times)]
    print("seconds to the end of step 1:", *(f"{value:.2f}" for value in seconds))
    print(f"median {statistics.median(seconds):.2f} s (budget {BUDGET_S:.0f} s), peak {peak_gib():.2f} GiB")
    refusal, least = statistics.median(refusals), statistics.median(imports)
    print(f"a refusal: {refusal:.2f} s of processor time, {refusal / least:.2f} of importing pydantic ({least:.2f} s)")


def processor_seconds(work: Path, *arguments: str) -> float:
    """Processor time of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-P", *arguments], cwd=work, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(work: Path, name: str) -> float:
    """Seconds from now to the end of the first step of a new run."""
    began = time.time()
    events = read_events(train(work, name, steps=1) / "events.jsonl")
    ended = next(event["time"] for event in events if event["type"] == "step")
    return datetime.datetime.fromisoformat(ended).timestamp() - began


if __name__ == "__main__":
    main()
