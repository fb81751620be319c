"""Record a torch profiler trace of some of a run's steps."""

import os
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from simpletuner.base.files import file_errors_reported, write_atomic
from simpletuner.base.sizes import format_size
from simpletuner.train.report import Reporter

LARGE_TRACE_BYTES = 16 * 1024**2
"""Above this size a trace opens slowly in a browser, and the user gets a notice."""
TABLE_ROWS = 30


class StepProfiler:
    """Writes `steps-A-B.json.gz`, a trace for Perfetto or chrome://tracing, and `steps-A-B.txt`, a table of the
    operations that take the most time, for steps A to B of a run. Does nothing if `steps` is empty.

    The trace has names and times, but no stacks or shapes, which would multiply its size. It covers everything between
    the start of A and the end of B, validation and checkpoints included.

    As a context manager it discards a profile that is still recording on exit, without writing a file.
    """

    def __init__(self, folder: Path, steps: range, device: torch.device, reporter: Reporter) -> None:
        self._folder = folder
        self._steps = steps
        self._is_cuda = device.type == "cuda"
        self._reporter = reporter
        self._first = 0
        self._profile: profile | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def begin(self, step: int) -> None:
        """Call before `step`. A run that resumes within `steps` records the remaining ones."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            self._first = step
            self._profile = profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """Call after `step`.

        Raises:
            DiskError: no space for the files.
        """
        if self._profile is None or step + 1 in self._steps:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()  # waits for the device
        self._write(recorded, f"steps-{self._first}-{step}")

    def _write(self, recorded: profile, name: str) -> None:
        trace = self._folder / f"{name}.json.gz"
        part = self._folder / f".{name}.{os.getpid()}.part.json.gz"
        with file_errors_reported(trace):
            self._folder.mkdir(exist_ok=True)
            try:
                recorded.export_chrome_trace(str(part))
                os.replace(part, trace)
            finally:
                part.unlink(missing_ok=True)
        order = "self_cuda_time_total" if self._is_cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=60)
        write_atomic(trace.with_name(f"{name}.txt"), table.encode())
        size = trace.stat().st_size
        self._reporter.say(f"Profile: {trace} ({format_size(size)}), with a table in {name}.txt")
        if size > LARGE_TRACE_BYTES:
            self._reporter.notice(f"{trace} is large; fewer profile_steps make a trace that opens faster.")
