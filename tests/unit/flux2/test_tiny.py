import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file, save_file

from simpletuner.base.errors import AccessError
from simpletuner.base.files import read_json, sha256_file, write_json
from simpletuner.config.flavours import FLAVOURS, SYSTEM_MESSAGE
from simpletuner.examples import world
from simpletuner.flux2 import tiny
from simpletuner.flux2.load import load_autoencoder
from simpletuner.flux2.tiny import vocabulary
from simpletuner.flux2.tiny.klein import KLEIN_TEXT_CONFIG, KLEIN_VERSION
from simpletuner.flux2.tiny.make import SHIPPED, STAMP, TEXT_CONFIG, TRANSFORMER, VAE_WEIGHTS, VERSION, write_untrained
from simpletuner.flux2.tiny.weights import draw, draw_uniform

# The starts of their sha256.
SUMS = {
    "text_encoder/model.safetensors": "c145493560a9233a",
    "tokenizer/tokenizer.json": "4cbe1e8019205483",
    "transformer/diffusion_pytorch_model.safetensors": "d15e44385aa3821a",
    "vae/diffusion_pytorch_model.safetensors": "fdfa36c401436c0b",
}


KLEIN_SUMS = {
    "text_encoder/model.safetensors": "00c0aef37bed4d76",
    "tokenizer/tokenizer.json": "6113f26cc7b3fdf7",
    "transformer/diffusion_pytorch_model.safetensors": "3b68a82c84ca0b95",
    "vae/diffusion_pytorch_model.safetensors": "fdfa36c401436c0b",
}
DISTILLED_SUMS = KLEIN_SUMS | {"transformer/diffusion_pytorch_model.safetensors": "0f62d18dca27351f"}


@pytest.mark.parametrize("name", KLEIN_SUMS)
def test_the_kleins_have_the_same_bytes_on_every_machine(tiny_klein_folder, tiny_klein_distilled_folder, name):
    # As above, with KLEIN_VERSION.
    assert sha256_file(tiny_klein_folder / name).startswith(KLEIN_SUMS[name])
    assert sha256_file(tiny_klein_distilled_folder / name).startswith(DISTILLED_SUMS[name])


def test_only_the_distilled_klein_says_that_it_is(tiny_klein_folder, tiny_klein_distilled_folder):
    assert "is_distilled" not in read_json(tiny_klein_folder / "model_index.json")
    assert read_json(tiny_klein_distilled_folder / "model_index.json")["is_distilled"] is True


def test_layer_27_of_klein_is_not_the_last():
    assert KLEIN_TEXT_CONFIG["num_hidden_layers"] > max(FLAVOURS["tiny-klein"].text.layers)


