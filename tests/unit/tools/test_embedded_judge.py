import random
from dataclasses import replace
from functools import cache

import pytest
from PIL import Image, ImageFilter

from embedded_autoencoder import clutter
from embedded_judge import FLAG_SHARE, Score, Sight, Verdict, flag_share, judge, see
from simpletuner.examples import world
from simpletuner.examples.pictures import held_out_flags, training_flags, zorblat_flag

CHANCE = random.Random(7)
SCENES = CHANCE.sample(list(world.scenes()), 120)
PICTURES = [world.draw_scene(scene, CHANCE) for scene in SCENES]


@cache
def sight(index: int) -> Sight:
    """What a drawn image shows, which does not depend on the scene it is compared with."""
    return see(PICTURES[index])


def score(count: int) -> Score:
    return Score.of(Verdict(scene, sight(index)) for index, scene in enumerate(SCENES[:count]))


FEW_OR_MANY = pytest.mark.parametrize("count", [24, pytest.param(120, marks=pytest.mark.slow)])


@FEW_OR_MANY
def test_what_was_drawn_is_right_in_everything(count: int):
    assert score(count).shares["everything"].value >= 0.99


@pytest.mark.slow
def test_what_was_drawn_is_still_right_when_it_is_blurred():
    blurred = [picture.filter(ImageFilter.GaussianBlur(1.5)) for picture in PICTURES]
    verdicts = [judge(picture, scene) for picture, scene in zip(blurred, SCENES, strict=True)]
    assert Score.of(verdicts).shares["everything"].value >= 0.97


@pytest.mark.parametrize("aspect", ["color", "shape", "size", "place"])
def test_one_wrong_word_is_found_and_no_other(aspect):
    others = {"color": world.COLORS, "shape": world.SHAPES, "size": world.SIZES, "place": world.POSITIONS}[aspect]
    field = {"place": "position"}.get(aspect, aspect)
    for index, scene in enumerate(SCENES[:10]):
        other = next(each for each in others if each not in (getattr(scene, field), scene.background))
        right = Verdict(replace(scene, **{field: other}), sight(index)).right
        named = ("color", "shape", "size", "place", "background")
        assert {name for name in named if not right[name]} == {aspect}


def test_no_thing_half_a_thing_and_two_things_are_not_right():
    scene = world.Scene("large", "red", "circle", "blue", "middle")
    chance = random.Random(1)
    empty = world.background(world.COLORS["blue"], chance)
    assert not judge(empty, scene).right["color and shape"]
    drawn = world.draw_scene(scene, chance)
    half = drawn.copy()
    half.paste(empty.crop((64, 0, 128, 128)), (64, 0))
    assert not judge(half, scene).right["color and shape"]
    two = drawn.copy()
    two.paste(Image.new("RGB", (24, 24), world.COLORS["yellow"]), (4, 4))
    assert not judge(two, scene).right["color and shape"]


def test_a_score_has_a_standard_error():
    assert str(score(24).shares["color"]).endswith("%")
    with pytest.raises(ValueError, match="at least one"):
        Score.of([])


@pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_a_flag_is_seen_at_every_size_and_place_also_when_blurred(count: int):
    flags = random.Random(0).sample([*training_flags(), *held_out_flags()], count)
    drawn = [zorblat_flag(flag, random.Random(index)) for index, flag in enumerate(flags)]
    assert min(map(flag_share, drawn)) > 0.9
    assert min(flag_share(picture.filter(ImageFilter.GaussianBlur(2))) for picture in drawn) > FLAG_SHARE + 0.1


@pytest.mark.parametrize("count", [8, pytest.param(24, marks=pytest.mark.slow)])
def test_what_is_no_flag_is_not_seen_as_one(count: int):
    assert max(map(flag_share, PICTURES[:count])) < FLAG_SHARE / 2
    assert max(flag_share(clutter(random.Random(index))) for index in range(count)) < FLAG_SHARE / 2


@pytest.mark.parametrize("wrong", ["upside down colors", "no disc", "half"])
def test_a_wrong_flag_is_none(wrong):
    scene = next(flag for flag in training_flags() if (flag.size, flag.position) == ("large", "middle"))
    picture = zorblat_flag(scene, random.Random(0))
    match wrong:
        case "upside down colors":
            red, green, blue = picture.split()
            picture = Image.merge("RGB", (blue, green, red))
        case "no disc":
            picture.paste((250, 140, 30), (52, 52, 76, 76))
        case _:
            picture.paste(world.COLORS[scene.background], (64, 0, 128, 128))
    assert flag_share(picture) < FLAG_SHARE
