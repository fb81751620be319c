"""The FLUX.2 transformer: double-stream blocks, then single-stream blocks. Blocks of a kind share their modulation.

Parameter names and outputs match diffusers' `Flux2Transformer2DModel` (checked to 1e-5 in fp32), so weights and LoRAs
move between the two unchanged. Why this project has its own: docs/decisions/0001-own-transformer.md.
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
from simpletuner.flow.choice import TokenChoice
from simpletuner.flux2.lora import LoraLinear
from simpletuner.flux2.rotary import Rotary, rotary, rotate
from simpletuner.flux2.tread import Routing

_FP16_LIMIT = 65504.0

PLAIN_TOKENS = 256
"""Up to this many tokens, `plain_attention` computes 16-bit attention on a CPU: torch's kernel takes twice as long
(docs/log.md)."""


def sinusoid(value: Float[Tensor, " b"], width: int, max_period: float = 10_000.0) -> Float[Tensor, "b width"]:
    """Sinusoidal embedding of `value`: cosines, then sines, at `width / 2` frequencies from 1 to 1/max_period. fp32."""
    exponents = torch.arange(width // 2, dtype=torch.float32, device=value.device) / (width // 2)
    angles = value.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ReferenceAttention(NamedTuple):
    """Attention mask of sequences whose last tokens are reference tokens."""

    length: int
    """Reference tokens in each sequence, padding included."""
    is_token: Bool[Tensor, "b length"] | None = None
    """False for padding, which no other token attends to. None if no sample is padded."""
    is_isolated: bool = False
    """Whether reference tokens attend only to reference tokens. Text and target tokens attend to all tokens."""

    @property
    def is_full(self) -> bool:
        """Whether every token attends to every other token."""
        return self.is_token is None and not self.is_isolated


def attend(
    query: Float[Tensor, "b n heads d"],
    key: Float[Tensor, "b n heads d"],
    value: Float[Tensor, "b n heads d"],
    angles: Rotary,
    references: ReferenceAttention | None = None,
) -> Float[Tensor, "b n width"]:
    """Attention among all tokens, text padding included, as in BFL's code. `references` masks pairs with reference
    tokens.
    """
    query, key = rotate(query, angles), rotate(key, angles)
    query, key, value = (rearrange(x, "b n heads d -> b heads n d") for x in (query, key, value))
    is_short = query.device.type == "cpu" and query.dtype.itemsize == 2 and query.shape[-2] <= PLAIN_TOKENS
    # Inductor cannot order the strides of the score matrix if its size is a sum of symbols (text + image tokens).
    is_plain = is_short and not torch.compiler.is_compiling()
    attention = plain_attention if is_plain else F.scaled_dot_product_attention
    if references is None:
        return rearrange(attention(query, key, value), "b heads n d -> b n (heads d)")

    is_token, start = references.is_token, query.shape[-2] - references.length
    key_mask = None if is_token is None else rearrange(F.pad(is_token, (start, 0), value=True), "b n -> b 1 1 n")
    if not references.is_isolated:
        return rearrange(attention(query, key, value, key_mask), "b heads n d -> b n (heads d)")
    # In a sample without references, padding attends to itself: a softmax over no keys is NaN.
    reference_mask = (
        None if is_token is None else rearrange(is_token | ~is_token.any(1, keepdim=True), "b n -> b 1 1 n")
    )
    attended = attention(query[:, :, :start], key, value, key_mask)
    attended_references = attention(query[:, :, start:], key[:, :, start:], value[:, :, start:], reference_mask)
    return rearrange(torch.cat([attended, attended_references], dim=2), "b heads n d -> b n (heads d)")


def plain_attention(
    query: Float[Tensor, "b heads n d"],
    key: Float[Tensor, "b heads m d"],
    value: Float[Tensor, "b heads m d"],
    mask: Bool[Tensor, "b 1 1 m"] | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Softmax attention as two matrix products, with all n × m scores in memory. `mask` is False for masked keys.

    Scores are fp32: bf16 scores would cause nine times the error of torch's kernels.
    """
    scores = query.float() @ (key.float() * key.shape[-1] ** -0.5).transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    out: Tensor = scores.softmax(dim=-1).to(value.dtype) @ value
    return out


