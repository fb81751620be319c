"""Send a run's steps and validations to TensorBoard and Weights & Biases; their errors never stop the run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.runs.events import Event, Picture, StepEvent, ValidationEvent

STEP_SCALARS = (
    "loss",
    "lr",
    "grad_norm",
    "seconds",
    "memory_gib",
    "images_per_s",
    "tflop_per_s",
    "mfu",
    "hfu",
)
"""Keys of a step event that trackers log."""


def step_scalars(event: StepEvent) -> dict[str, float]:
    """The scalars that trackers log for a step, by tag. Unknown values are left out."""
    values = event.model_dump()
    return {f"train/{key}": values[key] for key in STEP_SCALARS if values[key] is not None}


@runtime_checkable
class Tracker(Protocol):
    """A tracker of steps and validations."""

    name: str

    def step(self, event: StepEvent) -> None: ...

    def validation(self, event: ValidationEvent) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """All trackers of a run. A tracker that raises is reported once and removed."""

    def __init__(self, trackers: Sequence[Tracker], notice: Callable[[str], None]) -> None:
        self._trackers = list(trackers)
        self._notice = notice

    def emit(self, event: Event) -> None:
        """Pass a step or validation event to all trackers; ignore other events."""
        if isinstance(event, StepEvent):
            self._call_all(lambda tracker: tracker.step(event))
        elif isinstance(event, ValidationEvent):
            self._call_all(lambda tracker: tracker.validation(event))

    def close(self) -> None:
        self._call_all(lambda tracker: tracker.close())
        self._trackers = []

    def _call_all(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:  # noqa: BLE001  a tracker may raise anything; the run continues
                self._trackers.remove(tracker)
                self._notice(f"{tracker.name} failed and logs no more of this run ({type(error).__name__}: {error})")


class TensorBoard:
    name = "tensorboard"

    def __init__(self, root: Path, resumed_from: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the extra `tensorboard`

        # A resumed run repeats the steps after the checkpoint: purge their earlier values from the curves.
        self._writer = SummaryWriter(
            str(root / "tensorboard"), purge_step=None if resumed_from is None else resumed_from + 1
        )
        self._root = root

    def step(self, event: StepEvent) -> None:
        for key, value in step_scalars(event).items():
            self._writer.add_scalar(key, value, event.step)

    def validation(self, event: ValidationEvent) -> None:
        import numpy
        from PIL import Image

        if event.loss is not None:
            self._writer.add_scalar("held_out/loss", event.loss, event.step)
        if event.ema_loss is not None:
            self._writer.add_scalar("held_out/ema_loss", event.ema_loss, event.step)
        for sigma, loss in event.loss_by_sigma.items():
            self._writer.add_scalar(f"held_out/sigma_{sigma}", loss, event.step)
        for picture in event.pictures:
            with Image.open(self._root / picture.path) as image:
                pixels = numpy.asarray(image.convert("RGB"))
            self._writer.add_image(_title(picture), pixels, event.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Logs the run's step under `STEP`, as the axis of all curves and images, because W&B's own step counts log calls.

    W&B rejects a step of its own count below the last one. Such steps occur: the base model's images have step 0 and
    may follow later steps, and a resumed run repeats steps.
    """

    name = "wandb"
    STEP = "step"

    def __init__(
        self,
        root: Path,
        options: TrackingOptions,
        config: Mapping[str, Any],
        run_id: str,
    ) -> None:
        import wandb  # needs the extra `wandb`

        self._wandb = wandb
        self._root = root
        self._run = wandb.init(
            project=options.tracker_project_name,
            name=options.tracker_run_name or root.name,
            # An absolute path: W&B's service serves all runs of this process, in the first run's working folder.
            dir=str(root.absolute()),
            config=dict(config),
            id=run_id,
            resume="allow",
        )
        self._run.define_metric(self.STEP, hidden=True)
        self._run.define_metric("*", step_metric=self.STEP)

    def step(self, event: StepEvent) -> None:
        self._log(event.step, step_scalars(event))

    def validation(self, event: ValidationEvent) -> None:
        values: dict[str, Any] = {f"held_out/sigma_{sigma}": loss for sigma, loss in event.loss_by_sigma.items()}
        if event.loss is not None:
            values["held_out/loss"] = event.loss
        if event.ema_loss is not None:
            values["held_out/ema_loss"] = event.ema_loss
        for picture in event.pictures:
            image = self._wandb.Image(str(self._root / picture.path), caption=picture.prompt)
            values[f"pictures/{_title(picture)}"] = image
        self._log(event.step, values)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({self.STEP: step, **values})

    def close(self) -> None:
        self._run.finish()


def _title(picture: Picture) -> str:
    return Path(picture.path).stem + (" (average)" if picture.is_ema else "")


def build(
    options: TrackingOptions,
    *,
    root: Path,
    resumed_from: int | None,
    config: Mapping[str, Any],
    run_id: str,
    notice: Callable[[str], None],
) -> Trackers:
    """The trackers that `report_to` names. A tracker that cannot start is reported and left out.

    Args:
        config: the resolved configuration, without secrets and private paths, to be logged.
        run_id: id of the run, equal for all its attempts.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(root, resumed_from),
        "wandb": lambda: Wandb(root, options, config, run_id),
    }
    started: list[Tracker] = []
    for name in options.trackers:
        try:
            started.append(makers[name]())
        except Exception as error:  # noqa: BLE001  as above
            notice(f"{name} could not start and logs nothing of this run ({type(error).__name__}: {error})")
    return Trackers(started, notice)
