"""Load weights into modules: build them on the meta device, then cast and move one tensor at a time."""

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
from simpletuner.flux2.names import (
    RenamedTensor,
    TensorRenaming,
    text_encoder_name,
    text_encoder_renaming,
    transformer_renaming,
)
from simpletuner.flux2.quantized_cache import QuantizedBaseCache
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.stored import BLOCKS, StoredRows, StoredWeight, native_precisions, open_stored, stored_weights
from simpletuner.flux2.text import ResidentTextEncoder, zero_fully_masked_rows
from simpletuner.flux2.text_stream import StreamedTextEncoder
from simpletuner.flux2.tokenizer import correct_pattern
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.vae_names import vae_renaming
from simpletuner.memory import offload
from simpletuner.memory.precision import (
    WeightLayout,
    check_range,
    quantizable_linears,
    quantized,
    quantized_from,
    quantized_from_tensors,
    quantized_tensors,
    replace_by_empty,
)
from simpletuner.memory.shard import Sharding, local_range, local_rows, local_shard, shard
from simpletuner.memory.tensors import non_finite_count, open_tensors
from simpletuner.runs.process import stop_if_asked


@dataclass(frozen=True)
class QuantizationPlan:
    """The Linears to hold in a precision, and how to quantize those whose files have another format."""

    precision: str
    """With `NO_CHANGE`, a Linear keeps the format of its file if that is one of `PRECISIONS`."""
    prefixes: tuple[str, ...]
    """Prefixes of the names of these Linears."""
    device: torch.device | str
    """Where weights are quantized."""

    @property
    def quantizes_plain(self) -> bool:
        """Whether weights that are plain in the files are quantized."""
        return self.precision != NO_CHANGE

    def precisions(
        self, module: nn.Module, stored: Mapping[str, StoredWeight], renaming: TensorRenaming
    ) -> dict[str, str]:
        """The precision of each quantized Linear of `module`, by name. All others are plain.

        Raises:
            ConfigError: `precision` does not support one of their shapes.
        """
        if self.quantizes_plain:
            return dict.fromkeys(quantizable_linears(module, self.prefixes, self.precision), self.precision)
        return native_precisions(stored, renaming, self.prefixes)


Half = Literal["encode", "decode"]
OTHER_HALF: Mapping[Half, tuple[str, ...]] = {
    "encode": ("decoder", "post_quant_conv"),
    "decode": ("encoder", "quant_conv"),
}
"""Modules that an autoencoder does not need if it only encodes or only decodes."""


def checked_skeleton(source: Source) -> Flux2Transformer:
    """The transformer on the meta device, checked against the headers of its files. No weight is read.

    Raises:
        AccessError: tensors are missing, unknown or have a wrong shape; the error names them.
    """
    with torch.device("meta"):
        transformer = Flux2Transformer(source.spec)
    stored = stored_weights(source.transformer.files)
    renaming = transformer_renaming(stored)
    _check(transformer, stored, {name: renaming(name) for name in stored}, unknown_allowed=False)
    return transformer


