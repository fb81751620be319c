"""Which model is trained, where its parts come from, and the seed of the run."""

from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, MinLen
from pydantic import AfterValidator, BeforeValidator

from simpletuner.config.flavours import DEFAULT_FLAVOUR, FLAVOURS, FlavourName
from simpletuner.config.options.kinds import Count, IsJson, ModelText, PathText, Says, Seed, Slice, Text, list_as_tuple


def _layer_numbers(value: object) -> object:
    """ "10,20,30" or [10, 20, 30] as a tuple; anything else is left for the type to refuse."""
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
    """The family of models. This program trains FLUX.2."""

    model_flavour: FlavourName = DEFAULT_FLAVOUR
    """A flavour given with higher precedence than a model path wins over that path, with a notice."""

    model_type: Literal["lora", "full"] = "lora"
    """What is trained: `lora`, small matrices beside the frozen base; `full`, every weight of the transformer:
    see [full training](full.md)."""

    pretrained_model_name_or_path: ModelText | None = None
    """Where the model lies: a Hub id, a local diffusers folder, or a [single file](runs.md#the-base-model),
    `.safetensors` or `.gguf`, of the transformer, which may hold VAE and text encoder too (what it lacks comes from its
    own key, else from the flavour's Hub id). By default the flavour's own Hub id. With local paths nothing is asked of
    the network."""

    pretrained_transformer_model_name_or_path: ModelText | None = None
    """Replaces the transformer: a Hub id, a folder or a single file in diffusers' or BFL's names."""

    pretrained_vae_model_name_or_path: ModelText | None = None
    """Replaces the VAE: a Hub id, a folder or a single file in diffusers' or BFL's names, such as `ae.safetensors` or
    ComfyUI's `flux2-vae.safetensors`. One with another decoder, such
    as `black-forest-labs/FLUX.2-small-decoder`, leaves [cached latents](runs.md#the-base-model) as they are."""

    pretrained_text_encoder_model_name_or_path: ModelText | None = None
    """Replaces the text encoder: a Hub id, a folder or a single file as ComfyUI has it. A tokenizer beside it, or in
    `tokenizer/` there, is used; else that of the base model."""

    revision: Text | None = None
    """Branch, tag or commit on the Hub."""

    variant: Text | None = None
    """File variant on the Hub, such as `bf16`."""

    cache_dir: PathText | None = None
    """Where downloads from the Hub and the made `tiny` model are kept; by default the usual cache folders."""

    verify_base: bool = False
    """Read and hash every weight of the base model at this start. Without it a file is hashed once, and again when its
    size, time or inode changes, or one of 64 pieces of it: see [resuming](runs.md#the-base-model)."""

    custom_text_encoder_intermediary_layers: (
        Annotated[
            tuple[Annotated[int, Ge(1)], ...],
            MinLen(1),
            IsJson(),
            BeforeValidator(_layer_numbers),
            AfterValidator(_increase),
            Says("rising layer numbers, as 10,20,30 or [10, 20, 30]"),
        ]
        | None
    ) = None
    """Text-encoder layers whose hidden states stand side by side; by default the flavour's, 10,20,30."""

    tokenizer_max_length: Count | None = None
    """Length of the text context in tokens; by default the flavour's, 512. A longer caption is
    shortened (never the template around it), counted and named."""

    tokenizer_fix_regex: bool = False
    """Use Mistral's corrected pre-tokenizer: other tokens where vowels are marks, as in Hindi, Tamil and Thai. Part of
    the text cache's key."""

    seed: Seed = 42
    """Decides every random draw of the run."""

    vae_dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the VAE."""

    vae_enable_tiling: bool = False
    """Encode and decode large pictures in tiles: less memory, faint differences at the seams."""

    vae_enable_slicing: bool = False
    """Encode and decode a batch one picture at a time: less memory."""

    @classmethod
    def documentation(cls) -> dict[str, str]:
        """The text under each field, and what each flavour is."""
        texts = super().documentation()
        flavours = "; ".join(f"`{name}` is {flavour.summary}" for name, flavour in FLAVOURS.items())
        return texts | {"model_flavour": f"{flavours}. {texts['model_flavour']}"}
