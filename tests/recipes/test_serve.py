"""`simpletuner sample --serve`, as a process of its own: the bits of new processes, and how it ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.cli.main import main
from simpletuner.runs.samplers import SAMPLERS_FOLDER

SMALL = ["--width=32", "--height=48", "--steps=2", "--mixed_precision=no", "--vae_dtype=fp32"]
COMMAND = [sys.executable, "-P", "-m", "simpletuner", "sample"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Served:
    """A process that serves in `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "--serve", *options],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.event()["event"] == "ready"

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def event(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def events(self, **request: Any) -> list[Any]:
        """All that is said about a request."""
        self.send(**request)
        told = [self.event()]
        while told[-1]["event"] not in ("done", "failed", "cancelled"):
            told.append(self.event())
        return told

    def hang_up(self) -> int:
        """Close its pipes, as the kernel does for a server that is killed; returns the exit code."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return self.process.wait(timeout=20)


@pytest.fixture
def served(tmp_path: Path, tiny_folder: Path) -> Iterator[Served]:
    found = Served(tmp_path, f"--pretrained_model_name_or_path={tiny_folder}", *SMALL)
    yield found
    found.hang_up()


def pixels(folder: Path, events: list[Any]) -> list[bytes]:
    assert events[-1]["event"] == "done", events[-1]
    return [Image.open(folder / one["path"]).tobytes() for one in events if one["event"] == "picture"]


@pytest.mark.slow
def test_a_served_picture_has_the_bits_of_a_new_process(
    served: Served, tmp_path: Path, tiny_folder: Path, acting_lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = str(acting_lora), f"{acting_lora}:-0.7"
    (base,) = pixels(tmp_path, served.events(prompt=["a fish"]))
    zero, half, whole = pixels(tmp_path, served.events(prompt=["a fish"], lora=[one], strength=[0, 0.5, 1]))
    (two,) = pixels(tmp_path, served.events(prompt=["a fish"], lora=[one, other]))
    (half_again,) = pixels(tmp_path, served.events(prompt=["a fish"], lora=[f"{one}:0.5"]))
    (base_again,) = pixels(tmp_path, served.events(prompt=["a fish"]))
    assert base == zero == base_again, "no LoRA, one at 0, and all LoRAs gone"
    assert half == half_again
    assert len({base, half, whole, two}) == 4

    failed = served.events(id="x", prompt=["a fish"], lora=[str(tmp_path / "none.safetensors")])
    assert [(event["event"], event["id"]) for event in failed] == [("failed", "x")]
    assert failed[0]["exit_code"] == 2
    assert failed[0]["problems"][0]["expected"] == "a .safetensors file, or a folder with one"
    assert pixels(tmp_path, served.events(prompt=["a fish"])) == [base], "a fault changes nothing"

    model = [f"--pretrained_model_name_or_path={tiny_folder}", *SMALL, "--prompt=a fish"]
    command = [*COMMAND, *model, f"--lora={one}", f"--lora={other}", "--json"]
    new = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, check=True)
    told = json.loads(new.stdout)
    assert Image.open(tmp_path / told["path"]).tobytes() == two
    assert (told["prompt"], told["seed"], told["width"], told["steps"]) == ("a fish", 42, 32, 2)
    assert [lora["strength"] for lora in told["loras"]] == [1, -0.7]
    for loras, expected in (([], base), ([f"--lora={one}:0.5"], half)):
        assert main(["sample", *model, *loras, f"--out={tmp_path}/new"]) == 0
        assert Image.open(capsys.readouterr().out.strip()).tobytes() == expected, loras

    served.send(prompt=["a"], width=512, height=512, steps=500)
    assert served.event()["event"] == "progress"
    began = time.monotonic()
    assert served.hang_up() == 141, "nobody reads: it leaves in the middle of a picture"
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_a_served_request_is_cancelled_in_the_middle_of_a_picture_and_input_that_ends_ends_the_process(
    served: Served, tmp_path: Path
) -> None:
    assert len(list((tmp_path / SAMPLERS_FOLDER).glob("*.lock"))) == 1
    served.send(id="long", prompt=["a"], width=512, height=512, steps=500)
    while served.event().get("done", 0) < 2:
        pass
    served.send(cancel="long")
    while (event := served.event())["event"] == "progress":
        pass
    assert (event["event"], event["id"]) == ("cancelled", "long")

    served.send(prompt=["a"])  # what was asked for before the end is drawn, where what it prints is still read
    assert served.process.stdin is not None
    assert served.process.stdout is not None
    served.process.stdin.close()
    assert [json.loads(line)["event"] for line in served.process.stdout][-2:] == ["picture", "done"]
    assert served.process.wait(timeout=20) == 0
    assert list((tmp_path / SAMPLERS_FOLDER).glob("*.lock")) == []
