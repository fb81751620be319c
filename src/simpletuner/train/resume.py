"""Find the checkpoint that a run resumes from, check that it fits the configuration, and suggest commands otherwise."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.config.datasets import WHOLE_RUN, Windows
from simpletuner.config.load import LoadedConfig
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.record import (
    SPLIT,
    BatchSplit,
    OptionChange,
    RecordComparison,
    compare,
    is_left_to_the_run,
    recorded_options,
    with_recorded,
)
from simpletuner.config.rules import findings
from simpletuner.config.values import join_names, value_text
from simpletuner.data.manifest import LOSS_KEYS, ORDER_KEYS
from simpletuner.data.order import Cut, Order
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.events import CheckpointEvent
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.train.checkpoint import read_state
from simpletuner.train.report import Reporter
from simpletuner.train.state import TrainState, differing_names

LOWER_RATE = 0.1
"""Factor of the learning rate in the command that is suggested when training diverges."""
USUAL_MAX_GRAD_NORM = 1.0
"""Gradient clipping in that command."""
SKIPPED_MORE = 10
"""Bad batches that the suggested command skips in addition: a bad image recurs in each epoch."""


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint and its state."""

    folder: Path
    """The checkpoint's path on rank 0."""
    state: TrainState

    @classmethod
    def of(cls, folder: Path | None) -> "ResumePoint | None":
        """The checkpoint in `folder`; None for None."""
        return None if folder is None else cls(folder, read_state(folder))

    @classmethod
    def of_record(cls, record: list[Any] | None) -> "ResumePoint | None":
        """Rebuild a ResumePoint from the `_record` that another process sent."""
        return None if record is None else cls(Path(record[0]), TrainState.model_validate(record[1]))


def _record(resume: ResumePoint | None) -> list[Any] | None:
    return None if resume is None else [str(resume.folder), resume.state.model_dump(mode="json")]


@dataclass(frozen=True)
class RestartCommands:
    """Commands that resume or restart a run, each as the user types it."""

    run: RunDirectory
    loaded: LoadedConfig

    def resume(self, **changes: object) -> str:
        """Resume from the newest checkpoint, with other values for the options in `changes`."""
        if self.loaded.config.resume_from_checkpoint != LATEST:
            changes = {"resume_from_checkpoint": LATEST, **changes}
        return f"`{self.loaded.command(**changes)}`"

    def fresh(self, **changes: object) -> str:
        """Start another run in a new folder."""
        number = 2
        while (folder := self.run.root.with_name(f"{self.run.root.name}-{number}")).exists():
            number += 1
        return self.resume(output_dir=str(folder), **changes)

    def from_weights(self, checkpoint: Path | None) -> str:
        """Start another run from this run's weights: those of `checkpoint`, or the final ones of a finished run."""
        if self.loaded.config.model_type == "lora":
            return self.fresh(init_lora=str(self.run.lora if checkpoint is None else checkpoint / LORA_NAME))
        folder = self.run.model if checkpoint is None else checkpoint
        return self.fresh(pretrained_transformer_model_name_or_path=str(folder / "transformer"))

    def past_bad_batch(self, state: TrainState, *, is_partial: bool = False) -> str:
        """Remedy for a loss or gradient that is not finite, in the step after `state`.

        Args:
            is_partial: the step already updated some parameters, so only a restart from a checkpoint can skip it.
        """
        config = self.loaded.config
        slower_options: dict[str, object] = {"learning_rate": float(f"{config.learning_rate * LOWER_RATE:.3g}")}
        if not 0 < config.max_grad_norm <= USUAL_MAX_GRAD_NORM and not config.optimizer_release_gradients:
            slower_options["max_grad_norm"] = USUAL_MAX_GRAD_NORM
        earlier_steps = [step for step in checkpoints.steps(self.run) if step < state.step]
        if earlier_steps:
            folder = self.run.checkpoint(earlier_steps[-1])
            slower_command = f"`{self.loaded.command(resume_from_checkpoint=str(folder), **slower_options)}`"
        else:
            slower_command = self.resume(**slower_options) if state.step == 0 else self.fresh(**slower_options)
        saved = f", and the run is saved at step {state.step}" if state.step > 0 else ""
        effect = f"The step was not taken{saved}"
        if is_partial:
            effect = "The step already updated some parameters (optimizer_release_gradients), so nothing was saved"
        return (
            f"{effect}. If only these images are bad, skip them: "
            f"{self.resume(skip_bad_batches=len(state.skipped_steps) + SKIPPED_MORE)}. If the loss rose before, train "
            f"{'from an earlier step' if state.step > 0 else 'again'} with a lower learning rate: {slower_command}."
        )


