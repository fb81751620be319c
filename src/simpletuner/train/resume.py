"""Which checkpoint a run goes on from, whether it may, and the commands that lead on where it may not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import is_torchelastic_launched

from simpletuner.base.errors import CheckpointError, ConfigError, Problem
from simpletuner.config.datasets import WHOLE_RUN, Windows
from simpletuner.config.load import Loaded
from simpletuner.config.options.checkpoint import LATEST
from simpletuner.config.record import (
    SPLIT,
    BatchSplit,
    OptionChange,
    RecordComparison,
    compare,
    is_left_to_the_run,
    resolved,
    with_recorded,
)
from simpletuner.config.rules import findings
from simpletuner.config.values import join_names, shown
from simpletuner.data.manifest import LOSS_KEYS, ORDER_KEYS
from simpletuner.data.order import Cut, Order
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.events import CheckpointEvent
from simpletuner.runs.layout import LORA_NAME, RunDirectory
from simpletuner.train.checkpoint import read_state
from simpletuner.train.report import Reporter
from simpletuner.train.state import TrainState, changed

LOWER_RATE = 0.1
"""Factor of the learning rate in the command that is suggested where training diverges."""
USUAL_MAX_GRAD_NORM = 1.0
"""The clipping that is suggested there."""
SKIPPED_MORE = 10
"""Bad batches that the suggested command skips: the image comes again in each epoch."""


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint and its state."""

    folder: Path
    """Where rank 0 has it."""
    state: TrainState

    @classmethod
    def of(cls, folder: Path | None) -> "Resume | None":
        """The checkpoint in `folder`; None for None."""
        return None if folder is None else cls(folder, read_state(folder))

    @classmethod
    def of_record(cls, record: list[Any] | None) -> "Resume | None":
        """What `record` of another process describes."""
        return None if record is None else cls(Path(record[0]), TrainState.model_validate(record[1]))


def _record(resume: Resume | None) -> list[Any] | None:
    return None if resume is None else [str(resume.folder), resume.state.model_dump(mode="json")]


@dataclass(frozen=True)
class Ways:
    """Commands that lead on from where a run stands, each as it is typed."""

    run: RunDirectory
    loaded: Loaded

    def on(self, **changes: object) -> str:
        """Go on from the newest checkpoint, with other values of some options."""
        if self.loaded.config.resume_from_checkpoint != LATEST:
            changes = {"resume_from_checkpoint": LATEST, **changes}
        return f"`{self.loaded.command(**changes)}`"

    def anew(self, **changes: object) -> str:
        """Start another run, in a folder that is not there yet."""
        number = 2
        while (folder := self.run.root.with_name(f"{self.run.root.name}-{number}")).exists():
            number += 1
        return self.on(output_dir=str(folder), **changes)

    def from_weights(self, checkpoint: Path | None) -> str:
        """Start another run from what this one trained: from `checkpoint`, or from what a finished run ended with."""
        if self.loaded.config.model_type == "lora":
            return self.anew(init_lora=str(self.run.lora if checkpoint is None else checkpoint / LORA_NAME))
        folder = self.run.model if checkpoint is None else checkpoint
        return self.anew(pretrained_transformer_model_name_or_path=str(folder / "transformer"))

    def past_bad_batch(self, state: TrainState, *, is_partial: bool = False) -> str:
        """Remedy of a loss or gradient that is not finite, in the step after `state`.

        Args:
            is_partial: some parameters are stepped on it, so that step can only be skipped from a checkpoint on.
        """
        config = self.loaded.config
        slower: dict[str, object] = {"learning_rate": float(f"{config.learning_rate * LOWER_RATE:.3g}")}
        if not 0 < config.max_grad_norm <= USUAL_MAX_GRAD_NORM and not config.optimizer_release_gradients:
            slower["max_grad_norm"] = USUAL_MAX_GRAD_NORM
        earlier = [step for step in checkpoints.steps(self.run) if step < state.step]
        if earlier:
            folder = self.run.checkpoint(earlier[-1])
            lower = f"`{self.loaded.command(resume_from_checkpoint=str(folder), **slower)}`"
        else:
            lower = self.on(**slower) if state.step == 0 else self.anew(**slower)
        saved = f", and the run is saved at step {state.step}" if state.step > 0 else ""
        taken = f"The step was not taken{saved}"
        if is_partial:
            taken = "Parameters before it were stepped (optimizer_release_gradients), so nothing was saved"
        return (
            f"{taken}. If these images alone are bad, go on past them: "
            f"{self.on(skip_bad_batches=len(state.skipped_steps) + SKIPPED_MORE)}. If the loss rose before, train "
            f"{'from an earlier step' if state.step > 0 else 'again'} at a lower rate: {lower}."
        )


