"""Weights from files into modules: built empty, filled tensor by tensor, each cast and moved as it lands."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from simpletuner.base.console import say
from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import sha256_json
from simpletuner.base.quiet import quiet_import
from simpletuner.config.flavours import FLAVOURS, TextContextSpec
from simpletuner.config.precisions import NO_CHANGE
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.kept import QuantizedBaseCache
from simpletuner.flux2.names import (
    Renamed,
    TensorRenaming,
    text_encoder_name,
    text_encoder_renaming,
    transformer_renaming,
)
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.stored import BLOCKS, StoredRows, StoredWeight, native_precisions, open_stored, stored_weights
from simpletuner.flux2.text import ResidentTextEncoder, zero_fully_masked_rows
from simpletuner.flux2.text_stream import StreamedTextEncoder
from simpletuner.flux2.tokenizer import correct_pattern
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.vae_names import vae_renaming
from simpletuner.memory import offload
from simpletuner.memory.precision import (
    Layout,
    check_range,
    held,
    make_room,
    packed,
    quantized,
    quantized_from,
    targets,
)
from simpletuner.memory.shard import Sharding, local, own_range, own_rows, shard
from simpletuner.memory.tensors import non_finite_count, open_tensors
from simpletuner.runs.process import stop_if_asked


@dataclass(frozen=True)
class Quantize:
    """Which Linears of a module are held in a precision, and how those that files do not hold in it are quantized as
    they land."""

    precision: str
    """With `NO_CHANGE`, each is held as its file holds it, where one of `PRECISIONS` is that."""
    within: tuple[str, ...]
    """What their names begin with."""
    via: torch.device | str
    """Where it is done."""

    @property
    def is_asked(self) -> bool:
        """Whether plain weights are quantized."""
        return self.precision != NO_CHANGE

    def precisions(
        self, module: nn.Module, stored: Mapping[str, StoredWeight], renaming: TensorRenaming
    ) -> dict[str, str]:
        """In which precision each Linear of `module` is held, by its name; the others are plain.

        Raises:
            ConfigError: `precision` cannot hold one of them.
        """
        if self.is_asked:
            return dict.fromkeys(targets(module, self.within, self.precision), self.precision)
        return native_precisions(stored, renaming, self.within)


Half = Literal["encode", "decode"]
OTHER_HALF: Mapping[Half, tuple[str, ...]] = {
    "encode": ("decoder", "post_quant_conv"),
    "decode": ("encoder", "quant_conv"),
}
"""What an autoencoder does not need that does one thing only."""


def checked_skeleton(source: Source) -> Flux2Transformer:
    """The transformer on the meta device. No weight is read.

    Raises:
        AccessError: by the headers, tensors are missing, unknown or of the wrong shape; they are named.
    """
    with torch.device("meta"):
        transformer = Flux2Transformer(source.spec)
    stored = stored_weights(source.transformer.files)
    renaming = transformer_renaming(stored)
    _check(transformer, stored, {name: renaming(name) for name in stored}, unknown_allowed=False)
    return transformer


@contextlib.contextmanager
def _config_errors_reported(component: str, weights: Weights) -> Iterator[None]:
    """Turn what a library raises below this block about values of a component's config.json into an AccessError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise AccessError.of(
            f"no {component} can be built from the config.json beside {weights.files[0]} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'})",
            "the one that belongs to these weights",
            "It may be damaged or of another program: get the file again.",
        ) from error