def find_checkpoint(
    run: RunDirectory, loaded: LoadedConfig, reporter: Reporter, world: World
) -> tuple[ResumePoint | None, LoadedConfig]:
    """The checkpoint that `resume_from_checkpoint` names (None for a fresh start) and the configuration to train with.

    The configuration is `loaded`; options that the user did not set take the checkpoint's values, so that a changed
    default does not change a run. Notices list these options and those that the user changed.

    Raises:
        CheckpointError: the checkpoint is damaged or missing, or was trained with other values than the user's.
        ConfigError: the checkpoint's values conflict with options that the user changed.
    """
    resume = world.run_on_main(
        "the checkpoint to resume from",
        lambda: ResumePoint.of(chosen_checkpoint(RestartCommands(run, loaded), reporter)),
        record=_record,
        restore=ResumePoint.of_record,
    )
    if world.broadcast_json(loaded.config.resume_from_checkpoint) == LATEST:
        check_machines(run, 0 if resume is None else resume.state.step, world)
    if resume is None:
        return None, loaded
    state = resume.state
    loaded = resumed_config(
        resume.folder, state, RestartCommands(run, loaded), reporter, is_elastic=is_torchelastic_launched()
    )
    old_split, new_split = BatchSplit.of(state.config), BatchSplit.of(recorded_options(loaded.config))
    if (old_split.train_batch_size, old_split.batches_per_step) != (
        new_split.train_batch_size,
        new_split.batches_per_step,
    ):
        state.cuts.append(Cut(state.step, old_split.train_batch_size, old_split.batches_per_step))
    return resume, loaded


def check_machines(run: RunDirectory, step: int, world: World) -> None:
    """Raise a CheckpointError, on all ranks, if a machine without access to machine 0's output_dir has a checkpoint of
    a later step than `step`: a run from `step` would overwrite it.
    """
    if world.writing_ranks == world.size:
        return
    # Machine 0 reports no step: its newest checkpoint may be damaged and skipped.
    latest_here = max(checkpoints.steps(run), default=0) if world.machine else 0
    latest_steps = world.gather_json([latest_here, world.machine])
    latest, machine = max(latest_steps, key=lambda each: (each[0], -each[1]))
    if latest > step:
        checkpoint = run.checkpoint(latest)
        raise CheckpointError.of(
            f"machine {machine} has {checkpoint}, and machine 0 has {f'step {step}' if step else 'no checkpoint'}",
            "the newest checkpoint on machine 0, whose output_dir is not shared",
            f"Copy it to machine 0, start machine {machine} with --machine_rank=0, or delete it there.",
        )