@contextlib.contextmanager
def _config_errors_reported(component: str, weights: Weights) -> Iterator[None]:
    """Translate a library's errors about values in a component's config.json into an AccessError."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise AccessError.of(
            f"cannot build a {component} from the config.json beside {weights.files[0]} "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'})",
            "the config of these weights",
            "It may be damaged or written by another program: get the file again.",
        ) from error


def load_transformer(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    precision: str = NO_CHANGE,
    *,
    device_of: Callable[[str], torch.device] | None = None,
    quantize_on: torch.device | str | None = None,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = say,
    sharding: Sharding | None = None,
    is_plain: bool = False,
) -> Flux2Transformer:
    """Load the frozen transformer as `dtype` on `device`, with the Linears of its blocks in `precision`.

    Files may have BFL's or diffusers' names. Weights of a quantized file keep their format if `precision` is
    `NO_CHANGE` or the file's own precision; otherwise they are decoded first. Tensors are quantized one at a time:
    besides the model, only one tensor is in memory.

    Args:
        device_of: the device for each tensor name; by default `device` for all.
        quantize_on: the device that quantizes, by default `device`.
        cache_dir: folder that caches the quantized model for later runs.
        report: called with the reason, as a sentence, if a cached model cannot be used.
        sharding: shard the transformer over all processes and load only this process's shards. A model in `cache_dir`
            is used, but none is written. `device` and `device_of` are ignored.
        is_plain: decode all weights, for full training.

    Raises:
        AccessError: tensors are missing, unknown or have a wrong shape; the error names them.
        ConfigError: `precision`, or fp16 as `dtype`, cannot hold this model.
        DiskError: no space in `cache_dir`.
    """
    with torch.device("meta"):
        transformer = Flux2Transformer(source.spec)
    quantize = None if is_plain else QuantizationPlan(precision, BLOCKS, device if quantize_on is None else quantize_on)
    base_cache = None
    if precision != NO_CHANGE:
        base_cache = None if cache_dir is None else QuantizedBaseCache.of(cache_dir, source, precision, dtype)
    cache_file = None if base_cache is None else base_cache.verified(report)
    if sharding is not None:
        if base_cache is not None and cache_file is None:
            report(
                f"{cache_dir} holds no {precision} base, and sharded runs store none: each process quantizes its "
                "share. A run without fsdp_enable stores one there, which sharded runs can read."
            )
        _fill_shards(transformer, stored_weights(source.transformer.files), dtype, sharding, quantize, cache_file)
        return transformer.eval()
    if cache_file is not None:
        # Copy tensors that matrix products read: on a CPU the last bits of results depend on memory alignment.
        plain = {name for name, _ in transformer.named_parameters()}
        with torch.device("meta"):
            replace_by_empty(
                transformer, quantizable_linears(transformer, BLOCKS, precision), precision, quantized_from(dtype)
            )
        with open_tensors(cache_file) as tensors:
            for name in transformer.state_dict():
                target_device = device if device_of is None else device_of(name)
                _assign(transformer, name, _with_dimension(tensors[name]).to(target_device, copy=name in plain))
        return transformer.eval()
    stored = stored_weights(source.transformer.files)
    _fill(transformer, stored, transformer_renaming(stored), dtype, device, quantize=quantize, device_of=device_of)
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
    """Load the frozen autoencoder as `dtype` on `device`. Its batch-norm statistics keep the file's dtype.

    Args:
        is_streamed: keep its layers in host memory and copy them to the device one at a time.
        ahead: prefetch the next of these layers.
        half: load only this half.

    Raises:
        AccessError: tensors are missing, unknown or have a wrong shape; the error names them.
    """
    with quiet_import():
        from diffusers import AutoencoderKLFlux2  # imported here: it takes seconds

    with torch.device("meta"), _config_errors_reported("VAE", source.vae):
        vae = AutoencoderKLFlux2.from_config(source.vae.config)
    stored = stored_weights(source.vae.files, "vae")
    full_renaming = vae_renaming(stored)
    if not any(full_renaming(name) == RenamedTensor(("bn.num_batches_tracked",)) for name in stored):
        vae.bn.num_batches_tracked = None  # missing in BFL's files; only VAE training would read it
    _check(vae, stored, {name: full_renaming(name) for name in stored}, False)
    unused = () if half is None else OTHER_HALF[half]
    for name in unused:
        setattr(vae, name, None)

    def renaming(name: str) -> RenamedTensor | None:
        renamed = full_renaming(name)
        return None if renamed is None or renamed.names[0].partition(".")[0] in unused else renamed

    load_device = "cpu" if is_streamed else device
    _fill(vae, stored, renaming, dtype, load_device, uncast=("bn.",), unknown_allowed=True)
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
    fix_regex: bool,
    precision: str = NO_CHANGE,
    quantize_on: torch.device | str | None = None,
) -> ResidentTextEncoder:
    """Load the frozen text encoder, up to the last of the source's `text_layers`, as `dtype` on `device`.

    Linears are held in `precision`, and quantized on `quantize_on`, by default `device`, while they are loaded.

    Raises:
        AccessError: tensors are missing or have a wrong shape; the error names them.
        ConfigError: it has fewer layers, or the source's `text_length` is shorter than the template.
    """
    config = _text_config(source)
    depth = config.num_hidden_layers
    with _config_errors_reported("text encoder", source.text_encoder):
        model = _language_model(config, source.flavour.text)
    # Weight files lack the rotary frequencies, and the meta device does not compute them.
    with torch.device(device), _config_errors_reported("text encoder", source.text_encoder):
        model.rotary_emb = type(model.rotary_emb)(config=config)

    quantize = _layers_plan(precision, device if quantize_on is None else quantize_on)
    stored = stored_weights(source.text_encoder.files, "text_encoder")
    _fill(model, stored, text_encoder_renaming(depth), dtype, device, unknown_allowed=True, quantize=quantize)
    return ResidentTextEncoder(model.eval(), _tokenizer(source, fix_regex), source.text)


def stream_text_encoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    fix_regex: bool,
    folder: Path,
    precision: str = NO_CHANGE,
    quantize_on: torch.device | str | None = None,
) -> StreamedTextEncoder:
    """Open a text encoder that holds one layer at a time, as `dtype` on `device`. Reads only headers.

    Its results are bit-identical to those of the resident one. Hidden states that do not stay in memory are stored in a
    file in `folder`.

    Raises:
        AccessError: tensors are missing or have a wrong shape; the error names them.
        ConfigError: it has fewer layers, or the source's `text_length` is shorter than the template.
    """
    config = _text_config(source)
    depth = config.num_hidden_layers
    stored = stored_weights(source.text_encoder.files, "text_encoder")
    new_names = {name: text_encoder_name(name, depth) for name in stored}
    renamed = {name: None if new is None else RenamedTensor((new,)) for name, new in new_names.items()}
    with _config_errors_reported("text encoder", source.text_encoder):
        full_model = _language_model(config, source.flavour.text)
    _check(full_model, stored, renamed, unknown_allowed=True)
    (embedding,) = (name for name, new in new_names.items() if new == "embed_tokens.weight")
    with torch.device(device), _config_errors_reported("text encoder", source.text_encoder):
        rotary = type(full_model.rotary_emb)(config=config)
    quantize = _layers_plan(precision, device if quantize_on is None else quantize_on)
    single_layer = _cut(copy.deepcopy(config), 1)

    def embed(ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        # The embedding is larger than a layer, and captions use few of its rows.
        with open_stored(stored) as weights:
            rows = weights.gathered(embedding, ids, dtype)
        _check_finite(rows, embedding, stored[embedding].file)
        return rows

    def read_layer(index: int) -> nn.Module:
        model = _language_model(single_layer, source.flavour.text)
        model.embed_tokens = nn.Identity()
        model.rotary_emb = rotary
        prefix, first = f"layers.{index}.", "layers.0."

        def renaming(name: str) -> RenamedTensor | None:
            new = new_names[name]
            return (
                RenamedTensor((first + new.removeprefix(prefix),))
                if new is not None and new.startswith(prefix)
                else None
            )

        _fill(model, stored, renaming, dtype, device, unknown_allowed=True, quantize=quantize)
        layer: nn.Module = model.eval()
        return layer

    return StreamedTextEncoder(
        embed,
        read_layer,
        _tokenizer(source, fix_regex),
        source.text,
        width=config.hidden_size,
        dtype=dtype,
        device=device,
        folder=folder,
    )


def _layers_plan(precision: str, device: torch.device | str) -> QuantizationPlan:
    """The plan for the Linears of a text encoder's layers."""
    return QuantizationPlan(precision, ("layers.",), device)