def modulated(x: Tensor, norm: nn.LayerNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: `(1 + scale) * norm(x) + shift`."""
    out: Tensor = (1 + scale) * norm(x) + shift
    return out


def clipped(x: Tensor) -> Tensor:
    """Clip an fp16 residual stream, which can overflow, to fp16's range. Other dtypes are returned unchanged."""
    return x.clip(-_FP16_LIMIT, _FP16_LIMIT) if x.dtype == torch.float16 else x


class _GatedResidual(torch.autograd.Function):
    """`x + gate * out` for a gate that needs no gradient.

    The gate is an attribute, not a saved tensor: recompute stops at a block's last saved tensor, and the gate would be
    saved after the block's last matrix product.
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
    """`x + gate * out`. If the gate needs a gradient, autograd saves `out` for it."""
    if gate.requires_grad:
        return x + gate * out
    added: Tensor = _GatedResidual.apply(x, gate, out)  # type: ignore[no-untyped-call]
    return added


def deferred(linear: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes `linear(x)`. An adapter of `linear` computes its part immediately."""
    return linear.deferred(x) if isinstance(linear, LoraLinear) else partial(linear, x)


class Embedder(nn.Module):
    """Two Linears without bias, SiLU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, hidden, bias=False)
        self.linear_2 = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeGuidanceEmbedding(nn.Module):
    """Embedding of sigma and, in guidance-distilled models, guidance. This vector alone modulates all blocks."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.channels = spec.timestep_channels
        self.timestep_embedder = Embedder(self.channels, spec.hidden)
        self.guidance_embedder = Embedder(self.channels, spec.hidden) if spec.guidance_embeds else None

    def forward(self, sigma: Float[Tensor, " b"], guidance: Float[Tensor, " b"] | None) -> Float[Tensor, "b hidden"]:
        """Both inputs have the model's dtype and are scaled by 1000 in that dtype, as in BFL's code."""
        out: Tensor = self.timestep_embedder(sinusoid(sigma * 1000, self.channels).to(sigma.dtype))
        if self.guidance_embedder is None:
            return out
        if guidance is None:
            raise ValueError("this transformer has a guidance embedder: guidance must be given")
        embedded: Tensor = self.guidance_embedder(sinusoid(guidance * 1000, self.channels).to(guidance.dtype))
        return out + embedded


class Modulation(nn.Module):
    """Project the time and guidance vector to `sets` × (shift, scale, gate), each `hidden` wide."""

    def __init__(self, hidden: int, sets: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden, 3 * sets * hidden, bias=False)

    def forward(self, vector: Float[Tensor, "b hidden"]) -> Float[Tensor, "b 1 width"]:
        out: Tensor = self.linear(F.silu(vector))
        return out[:, None]


class FeedForward(nn.Module):
    """SwiGLU with one fused input matrix: SiLU of the first half gates the second half."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.linear_in = nn.Linear(hidden, 2 * inner, bias=False)
        self.linear_out = nn.Linear(inner, hidden, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """The input of `linear_out`."""
        gate, value = self.linear_in(x).chunk(2, dim=-1)
        hidden: Tensor = F.silu(gate) * value
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_out(self.hidden(x))
        return out


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head's queries or keys, with the weight cast to the input's dtype.

    Under autocast the two dtypes differ, and torch has no fused kernel for that.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        return F.rms_norm(x, list(self.normalized_shape), weight.to(x.dtype), self.eps)


class JointAttention(nn.Module):
    """Joint attention over text and image tokens, with separate projections for each stream."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        hidden, self.head_dim = spec.hidden, spec.head_dim
        self.to_q = nn.Linear(hidden, hidden, bias=False)
        self.to_k = nn.Linear(hidden, hidden, bias=False)
        self.to_v = nn.Linear(hidden, hidden, bias=False)
        # diffusers has a dropout as the second element, so every weight file names this layer `to_out.0`.
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
    """Double-stream block: joint attention, then a feed-forward for each stream."""

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
        # The image's last matrix product is deferred to the end of the block, since recompute stops before it. Its
        # adapter is computed here, to keep the order of dropout's random draws.
        image_ff = deferred(self.ff.linear_out, hidden)
        text = gated(text, t_gate, text_out)
        text_ff = self.ff_context(modulated(text, self.norm2_context, t_ff_shift, t_ff_scale))
        text = clipped(gated(text, t_ff_gate, text_ff))
        return text, gated(image, ff_gate, image_ff())


class ParallelAttention(nn.Module):
    """Attention and feed-forward in parallel, between one fused input matrix and one fused output matrix.

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
    """Single-stream block: attention and feed-forward over the joint sequence of text and image tokens."""

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
    """Final adaptive norm. The rows of `linear` are scale, then shift; in BFL's files, shift comes first."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.linear = nn.Linear(spec.hidden, 2 * spec.hidden, bias=False)
        self.norm = nn.LayerNorm(spec.hidden, eps=spec.eps, elementwise_affine=False)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(vector))[:, None].chunk(2, dim=-1)
        return modulated(x, self.norm, shift, scale)


