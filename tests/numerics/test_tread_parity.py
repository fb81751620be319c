"""TREAD against a plain loop: sample by sample, token by token, gathered and put back by hand."""

import pytest
import torch
from tests.tiers import others_slow
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.flow.choice import TokenChoice
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.rotary import rotary
from simpletuner.flux2.routes import Route
from simpletuner.flux2.tokens import context_ids, image_ids
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import recompute

SPEC = TransformerSpec(
    heads=2, head_dim=32, double_blocks=3, single_blocks=4, context_dim=24, guidance_embeds=True, axes=(8, 8, 8, 8)
)
HEIGHT, WIDTH, LENGTH = 3, 5, 4
PLACES = {
    "in the doubles": [Route(1, 2, 0.5)],
    "in the singles": [Route(4, 5, 0.5)],
    "across": [Route(1, 5, 0.4)],
    "over all": [Route(0, 6, 0.25)],
    "from the first single": [Route(3, 6, 0.6)],
    "two": [Route(0, 1, 0.3), Route(2, 4, 0.7)],
    "three, end to end": [Route(0, 0, 0.5), Route(1, 3, 0.8), Route(4, 6, 0.2)],
}


def model() -> tuple[Flux2Transformer, Adapter]:
    """A model whose adapter already does something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = Flux2Transformer(SPEC).requires_grad_(False)
        adapter = attach(transformer, LoraOptions(lora_rank=2), seed=0)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return transformer.train(), adapter


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, HEIGHT * WIDTH, 128, generator=generator)
    context = torch.randn(2, LENGTH, SPEC.context_dim, generator=generator)
    return tokens, context, torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.5])


def plain_loop(
    transformer: Flux2Transformer,
    tokens: Tensor,
    context: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    choices: tuple[TokenChoice, ...],
) -> Tensor:
    """The same, written as the paper says it, for one sample after the other."""
    answers = []
    for sample in range(len(tokens)):
        one = slice(sample, sample + 1)
        vector = transformer.time_guidance_embed(sigma[one], guidance[one])
        image_modulation = transformer.double_stream_modulation_img(vector)
        text_modulation = transformer.double_stream_modulation_txt(vector)
        single_modulation = transformer.single_stream_modulation(vector)
        embedded, texts = transformer.x_embedder(tokens[one]), transformer.context_embedder(context[one])
        image = [embedded[:, place] for place in range(HEIGHT * WIDTH)]
        all_ids, text_ids = image_ids(HEIGHT, WIDTH), context_ids(LENGTH)
        for index, block in enumerate(transformer.blocks):
            places = list(range(HEIGHT * WIDTH))
            for choice in choices:
                if choice.start <= index <= choice.end:
                    places = choice.kept_tokens[sample].tolist()
            angles = rotary(torch.cat([text_ids, *(all_ids[place : place + 1] for place in places)]), SPEC.axes, 2000.0)
            kept = torch.stack([image[place] for place in places], dim=1)
            if index < SPEC.double_blocks:
                texts, kept = block(texts, kept, text_modulation, image_modulation, angles)
            else:
                joint = block(torch.cat([texts, kept], dim=1), single_modulation, angles)
                texts, kept = joint[:, :LENGTH], joint[:, LENGTH:]
            for column, place in enumerate(places):
                image[place] = kept[:, column]
        answers.append(transformer.proj_out(transformer.norm_out(torch.stack(image, dim=1), vector)))
    return torch.cat(answers)


def with_gradients(answer: Tensor, adapter: Adapter) -> dict[str, Tensor]:
    """The answer, and the gradient of each adapter parameter for a loss over all tokens."""
    target = torch.randn(answer.shape, generator=torch.Generator().manual_seed(2))
    (answer - target).square().sum().backward()
    found = {"velocity": answer.detach()}
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
        parameter.grad = None
    return found


def asked(transformer: Flux2Transformer, choices: tuple[TokenChoice, ...], *, per_sample_ids: bool = False) -> Tensor:
    ids, text_ids = image_ids(HEIGHT, WIDTH), context_ids(LENGTH)
    if per_sample_ids:
        ids, text_ids = ids.expand(2, -1, -1), text_ids.expand(2, -1, -1)
    answer: Tensor = transformer(*inputs(), ids, text_ids, choices)
    return answer


@pytest.mark.parametrize("routes", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("recomputed", others_slow([False, True], True), ids=["kept", "recomputed"])
def test_velocity_and_every_gradient_are_those_of_the_plain_loop(routes: list[Route], recomputed: bool) -> None:
    choices = draw_choices(routes, seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH)
    assert len(choices) == len(routes)
    assert not torch.equal(choices[0].kept_tokens[0], choices[0].kept_tokens[1])
    transformer, adapter = model()
    expected = with_gradients(plain_loop(transformer, *inputs(), choices), adapter)
    if recomputed:
        recompute.install(transformer.blocks)
    found = with_gradients(asked(transformer, choices), adapter)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
    assert all(value.abs().max() > 0 for value in found.values())


@pytest.mark.parametrize("routes", PLACES.values(), ids=PLACES)
def test_one_table_of_positions_is_the_same_as_one_a_sample(routes: list[Route]) -> None:
    choices = draw_choices(routes, seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH)
    transformer, _ = model()
    assert torch.equal(asked(transformer, choices), asked(transformer, choices, per_sample_ids=True))


def test_recomputing_changes_no_bit() -> None:
    choices = draw_choices(PLACES["across"], seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH)
    transformer, adapter = model()
    plain = with_gradients(asked(transformer, choices), adapter)
    recompute.install(transformer.blocks)
    again = with_gradients(asked(transformer, choices), adapter)
    assert all(torch.equal(again[name], value) for name, value in plain.items())


def test_keeping_all_by_way_of_a_route_changes_no_bit() -> None:
    """The draw leaves such a route out; gathering all tokens in their order would be as exact."""
    assert draw_choices([Route(1, 5, 1.0)], seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH) == ()
    everything = TokenChoice(1, 5, torch.arange(HEIGHT * WIDTH).expand(2, -1))
    transformer, adapter = model()
    plain = with_gradients(asked(transformer, ()), adapter)
    routed = with_gradients(asked(transformer, (everything,)), adapter)
    assert torch.equal(plain["velocity"], routed["velocity"])
    assert all(torch.equal(routed[name], value) for name, value in plain.items())


def test_what_goes_around_comes_back_unchanged() -> None:
    """With the route's blocks replaced by noise-makers, the tokens that went around do not notice."""
    (choice,) = draw_choices([Route(3, 6, 0.5)], seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH)
    transformer, _ = model()
    before = asked(transformer, (choice,)).detach()
    for block in transformer.single_transformer_blocks:
        block.forward = lambda x, *_: x + 1
    after = asked(transformer, (choice,)).detach()
    for sample in range(2):
        kept = set(choice.kept_tokens[sample].tolist())
        for place in range(HEIGHT * WIDTH):
            assert torch.equal(before[sample, place], after[sample, place]) == (place not in kept)


def test_under_autocast_the_types_agree() -> None:
    (choice,) = draw_choices([Route(1, 5, 0.5)], seed=0, step=1, slots=[0, 1], tokens=HEIGHT * WIDTH)
    transformer, adapter = model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = asked(transformer.bfloat16(), (choice,))
    with_gradients(answer.float(), adapter)
