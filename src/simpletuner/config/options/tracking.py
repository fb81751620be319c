"""Options for trackers, which receive losses and validation images during the run."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.options.kinds import Expects, Slice, Text

TRACKERS = ("tensorboard", "wandb")
"""Trackers that `report_to` accepts; each needs the package extra of the same name."""


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
        Expects("none, tensorboard, wandb, or a comma list of these"),
    ] = "none"
    """Trackers to report to, besides the run's own events: `none`, `tensorboard`, `wandb` or a comma list. They receive
    each step's loss and the validation images, indexed by the run's step; on W&B that is the axis `step`."""

    tracker_project_name: Text = "simpletuner"
    """Project name in the tracker."""

    tracker_run_name: Text | None = None
    """Name of this run in the tracker. By default the run directory's name."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """The names in `report_to`; empty for `none`."""
        return _trackers(self.report_to)
