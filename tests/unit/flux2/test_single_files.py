"""Components in single files, as Black Forest Labs and ComfyUI publish them: the same model as a diffusers folder's."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.single_files import bfl_vae, comfyui_text_encoder, component_tensors, in_fp8, prefixed, write
from tests.small_decoder import CHANNELS, WEIGHTS, make_small_decoder
from tests.unit.flux2.test_load import bfl_tensors

from simpletuner.base.errors import AccessError
from simpletuner.config.flavours import FLAVOURS, TINY_KLEIN
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.run import RunConfig
from simpletuner.flux2.configs import Component
from simpletuner.flux2.footprint import Architecture
from simpletuner.flux2.load import (
    autoencoder_id,
    earlier_autoencoder_id,
    load_autoencoder,
    load_text_encoder,
    load_transformer,
    stream_text_encoder,
    text_encoder_id,
)
from simpletuner.flux2.model_locations import missing_download
from simpletuner.flux2.modelfile import save_pipeline, save_transformer
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.tiny.make import VERSION
from simpletuner.flux2.tokenizer import find_tokenizer

KEYS: dict[Component, str] = {
    "transformer": "pretrained_transformer_model_name_or_path",
    "vae": "pretrained_vae_model_name_or_path",
    "text_encoder": "pretrained_text_encoder_model_name_or_path",
}
CONTAINER = {"tiny": "mistral3_24b", "tiny-klein": "qwen3_4b"}


def located(flavour: str, base: Path, **files: Path) -> Source:
    """The model in `base` with components in single files."""
    asked = {KEYS[component]: str(file) for component, file in files.items()}  # type: ignore[index]
    options = ModelOptions(model_flavour=flavour, pretrained_model_name_or_path=str(base), **asked)  # type: ignore[arg-type]
    return locate(options, report=pytest.fail)


def repackaged(folder: Path, path: Path, flavour: str) -> Path:
    """The text encoder of `folder` as ComfyUI has it: of Mistral the layers that are read alone, of Qwen3 all."""
    layers = 30 if FLAVOURS[flavour].text.kind == "mistral3" else None
    return write(path, comfyui_text_encoder(component_tensors(folder, "text_encoder"), layers))


def whole_checkpoint(folder: Path, path: Path, flavour: str) -> Path:
    """All components of `folder` in one file, as ComfyUI saves a checkpoint."""
    transformer = bfl_tensors(component_tensors(folder, "transformer"), FLAVOURS[flavour].transformer)
    encoder = comfyui_text_encoder(component_tensors(folder, "text_encoder"))
    return write(
        path,
        prefixed("model.diffusion_model.", transformer),
        prefixed("vae.", bfl_vae(component_tensors(folder, "vae"))),
        prefixed(f"text_encoders.{CONTAINER[flavour]}.transformer.", encoder),
    )


def latents_id(source: Source) -> str:
    return autoencoder_id(source, torch.float32, tiling=False, slicing=False)


def earlier_latents_id(source: Source, is_whole: bool) -> str:
    return earlier_autoencoder_id(source, torch.float32, tiling=False, slicing=False, all_bytes=is_whole)


def context_id(source: Source, **options: bool) -> str:
    return text_encoder_id(source, torch.float32, fix_regex=True, **options)


def contexts(source: Source, load: object = load_text_encoder, **options: Path) -> torch.Tensor:
    """Of two captions."""
    encoder = load(source, torch.float32, "cpu", fix_regex=True, **options)  # type: ignore[operator]
    return torch.cat([each.rows for each in encoder.encode(["a red boat", "two birds"])])


# --- the VAE


def test_a_vae_under_bfls_names_is_the_same_vae(tiny_source: Source, tiny_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "ae.safetensors", bfl_vae(component_tensors(tiny_folder, "vae")))
    source = located("tiny", tiny_folder, vae=file)
    assert source.vae.config == tiny_source.vae.config
    assert latents_id(source) == latents_id(tiny_source)
    first, second = (load_autoencoder(each, torch.float32, "cpu") for each in (tiny_source, source))
    states = [dict(each._vae.state_dict()) for each in (first, second)]
    del states[0]["bn.num_batches_tracked"]  # which nothing reads, and the file lacks
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = first.encode(pixels)
    assert torch.equal(second.encode(pixels), latents)
    assert torch.equal(second.decode(latents), first.decode(latents))
    for half in ("encode", "decode"):
        one = load_autoencoder(source, torch.bfloat16, "cpu", half=half)  # type: ignore[arg-type]
        assert one.encode(pixels).isfinite().all() if half == "encode" else one.decode(latents).isfinite().all()


def test_a_small_decoder_under_bfls_names(tiny_folder: Path, tmp_path: Path) -> None:
    small = make_small_decoder(tiny_folder / "vae", tmp_path / "small")
    file = write(tmp_path / "full_encoder_small_decoder.safetensors", bfl_vae(load_file(small / WEIGHTS)))
    source, folder = located("tiny", tiny_folder, vae=file), located("tiny", tiny_folder, vae=small)
    assert source.vae.config == folder.vae.config
    assert latents_id(source) == latents_id(folder)
    latents = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    images = [load_autoencoder(each, torch.float32, "cpu").decode(latents) for each in (source, folder)]
    assert torch.equal(*images)


def with_vae_config(folder: Path, path: Path, **fields: object) -> Path:
    """A copy of the model in `folder` whose VAE's config has these fields too."""
    shutil.copytree(folder, path)
    config = path / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return path


