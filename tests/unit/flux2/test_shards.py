"""A transformer whose frozen weights are sharded computes what it computes whole, to the bit."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tests.ranks import in_ranks
from torch import Tensor

from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.ranks import RankOptions
from simpletuner.config.options.rollout import RolloutOptions
from simpletuner.config.precisions import PRECISIONS
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flow.loss import squared
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.routes import Route
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.flux2.tread import draw_choices
from simpletuner.memory import compile as compilation
from simpletuner.memory import recompute
from simpletuner.memory.precision import quantizable_linears, quantized
from simpletuner.memory.shard import Sharding, idle_pass, is_sharded, local_bytes, shard
from simpletuner.memory.world import World
from simpletuner.train.preservation import Preservation
from simpletuner.train.rollout import Rollout
from simpletuner.train.step import Objective, Stepper

SPEC = TransformerSpec(
    heads=2, head_dim=32, axes=(8, 8, 8, 8), double_blocks=2, single_blocks=2, context_dim=48, guidance_embeds=True
)
OUTSIDE = ("proj_out", "x_embedder", "double_stream_modulation_img.linear", "attn.to_q")
FORWARD = SPEC.blocks + 1
"""All-gathers of a forward pass: one for each block, and one for what is outside of them."""

GATHER = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
"""What FSDP calls: the one since torch 2.13, the other before."""
OTHERS = ("all_gather", "all_reduce", "broadcast", "reduce_scatter_single", "reduce_scatter_tensor")
COLLECTIVES = (GATHER, *(name for name in OTHERS if hasattr(torch.distributed, name)))


def base(precision: str = "no_change", dtype: torch.dtype = torch.float32, blocks: int = 2) -> Flux2Transformer:
    torch.manual_seed(0)
    transformer = Flux2Transformer(replace(SPEC, double_blocks=blocks, single_blocks=blocks)).to(dtype)
    if precision != "no_change":
        for name, linear in quantizable_linears(
            transformer, ("transformer_blocks.", "single_transformer_blocks."), precision
        ).items():
            transformer.set_submodule(name, quantized(linear, precision))
    return transformer.requires_grad_(False)


def adapted(transformer: Flux2Transformer, **options: Any) -> Adapter:
    """An adapter that changes what `transformer` computes."""
    adapter = attach(transformer, LoraOptions(flux_lora_target="all", lora_rank=4, **options), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    adapter.to(torch.device("cpu"))
    transformer.train()
    return adapter


def a_batch(slots: range, rollout: Rollout | None = None, step: int = 1, routes: tuple[Route, ...] = ()) -> Batch:
    count = len(slots)
    generator = torch.Generator().manual_seed(slots.start)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sigma = torch.rand(count, generator=generator)
    return Batch(
        latents=normal(count, 128, 4, 4),
        condition=Condition(TextContext.dense(normal(count, 8, SPEC.context_dim)), torch.ones(count)),
        sigma=sigma,
        noise=normal(count, 128, 4, 4),
        names=tuple(map(str, slots)),
        weights=torch.ones(count),
        slots=slots,
        rollout=None if rollout is None else rollout.starts(step, slots, sigma),
        choices=draw_choices(routes, 0, step, slots, 16),
    )


class Counter:
    """Counts collectives."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COLLECTIVES, 0)
        for name in COLLECTIVES:
            setattr(torch.distributed, name, self._counting(name, getattr(torch.distributed, name)))

    def _counting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.counts[name] += 1
            return call(*arguments, **named)

        return counted

    def take(self) -> int:
        """All-gathers since the last call; there is nothing else."""
        counts, self.counts = self.counts, dict.fromkeys(COLLECTIVES, 0)
        gathers = counts.pop(GATHER)
        assert not any(counts.values()), counts
        return gathers


