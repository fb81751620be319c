"""Which formats of weights can be loaded: known from the headers of the files, before anything is loaded."""

from pathlib import Path

from simpletuner.base.errors import AccessError
from simpletuner.base.tensorfile import TensorEntry, read_header, read_metadata

_SCALE_ENDINGS = (".comfy_quant", ".weight_scale", ".weight_scale_2", ".scale_weight", ".scale_input", ".input_scale")
_BITSANDBYTES = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_QUANTIZATION_METADATA = "_quantization_metadata"


def check_format(files: tuple[Path, ...], plain: str | None = None) -> None:
    """Raise an AccessError unless all `files` are whole safetensors files of weights that are not quantized, such as
    the Hub's repository `plain` has.
    """
    for file in files:
        entries = read_header(file)
        found = _quantized_format(entries, read_metadata(file))
        if found is not None:
            raise AccessError.of(
                f"{file} holds {found}",
                "weights in bf16, fp16 or fp32",
                f"Name the file that is not quantized{f', such as that of {plain}' if plain else ''}: "
                "base_model_precision and text_encoder_1_precision quantize it as it is loaded.",
            )


def _quantized_format(entries: dict[str, TensorEntry], metadata: dict[str, str]) -> str | None:
    """What people call the quantized format of a file; None for a plain one."""
    dtypes = {entry.dtype for name, entry in entries.items() if name.endswith("weight")}
    if any(name.endswith(_BITSANDBYTES) for name in entries):
        return "weights quantized by bitsandbytes"
    if (
        _QUANTIZATION_METADATA in metadata
        or any(name.rpartition(".")[2] == "scaled_fp8" for name in entries)
        or any(name.endswith(_SCALE_ENDINGS) for name in entries)
    ):
        stored = next((text for name, text in _STORED_IN.items() if name in dtypes), "quantized weights")
        return f"{stored} with scales, as ComfyUI writes them"
    return next((f"{text} without scales" for name, text in _STORED_IN.items() if name in dtypes), None)


_STORED_IN = {
    "F8_E4M3": "fp8 weights (e4m3)",
    "F8_E5M2": "fp8 weights (e5m2)",
    "F4": "4-bit weights (fp4)",
    "I8": "int8 weights",
    "U8": "4-bit weights (packed into bytes)",
}
"""By the dtype of the stored weights, the one that tells most first."""