def load_transformer(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    precision: str = NO_CHANGE,
    *,
    land_on: Callable[[str], torch.device] | None = None,
    via: torch.device | str | None = None,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = say,
    sharding: Sharding | None = None,
    is_plain: bool = False,
) -> Flux2Transformer:
    """The transformer, frozen, as `dtype` on `device`, the Linears of its blocks in `precision`. BFL's and diffusers'
    names are both understood.

    A quantized file's weights are held as they are where `precision` is `NO_CHANGE` or the file's own; otherwise they
    are decoded first. Tensors are quantized one by one, on `via`, by default `device`: besides the model, one is in
    memory at a time.

    Args:
        is_plain: decode every weight, for training them.
        land_on: the device of the tensor of each name, where they differ; by default all are on `device`.
        cache_dir: where the quantized model is kept, and found by the next one who asks for the same.
        report: called with a sentence on why no kept model is used.
        sharding: where given, the transformer is sharded over all processes, and only shards come into memory. What is
            kept in `cache_dir` is used, and nothing is put there. `device` and `land_on` do not matter.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape; they are named.
        ConfigError: `precision`, or fp16 as `dtype`, cannot hold this model.
        DiskError: no space in `cache_dir`.
    """
    with torch.device("meta"):
        transformer = Flux2Transformer(source.spec)
    quantize = None if is_plain else Quantize(precision, BLOCKS, device if via is None else via)
    base_cache = None
    if precision != NO_CHANGE:
        base_cache = None if cache_dir is None else QuantizedBaseCache.of(cache_dir, source, precision, dtype)
    cache_file = None if base_cache is None else base_cache.verified(report)
    if sharding is not None:
        if base_cache is not None and cache_file is None:
            report(
                f"{cache_dir} holds no {precision} base, and none is put there: each process quantizes its share. A "
                "run without fsdp_enable keeps one there, which sharded runs read too."
            )
        _fill_shards(transformer, stored_weights(source.transformer.files), dtype, sharding, quantize, cache_file)
        return transformer.eval()
    if cache_file is not None:
        # What products read in place is copied: on a CPU their last bits depend on where a tensor begins.
        plain = {name for name, _ in transformer.named_parameters()}
        with torch.device("meta"):
            make_room(transformer, targets(transformer, BLOCKS, precision), precision, quantized_from(dtype))
        with open_tensors(cache_file) as tensors:
            for name in transformer.state_dict():
                target_device = device if land_on is None else land_on(name)
                _assign(transformer, name, _with_dimension(tensors[name]).to(target_device, copy=name in plain))
        return transformer.eval()
    stored = stored_weights(source.transformer.files)
    _fill(transformer, stored, transformer_renaming(stored), dtype, device, quantize=quantize, land_on=land_on)
    if base_cache is not None:
        base_cache.save(transformer.state_dict())
    return transformer.eval()


def load_autoencoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    tiling: bool = False,
    slicing: bool = False,
    is_streamed: bool = False,
    ahead: bool = False,
    half: Half | None = None,
) -> Autoencoder:
    """The autoencoder, frozen, as `dtype` on `device`; its batch-norm statistics stay as they are in the file.

    Args:
        is_streamed: keep its layers in host memory and copy them to the device one by one.
        ahead: prefetch the next of these layers.
        half: load this half alone.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape; they are named.
    """
    with quiet_import():
        from diffusers import AutoencoderKLFlux2  # takes seconds: only where latents are made or shown

    with torch.device("meta"), _config_errors_reported("VAE", source.vae):
        vae = AutoencoderKLFlux2.from_config(source.vae.config)
    stored = stored_weights(source.vae.files, "vae")
    own_renaming = vae_renaming(stored)
    if not any(own_renaming(name) == Renamed(("bn.num_batches_tracked",)) for name in stored):
        vae.bn.num_batches_tracked = None  # missing in BFL's file; only training the VAE would read it
    _check(vae, stored, {name: own_renaming(name) for name in stored}, False)
    left_out = () if half is None else OTHER_HALF[half]
    for name in left_out:
        setattr(vae, name, None)

    def renaming(name: str) -> Renamed | None:
        renamed = own_renaming(name)
        return None if renamed is None or renamed.names[0].partition(".")[0] in left_out else renamed

    landing = "cpu" if is_streamed else device
    _fill(vae, stored, renaming, dtype, landing, kept=("bn.",), unknown_allowed=True)
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    autoencoder = Autoencoder(vae, device)
    if is_streamed:
        offload.install(vae, offload.leaf_groups([vae]), device=torch.device(device), ahead=ahead)
    return autoencoder


