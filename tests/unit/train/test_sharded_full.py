"""Full training on several ranks is that of one process, and its checkpoints are resumed by any number of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.file_faults import files_of_at_most
from tests.ranks import in_ranks

from simpletuner.base.errors import CheckpointError, UserError
from simpletuner.base.files import sha256_bytes
from simpletuner.config.flavours import TransformerSpec
from simpletuner.config.run import RunConfig
from simpletuner.flux2.convert_model import save_single
from simpletuner.flux2.full import FullModel, unfreeze, unfreeze_sharded
from simpletuner.flux2.modelfile import TRANSFORMER_FOLDER, read_transformer
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory import machines
from simpletuner.memory.machines import with_writers
from simpletuner.memory.precision import DTYPES
from simpletuner.memory.shard import Sharding, shard
from simpletuner.memory.shares import load_shares
from simpletuner.memory.world import World
from simpletuner.runs import checkpoints
from simpletuner.runs.layout import EMA_FOLDER, RunDirectory
from simpletuner.train import optim
from simpletuner.train.checkpoint import (
    OPTIMIZER_STEM,
    on_each_machine,
    read_state,
    restore,
    save_checkpoint,
)
from simpletuner.train.ema import Ema
from simpletuner.train.product import FullProduct
from simpletuner.train.state import TrainState

pytestmark = pytest.mark.slow

SPEC = TransformerSpec(
    heads=2, head_dim=16, double_blocks=1, single_blocks=1, context_dim=24, guidance_embeds=True, axes=(4, 4, 4, 4)
)
ALONE = World(0, 1, torch.device("cpu"))
HEADER = {"version": "1", "step": "1"}
MICRO_BATCHES = 2
STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "mixed_precision": "no", "max_grad_norm": 0.0},
    "clipped": {"optimizer": "adamw", "mixed_precision": "no", "max_grad_norm": 0.01},
    "masters": {"optimizer": "adamw", "mixed_precision": "bf16", "max_grad_norm": 0.0},
    "adamw_bf16": {"optimizer": "adamw_bf16", "mixed_precision": "bf16", "max_grad_norm": 0.0},
    "lion": {"optimizer": "lion", "mixed_precision": "bf16", "max_grad_norm": 1e-4, "grad_clip_method": "value"},
}
Digests = dict[str, str]


class Trial:
    """A small model that is trained, in one process or by this rank of several."""

    def __init__(self, world: World, *, is_sharded: bool = True, **options: Any) -> None:
        self.world = world
        self.config = RunConfig(
            model_type="full", learning_rate=1e-3, use_ema=True, ema_decay=0.5, fsdp_enable=is_sharded, **options
        )
        torch.manual_seed(0)
        computes_in = DTYPES[self.config.base_dtype]
        transformer = Flux2Transformer(SPEC).to(torch.float32 if self.config.has_masters else computes_in)
        sharding = Sharding.of(self.config, world)
        if sharding is None:
            model = unfreeze(transformer, computes_in if self.config.has_masters else None)
        else:
            shard(transformer, transformer.blocks, Sharding(sharding.device, gather_dtype=computes_in))
            model = unfreeze_sharded(transformer, computes_in, world)
        self.model: FullModel = model
        self.product = FullProduct(self.config, transformer, model)
        self.optimizer = optim.build(
            self.product.groups(),
            self.config,
            seed=5,
            first_elements=None if model.shards is None else model.shards.first_elements,
        )
        self.ema = Ema(model, self.config, world.device)

    def step(self, step: int) -> None:
        """One optimizer step over `MICRO_BATCHES`, of which each rank has its share."""
        for place in range(self.world.rank, MICRO_BATCHES, self.world.size):
            generator = torch.Generator().manual_seed(1000 * step + place)
            dtype = self.product.transformer.dtype
            made = [
                torch.randn(1, n, d, generator=generator) for n, d in ((6, SPEC.in_channels), (4, SPEC.context_dim))
            ]
            ids = torch.zeros(1, 6, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64)
            tokens, context = (tensor.to(dtype) for tensor in made)
            out = self.product.transformer(tokens, context, torch.tensor([0.3]), torch.tensor([4.0]), *ids)
            (out.float().square().mean() / MICRO_BATCHES).backward()
            if self.model.masters is not None:
                self.model.masters.take_gradients()
        is_sharded = self.model.shards is not None
        if not is_sharded:
            self.world.sum_([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])
        optim.clip(self.model.parameters(), self.config, self.world if is_sharded else None)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.model.masters is not None:
            self.model.masters.update_weights()
        self.ema.update(step)

    def save(self, run: RunDirectory, step: int) -> Path:
        state = TrainState(step=step)
        return save_checkpoint(run, state, self.product, self.optimizer, self.ema, metadata=HEADER, world=self.world)

    def restore(self, folder: Path) -> None:
        restore(folder, read_state(folder), self.product, self.optimizer, self.ema)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name, however many ranks wrote it."""
    parts = {
        "optimizer": load_shares(folder, OPTIMIZER_STEM),
        "export": read_transformer(folder / TRANSFORMER_FOLDER),
        "average": read_transformer(folder / EMA_FOLDER / TRANSFORMER_FOLDER),
    }
    return {f"{part}: {name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def tensor_digests(folder: Path) -> Digests:
    return {
        name: f"{tensor.dtype} {sha256_bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())}"
        for name, tensor in tensors_in(folder).items()
    }


def digests_of(folder: Path) -> Digests:
    assert checkpoints.damage(folder) is None
    return tensor_digests(folder) | {"state": sha256_bytes((folder / "state.json").read_bytes())}


def train(world: World, root: str) -> None:
    """Train each case and save it."""
    for name, options in CASES.items():
        trial = Trial(world, **options)
        for step in range(1, STEPS + 1):
            trial.step(step)
        trial.save(RunDirectory(Path(root) / name), STEPS)


def resave(world: World, root: str, to: str) -> None:
    """Resume each case with fresh objects and save it again."""
    for name, options in CASES.items():
        trial = Trial(world, **options)
        trial.restore(RunDirectory(Path(root) / name).checkpoint(STEPS))
        trial.save(RunDirectory(Path(to) / name), STEPS)


def resave_apart(world: World, root: str) -> list[Any]:
    """Resume and save on machines that share no folder; which files this machine had while resuming, and has then."""
    machines.SENT_BYTES = 1000  # several sends for a file
    run = RunDirectory(Path(root) / f"machine-{world.machine}")
    apart = with_writers(world, run.root)
    trial = Trial(apart, **CASES["adamw"])
    saved = RunDirectory(Path(root) / "two" / "adamw").checkpoint(STEPS)
    with on_each_machine(saved, run, apart) as folder:
        trial.restore(folder)
        place = [str(folder.relative_to(root)), tensor_digests(folder) == tensor_digests(saved)]
    trial.save(run, STEPS)
    return [*place, sorted(path.name for path in run.root.rglob("*.safetensors"))]


def train_and_resume(world: World, root: str, of_one: str) -> dict[str, Any]:
    """What two ranks do: train, resume what one process saved, and fail."""
    train(world, f"{root}/two")
    resave(world, of_one, f"{root}/one-two")
    return {
        "held": held(world),
        "overflow": overflow(world),
        "drift": drift(world, f"{root}/drift"),
        "full": full_disk(world, f"{root}/full"),
    }


def overflow(world: World) -> list[bool]:
    """Whether this rank's gradients are finite, where those of all ranks are, and where one of rank 1's is not."""
    trial = Trial(world, **CASES["adamw"])
    shards = trial.model.shards
    assert shards is not None
    found = []
    for value in (1.0, float("inf")):
        for rows in shards.parameters.values():
            rows.grad = torch.full_like(rows, value if world.rank == 1 else 1.0)
        shards.share_overflow()
        found.append(
            all(bool(rows.grad.isfinite().all()) for rows in shards.parameters.values() if rows.grad is not None)
        )
    return found


def held(world: World) -> list[bool]:
    """Whether other weights that are held for a while reach the model, and leave no bit."""
    trial = Trial(world, **CASES["masters"])
    before = {name: tensor.clone() for name, tensor in trial.model.state().items()}

    def seen() -> float:
        ids = torch.zeros(1, 2, 4, dtype=torch.int64)
        tokens, context = torch.ones(1, 2, SPEC.in_channels), torch.ones(1, 2, SPEC.context_dim)
        with torch.no_grad():
            out = trial.product.transformer(
                tokens.bfloat16(), context.bfloat16(), torch.tensor([0.3]), torch.tensor([4.0]), ids, ids
            )
        total: float = out.float().abs().sum().item()
        return total

    first = seen()
    with trial.model.with_weights({name: torch.zeros_like(tensor) for name, tensor in before.items()}):
        inside = seen()
    after = trial.model.state()
    return [first > 0, inside == 0, seen() == first, all(torch.equal(after[name], before[name]) for name in before)]


def drift(world: World, root: str) -> list[Any]:
    """The error of a rank that holds other weights than the others, and what is saved then."""
    trial = Trial(world, is_sharded=False, **CASES["adamw"])
    run = RunDirectory(Path(root))
    trial.step(1)
    trial.save(run, 1)
    with torch.no_grad():
        trial.model.parameters()[3].view(-1)[0] += 1e-7 * world.rank
    return [failure(trial, run, 2), digests_of(run.checkpoint(1)) != {}]


def full_disk(world: World, root: str) -> list[Any]:
    """The error of ranks of which one has no room, and what is saved then."""
    trial = Trial(world, **CASES["adamw"])
    run = RunDirectory(Path(root))
    trial.step(1)
    trial.save(run, 1)
    if world.is_main:
        return [failure(trial, run, 2), failure(trial, run, 1)]
    with files_of_at_most(10_000):
        return [failure(trial, run, 2), failure(trial, run, 1)]


def failure(trial: Trial, run: RunDirectory, step: int) -> list[Any]:
    """The error of saving, and the folders of checkpoints after it."""
    try:
        trial.save(run, step)
    except UserError as error:
        trial.world.barrier("the end of saving")
        folders = sorted(path.name for path in run.checkpoints.iterdir())
        trial.world.barrier("a look at the folders")
        return [type(error).__name__, str(error), folders]
    return []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What one process, two and three ranks trained and saved."""
    root = tmp_path_factory.mktemp("sharded")
    train(ALONE, f"{root}/one")
    answers = in_ranks(2, train_and_resume, str(root), f"{root}/one")
    in_ranks(3, resave, f"{root}/two", f"{root}/two-three")
    resave(ALONE, f"{root}/two", f"{root}/two-one")
    resave(ALONE, f"{root}/two-three", f"{root}/two-three-one")
    return root, answers


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_trains(case: str, saved: tuple[Path, Any]) -> None:
    root, _ = saved
    one, two = (tensors_in(RunDirectory(root / name / case).checkpoint(STEPS)) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if case == "clipped":  # the norm is a sum over ranks of sums, and every gradient is multiplied with its inverse
            largest = tensor.abs().max().item()
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=5e-6 * largest, msg=name)
        else:
            assert torch.equal(two[name], tensor), name


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_resumes_to_the_bit(case: str, saved: tuple[Path, Any]) -> None:
    root, _ = saved

    def digests(name: str) -> Digests:
        return digests_of(RunDirectory(root / name / case).checkpoint(STEPS))

    assert digests("two-one") == digests("two-three") == digests("two-three-one") == digests("two")
    assert digests("one-two") == digests("one")
    folder = RunDirectory(root / "two" / case).checkpoint(STEPS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema", "manifest.json", "optimizer-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors",
        "state.json", "transformer",
    ]  # fmt: skip


def test_machine_0_alone_keeps_the_run_that_machines_do_not_share(saved: tuple[Path, Any]) -> None:
    root, _ = saved
    first, second = in_ranks(2, resave_apart, str(root), machines=2)
    model = "diffusion_pytorch_model-00001-of-00001.safetensors"
    assert first == ["two/adamw/checkpoints/step-000003", True, [model, model, "optimizer-00001-of-00001.safetensors"]]
    assert second == ["machine-1/checkpoints/.tmp-step-000003-of-machine-1", True, []]
    assert not (root / "machine-1").exists()
    again, before = (RunDirectory(root / name).checkpoint(STEPS) for name in ("machine-0", "two/adamw"))
    assert digests_of(again) == digests_of(before)


def test_shares_of_the_export_become_the_file_of_one_process(saved: tuple[Path, Any], tmp_path: Path) -> None:
    root, _ = saved
    one, two = (
        RunDirectory(root / name / "adamw").checkpoint(STEPS) / TRANSFORMER_FOLDER for name in ("one-two", "one")
    )
    save_single(one, tmp_path / "joined")
    save_single(two, tmp_path / "single")
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "single").read_bytes()
    index = json.loads((one / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_transformer(two).keys()
    sizes = [path.stat().st_size for path in one.glob("*.safetensors")]
    assert max(sizes) < 1.1 * min(sizes)


def test_other_weights_are_held_for_a_while(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [answer["held"] for answer in saved[1]] == [[True] * 4] * 2


def test_an_overflow_on_one_rank_is_one_on_all(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [answer["overflow"] for answer in saved[1]] == [[True, False]] * 2


def test_a_rank_that_has_drifted_saves_nothing(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for answer in saved[1]:
        (kind, text, folders), is_good = answer["drift"]
        assert kind == "CheckpointError"
        assert "rank 1 has diverged from the other ranks: 1 of" in text
        assert folders == ["step-000001"]
        assert is_good


def test_a_rank_without_room_ends_all_of_them(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank, answer in enumerate(saved[1]):
        for kind, text, folders in answer["full"]:
            assert kind == "DiskError"
            assert ("rank 1: " in text) == (rank == 0)
            assert "checkpoints/step-00000" in text
            assert folders == ["step-000001"]


def test_a_missing_or_damaged_share_is_found(saved: tuple[Path, Any]) -> None:
    root, _ = saved
    folder = RunDirectory(root / "two-three" / "lion").checkpoint(STEPS)
    victim = folder / "optimizer-00002-of-00003.safetensors"
    content = victim.read_bytes()
    victim.write_bytes(content[:-1] + b"?")
    assert checkpoints.damage(folder) == f"{victim.name} does not have the hash in its manifest"
    victim.unlink()
    assert checkpoints.damage(folder) == f"{victim.name} is missing"
    with pytest.raises(CheckpointError, match=r"lacks optimizer-00002-of-00003"):
        Trial(ALONE, **CASES["lion"]).restore(folder)