def _text_config(source: Source) -> Any:
    """transformers' config of the text encoder's language model, truncated after the last of its `text_layers`.

    Raises:
        ConfigError: it has fewer layers.
    """
    # Imported here: it takes seconds, and only encoding text needs it.
    from transformers import Mistral3Config, MistralConfig, Qwen3Config

    written = dict(source.text_encoder.config or {})
    with _config_errors_reported("text encoder", source.text_encoder):
        if written["model_type"] == "mistral3":
            config = Mistral3Config(**written).text_config
        else:
            config = {"mistral": MistralConfig, "qwen3": Qwen3Config}[written["model_type"]](**written)
    if max(source.text_layers) > config.num_hidden_layers:
        raise ConfigError.of(
            f"custom_text_encoder_intermediary_layers = {','.join(map(str, source.text_layers))}",
            f"at most {config.num_hidden_layers}, the layers of this text encoder",
        )
    return _cut(config, max(source.text_layers))


def _cut(config: Any, layers: int) -> Any:
    """Truncate `config` in place to its first `layers` layers, and return it."""
    config.num_hidden_layers = layers
    if config.model_type == "qwen3":
        config.layer_types = config.layer_types[:layers]
    return config


def _language_model(config: Any, text: TextContextSpec) -> Any:
    """transformers' language model on the meta device, without its final norm.

    Attention outputs of rows that attend to nothing are 0. Only padding on the left causes such rows.
    """
    from transformers import AutoModel

    # transformers checks for optional libraries only when it builds a model, so silence their warnings here.
    with torch.device("meta"), quiet_import():
        # sdpa is part of the cache key: the results of other implementations differ in the last digits.
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    model.norm = nn.Identity()
    if text.padding_side == "left":
        zero_fully_masked_rows(model)
    return model


