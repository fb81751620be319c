"""The moving average of an adapter."""

import pytest
import torch
from torch import nn

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.ema import EmaOptions
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.lora import Adapter, LoraLinear
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.train.ema import Ema

CPU = torch.device("cpu")
SPEC = TransformerSpec(
    heads=1, head_dim=8, double_blocks=1, single_blocks=1, context_dim=8, guidance_embeds=True, axes=(2, 2, 2, 2)
)


def adapter() -> Adapter:
    layer = LoraLinear(nn.Linear(3, 2, bias=False), torch.ones(1, 3), torch.zeros(2, 1), scale=1.0)
    return Adapter({"x": layer}, target="custom", alpha=1.0)


def average(live: Adapter, **options: object) -> Ema:
    return Ema(live, EmaOptions(use_ema=True, **options), CPU)  # type: ignore[arg-type]


def put(live: Adapter, value: float) -> None:
    live.load({name: torch.full_like(tensor, value) for name, tensor in live.state().items()})


def test_it_is_the_sum_of_the_past_with_falling_weights() -> None:
    live = adapter()
    ema = average(live, ema_decay=0.9)
    expected = 0.0
    for step in range(1, 11):
        put(live, float(step))
        ema.update(step)
        expected = 0.9 * expected + 0.1 * step
    assert ema.state()["x.b"].flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_without_decay_it_is_the_live_adapter_to_the_sign_of_a_zero() -> None:
    live = adapter()
    ema = average(live, ema_decay=0.0)
    for value in (0.3, -0.0, 1e-38):
        put(live, value)
        ema.update(1)
        for name, tensor in live.state().items():
            assert ema.state()[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_it_takes_every_nth_step() -> None:
    live = adapter()
    ema = average(live, ema_decay=0.0, ema_update_interval=3)
    seen = []
    for step in range(1, 8):
        put(live, float(step))
        ema.update(step)
        seen.append(ema.state()["x.b"][0, 0].item())
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_applied_and_taken_back_the_adapter_has_its_bits() -> None:
    live = adapter()
    ema = average(live)
    put(live, 0.1)
    with ema.applied():
        assert torch.equal(live.state()["x.a"], torch.ones(1, 3))
    assert torch.equal(live.state()["x.a"], torch.full((1, 3), 0.1))


def test_it_owns_its_memory_and_refuses_anothers() -> None:
    live = adapter()
    ema = average(live)
    put(live, 5.0)
    assert torch.equal(ema.state()["x.b"], torch.zeros(2, 1))
    with pytest.raises(ValueError, match="not a moving average"):
        ema.load({})


def test_it_lies_where_it_is_told_and_not_where_the_weights_are() -> None:
    ema = Ema(adapter(), EmaOptions(use_ema=True), torch.device("meta"))
    assert all(tensor.is_meta and tensor.dtype == torch.float32 for tensor in ema.state().values())


def test_the_average_of_bf16_weights_is_fp32() -> None:
    """Half of the way from 1 to bf16's next number has no place in bf16."""
    with torch.device("meta"):
        transformer = Flux2Transformer(SPEC)
    transformer = transformer.to_empty(device="cpu").bfloat16()
    full = unfreeze(transformer)
    full.load({name: torch.ones_like(tensor) for name, tensor in full.state().items()})
    ema = Ema(full, EmaOptions(use_ema=True, ema_decay=0.5), CPU)
    full.load({name: torch.full_like(tensor, 1 + 2**-7) for name, tensor in full.state().items()})
    ema.update(1)
    assert {tensor.dtype for tensor in ema.state().values()} == {torch.float32}
    assert all((tensor == 1 + 2**-8).all() for tensor in ema.state().values())
    with ema.applied():
        assert all((tensor == 1).all() for tensor in full.state().values())  # rounded to even
    assert all((tensor == 1 + 2**-7).all() for tensor in full.state().values())
