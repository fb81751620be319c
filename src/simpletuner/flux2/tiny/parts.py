"""Common parts of all embedded models: autoencoder, scheduler, and writing of files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simpletuner.config.flavours import TINY_AUTOENCODER, TransformerSpec
from simpletuner.flux2.spec import autoencoder_to_config, transformer_to_diffusers
from simpletuner.flux2.tiny.weights import Shapes
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.tensors import save_tensors

METADATA = {"format": "pt"}
"""Header of each weight file: transformers and diffusers reject files without it."""

VAE: dict[str, Any] = autoencoder_to_config(TINY_AUTOENCODER)

# dev's scheduler.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}


def transformer_shapes(spec: TransformerSpec) -> Shapes:
    """The shapes of a transformer's tensors, by name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Flux2Transformer(spec).state_dict().items()}


def write_model(
    folder: Path,
    index: dict[str, Any],
    tokenizer: Mapping[str, str],
    spec: TransformerSpec,
    text_config: dict[str, Any],
    *,
    transformer: Mapping[str, Tensor],
    text_encoder: Mapping[str, Tensor],
    vae: Mapping[str, Tensor],
) -> None:
    """Write a complete model, except its stamp, into `folder`.

    `index` is its model_index.json; `tokenizer` maps the tokenizer's file names to their texts.
    """
    write_config(folder / "model_index.json", index)
    write_config(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name, text in tokenizer.items():
        (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
    write_config(folder / "transformer" / "config.json", transformer_to_diffusers(spec))
    save_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", transformer, METADATA)
    write_config(folder / "text_encoder" / "config.json", text_config)
    save_tensors(folder / "text_encoder" / "model.safetensors", text_encoder, METADATA)
    write_config(folder / "vae" / "config.json", VAE)
    save_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, METADATA)


def write_config(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON to `path`, whose folder is created if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
