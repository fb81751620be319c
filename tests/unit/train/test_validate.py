"""Held-out loss and validation images, shared out over ranks: the numbers and files of a single process."""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.ranks import in_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from simpletuner.base.errors import DataError, RanksError, Stopped, UserError
from simpletuner.config.flavours import GuidanceScales, TransformerSpec
from simpletuner.config.options.ema import EmaOptions
from simpletuner.config.options.lora import LoraOptions
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.prompts import Prompt
from simpletuner.data.batch import Batch
from simpletuner.data.references import reference_crops
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.lora import Adapter, attach
from simpletuner.flux2.tokens import reference_tokens
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.row_shards import RankShards
from simpletuner.memory.world import World
from simpletuner.runs.events import ValidationEvent
from simpletuner.runs.layout import RunDirectory
from simpletuner.train.ema import Ema
from simpletuner.train.preview import TrainedModel
from simpletuner.train.validate import HeldOutLoss, ValidationSampler

CPU = torch.device("cpu")
SPEC = TransformerSpec(
    heads=1, head_dim=8, double_blocks=1, single_blocks=1, context_dim=8, guidance_embeds=True, axes=(2, 2, 2, 2)
)
SIGMAS = (0.3, 0.7)
WAIT_S = 20.0


class Table:
    """Where ranks that are threads meet and exchange values. One that has ended is not waited for."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.met: list[dict[int, str]] = []
        """What each rank brought to each meeting."""
        self.has_left = False

    def exchange(self, rank: int, value: object = None) -> list[Any]:
        with self.changed:
            meeting = next((each for each in self.met if rank not in each), None)
            if meeting is None:
                meeting = {}
                self.met.append(meeting)
            meeting[rank] = json.dumps(value)
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(meeting) == self.size or self.has_left, WAIT_S)
        if len(meeting) < self.size:
            raise RanksError.of("another rank is gone")
        return [json.loads(meeting[each]) for each in range(self.size)]

    def leave(self) -> None:
        with self.changed:
            self.has_left = True
            self.changed.notify_all()


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank that is a thread."""

    table: Table = field(default_factory=lambda: Table(1))

    def barrier(self, what: str) -> None:
        self.table.exchange(self.rank, what)

    def decide(self, flags: Sequence[bool]) -> list[bool]:
        return list(self.table.exchange(self.rank, list(flags))[0])

    def broadcast_json(self, value: Any) -> Any:
        return self.table.exchange(self.rank, value)[0]

    def gather_json(self, value: Any) -> list[Any]:
        return self.table.exchange(self.rank, value)


