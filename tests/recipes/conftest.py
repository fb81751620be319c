"""Whole runs through the real command, on the embedded model."""

import fcntl
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from simpletuner.cli.main import main
from simpletuner.runs.events import read_events
from simpletuner.runs.layout import RunDirectory

HERE = Path(__file__).parent

CONFIG: dict[str, Any] = {
    "model_flavour": "tiny",
    "output_dir": "output/run",
    "max_train_steps": 3,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "lora_rank": 4,
    "caption_dropout_probability": 0.25,
    "checkpoint_step_interval": 1,
    "validation_disable": True,
    "vae_batch_size": 2,
    "text_encoder_batch_size": 2,
    "write_batch_size": 2,
    "max_workers": 1,
}
PICTURES: dict[str, Any] = {
    "id": "pictures",
    "type": "local",
    "instance_data_dir": "datasets/pictures",
    "caption_strategy": "textfile",
    "resolution": 64,
    "resolution_type": "pixel_area",
    "crop": True,
    "crop_aspect": "preserve",
    "crop_style": "center",
    "cache_dir_vae": "cache/vae",
}
TEXT: dict[str, Any] = {
    "id": "text",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text",
}


@dataclass
class Workplace:
    """A working folder as a user has one: config/, datasets/, and what runs leave."""

    folder: Path
    config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))
    datasets: list[dict[str, Any]] = field(default_factory=lambda: [dict(PICTURES), dict(TEXT)])
    prompts: dict[str, Any] | None = None

    def write(self) -> None:
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config" / "config.json").write_text(json.dumps(self.config))
        (self.folder / "config" / "multidatabackend.json").write_text(json.dumps(self.datasets))
        if self.prompts is not None:
            (self.folder / "config" / "user_prompt_library.json").write_text(json.dumps(self.prompts))

    def train(self, *flags: str) -> int:
        """`simpletuner train FLAGS` in this process; returns the exit code."""
        self.write()
        return main(["train", *flags])

    def train_apart(self, *flags: str, kill_at: str | None = None) -> subprocess.CompletedProcess[str]:
        """The same in a process of its own, which kills itself at `kill_at` ("text:4", "step:2", ...)."""
        self.write()
        command = [sys.executable, "-m", "simpletuner", "train", *flags]
        if kill_at is not None:
            command = [sys.executable, str(HERE / "killed.py"), kill_at, *flags]
        return self.apart(*command)

    def apart(self, *command: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """A command in this working folder."""
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=timeout_s, check=False)

    def run(self, name: str = "run") -> RunDirectory:
        return RunDirectory(self.folder / "output" / name)

    def events(self, kind: str, name: str = "run") -> list[dict[str, Any]]:
        return [event for event in read_events(self.run(name).events) if event["type"] == kind]

    def losses(self, name: str = "run") -> list[float]:
        """The loss of each step, of its last attempt."""
        found = {event["step"]: event["loss"] for event in self.events("step", name)}
        return [found[step] for step in sorted(found)]


@pytest.fixture
def workplace(own_folder: Path, pictures: Path) -> Workplace:
    """A working folder with six pictures; the working folder of the test."""
    shutil.copytree(pictures, own_folder / "datasets" / "pictures")
    return Workplace(own_folder)


@pytest.fixture
def inductor_cache(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the compiler keeps what it made, of all workers: torch's headers alone take it long."""
    folder = shared_folder / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def uninterrupted(shared_folder: Path, pictures: Path) -> Workplace:
    """The same run, left alone: what every interrupted one must end like. One for all workers."""
    place = Workplace(shared_folder / "uninterrupted")
    with (shared_folder / "uninterrupted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.run().lora.exists():
            shutil.copytree(pictures, place.folder / "datasets" / "pictures")
            done = place.train_apart()
            assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def cached_workplace(workplace: Workplace, uninterrupted: Workplace) -> Workplace:
    """A working folder whose caches a run in fp32 has filled: for tests of what comes after them."""
    shutil.copytree(uninterrupted.folder / "cache", workplace.folder / "cache")
    return workplace


@pytest.fixture
def same_bytes(uninterrupted: Workplace) -> Callable[[Workplace], None]:
    """Asserts that a run ended like the uninterrupted one, bit for bit: LoRA, optimizer, caches and losses."""

    def check(place: Workplace) -> None:
        ours, theirs = place.run(), uninterrupted.run()
        assert ours.lora.read_bytes() == theirs.lora.read_bytes()
        for step in (1, 2, 3):
            for name in ("pytorch_lora_weights.safetensors", "optimizer.safetensors"):
                mine = ours.checkpoint(step) / name
                if mine.exists():
                    assert mine.read_bytes() == (theirs.checkpoint(step) / name).read_bytes()
        assert place.losses() == uninterrupted.losses()
        for cache in ("vae", "text"):
            found = tensors_below(place.folder / "cache" / cache)
            assert found == tensors_below(uninterrupted.folder / "cache" / cache)

    return check


def commands_in(text: str) -> list[list[str]]:
    """What follows `simpletuner` in each command between backticks, as a shell takes it apart."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(simpletuner [^`]*)`", text)]


def tensors_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
