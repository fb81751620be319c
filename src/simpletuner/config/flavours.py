"""The FLUX.2 flavours: their shapes, text encoding, licenses and defaults. Plain data."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

# Exact reference wording. Replacing its newline by a space would change the tokens of every prompt.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


@dataclass(frozen=True)
class TransformerSpec:
    """Hyperparameters that determine every tensor shape of the transformer; `eps` applies to all norms."""

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
        """Inner width of a feed-forward layer, after the gate."""
        return int(self.hidden * self.mlp_ratio)

    @property
    def blocks(self) -> int:
        """Number of blocks, double and single."""
        return self.double_blocks + self.single_blocks


@dataclass(frozen=True)
class TextSpec:
    """Hyperparameters that determine the tensor shapes of a text encoder's language model."""

    vocabulary: int
    hidden: int
    inner: int
    """Inner width of a feed-forward layer."""
    heads: int
    key_heads: int
    head_dim: int
    has_head_norms: bool = False
    """Whether each head's queries and keys are normalized, as Qwen3 does."""

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of each Linear of a layer: query, key, value, output; gate, up, down."""
        width, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        attention = ((width, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, width))
        return (*attention, (self.inner, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner))

    @property
    def scales(self) -> int:
        """Number of norm weights in a layer."""
        return 2 * self.hidden + (2 * self.head_dim if self.has_head_norms else 0)


@dataclass(frozen=True)
class AutoencoderSpec:
    """Hyperparameters that determine the tensor shapes of diffusers' `AutoencoderKLFlux2`."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each level, from the highest resolution to the lowest."""
    blocks_per_level: int = 2
    """Residual blocks per encoder level; a decoder level has one more."""
    decoder_channels: tuple[int, ...] | None = None
    """Channels of the decoder, in the same order; None if equal. The small decoder has 96, 192, 384 and 384."""
    latent_channels: int = 32
    tile: int = 1024
    """Side of a tile in pixels, when tiling is on."""
    norm_groups: int = 32
    """Number of groups of every group norm. No tensor shape depends on it."""


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

KLEIN_9B_TEXT = TextSpec(
    vocabulary=151936, hidden=4096, inner=12288, heads=32, key_heads=8, head_dim=128, has_head_norms=True
)

KLEIN_4B_TEXT = TextSpec(
    vocabulary=151936, hidden=2560, inner=9728, heads=32, key_heads=8, head_dim=128, has_head_norms=True
)

TINY = TransformerSpec(
    heads=6,
    head_dim=32,
    double_blocks=2,
    single_blocks=6,
    context_dim=3 * 64,
    guidance_embeds=True,
    axes=(8, 8, 8, 8),
)

TINY_TEXT = TextSpec(vocabulary=952, hidden=64, inner=128, heads=4, key_heads=2, head_dim=16)

TINY_KLEIN = TransformerSpec(
    heads=4,
    head_dim=32,
    double_blocks=2,
    single_blocks=4,
    context_dim=3 * 64,
    guidance_embeds=False,
    axes=(8, 8, 8, 8),
)

# As in klein-4b, heads · head_dim is larger than hidden.
TINY_KLEIN_TEXT = TextSpec(vocabulary=704, hidden=64, inner=96, heads=6, key_heads=2, head_dim=16, has_head_norms=True)

TINY_AUTOENCODER = AutoencoderSpec(channels=(16, 32, 64, 64), blocks_per_level=1, tile=256, norm_groups=2)


TextEncoderKind = Literal["mistral3", "qwen3"]
"""The language model that encodes prompts."""

GuidanceKind = Literal["embedded", "classifier-free", "none"]
"""How guidance works in sampling: `embedded`, the transformer takes the scale as an input; `classifier-free`, two
predictions per step, one of them without the prompt; `none`, the weights have a fixed guidance built in."""


class GuidanceScales(NamedTuple):
    """Guidance scales for sampling an image."""

    embedded: float
    """Input of the transformer's guidance embedder; a model without one ignores it."""
    real: float
    """Scale of classifier-free guidance against the negative prompt; 1 turns it off and halves the time."""


@dataclass(frozen=True)
class TextContextSpec:
    """How prompts become the transformer's context."""

    kind: TextEncoderKind
    encoder: TextSpec
    system_message: str | None
    """System message before each prompt in the tokenizer's chat template; None for no message."""
    layers: tuple[int, ...]
    """Text encoder layers whose hidden states are concatenated; 0 would be the embeddings."""
    length: int
    """Tokens of a context, including padding. The model was trained only with these positions."""
    padding_side: Literal["left", "right"]


