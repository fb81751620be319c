"""Which way the text encoder is held."""

from pathlib import Path

import pytest
import torch

from simpletuner.base import machine
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.offload import OffloadOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.flux2.components import open_text_encoder
from simpletuner.flux2.source import Source, locate
from simpletuner.flux2.text import ResidentTextEncoder, TextEncoder
from simpletuner.flux2.text_stream import StreamedTextEncoder

CPU = torch.device("cpu")


@pytest.fixture
def source(tiny_folder: Path) -> Source:
    return locate(ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(tiny_folder)), report=print)


@pytest.fixture
def said() -> list[str]:
    return []


def opened(source: Source, said: list[str], *, sharing: int = 1, **given: object) -> TextEncoder:
    precision = PrecisionOptions.model_validate({"mixed_precision": "no", **given})
    model = ModelOptions(model_flavour="tiny", tokenizer_max_length=160)
    return open_text_encoder(
        model, precision, OffloadOptions(), source, CPU, folder=Path(), report=said.append, processes=sharing
    )


def available(monkeypatch: pytest.MonkeyPatch, kib: int) -> None:
    Path("meminfo").write_text(f"MemTotal: {kib} kB\nMemAvailable: {kib} kB\n")
    monkeypatch.setattr(machine, "MEMINFO", Path("meminfo"))
    monkeypatch.setattr(machine, "OWN_CGROUP", Path("no groups"))


@pytest.mark.parametrize(("mode", "kind"), [("resident", ResidentTextEncoder), ("streamed", StreamedTextEncoder)])
def test_what_is_asked_for_is_taken_without_a_word(source: Source, said: list[str], mode: str, kind: type) -> None:
    assert type(opened(source, said, text_encoder_mode=mode)) is kind
    assert said == []


def test_auto_takes_what_fits_and_says_why(source: Source, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, kib=2**20)
    assert type(opened(source, said)) is ResidentTextEncoder
    available(monkeypatch, kib=2**10)
    assert type(opened(source, said)) is StreamedTextEncoder
    resident, streamed = said
    needed = resident.split(" up to ")[1].split(";")[0]
    assert resident == f"The text encoder is resident: it needs up to {needed}; 1.00 GiB of memory is free."
    start = "The text encoder is streamed, one layer at a time: resident, it would need up to"
    assert streamed == f"{start} {needed}; 1.0 MiB of memory is free."


def test_processes_that_share_the_memory_count_on_their_part(
    source: Source, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    available(monkeypatch, kib=2**10)
    opened(source, said)
    needed_mib = float(said[0].split(" up to ")[1].split(" MiB")[0])
    available(monkeypatch, kib=int((2.5 * needed_mib) * 2**10))
    assert type(opened(source, said, sharing=2)) is ResidentTextEncoder
    assert said[-1].endswith(" of memory is free for each of 2 processes.")
    assert type(opened(source, said, sharing=3)) is StreamedTextEncoder


def test_a_larger_batch_needs_more(source: Source, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, kib=30 * 2**10)
    assert type(opened(source, said)) is ResidentTextEncoder
    assert type(opened(source, said, text_encoder_batch_size=1000)) is StreamedTextEncoder
