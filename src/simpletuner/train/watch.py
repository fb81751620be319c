"""Detect ineffective training: adapters that do not learn, checkpoints that do not change, and slow steps.

It only reads, so training stays bit-identical. It reads from the device once after the first steps, and once per
checkpoint.
"""

import resource
import statistics
from collections import deque
from collections.abc import Callable

import torch

from simpletuner.memory.tensors import INTEGERS
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.trained import Trainable

FIRST_STEPS = 10
"""After this number of steps at a learning rate above 0 every adapter layer must have changed."""
SLOW_FACTOR = 3.0
"""A step is slow if it takes more than this many times the usual time for its work."""
SLOW_AT_LEAST_S = 1.0
"""Shorter steps never count as slow: a step of 0.3 s instead of 0.1 s is noise."""
COMPARED_STEPS = 50
"""The usual time is the median over at most this number of recent steps."""
ENOUGH_STEPS = 20
"""With fewer steps there is no meaningful median."""
SLOW_STEP_EVERY = 100
"""At most one notice about a slow step within this number of steps."""
MANY_PAGES = 1000
"""More pages than this read from disk in a step (4 MB) suggest that memory is swapped."""
SAMPLED_NUMBERS = 2**18
"""Number of elements of each trained tensor to check for changes: their sum needs little memory."""
MAX_NAMES = 4


class Watch:
    """Reports ineffective training through `notice`. Call `trained_step` after each step that changed the weights,
    `timed_step` after each step whose duration counts, and `saved` after each checkpoint.
    """

    def __init__(self, trained: Trainable, run: RunDirectory, notice: Callable[[str], None], *, start: int) -> None:
        """`start` is the step from which training resumes; its checkpoint is compared with the next one."""
        self._trained = trained
        self._run = run
        self._notice = notice
        self._steps = 0
        self._steps_since_save = 0
        self._saved = (start, self._sums()) if start > 0 else None
        self._costs: deque[float] = deque(maxlen=COMPARED_STEPS)
        self._shapes: set[str] = set()
        self._last_slow_step: int | None = None
        self._pages = _pages_read()

    def trained_step(self, lr: float) -> None:
        """Count a step that was taken at a learning rate of `lr`."""
        if lr <= 0:
            return
        self._steps += 1
        self._steps_since_save += 1
        if self._steps == FIRST_STEPS:
            self._check_adapters()

    def timed_step(self, step: int, shapes: str, *, seconds: float, waited: float, tflop_per_s: float) -> None:
        """Check the duration of a step over images of `shapes`: `seconds` in total, `waited` of them for its batch.

        The first step of each shape is ignored: blocks may compile in it, and libraries initialize.
        """
        pages, self._pages = self._pages, _pages_read()
        if shapes not in self._shapes:
            self._shapes.add(shapes)
            return
        cost = 1 / tflop_per_s  # seconds per unit of work, because shapes and rollouts differ in their work
        usual = statistics.median(self._costs) if len(self._costs) >= ENOUGH_STEPS else cost
        self._costs.append(cost)
        if seconds < SLOW_AT_LEAST_S or cost <= SLOW_FACTOR * usual:
            return
        if self._last_slow_step is not None and step - self._last_slow_step < SLOW_STEP_EVERY:
            return
        self._last_slow_step = step
        expected = seconds * usual / cost
        if waited > seconds / 2:
            reason = f"It waited {waited:.1f} s for its batch: is the disk of the caches slow?"
        elif self._pages - pages > MANY_PAGES:
            reason = f"{self._pages - pages} pages were read from disk meanwhile: memory may be swapped."
        else:
            reason = "Does another program use the machine, or does heat throttle the device?"
        self._notice(
            f"Step {step} took {seconds:.1f} s, but its work usually takes {expected:.1f} s (the median of the last "
            f"{len(self._costs)} steps). {reason}"
        )

    def saved(self, step: int) -> None:
        """Compare the weights with those of the previous checkpoint, after a checkpoint of `step` was written."""
        sums = self._sums()
        if self._saved is not None:
            before, former = self._saved
            if before != step and sums == former and self._steps >= FIRST_STEPS and self._steps_since_save:
                self._notice(
                    f"{self._run.checkpoint(step)} has the same weights as {self._run.checkpoint(before)}: "
                    f"{self._steps_since_save} steps changed nothing. Is learning_rate too low?"
                )
        self._saved = step, sums
        self._steps_since_save = 0

    @torch.no_grad()
    def _check_adapters(self) -> None:
        """Report the adapter layers whose B, initialized to zero, is still all zero."""
        matrices = {
            name.removesuffix(".b"): tensor
            for name, tensor in self._trained.named_parameters()
            if name.endswith(".b") and tensor.numel()  # a rank may have an empty shard
        }
        if not matrices:
            return
        largest: list[float] = torch.stack([tensor.abs().amax().float() for tensor in matrices.values()]).tolist()
        idle = [name for name, value in zip(matrices, largest, strict=True) if value == 0]
        if idle:
            more_names = f" and {len(idle) - MAX_NAMES} more" if len(idle) > MAX_NAMES else ""
            self._notice(
                f"After {FIRST_STEPS} steps {len(idle)} of {len(matrices)} adapter layers have learned nothing (B is "
                f"all zero): {', '.join(idle[:MAX_NAMES])}{more_names}. No gradient reaches them, or "
                "learning_rate is too low."
            )

    @torch.no_grad()
    def _sums(self) -> list[int]:
        """For each trained tensor, the sum of the bit patterns of its first elements, as integers; one device read."""
        sums = [
            tensor.detach().flatten()[:SAMPLED_NUMBERS].view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
            for tensor in self._trained.state().values()
        ]
        values: list[int] = torch.stack(sums).tolist()
        return values


def _pages_read() -> int:
    """Major page faults of this process so far: pages that it had to read from disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
