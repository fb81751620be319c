"""The numbers of FLUX.2: what a transformer is made of, and what belongs to each flavour."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The reference wording, with its one newline: a space there changes the tokens of every prompt.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True)
class TransformerSpec:
    """What decides every tensor shape of the transformer. Channels are counts, `eps` is that of all norms."""

    heads: int
    head_dim: int
    double_blocks: int
    single_blocks: int
    context_dim: int
    guidance_embeds: bool
    in_channels: int = 128
    mlp_ratio: float = 3.0
    axes: tuple[int, int, int, int] = (32, 32, 32, 32)
    theta: float = 2000.0
    timestep_channels: int = 256
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if sum(self.axes) != self.head_dim:
            raise ValueError(f"rotary axes {self.axes} add up to {sum(self.axes)}, not to head_dim {self.head_dim}")

    @property
    def hidden(self) -> int:
        """Width of a token inside the transformer."""
        return self.heads * self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Width inside a feed-forward, after the gate."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """Double and single blocks together."""
        return self.double_blocks + self.single_blocks

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "TransformerSpec":
        """The spec of a diffusers `transformer/config.json`; a missing key has diffusers' default (dev).

        Raises:
            ValueError: a configuration that is no FLUX.2 transformer we can run.
        """
        if config.get("patch_size", 1) != 1 or config.get("out_channels") not in (
            None,
            config.get("in_channels", 128),
        ):
            raise ValueError("patch_size must be 1 and out_channels the same as in_channels")
        first, second, third, fourth = config.get("axes_dims_rope", (32, 32, 32, 32))
        return cls(
            heads=config.get("num_attention_heads", 48),
            head_dim=config.get("attention_head_dim", 128),
            double_blocks=config.get("num_layers", 8),
            single_blocks=config.get("num_single_layers", 48),
            context_dim=config.get("joint_attention_dim", 15360),
            guidance_embeds=config.get("guidance_embeds", True),
            in_channels=config.get("in_channels", 128),
            mlp_ratio=float(config.get("mlp_ratio", 3.0)),
            axes=(first, second, third, fourth),
            theta=float(config.get("rope_theta", 2000)),
            timestep_channels=config.get("timestep_guidance_channels", 256),
            eps=config.get("eps", 1e-6),
        )

    def to_diffusers(self) -> dict[str, Any]:
        """The `transformer/config.json` from which diffusers builds this transformer."""
        return {
            "_class_name": "Flux2Transformer2DModel",
            "patch_size": 1,
            "in_channels": self.in_channels,
            "out_channels": None,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.context_dim,
            "timestep_guidance_channels": self.timestep_channels,
            "mlp_ratio": self.mlp_ratio,
            "axes_dims_rope": list(self.axes),
            "rope_theta": self.theta,
            "eps": self.eps,
            "guidance_embeds": self.guidance_embeds,
        }

    @classmethod
    def from_tensors(cls, shapes: Mapping[str, tuple[int, ...]]) -> "TransformerSpec":
        """The spec read off the tensor shapes of a single file, in diffusers' names.

        Shapes do not tell the rotary axes and theta: four equal axes and 2000, as every FLUX.2 has.

        Raises:
            KeyError: a tensor that every FLUX.2 transformer has is not there.
        """
        hidden, in_channels = shapes["x_embedder.weight"]
        (head_dim,) = shapes["single_transformer_blocks.0.attn.norm_q.weight"]
        axis = head_dim // 4
        return cls(
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
    """How many numbered blocks `group` has."""
    return len({name.split(".")[1] for name in names if name.startswith(group + ".")})


@dataclass(frozen=True)
class TextSpec:
    """What decides the tensor shapes of a text encoder's language model."""

    vocabulary: int
    hidden: int
    inner: int
    """Width inside a feed-forward."""
    heads: int
    key_heads: int
    head_dim: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TextSpec":
        """Of a `text_encoder/config.json`, with or without a vision part around it."""
        text = config.get("text_config", config)
        return cls(
            vocabulary=text["vocab_size"],
            hidden=text["hidden_size"],
            inner=text["intermediate_size"],
            heads=text["num_attention_heads"],
            key_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each Linear of a layer: query, key, value, output; gate, up, down."""
        width, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        attention = ((width, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, width))
        return (*attention, (self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))

    @property
    def scales(self) -> int:
        """Numbers of a layer's two norms."""
        return 2 * self.hidden


Shape = tuple[int, ...]


@dataclass(frozen=True)
class AutoencoderSpec:
    """What decides the tensor shapes of diffusers' `AutoencoderKLFlux2`."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """At each level, the largest pictures first."""
    blocks_per_level: int = 2
    """Residual blocks; the decoder has one more."""
    latent_channels: int = 32
    tile: int = 1024
    """Side in pixels of what is encoded or decoded at a time where tiling is on."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "AutoencoderSpec":
        """Of a `vae/config.json`; a missing key has diffusers' default (dev)."""
        return cls(
            channels=tuple(config.get("block_out_channels", cls.channels)),
            blocks_per_level=config.get("layers_per_block", cls.blocks_per_level),
            latent_channels=config.get("latent_channels", cls.latent_channels),
            tile=config.get("sample_size", cls.tile),
        )

    @property
    def encoder(self) -> list[Shape]:
        """The shape of each parameter that encoding needs. The batch norm has none."""
        first, last, latent = self.channels[0], self.channels[-1], 2 * self.latent_channels
        ends = [*_linear(first, 3, 3, 3), *_norm(last), *_linear(latent, last, 3, 3), *_linear(latent, latent, 1, 1)]
        return [*ends, *self._inside(self.channels, self.blocks_per_level)]

    @property
    def decoder(self) -> list[Shape]:
        """The same of decoding."""
        first, last, latent = self.channels[0], self.channels[-1], self.latent_channels
        ends = [*_linear(latent, latent, 1, 1), *_linear(last, latent, 3, 3), *_norm(first), *_linear(3, first, 3, 3)]
        return [*ends, *self._inside(self.channels[::-1], self.blocks_per_level + 1)]

    def _inside(self, levels: tuple[int, ...], blocks: int) -> list[Shape]:
        """Of the middle, and of the levels in the order in which they run."""
        last = self.channels[-1]
        attention = [*_norm(last), *_linear(last, last) * 4]
        found = [*_residual(last, last), *attention, *_residual(last, last)]
        before = levels[0]
        for level, width in enumerate(levels):
            found += [*_residual(before, width), *_residual(width, width) * (blocks - 1)]
            found += _linear(width, width, 3, 3) if level < len(levels) - 1 else []
            before = width
        return found


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _linear(*shape: int) -> list[Shape]:
    """A matrix or convolution with its bias."""
    return [shape, shape[:1]]


def _residual(before: int, width: int) -> list[Shape]:
    """A residual block; a change of width takes one more convolution."""
    both = [*_norm(before), *_linear(width, before, 3, 3), *_norm(width), *_linear(width, width, 3, 3)]
    return both if before == width else [*both, *_linear(width, before, 1, 1)]


DEV = TransformerSpec(
    heads=48,
    head_dim=128,
    double_blocks=8,
    single_blocks=48,
    context_dim=15360,
    guidance_embeds=True,
)

KLEIN_9B = TransformerSpec(
    heads=32,
    head_dim=128,
    double_blocks=8,
    single_blocks=24,
    context_dim=12288,
    guidance_embeds=False,
)

KLEIN_4B = TransformerSpec(
    heads=24,
    head_dim=128,
    double_blocks=5,
    single_blocks=20,
    context_dim=7680,
    guidance_embeds=False,
)

DEV_TEXT = TextSpec(vocabulary=131072, hidden=5120, inner=32768, heads=32, key_heads=8, head_dim=128)

TINY = TransformerSpec(
    heads=6,
    head_dim=32,
    double_blocks=2,
    single_blocks=6,
    context_dim=3 * 64,
    guidance_embeds=True,
    axes=(8, 8, 8, 8),
)


@dataclass(frozen=True)
class Flavour:
    """One published FLUX.2: where it is, under which licence, and how its pictures are made."""

    name: str
    repo: str | None
    """Hub id; None for the embedded model, which is made on the spot."""
    transformer: TransformerSpec
    licence: str
    """What a user must know before using, or passing on, a LoRA of it."""
    text_layers: tuple[int, ...]
    """Hidden states of the text encoder that are put side by side; 0 would be the embeddings."""
    text_length: int
    """Tokens of a context, padding included: a model knows the positions that it was trained with, and no others."""
    guidance: float
    """Guidance for making pictures (training uses 1)."""
    steps: int
    """Denoising steps for making pictures."""


FLAVOURS: Mapping[str, Flavour] = {
    "dev": Flavour(
        name="dev",
        repo="black-forest-labs/FLUX.2-dev",
        transformer=DEV,
        licence="FLUX.2-dev non-commercial licence, https://huggingface.co/black-forest-labs/FLUX.2-dev",
        text_layers=(10, 20, 30),
        text_length=512,
        guidance=4.0,
        steps=50,
    ),
    "tiny": Flavour(
        name="tiny",
        repo=None,
        transformer=TINY,
        licence="Apache-2.0",
        text_layers=(10, 20, 30),
        text_length=64,
        guidance=4.0,
        steps=20,
    ),
}