def trained(
    transformer: Flux2Transformer,
    count: Callable[[], int] = lambda: 0,
    *,
    routes: tuple[Route, ...] = (),
    checkpointing: int | None = None,
    offloads: bool = False,
    backend: str | None = None,
    evaluates: bool = True,
    **lora: Any,
) -> tuple[list[Tensor], list[int]]:
    """Losses and gradients of two micro-batches after a pass without gradients, and the gathers of the three."""
    adapter = adapted(transformer, **lora)
    if backend is not None:
        compilation.install(transformer.blocks, backend=backend)
    if checkpointing is not None:
        inputs = recompute.HostInputs(torch.device("cpu")) if offloads else None
        draws = bool(lora.get("lora_dropout"))
        recompute.install(transformer.blocks, checkpointing or None, inputs=inputs, draws=draws)
    denoiser = Denoiser(transformer)
    found: list[Tensor] = []
    gathers = []
    count()
    if evaluates:
        with torch.no_grad():
            batch = a_batch(range(2))
            found.append(denoiser(batch.latents, batch.sigma, batch.condition))
        gathers.append(count())
    for slots in (range(2), range(2, 4)):
        torch.manual_seed(slots.start)
        batch = a_batch(slots, routes=routes)
        loss = denoiser.routed(batch.choices)(batch.latents, batch.sigma, batch.condition).float().square().mean()
        loss.backward()
        found.append(loss.detach())
        gathers.append(count())
    gradients = [parameter.grad for parameter in adapter.parameters()]
    return found + [gradient for gradient in gradients if gradient is not None], gathers


