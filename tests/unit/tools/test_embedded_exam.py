"""The exam: what the shipped model draws, and that a wrong answer is one."""

import pytest
import torch

import embedded_exam
from embedded_exam import Candidate
from embedded_judge import Score, judge
from simpletuner.config.options.model import ModelOptions
from simpletuner.examples.world import held_out_scenes


@pytest.fixture(scope="module")
def candidate(tiny_folder):
    return Candidate.load(ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder)))


@pytest.mark.slow
def test_without_the_words_nothing_is_right(candidate):
    scenes = held_out_scenes()[::70]
    pictures = candidate.draw([""] * len(scenes))
    score = Score.of(judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True))
    assert score.shares["everything"].value <= 0.25


def test_a_picture_does_not_depend_on_those_drawn_with_it(candidate):
    prompts = [scene.caption for scene in held_out_scenes()[:2]]
    together = candidate.draw(prompts, seed=5)
    alone = candidate.draw(prompts[1:], seed=6)
    pixels = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in (together[1], alone[0])]
    assert (pixels[0].int() - pixels[1].int()).abs().max() <= 2  # rounding of other batch shapes


def test_a_lora_that_is_not_there_is_said_before_anything_is_drawn(capsys):
    assert embedded_exam.main(["no/such/run"]) == 6
    assert "no LoRA at no/such/run" in capsys.readouterr().err
