"""Options for the exponential moving average (EMA) of the trainable parameters."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt

from simpletuner.config.options.kinds import Count, Slice


class EmaOptions(Slice):
    """Moving average."""

    use_ema: bool = False
    """Keep an exponential moving average (EMA) of the trainable parameters, in fp32, and export it beside the trained
    weights, in `ema/` of the run directory and of each checkpoint."""

    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.995
    """Share of the average that each update keeps. The average covers about the last 1/(1 - decay) updates; at 0 it
    equals the trained weights."""

    ema_device: Literal["auto", "cpu", "accelerator"] = "auto"
    """Device that holds the average. On the CPU each update copies all trainable parameters to host memory, and the
    step waits for the copy. `auto` is the accelerator for a LoRA and the CPU for full training."""

    ema_update_interval: Count = 1
    """Number of steps between updates of the average."""

    ema_validation: Literal["comparison", "ema_only", "none"] = "comparison"
    """Which weights generate validation images: both the average and the trained weights (`comparison`), only the
    average (`ema_only`), or only the trained weights (`none`). The held-out loss of the average is measured too, except
    with `none`."""
