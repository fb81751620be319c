"""Generate the folders of the embedded models, in the layout of a diffusers pipeline, once per machine."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from simpletuner.base.errors import AccessError
from simpletuner.base.files import file_errors_reported, read_json
from simpletuner.base.parts import locked_part, remove_abandoned_parts
from simpletuner.config.flavours import TINY, FlavourName
from simpletuner.flux2.tiny import klein, vocabulary
from simpletuner.flux2.tiny.parts import transformer_shapes, write_config, write_model
from simpletuner.flux2.tiny.weights import START_GAINS, TEXT_GAINS, Shapes, draw
from simpletuner.memory.tensors import load_tensors

VERSION = 2
"""Version of the shipped weights and of all generated files. Each version has a line in CHANGELOG.md."""

SHIPPED = Path(__file__).parent / "model"
TRANSFORMER, VAE_WEIGHTS = "transformer.safetensors", "vae.safetensors"
SEED = 0
"""Seed of the text encoder for which the shipped transformer was trained."""

STAMP = "simpletuner.json"
"""File with the version of a generated model and the sizes of its files. It is written last."""

# As in dev, there are more layers than are used: layer 30 must not be the last.
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "vocab_size": vocabulary.SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
    "sliding_window": None,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
}
VISION_CONFIG: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "head_dim": 16,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu",
}
TEXT_ENCODER: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "dtype": "float32",
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG,
    "image_token_index": 10,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": False,
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "tie_word_embeddings": False,
}

INDEX: dict[str, Any] = {
    "_class_name": "Flux2Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}


def default_folder(cache_dir: Path | None, environ: Mapping[str, str], flavour: FlavourName = "tiny") -> Path:
    """The folder of an embedded model: below `cache_dir`, else below the user's cache folder.

    A relative XDG_CACHE_HOME is ignored, as its specification requires.

    Raises:
        AccessError: the user's home folder is unknown.
    """
    if cache_dir is None:
        xdg_cache = environ.get("XDG_CACHE_HOME", "")
        home = os.path.expanduser("~")
        if not os.path.isabs(xdg_cache) and not os.path.isabs(home):
            raise AccessError.of(
                "the home folder, which would hold the embedded model, is unknown",
                remedy="Set HOME or XDG_CACHE_HOME, or give a folder as --cache_dir.",
            )
        cache_dir = (Path(xdg_cache) if os.path.isabs(xdg_cache) else Path(home) / ".cache") / "simpletuner"
    return cache_dir / f"{flavour}-{version_of(flavour)}"


def version_of(flavour: FlavourName) -> int:
    """The version of an embedded model."""
    return VERSION if flavour == "tiny" else klein.KLEIN_VERSION


def make(folder: Path, flavour: FlavourName = "tiny") -> Path:
    """Generate an embedded model in `folder`, unless it exists there already; return `folder`.

    The folder appears atomically, so several processes may call this at once. Generation takes a second.

    Raises:
        AccessError: `folder` holds something else.
        DiskError: `folder` cannot be written.
    """
    version = version_of(flavour)
    if folder.exists():
        _check(folder, version)
        return folder
    with file_errors_reported(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned_parts(folder.parent, f".{folder.name}.*.part")
        with locked_part(folder, is_folder=True) as build:
            vae = load_tensors(SHIPPED / VAE_WEIGHTS)
            if flavour == "tiny":
                _fill(build, SEED, transformer=load_tensors(SHIPPED / TRANSFORMER), vae=vae)
            else:
                klein.fill(build, flavour, vae)
            _stamp(build, version)
            try:
                build.rename(folder)
            except OSError:
                # Another process was first and wrote the same bytes: rename does not replace a non-empty folder.
                _check(folder, version)
    return folder


def write_untrained(folder: Path, seed: int, trained_folder: Path) -> Path:
    """Write the embedded model before or during its training into `folder`, which may exist; return `folder`.

    Text encoder and transformer are drawn from `seed`, but a transformer in `trained_folder` is used instead. The
    autoencoder is read from `trained_folder`, which must hold it.
    """
    transformer = trained_folder / TRANSFORMER
    tensors = (
        load_tensors(transformer)
        if transformer.is_file()
        else draw("transformer", transformer_shapes(TINY), START_GAINS, seed)
    )
    _fill(folder, seed, transformer=tensors, vae=load_tensors(trained_folder / VAE_WEIGHTS))
    _stamp(folder, VERSION)
    return folder


def _check(folder: Path, version: int) -> None:
    """Raise unless `folder` holds the files that `make` writes, judged by names and sizes."""
    stamp = folder / STAMP
    if not stamp.is_file():
        raise AccessError.of(
            f"{folder} is not the embedded model", remedy="Move it away or choose another --cache_dir."
        )
    contents = read_json(stamp)
    damaged = [
        name
        for name, size in contents["files"].items()
        if not (folder / name).is_file() or (folder / name).stat().st_size != size
    ]
    if contents["version"] != version or damaged:
        defect = f"{damaged[0]} is damaged" if damaged else f"version {contents['version']}"
        raise AccessError.of(
            f"the embedded model in {folder}: {defect}",
            f"version {version}, all files complete",
            "Delete that folder: the program generates it again in seconds.",
        )


def _fill(folder: Path, seed: int, *, transformer: dict[str, Tensor], vae: dict[str, Tensor]) -> None:
    """Write a complete model, except its stamp, with a random text encoder and a trained tokenizer."""
    tokenizer = vocabulary.learn()
    entries = tokenizer.get_vocab_size()
    write_model(
        folder,
        INDEX,
        vocabulary.files(tokenizer),
        TINY,
        {**TEXT_ENCODER, "text_config": {**TEXT_CONFIG, "vocab_size": entries}},
        transformer=transformer,
        text_encoder=draw("text_encoder", _text_encoder_shapes(entries), TEXT_GAINS, seed),
        vae=vae,
    )


def _stamp(folder: Path, version: int) -> None:
    """Record the names and sizes of a complete model's files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    write_config(folder / STAMP, {"version": version, "files": sizes})


