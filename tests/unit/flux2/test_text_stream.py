"""The streamed text encoder: the bits of the resident one, with a layer in memory instead of all of them."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.thread_ranks import ALONE
from tests.tiers import others_slow

from simpletuner.base.errors import AccessError, ConfigError, DataError, DiskError
from simpletuner.base.storage import LocalStorage
from simpletuner.config.precisions import NO_CHANGE
from simpletuner.data.cache.contexts import fill_contexts
from simpletuner.data.cache.store import LEDGER, Store
from simpletuner.flow.condition import TextContext
from simpletuner.flux2.footprint import resident_text_bytes
from simpletuner.flux2.load import load_text_encoder, stream_text_encoder
from simpletuner.flux2.source import Source, Weights
from simpletuner.flux2.spec import text_from_config
from simpletuner.flux2.text import CODECS, ResidentTextEncoder, TokenBatch
from simpletuner.flux2.text_stream import StreamedTextEncoder, portions

BATCHES = [
    ["", "a cat"],
    ["a red square on a white background", "[IMG] twice, in 2024"],
    ["a painting of a small yellow house beside a river, soft morning light, " * 20],
    ["a dog", "a blue circle", "a tree"],
]


def shortened(source: Source, layers: tuple[int, ...] = (10, 20, 30), max_length: int = 160) -> Source:
    return dataclasses.replace(source, text_layers=layers, text_length=max_length)


def loaded(
    source: Source, dtype: torch.dtype = torch.float32, layers: tuple[int, ...] = (10, 20, 30)
) -> ResidentTextEncoder:
    return load_text_encoder(shortened(source, layers), dtype, "cpu", fix_regex=False)


def streamed(
    source: Source,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    portion_tokens: int = 10**6,
    memory_bytes: int = 2**30,
    **given,
) -> StreamedTextEncoder:
    encoder = stream_text_encoder(shortened(source, **given), dtype, "cpu", fix_regex=False, folder=folder)
    encoder._portion_tokens, encoder._memory_bytes = portion_tokens, memory_bytes
    return encoder


def same(one: list[TextContext], two: list[TextContext]) -> bool:
    pairs = list(zip(one, two, strict=True))
    return all(torch.equal(a.rows, b.rows) and torch.equal(a.index, b.index) for a, b in pairs)


@pytest.mark.parametrize("dtype", others_slow([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "layers", [(10, 20, 30), *(pytest.param(each, marks=pytest.mark.slow) for each in ((1, 2), (3,)))], ids=str
)
def test_contexts_are_the_bits_of_the_resident_encoder(tiny_source, tmp_path, dtype, layers):
    resident = loaded(tiny_source, dtype, layers)
    encoder = streamed(tiny_source, tmp_path, dtype, layers=layers)
    found = list(encoder.encode_batches(BATCHES))
    for batch, contexts in zip(BATCHES, found, strict=True):
        assert contexts[0].rows.dtype == dtype
        assert same(contexts, resident.encode(batch))
        assert same(contexts, encoder.encode(batch))
    assert encoder.truncated == resident.truncated == tuple(BATCHES[2])
    assert encoder.lengths(BATCHES[1]) == resident.lengths(BATCHES[1])


def mean_of_values(value: torch.Tensor) -> torch.Tensor:
    return value.mean(dim=-2, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "fill",
    [lambda value: value[..., :1, :] * float("nan"), pytest.param(mean_of_values, marks=pytest.mark.slow)],
    ids=["nan", "mean"],
)
def test_contexts_do_not_depend_on_what_a_kernel_gives_in_fully_masked_rows(
    tiny_source, tmp_path, monkeypatch, dtype, fill
):
    expected = loaded(tiny_source, dtype).encode(BATCHES[0])
    attention, filled = torch.nn.functional.scaled_dot_product_attention, []

    def other_kernel(query, key, value, attn_mask=None, **given):
        output = attention(query, key, value, attn_mask=attn_mask, **given)
        blank = ~attn_mask.any(dim=-1, keepdim=True)
        filled.append(int(blank.sum()))
        return torch.where(blank, fill(value), output)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", other_kernel)
    assert same(loaded(tiny_source, dtype).encode(BATCHES[0]), expected)
    assert same(streamed(tiny_source, tmp_path, dtype).encode(BATCHES[0]), expected)
    assert min(filled) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_padding_row_is_the_token_and_what_each_mlp_adds_to_it(tiny_source, dtype):
    encoder = loaded(tiny_source, dtype)
    (context,) = encoder.encode(["a cat"])
    model = encoder._model
    # Twice the same row: on the CPU a product with one row may take another kernel, with other last digits.
    state = model.embed_tokens(torch.tensor([[encoder._tokenizer.pad_token_id] * 2]))
    states = {}
    with torch.no_grad():
        for number, layer in enumerate(model.layers, 1):
            state = states[number] = state + layer.mlp(layer.post_attention_layernorm(state))
    assert torch.equal(context.rows[0], torch.cat([states[layer][0, 0] for layer in (10, 20, 30)]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_behind_the_text_attends_to_it_and_is_left_alone(tiny_source, side):
    batch = loaded(tiny_source, layers=(1,))._padded([[1, 5, 6], [1]])
    seen = batch.attention_mask if side == "left" else batch.attention_mask.flip(1)
    with_zeros, plain = (loaded(tiny_source, layers=(1,))._model for _ in "ab")
    plain.layers[0].self_attn._forward_hooks.clear()
    found = []
    for model in (with_zeros, plain):
        model.layers[0].self_attn.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
        model(batch.ids, attention_mask=seen, position_ids=batch.positions, use_cache=False)
    assert torch.equal(*found)
    assert bool((found[0][seen == 0] == 0).all()) is (side == "left")


def test_a_padding_row_that_is_not_finite_names_the_layer(tiny_source, tmp_path):
    resident = loaded(tiny_source)
    with torch.no_grad():
        resident._model.layers[14].mlp.down_proj.weight[0] = torch.inf
    stream = streamed(tiny_source, tmp_path)
    read_layer = stream._read_layer

    def damaged(index: int):
        model = read_layer(index)
        if index == 14:
            model.layers[0].mlp.down_proj.weight.data[0] = torch.inf
        return model

    stream._read_layer = damaged
    for encoder in (resident, stream):
        with pytest.raises(DataError, match="not finite after layer 20, for padding"):
            encoder.encode(["a cat"])


def test_a_row_that_is_not_finite_names_the_layer_and_the_prompt(embedded_source):
    encoder = loaded(embedded_source)
    dog, cat = (set(ids) for ids in encoder._tokenize(["a dog", "a cat"]))
    with torch.no_grad():
        encoder._model.embed_tokens.weight[list(cat - dog)] = torch.nan
    with pytest.raises(DataError, match="not finite after layer 10, for 'a cat'") as caught:
        encoder.encode(["a dog", "a cat"])
    assert "dog" not in str(caught.value)


@pytest.mark.parametrize(
    ("memory_bytes", "portion_tokens"),
    [
        (0, 300),
        (100_000, 1),
        (2**30, 10**6),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((0, 1), (0, 10**6), (100_000, 300), (100_000, 10**6), (2**30, 1), (2**30, 300))
        ),
    ],
)
def test_portions_and_the_file_change_no_bit_and_leave_nothing(tiny_source, tmp_path, portion_tokens, memory_bytes):
    layers = (1, 2, 4)
    expected = list(streamed(tiny_source, tmp_path, layers=layers).encode_batches(BATCHES))
    encoder = streamed(tiny_source, tmp_path, layers=layers, portion_tokens=portion_tokens, memory_bytes=memory_bytes)
    for contexts, reference in zip(encoder.encode_batches(BATCHES), expected, strict=True):
        assert same(contexts, reference)
        assert not list(tmp_path.iterdir())


def test_a_layer_is_read_once_for_all_and_none_that_is_not_used(embedded_source, tmp_path):
    encoder = streamed(embedded_source, tmp_path, layers=(2, 4))
    read_layer, read = encoder._read_layer, []
    encoder._read_layer = lambda index: read.append(index) or read_layer(index)
    list(encoder.encode_batches(BATCHES))
    assert read == [0, 1, 2, 3]
    model = read_layer(3)
    stored = load_file(embedded_source.text_encoder.files[0])
    own = {name.rpartition("layers.3.")[2]: tensor for name, tensor in stored.items() if ".layers.3." in name}
    found = {name.removeprefix("layers.0."): tensor for name, tensor in model.state_dict().items()}
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in own.items())


def batch_of(tokens: int) -> TokenBatch:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return TokenBatch(ids, ids, ids)


def test_a_portion_has_at_most_its_tokens_or_one_batch():
    sizes = [
        [batch.tokens for batch in portion] for portion in portions([batch_of(tokens) for tokens in (2, 3, 5, 9, 1)], 6)
    ]
    assert sizes == [[2, 3], [5], [9], [1]]
    assert list(portions([], 6)) == []


def test_shares_of_the_work_grow_to_all_of_it(tiny_source, tmp_path):
    told = []
    list(streamed(tiny_source, tmp_path, portion_tokens=300, layers=(1, 2)).encode_batches(BATCHES, told.append))
    assert told == sorted(told)
    assert len(told) == 2 * (1 + len(BATCHES)), "each layer, each batch, and the padding's own"
    assert told[-1] == 1


def test_an_interruption_keeps_the_portions_before_it(embedded_source, tmp_path):
    """And the next start ends with the bytes of one that was left alone."""
    prompts = [prompt for batch in BATCHES for prompt in batch]
    codec = CODECS[embedded_source.flavour.text.padding_side]("text")

    def files(store: Store) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in store.storage.folder.rglob("*.safetensors")}

    def fill(store: Store, report: Callable[[int, int], None] = lambda *_: None) -> int:
        encoder = streamed(embedded_source, store.storage.folder, portion_tokens=200, memory_bytes=0, layers=(1, 3))
        sizes = {"batch_size": 2, "write_batch_size": 100}
        return fill_contexts(prompts, store, codec, lambda: encoder, **sizes, report=report, world=ALONE).encoded

    def stop(done: int, _total: int) -> None:
        if done >= 5:
            raise KeyboardInterrupt

    whole, broken = Store(LocalStorage(tmp_path / "whole")), Store(LocalStorage(tmp_path / "broken"))
    assert fill(whole) == 8
    with pytest.raises(KeyboardInterrupt):
        fill(broken, stop)
    kept = files(broken)
    assert 0 < len(kept) < 8
    assert len(kept) % 2 == 0
    assert fill(broken) == 8 - len(kept)
    assert files(broken) == files(whole)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".safetensors"}
    assert left <= {LEDGER}


def test_a_missing_layer_shows_before_the_first_is_read(tiny_source, tmp_path):
    stored = load_file(tiny_source.text_encoder.files[0])
    del stored["language_model.model.layers.29.mlp.up_proj.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    source = dataclasses.replace(
        tiny_source, text_encoder=Weights((tmp_path / "model.safetensors",), tiny_source.text_encoder.config)
    )
    with pytest.raises(AccessError, match=r"missing \(1\): layers.29.mlp.up_proj.weight"):
        streamed(source, tmp_path)


def test_what_the_resident_encoder_refuses_is_refused(tiny_source, tmp_path):
    with pytest.raises(ConfigError, match=r"intermediary_layers = 10,33: expected at most 32"):
        streamed(tiny_source, tmp_path, layers=(10, 33))
    with pytest.raises(ConfigError, match=r"tokenizer_max_length = 16: expected at least"):
        streamed(tiny_source, tmp_path, max_length=16)


def test_a_full_disk_is_named(tiny_source, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match="No space left"):
        streamed(tiny_source, tmp_path, memory_bytes=0).encode(["a cat"])


def test_bytes_of_the_resident_encoder_are_its_weights_and_a_batch(embedded_source):
    text = text_from_config(embedded_source.text_encoder.config)

    def needed(dtype: torch.dtype, tokens: int) -> int:
        return sum(resident_text_bytes(text, (10, 20, 30), tokens=tokens, precision=NO_CHANGE, dtype=dtype))

    model = loaded(embedded_source)._model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert needed(torch.float32, 0) == weights
    assert needed(torch.bfloat16, 0) == weights // 2
    assert needed(torch.float32, 7) - weights == 7 * (3 * text.inner + 4 * text.hidden) * 4


LAYERS, HIDDEN, INNER, PER_FILE = 30, 512, 1024, 2
ALLOWED = 40 * 2**20
"""Bytes of private memory, mapped weights included, that a process may have besides what its imports took."""


@pytest.fixture(scope="module")
def large(embedded_source, tmp_path_factory) -> Source:
    """A text encoder of thirty layers and about 130 MiB in bf16, in files of two layers each."""
    folder = tmp_path_factory.mktemp("large")
    config = embedded_source.text_encoder.config
    text = {**config.get("text_config", config)}
    text |= {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "head_dim": 128}
    text |= {"num_attention_heads": 4}
    keys = text["num_key_value_heads"] * 128
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (4 * 128, HIDDEN),
        "self_attn.k_proj": (keys, HIDDEN),
        "self_attn.v_proj": (keys, HIDDEN),
        "self_attn.o_proj": (HIDDEN, 4 * 128),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    if text["model_type"] == "qwen3":
        shapes |= {"self_attn.q_norm": (128,), "self_attn.k_norm": (128,)}
    draws = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(shape, generator=draws) / HIDDEN**0.5 if len(shape) == 2 else torch.ones(shape)).bfloat16()

    files = [folder / "embedding.safetensors"]
    save_file({"model.embed_tokens.weight": drawn((text["vocab_size"], HIDDEN))}, files[0])
    for first in range(0, LAYERS, PER_FILE):
        files.append(folder / f"layers-{first}.safetensors")
        numbers = range(first, first + PER_FILE)
        tensors = {f"model.layers.{n}.{name}.weight": drawn(shape) for n in numbers for name, shape in shapes.items()}
        save_file(tensors, files[-1])
    return dataclasses.replace(embedded_source, text_encoder=Weights(tuple(files), text))


BOUNDED = """
import dataclasses, hashlib, json, resource, sys
from pathlib import Path
import torch
from simpletuner.flux2.load import load_text_encoder, stream_text_encoder
from simpletuner.flux2.source import Source, Weights
from simpletuner.config.flavours import FLAVOURS
from simpletuner.flux2.spec import text_from_config

