"""Training under DeepSpeed's stages is that of one process, and its checkpoints are resumed with and without it.

Tolerance: DeepSpeed sums the same gradients in another order, in fp32: 1.6e-7 was measured in moments. Where the
last bits of masters differ, some bf16 weights round differently: 1.7e-6. With stochastic rounding a last bit may change
one moment by 2^-8 of itself, 7e-5 of the norm of all.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import in_ranks

from simpletuner.base.files import sha256_bytes
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.run import RunConfig
from simpletuner.data.batch import Batch, GlobalBatch
from simpletuner.flow.condition import Condition, TextContext
from simpletuner.flux2.denoiser import Denoiser
from simpletuner.flux2.full import unfreeze
from simpletuner.flux2.lora import attach
from simpletuner.flux2.modelfile import TRANSFORMER_FOLDER, read_transformer
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.precision import DTYPES
from simpletuner.memory.shard import FlatSplit
from simpletuner.memory.shares import load_shares
from simpletuner.memory.world import World
from simpletuner.memory.zero import ZeroShards
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train import optim
from simpletuner.train.checkpoint import AVERAGE, OPTIMIZER_STEM, PARAMETER, read_state, restore, save_checkpoint
from simpletuner.train.ema import Ema
from simpletuner.train.product import FullProduct, LoraProduct, Product, zero_shards
from simpletuner.train.state import TrainState
from simpletuner.train.step import NotFiniteError, Objective, Stepper

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
ALONE = World(0, 1, torch.device("cpu"))
MICRO_BATCHES = 4
STEPS = 4
BAD = 2
"""The step with a gradient that is not a number, on the last rank."""
FULL: dict[str, Any] = {"model_type": "full", "max_grad_norm": 0.01}
LORA: dict[str, Any] = {"lora_rank": 2, "flux_lora_target": "all", "max_grad_norm": 0.05}
CASES: dict[str, tuple[dict[str, Any], float]] = {
    "lora": (LORA, 2e-6),
    "offloaded": (LORA, 2e-6),
    "full": (FULL, 2e-6),
    "lion": (FULL | {"optimizer": "lion", "grad_clip_method": "value"}, 2e-6),
    "bf16": (FULL | {"mixed_precision": "bf16"}, 5e-6),
    "adamw_bf16": ({"lora_rank": 2, "mixed_precision": "bf16", "optimizer": "adamw_bf16"}, 1e-4),
}
"""Options, and how far the trained numbers may be from one process's, in norm."""
STAGES = {"offloaded": (2, 3), "lion": (3,), "bf16": (1, 3), "adamw_bf16": (2,)}
RUNS = [(case, stage) for case in CASES for stage in STAGES.get(case, (1, 2, 3))]


def document(case: str, stage: int) -> dict[str, Any]:
    """The config of DeepSpeed. By its defaults stage 3 keeps tensors as small as these whole: of `lion` alone here."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3 and case != "lion":
        zero["stage3_param_persistence_threshold"] = 0
    if case == "offloaded":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if case == "offloaded" and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {"zero_optimization": zero}


class Trial:
    """A small model that is trained, in one process or by this rank of several, under DeepSpeed's `stage`."""

    def __init__(self, world: World, case: str, stage: int) -> None:
        self.world = world
        engine = {} if world.is_alone else {"deepspeed_config": document(case, stage)}
        options = {"mixed_precision": "no", "learning_rate": 1e-3, "use_ema": True, "ema_decay": 0.5}
        self.config = config = RunConfig(**(options | CASES[case][0] | engine))
        torch.manual_seed(0)
        has_masters = config.has_masters and world.is_alone
        computes_in = DTYPES[config.base_dtype]
        transformer = Flux2Transformer(SPEC).to(computes_in)
        self.product: Product
        if config.model_type == "lora":
            transformer.requires_grad_(False)
            adapter = attach(transformer, config, seed=3)
            for layer in adapter.layers.values():
                torch.nn.init.normal_(layer.b, std=0.1, generator=torch.Generator().manual_seed(4))
            self.product = LoraProduct(config, transformer, adapter)
        else:
            # From the same numbers, whichever of the two makes masters of them.
            model = unfreeze(transformer.float() if has_masters else transformer, computes_in if has_masters else None)
            self.product = FullProduct(config, transformer, model)
        trained = self.product.trained
        self.zero = zero = None if world.is_alone else zero_shards(config, self.product, world)
        trained.masters = trained.masters if zero is None else zero
        first_elements = None if zero is None else zero.first_elements
        self.optimizer = optim.build(self.product.groups(), config, seed=5, first_elements=first_elements)
        self.ema = Ema(trained, config, world.device)
        self.denoise = Denoiser(transformer, forward=None if zero is None else zero.forward)
        self.stepper = Stepper(
            denoise=self.denoise,
            parameters=trained.parameters(),
            optimizer=self.optimizer,
            options=config,
            objective=Objective.of(config, config, 0),
            scaler=torch.amp.GradScaler("cpu", enabled=False),
            device=world.device,
            masters=trained.masters,
            world=None if world.is_alone else world,
        )

    def batch(self, step: int) -> GlobalBatch:
        """This rank's micro-batches, of 4 and of 6 tokens in turn."""
        own = range(self.world.rank, MICRO_BATCHES, self.world.size)
        names = tuple(f"random/{slot}" for slot in range(MICRO_BATCHES))
        return GlobalBatch(step, 0, tuple(micro_batch(step, place) for place in own), MICRO_BATCHES, names)

    def step(self, step: int) -> float | str:
        """Its loss, or why it is not taken."""
        try:
            loss = self.stepper(self.batch(step), 1e-3).loss
        except NotFiniteError as error:
            self.stepper.discard()
            return str(error)
        self.ema.update(step)
        return loss

    def save(self, run: RunDirectory) -> Path:
        state = TrainState(step=STEPS)
        header = {"version": "1", "step": str(STEPS)}
        return save_checkpoint(run, state, self.product, self.optimizer, self.ema, metadata=header, world=self.world)

    def restore(self, run: RunDirectory) -> None:
        folder = run.checkpoint(STEPS)
        restore(folder, read_state(folder), self.product, self.optimizer, self.ema)