def chosen_checkpoint(commands: RestartCommands, reporter: Reporter) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, verified; None for a fresh start.

    Raises:
        CheckpointError: it is damaged or missing, or a fresh start would overwrite a run.
    """
    run, choice = commands.run, commands.loaded.config.resume_from_checkpoint
    checkpoints.clear_unfinished(run)
    if choice == "":
        if checkpoints.steps(run):
            raise CheckpointError.of(
                f"{run.root} already holds a run ({len(checkpoints.steps(run))} checkpoints)",
                "an empty output_dir with resume_from_checkpoint = ''",
                f"To resume: {commands.resume()}. To start over: {commands.fresh()}.",
            )
        return None
    return newest_checkpoint(commands, reporter) if choice == LATEST else verified_checkpoint(Path(choice))


def resumed_config(
    folder: Path, state: TrainState, commands: RestartCommands, reporter: Reporter, *, is_elastic: bool = False
) -> LoadedConfig:
    """The configuration to resume with: options that the user did not set take the values of the checkpoint in
    `folder`. An elastic run also keeps its effective batch size, or the nearest that the processes can reach, whatever
    gradient accumulation is set.
    """
    loaded = commands.loaded
    user_set = [name for name, origin in loaded.origins.items() if origin != "default"]
    sets_with_batch_size = [each.id for each in loaded.datasets.train_sets if each.train_batch_size is not None]
    comparison = compare(
        state.config, loaded.config, user_set, has_own_sizes=bool(sets_with_batch_size), is_elastic=is_elastic
    )
    problems = [
        Problem(
            f"{folder} was trained with {name} = {value_text(value)}, which this release does not have",
            remedy=f"Resume with the release that wrote it. To start over: {commands.fresh()}.",
        )
        for name, value in comparison.unavailable.items()
    ]
    if comparison.refused_changes:
        problems.append(_refused(folder, BatchSplit.of(state.config), comparison, sets_with_batch_size, commands))
    CheckpointError.raise_if(problems)
    if comparison.record_values or comparison.adapted_values:
        config = with_recorded(loaded.config, comparison.record_values | comparison.adapted_values)
        ConfigError.raise_if(problem for _, problem in findings(config, loaded.datasets))
        values = ", ".join(
            f"{name} = {value_text(value)}"
            for name, value in comparison.record_values.items()
            if not is_left_to_the_run(name, vars(loaded.config)[name])
        )
        if values:
            reporter.notice(f"Not set, so kept at the values of {folder}: {values}.")
        loaded = replace(loaded, config=config)
    changes_batch_size = "train_batch_size" in comparison.split_changes
    if routine_changes := comparison.permitted_changes | ({} if changes_batch_size else comparison.split_changes):
        reporter.say(f"Changed since step {state.step}: {_in_words(routine_changes)}.")
    if changes_batch_size:
        reporter.notice(
            f"From step {state.step + 1} on, this run is trained with {_in_words(comparison.split_changes)}. "
            f"A step still has {loaded.config.effective_batch} images, in another order; this epoch continues with its "
            "remaining images."
        )
    old_split, new_split = (BatchSplit.of(record) for record in (state.config, recorded_options(loaded.config)))
    split_text = (
        f"{new_split.num_processes} processes with gradient_accumulation_steps = "
        f"{new_split.gradient_accumulation_steps}: a step has {new_split.effective_batch} images"
    )
    if is_elastic and new_split.effective_batch != old_split.effective_batch:
        reporter.notice(
            f"From step {state.step + 1} on, {split_text} instead of {old_split.effective_batch}. The loss is no "
            "longer that of a run without the change."
        )
    elif "gradient_accumulation_steps" in comparison.adapted_values and is_elastic:
        reporter.say(f"{split_text}, as before.")
    if comparison.curve_changes:
        reporter.notice(
            f"From step {state.step + 1} on, this run is trained with {_in_words(comparison.curve_changes)}: "
            "its loss is no longer that of a run without the change."
        )
    return loaded


def _refused(
    folder: Path,
    split: BatchSplit,
    comparison: RecordComparison,
    sets_with_batch_size: Sequence[str],
    commands: RestartCommands,
) -> Problem:
    changes = comparison.refused_changes
    previous_values = {name: change.before for name, change in changes.items() if name not in SPLIT}
    # A flag cannot say null; an option that is not given keeps the checkpoint's value.
    restored = {
        name: before for name, before in previous_values.items() if before is not None
    } | comparison.restoring_values
    unset = [f"leave out {name}" for name, before in previous_values.items() if before is None]
    actions = [*unset, *([f"type {commands.resume(**restored)}"] if restored else [])]
    batch = ""
    if len(previous_values) < len(changes):
        count = split.effective_batch
        batch = f". A step had {count} image{'' if count == 1 else 's'}"
        if sets_with_batch_size and "train_batch_size" in changes:
            own_text = (
                "has its own train_batch_size" if len(sets_with_batch_size) == 1 else "have their own train_batch_size"
            )
            batch += f", and {join_names(sets_with_batch_size, 'and')} {own_text}"
    return Problem(
        f"{folder} was trained with other settings: {_in_words(changes)}{batch}",
        "values that a resumed run may change (docs/runs.md)",
        f"To resume with the settings of the checkpoint, {' and '.join(actions)}. To start over: {commands.fresh()}.",
    )


def _in_words(changes: Mapping[str, OptionChange]) -> str:
    return ", ".join(
        f"{name} = {value_text(change.after)} (was {value_text(change.before)})" for name, change in changes.items()
    )


def newest_checkpoint(commands: RestartCommands, reporter: Reporter) -> Path | None:
    """The newest checkpoint that verifies; reports the damaged ones that it skips. None if the run has no checkpoint.

    Raises:
        CheckpointError: all checkpoints are damaged.
    """
    damaged_count = 0
    run = commands.run
    for checkpoint in checkpoints.newest_first(run):
        if checkpoint.damage is None:
            return checkpoint.path
        damaged_count += 1
        relative_path = str(checkpoint.path.relative_to(run.root))
        reporter.emit(
            CheckpointEvent(step=checkpoint.step, state="damaged", path=relative_path, reason=checkpoint.damage)
        )
        reporter.notice(f"checkpoint {checkpoint.path} is damaged and skipped: {checkpoint.damage}.")
    if damaged_count:
        raise CheckpointError.of(
            f"all {damaged_count} checkpoints in {run.checkpoints} are damaged",
            "a checkpoint that verifies",
            f"To start over: {commands.fresh()}.",
        )
    return None


def verified_checkpoint(folder: Path) -> Path:
    """`folder`, verified as a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError.of(f"resume_from_checkpoint = {folder}", "latest, or a checkpoint's folder")
    damage = checkpoints.damage(folder)
    if damage is not None:
        raise CheckpointError.of(f"resume_from_checkpoint = {folder}: {damage}", "a checkpoint that verifies")
    return folder


