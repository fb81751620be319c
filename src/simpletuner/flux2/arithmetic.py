"""How much a pass through the transformer computes: its matrix products and its attention, from shapes alone.

Counted in floating point operations (FLOP), a multiply-add being two. Two numbers are in use. Model FLOP is what the
forward and the backward pass need, once: MFU (Chowdhery et al., PaLM, 2022, appendix B) divides it by time. Hardware
FLOP also has what is computed a second time: HFU (Korthikanti et al., 2022) divides that. Elementwise work, norms and
softmax are in neither. docs/performance.md has the formula and an example.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.conditioning import ReferenceView
from simpletuner.flux2.activations import Pass
from simpletuner.flux2.lora import LoraLinear
from simpletuner.flux2.transformer import Flux2Transformer


@dataclass(frozen=True)
class PassFlop:
    """FLOP of one or more passes."""

    model: int
    """Forward and backward once, recompute not counted."""
    hardware: int
    """With what is computed again: recomputed blocks, and attention's scores in the backward pass."""

    def __add__(self, other: "PassFlop") -> "PassFlop":
        return PassFlop(self.model + other.model, self.hardware + other.hardware)

    def __mul__(self, count: int) -> "PassFlop":
        return PassFlop(self.model * count, self.hardware * count)


@dataclass(frozen=True)
class AdapterSize:
    """A low-rank pair beside a Linear: `columns` to `rank`, `rank` to `rows`."""

    rank: int
    columns: int
    rows: int


AdapterSizes = Mapping[str, AdapterSize]
"""By the Linear's name in the transformer."""


def attached_adapters(transformer: Flux2Transformer) -> dict[str, AdapterSize]:
    """The adapters that `transformer` wears."""
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, LoraLinear)}
    return {
        name: AdapterSize(layer.rank, layer.column_stop - layer.column_start, layer.row_stop - layer.row_start)
        for name, layer in layers.items()
    }


def planned_adapters(passing: Pass) -> dict[str, AdapterSize]:
    """The adapters that `passing` says the blocks wear."""
    sizes = {}
    for index, adapted in enumerate(passing.adapted):
        for name, place in adapted:
            columns, rows = (stop - start for start, stop in (place.columns, place.rows))
            sizes[f"{_block_name(passing, index)}.{name}"] = AdapterSize(passing.rank, columns, rows)
    return sizes


def training_flop(passing: Pass, adapters: AdapterSizes | None = None, *, is_compiled: bool = False) -> PassFlop:
    """FLOP of one forward and backward pass.

    Model FLOP is what `torch.utils.flop_counter` counts of a pass that recomputes nothing and has plain attention,
    whose backward pass is four products. Hardware FLOP adds the forward products of recomputed blocks, and one product
    for each attention: fused kernels do not keep its scores and make them again.

    Args:
        adapters: in place of those of `passing`, such as the ones that are attached.
        is_compiled: whether blocks are compiled. A compiled graph saves its tensors after all of its products, so
            recompute makes each of them again; uncompiled, it stops before a block's last one where it can.
    """
    count = _Count(planned_adapters(passing) if adapters is None else adapters, passing.is_full)
    _walk(count, passing, is_compiled=is_compiled)
    return PassFlop(count.forward + count.backward, count.forward + count.backward + count.again) * passing.batch


def sampling_flop(passing: Pass, adapters: AdapterSizes | None = None) -> PassFlop:
    """FLOP of one pass without gradients, which recomputes nothing. Arguments as above."""
    count = _Count(planned_adapters(passing) if adapters is None else adapters, passing.is_full)
    _walk(count, passing)
    return PassFlop(count.forward, count.forward) * passing.batch