def test_kleins_tokenizer_is_qwens_in_small():
    tokenizer = vocabulary.learn_klein()
    empty = ["<|im_start|>", "user", "Ċ", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ", "<think>", "ĊĊ"]
    text = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.encode(text).tokens == [*empty, "</think>", "ĊĊ"]
    # The normalizer composes: a letter and its accent become one.
    assert tokenizer.decode(tokenizer.encode("U\u0308n 12\n\ttabs ☃").ids) == "\u00dcn 12\n\ttabs ☃"
    assert tokenizer.token_to_id("<|endoftext|>") == vocabulary.KLEIN_SIZE
    assert tokenizer.get_vocab_size() < KLEIN_TEXT_CONFIG["vocab_size"]


@pytest.mark.parametrize("name", SUMS)
def test_the_same_bytes_on_every_machine(tiny_folder, name):
    # When this changes on purpose, raise VERSION, or made folders go on being used.
    assert sha256_file(tiny_folder / name).startswith(SUMS[name])


def test_draws_depend_on_name_and_seed_alone():
    assert torch.equal(draw_uniform((4, 8), 0.5, 0, "a"), draw_uniform((4, 8), 0.5, 0, "a"))
    assert not torch.equal(draw_uniform((4, 8), 0.5, 0, "a"), draw_uniform((4, 8), 0.5, 0, "b"))
    assert not torch.equal(draw_uniform((4, 8), 0.5, 0, "a"), draw_uniform((4, 8), 0.5, 1, "a"))
    assert draw_uniform((4,), 1.0, 0, "pinned").tolist() == [
        0.1909826546907425,
        -1.2014119625091553,
        -0.5080183148384094,
        -0.09739653766155243,
    ]


def test_drawn_matrices_have_the_gain_asked_for():
    shapes = {"x.weight": (256, 1024), "x.conv2.weight": (64, 32, 3, 3), "x.bias": (4,), "norm.weight": (8,)}
    tensors = draw("test", shapes, {"conv2": 0.5}, seed=0)
    assert tensors["x.weight"].std() * 1024**0.5 == pytest.approx(1, rel=0.02)
    assert tensors["x.conv2.weight"].std() * (32 * 9) ** 0.5 == pytest.approx(0.5, rel=0.02)
    assert torch.equal(tensors["x.bias"], torch.zeros(4))
    assert torch.equal(tensors["norm.weight"], torch.ones(8))


def test_layer_30_is_not_the_last():
    assert TEXT_CONFIG["num_hidden_layers"] > max(FLAVOURS["tiny"].text.layers)


def test_latents_of_the_worlds_pictures_have_mean_0_and_variance_1(tiny_source):
    encode = load_autoencoder(tiny_source, torch.float32, "cpu").encode
    scenes = random.Random(0).sample(world.held_out_scenes(), 48)
    drawn = [world.draw_scene(scene, random.Random(index)) for index, scene in enumerate(scenes)]
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in drawn]).float() / 127.5 - 1
    latents = encode(rearrange(pixels, "b h w c -> b c h w"))
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert 0.5 < latents.var((0, 2, 3)).min() < latents.var((0, 2, 3)).max() < 2


def test_special_tokens_have_mistrals_ids():
    tokenizer = vocabulary.learn()
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "[IMG]", "<pad>", "[/SYSTEM_PROMPT]")}
    assert ids == {"<s>": 1, "[IMG]": 10, "<pad>": 11, "[/SYSTEM_PROMPT]": 18}
    assert tokenizer.get_vocab_size() == vocabulary.SIZE


def test_tokenizer_keeps_every_byte_and_is_short_for_the_system_message():
    tokenizer = vocabulary.learn()
    text = "Ünïcode ☃ 2024\n\ttabs [brackets]"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode(SYSTEM_MESSAGE).ids) < 40


def test_an_existing_folder_is_left_alone(tiny_folder):
    before = {path: path.stat().st_mtime_ns for path in tiny_folder.rglob("*")}
    assert tiny.make(tiny_folder) == tiny_folder
    assert {path: path.stat().st_mtime_ns for path in tiny_folder.rglob("*")} == before


def test_a_foreign_folder_is_never_written_to(tmp_path):
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(AccessError, match="is not the embedded model"):
        tiny.make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_another_version_is_not_taken_for_this_one(tiny_folder, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "copy")
    stamp = read_json(copy / STAMP)
    write_json(copy / STAMP, stamp | {"version": 1})
    with pytest.raises(AccessError, match="version 1: expected version 2, all files complete"):
        tiny.make(copy)