def load_text_encoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layers: tuple[int, ...],
    max_length: int,
    fix_regex: bool,
    precision: str = NO_CHANGE,
    via: torch.device | str | None = None,
) -> ResidentTextEncoder:
    """The text encoder, frozen, as `dtype` on `device`: only as many layers as `layers` asks for are loaded. Their
    Linears are in `precision`, quantized as they land, on `via`, by default `device`.

    Raises:
        AccessError: tensors are missing or of the wrong shape; they are named.
        ConfigError: it has fewer layers, or `max_length` is shorter than the template.
    """
    config = _text_config(source, layers)
    depth = config.num_hidden_layers
    with _config_errors_reported("text encoder", source.text_encoder):
        model = _language_model(config, source.flavour.text)
    # Its frequencies are in no file, and on the meta device they were never computed.
    with torch.device(device), _config_errors_reported("text encoder", source.text_encoder):
        model.rotary_emb = type(model.rotary_emb)(config=config)

    quantize = _quantize_layers(precision, device if via is None else via)
    stored = stored_weights(source.text_encoder.files, "text_encoder")
    _fill(model, stored, text_encoder_renaming(depth), dtype, device, unknown_allowed=True, quantize=quantize)
    return ResidentTextEncoder(
        model.eval(),
        _tokenizer(source, fix_regex),
        text=source.flavour.text,
        layers=layers,
        max_length=max_length,
    )


