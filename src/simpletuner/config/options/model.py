"""Options for the model: which one to train, where to load its parts from, and the run's seed."""

from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS, FlavourName
from simpletuner.config.options.kinds import (
    Count,
    Expects,
    IsJson,
    ModelText,
    PathText,
    Seed,
    Slice,
    Text,
    list_as_tuple,
)


def _layer_numbers(value: object) -> object:
    """Convert "10,20,30" or [10, 20, 30] to a tuple; return other values unchanged, for the type to reject."""
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else part for part in value.split(",")]
    return list_as_tuple(value)


def _increase(layers: tuple[int, ...]) -> tuple[int, ...]:
    if any(later <= earlier for earlier, later in pairwise(layers)):
        raise ValueError("layers out of order")
    return layers


class ModelOptions(Slice):
    """Model."""

    model_family: Literal["flux2"] = "flux2"
    """The model family. This program trains FLUX.2."""

    model_flavour: FlavourName = DEFAULT_FLAVOUR
    """A flavour that is set with higher precedence than a model path replaces that path, with a notice."""

    model_type: Literal["lora", "full"] = "lora"
    """The trainable parameters: `lora` trains small matrices beside the frozen base; `full` trains every weight of the
    transformer. See [full training](full.md)."""

    pretrained_model_name_or_path: ModelText | None = None
    """The base model: a Hub id, a local diffusers folder, or a [single file](runs.md#the-base-model) (`.safetensors` or
    `.gguf`) of the transformer, which may hold the VAE and text encoder too. Parts that the file lacks come from the
    option for that part, else from the flavour's Hub id. By default the flavour's Hub id. With local paths the program
    does not use the network."""

    pretrained_transformer_model_name_or_path: ModelText | None = None
    """Another transformer for the base model: a Hub id, a folder, or a single file with diffusers' or BFL's tensor
    names."""

    pretrained_vae_model_name_or_path: ModelText | None = None
    """Another VAE for the base model: a Hub id, a folder, or a single file with diffusers' or BFL's tensor names, such
    as `ae.safetensors` or ComfyUI's `flux2-vae.safetensors`. If only the decoder differs, as in
    `black-forest-labs/FLUX.2-small-decoder`, [cached latents](runs.md#the-base-model) stay valid."""

    pretrained_text_encoder_model_name_or_path: ModelText | None = None
    """Another text encoder for the base model: a Hub id, a folder, or a single file in ComfyUI's format. The tokenizer
    is read from the same folder or its `tokenizer/`; if there is none, the base model's is used."""

    revision: Text | None = None
    """Branch, tag or commit on the Hub."""

    variant: Text | None = None
    """File variant on the Hub, such as `bf16`."""

    cache_dir: PathText | None = None
    """Folder for downloads from the Hub and for the generated `tiny` model. By default the Hub's and the program's own
    cache folders."""

    verify_base: bool = False
    """Read and hash every weight of the base model when the run starts. Otherwise a file is hashed once, and again only
    when its size, time, inode or one of 64 sampled pieces changes. See [resuming](runs.md#the-base-model)."""

    custom_text_encoder_intermediary_layers: (
        Annotated[
            tuple[Annotated[int, Ge(1)], ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(_layer_numbers),
            AfterValidator(_increase),
            Expects("increasing layer numbers, such as 10,20,30 or [10, 20, 30]"),
        ]
        | None
    ) = None
    """Text encoder layers whose hidden states are concatenated into the context. By default the flavour's: 10,20,30 for
    dev, 9,18,27 for klein."""

    tokenizer_max_length: Count | None = None
    """Length of the text context in tokens. By default the flavour's: 512 for dev and klein. Longer captions are
    truncated (never the template around them), counted and listed."""

    tokenizer_fix_regex: bool = False
    """Use Mistral's corrected pre-tokenizer. It changes the tokens of scripts that write vowels as marks, such as
    Hindi, Tamil and Thai. The setting is part of the text cache's key."""

    seed: Seed = 42
    """Seed of every random draw of the run."""

    vae_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the VAE."""

    vae_enable_tiling: bool = False
    """Encode and decode large images in tiles. Takes less memory; leaves faint differences at the seams."""

    vae_enable_slicing: bool = False
    """Encode and decode a batch one image at a time. Takes less memory."""

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """The docstring of each field; that of `model_flavour` begins with a summary of each flavour."""
        texts = super().documentation()
        flavours = "; ".join(f"`{name}` is {flavour.summary}" for name, flavour in FLAVOURS.items())
        return texts | {"model_flavour": f"{flavours}. {texts['model_flavour']}"}