def micro_batch(step: int, place: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * step + place)
    latents, noise = (torch.randn(1, SPEC.in_channels, 2, 2 + place % 2, generator=generator) for _ in range(2))
    rows = torch.randn(4, SPEC.context_dim, generator=generator)
    if step == BAD and place == MICRO_BATCHES - 1:
        noise[0, 0, 0, 0] = torch.inf
    return Batch(
        latents=latents,
        condition=Condition.at(TextContext(rows, torch.arange(4)[None]), 1.0),
        sigma=torch.tensor([0.4]),
        noise=noise,
        names=(f"random/{place}",),
        weights=torch.ones(1),
        slots=range(place, place + 1),
    )


def directory(root: str, name: str, case: str, stage: int) -> RunDirectory:
    return RunDirectory(Path(root) / name / f"{case}{stage}")


def train(world: World, root: str, name: str) -> dict[str, list[float | str]]:
    """Train each case and save it. Returns what its steps said."""
    said = {}
    for case, stage in RUNS:
        trial = Trial(world, case, stage)
        trial.stepper.backward(trial.batch(1))  # a pass that is only tried
        trial.optimizer.zero_grad(set_to_none=True)
        said[f"{case}{stage}"] = [trial.step(step) for step in range(1, STEPS + 1)]
        trial.save(directory(root, name, case, stage))
    return said


def resave(world: World, root: str, start: str, name: str) -> None:
    """Resume each case with fresh objects and save it again."""
    for case, stage in RUNS:
        trial = Trial(world, case, stage)
        trial.restore(directory(root, start, case, stage))
        trial.save(directory(root, name, case, stage))


def train_and_resume(world: World, root: str) -> dict[str, Any]:
    """What two ranks do."""
    said = train(world, root, "two")
    resave(world, root, "one", "one-two")
    return {"said": said, "held": {stage: held(world, stage) for stage in (1, 2, 3)}, "past": past_the_engine(world)}


def held(world: World, stage: int) -> list[bool]:
    """Whether other values that are held for a while reach the model, and leave no bit; and whether a rank that has
    nothing to compute can take part.
    """
    trial = Trial(world, "full", stage)
    assert isinstance(trial.zero, ZeroShards)
    trial.step(1)
    batch, trained = micro_batch(1, 0), trial.product.trained
    before = {name: tensor.clone() for name, tensor in trained.state().items()}

    def seen() -> float:
        with torch.no_grad():
            return trial.denoise(batch.latents, batch.sigma, batch.condition).abs().sum().item()

    first = seen()
    with trained.with_weights({name: torch.zeros_like(tensor) for name, tensor in before.items()}):
        inside = seen()
    draws = torch.get_rng_state()
    if world.is_main:
        trial.denoise.idle(world.device)
    else:
        seen()
    after = trained.state()
    same = all(torch.equal(after[name], before[name]) for name in before)
    return [first > 0, inside == 0, seen() == first, same, torch.equal(torch.get_rng_state(), draws)]