def _text_encoder_shapes(entries: int) -> Shapes:
    """Shapes of Mistral-3 with its vision tower, which never runs but which a diffusers pipeline requires."""
    hidden, inner = TEXT_CONFIG["hidden_size"], TEXT_CONFIG["intermediate_size"]
    keys = TEXT_CONFIG["num_key_value_heads"] * TEXT_CONFIG["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.model.embed_tokens.weight": (entries, hidden),
        "language_model.model.norm.weight": (hidden,),
        "language_model.lm_head.weight": (entries, hidden),
    }
    for index in range(TEXT_CONFIG["num_hidden_layers"]):
        layer = f"language_model.model.layers.{index}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
        }
    vision_width, patch = VISION_CONFIG["hidden_size"], VISION_CONFIG["patch_size"]
    shapes |= {
        "vision_tower.patch_conv.weight": (vision_width, 3, patch, patch),
        "vision_tower.ln_pre.weight": (vision_width,),
        "multi_modal_projector.norm.weight": (vision_width,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (vision_width, vision_width * 4),
        "multi_modal_projector.linear_1.weight": (hidden, vision_width),
        "multi_modal_projector.linear_2.weight": (hidden, hidden),
    }
    for index in range(VISION_CONFIG["num_hidden_layers"]):
        layer = f"vision_tower.transformer.layers.{index}"
        shapes |= {f"{layer}.attention.{name}_proj.weight": (vision_width, vision_width) for name in "qkvo"}
        shapes |= {
            f"{layer}.attention_norm.weight": (vision_width,),
            f"{layer}.ffn_norm.weight": (vision_width,),
            f"{layer}.feed_forward.gate_proj.weight": (VISION_CONFIG["intermediate_size"], vision_width),
            f"{layer}.feed_forward.up_proj.weight": (VISION_CONFIG["intermediate_size"], vision_width),
            f"{layer}.feed_forward.down_proj.weight": (vision_width, VISION_CONFIG["intermediate_size"]),
        }
    return shapes
