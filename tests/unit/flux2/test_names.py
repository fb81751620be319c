import pytest
import torch

from simpletuner.config.flavours import DEV
from simpletuner.flux2.names import from_bfl, text_encoder_name, transformer_renaming
from simpletuner.flux2.transformer import Flux2Transformer

D = DEV.hidden


def bfl_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of BFL's FLUX.2-dev file, written out from its description."""
    shapes: dict[str, tuple[int, ...]] = {
        "img_in.weight": (D, 128),
        "txt_in.weight": (D, 15360),
        "double_stream_modulation_img.lin.weight": (6 * D, D),
        "double_stream_modulation_txt.lin.weight": (6 * D, D),
        "single_stream_modulation.lin.weight": (3 * D, D),
        "final_layer.adaLN_modulation.1.weight": (2 * D, D),
        "final_layer.linear.weight": (128, D),
    }
    for part in ("time_in", "guidance_in"):
        shapes |= {f"{part}.in_layer.weight": (D, 256), f"{part}.out_layer.weight": (D, D)}
    for index in range(8):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            shapes |= {
                f"{block}_attn.qkv.weight": (3 * D, D),
                f"{block}_attn.proj.weight": (D, D),
                f"{block}_attn.norm.query_norm.scale": (128,),
                f"{block}_attn.norm.key_norm.scale": (128,),
                f"{block}_mlp.0.weight": (6 * D, D),
                f"{block}_mlp.2.weight": (D, 3 * D),
            }
    for index in range(48):
        block = f"single_blocks.{index}"
        shapes |= {
            f"{block}.linear1.weight": (9 * D, D),
            f"{block}.linear2.weight": (D, 4 * D),
            f"{block}.norm.query_norm.scale": (128,),
            f"{block}.norm.key_norm.scale": (128,),
        }
    return shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_bfls_file_is_the_whole_transformer(prefix):
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in Flux2Transformer(DEV).state_dict().items()}
    found = {}
    for name, shape in bfl_shapes().items():
        renamed = from_bfl(prefix + name)
        found |= dict(zip(renamed.names, renamed.shapes(shape), strict=True))
    assert found == expected
    assert transformer_renaming(prefix + name for name in bfl_shapes()) is from_bfl


def test_fused_rows_are_query_key_value():
    fused = torch.arange(6.0)[:, None]
    renamed = from_bfl("double_blocks.3.txt_attn.qkv.weight")
    assert [name.rsplit(".", 2)[1] for name in renamed.names] == ["add_q_proj", "add_k_proj", "add_v_proj"]
    assert [part[:, 0].tolist() for part in renamed.split(fused)] == [[0, 1], [2, 3], [4, 5]]


def test_the_last_modulation_has_its_halves_swapped():
    renamed = from_bfl("final_layer.adaLN_modulation.1.weight")
    (swapped,) = renamed.split(torch.arange(4.0)[:, None])
    assert renamed.names == ("norm_out.linear.weight",)
    assert swapped[:, 0].tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "img_in.bias",
        "img_in.scale_weight",
        "vector_in.in_layer.weight",
        "double_blocks.0.img_mod.lin.weight",
        "single_blocks.0.modulation.lin.weight",
    ],
)
def test_what_flux2_does_not_have_is_unknown(name):
    assert from_bfl(name) is None


def test_diffusers_names_may_have_comfyuis_prefix():
    for name in ("transformer_blocks.0.ff.linear_in.weight", "single_transformer_blocks.0.attn.to_out.weight"):
        for prefix in ("", "model.diffusion_model."):
            assert transformer_renaming([prefix + name])(prefix + name).names == (name,)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
def test_text_encoder_names(prefix):
    assert text_encoder_name(f"{prefix}embed_tokens.weight", 30) == "embed_tokens.weight"
    inner = "layers.29.self_attn.q_proj.weight"
    assert text_encoder_name(prefix + inner, 30) == inner
    assert text_encoder_name(f"{prefix}layers.30.self_attn.q_proj.weight", 30) is None
    assert text_encoder_name(f"{prefix}norm.weight", 30) is None


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "language_model.lm_head.weight",
        "vision_tower.transformer.layers.0.attention.q_proj.weight",
        "model.vision_tower.transformer.layers.0.attention.q_proj.weight",
        "model.multi_modal_projector.linear_1.weight",
    ],
)
def test_text_needs_no_head_and_no_eyes(name):
    assert text_encoder_name(name, 30) is None
