import hashlib
import random
from pathlib import Path

import pytest

from simpletuner.examples import world


def test_captions_name_what_is_drawn_and_parse_back():
    scene = world.Scene("large", "red", "star", "orange", "left")
    assert scene.caption == "a large red star on an orange background, left"
    assert all(world.Scene.of(each.caption) == each for each in world.scenes())
    with pytest.raises(ValueError, match="a red star"):
        world.Scene.of("a red star")


def test_every_pair_is_seen_in_training_and_no_held_out_triple():
    training, held_out = world.training_scenes(), world.held_out_scenes()
    assert (len(training), len(held_out)) == (2800, 560)
    assert len({(s.shape, s.color) for s in training}) == 6 * 8
    assert len({(s.shape, s.background) for s in training}) == 6 * 8
    assert len({(s.color, s.background) for s in training}) == 8 * 7
    seen = {(s.shape, s.color, s.background) for s in training}
    assert seen.isdisjoint((s.shape, s.color, s.background) for s in held_out)


def test_render_is_decided_by_the_seed(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.render_scenes(tmp_path / name, 6, seed)

    def content(name: str) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).iterdir())]

    assert len(content("a")) == 12
    assert content("a") == content("b") != content("c")


def test_a_scene_is_a_square_picture():
    assert world.draw_scene(world.training_scenes()[0], random.Random(0)).size == (128, 128)