class _Count:
    """Adds up the products of one sample in the order in which they run. Each method returns whether its result wants
    a gradient, given whether its input does.
    """

    def __init__(self, adapters: AdapterSizes, is_full: bool) -> None:
        self._adapters = adapters
        self._is_full = is_full
        self.forward = 0
        self.backward = 0
        self.again = 0
        """What is computed a second time."""
        self._block_start = self._last_save = 0
        """Of `forward`, at the start of the block and where autograd last saved a tensor."""

    def linear(self, name: str, tokens: int, columns: int, rows: int, *, tracked: bool) -> bool:
        """A Linear and its adapter, whose result is the input of something that saves it."""
        wants = self.base(tokens, columns, rows, tracked=tracked) | self.adapter(name, tokens, tracked=tracked)
        return self.save(wants)

    def base(self, tokens: int, columns: int, rows: int, *, tracked: bool) -> bool:
        """A Linear. Its weight's gradient and its input's cost as much as the product itself."""
        product = 2 * tokens * columns * rows
        self.save(tracked or self._is_full)
        self.forward += product
        self.backward += product * (tracked + self._is_full)
        return tracked or self._is_full

    def adapter(self, name: str, tokens: int, *, tracked: bool) -> bool:
        """The adapter of a Linear, if it has one."""
        adapter = self._adapters.get(name)
        if adapter is None:
            return False
        down, up = 2 * tokens * adapter.columns * adapter.rank, 2 * tokens * adapter.rank * adapter.rows
        self.forward += down
        self.save(True)
        self.forward += up
        self.backward += down * (1 + tracked) + 2 * up
        return True

    def attention(self, pairs: int, hidden: int, *, tracked: bool) -> bool:
        """Scores of `pairs` of a query and a key, and their product with the values. The backward pass counts whole
        where any input wants a gradient, as fused kernels compute it.
        """
        product = 2 * pairs * hidden
        self.forward += 2 * product
        self.backward += 4 * product * tracked
        self.again += product * tracked
        return self.save(tracked)

    def save(self, tracked: bool) -> bool:
        """Autograd saves a tensor here, if `tracked`."""
        if tracked:
            self._last_save = self.forward
        return tracked

    def begin_block(self) -> None:
        self._block_start = self._last_save = self.forward

    def recompute_block(self) -> None:
        """Count what the backward pass computes again of the block that ends here: all up to the last save."""
        self.again += self._last_save - self._block_start


def _walk(count: _Count, passing: Pass, *, is_compiled: bool = False) -> None:
    """Count one sample's way through the transformer, as `Flux2Transformer.forward` goes."""
    spec, hidden, text = passing.spec, passing.spec.hidden, passing.text
    vector = False
    for embedder in ("timestep_embedder", "guidance_embedder") if spec.guidance_embeds else ("timestep_embedder",):
        name = f"time_guidance_embed.{embedder}"
        widened = count.linear(f"{name}.linear_1", 1, spec.timestep_channels, hidden, tracked=False)
        vector |= count.linear(f"{name}.linear_2", 1, hidden, hidden, tracked=widened)
    image_gates = count.linear("double_stream_modulation_img.linear", 1, hidden, 6 * hidden, tracked=vector)
    text_gates = count.linear("double_stream_modulation_txt.linear", 1, hidden, 6 * hidden, tracked=vector)
    single_gates = count.linear("single_stream_modulation.linear", 1, hidden, 3 * hidden, tracked=vector)
    references = passing.references
    image_tracked = count.linear("x_embedder", passing.image + references, spec.in_channels, hidden, tracked=False)
    text_tracked = count.linear("context_embedder", text, spec.context_dim, hidden, tracked=False)
    is_clipped = passing.is_autocast or passing.dtype == torch.float16
    for index in range(spec.blocks):
        name = _block_name(passing, index)
        route = next((route for route in passing.routes if route.start <= index <= route.end), None)
        image = passing.image if route is None else route.keeps(passing.image)
        pairs = attended_pairs(text + image, references, passing.reference_attention)
        count.begin_block()
        if index < spec.double_blocks:
            streams = _Stream(text, text_tracked, text_gates), _Stream(image + references, image_tracked, image_gates)
            text_tracked, image_tracked = _double(count, spec, name, *streams, pairs, is_clipped=is_clipped)
        else:
            stream = _Stream(text + image + references, text_tracked or image_tracked, single_gates)
            text_tracked = image_tracked = _single(count, spec, name, stream, pairs, is_clipped=is_clipped)
        if passing.recomputed and passing.recomputed[index]:
            count.save(is_compiled)
            count.recompute_block()
    gates = count.linear("norm_out.linear", 1, hidden, 2 * hidden, tracked=vector)
    # Text and image are one sequence by now, of which the image is cut out.
    tracked = text_tracked or image_tracked or gates
    count.linear("proj_out", passing.image, hidden, spec.in_channels, tracked=tracked)


