"""All weights of a transformer as what is trained."""

import pytest
import torch
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2.full import FullModel, unfreeze
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=2, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
MASTERS = pytest.mark.parametrize("masters", [None, torch.bfloat16], ids=["plain", "masters"])


def model(masters: torch.dtype | None = None) -> FullModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return unfreeze(Flux2Transformer(SPEC), masters)


def other(of: FullModel) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1 + 2**-12) for name, tensor in of.state().items()}


@MASTERS
def test_every_weight_learns_in_fp32(masters: torch.dtype | None) -> None:
    full = model(masters)
    weights = dict(full.transformer.named_parameters())
    assert dict(full.named_parameters()).keys() == weights.keys()
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in full.parameters())
    assert all(weight.requires_grad and weight.dtype == (masters or torch.float32) for weight in weights.values())
    assert full.disabled() is None


@MASTERS
def test_what_is_held_for_a_while_leaves_no_bit(masters: torch.dtype | None) -> None:
    full = model(masters)
    before = {name: weight.detach().clone() for name, weight in full.transformer.named_parameters()}
    state = {name: tensor.clone() for name, tensor in full.state().items()}
    with full.with_weights(other(full)):
        inside = {name: weight.detach().clone() for name, weight in full.transformer.named_parameters()}
    assert all(tensor.unique().item() == torch.tensor(1 + 2**-12).to(tensor.dtype) for tensor in inside.values())
    assert all(torch.equal(weight, before[name]) for name, weight in full.transformer.named_parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in full.state().items())


@MASTERS
def test_what_is_loaded_reaches_the_weights(masters: torch.dtype | None) -> None:
    full = model(masters)
    full.load(other(full))
    assert all((tensor == 1 + 2**-12).all() for tensor in full.state().values())
    expected = torch.tensor(1 + 2**-12).to(masters or torch.float32)
    assert all((weight == expected).all() for weight in full.transformer.parameters())


def test_another_models_weights_are_refused() -> None:
    full = model()
    state = full.state()
    with pytest.raises(ValueError, match="1 names differ, such as more"):
        full.load(state | {"more": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"x_embedder\.weight is \(2, 2\)"):
        full.load(state | {"x_embedder.weight": torch.zeros(2, 2)})


def test_weights_have_three_roles() -> None:
    full = model()
    inner, outer, scales = full.by_role()
    names = {id(parameter): name for name, parameter in full.named_parameters()}
    assert len(inner) + len(outer) + len(scales) == len(names)
    assert all(parameter.ndim == 2 and "transformer_blocks." in names[id(parameter)] for parameter in inner)
    assert {names[id(parameter)].split(".")[0] for parameter in outer} == {
        "time_guidance_embed", "double_stream_modulation_img", "double_stream_modulation_txt",
        "single_stream_modulation", "x_embedder", "context_embedder", "norm_out", "proj_out",
    }  # fmt: skip
    assert all("norm" in names[id(parameter)] for parameter in scales)


def test_the_audit_counts_weights_and_masters() -> None:
    plain, mastered = model().audit(), model(torch.bfloat16).audit()
    count = plain["parameters"]
    assert (plain["dtype"], plain["weight_bytes"], plain["master_bytes"]) == ("float32", 4 * count, 0)
    assert (mastered["dtype"], mastered["weight_bytes"], mastered["master_bytes"]) == ("bfloat16", 2 * count, 4 * count)
    assert sum(kind["parameters"] for kind in plain["kinds"]) == count
    singles = [kind for kind in plain["kinds"] if kind["name"] == "single_transformer_blocks.*.attn.to_out.weight"]
    assert [kind["tensors"] for kind in singles] == [2]
