"""Compiled blocks: one compiled graph for all blocks of a kind, counted, bounded, and never replaced in silence.

Blocks of a class share one compiled function that is given the block itself, so its weights are inputs and not
constants. What may vary between calls is few, and that bounds how often the compiler is asked.
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
"""How many compiled graphs a kind of block can come to need: passes with gradients whose inputs want one or not (the
first block's do not), and passes without gradients with the adapter on or off × batches of one or of more × one table
of positions or one a sample. Sizes are symbols in the graph, so resolutions and routes add none. References may be
masked or not: twice as many with references."""

PROBE_LIMIT_S = 120.0
"""Longer than a first start of Triton and its compiler takes on a slow disk."""

_PROBE = """
import sys
import torch


def first_line(kind, error, _trace):
    print(f"{kind.__name__}: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)


sys.excepthook = first_line
x = torch.ones(256, device=sys.argv[1], requires_grad=True)
torch.compile(lambda x: torch.tanh(2 * x).sum(), backend="inductor", fullgraph=True)(x).backward()
"""


def compiler_lack(device_type: str) -> str | None:
    """Why inductor cannot compile for a type of device on this machine, in a line; None if it can.

    For a GPU, a tiny function is compiled and differentiated in a process of its own, which may crash or hang: that
    takes Triton, a C compiler and the CUDA assembler. For a CPU, only its C++ compiler is looked for.
    """
    compiler = os.environ.get("CXX", "g++")
    if device_type == "cpu":
        return None if shutil.which(compiler) else f"there is no C++ compiler {compiler} (CXX names another)"
    return probe_lack(device_type, PROBE_LIMIT_S)


@functools.cache
def probe_lack(device_type: str, limit_s: float) -> str | None:
    """The same by trying, for any type of device."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", _PROBE, device_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return f"a test compilation took more than {limit_s:g} s"
    lines = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else lines[-1] if lines else f"a test compilation died ({done.returncode})"


class Compiled:
    """The blocks that `install` has compiled, or rather will: the first pass through each kind does it."""

    def __init__(self, backend: str, kinds: int, bound: int) -> None:
        self.backend = backend
        self.kinds = kinds
        """Classes of blocks, and within a class, differences in what they are made of."""
        self.bound = bound
        """The most compiled graphs there can be."""
        self.count = 0
        """Compilations so far."""
        self.seconds = 0.0
        """Time spent in making them."""
        self.is_on = True
        """Off, blocks that train run as they are, too."""

    def __str__(self) -> str:
        kinds = f"{self.kinds} {'kind' if self.kinds == 1 else 'kinds'} of block"
        return f"{self.count} compilations of {kinds} (at most {self.bound}) by {self.backend}, {self.seconds:.0f} s"

    @contextlib.contextmanager
    def failures_are_explained(self) -> Iterator[None]:
        """Turn what the compiler raises into a ConfigError that names the way out. Nothing goes on uncompiled."""
        # Takes seconds to import; `install` has done so already.
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
        from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

        try:
            yield
        except (TorchDynamoException, FailOnRecompileLimitHit, CppCompileError, InvalidCxxCompiler) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ConfigError.of(
                f"dynamo_backend = {self.backend}: the blocks cannot be compiled: {' '.join(lines[:2])}",
                remedy="Give --dynamo_backend=no to train uncompiled: the losses are the same but for rounding. With "
                "TORCH_LOGS=+dynamo in the environment the compiler says more.",
            ) from error


def install(
    blocks: Sequence[nn.Module],
    *,
    backend: str,
    mode: str = "default",
    sizes_vary: bool = True,
    has_references: bool = False,
) -> Compiled:
    """Compile each block's forward wherever the block trains; in evaluation it stays as it is, to the bit.

    Call it before `recompute.install`: what is recomputed is then the compiled block.

    Args:
        backend: a backend of `torch.compile`.
        sizes_vary: whether more than one shape of input is expected. If not, graphs are compiled for the one shape,
            which can be faster, and once more should another come.
        has_references: whether references may come, with padding or without.

    Raises:
        ValueError: something has wrapped a block already, and would be left out.
    """
    # Takes seconds to import, which a run without compilation does not pay.
    import torch._dynamo
    import torch.fx.experimental._config as symbols
    from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
    from torch._inductor import config as inductor

    by_class: dict[type[nn.Module], list[nn.Module]] = {}
    for block in blocks:
        by_class.setdefault(type(block), []).append(block)
    layouts = {kind: len({_layout(block) for block in members}) for kind, members in by_class.items()}
    variants = VARIANTS * (1 if sizes_vary else 2) * (2 if has_references else 1)
    compiled = Compiled(backend, sum(layouts.values()), variants * sum(layouts.values()))

    # All of these hold for the process: it trains one model. Past the limit a full graph is an error, not a fallback.
    torch._dynamo.config.recompile_limit = variants * max(layouts.values())
    torch._dynamo.config.issue_3_13_0_warning = False  # of slower guards, for a few blocks a step
    symbols.use_duck_shape = False  # two sizes that are equal by chance are no reason to compile again
    inductor.fallback_random = True  # dropout draws what it draws without compilation

    began = 0.0

    def start(_: object) -> None:
        nonlocal began
        began = time.monotonic()

    def end(what: CallbackArgs) -> None:
        compiled.seconds += time.monotonic() - began
        compiled.count += what.callback_trigger is CallbackTrigger.DYNAMO

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)

    for kind, members in by_class.items():
        compiled_forward = torch.compile(
            kind.forward, backend=backend, mode=mode, fullgraph=True, dynamic=True if sizes_vary else None
        )
        for block in members:
            if "forward" in vars(block):
                raise ValueError(f"a {kind.__name__} is wrapped already: compile blocks before anything wraps them")
            block.forward = _in_training(block, block.forward, compiled_forward, compiled)
    return compiled


def _in_training(
    block: nn.Module, plain: Callable[..., Any], compiled_forward: Callable[..., Any], compiled: Compiled
) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return compiled_forward(block, *inputs) if block.training and compiled.is_on else plain(*inputs)

    return run


def _layout(block: nn.Module) -> tuple[object, ...]:
    """What a block is made of: modules by name, and the shapes of their parameters. Adapters that sit in some blocks
    only make layouts that differ."""
    return tuple(
        (name, type(module), tuple((own, parameter.shape) for own, parameter in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )
