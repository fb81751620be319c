"""Compiling the model before it trains."""

from typing import Literal

from simpletuner.config.options.kinds import Slice


class CompileOptions(Slice):
    """Compilation."""

    dynamo_backend: Literal["no", "inductor"] = "no"
    """`inductor` compiles the transformer's repeated blocks by `torch.compile`, one artefact for all blocks of a
    kind: a minute or more at the start, faster steps after it. Pictures and the held-out loss are made without, so
    that they compare with those of any run. What cannot be compiled ends the run; nothing falls back by itself."""

    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """What the compiler tries: `max-autotune-no-cudagraphs` times several kernels for each product, which takes
    minutes more at the start."""