def find(run: RunDirectory, loaded: Loaded, reporter: Reporter, world: World) -> tuple[Resume | None, Loaded]:
    """The checkpoint that `resume_from_checkpoint` names, None for a fresh start; and the configuration to train with.

    That is `loaded`, with the checkpoint's values of options that are not given: another default is no reason to train
    otherwise from here on. Notices name those, and options that are changed.

    Raises:
        CheckpointError: it is damaged or missing, or was trained with other values than those that are given.
        ConfigError: the checkpoint's values do not fit to the options that may change.
    """
    found = world.from_main(
        "the checkpoint to go on from",
        lambda: Resume.of(chosen(Ways(run, loaded), reporter)),
        record=_record,
        restore=Resume.of_record,
    )
    if world.broadcast_json(loaded.config.resume_from_checkpoint) == LATEST:
        check_machines(run, 0 if found is None else found.state.step, world)
    if found is None:
        return None, loaded
    state = found.state
    loaded = continued(found.folder, state, Ways(run, loaded), reporter, is_elastic=is_torchelastic_launched())
    split, now = BatchSplit.of(state.config), BatchSplit.of(resolved(loaded.config))
    if (split.train_batch_size, split.batches_per_step) != (now.train_batch_size, now.batches_per_step):
        state.cuts.append(Cut(state.step, split.train_batch_size, split.batches_per_step))
    return found, loaded


def check_machines(run: RunDirectory, step: int, world: World) -> None:
    """Raise a CheckpointError, on all ranks, if a machine that does not share machine 0's output_dir has a checkpoint
    of a later step than `step`: it would be lost.
    """
    if world.writing_ranks == world.size:
        return
    # Of machine 0's the newest may be damaged, and passed over.
    own = max(checkpoints.steps(run), default=0) if world.machine else 0
    last = world.gather_json([own, world.machine])
    latest, machine = max(last, key=lambda each: (each[0], -each[1]))
    if latest > step:
        there = run.checkpoint(latest)
        raise CheckpointError.of(
            f"machine {machine} has {there}, and machine 0 has {f'step {step}' if step else 'no checkpoint'}",
            "the newest checkpoint on machine 0, whose output_dir is not shared",
            f"Copy it to machine 0, give machine {machine} the --machine_rank 0, or delete it there.",
        )


