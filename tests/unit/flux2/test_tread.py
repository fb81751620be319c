import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.flavours import TINY
from simpletuner.config.run import RunConfig
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.routes import Route, resolve
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choice, draw_choices, gather_tokens

SNIPPETS = Path(__file__).parents[2] / "fixtures" / "quickstart"
HALF = Route(1, 2, 0.5)


def test_a_choice_depends_on_seed_step_slot_and_route_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = draw_choice(0, 7, 3, 0, 64, 32)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, draw_choice(0, 7, 3, 0, 64, 32))
    for other in ((1, 7, 3, 0), (0, 8, 3, 0), (0, 7, 4, 0), (0, 7, 3, 1)):
        assert not torch.equal(one, draw_choice(*other, 64, 32))


def test_a_sample_keeps_its_choice_however_the_batch_is_cut() -> None:
    (whole,) = draw_choices([HALF], 0, 5, range(4), 20)
    (first,) = draw_choices([HALF], 0, 5, range(2), 20)
    (second,) = draw_choices([HALF], 0, 5, range(2, 4), 20)
    assert torch.equal(whole.kept_tokens, torch.cat([first.kept_tokens, second.kept_tokens]))


def test_places_rise_and_are_all_equally_likely() -> None:
    kept = draw_choices([Route(0, 0, 0.25)], 0, 1, range(4000), 8)[0].kept_tokens
    assert kept.shape == (4000, 2)
    assert (kept[:, 1] > kept[:, 0]).all()
    counts = torch.bincount(kept.flatten(), minlength=8) / 4000
    assert counts.tolist() == pytest.approx([0.25] * 8, abs=0.03)
    pairs = torch.bincount(kept[:, 0] * 8 + kept[:, 1], minlength=64) / 4000
    assert pairs[pairs > 0].tolist() == pytest.approx([1 / 28] * 28, abs=0.015)


def test_two_routes_choose_apart() -> None:
    one, other = draw_choices([Route(0, 1, 0.5), Route(2, 3, 0.5)], 0, 1, [0], 64)
    assert not torch.equal(one.kept_tokens, other.kept_tokens)


def test_a_route_that_keeps_all_is_left_out() -> None:
    assert draw_choices([Route(0, 1, 1.0), Route(2, 3, 0.999)], 0, 1, [0], 16) == ()


def test_forced_tokens_are_always_kept_and_every_sample_keeps_as_many() -> None:
    force = torch.zeros(3, 16, dtype=torch.bool)
    force[0, [0, 5, 15]] = True
    force[2, 7] = True
    for step in range(20):
        (choice,) = draw_choices([HALF], 0, step, range(3), 16, force)
        assert choice.kept_tokens.shape == (3, 8)
        assert {0, 5, 15} <= set(choice.kept_tokens[0].tolist())
        assert 7 in choice.kept_tokens[2]
        assert all(len(set(row.tolist())) == 8 for row in choice.kept_tokens)
    force[1, :12] = True
    (choice,) = draw_choices([HALF], 0, 0, range(3), 16, force)
    assert choice.kept_tokens.shape == (3, 12)
    assert choice.kept_tokens[1].tolist() == list(range(12))
    assert draw_choices([HALF], 0, 0, range(3), 16, torch.ones(3, 16, dtype=torch.bool)) == ()


def test_what_is_forced_changes_nothing_else() -> None:
    """The others keep the order in which they were drawn."""
    free = draw_choice(0, 1, 0, 0, 16, 8).tolist()
    force = torch.zeros(16, dtype=torch.bool)
    force[free[0]] = True
    assert draw_choice(0, 1, 0, 0, 16, 8, force).tolist() == free


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Denoiser(Flux2Transformer(TINY).train())