def check_windows(resume: ResumePoint, commands: RestartCommands, windows: Mapping[str, Windows], order: Order) -> None:
    """Raise a CheckpointError if `windows` change which datasets were active in the steps that the checkpoint
    has already trained. Windows may change later steps.
    """
    recorded, step = resume.state.windows, resume.state.step
    if step == 0:
        return
    # If the windows agree on the past, the new order counts past epochs as the old one did.
    epoch = order.position(step * order.batches_per_step - 1)[0] + 1
    changed_sets = [
        name
        for name in sorted(recorded.keys() | windows.keys())
        if _past(recorded.get(name, WHOLE_RUN), step, epoch) != _past(windows.get(name, WHOLE_RUN), step, epoch)
    ]
    if changed_sets:
        raise CheckpointError.of(
            f"{', '.join(changed_sets)}: active in other steps or epochs up to step {step} than when {resume.folder} "
            "was trained",
            "the same start_step, end_step, start_epoch and end_epoch, as far as they lie before that step",
            f"Restore them to resume. To start over: {commands.fresh()}.",
        )


def _past(windows: Windows, step: int, epoch: int) -> list[tuple[int, int]]:
    """`windows`, limited to the first `step` steps and `epoch` epochs."""
    return [
        (min(first, done + 1), done if last is None else min(last, done))
        for done, (first, last) in ((step, windows["step"]), (epoch, windows["epoch"]))
    ]


def check_content(
    resume: ResumePoint, commands: RestartCommands, *, data: Mapping[str, str], model: Mapping[str, str]
) -> None:
    """Raise a CheckpointError if the image datasets or the base model are not those of the checkpoint."""
    problems = []
    if changed_sets := differing_names(resume.state.data, data):
        finished = commands.run.result(commands.loaded.config.model_type).exists()
        weights = commands.from_weights(None if finished else resume.folder)
        problems.append(
            Problem(
                f"{', '.join(changed_sets)}: images, captions, crops, references or masks have changed since "
                f"{resume.folder}, or a key of the dataset: {join_names((*ORDER_KEYS, *LOSS_KEYS))}",
                "the same data",
                f"Restore them to resume. To train with the new data, from the weights of this run: {weights}. "
                f"To start over: {commands.fresh()}.",
            )
        )
    if changed_parts := differing_names(resume.state.model, model):
        problems.append(
            Problem(
                f"{', '.join(changed_parts)}: not the weights or settings that {resume.folder} was trained with",
                "the same base model",
                f"Use that base model again to resume. To start over: {commands.fresh()}.",
            )
        )
    CheckpointError.raise_if(problems)
