"""A sharded base is loaded by each rank to itself: its own rows, the bits of the whole, and no more memory.

torch's fake process group makes this process any rank of any number: loading takes no collective.
"""

import contextlib
import ctypes
import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.unit.flux2.test_load import bfl_tensors, single_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from simpletuner.base.errors import AccessError, ConfigError
from simpletuner.config.flavours import TransformerSpec
from simpletuner.flux2 import load
from simpletuner.flux2.load import load_transformer
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.transformer import Flux2Transformer
from simpletuner.memory.shard import Sharding, is_sharded, local_bytes, local_rows, local_shard

SHARDING = Sharding(torch.device("cpu"))

WIDE = TransformerSpec(
    heads=16, head_dim=32, axes=(8, 8, 8, 8), double_blocks=4, single_blocks=4, context_dim=192, guidance_embeds=True
)
"""156 hidden² numbers in its blocks: 41 million."""


@contextlib.contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """This process as one of `size`; the others are not there."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def the_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bytes are."""
    return one.dtype == other.dtype and torch.equal(
        one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)
    )


def assert_own_rows(sharded: Flux2Transformer, whole: Flux2Transformer) -> None:
    shards, wholes = dict(sharded.named_parameters()), dict(whole.named_parameters())
    assert shards.keys() == wholes.keys()
    assert [name for name in wholes if not the_same(local_shard(shards[name]), local_rows(wholes[name]))] == []
    assert not list(sharded.buffers())  # they would be whole on each rank, and made anew after `to_empty`


@pytest.mark.parametrize(
    "precision",
    [
        "no_change",
        "int8-quanto",
        "nf4-bnb",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int4-quanto", "int2-quanto", "fp8-quanto")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8-torchao", "fp8wo-torchao", "int8-bnb")),
    ],
)
def test_each_rank_holds_its_rows_of_every_tensor(precision: str, tiny_source: Source) -> None:
    whole = load_transformer(tiny_source, torch.bfloat16, "cpu", precision)
    everything = local_bytes(whole.parameters())
    assert not is_sharded(whole)
    for size in (2, 3):
        held = 0
        for rank in range(size):
            with as_rank(rank, size):
                sharded = load_transformer(tiny_source, torch.bfloat16, "cpu", precision, sharding=SHARDING)
                assert is_sharded(sharded)
                assert not sharded.training
                assert not any(parameter.requires_grad for parameter in sharded.parameters())
                assert_own_rows(sharded, whole)
                own = local_bytes(sharded.parameters())
            assert own == pytest.approx(everything / size, rel=1e-3)
            held += own
        assert held == everything


def test_a_file_of_bfls_is_sharded_alike(tiny_source: Source, tmp_path: Path) -> None:
    tensors = load_file(tiny_source.transformer.files[0])
    source = single_file(tiny_source, tmp_path, bfl_tensors(tensors))
    with as_rank(1, 2):
        assert_own_rows(
            load_transformer(source, torch.float32, "cpu", sharding=SHARDING),
            load_transformer(tiny_source, torch.float32, "cpu"),
        )


def test_a_quantized_base_that_was_kept_is_read_by_rows(tiny_source: Source, tmp_path: Path) -> None:
    told: list[str] = []
    for precision in ("int8-quanto", "nf4-bnb"):

        def loaded(sharding: Sharding | None = None, precision: str = precision) -> Flux2Transformer:
            return load_transformer(
                tiny_source, torch.float32, "cpu", precision, cache_dir=tmp_path, report=told.append, sharding=sharding
            )

        with as_rank(0, 2):
            loaded(SHARDING)
        assert not list(tmp_path.glob(f"{precision}*"))  # a rank has a part of it
        assert told.pop().startswith(f"{tmp_path} holds no {precision} base")
        whole = loaded()
        with as_rank(1, 2), pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "quantized_tensors", None)
            assert_own_rows(loaded(SHARDING), whole)
    assert told == []


