"""FLOP of a transformer pass: matrix products and attention, computed from shapes only.

A multiply-add counts as two floating-point operations (FLOP). Model FLOP count the forward and backward pass once; MFU
(Chowdhery et al., PaLM, 2022, appendix B) is based on them. Hardware FLOP include recomputation; HFU (Korthikanti et
al., 2022) is based on those. Neither counts elementwise operations, norms or softmax. docs/performance.md has the
formula and an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.activations import TransformerPass
from simpletuner.flux2.lora import LoraLinear
from simpletuner.flux2.transformer import Flux2Transformer, empty_transformer


@dataclass(frozen=True)
class PassFlop:
    """FLOP of one or more passes."""

    model: int
    """Of the forward and backward pass, without recomputation."""
    hardware: int
    """`model`, plus recomputation of checkpointed blocks and, in the backward pass, of attention scores."""

    def __add__(self, other: "PassFlop") -> "PassFlop":
        return PassFlop(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, count: int) -> "PassFlop":
        return PassFlop(self.model * count, self.hardware * count)


@dataclass(frozen=True)
class AdapterSize:
    """Shapes of a Linear's adapter: `columns` to `rank`, then `rank` to `rows`."""

    rank: int
    columns: int
    rows: int


AdapterSizes = Mapping[str, AdapterSize]
"""Adapter sizes by the Linear's name in the transformer."""


def attached_adapters(transformer: Flux2Transformer) -> dict[str, AdapterSize]:
    """Sizes of the adapters that are attached to `transformer`."""
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLinear)}
    return {
        name: AdapterSize(layer.rank, layer.column_stop - layer.column_start, layer.row_stop - layer.row_start)
        for name, layer in layers.items()
    }


def planned_adapters(pass_: TransformerPass) -> dict[str, AdapterSize]:
    """Sizes of the adapters that `pass_` describes."""
    sizes = {}
    for index, adapted in enumerate(pass_.adapted):
        for name, adapted_range in adapted:
            columns, rows = (stop - start for start, stop in (adapted_range.columns, adapted_range.rows))
            sizes[f"{_block_name(pass_, index)}.{name}"] = AdapterSize(pass_.rank, columns, rows)
    return sizes


def training_flop(
    pass_: TransformerPass, adapters: AdapterSizes | None = None, *, is_compiled: bool = False
) -> PassFlop:
    """FLOP of one forward and backward pass.

    Model FLOP equal the count of `torch.utils.flop_counter` for a pass without recomputation and with plain attention,
    whose backward pass is four products. Hardware FLOP add the forward products of recomputed blocks, and one product
    for each attention: fused kernels do not store the scores and recompute them.

    Args:
        adapters: sizes to use instead of the adapters in `pass_`, such as those of attached adapters.
        is_compiled: whether blocks are compiled. A compiled graph saves its tensors after all of its products, so
            recompute runs all of them; without compilation it skips a block's last product where it can.
    """
    count = _counted(pass_, adapters, is_compiled=is_compiled)
    return PassFlop(count.forward + count.backward, count.forward + count.backward + count.recomputed) * pass_.batch


def sampling_flop(pass_: TransformerPass, adapters: AdapterSizes | None = None) -> PassFlop:
    """FLOP of one pass without gradients. Takes the arguments of `training_flop`; nothing is recomputed."""
    count = _counted(pass_, adapters)
    return PassFlop(count.forward, count.forward) * pass_.batch


