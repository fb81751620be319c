"""The FLUX.2 transformer: double-stream blocks, then single-stream blocks, one global modulation.

Parameter names and numbers are those of diffusers' `Flux2Transformer2DModel` (checked to 1e-5 in fp32), so weights
and LoRAs pass between the two unchanged. Why it is written here: docs/decisions/0001-own-transformer.md.
Source of the architecture: black-forest-labs/flux2, `src/flux2/model.py`.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from simpletuner.config.flavours import TransformerSpec
from simpletuner.flow.choice import Choice
from simpletuner.flux2.lora import LoraLinear
from simpletuner.flux2.rotary import Rotary, rotary, rotate
from simpletuner.flux2.tread import Routing

_FP16_LIMIT = 65504.0

PLAIN_TOKENS = 256
"""Up to here attention in bf16 on a CPU is two plain products: torch's kernel takes twice as long (docs/log.md)."""


def sinusoid(value: Float[Tensor, " b"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "b width"]:
    """Cosines, then sines, of `value` at `width / 2` frequencies from 1 down to 1/max_period. fp32."""
    exponents = torch.arange(width // 2, dtype=torch.float32, device=value.device) / (width // 2)
    angles = value.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ReferenceAttention(NamedTuple):
    """Which keys are seen where the last tokens of each sequence are those of references."""

    length: int
    """Reference tokens of a sequence, padding included."""
    is_token: Bool[Tensor, "b length"] | None = None
    """False where a sample is padded: no other token sees such a key. None where no sample is padded."""
    is_own: bool = False
    """Whether the queries of references see the keys of references alone. Text and target see all keys."""

    @property
    def is_full(self) -> bool:
        """Whether every token sees every other."""
        return self.is_token is None and not self.is_own


def attend(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b n heads d"],
    value: Float[Tensor, "b n heads d"],
    angles: Rotary,
    references: ReferenceAttention | None = None,
) -> Float[Tensor, "b n width"]:
    """Attention among all tokens: padding of the text is seen, as in BFL's code. `references` restricts what is seen of
    and by reference tokens.
    """
    query, key = rotate(query, angles), rotate(key, angles)
    query, key, value = (rearrange(x, "b n heads d -> b heads n d") for x in (query, key, value))
    is_short = query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[-2] <= PLAIN_TOKENS
    # Inductor cannot order the table's strides where its size is a sum of symbols, as text and image tokens are.
    has_table = is_short and not torch.compiler.is_compiling()
    attention = plain_attention if has_table else F.scaled_dot_product_attention
    if references is None:
        return rearrange(attention(query, key, value), "b heads n d -> b n (heads d)")

    is_token, rest = references.is_token, query.shape[-2] - references.length
    every = None if is_token is None else rearrange(F.pad(is_token, (rest, 0), value=True), "b n -> b 1 1 n")
    if not references.is_own:
        return rearrange(attention(query, key, value, every), "b heads n d -> b n (heads d)")
    # Padding of a sample without references sees itself: a softmax over no keys is not a number.
    own = None if is_token is None else rearrange(is_token | ~is_token.any(1, keepdim=True), "b n -> b 1 1 n")
    seeing_all = attention(query[:, :, :rest], key, value, every)
    seeing_own = attention(query[:, :, rest:], key[:, :, rest:], value[:, :, rest:], own)
    return rearrange(torch.cat([seeing_all, seeing_own], dim=2), "b heads n d -> b n (heads d)")


def plain_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m d"],
    is_seen: Bool[Tensor, "b 1 1 m"] | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Softmax attention, its table of n x m weights written out. Its scores are fp32: in bf16 they would make nine
    times the error of torch's kernels.
    """
    scores = query.float() @ (key.float() * key.shape[-1] ** -0.5).transpose(-1, -2)
    if is_seen is not None:
        scores = scores.masked_fill(~is_seen, -math.inf)
    out: Tensor = scores.softmax(dim=-1).to(value.dtype) @ value
    return out


def modulated(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    out: Tensor = (1 + scale) * norm(x) + shift
    return out


def clipped(x: Tensor) -> Tensor:
    """The residual stream leaves fp16's range in places; other types pass untouched."""
    return x.clip(-_FP16_LIMIT, _FP16_LIMIT) if x.dtype == torch.float16 else x


class _GatedResidual(torch.autograd.Function):
    """`x + gate * out` of a gate that wants no gradient.

    The gate is a plain attribute and not a saved tensor: recompute stops at a block's last saved tensor, and the gate
    would be saved after the block's last product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        ctx.gate = gate
        return x + gate * out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        return gradient, None, gradient * ctx.gate


def gated(
    x: Float[Tensor, "b n hidden"], gate: Float[Tensor, "b 1 hidden"], out: Float[Tensor, "b n hidden"]
) -> Float[Tensor, "b n hidden"]:
    """`x + gate * out`. The gradient of a gate that is trained needs `out`, which autograd then saves."""
    if gate.requires_grad:
        return x + gate * out
    added: Tensor = _GatedResidual.apply(x, gate, out)  # type: ignore[no-untyped-call]
    return added


def deferred(linear: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes `linear(x)`. What an adapter of `linear` adds is computed now."""
    return linear.deferred(x) if isinstance(linear, LoraLinear) else partial(linear, x)


class Embedder(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeGuidanceEmbedding(nn.Module):
    """One vector for sigma and, in guidance-distilled models, guidance: all that modulates the blocks."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.channels = spec.timestep_channels
        self.timestep_embedder = Embedder(self.channels, spec.hidden)
        self.guidance_embedder = Embedder(self.channels, spec.hidden) if spec.guidance_embeds else None

    def forward(self, sigma: Float[Tensor, " b"], guidance: Float[Tensor, " b"] | None) -> Float[Tensor, "b hidden"]:
        """Both inputs come in the model's own type and are scaled by 1000 in it, as the reference does."""
        out: Tensor = self.timestep_embedder(sinusoid(sigma * 1000, self.channels).to(sigma.dtype))
        if self.guidance_embedder is None:
            return out
        if guidance is None:
            raise ValueError("this transformer has a guidance embedder: guidance must be given")
        embedded: Tensor = self.guidance_embedder(sinusoid(guidance * 1000, self.channels).to(guidance.dtype))
        return out + embedded


class Modulation(nn.Module):
    """`sets` × (shift, scale, gate), each hidden wide, from the time and guidance vector."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 3 * sets * hidden, bias=False)

    def forward(self, vector: Float[Tensor, "b hidden"]) -> Float[Tensor, "b 1 width"]:
        out: Tensor = self.linear(F.silu(vector))
        return out[:, None]


class FeedForward(nn.Module):
    """SwiGLU with one fused input matrix: the first half, through SiLU, gates the second."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(hidden, 2 * inner, bias=False)
        self.linear_out = nn.Linear(inner, hidden, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """The input of the last product."""
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        hidden: Tensor = F.silu(gate) * value
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_out(self.hidden(x))
        return out


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head's queries or keys, its weight in the type of what it weighs: under autocast that is another
    than the weight's own, and torch has no fused way for two types.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        return F.rms_norm(x, list(self.normalized_shape), weight.to(x.dtype), self.eps)


class JointAttention(nn.Module):
    """Text and image tokens attend to each other; each stream has projections of its own."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        hidden, self.head_dim = spec.hidden, spec.head_dim
        self.to_q = nn.Linear(hidden, hidden, bias=False)
        self.to_k = nn.Linear(hidden, hidden, bias=False)
        self.to_v = nn.Linear(hidden, hidden, bias=False)
        # A list of one: diffusers keeps a dropout behind it, and its name is in every weight file.
        self.to_out = nn.ModuleList([nn.Linear(hidden, hidden, bias=False)])
        self.add_q_proj = nn.Linear(hidden, hidden, bias=False)
        self.add_k_proj = nn.Linear(hidden, hidden, bias=False)
        self.add_v_proj = nn.Linear(hidden, hidden, bias=False)
        self.to_add_out = nn.Linear(hidden, hidden, bias=False)
        self.norm_q = HeadNorm(self.head_dim, eps=spec.eps)
        self.norm_k = HeadNorm(self.head_dim, eps=spec.eps)
        self.norm_added_q = HeadNorm(self.head_dim, eps=spec.eps)
        self.norm_added_k = HeadNorm(self.head_dim, eps=spec.eps)

    def forward(
        self, text: Tensor, image: Tensor, angles: Rotary, references: ReferenceAttention | None = None
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return rearrange(x, "b n (heads d) -> b n heads d", d=self.head_dim)

        text_length = text.shape[1]
        query = torch.cat(
            [self.norm_added_q(heads(self.add_q_proj(text))), self.norm_q(heads(self.to_q(image)))], dim=1
        )
        key = torch.cat([self.norm_added_k(heads(self.add_k_proj(text))), self.norm_k(heads(self.to_k(image)))], dim=1)
        value = torch.cat([heads(self.add_v_proj(text)), heads(self.to_v(image))], dim=1)
        out = attend(query, key, value, angles, references)
        return self.to_add_out(out[:, :text_length]), self.to_out[0](out[:, text_length:])


class DoubleBlock(nn.Module):
    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)
        self.norm1_context = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)
        self.attn = JointAttention(spec)
        self.norm2 = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)
        self.norm2_context = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)
        self.ff = FeedForward(spec.hidden, spec.mlp_hidden)
        self.ff_context = FeedForward(spec.hidden, spec.mlp_hidden)

    def forward(
        self,
        text: Float[Tensor, "b l hidden"],
        image: Float[Tensor, "b n hidden"],
        text_modulation: Float[Tensor, "b 1 6*hidden"],
        image_modulation: Float[Tensor, "b 1 6*hidden"],
        angles: Rotary,
        references: ReferenceAttention | None = None,
    ) -> tuple[Float[Tensor, "b l hidden"], Float[Tensor, "b n hidden"]]:
        shift, scale, gate, ff_shift, ff_scale, ff_gate = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = text_modulation.chunk(6, dim=-1)
        text_out, image_out = self.attn(
            modulated(text, self.norm1_context, t_shift, t_scale),
            modulated(image, self.norm1, shift, scale),
            angles,
            references,
        )
        image = gated(image, gate, image_out)
        hidden = self.ff.hidden(modulated(image, self.norm2, ff_shift, ff_scale))
        # The image's last product is the last of the block: recompute stops before it. The adapter's part is computed
        # here so that dropout draws in this order.
        image_ff = deferred(self.ff.linear_out, hidden)
        text = gated(text, t_gate, text_out)
        text_ff = self.ff_context(modulated(text, self.norm2_context, t_ff_shift, t_ff_scale))
        text = clipped(gated(text, t_ff_gate, text_ff))
        return text, gated(image, ff_gate, image_ff())


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side between one fused input and one fused output matrix.

    Rows of `to_qkv_mlp_proj`: query, key, value (hidden each), gate, value of the feed-forward (inner each).
    Columns of `to_out`: attention (hidden), feed-forward (inner).
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.widths = [3 * spec.hidden, 2 * spec.mlp_hidden]
        self.to_qkv_mlp_proj = nn.Linear(spec.hidden, sum(self.widths), bias=False)
        self.to_out = nn.Linear(spec.hidden + spec.mlp_hidden, spec.hidden, bias=False)
        self.norm_q = HeadNorm(self.head_dim, eps=spec.eps)
        self.norm_k = HeadNorm(self.head_dim, eps=spec.eps)

    def forward(self, x: Tensor, angles: Rotary, references: ReferenceAttention | None = None) -> Tensor:
        qkv, mlp = self.to_qkv_mlp_proj(x).split(self.widths, dim=-1)
        query, key, value = rearrange(qkv, "b n (part heads d) -> part b n heads d", part=3, d=self.head_dim)
        attended = attend(self.norm_q(query), self.norm_k(key), value, angles, references)
        gate, inner = mlp.chunk(2, dim=-1)
        out: Tensor = self.to_out(torch.cat([attended, F.silu(gate) * inner], dim=-1))
        return out


class SingleBlock(nn.Module):
    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)
        self.attn = ParallelAttention(spec)

    def forward(
        self,
        x: Float[Tensor, "b n hidden"],
        modulation: Float[Tensor, "b 1 3*hidden"],
        angles: Rotary,
        references: ReferenceAttention | None = None,
    ) -> Float[Tensor, "b n hidden"]:
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return clipped(gated(x, gate, self.attn(modulated(x, self.norm, shift, scale), angles, references)))


class OutputNorm(nn.Module):
    """Final adaptive norm. The rows of `linear` are scale, then shift (BFL's files have them the other way)."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden, 2 * spec.hidden, bias=False)
        self.norm = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(vector))[:, None].chunk(2, dim=-1)
        return modulated(x, self.norm, shift, scale)


class Flux2Transformer(nn.Module):
    """Velocity of a picture's tokens, given text tokens, reference tokens, sigma and guidance."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.computes_in: torch.dtype | None = None
        """Where given, the dtype as which shards of another one are gathered."""
        self.time_guidance_embed = TimeGuidanceEmbedding(spec)
        self.double_stream_modulation_img = Modulation(spec.hidden, sets=2)
        self.double_stream_modulation_txt = Modulation(spec.hidden, sets=2)
        self.single_stream_modulation = Modulation(spec.hidden, sets=1)
        self.x_embedder = nn.Linear(spec.in_channels, spec.hidden, bias=False)
        self.context_embedder = nn.Linear(spec.context_dim, spec.hidden, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(spec) for _ in range(spec.double_blocks))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(spec) for _ in range(spec.single_blocks))
        self.norm_out = OutputNorm(spec)
        self.proj_out = nn.Linear(spec.hidden, spec.in_channels, bias=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks in the order in which they run: doubles, then singles."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def dtype(self) -> torch.dtype:
        """Of what computes: that of a norm, which no adapter wraps and nothing quantizes."""
        if self.computes_in is not None:
            return self.computes_in
        weight: Tensor = self.single_transformer_blocks[0].get_parameter("attn.norm_q.weight")
        return weight.dtype

    def forward(
        self,
        tokens: Float[Tensor, "b n channels"],
        context: Float[Tensor, "b l context_dim"],
        sigma: Float[Tensor, " b"],
        guidance: Float[Tensor, " b"] | None,
        position_ids: Int[Tensor, "*b n 4"],
        context_ids: Int[Tensor, "*b l 4"],
        choices: Sequence[Choice] = (),
        angles: Rotary | None = None,
        references: ReferenceAttention | None = None,
    ) -> Float[Tensor, "b m channels"]:
        """One pass in the weights' own type. All image tokens share sigma.

        Args:
            tokens: the picture's, and behind them those of its references, which have no velocity.
            sigma: 0 is data, 1 is noise.
            guidance: the scale as a user says it (1.0, 4.0); None for models without the embedder.
            position_ids: (t, h, w, l) of each image token, one table for the batch or one a sample.
            context_ids: the same for each text token.
            choices: the image tokens that stretches of blocks process; the others go around the stretch.
            angles: the rotary tables of text and image tokens, where the caller keeps them; else made from the ids.
            references: how many of `tokens` are those of references, and what they see; None where there are none.
        """
        dtype = tokens.dtype
        vector = self.time_guidance_embed(sigma.to(dtype), None if guidance is None else guidance.to(dtype))
        image_modulation = self.double_stream_modulation_img(vector)
        text_modulation = self.double_stream_modulation_txt(vector)
        single_modulation = self.single_stream_modulation(vector)
        if angles is None:
            angles = rotary(torch.cat([context_ids, position_ids], dim=-2), self.spec.axes, self.spec.theta)

        length, end = context.shape[1], context.shape[1] + tokens.shape[1] - (references.length if references else 0)
        seen = None if references is None or references.is_full else references
        routing = Routing(choices, angles, length)
        image, text = self.x_embedder(tokens), self.context_embedder(context)
        for index, block in enumerate(self.transformer_blocks):
            image = routing.enter(index, image)
            text, image = block(text, image, text_modulation, image_modulation, routing.angles, seen)
            image = routing.leave(index, image)
        joint = torch.cat([text, image], dim=1)
        for index, block in enumerate(self.single_transformer_blocks, start=len(self.transformer_blocks)):
            joint = routing.enter(index, joint, length)
            joint = block(joint, single_modulation, routing.angles, seen)
            joint = routing.leave(index, joint, length)
        out: Tensor = self.proj_out(self.norm_out(joint[:, length:end], vector))
        return out


@lru_cache(maxsize=16)
def empty_transformer(spec: TransformerSpec) -> Flux2Transformer:
    """The module without memory. Read only: it is shared."""
    with torch.device("meta"):
        return Flux2Transformer(spec)
