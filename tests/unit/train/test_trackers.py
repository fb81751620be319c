"""What TensorBoard and Weights & Biases get, whatever the order in which steps and pictures come."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.config.options.tracking import TrackingOptions
from simpletuner.runs.events import Event, Picture, StepEvent, ValidationEvent
from simpletuner.train import trackers


def trained(step: int) -> StepEvent:
    return StepEvent(step=step, epoch=0, loss=step / 8, lr=1e-4, grad_norm=1.0, seconds=0.1, memory_gib=1.0)


def drawn(root: Path, step: int) -> ValidationEvent:
    path = f"validation/step-{step:06}/cat_32x32_0.png"
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), (step, 0, 0)).save(root / path)
    picture = Picture(name="cat", prompt=f"a cat at {step}", path=path, width=32, height=32, seed=0)
    return ValidationEvent(step=step, pictures=(picture,), sheet=None)


def track(root: Path, name: str, resumed_from: int | None, events: list[Event]) -> list[str]:
    """Send `events` to a tracker; what it could not take."""
    notices: list[str] = []
    sent = trackers.build(
        TrackingOptions(report_to=name),
        root=root,
        resumed_from=resumed_from,
        config={"lora_rank": 4},
        run_id="run-1",
        notice=notices.append,
    )
    for event in events:
        sent.emit(event)
    sent.close()
    return notices


def two_attempts(name: str, root: Path, again: Path) -> list[str]:
    """Pictures of the base come after step 2, as they do in a run; a resumed run comes to step 3 again, and draws
    pictures of the base that were missing.
    """
    first = [trained(1), trained(2), drawn(root, 0), drawn(root, 2), ValidationEvent(step=2, loss=0.5), trained(3)]
    second = [ValidationEvent(step=2, loss=0.5), trained(3), trained(4), drawn(again, 0), drawn(again, 4)]
    return track(root, name, None, first) + track(again, name, 2, second)


@pytest.mark.slow
def test_tensorboard_has_the_pictures_of_the_base_and_each_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert two_attempts("tensorboard", tmp_path, tmp_path) == []
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [(one.step, one.value) for one in board.Scalars("train/loss")] == [(n, n / 8) for n in (1, 2, 3, 4)]
    assert [image.step for image in board.Images("cat_32x32_0")] == [0, 2, 0, 4]


@pytest.mark.slow
def test_wandb_has_the_pictures_of_the_base_and_the_steps_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # W&B names its folder by the second: each attempt gets a folder of its own. The second one's path is relative to
    # a working folder to which this process came after W&B had started its own.
    (tmp_path / "2").mkdir()
    assert track(tmp_path / "first", "wandb", None, [trained(1)]) == []
    monkeypatch.chdir(tmp_path / "2")
    assert two_attempts("wandb", Path("1"), Path("2")) == []
    logs = [log for path in sorted(Path().rglob("run-*.wandb")) for log in wandb_logs(path)]
    caption = "pictures/cat_32x32_0/caption"
    told = [(log["step"], log[caption]) for log in logs if caption in log]
    assert told == [(step, f"a cat at {step}") for step in (0, 2, 0, 4)]
    assert [(log["step"], log["train/loss"]) for log in logs if "train/loss" in log] == [
        (n, n / 8) for n in (1, 2, 3, 3, 4)
    ]
    assert [log["step"] for log in logs if "held_out/loss" in log] == [2, 2]


def wandb_logs(path: Path) -> list[dict[str, Any]]:
    """What was logged, by a run that has ended. W&B's own process writes the end of the file a little later."""
    deadline = time.monotonic() + 20
    while True:
        records = list(wandb_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
        for history in histories
    ]


def wandb_records(data: bytes) -> Iterator[Any]:
    """The records of an offline run: protobuf in LevelDB's log format, after 7 bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    place, text = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits into the end of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<4xHB", data[place : place + 7])
        text += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4) and place <= len(data):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(text)
            text = b""
