"""File and folder names in a run directory."""

import re
from dataclasses import dataclass
from pathlib import Path

from simpletuner.base.errors import ConfigError
from simpletuner.base.files import DirectoryLock, file_errors_reported
from simpletuner.base.parts import delete_path

EVENTS_NAME = "events.jsonl"
STARTING_NAME = "starting.json"
LORA_NAME = "pytorch_lora_weights.safetensors"
MODEL_FOLDER = "model"
"""The result of a full run: a diffusers folder."""
TRANSFORMER_NAME = "transformer.safetensors"
"""A copy of its transformer as one file in BFL's layout, which ComfyUI loads."""
RESULTS = {"lora": LORA_NAME, "full": MODEL_FOLDER}
"""Name of the result by `model_type`, in the run directory."""
EMA_FOLDER = "ema"
"""Subfolder of a run, a checkpoint or a step's validation images, with the same files for the moving average."""

_UNFINISHED = re.compile(rf"\..+\.\d+\.part(\..+)?|\..+\.part\.(png|jpg)|\.tmp-(old-)?{MODEL_FOLDER}")
"""Names of incomplete files and folders: those of `base.parts`, images, and a model's folder."""


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; `root` is the option `output_dir`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets.json"

    @property
    def events(self) -> Path:
        return self.root / EVENTS_NAME

    @property
    def log(self) -> Path:
        return self.root / "run.log"

    @property
    def console(self) -> Path:
        """Output of a run that was started without a terminal."""
        return self.root / "console.log"

    @property
    def starting(self) -> Path:
        """Record of the last requested start."""
        return self.root / STARTING_NAME

    @property
    def note(self) -> Path:
        """The user's note about the run."""
        return self.root / "note.txt"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def validations(self) -> Path:
        return self.root / "validation"

    @property
    def drift(self) -> Path:
        """The base model's latents of the drift prompts."""
        return self.validations / "drift"

    @property
    def profiles(self) -> Path:
        """Profiler traces of steps."""
        return self.root / "profile"

    @property
    def finished(self) -> Path:
        """List of the run's results. It is written last: a run that has it is complete."""
        return self.root / "finished.json"

    @property
    def lora(self) -> Path:
        """The finished LoRA."""
        return self.root / LORA_NAME

    @property
    def ema_lora(self) -> Path:
        """The finished LoRA of the moving average."""
        return self.root / EMA_FOLDER / LORA_NAME

    @property
    def model(self) -> Path:
        """The finished model of a full run."""
        return self.root / MODEL_FOLDER

    def result(self, model_type: str) -> Path:
        """The result of a run of this `model_type`."""
        return self.root / RESULTS[model_type]

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:06d}"

    def validation(self, step: int) -> Path:
        return self.validations / f"step-{step:06d}"

    def lock(self) -> DirectoryLock:
        """Lock of the directory. If another process holds it, entering it raises CheckpointError with that pid."""
        return DirectoryLock(self.root / "lock")

    def starting_lock(self) -> DirectoryLock:
        """Lock held by a process that was started without a terminal, from before its first line to its end."""
        return DirectoryLock(self.root / "starting.lock")

    def sweep(self) -> None:
        """Remove incomplete files of killed processes outside `checkpoints`. The caller must hold the lock."""
        images = [
            self.validations,
            self.drift,
            *self.validations.glob("step-*"),
            *self.validations.glob(f"step-*/{EMA_FOLDER}"),
        ]
        for folder in (self.root, self.root / EMA_FOLDER, self.profiles, *images):
            for path in folder.glob(".*"):
                if _UNFINISHED.fullmatch(path.name):
                    delete_path(path)

    def create(self) -> None:
        """Create the directory.

        Raises:
            ConfigError: `output_dir` is a file or cannot be created.
            DiskError: the disk is full or read-only.
        """
        with file_errors_reported(self.root, ConfigError, doing="create"):
            for folder in (self.root, self.control, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
