"""Where on the path whole runs train."""

import pytest
from tests.recipes.conftest import Workplace


@pytest.mark.slow
def test_strata_off_changes_no_bit_and_on_moves_the_noise_levels_only(workplace: Workplace) -> None:
    workplace.config |= {"max_train_steps": 1}
    for name, flags in {"plain": (), "off": ("--timestep_strata=false",), "on": ("--timestep_strata",)}.items():
        assert workplace.train(f"--output_dir=output/{name}", *flags) == 0
    assert workplace.run("plain").lora.read_bytes() == workplace.run("off").lora.read_bytes()
    assert workplace.losses("plain") != workplace.losses("on")


@pytest.mark.slow
def test_a_run_with_strata_that_goes_on_is_the_run_that_never_stopped(workplace: Workplace) -> None:
    """Six pictures, two a step: the fourth step begins the second epoch."""
    workplace.config |= {"timestep_strata": True, "max_train_steps": 5, "checkpoint_step_interval": 0}
    assert workplace.train("--output_dir=output/whole") == 0
    assert workplace.train("--max_train_steps=2") == 0
    assert workplace.train("--max_train_steps=4") == 0
    assert workplace.train() == 0
    assert workplace.run().lora.read_bytes() == workplace.run("whole").lora.read_bytes()
    assert workplace.losses() == workplace.losses("whole")


@pytest.mark.slow
def test_the_noise_levels_must_stay_on_resume(workplace: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert workplace.train("--max_train_steps=1", "--flow_custom_timesteps=338,801") == 0
    assert workplace.train("--flow_custom_timesteps=338,802", "--timestep_strata") == 6
    complaint = capsys.readouterr().err
    assert "flow_custom_timesteps" in complaint
    assert "timestep_strata" in complaint
    assert workplace.train("--flow_custom_timesteps=338,801") == 0