def _tokenizer(source: Source, fix_regex: bool) -> Any:
    """Load the tokenizer from its files. The class that they name is ignored, since it needs torchvision."""
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
    """Id of everything that determines a cached latent. Does not load the autoencoder."""
    return sha256_json(["latents 2", source.encoder_fingerprint(dtype), str(dtype), tiling, slicing])


def earlier_autoencoder_id(source: Source, dtype: torch.dtype, *, tiling: bool, slicing: bool, all_bytes: bool) -> str:
    """The id of a cached latent in earlier releases, which included the decoder and the files' bytes.

    For `all_bytes` see `Source.fingerprint`.
    """
    return sha256_json(["latents 1", source.fingerprint("vae", all_bytes=all_bytes), str(dtype), tiling, slicing])


def text_encoder_id(
    source: Source,
    dtype: torch.dtype,
    *,
    fix_regex: bool,
    precision: str = NO_CHANGE,
    all_bytes: bool = False,
) -> str:
    """Id of everything that determines a cached context. Does not load the text encoder.

    For `all_bytes` see `Source.fingerprint`.
    """
    weights = [source.fingerprint("text_encoder", all_bytes=all_bytes), source.fingerprint("tokenizer")]
    quantized_in = [] if precision == NO_CHANGE else [precision]
    text, default = source.flavour.text, FLAVOURS["dev"].text
    # Included only if they differ from dev's: older caches lack them.
    kind = [text.kind] if text.kind != default.kind else []
    template = [text.system_message] if text.system_message != default.system_message else []
    padding = [text.padding_side] if text.padding_side != default.padding_side else []
    settings = [str(dtype), list(source.text_layers), source.text_length, fix_regex]
    return sha256_json(["contexts 1, sdpa", *weights, *settings, *quantized_in, *kind, *template, *padding])


