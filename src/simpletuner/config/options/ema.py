"""A moving average of what is trained."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt

from simpletuner.config.options.kinds import Count, Slice


class EmaOptions(Slice):
    """Moving average."""

    use_ema: bool = False
    """Keep an exponential moving average of what is trained, in fp32, and export it beside the live one, in `ema/` of
    the run and of each checkpoint."""

    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.995
    """Share of the average that each update keeps: it looks back over about 1/(1 - decay) updates. 0 is what
    is trained itself."""

    ema_device: Literal["auto", "cpu", "accelerator"] = "auto"
    """Where the average lies. On the CPU each update copies all that is trained there, and the step waits for it.
    `auto` takes the accelerator for a LoRA and the CPU for a full model."""

    ema_update_interval: Count = 1
    """Update the average every so many steps."""

    ema_validation: Literal["comparison", "ema_only", "none"] = "comparison"
    """Whose validation pictures are made: the average's beside the live ones, the average's alone, or the live ones
    alone. The average's held-out loss is measured unless it is `none`."""
