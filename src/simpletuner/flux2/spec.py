"""Architecture specs of a FLUX.2 model: read from configs or tensor shapes, and written as configs."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from simpletuner.config.flavours import DEV, FLAVOURS, AutoencoderSpec, TextSpec, TransformerSpec

TensorShape = tuple[int, ...]

QWEN3_HEAD_DIM = 128
"""Default head width of a Qwen3 config. It is not `hidden_size` divided by the number of heads."""

_TRANSFORMER_KEYS = {
    "in_channels": "in_channels",
    "num_layers": "double_blocks",
    "num_single_layers": "single_blocks",
    "attention_head_dim": "head_dim",
    "num_attention_heads": "heads",
    "joint_attention_dim": "context_dim",
    "timestep_guidance_channels": "timestep_channels",
    "mlp_ratio": "mlp_ratio",
    "axes_dims_rope": "axes",
    "rope_theta": "theta",
    "eps": "eps",
    "guidance_embeds": "guidance_embeds",
}
"""Field of `TransformerSpec` for each key of diffusers' config."""


def transformer_from_diffusers(config: Mapping[str, Any]) -> TransformerSpec:
    """The spec of a diffusers `transformer/config.json`; a missing key gets diffusers' default (dev).

    Raises:
        ValueError: the configuration is not a supported FLUX.2 transformer.
    """
    if config.get("patch_size", 1) != 1 or config.get("out_channels") not in (
        None,
        config.get("in_channels", 128),
    ):
        raise ValueError("patch_size must be 1 and out_channels the same as in_channels")
    head_dim = config.get("attention_head_dim", 128)
    axes = tuple(config.get("axes_dims_rope", (32, 32, 32, 32)))
    if len(axes) != 4 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise ValueError(f"axes_dims_rope must be four even numbers with the sum {head_dim}, the attention_head_dim")
    values = {field: config[key] for key, field in _TRANSFORMER_KEYS.items() if key in config} | {"axes": axes}
    spec = replace(DEV, **values)
    return replace(spec, mlp_ratio=float(spec.mlp_ratio), theta=float(spec.theta))


def transformer_to_diffusers(spec: TransformerSpec) -> dict[str, Any]:
    """The `transformer/config.json` from which diffusers builds this transformer."""
    head = {"_class_name": "Flux2Transformer2DModel", "patch_size": 1, "in_channels": spec.in_channels}
    values = {key: getattr(spec, field) for key, field in _TRANSFORMER_KEYS.items()}
    return head | {"out_channels": None} | values | {"axes_dims_rope": list(spec.axes)}


def transformer_from_tensors(shapes: Mapping[str, TensorShape]) -> TransformerSpec:
    """Infer the spec from the tensor shapes of a single file, in diffusers' names.

    Shapes do not determine the rotary axes and theta. They get the values of every FLUX.2: four equal axes and 2000.

    Raises:
        KeyError: a tensor of every FLUX.2 transformer is missing.
    """
    hidden, in_channels = shapes["x_embedder.weight"]
    (head_dim,) = shapes["single_transformer_blocks.0.attn.norm_q.weight"]
    axis = head_dim // 4
    return TransformerSpec(
        heads=hidden // head_dim,
        head_dim=head_dim,
        double_blocks=_count(shapes, "transformer_blocks"),
        single_blocks=_count(shapes, "single_transformer_blocks"),
        context_dim=shapes["context_embedder.weight"][1],
        guidance_embeds="time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        in_channels=in_channels,
        mlp_ratio=shapes["transformer_blocks.0.ff.linear_out.weight"][1] / hidden,
        axes=(axis, axis, axis, axis),
        timestep_channels=shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
    )


def _count(names: Mapping[str, object], group: str) -> int:
    """Number of blocks in the module list `group`."""
    return len({name.split(".")[1] for name in names if name.startswith(group + ".")})


