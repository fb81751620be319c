"""Measure captions a second of the text encoders, and images a second of the VAE, at full size.

    python benchmarks/gpu/encoders.py [--device cpu --tiny]

Weights are random and generated on the device; the tokenizers are the embedded models'. Captions have about 60 tokens
besides the template; klein's are padded to the whole context, all of which is computed. The text encoders need
transformers, the VAE diffusers: if one is missing, its measurements are left out, with a message.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from measuring import Clock, free, parser, seconds_of
from results import report

from simpletuner.config.flavours import FLAVOURS, FlavourName
from simpletuner.config.options.model import ModelOptions

CAPTION = "a small yellow house beside the river in soft morning light and trees " * 4
TEXT_BATCH, VAE_BATCH = 8, 1
EDGE = {True: 64, False: 1024}
ROUNDS = 3


def main() -> None:
    arguments = parser(__doc__).parse_args()
    clock = Clock(arguments.seconds)
    measurements: list[tuple[str, Callable[[torch.device, bool], None]]] = [
        (f"text encoder of {flavour}", partial(text, flavour)) for flavour in ("dev", "klein-9b", "klein-4b")
    ]
    for name, measure in (*measurements, ("VAE", vae)):
        if clock.left > 5:
            try:
                measure(arguments.device, arguments.tiny)
            except ImportError as error:
                report("encoder", what=name, note=f"left out: {str(error).strip().splitlines()[0]}")
            free()


def text(name: FlavourName, device: torch.device, tiny: bool) -> None:
    """Captions a second of the resident text encoder of the flavour `name`, in bf16."""
    from transformers import MistralConfig, Qwen3Config

    from simpletuner.flux2.load import _language_model, _tokenizer
    from simpletuner.flux2.source import locate
    from simpletuner.flux2.text import ResidentTextEncoder

    small: FlavourName = "tiny" if name == "dev" else "tiny-klein"
    flavour = FLAVOURS[small if tiny else name].text
    spec = flavour.encoder
    kind = MistralConfig if flavour.kind == "mistral3" else Qwen3Config
    config = kind(
        vocab_size=spec.vocabulary,
        hidden_size=spec.hidden,
        intermediate_size=spec.inner,
        num_hidden_layers=max(flavour.layers),
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.key_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=4096,
        sliding_window=None,
    )
    model = _language_model(config, flavour).to(torch.bfloat16).to_empty(device=device)
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=config)
    generator = torch.Generator(device).manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if "norm" in parameter_name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=generator)
    tokenizer = _tokenizer(locate(ModelOptions(model_flavour=small), report=lambda _: None), False)
    encoder = ResidentTextEncoder(model.eval(), tokenizer, replace(flavour, length=64) if tiny else flavour)
    captions = [CAPTION[: 120 + index] for index in range(TEXT_BATCH)]
    rate = TEXT_BATCH / seconds_of(lambda: encoder.encode(captions), device, rounds=ROUNDS)
    tokens = statistics.mean(encoder.lengths(captions))
    report(
        "encoder",
        what=f"text encoder of {name}, bf16",
        batch=TEXT_BATCH,
        rate=rate,
        unit="captions/s",
        note=f"{tokens:.0f} tokens a caption, template included",
        **peak(device),
    )


def vae(device: torch.device, tiny: bool) -> None:
    """Images a second of the VAE in bf16, encoding and decoding."""
    from diffusers import AutoencoderKLFlux2

    from simpletuner.flux2.autoencoder import Autoencoder

    spec = FLAVOURS["tiny" if tiny else "dev"].autoencoder
    torch.manual_seed(0)
    with torch.device(device):
        made: Any = AutoencoderKLFlux2(
            block_out_channels=spec.channels,
            layers_per_block=spec.blocks_per_level,
            latent_channels=spec.latent_channels,
            down_block_types=("DownEncoderBlock2D",) * len(spec.channels),
            up_block_types=("UpDecoderBlock2D",) * len(spec.channels),
            norm_num_groups=min(32, spec.channels[0]),
        )
    autoencoder = Autoencoder(made.to(torch.bfloat16).requires_grad_(False), device)
    edge = EDGE[tiny]
    pixels = torch.rand(VAE_BATCH, 3, edge, edge) * 2 - 1
    latents = autoencoder.encode(pixels)
    ways: Sequence[tuple[str, Callable[[], object]]] = (
        ("encoded", lambda: autoencoder.encode(pixels)),
        ("decoded", lambda: autoencoder.decode(latents)),
    )
    for way, work in ways:
        free()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rate = VAE_BATCH / seconds_of(work, device, rounds=ROUNDS)
        report("encoder", what=f"VAE, bf16, {edge}² {way}", batch=VAE_BATCH, rate=rate, unit="images/s", **peak(device))


def peak(device: torch.device) -> dict[str, int]:
    """Peak memory of the allocator, if the device has one."""
    return {"allocated_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}


if __name__ == "__main__":
    main()