def test_damage_is_named_by_the_rank_that_holds_it(tiny_source: Source, tmp_path: Path) -> None:
    name = "single_transformer_blocks.1.attn.to_out.weight"
    tensors = load_file(tiny_source.transformer.files[0])
    tensors[name][-1, 5] = torch.nan
    source = single_file(tiny_source, tmp_path, tensors)
    for precision in ("no_change", "int8-quanto"):
        with as_rank(0, 2):
            load_transformer(source, torch.float32, "cpu", precision, sharding=SHARDING)
        with as_rank(1, 2), pytest.raises(AccessError, match=rf"1 of [\d,]+ numbers of {name} are NaN or infinite"):
            load_transformer(source, torch.float32, "cpu", precision, sharding=SHARDING)
    tensors[name][-1, 5] = 65_536.0
    source = single_file(tiny_source, tmp_path, tensors)
    with as_rank(1, 2), pytest.raises(ConfigError, match=f"the weight {name} has a value of 65536"):
        load_transformer(source, torch.float16, "cpu", sharding=SHARDING)


def test_tensors_that_do_not_fit_are_named_before_any_is_read(tiny_source: Source, tmp_path: Path) -> None:
    tensors = load_file(tiny_source.transformer.files[0])
    del tensors["proj_out.weight"]
    source = single_file(tiny_source, tmp_path, tensors)
    with pytest.raises(AccessError) as whole:
        load_transformer(source, torch.float32, "cpu")
    with as_rank(0, 2), pytest.raises(AccessError) as sharded:
        load_transformer(source, torch.float32, "cpu", sharding=SHARDING)
    assert str(sharded.value) == str(whole.value)


def anonymous_bytes() -> int:
    """Memory of this process that is no file's, without what the allocator keeps of freed tensors."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD: larger tensors are given back when they are freed
    libc.malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("RssAnon"))
    return int(kilobytes) * 1024


def peak_while(work: Callable[[], object], patch: pytest.MonkeyPatch) -> int:
    """The most memory that `work` has more than there was before, looked at with each tensor that lands."""
    gc.collect()  # else garbage of earlier tests is freed meanwhile, and less seems to be taken
    before, most = anonymous_bytes(), 0
    check = load._check_finite

    def look(*given: object) -> None:
        nonlocal most
        most = max(most, anonymous_bytes() - before)
        check(*given)  # type: ignore[arg-type]

    patch.setattr(load, "_check_finite", look)
    kept = work()
    most = max(most, anonymous_bytes() - before)
    del kept
    return most


@pytest.mark.parametrize("precision", ["no_change", pytest.param("int8-quanto", marks=pytest.mark.slow)])
def test_memory_falls_with_the_number_of_ranks_while_loading(
    precision: str, tiny_source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux2Transformer(WIDE).state_dict().items()}
    file = tmp_path / "wide.safetensors"
    generator = torch.Generator().manual_seed(0)
    largest = torch.randn(24 * WIDE.hidden**2, generator=generator).bfloat16()
    save_file({name: largest[: shape.numel()].view(shape).clone() for name, shape in shapes.items()}, file)
    del largest
    source = dataclasses.replace(tiny_source, transformer=Weights((file,), None))
    assert source.spec == WIDE

    def load_it(sharding: Sharding | None = SHARDING) -> Flux2Transformer:
        return load_transformer(source, torch.float32, "cpu", precision, sharding=sharding)

    whole = local_bytes(load_it(None).parameters())
    with as_rank(0, 2):
        load_transformer(tiny_source, torch.float32, "cpu", precision, sharding=SHARDING)  # libraries are imported
    # Beside the shards: an fp32 tensor's rows, and what a library makes of them.
    beside = 12 * 2**20
    peaks = {1: peak_while(lambda: load_it(None), monkeypatch)}
    for size in (2, 4):
        with as_rank(size - 1, size):
            peaks[size] = peak_while(load_it, monkeypatch)
    assert peaks[1] > 0.9 * whole
    assert peaks[2] < whole / 2 + beside, peaks
    assert peaks[4] < whole / 4 + beside, peaks
