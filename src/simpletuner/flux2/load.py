"""Weights from files into modules: built empty, filled tensor by tensor, each cast and moved as it lands."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import sha256_json
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.headers import TensorEntry, read_headers
from simpletuner.flux2.names import Renamed, Renaming, text_encoder_name, transformer_renaming
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.text import ResidentTextEncoder
from simpletuner.flux2.text_stream import StreamedTextEncoder
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import offload

# Mistral's own pre-tokeniser, as in its tekken.json: case counts and every digit is a token.
_TEKKEN_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def load_transformer(source: Source, dtype: torch.dtype, device: torch.device | str) -> Flux2Transformer:
    """The transformer, frozen, all of it as `dtype` on `device`. BFL's and diffusers' names are both understood.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape; they are named.
    """
    with torch.device("meta"):
        transformer = Flux2Transformer(source.spec)
    renaming = transformer_renaming(read_headers(source.transformer.files))
    _fill(transformer, source.transformer, renaming, dtype, device)
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
) -> Autoencoder:
    """The autoencoder, frozen, as `dtype` on `device`; its batch-norm statistics stay as they are in the file. Where it
    `is_streamed`, its layers are in the machine's memory and come one by one, the next `ahead` of its turn or not.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape; they are named.
    """
    from diffusers import AutoencoderKLFlux2  # takes seconds to import: only where latents are made or shown

    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(source.vae.config)
    landing = "cpu" if is_streamed else device
    _fill(vae, source.vae, lambda name: Renamed((name,)), dtype, landing, kept=("bn.",))
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
) -> ResidentTextEncoder:
    """The text encoder, frozen, as `dtype` on `device`: only as many layers as `layers` asks for are loaded.

    Raises:
        AccessError: tensors are missing or of the wrong shape; they are named.
        ConfigError: it has fewer layers, or `max_length` is shorter than the template.
    """
    config = _text_config(source, layers)
    depth = config.num_hidden_layers
    model = _language_model(config)
    # Its frequencies are in no file, and on the meta device they were never computed.
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=config)

    def renaming(name: str) -> Renamed | None:
        known = text_encoder_name(name, depth)
        return None if known is None else Renamed((known,))

    _fill(model, source.text_encoder, renaming, dtype, device, unknown_allowed=True)
    return ResidentTextEncoder(model.eval(), _tokenizer(source, fix_regex), layers=layers, max_length=max_length)


def stream_text_encoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layers: tuple[int, ...],
    max_length: int,
    fix_regex: bool,
    folder: Path,
) -> StreamedTextEncoder:
    """The same text encoder, the same bits, with one layer at a time as `dtype` on `device`. Nothing is read yet but
    the headers. States that do not stay in memory are put into a file in `folder` meanwhile.

    Raises:
        AccessError: tensors are missing or of the wrong shape; they are named.
        ConfigError: it has fewer layers, or `max_length` is shorter than the template.
    """
    config = _text_config(source, layers)
    depth = config.num_hidden_layers
    entries = read_headers(source.text_encoder.files)
    known = {name: text_encoder_name(name, depth) for name in entries}
    renamed = {name: None if new is None else Renamed((new,)) for name, new in known.items()}
    whole = _language_model(config)
    _check(whole, entries, renamed, unknown_allowed=True)
    (embedding,) = (name for name, new in known.items() if new == "embed_tokens.weight")
    with torch.device(device):
        rotary = type(whole.rotary_emb)(config=config)
    single = copy.deepcopy(config)
    single.num_hidden_layers = 1

    def embed(ids: Int64[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        # The table is mapped, not read: it is larger than a layer, and captions use few of its rows.
        with safe_open(entries[embedding].file, framework="pt") as tensors:
            rows: Tensor = tensors.get_tensor(embedding)[ids]
            return rows.to(dtype)

    def read_layer(index: int) -> nn.Module:
        model = _language_model(single)
        model.embed_tokens = nn.Identity()
        model.rotary_emb = rotary
        own, place = f"layers.{index}.", "layers.0."

        def renaming(name: str) -> Renamed | None:
            new = known[name]
            return Renamed((place + new.removeprefix(own),)) if new is not None and new.startswith(own) else None

        _fill(model, source.text_encoder, renaming, dtype, device, unknown_allowed=True)
        layer: nn.Module = model.eval()
        return layer

    return StreamedTextEncoder(
        embed,
        read_layer,
        _tokenizer(source, fix_regex),
        layers=layers,
        max_length=max_length,
        width=config.hidden_size,
        dtype=dtype,
        device=device,
        folder=folder,
    )


def resident_text_bytes(source: Source, dtype: torch.dtype, *, layers: tuple[int, ...], tokens: int) -> int:
    """Bytes that `load_text_encoder` takes at most, from headers and config alone: weights, and the activations of a
    batch of `tokens` at its widest place, the middle of an MLP (gate, its activation, up, their product; beside them
    about six vectors of the stream's width).

    Raises:
        ConfigError: it has fewer layers.
    """
    config = _text_config(source, layers)
    entries = read_headers(source.text_encoder.files)
    used = [entry for name, entry in entries.items() if text_encoder_name(name, config.num_hidden_layers) is not None]
    weights = sum(math.prod(entry.shape) for entry in used)
    activations: int = tokens * (4 * config.intermediate_size + 6 * config.hidden_size)
    return (weights + activations) * dtype.itemsize


def _text_config(source: Source, layers: tuple[int, ...]) -> Any:
    """transformers' MistralConfig of the text encoder, cut after the last of `layers`.

    Raises:
        ConfigError: it has fewer layers.
    """
    # Takes seconds to import: only where text is encoded.
    from transformers import Mistral3Config, MistralConfig

    written = dict(source.text_encoder.config or {})
    config = Mistral3Config(**written).text_config if written["model_type"] == "mistral3" else MistralConfig(**written)
    if max(layers) > config.num_hidden_layers:
        raise ConfigError.of(
            f"custom_text_encoder_intermediary_layers = {','.join(map(str, layers))}",
            f"at most {config.num_hidden_layers}, the layers of this text encoder",
        )
    config.num_hidden_layers = max(layers)
    return config


def _language_model(config: Any) -> Any:
    """transformers' MistralModel on the meta device, without its final norm."""
    from transformers import AutoModel

    with torch.device("meta"):
        # The implementation decides what padding rows hold, hence what is cached.
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    model.norm = nn.Identity()
    return model


def _tokenizer(source: Source, fix_regex: bool) -> Any:
    """The tokenizer's own files, whatever class they name: the processor of that class would need torchvision."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        source.tokenizer, local_files_only=True, fix_mistral_regex=False
    )
    if fix_regex:
        from tokenizers import Regex, pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_TEKKEN_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return tokenizer


def autoencoder_id(source: Source, dtype: torch.dtype, *, tiling: bool, slicing: bool) -> str:
    """Names everything that decides a cached latent, without loading the autoencoder."""
    return sha256_json(["latents 1", source.fingerprint("vae"), str(dtype), tiling, slicing])


def text_encoder_id(
    source: Source, dtype: torch.dtype, *, layers: tuple[int, ...], max_length: int, fix_regex: bool
) -> str:
    """Names everything that decides a cached context, without loading the text encoder."""
    weights = [source.fingerprint("text_encoder"), source.fingerprint("tokenizer")]
    return sha256_json(["contexts 1, sdpa", *weights, str(dtype), list(layers), max_length, fix_regex])


def _fill(
    module: nn.Module,
    weights: Weights,
    renaming: Renaming,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    kept: tuple[str, ...] = (),
    unknown_allowed: bool = False,
) -> None:
    """Give every parameter and buffer of `module`, built on the meta device, its tensor from `weights`.

    Tensors whose names start with one of `kept` are moved but not cast. Headers alone decide whether everything fits,
    before any weight is read.
    """
    entries = read_headers(weights.files)
    renamed = {name: renaming(name) for name in entries}
    _check(module, entries, renamed, unknown_allowed)
    for file in weights.files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  it is no mapping
                new = renamed[name]
                if new is None:
                    continue
                for target, part in zip(new.names, new.cut(tensors.get_tensor(name)), strict=True):
                    cast = part if target.startswith(kept) else part.to(dtype)
                    _assign(module, target, cast.to(device))


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    place = module.get_submodule(owner)
    is_parameter = leaf in dict(place.named_parameters(recurse=False))
    setattr(place, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def _check(
    module: nn.Module,
    entries: Mapping[str, TensorEntry],
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
        for target, shape in zip(new.names, new.shapes(entries[name].shape), strict=True):
            found[target] = shape
            if target not in expected:
                unknown.append(name)
            elif shape != expected[target]:
                wrong.append(f"{target} {list(shape)}, not {list(expected[target])}")
            elif entries[name].dtype not in _FLOATS and not target.endswith("num_batches_tracked"):
                wrong.append(f"{target} as {entries[name].dtype}, not in floating point")
    missing = [name for name in expected if name not in found]
    where = ", ".join(sorted({entry.file.name for entry in entries.values()}))
    AccessError.raise_if(
        Problem(f"{where}: {what} ({len(names)}): {_some(names)}", remedy="Is this the right model, and whole?")
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape or type", wrong))
        if names
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