def test_each_version_has_its_release_note():
    changes = (Path(__file__).parents[3] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"embedded model, version {VERSION}:" in changes
    assert f"embedded kleins, version {KLEIN_VERSION}:" in changes


def test_what_is_shipped_is_small_bf16_and_described():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 24e6
    for file in (TRANSFORMER, VAE_WEIGHTS):
        kinds = {name: tensor.dtype for name, tensor in load_file(SHIPPED / file).items()}
        assert {dtype for name, dtype in kinds.items() if not name.startswith("bn.")} == {torch.bfloat16}
    assert f"version {VERSION}" in (SHIPPED / "README.md").read_text(encoding="utf-8")


def test_a_damaged_folder_is_named(tiny_folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_folder.rglob("*"):
        target = copy / path.relative_to(tiny_folder)
        target.mkdir() if path.is_dir() else target.symlink_to(path)
    (copy / "vae/config.json").unlink()
    with pytest.raises(AccessError, match=r"vae/config\.json is damaged"):
        tiny.make(copy)


def test_default_folder():
    home = Path.home() / ".cache" / "simpletuner" / f"tiny-{VERSION}"
    assert tiny.default_folder(None, {}) == home
    assert tiny.default_folder(None, {"XDG_CACHE_HOME": "/x"}) == Path(f"/x/simpletuner/tiny-{VERSION}")
    assert tiny.default_folder(Path("/y"), {}) == Path(f"/y/tiny-{VERSION}")
    assert tiny.default_folder(None, {"XDG_CACHE_HOME": "relative"}) == home
    assert tiny.default_folder(Path("/y"), {}, "tiny-klein") == Path(f"/y/tiny-klein-{KLEIN_VERSION}")


def test_without_a_home_folder_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch):
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    with pytest.raises(AccessError, match="Set HOME or XDG_CACHE_HOME, or give a folder as --cache_dir"):
        tiny.default_folder(None, {"XDG_CACHE_HOME": ""})
    assert tiny.default_folder(None, {"XDG_CACHE_HOME": "/x"}) == Path(f"/x/simpletuner/tiny-{VERSION}")


def test_the_worlds_words_are_one_token_each():
    tokenizer = vocabulary.learn()
    words = (*world.SIZES, *world.COLORS, *world.SHAPES, *world.POSITIONS)
    assert {word: len(tokenizer.encode(f" {word}").ids) for word in words} == dict.fromkeys(words, 1)


def test_a_model_to_train_starts_with_blocks_that_do_nothing(tiny_folder, tmp_path):
    vae = "vae/diffusion_pytorch_model.safetensors"
    (tmp_path / "learned").mkdir()
    shutil.copy(tiny_folder / vae, tmp_path / "learned/vae.safetensors")
    folder = write_untrained(tmp_path / "start", 3, tmp_path / "learned")
    assert sha256_file(folder / vae) == sha256_file(tiny_folder / vae)
    transformer = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert not transformer["proj_out.weight"].any()
    assert not transformer["single_stream_modulation.linear.weight"].any()
    assert transformer["x_embedder.weight"].std() * 128**0.5 == pytest.approx(1, rel=0.02)
    # The transformer that came of it takes the start's place.
    transformer["proj_out.weight"] += 1
    save_file(transformer, tmp_path / "learned/transformer.safetensors")
    trained = load_file(
        write_untrained(folder, 3, tmp_path / "learned") / "transformer/diffusion_pytorch_model.safetensors"
    )
    assert torch.equal(trained["proj_out.weight"], transformer["proj_out.weight"])


MAKE = "import sys; from pathlib import Path; from simpletuner.flux2.tiny import make; make(Path(sys.argv[1]))"


def test_finding_it_made_imports_no_large_library(tiny_folder):
    check = "; print([name for name in ('diffusers', 'transformers') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", MAKE + check, str(tiny_folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


@pytest.mark.slow
def test_several_processes_may_make_it_at_once(tmp_path, tiny_folder):
    folder = tmp_path / "tiny"
    makers = [subprocess.Popen([sys.executable, "-c", MAKE, str(folder)], stderr=subprocess.PIPE) for _ in range(3)]
    assert [(maker.communicate()[1], maker.returncode) for maker in makers] == [(b"", 0)] * 3
    assert os.listdir(tmp_path) == ["tiny"]
    assert all(sha256_file(folder / name) == sha256_file(tiny_folder / name) for name in SUMS)