def _fill(
    module: nn.Module,
    stored: Mapping[str, StoredWeight],
    renaming: TensorRenaming,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    uncast: tuple[str, ...] = (),
    unknown_allowed: bool = False,
    quantize: QuantizationPlan | None = None,
    device_of: Callable[[str], torch.device] | None = None,
) -> None:
    """Load every parameter and buffer of `module`, built on the meta device, from `stored`.

    Headers are checked before any weight is read. Tensors whose names start with one of `uncast` are moved but not
    cast.

    With quantization, each tensor is freed before the next one is read, and files are not memory-mapped: a tensor is
    read once and takes memory only once.
    """
    renamed = {name: renaming(name) for name in stored}
    _check(module, stored, renamed, unknown_allowed)
    precisions = {} if quantize is None else quantize.precisions(module, stored, renaming)
    is_mapped = quantize is None or not quantize.quantizes_plain

    def load_tensor(target: str, shape: tuple[int, ...], rows: StoredRows) -> None:
        target_device = device if device_of is None else device_of(target)
        owner = target.removesuffix(".weight")
        precision = precisions.get(owner)
        if precision is None:
            tensor = _cast(rows, None if target.startswith(uncast) else dtype, target).reshape(shape).to(target_device)
            _check_finite(tensor, target, rows.weight.file)
            _assign(module, target, tensor)
            return
        assert quantize is not None
        linear = module.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        if rows.weight.precision == precision:
            tensors = rows.native_tensors()
            _check_native(tensors, target, rows.weight.file)
            module.set_submodule(
                owner, quantized_from_tensors(linear, precision, tensors, quantized_from(dtype), target_device)
            )
        else:
            cast = _cast(rows, quantized_from(dtype), target, limit=dtype)
            linear.weight = nn.Parameter(cast.to(quantize.device), requires_grad=False)
            _check_finite(linear.weight, target, rows.weight.file)
            module.set_submodule(owner, quantized(linear, precision, target_device))

    with open_stored(stored, is_mapped=is_mapped) as weights:
        for name, new in renamed.items():
            if new is not None:
                stop_if_asked()
                shapes = new.shapes(stored[name].shape)
                for target, shape, rows in zip(new.names, shapes, weights.parts(name, new.split), strict=True):
                    load_tensor(target, shape, rows)


@torch.no_grad()
def _fill_shards(
    transformer: Flux2Transformer,
    stored: Mapping[str, StoredWeight],
    dtype: torch.dtype,
    sharding: Sharding,
    quantize: QuantizationPlan | None,
    quantized_file: Path | None,
) -> None:
    """Shard `transformer`, built on the meta device, and load this process's rows of every tensor.

    Files are memory-mapped, so other rows are not read, and processes share the pages that they read. Besides the
    shards, one tensor at a time is in memory: its rows, or all of it if the precision cannot quantize rows separately.

    Args:
        quantized_file: file of tensors that are already quantized. If given, weights in `stored` are not read.
    """
    renaming = transformer_renaming(stored)
    renamed = {name: renaming(name) for name in stored}
    _check(transformer, stored, renamed, unknown_allowed=False)
    precisions = {} if quantize is None else quantize.precisions(transformer, stored, renaming)
    layouts: dict[str, WeightLayout] = {}
    transformer.to(dtype)
    for owner, precision in precisions.items():
        linear = transformer.get_submodule(owner)
        assert isinstance(linear, nn.Linear)
        layouts[owner] = WeightLayout(precision, (linear.out_features, linear.in_features))
        with torch.device("meta"):
            replace_by_empty(transformer, {owner: linear}, precision, quantized_from(dtype))
    transformer.requires_grad_(False)
    shard(transformer, transformer.blocks, sharding)
    transformer.to_empty(device=sharding.shard_device)
    shards = {name: local_shard(parameter) for name, parameter in transformer.named_parameters()}

    def load_tensor(target: str, all_rows: StoredRows) -> None:
        owner, file = target.removesuffix(".weight"), all_rows.weight.file
        shard_rows = all_rows[local_range(all_rows.shape)]
        layout = layouts.get(owner)
        if layout is None:
            _check_finite(shards[target].copy_(_cast(shard_rows, None, target, limit=dtype)), target, file)
            return
        assert quantize is not None
        if all_rows.weight.precision == layout.precision:
            tensors = shard_rows.native_tensors()
            _check_native(tensors, target, file)
            for name, tensor in tensors.items():
                shards[f"{owner}.{name}"].copy_(tensor)
            return
        rows = shard_rows if layout.is_by_rows else all_rows
        if not rows.shape[0]:
            return
        cast = _cast(rows, quantized_from(dtype), target, limit=dtype).to(quantize.device)
        _check_finite(cast, target, file)
        for name, tensor in quantized_tensors(cast, layout.precision).items():
            shards[f"{owner}.{name}"].copy_(tensor if layout.is_by_rows else local_rows(tensor))

    if quantized_file is not None:
        with open_tensors(quantized_file) as tensors:
            for name, rows in shards.items():
                rows.copy_(local_rows(_with_dimension(tensors[name])))
        return
    with open_stored(stored) as weights:
        for name, new in renamed.items():
            if new is not None:
                stop_if_asked()
                for target, all_rows in zip(new.names, weights.parts(name, new.split), strict=True):
                    load_tensor(target, all_rows)


