"""Weights from files into modules: built empty, filled tensor by tensor, each cast and moved as it lands."""

from collections.abc import Mapping

import torch
from safetensors import safe_open
from torch import Tensor, nn

from simpletuner.base.errors import AccessError, ConfigError, Problem
from simpletuner.base.files import sha256_json
from simpletuner.flux2.autoencoder import Autoencoder
from simpletuner.flux2.headers import TensorEntry, read_headers
from simpletuner.flux2.names import Renamed, Renaming, text_encoder_name, transformer_renaming
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.text import TextEncoder
from simpletuner.flux2.transformer import Flux2Transformer

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
    source: Source, dtype: torch.dtype, device: torch.device | str, *, tiling: bool = False, slicing: bool = False
) -> Autoencoder:
    """The autoencoder, frozen, as `dtype` on `device`; its batch-norm statistics stay as they are in the file.

    Raises:
        AccessError: tensors are missing, unknown or of the wrong shape; they are named.
    """
    from diffusers import AutoencoderKLFlux2  # takes seconds to import: only where latents are made or shown

    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(source.vae.config)
    _fill(vae, source.vae, lambda name: Renamed((name,)), dtype, device, kept=("bn.",))
    if tiling:
        vae.enable_tiling()
    if slicing:
        vae.enable_slicing()
    return Autoencoder(vae)


def load_text_encoder(
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    layers: tuple[int, ...],
    max_length: int,
    fix_regex: bool,
) -> TextEncoder:
    """The text encoder, frozen, as `dtype` on `device`: only as many layers as `layers` asks for are loaded.

    Raises:
        AccessError: tensors are missing or of the wrong shape; they are named.
        ConfigError: it has fewer layers, or `max_length` is shorter than the template.
    """
    # Takes seconds to import: only where text is encoded.
    from transformers import AutoModel, Mistral3Config, MistralConfig, PreTrainedTokenizerFast

    written = dict(source.text_encoder.config or {})
    config = Mistral3Config(**written).text_config if written["model_type"] == "mistral3" else MistralConfig(**written)
    depth = max(layers)
    if depth > config.num_hidden_layers:
        raise ConfigError.of(
            f"custom_text_encoder_intermediary_layers = {','.join(map(str, layers))}",
            f"at most {config.num_hidden_layers}, the layers of this text encoder",
        )
    config.num_hidden_layers = depth
    with torch.device("meta"):
        # The implementation decides what padding rows hold, hence what is cached.
        model = AutoModel.from_config(config, attn_implementation="sdpa")
    model.norm = nn.Identity()
    # Its frequencies are in no file, and on the meta device they were never computed.
    with torch.device(device):
        model.rotary_emb = type(model.rotary_emb)(config=config)

    def renaming(name: str) -> Renamed | None:
        known = text_encoder_name(name, depth)
        return None if known is None else Renamed((known,))

    _fill(model, source.text_encoder, renaming, dtype, device, unknown_allowed=True)
    # The tokenizer's own files, whatever class they name: the processor of that class would need torchvision.
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
    return TextEncoder(model.eval(), tokenizer, layers=layers, max_length=max_length)


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