def in_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns, or the error that it raises, on each of `size` ranks."""
    table = Table(size)

    def rank_of(rank: int) -> Any:
        try:
            return work(ThreadWorld(rank, size, CPU, table=table))
        finally:
            table.leave()

    with ThreadPoolExecutor(size) as pool:
        ranks = [pool.submit(rank_of, rank) for rank in range(size)]
    return [rank.exception() or rank.result() for rank in ranks]


class CallCounter(Denoiser):
    """Counts calls, and may fail in one. If sharded, each call waits for that of every other rank."""

    def __init__(self, transformer: Flux2Transformer, world: World, *, is_sharded: bool) -> None:
        super().__init__(transformer)
        self.world = world
        self.is_sharded = is_sharded
        self.calls = 0
        self.fails_at: int | None = None
        self.averages: list[float] = []
        """A number of what the model computes with, at each call."""

    def __call__(self, latents: Tensor, sigma: Tensor, condition: Condition, choices: Any = ()) -> Tensor:
        self.calls += 1
        self.averages.append(next(p for n, p in self.transformer.named_parameters() if n.endswith(".b")).sum().item())
        if self.calls == self.fails_at:
            raise torch.OutOfMemoryError("out of memory")
        if self.is_sharded and isinstance(self.world, ThreadWorld):  # in processes FSDP makes them wait
            self.world.barrier("a model call")
        return super().__call__(latents, sigma, condition, choices)


def model() -> tuple[Flux2Transformer, Adapter]:
    """The same weights each time; the adapter does something."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        transformer = Flux2Transformer(SPEC)
        adapter = attach(transformer, LoraOptions(lora_rank=2), seed=0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return transformer, adapter


def context_of(prompt: str) -> TextContext:
    seed = sum(prompt.encode())
    return TextContext.dense(torch.randn(1, 3, SPEC.context_dim, generator=torch.Generator().manual_seed(seed)))


def sample(index: int) -> dict[float, Batch]:
    """A held-out sample. They differ in size, and in their losses so much that the order of the sums matters."""
    generator = torch.Generator().manual_seed(index)
    latents, noise = torch.randn(2, 1, 128, 2, 2 + index % 2, generator=generator) * (1e6 if index in (1, 2) else 1)
    condition = Condition.at(context_of(f"sample {index}"), 1.0)
    return {
        sigma: Batch(latents, condition, torch.tensor([sigma]), noise, (f"set/{index}",), torch.ones(1), range(1))
        for sigma in SIGMAS
    }


def held_out(world: World, count: int, *, is_sharded: bool = False) -> tuple[HeldOutLoss, CallCounter]:
    denoise = CallCounter(model()[0], world, is_sharded=is_sharded)
    return HeldOutLoss(denoise, count, sample, world, is_sharded), denoise


def measured(world: World, count: int, is_sharded: bool = False) -> list[Any]:
    """The loss by sigma, what was reported, and the calls made."""
    told: list[tuple[int, int]] = []
    loss, denoise = held_out(world, count, is_sharded=is_sharded)
    by_sigma = loss(lambda done, total: told.append((done, total)))
    return [list(by_sigma.items()), told, denoise.calls]


ALONE = World(0, 1, CPU)
SHARDED = pytest.mark.parametrize("is_sharded", [False, True], ids=["replicated", "sharded"])


def test_alone_the_held_out_loss_is_the_mean_of_the_samples_in_their_order() -> None:
    by_sigma, told, calls = measured(ALONE, 3)
    denoise = Denoiser(model()[0].eval())
    for sigma, mean in by_sigma:
        total = 0.0
        for index in range(3):
            batch = sample(index)[sigma]
            with torch.no_grad():
                noised = (1 - sigma) * batch.latents + sigma * batch.noise
                error = denoise(noised, batch.sigma, batch.condition) - (batch.noise - batch.latents)
            total += error.square().mean().item()
        assert mean == pytest.approx(total / 3, rel=1e-6)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert calls == 3 * len(SIGMAS)
    assert not torch.distributed.is_initialized()


@SHARDED
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_held_out_loss_has_the_same_bits_on_any_number_of_ranks(count: int, is_sharded: bool) -> None:
    for size in (2, 3):
        alone = measured(ALONE, count)[0]
        by_rank = in_threads(size, lambda world: measured(world, count, is_sharded))
        assert [each[0] for each in by_rank] == [alone] * size
        assert by_rank[0][1][-1] == (count, count)
        calls = [each[2] for each in by_rank]
        assert len(set(calls)) == 1 if is_sharded else sum(calls) == count * len(SIGMAS)


@SHARDED
def test_a_sample_that_cannot_be_measured_ends_its_rank_and_the_others_do_not_hang(is_sharded: bool) -> None:
    def work(world: World) -> Any:
        loss, denoise = held_out(world, 4, is_sharded=is_sharded)
        denoise.fails_at = 2 if world.rank == 1 else None
        return loss(lambda *_: None)

    first, second = in_threads(2, work)
    assert isinstance(first, RanksError)
    assert isinstance(second, torch.OutOfMemoryError)


@dataclass
class Drawing:
    """A sampler of one rank, and what it told."""

    sampler: ValidationSampler
    denoise: CallCounter
    notices: list[str]
    told: list[tuple[int, int]]

    def report(self, done: int, total: int) -> None:
        self.told.append((done, total))


def pixels(latents: Tensor) -> Tensor:
    """In place of the VAE: each latent becomes 16 × 16 pixels."""
    return latents[:, :3].tanh().repeat_interleave(16, 2).repeat_interleave(16, 3)


def drawing(
    world: World,
    folder: Path,
    *,
    prompts: Sequence[str] = ("one", "two", "three"),
    sizes: str = "32x32",
    is_sharded: bool = False,
    with_ema: bool = True,
    real: float = 1.0,
    both: frozenset[tuple[int, int]] = frozenset(),
    decode: Callable[[], Callable[[Tensor], Tensor]] = lambda: pixels,
) -> Drawing:
    transformer, adapter = model()
    denoise = CallCounter(transformer, world, is_sharded=is_sharded)
    ema = Ema(adapter, EmaOptions(use_ema=True), CPU) if with_ema else None
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(2)  # so that the average differs
    run = RunDirectory(folder)
    run.validations.mkdir(parents=True, exist_ok=True)
    notices: list[str] = []
    sampler = ValidationSampler(
        run=run,
        options=ValidationOptions(validation_resolution=sizes, validation_num_inference_steps=2),
        scales=GuidanceScales(1.0, real),
        both_at_once=both,
        seed=1,
        model=TrainedModel(denoise),
        trained=adapter,
        ema=ema,
        has_live=True,
        decode=decode,
        prompts={name: Prompt(f"a picture of {name}") for name in prompts},
        context=context_of,
        references=lambda prompt: None,
        reference_crops={},
        world=world,
        notice=notices.append,
        steps_with_sheet=set(),
        is_sharded=is_sharded,
    )
    return Drawing(sampler, denoise, notices, [])


def images(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def paint(world: World, folder: Path, **options: Any) -> tuple[list[ValidationEvent | None], Drawing]:
    """The base model's images, then those of step 1."""
    made = drawing(world, folder, **options)
    events = [made.sampler.sample_base(1, made.report), made.sampler.sample(1, made.report)]
    assert not made.sampler.lacks_base
    assert made.sampler.is_complete(1)
    return events, made


@SHARDED
@pytest.mark.parametrize(("size", "prompts", "sizes"), [(3, 1, "32x32"), (2, 3, "32x32,48x16")], ids=["few", "many"])
def test_images_sheet_and_events_are_those_of_one_process(
    tmp_path: Path, size: int, prompts: int, sizes: str, is_sharded: bool
) -> None:
    options: dict[str, Any] = {"prompts": ("one", "two", "three")[:prompts], "sizes": sizes}
    expected, alone = paint(ALONE, tmp_path / "alone", **options)
    rows = prompts * len(sizes.split(","))
    assert len(images(tmp_path / "alone")) == 3 * rows + 2  # base, live, average; two sheets
    assert alone.told[-1] == (4 * rows, 4 * rows)  # two steps each, live and average
    by_rank = in_threads(size, lambda world: paint(world, tmp_path / "ranks", is_sharded=is_sharded, **options))
    for each in by_rank:
        assert isinstance(each, tuple), each
    assert images(tmp_path / "ranks") == images(tmp_path / "alone")
    assert by_rank[0][0] == expected
    assert all(events == [None, None] for events, _ in by_rank[1:])
    assert by_rank[0][1].told[-1] == alone.told[-1]
    told = by_rank[0][1].told
    assert told == sorted(told, key=lambda each: (each[1], each[0]))  # the base's, then those of step 1
    calls = [made.denoise.calls for _, made in by_rank]
    if is_sharded:
        assert len(set(calls)) == 1
        averages = [made.denoise.averages for _, made in by_rank]
        assert averages == averages[:1] * size  # all compute with the average, or none
    else:
        assert sum(calls) == alone.denoise.calls
        assert max(calls) - min(calls) <= 2 * 2


def test_the_larger_images_are_dealt_out_first(tmp_path: Path) -> None:
    by_rank = in_threads(
        2, lambda world: paint(world, tmp_path, prompts=("one", "two"), sizes="16x16,64x64", with_ema=False)
    )
    assert [made.denoise.calls for _, made in by_rank] == [8, 8]
    sampler = by_rank[0][1].sampler
    rounds = sampler._rounds(sampler._planned(1))
    assert [[picture.width for picture in each] for each in rounds] == [[64, 64], [16, 16]]


@pytest.mark.parametrize(
    ("both", "calls"),
    [(frozenset({(32, 32)}), 2), (frozenset({(32, 32), (48, 16)}), 1)],
    ids=["some", "all"],
)
def test_guidance_shares_a_pass_for_all_images_of_a_round_or_for_none(
    tmp_path: Path, both: frozenset[tuple[int, int]], calls: int
) -> None:
    def work(world: World) -> tuple[list[ValidationEvent | None], Drawing]:
        # Only rank 0's plan counts.
        own = both if world.is_main else frozenset()
        return paint(
            world, tmp_path, prompts=("one",), sizes="32x32,48x16", is_sharded=True, with_ema=False, real=2.0, both=own
        )

    for each in in_threads(2, work):
        assert isinstance(each, tuple), each
        assert each[1].denoise.calls == 2 * 2 * calls  # base and live, two steps each


def test_guidance_shares_a_pass_for_an_image_with_references_too(tmp_path: Path) -> None:
    """The plan has counted their tokens."""
    path = str(tmp_path / "reference.png")
    Image.new("RGB", (64, 64)).save(path)
    made = drawing(ALONE, tmp_path, prompts=("one",), with_ema=False, real=2.0, both=frozenset({(32, 32)}))
    made.sampler.prompts = {"one": Prompt("a picture", references=(path,))}
    made.sampler.references = lambda prompt: reference_tokens([torch.ones(128, 2, 2)])
    made.sampler.reference_crops = reference_crops([path])
    event = made.sampler.sample(1, made.report)
    assert event is not None
    assert made.denoise.calls == 2


def test_only_what_is_missing_is_drawn_and_an_image_that_is_there_keeps_its_file(tmp_path: Path) -> None:
    paint(ALONE, tmp_path)
    run = RunDirectory(tmp_path)
    kept = run.validation(0) / "one_32x32_0.png"
    gone = run.validation(0) / "two_32x32_0.png"
    written, whole = kept.stat().st_mtime_ns, gone.read_bytes()
    gone.unlink()

    def work(world: World) -> tuple[bool, ValidationEvent | None, ValidationEvent | None, int]:
        made = drawing(world, tmp_path)
        made.sampler.steps_with_sheet = {0} if world.is_main else set()  # rank 0 reads the events
        lacked = made.sampler.lacks_base
        event = made.sampler.sample_base(1, made.report)
        return lacked, event, made.sampler.sample_base(1, made.report), made.denoise.calls

    first, second = in_threads(2, work)
    assert (kept.stat().st_mtime_ns, gone.read_bytes()) == (written, whole)
    assert first[0]
    assert second[0]
    assert [picture.name for picture in first[1].pictures] == ["one", "two", "three"]
    assert (first[2], second[2]) == (None, None)
    assert (first[3], second[3]) == (2, 0)


@SHARDED
def test_images_that_another_rank_cannot_make_are_told_by_rank_0_and_cost_themselves(
    tmp_path: Path, is_sharded: bool
) -> None:
    alone, apart = tmp_path / "alone", tmp_path / "ranks"
    for folder in (alone, apart):
        (RunDirectory(folder).validation(1) / "two_32x32_0.png").mkdir(parents=True)
    expected, one = paint(ALONE, alone)
    first, second = in_threads(2, lambda world: paint(world, apart, is_sharded=is_sharded))
    assert first[0] == expected
    assert [picture.name for picture in first[0][1].pictures] == ["one", "three", "one", "two", "three"]
    assert images(apart) == images(alone)
    assert first[1].notices == [text.replace(str(alone), str(apart)) for text in one.notices]
    assert len(first[1].notices) == 1
    assert second[1].notices == []


@SHARDED
def test_after_three_failures_in_a_row_on_any_ranks_none_are_drawn(tmp_path: Path, is_sharded: bool) -> None:
    def decode() -> Callable[[Tensor], Tensor]:
        raise torch.OutOfMemoryError("out of memory")

    def work(world: World) -> tuple[list[ValidationEvent | None], Drawing, int]:
        made = drawing(
            world, tmp_path, is_sharded=is_sharded, prompts=[f"n{index}" for index in range(5)], decode=decode
        )
        events = [made.sampler.sample(1, made.report)]
        calls = made.denoise.calls
        events.append(made.sampler.sample(2, made.report))
        return events, made, made.denoise.calls - calls

    for rank, (events, made, later) in enumerate(in_threads(2, work)):
        assert events == [None, None]
        assert later == 0
        assert made.sampler.failures >= 3 if rank == 0 else made.notices == []
        if rank == 0:
            assert ["3 images in a row failed" in text for text in made.notices].count(True) == 1
            assert len(made.notices) == 6  # three of each rank
    assert images(tmp_path) == {}


def test_memory_that_runs_out_on_one_rank_costs_its_image_where_ranks_draw_by_themselves(tmp_path: Path) -> None:
    def work(world: World) -> tuple[ValidationEvent | None, Drawing]:
        made = drawing(world, tmp_path, with_ema=False)
        made.denoise.fails_at = 2 if world.rank == 1 else None
        return made.sampler.sample(1, made.report), made

    (event, made), (other, _) = in_threads(2, work)
    assert event is not None
    assert [picture.name for picture in event.pictures] == ["one", "three"]
    assert event.sheet is not None
    assert other is None
    assert [text.split(":")[0].split("/")[-1] for text in made.notices] == ["two_32x32_0.png could not be made"]
    assert "A lower --validation_resolution" in made.notices[0]


def test_where_ranks_draw_together_one_that_fails_before_its_calls_makes_them_all_the_same(tmp_path: Path) -> None:
    def work(world: World) -> tuple[ValidationEvent | None, Drawing]:
        attempts = iter(range(10))

        def decode() -> Callable[[Tensor], Tensor]:
            if world.rank == 1 and next(attempts) == 0:
                raise torch.OutOfMemoryError("out of memory")
            return pixels

        made = drawing(world, tmp_path, is_sharded=True, decode=decode)
        return made.sampler.sample(1, made.report), made

    (event, first), (_, second) = in_threads(2, work)
    assert event is not None
    assert [picture.name for picture in event.pictures] == ["one", "three", "one", "two", "three"]
    assert first.denoise.calls == second.denoise.calls == 8  # two rounds of each view, two steps
    assert len(first.notices) == 1


def test_memory_that_runs_out_in_a_call_that_ranks_make_together_ends_the_run(tmp_path: Path) -> None:
    def work(world: World) -> ValidationEvent | None:
        made = drawing(world, tmp_path, is_sharded=True)
        made.denoise.fails_at = 2 if world.rank == 1 else None
        return made.sampler.sample(1, made.report)

    first, second = in_threads(2, work)
    assert isinstance(first, RanksError)
    assert isinstance(second, torch.OutOfMemoryError)


class WholeShards(RankShards):
    """Shares of what is trained, all of it on each rank, that change when those of all ranks do."""

    def __init__(self, adapter: Adapter, world: World) -> None:
        self.world = world
        self.splits = {}
        self.parameters = dict(adapter.weights)

    def take_gradients(self) -> None:
        """Nothing."""

    def update_weights(self) -> None:
        self.world.barrier("the trainable parameters")


@SHARDED
def test_ranks_that_shard_trainable_parameters_sample_with_the_average_together(
    tmp_path: Path, is_sharded: bool
) -> None:
    """So does one without an image; and an image that fails leaves what is trained as it was."""
    paint(ALONE, tmp_path / "alone")

    def work(world: World) -> tuple[ValidationEvent | None, list[str], bool]:
        attempts = iter(range(10))

        def decode() -> Callable[[Tensor], Tensor]:
            if world.rank == 1 and next(attempts) == 1:  # its image with the average
                raise torch.OutOfMemoryError("out of memory")
            return pixels

        made = drawing(world, tmp_path / "ranks", is_sharded=is_sharded, decode=decode)
        adapter = made.sampler.trained
        assert isinstance(adapter, Adapter)
        adapter.masters = WholeShards(adapter, world)
        before = {name: tensor.clone() for name, tensor in adapter.state().items()}
        event = made.sampler.sample(1, made.report)
        return event, made.notices, all(tensor.equal(before[name]) for name, tensor in adapter.state().items())

    (event, notices, *first), (_, _, *second) = in_threads(2, work)
    assert event is not None
    assert [picture.name for picture in event.pictures] == ["one", "two", "three", "one", "three"]
    assert len(notices) == 1
    assert [first, second] == [[True], [True]]
    expected = images(RunDirectory(tmp_path / "alone").validation(1))
    drawn = images(RunDirectory(tmp_path / "ranks").validation(1))
    assert expected.keys() - drawn.keys() == {"ema/two_32x32_0.png"}
    assert all(drawn[name] == expected[name] for name in drawn if name != "sheet.png")


@pytest.mark.parametrize("error", [Stopped, DataError])
def test_what_ends_the_run_while_it_draws_is_no_failure_of_an_image(tmp_path: Path, error: type[UserError]) -> None:
    """A stop, or another rank's error, which progress is told of."""

    def work(world: World) -> ValidationEvent | None:
        def report(*_: int) -> None:
            if world.is_main:
                raise error.of("the end")

        return drawing(world, tmp_path).sampler.sample(1, report)

    first, second = in_threads(2, work)
    assert isinstance(first, error)
    assert isinstance(second, RanksError)


def measure_and_draw(world: World, folder: str, is_sharded: bool) -> list[Any]:
    """The held-out loss of three samples, and how many parameters are sharded; draws three prompts."""
    made = drawing(world, Path(folder), is_sharded=is_sharded)
    transformer = made.denoise.transformer
    if is_sharded:
        mesh = init_device_mesh("cpu", (world.size,))
        plain = set(made.sampler.trained.parameters())
        for module in (*transformer.blocks, transformer):
            fully_shard(module, mesh=mesh, ignored_params=plain)  # the adapter stays whole
    sharded = sum(isinstance(each, DTensor) for each in transformer.parameters())
    loss = HeldOutLoss(made.denoise, 3, sample, world, is_sharded)(lambda *_: None)
    made.sampler.sample_base(1, made.report)
    made.sampler.sample(1, made.report)
    return [list(loss.items()), sharded]


@pytest.mark.slow
@SHARDED
def test_two_processes_measure_and_draw_what_one_does(tmp_path: Path, is_sharded: bool) -> None:
    losses, _ = measure_and_draw(ALONE, str(tmp_path / "alone"), is_sharded=False)
    by_rank = in_ranks(2, measure_and_draw, str(tmp_path / "ranks"), is_sharded)
    assert [each[0] for each in by_rank] == [json.loads(json.dumps(losses))] * 2
    assert [each[1] > 0 for each in by_rank] == [is_sharded] * 2
    assert images(tmp_path / "ranks") == images(tmp_path / "alone")
    with Image.open(RunDirectory(tmp_path / "ranks").validation(1) / "sheet.png") as sheet:
        sheet.load()
