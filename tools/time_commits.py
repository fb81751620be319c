"""Compare the cost of two commits: processor time of a step and of a start, in interleaved pairs.

    python tools/time_commits.py BEFORE AFTER [--pairs 6] [--steps 100]

Checks out both commits as `compare_commits.py` does and trains the embedded model with each, with warm caches, on one
thread, in runs of 1 step and of 1 + STEPS steps. The time of the steps is the difference of the two. Every other pair
runs in the opposite order. Prints the median ratio AFTER / BEFORE of each.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
from pathlib import Path

from compare_commits import checked_out, laid_out, train

FLAGS = ["--validation_disable", "--checkpoint_step_interval=0", "--eval_steps_interval=1000000"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", metavar="BEFORE", help="a commit, a tag or a branch")
    parser.add_argument("after", metavar="AFTER", help="the commit to compare with BEFORE")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    starts, steps = [], []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="simpletuner-time-")))
        sides = []
        for name, commit in (("before", arguments.before), ("after", arguments.after)):
            checkout = stack.enter_context(checked_out(commit, folder / f"{name}-commit"))
            sides.append((checkout / "src", laid_out(folder / name)))
        for source, work in sides:
            trained_s(source, work, "cold", 1)
        for pair in range(arguments.pairs):
            measured = {}
            for side in (0, 1) if pair % 2 == 0 else (1, 0):
                start_s = trained_s(*sides[side], f"start-{pair}", 1)
                whole_s = trained_s(*sides[side], f"steps-{pair}", 1 + arguments.steps)
                measured[side] = (start_s, (whole_s - start_s) / arguments.steps)
            (old_start, old_step), (new_start, new_step) = measured[0], measured[1]
            starts.append(new_start / old_start)
            steps.append(new_step / old_step)
            print(
                f"pair {pair + 1}: start {old_start:.2f} and {new_start:.2f} s, ratio {starts[-1]:.3f}; "
                f"step {old_step:.4f} and {new_step:.4f} s, ratio {steps[-1]:.3f}",
                flush=True,
            )
    print(f"median ratio of a start {statistics.median(starts):.3f}, of a step {statistics.median(steps):.3f}")


def trained_s(source: Path, work: Path, name: str, steps: int) -> float:
    """Processor seconds of a run of `steps` steps."""
    before = os.times()
    train(source, work, [*FLAGS, f"--output_dir=output/{name}", f"--max_train_steps={steps}"]).check_returncode()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
