"""Components in single files as Black Forest Labs and ComfyUI publish them, made from those of a diffusers folder.

Written for the tests from the description of both layouts: no table of the program's is used.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_VAE_ENDS = {
    "quant_conv": "encoder.quant_conv",
    "post_quant_conv": "decoder.post_quant_conv",
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def bfl_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' VAE as `ae.safetensors` has it, without the count of batches, which may be missing there."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up_blocks."))
    found = {}
    for name, tensor in tensors.items():
        if name == "bn.num_batches_tracked":
            continue
        module, _, leaf = name.rpartition(".")
        module = _VAE_ENDS.get(module, module)
        half, _, rest = module.partition(".")
        fields = rest.split(".")
        if fields[0] == "mid_block" and fields[1] == "resnets":
            module = f"{half}.mid.block_{int(fields[2]) + 1}.{fields[3]}"
        elif fields[0] == "mid_block":
            module = f"{half}.mid.attn_1.{_ATTENTION['.'.join(fields[3:])]}"
        elif fields[0] in ("down_blocks", "up_blocks"):
            side = fields[0].removesuffix("_blocks")
            level = int(fields[1]) if side == "down" else levels - 1 - int(fields[1])
            part = "nin_shortcut" if fields[-1] == "conv_shortcut" else fields[-1]
            place = f"block.{fields[3]}.{part}" if fields[2] == "resnets" else f"{side}sample.conv"
            module = f"{half}.{side}.{level}.{place}"
        is_projection = fields[0] == "mid_block" and tensor.dim() == 2
        found[f"{module}.{leaf}"] = (tensor[:, :, None, None] if is_projection else tensor).clone()
    return found


def comfyui_text_encoder(tensors: Mapping[str, Tensor], layers: int | None = None) -> dict[str, Tensor]:
    """A text encoder as ComfyUI has it: no `language_model.`, the first `layers` alone without the final norm and with
    Mistral's vocabulary in bytes, where given.
    """
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(("vision_tower", "multi_modal_projector", "model.vision", "model.multi_modal")):
            short = name.removeprefix("language_model.")
            found[short if short.startswith(("model.", "lm_head")) else f"model.{short}"] = tensor
    if layers is None:
        return found
    late = [f"model.layers.{index}." for index in range(layers, 100)]
    kept = {name: tensor for name, tensor in found.items() if not name.startswith((*late, "model.norm", "lm_head"))}
    tekken = json.dumps({"config": {}, "vocab": []}).encode()
    return kept | {"tekken_model": torch.frombuffer(bytearray(tekken), dtype=torch.uint8)}


def in_fp8(tensors: Mapping[str, Tensor], *, is_old: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`tensors` with the layers' matrices in ComfyUI's scaled fp8, in the older or the newer spelling, and what they
    stand for in fp32.
    """
    stored, dense = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.dim() == 2:
            layer = name.removesuffix(".weight")
            scale = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            stored[f"{layer}.{'scale_weight' if is_old else 'weight_scale'}"] = scale
            dense[name] = stored[name].float() * scale
            if not is_old:
                marker = json.dumps({"format": "float8_e4m3fn"}).encode()
                stored[f"{layer}.comfy_quant"] = torch.frombuffer(bytearray(marker), dtype=torch.uint8)
    return stored | ({"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)} if is_old else {}), dense


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` under names that begin with `prefix`."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def component_tensors(folder: Path, component: str) -> dict[str, Tensor]:
    """The tensors of a component of a diffusers folder whose weights are one file."""
    (file,) = (folder / component).glob("*.safetensors")
    return load_file(file)


def write(path: Path, *parts: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """One file with all `parts`; returns its path."""
    save_file({name: tensor for part in parts for name, tensor in part.items()}, path, dict(metadata or {}))
    return path