mode, allowed, folder, request = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
none = Weights((), None)
text = Weights(tuple(map(Path, request["files"])), request["config"])
flavour, tokenizer = FLAVOURS[request["flavour"]], Path(request["tokenizer"])
source = Source("large", flavour, None, none, none, text, tokenizer, (10, 20, 30), 64, None)
# Once with a single layer, so that every library has what it takes.
first = dataclasses.replace(source, text_layers=(1,))
list(stream_text_encoder(first, torch.bfloat16, "cpu", fix_regex=False, folder=folder).encode(["a"]))

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

if allowed:
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData:") + allowed,) * 2)
if mode == "streamed":
    encoder = stream_text_encoder(source, torch.bfloat16, "cpu", fix_regex=False, folder=folder)
    encoder._memory_bytes = 0
else:
    encoder = load_text_encoder(source, torch.bfloat16, "cpu", fix_regex=False)
digest = hashlib.sha256()
for batch in encoder.encode_batches(request["batches"]):
    for context in batch:
        digest.update(context.expanded().view(torch.int16).numpy().data)
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_weights_several_times_larger_than_the_memory(large, tmp_path):
    """The limit holds for all that a process writes to or maps privately, and so for the files' weights too."""
    assert sum(file.stat().st_size for file in large.text_encoder.files) > 3 * ALLOWED
    request = {
        "files": [str(file) for file in large.text_encoder.files],
        "config": large.text_encoder.config,
        "tokenizer": str(large.tokenizer),
        "flavour": large.flavour.name,
        "batches": [["a cat", "a dog"], ["a red square on a white background"]],
    }

    def run(mode: str, allowed: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BOUNDED, mode, str(allowed), str(tmp_path), json.dumps(request)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    bounded = run("streamed", ALLOWED)
    assert bounded.returncode == 0, bounded.stderr
    free = run("resident", 0)
    assert free.returncode == 0, free.stderr
    assert bounded.stdout == free.stdout
    refused = run("resident", ALLOWED)
    assert refused.returncode != 0
    assert "memory" in refused.stderr.lower()
