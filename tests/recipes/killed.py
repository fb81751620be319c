"""`simpletuner train`, ended by SIGKILL at a named moment: python killed.py PLACE:COUNT FLAGS…

PLACE is a phase (scan, text, latents, validation), where COUNT items are done; or step, after step COUNT was taken and
told; or checkpoint, in the middle of writing that of step COUNT; or prune, in the middle of removing one.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from simpletuner.cli.main import main
from simpletuner.runs import checkpoints
from simpletuner.train import report


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, count: int) -> None:
    progress, shown, write_json = report.Progress.__call__, report.TrainingBar.step, checkpoints.write_json

    def on_progress(self: report.Progress, done: int, total: int) -> None:
        progress(self, done, total)
        if self.phase == place and done >= count:
            die()

    def on_step(self: report.TrainingBar, event: Any) -> None:
        shown(self, event)
        if place == "step" and event.step == count:
            die()

    def on_manifest(path: Path, value: Any) -> None:
        if place == "checkpoint" and path.parent.name.endswith(f"step-{count:06d}"):
            die()
        write_json(path, value)

    report.Progress.__call__ = on_progress  # type: ignore[method-assign]
    report.TrainingBar.step = on_step  # type: ignore[method-assign]
    checkpoints.write_json = on_manifest


if __name__ == "__main__":
    where, _, at = sys.argv[1].partition(":")
    arm(where, int(at))
    sys.exit(main(["train", *sys.argv[2:]]))