def _cast(rows: StoredRows, dtype: torch.dtype | None, name: str, *, limit: torch.dtype | None = None) -> Tensor:
    """Read `rows` as `dtype`; None keeps a plain weight's dtype.

    Raises:
        ConfigError: a value is outside the range of `limit`, by default `dtype`.
    """
    limit = dtype if limit is None else limit
    if not rows.weight.is_plain:
        return rows.values(dtype or limit)
    values = rows.values()
    if limit is not None:
        check_range(values, limit, name)
    return values if dtype is None else values.to(dtype)


def _with_dimension(tensor: Tensor) -> Tensor:
    """`tensor`, with shape [1] if it is a scalar, as earlier releases saved one of nf4's tensors."""
    return tensor if tensor.dim() else tensor.reshape(1)


def _check_finite(tensor: Tensor, name: str, file: Path) -> None:
    """Raise an AccessError if `tensor`, loaded from `file`, has NaN or infinite values."""
    count = non_finite_count(tensor)
    if count:
        raise _not_finite(file, count, tensor, name)


def _not_finite(file: Path, count: int, tensor: Tensor, name: str) -> AccessError:
    return AccessError.of(
        f"{file}: {count:,} of {tensor.numel():,} numbers of {name} are NaN or infinite as {tensor.dtype}",
        "finite weights",
        "The file is damaged, or was saved by a run that diverged: get it again.",
    )


def _check_native(tensors: Mapping[str, Tensor], name: str, file: Path) -> None:
    """`_check_finite` for an 8-bit weight and its scales."""
    _check_finite(tensors["scale"], f"the scales of {name}", file)
    data = tensors["data"]
    if data.dtype == torch.float8_e4m3fn:
        count = int(((data.view(torch.uint8) & 0x7F) == 0x7F).sum())  # its NaN codes; it has no infinity
        if count:
            raise _not_finite(file, count, data, name)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer `name` of `module`."""
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _check(
    module: nn.Module,
    stored: Mapping[str, StoredWeight],
    renamed: Mapping[str, RenamedTensor | None],
    unknown_allowed: bool,
) -> None:
    """Raise an AccessError unless the renamed tensors are exactly those of `module`, with its shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    loaded: dict[str, tuple[int, ...]] = {}
    unknown, wrong = [], []
    for name, new in renamed.items():
        if new is None:
            if not unknown_allowed:
                unknown.append(name)
            continue
        for target, shape in zip(new.names, new.shapes(stored[name].shape), strict=True):
            loaded[target] = shape
            if target not in expected:
                unknown.append(name)
            elif shape != expected[target]:
                wrong.append(f"{target} {list(shape)}, not {list(expected[target])}")
            elif not stored[name].is_floating and not target.endswith("num_batches_tracked"):
                wrong.append(f"{target} as {stored[name].data.dtype}, not in floating point")
    missing = [name for name in expected if name not in loaded]
    files = ", ".join(sorted({weight.file.name for weight in stored.values()}))
    AccessError.raise_if(
        Problem(
            f"{files}: {finding} ({len(names)}): {_some(names)}",
            remedy="Check that this is the right model and that it is complete.",
        )
        for finding, names in (("missing", missing), ("unknown", unknown), ("wrong shape or dtype", wrong))
        if names
    )


def _some(names: list[str]) -> str:
    """The first four of `names`, and the number of others, for messages."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
