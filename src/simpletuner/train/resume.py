"""Which checkpoint a run goes on from, and whether it may."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.config.load import Loaded
from simpletuner.config.record import compare, is_left_to_the_run, with_recorded
from simpletuner.config.rules import findings
from simpletuner.config.values import shown
from simpletuner.runs import checkpoints
from simpletuner.runs.events import CheckpointEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.checkpoint import read_state
from simpletuner.train.report import Reporter
from simpletuner.train.state import TrainState, changed

START_OVER = "To start over give --resume_from_checkpoint='' and another --output_dir."


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint and its state."""

    folder: Path
    state: TrainState


def find(run: RunDirectory, loaded: Loaded, reporter: Reporter) -> tuple[Resume | None, Loaded]:
    """The checkpoint that `resume_from_checkpoint` names, None for a fresh start; and the configuration to train with.

    That is `loaded`, with the checkpoint's values of options that are not given: another default is no reason to train
    otherwise from here on. A notice names them.

    Raises:
        CheckpointError: it is damaged or missing, or was trained with other values than those that are given.
        ConfigError: the checkpoint's values do not fit to the options that may change.
    """
    checkpoints.clear_unfinished(run)
    choice = loaded.config.resume_from_checkpoint
    if choice == "":
        if checkpoints.steps(run):
            raise CheckpointError.of(
                f"{run.root} already holds a run ({len(checkpoints.steps(run))} checkpoints)",
                "an empty --output_dir with resume_from_checkpoint=''",
                "Give another --output_dir, or remove that one.",
            )
        return None, loaded
    folder = newest(run, reporter) if choice == "latest" else named(Path(choice))
    if folder is None:
        return None, loaded
    state = read_state(folder)
    return Resume(folder, state), continued(folder, state, loaded, reporter)


def continued(folder: Path, state: TrainState, loaded: Loaded, reporter: Reporter) -> Loaded:
    """`loaded` with the values of the checkpoint in `folder` where no other is given."""
    given = [name for name, origin in loaded.origins.items() if origin != "default"]
    comparison = compare(state.config, loaded.config, given)
    problems = [
        Problem(
            f"{folder} was trained with {name} = {shown(value)}, which this release does not have",
            remedy=f"Go on with the release that wrote it. {START_OVER}",
        )
        for name, value in comparison.unavailable.items()
    ]
    if comparison.changed:
        problems.append(
            Problem(
                f"{folder} was trained with other settings: {', '.join(comparison.changed)}",
                "the same, but for steps, validation, checkpoints and tracking",
                f"Put them back to go on. {START_OVER}",
            )
        )
    CheckpointError.raise_if(problems)
    if not comparison.kept:
        return loaded
    config = with_recorded(loaded.config, comparison.kept)
    ConfigError.raise_if(problem for _, problem in findings(config, loaded.datasets))
    values = ", ".join(
        f"{name} = {shown(value)}"
        for name, value in comparison.kept.items()
        if not is_left_to_the_run(name, vars(loaded.config)[name])
    )
    if values:
        reporter.notice(f"Not given, and kept as {folder} was trained with: {values}.")
    return replace(loaded, config=config)


def newest(run: RunDirectory, reporter: Reporter) -> Path | None:
    """The newest checkpoint that verifies; the damaged ones that are passed over are named."""
    passed = 0
    for found in checkpoints.newest_first(run):
        if found.damage is None:
            return found.path
        passed += 1
        place = str(found.path.relative_to(run.root))
        reporter.emit(CheckpointEvent(step=found.step, state="damaged", path=place, reason=found.damage))
        reporter.notice(f"checkpoint {found.path} is damaged and passed over: {found.damage}.")
    if passed:
        raise CheckpointError.of(
            f"all {passed} checkpoints in {run.checkpoints} are damaged",
            "one that verifies",
            START_OVER,
        )
    return None


def named(folder: Path) -> Path:
    """The checkpoint at a path."""
    if not folder.is_dir():
        raise CheckpointError.of(f"resume_from_checkpoint = {folder}", "latest, or a checkpoint's folder")
    damage = checkpoints.damage(folder)
    if damage is not None:
        raise CheckpointError.of(f"resume_from_checkpoint = {folder}: {damage}", "a checkpoint that verifies")
    return folder


def check_content(resume: Resume, *, data: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Raise a CheckpointError if the pictures, the captions or the base model are not those of the checkpoint."""
    problems = [
        Problem(
            f"{name}: pictures, captions, crops or repeats have changed since {resume.folder}",
            "the same data",
            f"Put them back to go on. {START_OVER}",
        )
        for name in changed(resume.state.data, data)
    ]
    if other := changed(resume.state.model, model):
        problems.append(
            Problem(
                f"{', '.join(other)}: not the weights or settings that {resume.folder} was trained with",
                "the same base model",
                f"Name that one to go on. {START_OVER}",
            )
        )
    CheckpointError.raise_if(problems)
