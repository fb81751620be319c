"""Options for compiling the transformer."""

from typing import Literal

from simpletuner.config.options.kinds import Slice


class CompileOptions(Slice):
    """Compilation."""

    dynamo_backend: Literal["auto", "no", "inductor"] = "auto"
    """Whether to compile the transformer. `inductor` compiles its repeated blocks with `torch.compile`, one graph for
    all double blocks and one for all single blocks: this takes a minute or more at startup and makes steps faster. If a
    block cannot be compiled, the run ends. Validation images and the held-out loss are computed uncompiled, so that
    they can be compared with those of any other run. `auto` is `no` on a CPU; on a GPU it compiles if the compiler
    works and the run has more than 200 steps, and prints its reason. The run records the choice of `auto`, and a
    resumed run keeps it unless you give another value."""

    dynamo_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """Mode of the compiler. `max-autotune-no-cudagraphs` times several kernels for each matrix product, which takes
    several more minutes at startup."""