class _Count:
    """Add up the matrix products of one sample in execution order.

    `tracked` says whether an input requires a gradient; each method returns whether its output does.
    """

    def __init__(self, spec: TransformerSpec, adapters: AdapterSizes, is_full: bool) -> None:
        self._hidden = spec.hidden
        self._sizes = _weight_sizes(spec)
        self._adapters = adapters
        self._is_full = is_full
        self.forward = 0
        self.backward = 0
        self.recomputed = 0
        """FLOP that run a second time."""
        self._block_start = self._last_save = 0
        """Values of `forward` at the start of the block and at autograd's last saved tensor."""

    def linear(self, name: str, tokens: int, *, tracked: bool) -> bool:
        """Count the Linear `name` and its adapter. The next operation saves their output."""
        needs_gradient = self.base(name, tokens, tracked=tracked) | self.adapter(name, tokens, tracked=tracked)
        return self.save(needs_gradient)

    def base(self, name: str, tokens: int, *, tracked: bool) -> bool:
        """Count a Linear. The gradients of weight and input each cost as much as the forward product."""
        product = 2 * tokens * self._sizes[name]
        self.save(tracked or self._is_full)
        self.forward += product
        self.backward += product * (tracked + self._is_full)
        return tracked or self._is_full

    def adapter(self, name: str, tokens: int, *, tracked: bool) -> bool:
        """Count the adapter of a Linear, if it has one."""
        adapter = self._adapters.get(name)
        if adapter is None:
            return False
        down, up = 2 * tokens * adapter.columns * adapter.rank, 2 * tokens * adapter.rank * adapter.rows
        self.forward += down
        self.save(True)
        self.forward += up
        self.backward += down * (1 + tracked) + 2 * up
        return True

    def attention(self, pairs: int, *, tracked: bool) -> bool:
        """Count the scores of `pairs` query-key pairs, and their product with the values.

        The backward pass counts in full if any input requires a gradient: fused kernels compute all of it.
        """
        product = 2 * pairs * self._hidden
        self.forward += 2 * product
        self.backward += 4 * product * tracked
        self.recomputed += product * tracked
        return self.save(tracked)

    def save(self, tracked: bool) -> bool:
        """Record that autograd saves a tensor here, if `tracked`."""
        if tracked:
            self._last_save = self.forward
        return tracked

    def begin_block(self) -> None:
        """Start counting a block."""
        self._block_start = self._last_save = self.forward

    def recompute_block(self) -> None:
        """Count recomputation of the block that ends here: everything up to autograd's last saved tensor."""
        self.recomputed += self._last_save - self._block_start


@lru_cache(maxsize=16)
def _weight_sizes(spec: TransformerSpec) -> dict[str, int]:
    """Number of elements of each module's weight."""
    return {name.removesuffix(".weight"): weight.numel() for name, weight in empty_transformer(spec).named_parameters()}


def _counted(pass_: TransformerPass, adapters: AdapterSizes | None, *, is_compiled: bool = False) -> _Count:
    """Count the products of one sample in the order of `Flux2Transformer.forward`."""
    spec, text, references = pass_.spec, pass_.text_tokens, pass_.reference_tokens
    count = _Count(spec, planned_adapters(pass_) if adapters is None else adapters, pass_.is_full)
    vector_tracked = False
    for embedder in ("timestep_embedder", "guidance_embedder") if spec.guidance_embeds else ("timestep_embedder",):
        name = f"time_guidance_embed.{embedder}"
        first_tracked = count.linear(f"{name}.linear_1", 1, tracked=False)
        vector_tracked |= count.linear(f"{name}.linear_2", 1, tracked=first_tracked)
    image_gates_tracked = count.linear("double_stream_modulation_img.linear", 1, tracked=vector_tracked)
    text_gates_tracked = count.linear("double_stream_modulation_txt.linear", 1, tracked=vector_tracked)
    single_gates_tracked = count.linear("single_stream_modulation.linear", 1, tracked=vector_tracked)
    image_tracked = count.linear("x_embedder", pass_.image_tokens + references, tracked=False)
    text_tracked = count.linear("context_embedder", text, tracked=False)
    is_clipped = pass_.is_autocast or pass_.dtype == torch.float16
    for index in range(spec.blocks):
        name = _block_name(pass_, index)
        route = next((route for route in pass_.routes if route.start <= index <= route.end), None)
        image = pass_.image_tokens if route is None else route.keeps(pass_.image_tokens)
        total = text + image + references
        # With the view "own", reference tokens attend only to reference tokens.
        pairs = total**2 if pass_.reference_attention == "full" else (text + image) * total + references**2
        count.begin_block()
        if index < spec.double_blocks:
            streams = (
                _Stream(text, text_tracked, text_gates_tracked),
                _Stream(image + references, image_tracked, image_gates_tracked),
            )
            text_tracked, image_tracked = _double(count, name, *streams, pairs, is_clipped=is_clipped)
        else:
            stream = _Stream(total, text_tracked or image_tracked, single_gates_tracked)
            text_tracked = image_tracked = _single(count, name, stream, pairs, is_clipped=is_clipped)
        if pass_.recomputed and pass_.recomputed[index]:
            count.save(is_compiled)
            count.recompute_block()
    gates_tracked = count.linear("norm_out.linear", 1, tracked=vector_tracked)
    # Here text and image tokens are one tensor, of which the image tokens are a slice.
    tracked = text_tracked or image_tracked or gates_tracked
    count.linear("proj_out", pass_.image_tokens, tracked=tracked)
    return count