def attended_pairs(others: int, references: int, view: ReferenceView) -> int:
    """Pairs of a query and a key of a sample of `others` tokens of text and image beside those of its references."""
    every = others + references
    return every**2 if view == "full" else others * every + references**2


@dataclass(frozen=True)
class _Stream:
    """Tokens that go into a block, and whether they and the block's gates want a gradient."""

    tokens: int
    is_tracked: bool
    has_tracked_gates: bool

    @property
    def modulated_is_tracked(self) -> bool:
        return self.is_tracked or self.has_tracked_gates


def _double(
    count: _Count, spec: TransformerSpec, name: str, text: _Stream, image: _Stream, pairs: int, *, is_clipped: bool
) -> tuple[bool, bool]:
    """Count a double block with `pairs` in its attention. Returns whether its text and its image want a gradient."""
    hidden, inner = spec.hidden, spec.mlp_hidden

    def project(part: str, stream: _Stream, tracked: bool) -> bool:
        return count.linear(f"{name}.attn.{part}", stream.tokens, hidden, hidden, tracked=tracked)

    text_tracked, image_tracked = text.modulated_is_tracked, image.modulated_is_tracked
    inputs = [project(part, text, text_tracked) for part in ("add_q_proj", "add_k_proj", "add_v_proj")]
    inputs += [project(part, image, image_tracked) for part in ("to_q", "to_k", "to_v")]
    attended = count.attention(pairs, hidden, tracked=any(inputs))
    text_tracked |= project("to_add_out", text, attended)
    image_tracked |= project("to_out.0", image, attended)

    # The image's last product is the last of the block, and the adapter's come before it.
    fed = count.linear(f"{name}.ff.linear_in", image.tokens, hidden, 2 * inner, tracked=image_tracked)
    image_adapted = count.adapter(f"{name}.ff.linear_out", image.tokens, tracked=fed)
    text_fed = count.linear(f"{name}.ff_context.linear_in", text.tokens, hidden, 2 * inner, tracked=text_tracked)
    text_tracked |= count.base(text.tokens, inner, hidden, tracked=text_fed)
    text_tracked |= count.adapter(f"{name}.ff_context.linear_out", text.tokens, tracked=text_fed)
    count.save(text.has_tracked_gates or (is_clipped and text_tracked))
    image_tracked |= image_adapted | count.base(image.tokens, inner, hidden, tracked=fed)
    count.save(image.has_tracked_gates)
    return text_tracked, image_tracked


def _single(count: _Count, spec: TransformerSpec, name: str, stream: _Stream, pairs: int, *, is_clipped: bool) -> bool:
    """Count a single block with `pairs` in its attention. Returns whether its result wants a gradient."""
    hidden, inner, tokens = spec.hidden, spec.mlp_hidden, stream.tokens
    tracked, widened = stream.modulated_is_tracked, 3 * hidden + 2 * inner
    fused = count.linear(f"{name}.attn.to_qkv_mlp_proj", tokens, hidden, widened, tracked=tracked)
    count.attention(pairs, hidden, tracked=fused)
    tracked |= count.adapter(f"{name}.attn.to_out", tokens, tracked=fused)
    tracked |= count.base(tokens, hidden + inner, hidden, tracked=fused)
    count.save(stream.has_tracked_gates or (is_clipped and tracked))
    return tracked


def _block_name(passing: Pass, index: int) -> str:
    """Of the block that is `index`-th to run, in the transformer."""
    doubles = passing.spec.double_blocks
    return f"transformer_blocks.{index}" if index < doubles else f"single_transformer_blocks.{index - doubles}"