@pytest.mark.parametrize("fields", [{"force_upcast": True}, {"sample_size": 512, "norm_num_groups": 4}])
def test_a_vae_in_diffusers_names_has_the_ids_of_earlier_releases(
    fields: dict[str, object], tiny_folder: Path, tmp_path: Path
) -> None:
    base = with_vae_config(tiny_folder, tmp_path / "base", **fields)
    file = Path(shutil.copy(base / "vae" / WEIGHTS, tmp_path / "vae.safetensors"))
    folder, single = located("tiny", base), located("tiny", base, vae=file)
    assert single.vae.files == (file,)
    for is_whole in (False, True):
        assert earlier_latents_id(single, is_whole) == earlier_latents_id(folder, is_whole)
    assert latents_id(single) == latents_id(folder)
    # Earlier releases wrote the decoder's widths into that config, and read no file in BFL's names.
    small = make_small_decoder(base / "vae", tmp_path / "small") / WEIGHTS
    expected = {**(folder.vae.config or {}), "decoder_block_out_channels": CHANNELS}
    assert located("tiny", base, vae=small).vae.config == expected
    bfl = write(tmp_path / "ae.safetensors", bfl_vae(component_tensors(tiny_folder, "vae")))
    assert located("tiny", base, vae=bfl).vae.config == located("tiny", tiny_folder).vae.config


def test_the_config_of_a_base_with_another_vae_is_not_taken(tiny_folder: Path, tmp_path: Path) -> None:
    base = with_vae_config(tiny_folder, tmp_path / "base", block_out_channels=[32, 32, 64, 64], force_upcast=True)
    file = Path(shutil.copy(tiny_folder / "vae" / WEIGHTS, tmp_path / "vae.safetensors"))
    assert located("tiny", base, vae=file).vae.config == located("tiny", tiny_folder).vae.config


def test_the_hub_is_not_asked_for_the_config_of_a_vae_alone(tiny_folder: Path, tmp_path: Path) -> None:
    encoder = repackaged(tiny_folder, tmp_path / "encoder.safetensors", "tiny")
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    files = {"transformer": tiny_folder / "transformer" / WEIGHTS, "vae": tiny_folder / "vae" / WEIGHTS}
    source = located("tiny", Path("acme/never-asked"), **files, text_encoder=encoder)
    assert source.vae.config == located("tiny", tiny_folder).vae.config


# --- the text encoder


