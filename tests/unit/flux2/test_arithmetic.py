"""The arithmetic of a step, against torch's own counter on the module itself."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from simpletuner.config.flavours import FLAVOURS, TransformerSpec
from simpletuner.flux2.activations import Pass
from simpletuner.flux2.arithmetic import training_flop
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer

SPEC = TransformerSpec(4, 128, 2, 3, 768, guidance_embeds=True)


def passing(**changes: object) -> Pass:
    plain = Pass(SPEC, torch.float32, batch=2, text=48, image=64)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def counted(*, learns: bool) -> int:
    """Forwards and backwards through the whole module, on the meta device."""
    with torch.device("meta"):
        model = Flux2Transformer(SPEC).requires_grad_(learns)
        image = torch.randn(2, 64, SPEC.in_channels, requires_grad=True)
        text = torch.randn(2, 48, SPEC.context_dim, requires_grad=True)
        places, text_places = torch.zeros(64, 4).long(), torch.zeros(48, 4).long()
        with FlopCounterMode(display=False) as counter:
            velocity = model(image, text, torch.rand(2), torch.ones(2), places, text_places)
            velocity.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("learns", [False, True])
def test_it_is_what_torch_counts(learns: bool) -> None:
    # Modulation and the embedders of sigma and guidance are left out; on this small model they are up to a tenth.
    assert training_flop(passing(is_full=learns)) == pytest.approx(counted(learns=learns), rel=0.1)


def test_a_step_of_dev_at_1024_is_nine_tenths_of_a_petaflop() -> None:
    spec = FLAVOURS["dev"].transformer
    step = Pass(spec, torch.bfloat16, batch=1, text=512, image=4096, recomputed=(True,) * spec.blocks)
    assert training_flop(step) == pytest.approx(0.9e15, rel=0.1)


def test_recomputing_costs_a_forward_pass() -> None:
    forward = training_flop(passing(recomputed=(True,) * SPEC.blocks)) - training_flop(passing())
    assert 0.3 < forward / training_flop(passing()) < 0.5


def test_routes_that_keep_all_change_nothing_and_others_take_off() -> None:
    assert training_flop(passing(routes=(Route(1, 3, 1.0),))) == training_flop(passing())
    assert training_flop(passing(routes=(Route(1, 3, 0.5),))) < training_flop(passing())


def test_it_grows_with_the_batch() -> None:
    assert training_flop(passing(batch=6)) == 3 * training_flop(passing())