def stream_text_encoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layers: tuple[int, ...],
    max_length: int,
    fix_regex: bool,
    folder: Path,
    precision: str = NO_CHANGE,
    via: torch.device | str | None = None,
) -> StreamedTextEncoder:
    """The same text encoder, the same bits, with one layer at a time as `dtype` on `device`. Nothing is read yet but
    the headers. States that do not stay in memory are put into a file in `folder` meanwhile.

    Raises:
        AccessError: tensors are missing or of the wrong shape; they are named.
        ConfigError: it has fewer layers, or `max_length` is shorter than the template.
    """
    config = _text_config(source, layers)
    depth = config.num_hidden_layers
    stored = stored_weights(source.text_encoder.files, "text_encoder")
    known = {name: text_encoder_name(name, depth) for name in stored}
    renamed = {name: None if new is None else Renamed((new,)) for name, new in known.items()}
    with _config_errors_reported("text encoder", source.text_encoder):
        whole = _language_model(config, source.flavour.text)
    _check(whole, stored, renamed, unknown_allowed=True)
    (embedding,) = (name for name, new in known.items() if new == "embed_tokens.weight")
    with torch.device(device), _config_errors_reported("text encoder", source.text_encoder):
        rotary = type(whole.rotary_emb)(config=config)
    quantize = _quantize_layers(precision, device if via is None else via)
    single = _cut(copy.deepcopy(config), 1)

    def embed(ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        # The table is larger than a layer, and captions use few of its rows.
        with open_stored(stored) as weights:
            rows = weights.gathered(embedding, ids, dtype)
        _check_finite(rows, embedding, stored[embedding].file)
        return rows

    def read_layer(index: int) -> nn.Module:
        model = _language_model(single, source.flavour.text)
        model.embed_tokens = nn.Identity()
        model.rotary_emb = rotary
        own, place = f"layers.{index}.", "layers.0."

        def renaming(name: str) -> Renamed | None:
            new = known[name]
            return Renamed((place + new.removeprefix(own),)) if new is not None and new.startswith(own) else None

        _fill(model, stored, renaming, dtype, device, unknown_allowed=True, quantize=quantize)
        layer: nn.Module = model.eval()
        return layer

    return StreamedTextEncoder(
        embed,
        read_layer,
        _tokenizer(source, fix_regex),
        text=source.flavour.text,
        layers=layers,
        max_length=max_length,
        width=config.hidden_size,
        dtype=dtype,
        device=device,
        folder=folder,
    )


def _quantize_layers(precision: str, via: torch.device | str) -> Quantize:
    return Quantize(precision, ("layers.",), via)


def _text_config(source: Source, layers: tuple[int, ...]) -> Any:
    """transformers' config of the text encoder's language model, cut after the last of `layers`.

    Raises:
        ConfigError: it has fewer layers.
    """
    # Takes seconds to import: only where text is encoded.
    from transformers import Mistral3Config, MistralConfig, Qwen3Config

    written = dict(source.text_encoder.config or {})
    with _config_errors_reported("text encoder", source.text_encoder):
        if written["model_type"] == "mistral3":
            config = Mistral3Config(**written).text_config
        else:
            config = {"mistral": MistralConfig, "qwen3": Qwen3Config}[written["model_type"]](**written)
    if max(layers) > config.num_hidden_layers:
        raise ConfigError.of(
            f"custom_text_encoder_intermediary_layers = {','.join(map(str, layers))}",
            f"at most {config.num_hidden_layers}, the layers of this text encoder",
        )
    return _cut(config, max(layers))


def _cut(config: Any, layers: int) -> Any:
    """`config`, changed to have only its first `layers` layers."""
    config.num_hidden_layers = layers
    if config.model_type == "qwen3":
        config.layer_types = config.layer_types[:layers]
    return config


def _language_model(config: Any, text: TextContextSpec) -> Any:
    """transformers' language model on the meta device, without its final norm; rows that attend to nothing, which only
    padding on the left has, get 0.
    """
    from transformers import AutoModel

    # Not before it makes a model does transformers look at the libraries beside it.
    with torch.device("meta"), quiet_import():
        # Named in the cache's key: another implementation has other last digits.
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    model.norm = nn.Identity()
    if text.padding_side == "left":
        zero_fully_masked_rows(model)
    return model


def _tokenizer(source: Source, fix_regex: bool) -> Any:
    """The tokenizer's own files, whatever class they name: the processor of that class would need torchvision."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        source.tokenizer,
        local_files_only=True,
        fix_mistral_regex=False,
        padding_side=source.flavour.text.padding_side,
    )
    if fix_regex and source.flavour.text.kind == "mistral3":
        correct_pattern(tokenizer.backend_tokenizer)
    return tokenizer


def autoencoder_id(source: Source, dtype: torch.dtype, *, tiling: bool, slicing: bool) -> str:
    """Names everything that decides a cached latent, without loading the autoencoder."""
    return sha256_json(["latents 2", source.encoder_fingerprint(dtype), str(dtype), tiling, slicing])


def earlier_autoencoder_id(source: Source, dtype: torch.dtype, *, tiling: bool, slicing: bool, whole: bool) -> str:
    """What earlier releases named a cached latent by: the decoder too, and the bytes of the files, `whole` as
    `Source.fingerprint` has it."""
    return sha256_json(["latents 1", source.fingerprint("vae", whole=whole), str(dtype), tiling, slicing])


def text_encoder_id(
    source: Source,
    dtype: torch.dtype,
    *,
    layers: tuple[int, ...],
    max_length: int,
    fix_regex: bool,
    precision: str = NO_CHANGE,
    whole: bool = False,
) -> str:
    """Names everything that decides a cached context, without loading the text encoder; `whole` as
    `Source.fingerprint` has it."""
    weights = [source.fingerprint("text_encoder", whole=whole), source.fingerprint("tokenizer")]
    quantized_in = [] if precision == NO_CHANGE else [precision]
    own, usual = source.flavour.text, FLAVOURS["dev"].text
    # Named only where they are not dev's: caches are older than the choice.
    kind = [own.kind] if own.kind != usual.kind else []
    template = [own.system_message] if own.system_message != usual.system_message else []
    padding = [own.padding_side] if own.padding_side != usual.padding_side else []
    return sha256_json(
        [
            "contexts 1, sdpa",
            *weights,
            str(dtype),
            list(layers),
            max_length,
            fix_regex,
            *quantized_in,
            *kind,
            *template,
            *padding,
        ]
    )


def _fill(
    module: nn.Module,
    stored: Mapping[str, StoredWeight],
    renaming: TensorRenaming,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    kept: tuple[str, ...] = (),
    unknown_allowed: bool = False,
    quantize: Quantize | None = None,
    land_on: Callable[[str], torch.device] | None = None,
) -> None:
    """Give every parameter and buffer of `module`, built on the meta device, its tensor from `stored`.

    Tensors whose names start with one of `kept` are moved but not cast. Headers alone decide whether everything fits,
    before any weight is read.

    Where tensors are quantized, each is let go before the next one is read. Files are not mapped then: a tensor is read
    once, and memory holds no more of it than that.
    """
    renamed = {name: renaming(name) for name in stored}
    _check(module, stored, renamed, unknown_allowed)
    precisions = {} if quantize is None else quantize.precisions(module, stored, renaming)
    is_mapped = quantize is None or not quantize.is_asked

    def land(target: str, shape: tuple[int, ...], rows: StoredRows) -> None:
        place = device if land_on is None else land_on(target)
        owner = target.removesuffix(".weight")
        precision = precisions.get(owner)
        if precision is None:
            landed = _cast(rows, None if target.startswith(kept) else dtype, target).reshape(shape).to(place)
            _check_finite(landed, target, rows.weight.file)
            _assign(module, target, landed)
            return
        assert quantize is not None
        linear = module.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        if rows.weight.precision == precision:
            tensors = rows.native_tensors()
            _check_held(tensors, target, rows.weight.file)
            module.set_submodule(owner, held(linear, precision, tensors, quantized_from(dtype), place))
        else:
            cast = _cast(rows, quantized_from(dtype), target, limit=dtype)
            linear.weight = nn.Parameter(cast.to(quantize.via), requires_grad=False)
            _check_finite(linear.weight, target, rows.weight.file)
            module.set_submodule(owner, quantized(linear, precision, place))

    with open_stored(stored, is_mapped=is_mapped) as weights:
        for name, new in renamed.items():
            if new is not None:
                stop_if_asked()
                shapes = new.shapes(stored[name].shape)
                for target, shape, rows in zip(new.names, shapes, weights.parts(name, new.cut), strict=True):
                    land(target, shape, rows)


@torch.no_grad()
def _fill_shards(
    transformer: Flux2Transformer,
    stored: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    sharding: Sharding,
    quantize: Quantize | None,
    quantized_file: Path | None,
) -> None:
    """Shard `transformer`, built on the meta device, and give this process its rows of every tensor.

    Files are mapped, so that other rows are not read, and what several processes read lies in memory once. One tensor
    at a time is in memory beside the shards: its rows, and all of it where the precision cannot quantize rows alone.

    Args:
        quantized_file: holds the tensors as `quantize` makes them; `stored` weights are not read then.
    """
    renaming = transformer_renaming(stored)
    renamed = {name: renaming(name) for name in stored}
    _check(transformer, stored, renamed, unknown_allowed=False)
    precisions = {} if quantize is None else quantize.precisions(transformer, stored, renaming)
    layouts: dict[str, Layout] = {}
    transformer.to(dtype)
    for owner, precision in precisions.items():
        linear = transformer.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        layouts[owner] = Layout(precision, (linear.out_features, linear.in_features))
        with torch.device("meta"):
            make_room(transformer, {owner: linear}, precision, quantized_from(dtype))
    transformer.requires_grad_(False)
    shard(transformer, transformer.blocks, sharding)
    transformer.to_empty(device=sharding.resting)
    shards = {name: local(parameter) for name, parameter in transformer.named_parameters()}

    def land(target: str, whole: StoredRows) -> None:
        owner, file = target.removesuffix(".weight"), whole.weight.file
        own = whole[own_range(whole.shape)]
        layout = layouts.get(owner)
        if layout is None:
            _check_finite(shards[target].copy_(_cast(own, None, target, limit=dtype)), target, file)
            return
        assert quantize is not None
        if whole.weight.precision == layout.precision:
            tensors = own.native_tensors()
            _check_held(tensors, target, file)
            for name, tensor in tensors.items():
                shards[f"{owner}.{name}"].copy_(tensor)
            return
        rows = own if layout.is_by_rows else whole
        if not rows.shape[0]:
            return
        cast = _cast(rows, quantized_from(dtype), target, limit=dtype).to(quantize.via)
        _check_finite(cast, target, file)
        for name, made in packed(cast, layout.precision).items():
            shards[f"{owner}.{name}"].copy_(made if layout.is_by_rows else own_rows(made))

    if quantized_file is not None:
        with open_tensors(quantized_file) as tensors:
            for name, held_rows in shards.items():
                held_rows.copy_(own_rows(_with_dimension(tensors[name])))
        return
    with open_stored(stored) as weights:
        for name, new in renamed.items():
            if new is not None:
                stop_if_asked()
                for target, whole in zip(new.names, weights.parts(name, new.cut), strict=True):
                    land(target, whole)


def _cast(rows: StoredRows, dtype: torch.dtype | None, name: str, *, limit: torch.dtype | None = None) -> Tensor:
    """`rows` as `dtype`; None leaves a plain weight's own. Each value is within the range of `limit`, by default
    `dtype`.
    """
    limit = dtype if limit is None else limit
    if not rows.weight.is_plain:
        return rows.values(dtype or limit)
    values = rows.values()
    if limit is not None:
        check_range(values, limit, name)
    return values if dtype is None else values.to(dtype)


def _with_dimension(tensor: Tensor) -> Tensor:
    """`tensor`, with one dimension if it has none: earlier releases kept a scalar of nf4 so."""
    return tensor if tensor.dim() else tensor.reshape(1)


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise an AccessError if `tensor`, loaded from `file`, holds a number that is NaN or infinite."""
    count = non_finite_count(tensor)
    if count:
        raise _not_finite(file, count, tensor, name)


def _not_finite(file: Path, count: int, tensor: Tensor, name: str) -> AccessError:
    return AccessError.of(
        f"{file}: {count:,} of {tensor.numel():,} numbers of {name} are NaN or infinite as {tensor.dtype}",
        "finite weights",
        "The file is damaged or was saved from a run that diverged: get it again.",
    )


def _check_held(tensors: Mapping[str, Tensor], name: str, file: Path) -> None:
    """`_check_finite` for a weight in 8 bits, with its scales."""
    _check_finite(tensors["scale"], f"the scales of {name}", file)
    data = tensors["data"]
    if data.dtype == torch.float8_e4m3fn:
        count = int(((data.view(torch.uint8) & 0x7F) == 0x7F).sum())  # its only numbers that are none
        if count:
            raise _not_finite(file, count, data, name)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    is_parameter = leaf in dict(place.named_parameters(recurse=False))
    setattr(place, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _check(
    module: nn.Module,
    stored: Mapping[str, StoredWeight],
    renamed: Mapping[str, Renamed | None],
    unknown_allowed: bool,
) -> None:
    """Raise AccessError unless the renamed tensors are exactly those of `module`, in its shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    unknown, wrong = [], []
    for name, new in renamed.items():
        if new is None:
            if not unknown_allowed:
                unknown.append(name)
            continue
        for target, shape in zip(new.names, new.shapes(stored[name].shape), strict=True):
            found[target] = shape
            if target not in expected:
                unknown.append(name)
            elif shape != expected[target]:
                wrong.append(f"{target} {list(shape)}, not {list(expected[target])}")
            elif not stored[name].is_floating and not target.endswith("num_batches_tracked"):
                wrong.append(f"{target} as {stored[name].data.dtype}, not in floating point")
    missing = [name for name in expected if name not in found]
    where = ", ".join(sorted({weight.file.name for weight in stored.values()}))
    AccessError.raise_if(
        Problem(f"{where}: {what} ({len(names)}): {_some(names)}", remedy="Is this the right model, and whole?")
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape or type", wrong))
        if names
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