def past_the_engine(world: World) -> str:
    """The error of a call that goes past the engine at stage 3."""
    trial = Trial(world, "lora", 3)
    batch = micro_batch(1, 0)
    try:
        Denoiser(trial.product.transformer)(batch.latents, batch.sigma, batch.condition)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, list[dict[str, Any]]]:
    """What one process and two ranks trained and saved, and what they said."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: none of its stages is tested")
    root = str(tmp_path_factory.mktemp("zero"))
    said = train(ALONE, root, "one")
    answers = in_ranks(2, train_and_resume, root)
    resave(ALONE, root, "two", "two-one")
    return root, said, answers


def tensors_in(run: RunDirectory) -> dict[str, torch.Tensor]:
    """What a checkpoint goes on with, however many ranks wrote it: of a whole model, the export too."""
    folder = run.checkpoint(STEPS)
    tensors = load_shares(folder, OPTIMIZER_STEM)
    for mark, place in ((PARAMETER, folder), (AVERAGE, folder / EMA_FOLDER)):
        if (place / TRANSFORMER_FOLDER).is_dir():
            tensors |= {mark + name: each for name, each in read_transformer(place / TRANSFORMER_FOLDER).items()}
    return tensors


def digests_in(run: RunDirectory) -> dict[str, str]:
    """Of what a checkpoint goes on with, and of its export."""
    folder = run.checkpoint(STEPS)
    assert checkpoints.damage(folder) is None
    tensors = tensors_in(run)
    exports = {path.name: path for path in folder.rglob("pytorch_lora_weights.safetensors")}
    return {
        name: f"{tensor.dtype} {sha256_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}"
        for name, tensor in tensors.items()
    } | {name: sha256_bytes(path.read_bytes()) for name, path in exports.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stage"), RUNS)
def test_two_ranks_train_what_one_process_trains(case: str, stage: int, saved: tuple[str, Any, Any]) -> None:
    """A step with a gradient that is not finite is skipped by all ranks, and leaves nothing."""
    root, said, answers = saved
    limit = CASES[case][1]
    for answer in answers:
        for number, (ours, theirs) in enumerate(
            zip(answer["said"][f"{case}{stage}"], said[f"{case}{stage}"], strict=True)
        ):
            if number + 1 == BAD:
                assert ours == theirs
                assert "of step 2 is not finite" in ours
            else:
                assert ours == pytest.approx(theirs, rel=limit)
    one, two = (tensors_in(directory(root, name, case, stage)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for part in (PARAMETER, AVERAGE, "exp_avg"):
        names = [name for name in one if name.startswith(part)]
        assert names
        apart = sum(float((two[name].double() - one[name].double()).square().sum()) for name in names)
        norm = sum(float(one[name].double().square().sum()) for name in names)
        assert math.sqrt(apart) <= (1 if part != "exp_avg" else 10) * limit * math.sqrt(norm), part


@pytest.mark.slow
@pytest.mark.parametrize(("case", "stage"), RUNS)
def test_one_process_and_two_ranks_resume_each_other_to_the_bit(
    case: str, stage: int, saved: tuple[str, Any, Any]
) -> None:
    root, _, _ = saved
    for start in ("one", "two"):
        other = "one-two" if start == "one" else "two-one"
        ours, theirs = (digests_in(directory(root, name, case, stage)) for name in (other, start))
        assert ours.keys() == theirs.keys()
        assert [name for name, digest in theirs.items() if ours[name] != digest] == []


@pytest.mark.slow
def test_other_weights_are_held_for_a_while(saved: tuple[str, Any, list[dict[str, Any]]]) -> None:
    assert [answer["held"] for answer in saved[2]] == [{str(stage): [True] * 5 for stage in (1, 2, 3)}] * 2


@pytest.mark.slow
def test_a_call_past_the_engine_is_refused(saved: tuple[str, Any, list[dict[str, Any]]]) -> None:
    for answer in saved[2]:
        assert answer["past"].startswith("the model is called without DeepSpeed's engine")


@pytest.mark.parametrize("spans", [((0, 4), (4, 6)), ((0, 0), (0, 6)), ((0, 6), (0, 0))])
def test_each_number_is_in_one_piece(spans: tuple[tuple[int, int], ...]) -> None:
    whole = torch.arange(6).view(2, 3)
    splits = [FlatSplit((2, 3), rank, spans) for rank in range(2)]
    pieces = [split.of(whole) for split in splits]
    assert torch.cat(pieces).tolist() == list(range(6))
    assert [tuple(piece.shape) for piece in pieces] == [split.local_shape for split in splits]
    assert all(piece[0] == split.first_element for piece, split in zip(pieces, splits, strict=True) if len(piece))
    assert replace(splits[0], spans=((0, 6),)).gather(whole.view(-1), ALONE, 0).equal(whole)  # type: ignore[union-attr]
