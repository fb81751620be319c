"""Where losses and pictures are also sent while the run goes on."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Says, Slice, Text

TRACKERS = ("tensorboard", "wandb")
"""What `report_to` may name; each is an extra of the same name."""


def _trackers(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if names == ("none",):
        return ()
    if not set(names) <= set(TRACKERS) or len(set(names)) < len(names):
        raise ValueError("not trackers")
    return names


def _comma_list(value: object) -> object:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _are_trackers(text: str) -> str:
    _trackers(text)
    return text


class TrackingOptions(Slice):
    """Tracking."""

    report_to: Annotated[
        str,
        BeforeValidator(_comma_list),
        AfterValidator(_are_trackers),
        Says("none, tensorboard, wandb, or a comma list of these"),
    ] = "none"
    """Trackers beside the run's own events: `none`, `tensorboard`, `wandb` or a comma list. They get each
    step's loss and the validation images by the run's step; on W&B that is the axis `step`."""

    tracker_project_name: Text = "simpletuner"
    """The tracker's project."""

    tracker_run_name: Text | None = None
    """The tracker's name for this run; by default the run directory's."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `report_to`; none for `none`."""
        return _trackers(self.report_to)