def lengths(denoiser: Denoiser, routes: tuple[Route, ...]) -> list[int]:
    """How many image tokens each block sees, of 4 × 6."""
    seen: list[int] = []

    def look(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        is_double = block in list(denoiser.transformer.transformer_blocks)
        seen.append(inputs[1].shape[1] if is_double else inputs[0].shape[1] - 5)

    hooks = [block.register_forward_pre_hook(look) for block in denoiser.transformer.blocks]
    ask(denoiser, routes)
    for hook in hooks:
        hook.remove()
    return seen


def ask(denoiser: Denoiser, routes: tuple[Route, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 128, 4, 6, generator=generator)
    context = torch.randn(2, 5, TINY.context_dim, generator=generator)
    condition = Condition.at(TextContext.dense(context), 1.0)
    return denoiser.routed(draw_choices(routes, 0, 1, [0, 1], 24))(latents, torch.full((2,), 0.4), condition)


@pytest.mark.parametrize(
    ("snippet", "expected"),
    [
        ("tread-start2.json", [24, 24, 12, 12, 12, 12, 12, 24]),
        ("tread-start4.json", [24, 24, 24, 24, 12, 24, 24, 24]),
    ],
)
def test_the_quickstarts_routes_do_what_they_say(denoiser: Denoiser, snippet: str, expected: list[int]) -> None:
    config = RunConfig.model_validate(json.loads((SNIPPETS / snippet).read_bytes()))
    assert lengths(denoiser, resolve(config.tread_routes, TINY.blocks)) == expected


def test_a_route_may_cross_and_others_may_follow(denoiser: Denoiser) -> None:
    routes = (Route(1, 3, 0.5), Route(4, 4, 0.25), Route(6, 7, 1.0))
    assert lengths(denoiser, routes) == [24, 12, 12, 12, 6, 24, 24, 24]


def test_a_pass_without_gradients_is_routed_as_one_with(denoiser: Denoiser) -> None:
    expected = ask(denoiser, (HALF,))
    with torch.no_grad():
        assert torch.equal(ask(denoiser, (HALF,)), expected)


def test_no_route_and_one_that_keeps_all_change_no_bit(denoiser: Denoiser) -> None:
    plain = ask(denoiser, ())
    assert torch.equal(plain, ask(denoiser, (Route(0, 7, 1.0),)))
    assert not torch.equal(plain, ask(denoiser, (HALF,)))


def some(dtype: torch.dtype, tokens: int = 24, keep: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens of three samples, the last ones of a longer sequence, and places."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, tokens + 5, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.stack([torch.randperm(tokens, generator=generator)[:keep].sort().values for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_taken_tokens_and_their_gradients_are_those_of_torchs_gather(dtype: torch.dtype) -> None:
    x, places = some(dtype)
    ours, theirs = gather_tokens(x[:, 5:], places), x[:, 5:].take_along_dim(places[..., None], dim=1)
    assert torch.equal(ours, theirs)
    weight = torch.randn(ours.shape).to(dtype)
    found, expected = (torch.autograd.grad((out * weight).sum(), x)[0] for out in (ours, theirs))
    assert torch.equal(found, expected)
    assert not torch.equal(found, torch.zeros_like(found))


def test_the_gradient_of_taken_tokens_adds_nothing() -> None:
    x, places = some(torch.bfloat16)
    with torch.profiler.profile() as profile:
        gather_tokens(x, places).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::scatter_" in names
    assert not {name for name in names if "scatter_add" in name or "index_add" in name}


def test_gradcheck_of_taken_tokens() -> None:
    x, places = some(torch.float64, tokens=5, keep=3)
    assert torch.autograd.gradcheck(lambda x: gather_tokens(x, places), x)


COMPILED = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from simpletuner.flux2.tread import gather_tokens

counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(gather_tokens, backend=counter, fullgraph=True, dynamic=True)
for tokens, keep in ((24, 9), (30, 12), (17, 16)):
    x, places = torch.randn(3, tokens, 8, requires_grad=True), torch.stack([torch.randperm(tokens)[:keep]] * 3)
    found, expected = compiled(x, places), gather_tokens(x, places)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)))
assert counter.frame_count == 1, counter.frame_count
"""


@pytest.mark.slow
def test_taken_tokens_compile_once_for_all_sizes() -> None:
    """In a process of its own: the shapes that tests check cannot be compiled."""
    done = subprocess.run([sys.executable, "-P", "-c", COMPILED], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
