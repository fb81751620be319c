"""Progress of `simpletuner sample`: a progress bar, or lines of JSON."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from simpletuner.base.console import complain
from simpletuner.cli.sample import SampleOptions

ReportSteps = Callable[[int, int], None]
"""Called with the number of finished sampler steps and their total; first with 0, when the first image begins."""


@contextlib.contextmanager
def progress_of(options: SampleOptions) -> Iterator[ReportSteps]:
    """A context whose value reports progress on standard error, in the form that `options` choose."""
    if options.progress:
        yield lambda done, total: complain(json.dumps(progress_of_steps(done, total))) if done else None
        return
    with contextlib.ExitStack() as opened:
        bars: list[Any] = []

        def report(done: int, total: int) -> None:
            if done:
                bars[0].update()
                return
            # Imported late, because the import is slow: only when there is progress to show.
            from tqdm import tqdm

            bars.append(opened.enter_context(tqdm(total=total, desc="generating", unit="step", disable=None)))

        yield report


def progress_of_steps(done: int, total: int) -> dict[str, object]:
    """The progress as a JSON object."""
    return {"what": "generating", "done": done, "total": total}
