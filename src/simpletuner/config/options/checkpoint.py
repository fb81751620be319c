"""Options for the run directory: its location, when checkpoints are saved, and how a run resumes."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from simpletuner.base.sizes import parse_size
from simpletuner.config.options.kinds import Count, Expects, IsPath, PathText, Slice, Text, Whole, whole_as_text

LATEST = "latest"
"""Value of `resume_from_checkpoint`: the newest checkpoint that passes verification."""


def _is_size(text: str) -> str:
    parse_size(text)
    return text


class CheckpointOptions(Slice):
    """Checkpoints and output."""

    output_dir: PathText = "output/{model_family}"
    """The run directory. The run writes all its files there."""

    checkpoint_step_interval: Whole = 500
    """Number of steps between checkpoints. 0 turns this off. The run always saves a checkpoint at its end."""

    checkpoint_epoch_interval: Count | None = None
    """Number of epochs between checkpoints."""

    checkpoints_total_limit: Count = 5
    """Number of checkpoints to keep. Older ones are removed, except the newest that passes verification."""

    resume_from_checkpoint: Annotated[str, IsPath(), Expects("latest, a checkpoint's path, or an empty string")] = (
        LATEST
    )
    """The checkpoint to resume from: `latest`, or a checkpoint's path. An empty string (`""`) starts from step 0."""

    disk_low_threshold: Annotated[
        str, BeforeValidator(whole_as_text), AfterValidator(_is_size), Expects("a size such as 2GB")
    ] = "2GB"
    """Free space on the disk of `output_dir` below which the run takes `disk_low_action`."""

    disk_low_action: Literal["stop", "wait"] = "stop"
    """What to do when the disk is low: `stop` saves a checkpoint and ends the run, which can be resumed; `wait` pauses
    until there is space."""

    model_save_dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the transformer that full training saves. By default the precision in which it is trained: fp32, or
    bf16 if the optimizer steps bf16 weights without fp32 masters. bf16 halves the size of the saved model."""

    modelspec_comment: Text | None = None
    """A comment to write into the saved file's header."""

    modelspec_trigger_phrase: Text | None = None
    """The trigger word or phrase to write into the saved file's header. Programs that read the header show it."""

    @property
    def disk_low_bytes(self) -> int:
        """`disk_low_threshold` in bytes."""
        return parse_size(self.disk_low_threshold)
