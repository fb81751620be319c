"""Hashes of a base model's files: made once, found while a file is what it was, made again when it is not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.base.errors import AccessError
from simpletuner.base.files import sha256_bytes
from simpletuner.base.tensorfile import read_header
from simpletuner.flux2.content import PIECE_BYTES, ContentHashes

LONG_AGO = 1_000_000_000


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Larger than all pieces that are sampled; older than what could change unseen."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.arange(300_000, dtype=torch.float32), "b": torch.ones(7)}, path)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "hashes.json"


def hashes(weights: Path, ledger: Path | None, **options: bool) -> dict[str, str]:
    """As a new process finds them."""
    return ContentHashes(ledger, pytest.fail, **options).of(read_header(weights))


def poisoned(ledger: Path) -> None:
    """Give every hash in the ledger another value, so that a test sees whether it is used."""
    stored = json.loads(ledger.read_text(encoding="utf-8"))
    for row in stored["files"].values():
        row["tensors"] = dict.fromkeys(row["tensors"], "f" * 64)
    ledger.write_text(json.dumps(stored), encoding="utf-8")


def overwrite(path: Path, position: int) -> None:
    """Change four bytes in place; size, inode and time stay."""
    with path.open("r+b") as file:
        file.seek(position)
        file.write(b"\x11\x22\x33\x44")
    os.utime(path, (LONG_AGO, LONG_AGO))


def test_a_hash_is_of_all_bytes_of_a_tensor(weights: Path, ledger: Path) -> None:
    tensors = load_file(weights)
    expected = {name: sha256_bytes(tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    assert hashes(weights, ledger) == hashes(weights, None) == expected


def test_a_file_is_hashed_once(weights: Path, ledger: Path) -> None:
    before = hashes(weights, ledger)
    poisoned(ledger)
    assert set(hashes(weights, ledger).values()) == {"f" * 64}
    assert hashes(weights, ledger, verify=True) == before
    assert hashes(weights, ledger) == before, "what was verified is kept"


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_change_in_a_piece_is_seen_though_size_time_and_inode_are_the_same(
    weights: Path, ledger: Path, where: str
) -> None:
    before = hashes(weights, ledger)
    entry = read_header(weights)["a"]
    size = weights.stat().st_size
    middle = (size - PIECE_BYTES) * 30 // 63
    overwrite(weights, {"first": entry.start, "middle": middle + 8, "last": size - 64}[where])
    assert hashes(weights, ledger) != before
    assert hashes(weights, ledger) == hashes(weights, None)


def test_a_change_between_the_pieces_is_seen_by_the_time_or_when_asked_to(weights: Path, ledger: Path) -> None:
    before = hashes(weights, ledger)
    overwrite(weights, (weights.stat().st_size - PIECE_BYTES) * 30 // 63 + PIECE_BYTES + 64)
    assert hashes(weights, ledger) == before
    assert hashes(weights, ledger, verify=True) != before
    os.utime(weights, (LONG_AGO, LONG_AGO + 1))
    assert hashes(weights, ledger) != before


def test_the_same_bytes_at_another_time_or_place_have_the_same_hashes(
    weights: Path, ledger: Path, tmp_path: Path
) -> None:
    before = hashes(weights, ledger)
    os.utime(weights, (LONG_AGO, LONG_AGO + 5))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert hashes(weights, ledger) == hashes(copy, ledger) == before


def test_a_file_that_may_still_change_is_not_entered(weights: Path, ledger: Path) -> None:
    os.utime(weights)
    hashes(weights, ledger)
    assert not ledger.exists()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[:-40],
    "deep": lambda _: b"[" * 100_000,
    "a list of files": lambda _: b'{"version": 1, "files": [1]}',
    "another version": lambda _: b'{"version": 2}',
    "a wrong type": lambda data: data.replace(b'"samples": "', b'"samples": 7, "x": "'),
    "not UTF-8": lambda _: b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_ledger_counts_as_none_and_is_replaced(weights: Path, ledger: Path, damage: str) -> None:
    before = hashes(weights, ledger)
    ledger.write_bytes(DAMAGE[damage](ledger.read_bytes()))
    assert hashes(weights, ledger) == before
    poisoned(ledger)
    assert set(hashes(weights, ledger).values()) == {"f" * 64}, "it was written anew"


def test_a_ledger_that_cannot_be_written_is_said_and_costs_nothing_else(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told: list[str] = []
    found = ContentHashes(tmp_path / "file" / "hashes.json", told.append).of(read_header(weights))
    assert found == hashes(weights, None)
    assert len(told) == 1
    assert told[0].startswith(
        "The base model's hashes cannot be stored, so the next run computes them again: cannot write"
    )


def test_a_file_that_went_away_is_named(weights: Path) -> None:
    entries = read_header(weights)
    weights.unlink()
    with pytest.raises(AccessError, match=r"cannot read .*weights\.safetensors"):
        ContentHashes().of(entries)