@dataclass(frozen=True)
class _Stream:
    """A block's input: its token count, and whether it and the block's gates require gradients."""

    tokens: int
    is_tracked: bool
    has_tracked_gates: bool

    @property
    def modulated_is_tracked(self) -> bool:
        return self.is_tracked or self.has_tracked_gates


def _double(
    count: _Count, name: str, text: _Stream, image: _Stream, pairs: int, *, is_clipped: bool
) -> tuple[bool, bool]:
    """Count a double block with `pairs` query-key pairs. Returns whether text and image output require gradients."""
    text_tracked, image_tracked = text.modulated_is_tracked, image.modulated_is_tracked
    projections = [(part, text.tokens, text_tracked) for part in ("add_q_proj", "add_k_proj", "add_v_proj")]
    projections += [(part, image.tokens, image_tracked) for part in ("to_q", "to_k", "to_v")]
    inputs = [count.linear(f"{name}.attn.{part}", tokens, tracked=tracked) for part, tokens, tracked in projections]
    attended_tracked = count.attention(pairs, tracked=any(inputs))
    text_tracked |= count.linear(f"{name}.attn.to_add_out", text.tokens, tracked=attended_tracked)
    image_tracked |= count.linear(f"{name}.attn.to_out.0", image.tokens, tracked=attended_tracked)

    # The base product of the image's last Linear runs at the end of the block, its adapter earlier.
    hidden_tracked = count.linear(f"{name}.ff.linear_in", image.tokens, tracked=image_tracked)
    image_adapted = count.adapter(f"{name}.ff.linear_out", image.tokens, tracked=hidden_tracked)
    text_hidden_tracked = count.linear(f"{name}.ff_context.linear_in", text.tokens, tracked=text_tracked)
    text_out = f"{name}.ff_context.linear_out"
    text_tracked |= count.base(text_out, text.tokens, tracked=text_hidden_tracked)
    text_tracked |= count.adapter(text_out, text.tokens, tracked=text_hidden_tracked)
    count.save(text.has_tracked_gates or (is_clipped and text_tracked))
    image_tracked |= image_adapted | count.base(f"{name}.ff.linear_out", image.tokens, tracked=hidden_tracked)
    count.save(image.has_tracked_gates)
    return text_tracked, image_tracked


def _single(count: _Count, name: str, stream: _Stream, pairs: int, *, is_clipped: bool) -> bool:
    """Count a single block with `pairs` query-key pairs. Returns whether its output requires a gradient."""
    tracked = stream.modulated_is_tracked
    fused_tracked = count.linear(f"{name}.attn.to_qkv_mlp_proj", stream.tokens, tracked=tracked)
    count.attention(pairs, tracked=fused_tracked)
    tracked |= count.adapter(f"{name}.attn.to_out", stream.tokens, tracked=fused_tracked)
    tracked |= count.base(f"{name}.attn.to_out", stream.tokens, tracked=fused_tracked)
    count.save(stream.has_tracked_gates or (is_clipped and tracked))
    return tracked


def _block_name(pass_: TransformerPass, index: int) -> str:
    """Name of the block at `index` in execution order."""
    doubles = pass_.spec.double_blocks
    return f"transformer_blocks.{index}" if index < doubles else f"single_transformer_blocks.{index - doubles}"