def text_from_config(config: Mapping[str, Any]) -> TextSpec:
    """The spec of a `text_encoder/config.json`, with or without an enclosing vision-language config."""
    text = config.get("text_config", config)
    is_qwen = text.get("model_type") == "qwen3"
    return TextSpec(
        vocabulary=text["vocab_size"],
        hidden=text["hidden_size"],
        inner=text["intermediate_size"],
        heads=text["num_attention_heads"],
        key_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim")
        or (QWEN3_HEAD_DIM if is_qwen else text["hidden_size"] // text["num_attention_heads"]),
        has_head_norms=is_qwen,
    )


def text_from_tensors(shapes: Mapping[str, TensorShape], default: TextSpec) -> TextSpec:
    """Infer the spec of a text encoder's language model from its shapes, in the names of `text_encoder_name`.

    Shapes determine the head width only if heads have norms. Otherwise it is that of a flavour whose text encoder has
    these shapes, or else that of `default`.

    Raises:
        KeyError: a tensor of every text encoder is missing.
    """
    vocabulary, hidden = shapes["embed_tokens.weight"]
    inner = shapes["layers.0.mlp.gate_proj.weight"][0]
    queries, keys = (shapes[f"layers.0.self_attn.{part}_proj.weight"][0] for part in "qk")
    norm = shapes.get("layers.0.self_attn.q_norm.weight")
    widths = [each.text.encoder.head_dim for each in FLAVOURS.values()] if norm is None else []
    specs = [
        TextSpec(vocabulary, hidden, inner, queries // width, keys // width, width, norm is not None)
        for width in (*widths, default.head_dim if norm is None else norm[0])
    ]
    flavours = [flavour.text.encoder for flavour in FLAVOURS.values()]
    return next((spec for spec in specs if spec in flavours), specs[-1])


def text_shapes(spec: TextSpec, layers: int) -> dict[str, TensorShape]:
    """Tensor shapes of a text encoder's first `layers` layers and embedding, in the names of `text_encoder_name`."""
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    of_layer: dict[str, TensorShape] = dict(zip(linears, spec.linears, strict=True))
    of_layer |= {f"{norm}_layernorm": (spec.hidden,) for norm in ("input", "post_attention")}
    of_layer |= {f"self_attn.{part}_norm": (spec.head_dim,) for part in ("qk" if spec.has_head_norms else "")}
    shapes: dict[str, TensorShape] = {"embed_tokens.weight": (spec.vocabulary, spec.hidden)}
    for index in range(layers):
        shapes |= {f"layers.{index}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def text_layer_count(names: Iterable[str]) -> int:
    """Number of layers of a text encoder, given its tensors' names as `text_encoder_name` returns them."""
    return len({name.split(".")[1] for name in names if name.startswith("layers.")})


def text_to_config(spec: TextSpec, layers: int) -> dict[str, Any]:
    """The `config.json` from which transformers builds this language model.

    Values that shapes do not determine are those of dev's Mistral-Small-3 or klein's Qwen3.
    """
    theta, eps, positions = (1e6, 1e-6, 40_960) if spec.has_head_norms else (1e9, 1e-5, 131_072)
    return {
        "model_type": "qwen3" if spec.has_head_norms else "mistral",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.key_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
    }


def autoencoder_from_config(config: Mapping[str, Any]) -> AutoencoderSpec:
    """The spec of a `vae/config.json`; a missing key gets diffusers' default (dev)."""
    return AutoencoderSpec(
        channels=tuple(config.get("block_out_channels", AutoencoderSpec.channels)),
        blocks_per_level=config.get("layers_per_block", AutoencoderSpec.blocks_per_level),
        latent_channels=config.get("latent_channels", AutoencoderSpec.latent_channels),
        tile=config.get("sample_size", AutoencoderSpec.tile),
        norm_groups=config.get("norm_num_groups", AutoencoderSpec.norm_groups),
        decoder_channels=tuple(config.get("decoder_block_out_channels") or ()) or None,
    )


def autoencoder_from_tensors(shapes: Mapping[str, TensorShape], default: AutoencoderSpec) -> AutoencoderSpec:
    """Infer the spec of a VAE from its shapes, in diffusers' names.

    Shapes do not determine tile and norm groups. They come from `default` if it has these encoder channels, else
    from a flavour that has them, else from `default`.

    Raises:
        KeyError: a tensor of every VAE is missing.
        ValueError: encoder and decoder have different numbers of levels.
    """
    channels: list[int] = []
    while (first := shapes.get(f"encoder.down_blocks.{len(channels)}.resnets.0.conv1.weight")) is not None:
        channels.append(first[0])
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down_blocks.0.resnets.")}
    decoder = decoder_channels(shapes)
    if len(decoder) != len(channels):
        raise ValueError(f"{len(channels)} encoder levels and {len(decoder)} decoder levels")
    inferred = AutoencoderSpec(
        channels=tuple(channels),
        blocks_per_level=len(blocks),
        latent_channels=shapes["quant_conv.weight"][0] // 2,
        decoder_channels=decoder if decoder != tuple(channels) else None,
    )
    candidates = [default, *(each.autoencoder for each in FLAVOURS.values())]
    similar = next((each for each in candidates if each.channels == inferred.channels), default)
    return replace(inferred, tile=similar.tile, norm_groups=similar.norm_groups)


def autoencoder_to_config(spec: AutoencoderSpec) -> dict[str, Any]:
    """The `vae/config.json` from which diffusers builds this VAE."""
    levels = len(spec.channels)
    return {
        "_class_name": "AutoencoderKLFlux2",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(spec.channels),
        "layers_per_block": spec.blocks_per_level,
        "act_fn": "silu",
        "latent_channels": spec.latent_channels,
        "norm_num_groups": spec.norm_groups,
        "sample_size": spec.tile,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": [2, 2],
        **({"decoder_block_out_channels": list(spec.decoder_channels)} if spec.decoder_channels else {}),
    }


def decoder_channels(shapes: Mapping[str, TensorShape]) -> tuple[int, ...]:
    """Infer a VAE's decoder channels, in the config's order, from its shapes, in diffusers' names.

    Empty if `shapes` has no decoder.
    """
    channels: list[int] = []
    while (first := shapes.get(f"decoder.up_blocks.{len(channels)}.resnets.0.conv1.weight")) is not None:
        channels.append(first[0])
    return tuple(reversed(channels))


def encoder_shapes(spec: AutoencoderSpec) -> list[TensorShape]:
    """Shapes of all parameters of a VAE's encoding half. Its batch norm has no parameters."""
    first, last, latent = spec.channels[0], spec.channels[-1], 2 * spec.latent_channels
    ends = [*_linear(first, 3, 3, 3), *_norm(last), *_linear(latent, last, 3, 3), *_linear(latent, latent, 1, 1)]
    return [*ends, *_levels(spec.channels[-1], spec.channels, spec.blocks_per_level)]


def decoder_shapes(spec: AutoencoderSpec) -> list[TensorShape]:
    """Shapes of all parameters of a VAE's decoding half."""
    channels = spec.decoder_channels or spec.channels
    first, last, latent = channels[0], channels[-1], spec.latent_channels
    ends = [*_linear(latent, latent, 1, 1), *_linear(last, latent, 3, 3), *_norm(first), *_linear(3, first, 3, 3)]
    return [*ends, *_levels(last, channels[::-1], spec.blocks_per_level + 1)]


def _levels(last: int, levels: tuple[int, ...], blocks: int) -> list[TensorShape]:
    """Shapes of the middle block, which has `last` channels, and of the levels in execution order."""
    attention = [*_norm(last), *_linear(last, last) * 4]
    shapes = [*_residual(last, last), *attention, *_residual(last, last)]
    previous = levels[0]
    for level, width in enumerate(levels):
        shapes += [*_residual(previous, width), *_residual(width, width) * (blocks - 1)]
        shapes += _linear(width, width, 3, 3) if level < len(levels) - 1 else []
        previous = width
    return shapes


def _norm(width: int) -> list[TensorShape]:
    """Shapes of weight and bias of a norm."""
    return [(width,), (width,)]


def _linear(*shape: int) -> list[TensorShape]:
    """Shapes of weight and bias of a Linear or convolution."""
    return [shape, shape[:1]]


def _residual(inputs: int, width: int) -> list[TensorShape]:
    """Shapes of a residual block, with a shortcut convolution if the width changes."""
    shapes = [*_norm(inputs), *_linear(width, inputs, 3, 3), *_norm(width), *_linear(width, width, 3, 3)]
    return shapes if inputs == width else [*shapes, *_linear(width, inputs, 1, 1)]
