"""Compile transformer blocks. Blocks of a class share their compiled graphs, whose number is counted and limited.

One compiled function per class takes the block as an argument, so its weights are inputs, not constants. Few properties
vary between calls, which limits the number of compilations. If compilation fails, the command ends with an error.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from simpletuner.base.errors import ConfigError

VARIANTS = 16
"""Maximum number of compiled graphs per kind of block: 4 × 2 × 2.

4 kinds of pass: with gradients, where the inputs require a gradient or not (those of the first block do not); and
without gradients, with the adapter on or off. 2 batch sizes: one or more. 2 position tables: one for all samples, or
one per sample. Sizes are symbolic, so resolutions and routes add none. With references, the number doubles: they come
with or without a padding mask."""

PROBE_LIMIT_S = 120.0
"""Seconds; longer than the first start of Triton and its compiler takes on a slow disk."""

_PROBE = """
import sys
import torch


def first_line(kind, error, _trace):
    print(f"{kind.__name__}: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)


sys.excepthook = first_line
x = torch.ones(256, device=sys.argv[1], requires_grad=True)
torch.compile(lambda x: torch.tanh(2 * x).sum(), backend="inductor", fullgraph=True)(x).backward()
"""


def compiler_problem(device_type: str) -> str | None:
    """Why inductor cannot compile for a device type on this machine, in one line; None if it can.

    For a GPU, a separate process, which may crash or hang, compiles and differentiates a tiny function. That needs
    Triton, a C compiler and the CUDA assembler. For a CPU, only the C++ compiler is searched for.
    """
    compiler = os.environ.get("CXX", "g++")
    if device_type == "cpu":
        return None if shutil.which(compiler) else f"there is no C++ compiler {compiler} (CXX names another)"
    return probe_compiler(device_type, PROBE_LIMIT_S)


@functools.cache
def probe_compiler(device_type: str, limit_s: float) -> str | None:
    """As `compiler_problem`, by a test compilation in a separate process for any device type."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE, device_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"a test compilation took more than {limit_s:g} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"a test compilation died ({done.returncode})"


class CompiledBlocks:
    """Counts and settings of compiled blocks, made by `install`. The first pass through a kind of block compiles it."""

    def __init__(self, backend: str, kinds: int, bound: int) -> None:
        self.backend = backend
        self.kinds = kinds
        """Number of kinds of block: the distinct layouts of each class."""
        self.bound = bound
        """Maximum number of compiled graphs."""
        self.count = 0
        """Number of compilations so far."""
        self.seconds = 0.0
        """Seconds spent on compilations."""
        self.is_on = True
        """If false, blocks run uncompiled in training too."""

    def __str__(self) -> str:
        kinds = f"{self.kinds} {'kind' if self.kinds == 1 else 'kinds'} of block"
        return f"{self.count} compilations of {kinds} (at most {self.bound}) by {self.backend}, {self.seconds:.0f} s"

    @contextlib.contextmanager
    def failures_are_explained(self) -> Iterator[None]:
        """Turn the compiler's errors into a ConfigError with a remedy. There is no fallback to uncompiled blocks."""
        # Takes seconds to import; `install` has done so already.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        try:
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ConfigError.of(
                f"dynamo_backend = {self.backend}: the blocks cannot be compiled: {' '.join(lines[:2])}",
                remedy="Give --dynamo_backend=no to train uncompiled: the losses are equal up to rounding. With "
                "TORCH_LOGS=+dynamo in the environment the compiler says more.",
            ) from error


def install(
    blocks: Sequence[nn.Module],
    *,
    backend: str,
    mode: str = "default",
    sizes_vary: bool = True,
    has_references: bool = False,
) -> CompiledBlocks:
    """Compile each block's forward for training. In evaluation blocks run uncompiled, with bit-identical results.

    Call it before `recompute.install`, so that the compiled block is checkpointed.

    Args:
        backend: a backend of `torch.compile`.
        sizes_vary: whether several input shapes are expected. If not, graphs are compiled for one shape, which can be
            faster, and again for a second shape.
        has_references: whether inputs may have reference images, with or without padding.

    Raises:
        ValueError: a block's forward is wrapped already; the compiled one would bypass the wrapper.
    """
    # Imported here, because it takes seconds.
    import torch._dynamo
    import torch.fx.experimental._config as symbols
    from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
    from torch._inductor import config as inductor

    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for block in blocks:
        by_class.setdefault(type(block), []).append(block)
    layouts = {cls: len({_layout(block) for block in members}) for cls, members in by_class.items()}
    variants = VARIANTS * (1 if sizes_vary else 2) * (2 if has_references else 1)
    compiled = CompiledBlocks(backend, sum(layouts.values()), variants * sum(layouts.values()))

    # Settings of the whole process, which trains one model. With fullgraph, exceeding the limit raises.
    torch._dynamo.config.recompile_limit = variants * max(layouts.values())
    torch._dynamo.config.issue_3_13_0_warning = False  # about slower guards, irrelevant for a few blocks per step
    symbols.use_duck_shape = False  # otherwise sizes that are equal by chance cause a recompilation
    inductor.fallback_random = True  # dropout draws the same numbers as without compilation

    started_at = 0.0

    def start(_: object) -> None:
        nonlocal started_at
        started_at = time.monotonic()

    def end(arguments: CallbackArgs) -> None:
        compiled.seconds += time.monotonic() - started_at
        compiled.count += arguments.callback_trigger is CallbackTrigger.DYNAMO

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)

    for cls, members in by_class.items():
        compiled_forward = torch.compile(
            cls.forward, backend=backend, mode=mode, fullgraph=True, dynamic=True if sizes_vary else None
        )
        for block in members:
            if "forward" in vars(block):
                raise ValueError(f"a {cls.__name__} is wrapped already: compile blocks before anything wraps them")
            block.forward = _in_training(block, block.forward, compiled_forward, compiled)
    return compiled


def _in_training(
    block: nn.Module, plain_forward: Callable[..., Any], compiled_forward: Callable[..., Any], compiled: CompiledBlocks
) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return compiled_forward(block, *inputs) if block.training and compiled.is_on else plain_forward(*inputs)

    return run


def _layout(block: nn.Module) -> tuple[object, ...]:
    """A block's modules by name, with their parameters' shapes. Adapters in some blocks give these another layout."""
    return tuple(
        (
            name,
            type(module),
            tuple(
                (parameter_name, parameter.shape)
                for parameter_name, parameter in module.named_parameters(recurse=False)
            ),
        )
        for name, module in block.named_modules()
    )
