"""Compiling the model before it trains."""

from typing import Literal

from simpletuner.config.options.kinds import Slice


class CompileOptions(Slice):
    """Compilation."""

    dynamo_backend: Literal["auto", "no", "inductor"] = "auto"
    """`inductor` compiles the transformer's repeated blocks by `torch.compile`, one graph for all blocks of a kind:
    a minute or more at the start, faster steps after it. Validation images and the held-out loss are computed
    uncompiled, so that they compare with those of any run. What cannot be compiled ends the run. `auto` is `no` on a
    CPU; on a GPU it compiles where the compiler works and the run has more than 200 steps, and says in a line why or
    why not. What it chose is recorded, and a resumed run keeps it unless another value is given."""

    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """What the compiler tries: `max-autotune-no-cudagraphs` times several kernels for each product, which takes
    minutes more at the start."""
