"""Looks for training in vain: adapters that do not learn, checkpoints that do not change, steps that take too long.

It reads and never writes: training's bits are the same. From a device it reads once after the first steps, and once
for each checkpoint.
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
"""Steps at a learning rate above 0 after which something must have been learned."""
SLOW_FACTOR = 3.0
"""A step is slow if it takes more than this many times what its work usually takes."""
SLOW_AT_LEAST_S = 1.0
"""Shorter steps are never slow: three times a tenth of a second is noise."""
COMPARED_STEPS = 50
"""Steps whose median a step is compared with."""
ENOUGH_STEPS = 20
"""With fewer there is no median to speak of."""
SLOW_STEP_EVERY = 100
"""At most one notice about a slow step in so many steps."""
MANY_PAGES = 1000
"""Pages read from disk in a step (4 MB) that say that memory is swapped."""
SAMPLED_NUMBERS = 2**18
"""Of each trained tensor, to tell whether it changed: the sum of their bits takes little memory."""
MOST_NAMES = 4


class Watch:
    """Tells by `notice` what is trained in vain. Call `trained_step` after each step that was taken, `saved` after
    each checkpoint.
    """

    def __init__(self, trained: Trainable, run: RunDirectory, notice: Callable[[str], None], *, start: int) -> None:
        """`start` is the step that training goes on from; its checkpoint is compared with the next."""
        self._trained = trained
        self._run = run
        self._notice = notice
        self._steps = 0
        self._steps_since_save = 0
        self._saved = (start, self._sums()) if start > 0 else None
        self._costs: deque[float] = deque(maxlen=COMPARED_STEPS)
        self._shapes: set[str] = set()
        self._told_slow: int | None = None
        self._pages = _pages_read()

    def trained_step(self, lr: float) -> None:
        """A step was taken at a learning rate of `lr`."""
        if lr <= 0:
            return
        self._steps += 1
        self._steps_since_save += 1
        if self._steps == FIRST_STEPS:
            self._check_adapters()

    def timed_step(self, step: int, shapes: str, *, seconds: float, waited: float, tflop_per_s: float) -> None:
        """A step over images of `shapes` took `seconds`, of which `waited` went by until its batch was there.

        The first step of each shape is left out: it may compile, and libraries set up what they need.
        """
        pages, self._pages = self._pages, _pages_read()
        if shapes not in self._shapes:
            self._shapes.add(shapes)
            return
        cost = 1 / tflop_per_s  # seconds a unit of work: shapes and rollouts differ in what they compute
        usual = statistics.median(self._costs) if len(self._costs) >= ENOUGH_STEPS else cost
        self._costs.append(cost)
        if seconds < SLOW_AT_LEAST_S or cost <= SLOW_FACTOR * usual:
            return
        if self._told_slow is not None and step - self._told_slow < SLOW_STEP_EVERY:
            return
        self._told_slow = step
        expected = seconds * usual / cost
        if waited > seconds / 2:
            reason = f"{waited:.1f} s of them went by until its batch was read: is the disk of the caches slow?"
        elif self._pages - pages > MANY_PAGES:
            reason = f"{self._pages - pages} pages were read from disk meanwhile: memory may be swapped."
        else:
            reason = "Does another program use the machine, or is the device throttled by heat?"
        self._notice(
            f"Step {step} took {seconds:.1f} s, and its work usually takes {expected:.1f} s (the median of the last "
            f"{len(self._costs)} steps). {reason}"
        )

    def saved(self, step: int) -> None:
        """A checkpoint of `step` was written."""
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
        """Name the adapter layers whose B, which begins as zeros, is still all zero."""
        matrices = {
            name.removesuffix(".b"): tensor
            for name, tensor in self._trained.named_parameters()
            if name.endswith(".b") and tensor.numel()  # of some a rank has no share
        }
        if not matrices:
            return
        largest: list[float] = torch.stack([tensor.abs().amax().float() for tensor in matrices.values()]).tolist()
        idle = [name for name, value in zip(matrices, largest, strict=True) if value == 0]
        if idle:
            more = f" and {len(idle) - MOST_NAMES} more" if len(idle) > MOST_NAMES else ""
            self._notice(
                f"After {FIRST_STEPS} steps {len(idle)} of {len(matrices)} adapter layers have learned nothing, their "
                f"B is all zero: {', '.join(idle[:MOST_NAMES])}{more}. No gradient arrives there, or learning_rate is "
                "too low."
            )

    @torch.no_grad()
    def _sums(self) -> list[int]:
        """For each trained tensor the sum of the bits of its first numbers, read at once."""
        sums = [
            tensor.detach().flatten()[:SAMPLED_NUMBERS].view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
            for tensor in self._trained.state().values()
        ]
        read: list[int] = torch.stack(sums).tolist()
        return read


def _pages_read() -> int:
    """Pages that this process had to wait for the disk for, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
