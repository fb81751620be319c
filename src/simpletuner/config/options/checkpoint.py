"""The run directory: where it lies, what is saved when, how a run goes on."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

from simpletuner.base.sizes import parse_size
from simpletuner.config.options.kinds import Count, IsPath, PathText, Says, Slice, Text, Whole, whole_as_text

LATEST = "latest"
"""The newest checkpoint that verifies."""


def _is_size(text: str) -> str:
    parse_size(text)
    return text


class CheckpointOptions(Slice):
    """Checkpoints and output."""

    output_dir: PathText = "output/{model_family}"
    """The run directory: everything that this run leaves lies in it."""

    checkpoint_step_interval: Whole = 500
    """Save every so many steps; 0 means never by steps. The end of the run always saves."""

    checkpoint_epoch_interval: Count | None = None
    """Save every so many epochs."""

    checkpoints_total_limit: Count = 5
    """Keep so many checkpoints; older ones are removed, never the newest that verifies."""

    resume_from_checkpoint: Annotated[str, IsPath(), Says("latest, a checkpoint's path, or nothing")] = LATEST
    """Go on from `latest`, from a checkpoint's path, or from nothing: `""` starts over."""

    disk_low_threshold: Annotated[
        str, BeforeValidator(whole_as_text), AfterValidator(_is_size), Says("a size such as 2GB")
    ] = "2GB"
    """Free space on the output's disk below which `disk_low_action` is taken."""

    disk_low_action: Literal["stop", "wait"] = "stop"
    """`stop` saves and leaves, to be resumed; `wait` pauses until there is space."""

    model_save_dtype: Literal["fp32", "bf16"] | None = None
    """Precision of the transformer that a full run saves: by default the one it is trained in, fp32, or bf16 where
    `adamw_bf16` trains bf16 weights. bf16 halves the finished model."""

    modelspec_comment: Text | None = None
    """A note in the saved file's header."""

    modelspec_trigger_phrase: Text | None = None
    """The word or phrase that calls up what was trained, for the saved file's header: programs that read it show it."""

    @property
    def disk_low_bytes(self) -> int:
        """`disk_low_threshold` in bytes."""
        return parse_size(self.disk_low_threshold)
