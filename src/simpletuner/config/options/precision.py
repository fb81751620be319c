"""Options for number formats, and options that trade time for memory."""

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
"""Format and library of quantized weights; `simpletuner.config.precisions` defines each."""


class PrecisionOptions(Slice):
    """Precision and memory."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    """Precision of the computation and of the base weights. `no` is fp32 throughout; `fp16` scales the loss, needs a
    GPU, and fails on a weight beyond 65504. Trainable parameters are fp32 in every mode: adapters themselves, or the
    masters of a full model. fp32 is never TF32."""

    base_model_precision: PrecisionName = "no_change"
    """Quantization of the frozen transformer: the Linears of its blocks. Embedders, modulation, norms, the last layer
    and adapters stay in `base_model_default_dtype`. `no_change` keeps fp8 and int8 weights as the file stores them."""

    text_encoder_1_precision: PrecisionName = "no_change"
    """Quantization of the text encoder: the Linears of its layers."""

    base_model_cache_dir: PathText | None = None
    """Folder that keeps the quantized base between runs, keyed by its source and precision. By default it is not
    kept."""

    quantize_via: Literal["accelerator", "cpu"] = "accelerator"
    """Device that quantizes each block as it is loaded. The whole model is never held unquantized."""

    base_model_default_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of the weights that the model computes with. By default that of `mixed_precision`, fp32 with `no`.
    Under fp16, weights of another precision are cast for each matrix product (autocast). With `model_type full` and
    16-bit weights the optimizer steps fp32 masters of the weights; `adamw_bf16` steps bf16 weights without masters."""

    gradient_checkpointing: bool = True
    """Recompute each block's activations in the backward pass instead of storing them (activation checkpointing). Takes
    much less memory and about a third more time; the result is the same."""

    gradient_checkpointing_interval: Annotated[int, Ge(2)] | None = None
    """Store the activations of every N-th block instead of recomputing them: faster, but takes more memory. By default
    all blocks recompute."""

    vae_batch_size: Count = 1
    """Images that the VAE encodes at once."""

    text_encoder_batch_size: Count = 8
    """Captions that the text encoder encodes at once. A larger batch makes text caching faster."""

    text_encoder_mode: Literal["auto", "resident", "streamed"] = "auto"
    """How to load the text encoder for caching captions: `resident` loads it whole; `streamed` loads one layer at a
    time and runs all captions through it before it loads the next. The contexts are bit-identical. `auto` takes
    `resident` if the encoder fits into free memory, and prints its choice."""

    write_batch_size: Count = 128
    """Cache files to write per flush. A text store's own value overrides it."""

    @property
    def base_dtype(self) -> Literal["bf16", "fp16", "fp32"]:
        """Dtype of the weights that the model computes with."""
        if self.base_model_default_dtype is not None:
            return self.base_model_default_dtype
        return "fp32" if self.mixed_precision == "no" else self.mixed_precision

    @property
    def text_dtype(self) -> Literal["bf16", "fp32"]:
        """Dtype of the text encoder and of cached contexts: bf16 under fp16, because hidden states can exceed fp16's
        range."""
        return "bf16" if self.base_dtype == "fp16" else self.base_dtype

    @property
    def is_autocast(self) -> bool:
        """Whether weights of another dtype are cast to fp16 for each matrix product."""
        return self.mixed_precision == "fp16" and self.base_dtype != "fp16"
