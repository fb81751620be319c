"""Number formats, and the settings that trade time for memory."""

from typing import Annotated, Literal

from annotated_types import Ge

from simpletuner.config.options.kinds import Count, PathText, Slice

PrecisionName = Literal[
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "int2-quanto",
    "fp8-quanto",
    "int8-torchao",
    "int4-torchao",
    "fp8-torchao",
    "fp8wo-torchao",
    "nf4-bnb",
    "int8-bnb",
]
"""Format and library of quantized weights; `simpletuner.config.precisions` says what each is."""


class PrecisionOptions(Slice):
    """Precision and memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Format of the computation and of the base weights. `no` is fp32 throughout; `fp16` scales the loss and needs a
    GPU, and a weight beyond 65504 is an error. What is trained is fp32 in all: adapters themselves, of a full model its
    masters. fp32 is never TF32."""

    base_model_precision: PrecisionName = "no_change"
    """Quantization of the frozen transformer: the Linears of its blocks. Embedders, modulation, norms, the last layer
    and adapters stay in `base_model_default_dtype`. `no_change` keeps fp8 and int8 as a file has them."""

    text_encoder_1_precision: PrecisionName = "no_change"
    """Quantization of the text encoder: the Linears of its layers."""

    base_model_cache_dir: PathText | None = None
    """Where a quantized base is kept between runs, keyed by its source and precision. By default nowhere."""

    quantize_via: Literal["accelerator", "cpu"] = "accelerator"
    """Where a block is quantized as it lands. The whole model is never held unquantized."""

    base_model_default_dtype: Literal["bf16", "fp32"] | None = None
    """Format of the weights that the model computes with: by default that of `mixed_precision`, fp32 with `no`. Under
    fp16 weights of another format are cast for each product (autocast). With `model_type full` and 16 bits the
    optimizer steps on fp32 masters of them; `adamw_bf16` does without, on bf16."""

    gradient_checkpointing: bool = True
    """Compute a block's activations again in the backward pass instead of keeping them: much less memory,
    about a third more time, the same result."""

    gradient_checkpointing_interval: Annotated[int, Ge(2)] | None = None
    """N: every N-th block keeps its activations after all, which is faster and takes more memory.
    By default none does."""

    vae_batch_size: Count = 1
    """Pictures the VAE encodes at once."""

    text_encoder_batch_size: Count = 8
    """Captions the text encoder encodes at once: this is what makes the caching of text faster."""

    text_encoder_mode: Literal["auto", "resident", "streamed"] = "auto"
    """How the text encoder is held while captions are cached: `resident`, all of it at once; `streamed`, one layer at
    a time, through which all captions go before the next one is read. The contexts are the same bits. `auto` takes
    `resident` if the encoder fits into the memory that is free, and says so."""

    write_batch_size: Count = 128
    """Cache files written per flush, and nothing else. A store's own value wins."""

    @property
    def base_dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Format of the weights that the model computes with."""
        if self.base_model_default_dtype is not None:
            return self.base_model_default_dtype
        return "fp32" if self.mixed_precision == "no" else self.mixed_precision

    @property
    def text_dtype(self) -> Literal["bf16", "fp32"]:
        """Format of the text encoder and of cached contexts: bf16 under fp16, whose range its states can leave."""
        return "bf16" if self.base_dtype == "fp16" else self.base_dtype

    @property
    def is_autocast(self) -> bool:
        """Whether weights of another format are cast to fp16 for each product."""
        return self.mixed_precision == "fp16" and self.base_dtype != "fp16"