@dataclass(frozen=True)
class Flavour:
    """One FLUX.2 model: its components, Hub repository, license, and defaults for sampling."""

    name: "FlavourName"
    summary: str
    """Completes "`name` is ..." in the docs."""
    title: str
    """Name for use in a sentence."""
    repo: str | None
    """Hub id; None for an embedded model, which is generated locally."""
    downloads: Mapping[str, int]
    """Bytes to download from the Hub for each component."""
    transformer: TransformerSpec
    text: TextContextSpec
    autoencoder: AutoencoderSpec
    license: str
    """The license, which users must know before they use or share a LoRA of this model."""
    license_notice: str | None
    """A sentence to print at the start of each run, if the license restricts use."""
    guidance: float
    """Default guidance for sampling (training uses 1)."""
    steps: int
    """Default denoising steps for sampling."""
    shift: float
    """Default of `flow_schedule_shift`."""
    fixed_side: int | None
    """Side in pixels of the only image size that the model can generate; None if it can generate any usual size."""
    validation_steps: int
    """Default of `validation_num_inference_steps`; may be fewer than `steps`, since a run validates many times."""
    family: str
    """Name shared by base and distilled weights of one size. A LoRA of one flavour fits the others of its family."""
    is_distilled: bool = False
    """Whether the weights are distilled for few steps without guidance, for sampling rather than training."""
    preview: "FlavourName | None" = None
    """The distilled flavour of a base model's family, if there is one."""

    @property
    def guidance_kind(self) -> GuidanceKind:
        """How guidance works on this flavour."""
        if self.transformer.guidance_embeds:
            return "embedded"
        return "none" if self.is_distilled else "classifier-free"

    def guidance_scales(self, guidance: float, guidance_real: float) -> GuidanceScales:
        """The scales that `validation_guidance` and `validation_guidance_real` set on this flavour."""
        if self.guidance_kind == "embedded":
            return GuidanceScales(guidance, guidance_real)
        return GuidanceScales(1.0, guidance if self.guidance_kind == "classifier-free" else 1.0)

    @property
    def option_defaults(self) -> dict[str, Any]:
        """Option defaults that depend on the flavour."""
        return {
            "flow_schedule_shift": self.shift,
            "validation_guidance": self.guidance,
            "validation_num_inference_steps": self.validation_steps,
        }


FlavourName = Literal[
    "dev",
    "klein-9b",
    "klein-4b",
    "klein-9b-distilled",
    "klein-4b-distilled",
    "tiny",
    "tiny-klein",
    "tiny-klein-distilled",
]
"""The keys of `FLAVOURS` as a type; a test compares the two."""

DEFAULT_FLAVOUR: FlavourName = "dev"

_QWEN3_LAYERS = (9, 18, 27)

_KLEIN_9B_BASE = Flavour(
    name="klein-9b",
    summary="FLUX.2-klein-base-9B (9.08 B parameters, non-commercial license)",
    title="FLUX.2-klein-base-9B",
    repo="black-forest-labs/FLUX.2-klein-base-9B",
    downloads={"transformer": 18_200_000_000, "text_encoder": 11_700_000_000, "vae": 170_000_000},
    transformer=KLEIN_9B,
    text=TextContextSpec(
        kind="qwen3",
        encoder=KLEIN_9B_TEXT,
        system_message=None,
        layers=_QWEN3_LAYERS,
        length=512,
        padding_side="right",
    ),
    autoencoder=AutoencoderSpec(),
    license="FLUX non-commercial license, https://huggingface.co/black-forest-labs/FLUX.2-klein-base-9B",
    license_notice=(
        "FLUX.2-klein-9B's weights are under Black Forest Labs' non-commercial license: "
        "read it before you use or share what you train."
    ),
    guidance=4.0,
    steps=50,
    shift=3.0,
    fixed_side=None,
    validation_steps=50,
    family="klein-9b",
    preview="klein-9b-distilled",
)

_KLEIN_4B_BASE = replace(
    _KLEIN_9B_BASE,
    name="klein-4b",
    summary="FLUX.2-klein-base-4B (3.88 B parameters, Apache-2.0)",
    title="FLUX.2-klein-base-4B",
    repo="black-forest-labs/FLUX.2-klein-base-4B",
    downloads={"transformer": 7_800_000_000, "text_encoder": 6_230_000_000, "vae": 170_000_000},
    transformer=KLEIN_4B,
    text=replace(_KLEIN_9B_BASE.text, encoder=KLEIN_4B_TEXT),
    license="Apache-2.0",
    license_notice=None,
    family="klein-4b",
    preview="klein-4b-distilled",
)

