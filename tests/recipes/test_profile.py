"""`profile_steps` through the real command: a trace, and not a bit of the run changes."""

from collections.abc import Callable

import pytest
from tests.recipes.conftest import Workplace


@pytest.mark.slow
def test_a_profiled_run_ends_with_the_same_bits(
    cached_workplace: Workplace, same_bytes: Callable[[Workplace], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cached_workplace.train("--profile_steps=2:3") == 0
    same_bytes(cached_workplace)
    found = {path.name for path in cached_workplace.run().profiles.iterdir()}
    assert found == {"steps-2-3.json.gz", "steps-2-3.txt"}
    assert "Profile: output/run/profile/steps-2-3.json.gz" in capsys.readouterr().out
    assert "aten::" in (cached_workplace.run().profiles / "steps-2-3.txt").read_text()


def test_steps_beyond_the_epochs_are_refused_before_the_model_is_loaded(
    cached_workplace: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    del cached_workplace.config["max_train_steps"]
    assert cached_workplace.train("--num_train_epochs=1", "--profile_steps=2:9") == 2
    assert "profile_steps = 2:9 in a run of 3 steps: expected steps from 1 to 3" in capsys.readouterr().err
    assert not [event for event in cached_workplace.events("phase") if event["phase"] == "load"]