def compared(world: World, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each case, whether shards compute the bits of the whole, the gathers, and the share that is held."""
    count = Counter().take
    answers = {}
    for name, case in cases.items():
        options = dict(case)
        dtype = getattr(torch, options.pop("dtype", "float32"))
        made = partial(base, options.pop("precision", "no_change"), dtype, options.pop("blocks", 2))
        sharding = Sharding(world.device, *options.pop("sharding", ()))
        if "routes" in options:
            options["routes"] = tuple(Route(*route) for route in options["routes"])
        expected, _ = trained(made(), **{**options, "backend": None})
        transformer = made()
        whole = local_bytes(transformer.parameters())
        shard(transformer, transformer.blocks, sharding)
        assert is_sharded(transformer)
        share = local_bytes(transformer.parameters()) / whole
        found, gathers = trained(transformer, count, **options)
        same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
        answers[name] = {"same": all(same), "gathers": gathers, "share": round(share, 2), "tensors": len(found)}
    return answers


def assert_all_the_same(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        odd = [name for name, case in answer.items() if not case["same"]]
        assert not odd
        assert all(case["share"] == 0.5 for case in answer.values())
        assert all(case["tensors"] > 10 for case in answer.values())


def test_alone_nothing_is_sharded() -> None:
    options = RankOptions(fsdp_enable=True, fsdp_reshard_after_forward=False)
    assert Sharding.of(options, World.single()) is None
    two = World(1, 2, torch.device("cpu"))
    assert Sharding.of(RankOptions(), two) is None
    assert Sharding.of(options, two) == Sharding(two.device, reshard_after_forward=False)
    assert not is_sharded(base())


@pytest.mark.slow
def test_two_ranks_compute_the_bits_of_one_and_gather_each_block_once_a_pass() -> None:
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "kept between the passes, offloaded": {"sharding": (False, True)},
        "quantized, every second block checkpointed": {
            "precision": "int8-quanto",
            "dtype": "bfloat16",
            "checkpointing": 2,
        },
        "routed, dropped, checkpointed": {
            "routes": [(1, 2, 0.5)],
            "lora_dropout": 0.1,
            "checkpointing": 0,
            "offloads": True,
        },
        "outside of the blocks": {"peft_lora_target_modules": OUTSIDE},
    }
    answers = in_ranks(2, compared, cases)
    assert_all_the_same(answers)
    # Without gradients, then twice forward and backward. What is outside of the blocks stays to the end of backward.
    usual = [FORWARD, 2 * SPEC.blocks, FORWARD + SPEC.blocks]
    gathers = {name: case["gathers"] for name, case in answers[0].items()}
    assert gathers.pop("kept between the passes, offloaded") == [FORWARD, 0, FORWARD]
    assert gathers == dict.fromkeys(gathers, usual)
    assert answers[1] == answers[0]


@pytest.mark.slow
def test_every_precision_is_sharded_to_the_bit() -> None:
    names = [name for name, known in PRECISIONS.items() if not known.needs_accelerator]
    cases = {
        f"{name}, {dtype}": {"precision": name, "dtype": dtype} for name in names for dtype in ("float32", "bfloat16")
    }
    assert_all_the_same(in_ranks(2, compared, cases))


@pytest.mark.slow
def test_compiled_blocks_are_sharded_to_the_bit() -> None:
    case = {"backend": "eager", "checkpointing": 0, "precision": "int8-quanto", "blocks": 1, "evaluates": False}
    assert_all_the_same(in_ranks(2, compared, {"compiled": case}))


def rolled_out(world: World) -> dict[str, Any]:
    """Losses of a step in which one of two ranks has a rollout, sharded and whole; and the gathers."""
    options = RolloutOptions(scheduled_sampling_max_step_offset=60, scheduled_sampling_probability=0.5)
    count = Counter().take
    losses = []
    for is_split in (False, True):
        transformer = base()
        if is_split:
            shard(transformer, transformer.blocks, Sharding(world.device))
        adapted(transformer, lora_dropout=0.1)
        idle = partial(idle_pass, transformer) if is_split else None
        rollout = Rollout.of(options, 0, idle)
        assert rollout is not None
        slots = [range(2), range(2, 4)]
        step = next(it for it in range(1, 99) if [any(rollout.lengths(it, own)) for own in slots] == [False, True])
        batch = a_batch(slots[world.rank], rollout, step)
        batch = replace(batch, other_ranks_roll_out=True)
        denoiser = Denoiser(transformer)
        torch.manual_seed(0)
        inputs = rollout.inputs(denoiser, batch, sample=denoiser)
        losses.append(rollout.losses(denoiser, batch, inputs, penalty=squared).tolist())
    return {"losses": losses, "gathers": count(), "calls": rollout.calls, "rolls": batch.rollout is not None}


@pytest.mark.slow
def test_a_rank_without_a_rollout_takes_part_in_anothers() -> None:
    answers = in_ranks(2, rolled_out)
    assert [answer["rolls"] for answer in answers] == [False, True]
    assert all(answer["losses"][0] == answer["losses"][1] for answer in answers)
    (calls,) = {answer["calls"] for answer in answers}
    # What is outside of the blocks is gathered once.
    assert [answer["gathers"] for answer in answers] == [(calls + 1) * SPEC.blocks + 1] * 2


def preserved(world: World) -> dict[str, Any]:
    """Losses and gradients of steps in which one of two ranks has a regularization set, sharded and whole; the gathers.
    No sample of rank 0 takes part in the second loss.
    """
    options = RunConfig(preservation="blank", mixed_precision="no")
    count = Counter().take
    found = []
    for is_split in (False, True):
        transformer = base()
        if is_split:
            shard(transformer, transformer.blocks, Sharding(world.device))
        adapter = adapted(transformer, lora_dropout=0.1)
        recompute.install(transformer.blocks, None, draws=True)
        denoiser = Denoiser(transformer)
        idle = partial(idle_pass, transformer) if is_split else None
        batch = replace(a_batch(range(2 * world.rank, 2 * world.rank + 2)), other_ranks_distill=True)
        if world.rank == 1:
            preserved = replace(batch.condition.context, rows=batch.condition.context.rows + 1)
            batch = replace(batch, is_regularization=True)
            other = replace(batch, is_regularization=False, preserved=preserved, preserved_weights=torch.ones(2))
        else:
            other = batch
        stepper = Stepper(
            denoise=denoiser,
            parameters=adapter.parameters(),
            optimizer=torch.optim.SGD(adapter.parameters()),
            options=options,
            objective=Objective.of(options, options, seed=0),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            device=world.device,
            preservation=Preservation.of(options, denoiser, adapter, idle),
        )
        losses = stepper.backward(GlobalBatch(1, 0, (batch, other), 4, (*batch.names, *other.names)))
        gradients = [parameter.grad.tolist() for parameter in adapter.parameters() if parameter.grad is not None]
        found.append([losses, gradients])
    return {"same": found[0] == found[1], "tensors": len(found[0][1]), "gathers": count()}


@pytest.mark.slow
def test_a_rank_without_a_prediction_of_the_base_takes_part_in_anothers() -> None:
    answers = in_ranks(2, preserved)
    assert all(answer["same"] and answer["tensors"] > 10 for answer in answers)
    assert answers[0]["gathers"] == answers[1]["gathers"] > 0
