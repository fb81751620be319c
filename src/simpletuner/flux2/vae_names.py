"""Map a VAE's tensor names from BFL's files (`ae.safetensors`, ComfyUI's `flux2-vae.safetensors`) to diffusers'."""

import re
from collections.abc import Iterable

from simpletuner.flux2.names import RenamedTensor, TensorRenaming, as_matrix

_LEVEL = re.compile(r"(?:encoder\.down|decoder\.up)\.(\d+)\.")
_BLOCK = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.block\.(\d+)\.(norm1|conv1|norm2|conv2|nin_shortcut)")
_RESAMPLER = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(downsample|upsample)\.conv")
_MIDDLE = re.compile(r"(encoder|decoder)\.mid\.block_([12])\.(norm1|conv1|norm2|conv2)")
_ATTENTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(\w+)")
_ATTENTION_PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PLAIN = {
    "encoder.quant_conv": "quant_conv",
    "decoder.post_quant_conv": "post_quant_conv",
    **{f"{half}.{ends}": f"{half}.{ends}" for half in ("encoder", "decoder") for ends in ("conv_in", "conv_out")},
    **{f"{half}.norm_out": f"{half}.conv_norm_out" for half in ("encoder", "decoder")},
}
_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


def vae_renaming(names: Iterable[str]) -> TensorRenaming:
    """The renaming for a VAE file with tensors `names`: from BFL's; diffusers' names stay unchanged."""
    levels = [int(match[1]) for match in map(_LEVEL.match, names) if match]
    if not levels:
        return lambda name: RenamedTensor((name,))
    return lambda name: _from_bfl(name, max(levels) + 1)


def _from_bfl(name: str, levels: int) -> RenamedTensor | None:
    """Diffusers' name for the tensor `name` of a BFL file whose VAE has `levels`; None if there is no such tensor."""
    if name in _STATISTICS:
        return RenamedTensor((name,))
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    attention = _ATTENTION.fullmatch(module)
    if attention is not None and attention[2] in _ATTENTION_PARTS:
        diffusers_name = f"{attention[1]}.mid_block.attentions.0.{_ATTENTION_PARTS[attention[2]]}.{leaf}"
        return RenamedTensor((diffusers_name,), as_matrix)
    renamed = _module_from_bfl(module, levels)
    return None if renamed is None else RenamedTensor((f"{renamed}.{leaf}",))


def _module_from_bfl(module: str, levels: int) -> str | None:
    if module in _PLAIN:
        return _PLAIN[module]
    if match := _BLOCK.fullmatch(module):
        part = "conv_shortcut" if match[4] == "nin_shortcut" else match[4]
        return f"{_level(match[1], int(match[2]), levels)}.resnets.{match[3]}.{part}"
    if match := _RESAMPLER.fullmatch(module):
        return f"{_level(match[1], int(match[2]), levels)}.{match[3]}rs.0.conv"
    if match := _MIDDLE.fullmatch(module):
        return f"{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}"
    return None


def _level(half: str, index: int, levels: int) -> str:
    """Diffusers' name of a level.

    BFL counts levels from the largest resolution in both halves; diffusers counts the decoder's in execution order.
    """
    return f"{half}_blocks.{index if half == 'encoder.down' else levels - 1 - index}"