@pytest.mark.parametrize("flavour", ["tiny", pytest.param("tiny-klein", marks=pytest.mark.slow)])
def test_comfyuis_text_encoder_gives_the_same_contexts_under_the_same_id(
    flavour: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{flavour.replace('-', '_')}_folder")
    file = repackaged(folder, tmp_path / "encoder.safetensors", flavour)
    whole, source = located(flavour, folder), located(flavour, folder, text_encoder=file)
    assert source.text_encoder.files == (file,)
    assert source.tokenizer == folder / "tokenizer"
    for is_whole in (False, True):
        assert context_id(source, all_bytes=is_whole) == context_id(whole, all_bytes=is_whole)
    expected = contexts(whole)
    assert torch.equal(contexts(source), expected)
    assert torch.equal(contexts(source, stream_text_encoder, folder=tmp_path), expected)
    # With a tokenizer beside it, nothing of the base model's encoder is read.
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    alone = located(flavour, folder, text_encoder=file)
    assert alone.tokenizer == tmp_path / "tokenizer"
    assert alone.text_encoder.config != source.text_encoder.config
    assert torch.equal(contexts(alone), expected)
    options = ModelOptions(model_flavour=flavour, pretrained_text_encoder_model_name_or_path=str(file))  # type: ignore[arg-type]
    assert find_tokenizer(options) == tmp_path / "tokenizer"


@pytest.mark.slow
@pytest.mark.parametrize("is_old", [False, True])
def test_an_fp8_text_encoder_gives_the_contexts_of_its_numbers(is_old: bool, tiny_folder: Path, tmp_path: Path) -> None:
    plain = comfyui_text_encoder(component_tensors(tiny_folder, "text_encoder"), 30)
    stored, dense = in_fp8(plain, is_old=is_old)
    file = write(tmp_path / "mistral_3_small_flux2_fp8.safetensors", stored)
    source = located("tiny", tiny_folder, text_encoder=file)
    expected = located("tiny", tiny_folder, text_encoder=write(tmp_path / "dense.safetensors", dense))
    torch.testing.assert_close(contexts(source), contexts(expected), rtol=1e-5, atol=1e-5)
    streamed = contexts(source, stream_text_encoder, folder=tmp_path)
    torch.testing.assert_close(streamed, contexts(source), rtol=1e-6, atol=1e-6)
    ids = {context_id(each) for each in (source, expected, located("tiny", tiny_folder))}
    assert len(ids) == 3, "other numbers, or held otherwise"


# --- all in one


@pytest.mark.parametrize("flavour", ["tiny", pytest.param("tiny-klein", marks=pytest.mark.slow)])
def test_an_all_in_one_checkpoint_is_the_whole_model(
    flavour: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(f"{flavour.replace('-', '_')}_folder")
    file = whole_checkpoint(folder, tmp_path / "flux2-all.safetensors", flavour)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(folder, tmp_path / f"{flavour}-{VERSION if flavour == 'tiny' else 1}")
    asked = {"model_flavour": flavour, "pretrained_model_name_or_path": str(file), "cache_dir": str(tmp_path)}
    source = locate(ModelOptions(**asked), report=pytest.fail)  # type: ignore[arg-type]
    assert source.transformer.files == source.vae.files == source.text_encoder.files == (file,)
    assert source.name == file.name
    whole = located(flavour, folder)
    assert source.spec == whole.spec
    assert latents_id(source) == latents_id(whole)
    states = [load_transformer(each, torch.bfloat16, "cpu").state_dict() for each in (source, whole)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(contexts(source), contexts(whole))
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(*(load_autoencoder(each, torch.float32, "cpu").encode(pixels) for each in (source, whole)))
    architecture = Architecture.of(RunConfig(**asked))  # type: ignore[arg-type]
    expected = Architecture.of(RunConfig(**asked | {"pretrained_model_name_or_path": str(folder)}))  # type: ignore[arg-type]
    assert architecture == expected
    # Each component may also be named on its own, and the others come from elsewhere.
    for component in KEYS:
        named = located(flavour, folder, **{component: file})
        files = {each: getattr(named, each).files == (file,) for each in KEYS}
        assert files == {each: each == component for each in KEYS}


def test_what_a_checkpoint_holds_is_not_downloaded(tiny_folder: Path, tmp_path: Path) -> None:
    vae = prefixed("vae.", bfl_vae(component_tensors(tiny_folder, "vae")))
    transformer = prefixed("diffusion_model.", bfl_tensors(component_tensors(tiny_folder, "transformer")))
    file = write(tmp_path / "two.safetensors", vae, transformer)
    sizes = FLAVOURS["dev"].downloads
    asked = ModelOptions(pretrained_model_name_or_path=str(file), cache_dir=str(tmp_path / "cache"))
    assert missing_download(asked) == sizes["text_encoder"]
    bare = ModelOptions(cache_dir=str(tmp_path / "cache"))
    assert missing_download(bare) == sum(sizes.values())


# --- what is refused, before anything is asked of the Hub


def wrong_files(tiny_folder: Path, klein_folder: Path, folder: Path) -> dict[str, Path]:
    tiny = {component: component_tensors(tiny_folder, component) for component in KEYS}
    klein = bfl_tensors(component_tensors(klein_folder, "transformer"), TINY_KLEIN)
    short = comfyui_text_encoder(tiny["text_encoder"], 29)
    lora = {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.zeros(4, 192)}
    flux1 = {
        name: tensor
        for name, tensor in bfl_tensors(tiny["transformer"]).items()
        if not name.startswith("double_stream_modulation")
    }
    bfl = bfl_tensors(tiny["transformer"])
    holes = {
        "transformer-hole": {n: t for n, t in bfl.items() if n != "single_blocks.3.linear2.weight"},
        "vae-hole": {n: t for n, t in bfl_vae(tiny["vae"]).items() if n != "decoder.up.2.block.1.conv2.weight"},
        "level-hole": {n: t for n, t in bfl_vae(tiny["vae"]).items() if n != "decoder.up.2.block.0.conv1.weight"},
        "encoder-hole": {n: t for n, t in comfyui_text_encoder(tiny["text_encoder"]).items() if ".7.mlp.up_" not in n},
    }
    no_attention = {name: tensor for name, tensor in short.items() if ".q_proj" not in name}
    files = {
        "vae": bfl_vae(tiny["vae"]),
        "lora": lora,
        "klein": klein,
        "klein-encoder": comfyui_text_encoder(component_tensors(klein_folder, "text_encoder")),
        "short": short,
        "flux1": flux1,
        "old-vae": {name: tensor for name, tensor in bfl_vae(tiny["vae"]).items() if "quant_conv" not in name},
        "no-attention": no_attention,
    }
    paths = {name: write(folder / f"{name}.safetensors", tensors) for name, tensors in (files | holes).items()}
    paths["empty"] = folder / "empty.safetensors"
    paths["empty"].write_bytes(b"")
    paths["half"] = folder / "half.safetensors"
    paths["half"].write_bytes(paths["vae"].read_bytes()[:-1])
    return paths


@pytest.fixture(scope="module")
def wrong(tiny_folder: Path, tiny_klein_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return wrong_files(tiny_folder, tiny_klein_folder, tmp_path_factory.mktemp("wrong"))


@pytest.mark.parametrize(
    ("component", "name", "message"),
    [
        ("transformer", "vae", "holds a VAE of FLUX.2: expected its transformer"),
        ("transformer", "lora", "holds none of the components of FLUX.2: expected its transformer"),
        ("transformer", "flux1", "holds none of the components of FLUX.2: expected its transformer"),
        ("transformer", "transformer-hole", "another shape (1): single_transformer_blocks.3.attn.to_out.weight"),
        ("vae", "vae-hole", "tensors are missing or have another shape (1): a tensor of shape [64, 64, 3, 3]"),
        ("vae", "level-hole", "has 4 encoder levels and 1 decoder levels: expected a VAE of FLUX.2"),
        ("text_encoder", "encoder-hole", "another shape (1): layers.7.mlp.up_proj.weight"),
        ("transformer", "klein", "its transformer has the shapes of tiny-klein"),
        ("vae", "klein", "holds a transformer of FLUX.2: expected its VAE"),
        ("vae", "old-vae", "has no tensor 'quant_conv.weight': expected a VAE of FLUX.2"),
        ("vae", "empty", "has no safetensors header"),
        ("vae", "half", "bytes long"),
        ("vae", "absent", "no such file: expected a .safetensors or .gguf file of the VAE"),
        ("text_encoder", "vae", "holds a VAE of FLUX.2: expected its text encoder"),
        ("text_encoder", "klein-encoder", "its text encoder has the shapes of tiny-klein"),
        ("text_encoder", "short", "holds 29 text-encoder layers: expected the first 30"),
        ("text_encoder", "no-attention", "has no tensor 'layers.0.self_attn.q_proj.weight'"),
    ],
)
def test_what_a_file_is_not_is_said_from_its_header(
    component: Component, name: str, message: str, wrong: dict[str, Path]
) -> None:
    file = wrong.get(name, Path(f"/absent/{name}.safetensors"))
    keys = [KEYS[component]] + ["pretrained_model_name_or_path"] * (component == "transformer")
    for key in keys:
        base = {"pretrained_model_name_or_path": "acme/never-asked"}
        options = ModelOptions(**{"model_flavour": "tiny", **base, key: str(file)})  # type: ignore[arg-type]
        with pytest.raises(AccessError, match=re.escape(message)) as caught:
            locate(options, report=pytest.fail)
        assert "Hub" not in str(caught.value)


def test_all_that_is_wrong_with_single_files_is_said_at_once(wrong: dict[str, Path]) -> None:
    asked = {KEYS["transformer"]: wrong["vae"], KEYS["vae"]: wrong["lora"], KEYS["text_encoder"]: wrong["empty"]}
    options = ModelOptions(model_flavour="tiny", **{key: str(file) for key, file in asked.items()})  # type: ignore[arg-type]
    with pytest.raises(AccessError) as caught:
        locate(options, report=pytest.fail)
    assert len(caught.value.problems) == 3


def test_a_missing_base_file_is_said_though_the_transformer_lies_elsewhere(
    tiny_folder: Path, wrong: dict[str, Path]
) -> None:
    transformer = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    for more, count in (({}, 1), ({KEYS["vae"]: str(wrong["lora"])}, 2)):
        asked = {"pretrained_model_name_or_path": "/absent/all.safetensors", KEYS["transformer"]: str(transformer)}
        options = ModelOptions(model_flavour="tiny", **asked, **more)  # type: ignore[arg-type]
        with pytest.raises(AccessError, match=r"/absent/all\.safetensors: no such file") as caught:
            locate(options, report=pytest.fail)
        assert len(caught.value.problems) == count


# --- a model around a trained transformer


def test_a_models_folder_has_the_vae_in_diffusers_names(tiny_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "ae.safetensors", bfl_vae(component_tensors(tiny_folder, "vae")))
    source = located("tiny", tiny_folder, vae=file)
    save_transformer(tmp_path / "saved", source.spec, {}, metadata={}, dtype=torch.bfloat16)
    assert save_pipeline(tmp_path / "model", tmp_path / "saved", source) is None
    made, expected = component_tensors(tmp_path / "model", "vae"), component_tensors(tiny_folder, "vae")
    assert made.keys() == expected.keys()
    assert made.pop("bn.num_batches_tracked") == 0
    assert all(torch.equal(made[name], expected[name]) for name in made)
    assert json.loads((tmp_path / "model/vae/config.json").read_text()) == source.vae.config
    encoder = repackaged(tiny_folder, tmp_path / "encoder.safetensors", "tiny")
    source = located("tiny", tiny_folder, text_encoder=encoder)
    reason = save_pipeline(tmp_path / "model", tmp_path / "saved", source)
    assert reason == "its text encoder is the single file encoder.safetensors, not a diffusers folder"
    assert not (tmp_path / "model" / "text_encoder").exists()
