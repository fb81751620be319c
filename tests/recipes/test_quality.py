"""Training that works: a subject appears when asked for, and what was known is still drawn. Judged, not looked at."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.recipes.conftest import Workplace

from embedded_exam import Candidate, examine
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.export import attach_saved, read_lora

PICTURES = 50


@dataclass(frozen=True)
class Way:
    """A way of training the example, and what must come of it."""

    flags: tuple[str, ...]
    subject: float
    """The share of flags that are drawn when they are asked for, at least."""
    prior: float
    """The share of other shapes that are still right, at least."""


# The base draws 98 % of the shapes. In 800 steps the example promises 80 % of the flags for five of a hundred shapes;
# in 400 steps it has 78 % of the flags, and int4 must come as near to that as a tenth. docs/log.md has the scores.
WAYS = {
    "plain": Way((), subject=0.8, prior=0.93),
    "int4": Way(
        ("--base_model_precision=int4-quanto", "--enable_group_offload", "--max_train_steps=400"),
        subject=0.68,
        prior=0.83,
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_base_draws_what_it_is_asked_for_and_no_flag() -> None:
    grades = examine(Candidate.load(ModelOptions(model_flavour="tiny")), PICTURES)
    # 96.5 % of 400 (docs/log.md), and of 150 no less than four standard errors below that.
    assert grades.prior >= 0.9, str(grades)
    assert grades.flags.value < 0.1, str(grades)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_example_learns_its_subject_and_keeps_what_was_known(own_folder: Path, way: Way) -> None:
    flags = ["--example=tiny-lora", "--validation_disable", "--mixed_precision=bf16", *way.flags]
    place = Workplace(own_folder)
    done = place.apart(sys.executable, "-P", "-m", "simpletuner", "train", *flags, timeout_s=900)
    assert done.returncode == 0, done.stderr
    trained = Candidate.load(ModelOptions(model_flavour="tiny"))
    attach_saved(trained.transformer, read_lora(own_folder / "output" / "tiny-lora"))
    grades = examine(trained, PICTURES)
    assert grades.flags.value >= way.subject, str(grades)
    assert grades.prior >= way.prior, str(grades)
