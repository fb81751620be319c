"""How far `simpletuner sample` is: a bar for people, or lines of JSON."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from simpletuner.base.console import complain
from simpletuner.cli.sample import SampleOptions

ReportSteps = Callable[[int, int], None]
"""Called with the sampler steps done and all of them: first with 0, when the first picture begins."""


@contextlib.contextmanager
def progress_of(options: SampleOptions) -> Iterator[ReportSteps]:
    """What reports to standard error, as `options` ask for it."""
    if options.progress:
        yield lambda done, total: complain(json.dumps(progress_of_steps(done, total))) if done else None
        return
    with contextlib.ExitStack() as opened:
        bars: list[Any] = []

        def report(done: int, total: int) -> None:
            if done:
                bars[0].update()
                return
            # Takes a moment to import: only where there is progress to show.
            from tqdm import tqdm

            bars.append(opened.enter_context(tqdm(total=total, desc="drawing", unit="step", disable=None)))

        yield report


def progress_of_steps(done: int, total: int) -> dict[str, object]:
    """How far drawing is, for JSON."""
    return {"what": "drawing", "done": done, "total": total}