class Flux2Transformer(nn.Module):
    """Predict the velocity of an image's tokens from text tokens, reference tokens, sigma and guidance."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.computes_in: torch.dtype | None = None
        """The dtype to which gathered shards are cast for compute; None if they keep the dtype of the weights."""
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
        """All blocks in execution order: double blocks, then single blocks."""
        return [*self.transformer_blocks, *self.single_transformer_blocks]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype. Read from a norm's weight, which is never adapted or quantized."""
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
        choices: Sequence[TokenChoice] = (),
        angles: Rotary | None = None,
        references: ReferenceAttention | None = None,
    ) -> Float[Tensor, "b m channels"]:
        """Velocity of the image tokens, without the reference tokens, in the dtype of `tokens`.

        Args:
            tokens: image tokens, then reference tokens, for which no velocity is returned.
            sigma: noise level of each sample's image tokens: 0 is data, 1 is noise.
            guidance: the scale as users give it (1.0, 4.0); None for models without a guidance embedder.
            position_ids: (t, h, w, l) of each of `tokens`, one table for the batch or one for each sample.
            context_ids: the same for each text token.
            choices: the image tokens that each TREAD route processes; the others skip the route's blocks.
            angles: precomputed rotary tables of text and image tokens; None to compute them from the ids.
            references: the number and attention mask of the reference tokens; None if there are none.
        """
        dtype = tokens.dtype
        vector = self.time_guidance_embed(sigma.to(dtype), None if guidance is None else guidance.to(dtype))
        image_modulation = self.double_stream_modulation_img(vector)
        text_modulation = self.double_stream_modulation_txt(vector)
        single_modulation = self.single_stream_modulation(vector)
        if angles is None:
            angles = rotary(torch.cat([context_ids, position_ids], dim=-2), self.spec.axes, self.spec.theta)

        length, end = context.shape[1], context.shape[1] + tokens.shape[1] - (references.length if references else 0)
        masked_references = None if references is None or references.is_full else references
        routing = Routing(choices, angles, length)
        image, text = self.x_embedder(tokens), self.context_embedder(context)
        for index, block in enumerate(self.transformer_blocks):
            image = routing.enter(index, image)
            text, image = block(text, image, text_modulation, image_modulation, routing.angles, masked_references)
            image = routing.leave(index, image)
        joint = torch.cat([text, image], dim=1)
        for index, block in enumerate(self.single_transformer_blocks, start=len(self.transformer_blocks)):
            joint = routing.enter(index, joint, length)
            joint = block(joint, single_modulation, routing.angles, masked_references)
            joint = routing.leave(index, joint, length)
        out: Tensor = self.proj_out(self.norm_out(joint[:, length:end], vector))
        return out


@lru_cache(maxsize=16)
def empty_transformer(spec: TransformerSpec) -> Flux2Transformer:
    """The transformer on the meta device. Do not modify it: the instance is cached."""
    with torch.device("meta"):
        return Flux2Transformer(spec)
