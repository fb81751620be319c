"""FLUX.2 transformers with random weights, generated on the device block by block: nothing is read or downloaded."""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from simpletuner.config.flavours import DEV, KLEIN_4B, KLEIN_9B, TransformerSpec
from simpletuner.config.options.precision import PrecisionName
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import quantizable_linears, replace_by_empty

SPECS = {"dev": DEV, "klein-9b": KLEIN_9B, "klein-4b": KLEIN_4B}
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
FORMATS: dict[str, PrecisionName] = {"int8": "int8-quanto", "int4": "int4-quanto"}
"""Formats of quantized weights that can be read without their library."""
SPREAD = {"int8": 74.0, "int4": 4.6}
"""Standard deviation of a uniform draw over all numbers of a format."""
TINY_EDGE, TINY_TEXT = 64, 16
"""Edge in pixels and number of text tokens in the rehearsal."""
TEXT = 512


def spec_of(name: str, *, tiny: bool) -> TransformerSpec:
    """The shapes of a flavour, or of a small model with the same parts."""
    spec = SPECS[name]
    if not tiny:
        return spec
    return replace(spec, heads=4, head_dim=32, double_blocks=1, single_blocks=3, context_dim=64, axes=(8, 8, 8, 8))


def transformer(
    spec: TransformerSpec, precision: str, device: torch.device, resident: Collection[int] | None = None
) -> Flux2Transformer:
    """A frozen transformer of small random weights: bf16, or its blocks in int8 or int4. Blocks whose index is not in
    `resident`, if that is set, are in host memory; each is generated on `device` first, which is faster.
    """
    with torch.device("meta"):
        model = Flux2Transformer(spec).bfloat16().requires_grad_(False)
        if precision != "bf16":
            replace_by_empty(
                model, quantizable_linears(model, BLOCKS, FORMATS[precision]), FORMATS[precision], torch.bfloat16
            )
    generator = torch.Generator(device).manual_seed(0)
    blocks = {block: index for index, block in enumerate(model.blocks)}
    for part in [*model.blocks, *(child for child in model.children() if not isinstance(child, nn.ModuleList))]:
        part.to_empty(device=device)
        for name, tensor in part.named_parameters():
            draw(name.rpartition(".")[2], tensor, precision, generator)
        if part in blocks and resident is not None and blocks[part] not in resident:
            part.to("cpu")
    return model


def draw(name: str, tensor: Tensor, precision: str, generator: torch.Generator) -> None:
    """Fill a weight, or a part of a quantized one, such that weights are about 0.02."""
    if name == "weight":
        tensor.normal_(std=0.02, generator=generator)
    elif name == "data":
        tensor.random_(generator=generator)
    else:
        scale = 0.02 / SPREAD[precision]
        tensor.fill_({"scale": scale, "shift": 7.5 * scale}[name])
