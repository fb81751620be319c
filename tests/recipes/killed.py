"""`simpletuner train`, ended by SIGKILL at a named moment: python killed.py PLACE:COUNT FLAGS…

PLACE is a phase (scan, text, latents, validation), where COUNT items are done; or
    step        after step COUNT was taken and told
    checkpoint  in the middle of writing that of step COUNT
    replace     where the checkpoint of step COUNT is set aside and the new one is not in place yet
    sheet       before the sheet of step COUNT, its images are there
    told        before the event of the sheet of step COUNT
    export      after COUNT files of the result; the last one comes before finished.json
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from simpletuner.cli.main import main
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import RunDirectory
from simpletuner.train import export, report, validate


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, count: int) -> None:
    progress, shown, emit = report.Progress.__call__, report.TrainingBar.step, report.Reporter.emit
    seal, sheet_of = checkpoints.write_json, validate.sheet_of
    exported = 0

    def on_progress(self: report.Progress, done: int, total: int) -> None:
        progress(self, done, total)
        if self.phase == place and done >= count:
            die()

    def on_step(self: report.TrainingBar, event: Any) -> None:
        shown(self, event)
        if place == "step" and event.step == count:
            die()

    def on_event(self: report.Reporter, event: Any) -> None:
        if place == "told" and event.type == "validation" and event.sheet is not None and event.step == count:
            die()
        emit(self, event)

    def on_manifest(path: Path, value: Any) -> None:
        if place == "checkpoint" and path.parent.name.endswith(f"step-{count:06d}"):
            die()
        seal(path, value)

    def on_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if place == "replace" and Path(target).name == f".tmp-replaced-step-{count:06d}":
            die()

    def on_sheet(run: RunDirectory, step: int) -> Path:
        if place == "sheet" and step == count and sys._getframe(1).f_code.co_name == "_make_sheet":
            die()
        return sheet_of(run, step)

    def on_product(write: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal exported
            made = write(*arguments)
            exported += 1
            if place == "export" and exported == count:
                die()
            return made

        return wrapped

    replace = os.replace
    report.Progress.__call__ = on_progress  # type: ignore[method-assign]
    report.TrainingBar.step = on_step  # type: ignore[method-assign]
    report.Reporter.emit = on_event  # type: ignore[method-assign]
    checkpoints.write_json = on_manifest
    os.replace = on_replace  # type: ignore[assignment]
    validate.sheet_of = on_sheet
    export.write_atomic, export.save_single = on_product(export.write_atomic), on_product(export.save_single)
    export.save_pipeline = on_product(export.save_pipeline)


if __name__ == "__main__":
    where, _, at = sys.argv[1].partition(":")
    arm(where, int(at))
    sys.exit(main(["train", *sys.argv[2:]]))
