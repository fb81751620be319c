"""The embedded VAE with a decoder of other widths, as FLUX.2-small-decoder is to the published one."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CHANNELS = [12, 24, 48, 48]
"""Of the decoder; the encoder's stay 16, 32, 64 and 64."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_small_decoder(vae: Path, folder: Path, *, says_so: bool = True) -> Path:
    """Write into `folder`, as at a repository's root, the encoder of the folder `vae` and a drawn small decoder. Its
    config names the decoder's widths, or not."""
    from diffusers import AutoencoderKLFlux2

    folder.mkdir(parents=True)
    config = json.loads((vae / "config.json").read_text())
    torch.manual_seed(0)
    drawn = AutoencoderKLFlux2.from_config(config | {"decoder_block_out_channels": CHANNELS}).state_dict()
    kept = load_file(vae / WEIGHTS)
    new = ("decoder.", "post_quant_conv.")
    save_file({name: drawn[name] if name.startswith(new) else kept[name] for name in kept}, folder / WEIGHTS)
    said = {"decoder_block_out_channels": CHANNELS} if says_so else {}
    (folder / "config.json").write_text(json.dumps(config | said))
    return folder
