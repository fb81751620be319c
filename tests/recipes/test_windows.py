"""A run whose sets take turns."""

import signal

import pytest
from tests.recipes.conftest import Workplace

TURNS = ({"end_step": 2}, {"start_step": 3})
"""Windows of two sets over the same six images."""


@pytest.fixture
def taking_turns(cached_workplace: Workplace) -> Workplace:
    """Steps of two micro-batches of six images: the first set's epoch is cut short after four of them."""
    images, text = cached_workplace.datasets
    cached_workplace.config["max_train_steps"] = 5
    cached_workplace.datasets = [*({**images, "id": f"set-{at}"} | own for at, own in enumerate(TURNS)), text]
    return cached_workplace


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", ["step:2", "step:3"])
def test_killed_at_the_turn_and_started_again_it_ends_the_same(taking_turns: Workplace, kill_at: str) -> None:
    taking_turns.config["output_dir"] = "output/whole"
    assert taking_turns.train() == 0
    assert [event["epoch"] for event in taking_turns.events("step", "whole")] == [0, 0, 1, 1, 1]
    taking_turns.config["output_dir"] = "output/run"
    assert taking_turns.train_apart(kill_at=kill_at).returncode == -signal.SIGKILL
    again = taking_turns.train_apart()
    assert again.returncode == 0, again.stderr
    assert taking_turns.losses() == taking_turns.losses("whole")
    assert taking_turns.run().lora.read_bytes() == taking_turns.run("whole").lora.read_bytes()


@pytest.mark.slow
def test_a_window_may_end_later_than_was_planned_and_no_earlier(
    taking_turns: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    taking_turns.datasets[1]["end_step"] = 3
    assert taking_turns.train("--max_train_steps=3") == 0
    assert taking_turns.train("--max_train_steps=4") == 2
    assert "no image set is active in step 4" in capsys.readouterr().err
    taking_turns.datasets[0]["end_step"] = 1
    taking_turns.datasets[1] |= {"start_step": 2, "end_step": 4}
    assert taking_turns.train("--max_train_steps=4") == 6
    assert "set-0, set-1: active in other steps or epochs up to step 3" in capsys.readouterr().err
    taking_turns.datasets[0]["end_step"] = 2
    taking_turns.datasets[1]["start_step"] = 3
    assert taking_turns.train("--max_train_steps=4") == 0
    assert [event["epoch"] for event in taking_turns.events("step")] == [0, 0, 1, 1]