_TINY_KLEIN_BASE = replace(
    _KLEIN_4B_BASE,
    name="tiny-klein",
    summary=(
        "a small FLUX.2 with all of klein's parts and random weights, generated locally: it trains on two CPU cores, "
        "and its images are patterns"
    ),
    title="the embedded klein",
    repo=None,
    downloads={},
    transformer=TINY_KLEIN,
    text=replace(_KLEIN_9B_BASE.text, encoder=TINY_KLEIN_TEXT, length=64),
    autoencoder=TINY_AUTOENCODER,
    steps=20,
    fixed_side=128,
    validation_steps=20,
    family="tiny-klein",
    preview="tiny-klein-distilled",
)


def _distilled(base: Flavour, *, title: str, repo: str | None, license_terms: str | None = None) -> Flavour:
    """The distilled sibling of a klein base: same shapes, different weights, four steps without guidance."""
    assert base.preview is not None
    return replace(
        base,
        name=base.preview,
        summary=f"the distilled weights of `{base.name}`'s size, for sampling in 4 steps, not for training",
        title=title,
        repo=repo,
        license=license_terms or base.license,
        guidance=1.0,
        steps=4,
        validation_steps=4,
        is_distilled=True,
        preview=None,
    )


FLAVOURS: Mapping[str, Flavour] = {
    "dev": Flavour(
        name="dev",
        summary="FLUX.2-dev (32.2 B parameters, non-commercial license)",
        title="FLUX.2-dev",
        repo="black-forest-labs/FLUX.2-dev",
        downloads={"transformer": 64_400_000_000, "text_encoder": 34_700_000_000, "vae": 170_000_000},
        transformer=DEV,
        text=TextContextSpec(
            kind="mistral3",
            encoder=DEV_TEXT,
            system_message=SYSTEM_MESSAGE,
            layers=(10, 20, 30),
            length=512,
            padding_side="left",
        ),
        autoencoder=AutoencoderSpec(),
        license="FLUX.2-dev non-commercial license, https://huggingface.co/black-forest-labs/FLUX.2-dev",
        license_notice=(
            "FLUX.2-dev's weights are under Black Forest Labs' non-commercial license: "
            "read it before you use or share what you train."
        ),
        guidance=4.0,
        steps=50,
        shift=3.0,
        fixed_side=None,
        validation_steps=20,
        family="dev",
    ),
    "klein-9b": _KLEIN_9B_BASE,
    "klein-4b": _KLEIN_4B_BASE,
    "klein-9b-distilled": _distilled(
        _KLEIN_9B_BASE,
        title="FLUX.2-klein-9B",
        repo="black-forest-labs/FLUX.2-klein-9B",
        license_terms="FLUX non-commercial license, https://huggingface.co/black-forest-labs/FLUX.2-klein-9B",
    ),
    "klein-4b-distilled": _distilled(_KLEIN_4B_BASE, title="FLUX.2-klein-4B", repo="black-forest-labs/FLUX.2-klein-4B"),
    "tiny": Flavour(
        name="tiny",
        summary=(
            "a small FLUX.2 with all of dev's parts, included in the program: it trains on two CPU cores without a "
            "network"
        ),
        title="the embedded model",
        repo=None,
        downloads={},
        transformer=TINY,
        text=TextContextSpec(
            kind="mistral3",
            encoder=TINY_TEXT,
            system_message=SYSTEM_MESSAGE,
            layers=(10, 20, 30),
            length=64,
            padding_side="left",
        ),
        autoencoder=TINY_AUTOENCODER,
        license="Apache-2.0",
        license_notice=None,
        guidance=4.0,
        steps=20,
        shift=3.0,
        fixed_side=128,
        validation_steps=20,
        family="tiny",
    ),
    "tiny-klein": _TINY_KLEIN_BASE,
    "tiny-klein-distilled": _distilled(_TINY_KLEIN_BASE, title="the embedded distilled klein", repo=None),
}


def sibling(flavour: Flavour) -> Flavour | None:
    """The other flavour of the family: the distilled weights of a base, or the base of distilled weights."""
    return next(
        (each for each in FLAVOURS.values() if each.family == flavour.family and each.name != flavour.name), None
    )


def flavour_of_base(base_model: str) -> Flavour | None:
    """The flavour that a record names as its base model, by Hub id or by an embedded model's folder; None if there is
    none."""
    for flavour in FLAVOURS.values():
        is_embedded = flavour.repo is None and re.fullmatch(rf"{re.escape(flavour.name)}-\d+", base_model)
        if base_model == flavour.repo or is_embedded:
            return flavour
    return None


_KLEIN_FILE = re.compile(r"flux-?2-klein-(?P<base>base-)?\d+b")


def is_distilled_file(name: str) -> bool | None:
    """Whether a single file of this name holds distilled weights, by Black Forest Labs' names for klein; None for any
    other name.
    """
    match = _KLEIN_FILE.match(name.lower())
    return None if match is None else match["base"] is None