def chosen(ways: Ways, reporter: Reporter) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, verified; None for a fresh start.

    Raises:
        CheckpointError: it is damaged or missing, or a fresh start would write over a run.
    """
    run, choice = ways.run, ways.loaded.config.resume_from_checkpoint
    checkpoints.clear_unfinished(run)
    if choice == "":
        if checkpoints.steps(run):
            raise CheckpointError.of(
                f"{run.root} already holds a run ({len(checkpoints.steps(run))} checkpoints)",
                "an empty output_dir with resume_from_checkpoint = ''",
                f"To go on: {ways.on()}. To start over: {ways.anew()}.",
            )
        return None
    return newest(ways, reporter) if choice == LATEST else named(Path(choice))


def continued(folder: Path, state: TrainState, ways: Ways, reporter: Reporter, *, is_elastic: bool = False) -> Loaded:
    """The configuration with the values of the checkpoint in `folder` where no other is given; in an elastic run with
    its effective batch, or the nearest that the processes can have, whatever accumulation is given.
    """
    loaded = ways.loaded
    given = [name for name, origin in loaded.origins.items() if origin != "default"]
    own_sizes = [each.id for each in loaded.datasets.train_sets if each.train_batch_size is not None]
    comparison = compare(state.config, loaded.config, given, has_own_sizes=bool(own_sizes), is_elastic=is_elastic)
    problems = [
        Problem(
            f"{folder} was trained with {name} = {shown(value)}, which this release does not have",
            remedy=f"Go on with the release that wrote it. To start over: {ways.anew()}.",
        )
        for name, value in comparison.unavailable.items()
    ]
    if comparison.refused:
        problems.append(_refused(folder, BatchSplit.of(state.config), comparison, own_sizes, ways))
    CheckpointError.raise_if(problems)
    if comparison.kept or comparison.adapted:
        config = with_recorded(loaded.config, comparison.kept | comparison.adapted)
        ConfigError.raise_if(problem for _, problem in findings(config, loaded.datasets))
        values = ", ".join(
            f"{name} = {shown(value)}"
            for name, value in comparison.kept.items()
            if not is_left_to_the_run(name, vars(loaded.config)[name])
        )
        if values:
            reporter.notice(f"Not given, and kept as {folder} was trained with: {values}.")
        loaded = replace(loaded, config=config)
    is_cut_otherwise = "train_batch_size" in comparison.split
    if quiet := comparison.quiet | ({} if is_cut_otherwise else comparison.split):
        reporter.say(f"Changed since step {state.step}: {_in_words(quiet)}.")
    if is_cut_otherwise:
        reporter.notice(
            f"From step {state.step + 1} on this run is trained with {_in_words(comparison.split)}. A step still has "
            f"{loaded.config.effective_batch} images, in another order; of this epoch come those that are left."
        )
    before, now = (BatchSplit.of(record) for record in (state.config, resolved(loaded.config)))
    shared_out = (
        f"{now.num_processes} processes with gradient_accumulation_steps = {now.gradient_accumulation_steps}: a step "
        f"has {now.effective_batch} images"
    )
    if is_elastic and now.effective_batch != before.effective_batch:
        reporter.notice(
            f"From step {state.step + 1} on {shared_out}, and had {before.effective_batch}. Its loss is no longer that "
            "of a run without the change."
        )
    elif "gradient_accumulation_steps" in comparison.adapted and is_elastic:
        reporter.say(f"{shared_out}, as before.")
    if comparison.steering:
        reporter.notice(
            f"From step {state.step + 1} on this run is trained with {_in_words(comparison.steering)}: its loss is no "
            "longer that of a run without the change."
        )
    return loaded


def _refused(
    folder: Path, split: BatchSplit, comparison: RecordComparison, own_sizes: Sequence[str], ways: Ways
) -> Problem:
    changes = comparison.refused
    others = {name: change.before for name, change in changes.items() if name not in SPLIT}
    # A flag cannot say null; an option that is not given keeps the checkpoint's value.
    back = {name: before for name, before in others.items() if before is not None} | comparison.restoring
    unset = [f"leave out {name}" for name, before in others.items() if before is None]
    steps = [*unset, *([f"type {ways.on(**back)}"] if back else [])]
    batch = ""
    if len(others) < len(changes):
        count = split.effective_batch
        batch = f". A step had {count} image{'' if count == 1 else 's'}"
        if own_sizes and "train_batch_size" in changes:
            whose = "has a train_batch_size of its own" if len(own_sizes) == 1 else "have their own train_batch_size"
            batch += f", and {join_names(own_sizes, 'and')} {whose}"
    return Problem(
        f"{folder} was trained with other settings: {_in_words(changes)}{batch}",
        "values that a resumed run may change (docs/runs.md)",
        f"To go on with the settings of the checkpoint, {' and '.join(steps)}. To start over: {ways.anew()}.",
    )


def _in_words(changes: Mapping[str, OptionChange]) -> str:
    return ", ".join(f"{name} = {shown(change.now)} (was {shown(change.before)})" for name, change in changes.items())


def newest(ways: Ways, reporter: Reporter) -> Path | None:
    """The newest checkpoint that verifies; the damaged ones that are passed over are named."""
    passed = 0
    run = ways.run
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
            f"To start over: {ways.anew()}.",
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


def check_windows(resume: Resume, ways: Ways, now: Mapping[str, Windows], order: Order) -> None:
    """Raise a CheckpointError if other sets would have been active in the steps that the checkpoint has trained. What
    comes after them may change.
    """
    then, step = resume.state.windows, resume.state.step
    if step == 0:
        return
    # Where the past is the same, the new order counts its epochs as the old one did.
    epoch = order.place(step * order.batches_per_step - 1)[0] + 1
    changed_sets = [
        name
        for name in sorted(then.keys() | now.keys())
        if _past(then.get(name, WHOLE_RUN), step, epoch) != _past(now.get(name, WHOLE_RUN), step, epoch)
    ]
    if changed_sets:
        raise CheckpointError.of(
            f"{', '.join(changed_sets)}: other steps or epochs up to step {step} are active than those that "
            f"{resume.folder} was trained with",
            "the same start_step, end_step, start_epoch and end_epoch, as far as they lie before that step",
            f"Put them back to go on. To start over: {ways.anew()}.",
        )


def _past(windows: Windows, step: int, epoch: int) -> list[tuple[int, int]]:
    """`windows` as far as they lie in the first steps and epochs."""
    return [
        (min(first, done + 1), done if last is None else min(last, done))
        for done, (first, last) in ((step, windows["step"]), (epoch, windows["epoch"]))
    ]


def check_content(resume: Resume, ways: Ways, *, data: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Raise a CheckpointError if the image sets or the base model are not those of the checkpoint."""
    problems = []
    if sets := changed(resume.state.data, data):
        finished = ways.run.result(ways.loaded.config.model_type).exists()
        weights = ways.from_weights(None if finished else resume.folder)
        problems.append(
            Problem(
                f"{', '.join(sets)}: images, captions, crops, references or masks have changed since {resume.folder}, "
                f"or a key of the set: {join_names((*ORDER_KEYS, *LOSS_KEYS))}",
                "the same data",
                f"Put them back to go on. To train what is there now, from the weights of this run: {weights}. "
                f"To start over: {ways.anew()}.",
            )
        )
    if other := changed(resume.state.model, model):
        problems.append(
            Problem(
                f"{', '.join(other)}: not the weights or settings that {resume.folder} was trained with",
                "the same base model",
                f"Name that one to go on. To start over: {ways.anew()}.",
            )
        )
    CheckpointError.raise_if(problems)
