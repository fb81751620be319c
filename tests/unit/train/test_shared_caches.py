"""Ranks that scan once and share out captions and pictures, on the embedded model."""

import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.ranks import ROOT, in_ranks, together
from tests.thread_ranks import ALONE, on_ranks

from simpletuner.base.errors import AccessError, DataError
from simpletuner.base.storage import LocalStorage
from simpletuner.config.load import LoadedConfig, load
from simpletuner.flux2.base_location import locate_on_each_machine
from simpletuner.flux2.source import Source, locate
from simpletuner.memory.world import World
from simpletuner.train import caches
from simpletuner.train.caches import PreparedData, base_fingerprints, prepare, scan_sets
from simpletuner.train.report import Reporter

FOUND_IN = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
LONG = "many words " * 200
CAPTIONS = ["a barn", "a sign, [INST]", "a tree in a field", LONG, "fog", "a road that leads nowhere in particular"]
CONFIG: dict[str, Any] = {
    "model_flavour": "tiny",
    "output_dir": "out",
    "tokenizer_max_length": 160,
    "mixed_precision": "no",
    "vae_dtype": "fp32",
    "max_workers": 2,
    "max_train_steps": 1,
    "text_encoder_batch_size": 2,
    "vae_batch_size": 2,
}


@pytest.fixture
def project(own_folder: Path, tiny_folder: Path) -> Path:
    """Six captioned pictures in two buckets, one that is none, and two prompts."""
    (own_folder / "pictures").mkdir()
    for index, caption in enumerate(CAPTIONS):
        path = own_folder / "pictures" / f"{index}.png"
        Image.new("RGB", (128, 64) if index % 2 else (64, 128), (40 * index, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(caption)
    (own_folder / "pictures" / "words.png").write_text("not a picture")
    (own_folder / "config").mkdir()
    config = {**CONFIG, "pretrained_model_name_or_path": str(tiny_folder)}
    (own_folder / "config" / "config.json").write_text(json.dumps(config))
    shape = {"resolution": 64, "crop": False, "caption_strategy": "textfile"}
    datasets = [
        {"id": "pictures", "type": "local", "instance_data_dir": "pictures", "cache_dir_vae": "cache/vae", **shape},
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "cache/text"},
    ]
    (own_folder / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    prompts = {"one": "a gradient", "two": "a lighthouse"}
    (own_folder / "config" / "user_prompt_library.json").write_text(json.dumps(prompts))
    return own_folder


@pytest.fixture
def busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process imports three large libraries, which takes long where others compute."""
    monkeypatch.setattr("tests.ranks.TIMEOUT_S", 300.0)


def loaded(*flags: str) -> LoadedConfig:
    return load(list(flags), folder=Path(), environ={})


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def filled(world: World, folder: str, flags: list[str]) -> dict[str, Any]:
    """Fill the caches below `folder`; which files this rank wrote, and what it told."""
    os.chdir(folder)
    written: list[str] = []
    write = LocalStorage.write

    def noted(self: LocalStorage, name: str, data: bytes, *, sync: bool = True) -> None:
        written.append(f"{self.folder.name}/{name}")
        write(self, name, data, sync=sync)

    LocalStorage.write = noted  # type: ignore[method-assign]
    told: list[str] = []
    reporter = Reporter(is_muted=True)
    reporter.say = told.append  # type: ignore[method-assign,assignment]
    found = loaded(*flags)
    source = locate_on_each_machine(world, lambda: locate(found.config, report=told.append))
    prepared = prepare(found, source, world, reporter)
    LocalStorage.write = write  # type: ignore[method-assign]
    context = prepared.contexts(["a gradient"])
    return {"written": written, "told": told, "validation": float(context.rows.double().sum())}


def killed_in_text(world: World, folder: str) -> None:
    """Fill the caches below `folder`; rank 1 dies with SIGKILL once it has written two contexts."""
    os.chdir(folder)
    write = LocalStorage.write
    written = 0

    def counted(self: LocalStorage, name: str, data: bytes, *, sync: bool = True) -> None:
        nonlocal written
        write(self, name, data, sync=sync)
        written += name.endswith(".safetensors")
        if world.rank == 1 and written == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    LocalStorage.write = counted  # type: ignore[method-assign]
    found = loaded("--write_batch_size=1")
    source = locate_on_each_machine(world, lambda: locate(found.config, report=print))
    prepare(found, source, world, Reporter(is_muted=True))


@pytest.mark.usefixtures("project")
def test_rank_0_scans_looks_for_files_and_hashes_and_the_others_hear_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = loaded()
    calls: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(caches, "scan_of", counted("scan", caches.scan_of))
    monkeypatch.setattr(caches, "claim", counted("claim", caches.claim))
    monkeypatch.setattr(caches, "key_of_latents", counted("key of latents", caches.key_of_latents))
    monkeypatch.setattr(Source, "_fingerprint", counted("fingerprint", Source._fingerprint))

    def work(world: World) -> tuple[Source, PreparedData, dict[str, str]]:
        source = locate_on_each_machine(world, counted("locate", lambda: locate(found.config, report=print)))
        model = base_fingerprints(found.config, source, world)
        return source, scan_sets(found, source, world, Reporter(is_muted=True)), model

    ((source, prepared, model),) = on_ranks(1, work)
    alone, calls[:] = list(calls), []
    others = on_ranks(3, work)
    assert others == [(source, prepared, model)] * 3
    assert calls == alone
    assert not torch.distributed.is_initialized()


def on_two_machines(projects: list[LoadedConfig]) -> list[tuple[list[str], list[str]]]:
    """Fill the caches on two machines of two ranks: what each rank wrote, and told. `projects` are the machines'."""
    written: dict[int, list[str]] = {}
    write = LocalStorage.write

    def noted(self: LocalStorage, name: str, data: bytes, *, sync: bool = True) -> None:
        if name.endswith(".safetensors"):
            written.setdefault(threading.get_ident(), []).append(f"{self.folder}/{name}")
        write(self, name, data, sync=sync)

    def fill(world: World) -> tuple[list[str], list[str]]:
        told: list[str] = []
        reporter = Reporter(is_muted=True)
        reporter.say = told.append  # type: ignore[method-assign,assignment]
        found = projects[world.machine]
        source = locate_on_each_machine(world, lambda: locate(found.config, report=print))
        base_fingerprints(found.config, source, world)
        prepare(found, source, world, reporter)
        return written.get(threading.get_ident(), []), told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalStorage, "write", noted)
        return on_ranks(4, fill, machines=2)


def test_machines_fill_a_shared_cache_once_and_others_each_its_own(project: Path) -> None:
    filled(ALONE, str(project), [])
    whole = files(project / "cache")
    (project / "cache").rename(project / "of one")
    shared = on_two_machines([loaded(), loaded()])
    assert files(project / "cache") == whole
    names = [name for written, _ in shared for name in written]
    assert sorted(names) == sorted(f"cache/{name}" for name in whole), "each file once"
    assert all(written for written, _ in shared), "all ranks take part"
    assert [line for line in shared[0][1] if "cache of" in line] == [
        "The 2 machines share the cache of images: it is filled once.",
        "The 2 machines share the cache of captions: it is filled once.",
    ]
    (project / "cache").rename(project / "of all")
    datasets = project / "config" / "multidatabackend.json"
    first = loaded()
    datasets.write_text(datasets.read_text().replace("cache/vae", "other/vae"))
    second = loaded()
    mixed = on_two_machines([first, second])
    assert files(project / "cache") == whole
    latents = {name: content for name, content in whole.items() if name.startswith("vae/")}
    assert files(project / "other") == latents
    written = [sorted(name for name in names if "/vae/" in name) for names, _ in mixed]
    assert len(written[0] + written[1]) == len(written[2] + written[3]) == len(latents)
    assert len([name for names, _ in mixed for name in names if "/text/" in name]) == len(whole) - len(latents)
    assert [line for line in mixed[0][1] if "cache of" in line] == [
        "Each of 2 machines fills its cache of images: they do not share cache/vae.",
        "The 2 machines share the cache of captions: it is filled once.",
    ]


def test_other_images_or_another_model_on_another_machine_are_refused(project: Path, tmp_path: Path) -> None:
    first = loaded()
    (project / "pictures").rename(project / "of machine 0")
    shutil.copytree(project / "of machine 0", project / "pictures")
    (project / "pictures" / "2.txt").write_text("another caption")
    (project / "pictures" / "4.png").unlink()
    datasets = project / "config" / "multidatabackend.json"
    first_sets = datasets.read_text().replace('"pictures", "cache', '"of machine 0", "cache')
    second = loaded()
    datasets.write_text(first_sets)
    first = loaded()
    with pytest.raises(DataError) as error:
        on_two_machines([first, second])
    assert str(error.value).startswith(
        "pictures: 2 images, or their captions, references or masks, differ between machine 1 and machine 0: "
        "2.png, 4.png: expected the same files on every machine. Copy machine 0's "
    )
    model = Path(str(first.config.pretrained_model_name_or_path))
    shutil.copytree(model, tmp_path / "other model")
    weights = next((tmp_path / "other model" / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(AccessError, match=r"machine 1 has another base model than machine 0 \(different transformer\)"):
        on_two_machines([first, loaded(f"--pretrained_model_name_or_path={tmp_path / 'other model'}")])


@pytest.mark.slow
@pytest.mark.usefixtures("busy_machine")
def test_two_processes_fill_the_caches_of_one(project: Path) -> None:
    """Each file is written once, by one rank, and rank 0 reports for all. The encoder is streamed."""
    flags = ["--text_encoder_mode=streamed"]
    alone = filled(ALONE, str(project), flags)
    whole = files(project / "cache")
    assert len(whole) == 6 + 6 + 3, "latents; captions; prompts and the empty text"
    (project / "cache").rename(project / "of one")
    first, second = in_ranks(2, filled, str(project), flags)
    assert files(project / "cache") == whole
    shared = [[name for name in each["written"] if name.endswith(".safetensors")] for each in (first, second)]
    assert all(shared)
    assert sorted(shared[0] + shared[1]) == sorted(name for name in alone["written"] if name.endswith(".safetensors"))
    assert len(set(shared[0] + shared[1])) == len(whole)
    assert shared[1] == second["written"], "what is noted beside the files is noted by rank 0"
    assert [untimed(line) for line in lasting(first["told"])] == [untimed(line) for line in lasting(alone["told"])]
    assert sum("control tokens" in line for line in first["told"]) == 1
    assert sum("1 captions are longer than tokenizer_max_length" in line for line in first["told"]) == 1
    assert first["validation"] == second["validation"] == alone["validation"]


def lasting(lines: list[str]) -> list[str]:
    """Without the lines of progress, of which a slow machine has more."""
    return [line for line in lines if not line.startswith("  ")]


def untimed(line: str) -> str:
    return re.sub(r"encoded in [^,]*,", "encoded,", line)


@pytest.mark.slow
@pytest.mark.usefixtures("busy_machine")
def test_what_a_killed_rank_leaves_is_finished_by_another_number(project: Path) -> None:
    given = json.dumps([killed_in_text.__module__, killed_in_text.__qualname__, [str(project)]])
    command = [sys.executable, "-P", "-m", "tests.ranks", given]
    first, second = together(2, command, PYTHONPATH=os.pathsep.join(FOUND_IN))
    assert second.exit_code == -signal.SIGKILL
    assert first.exit_code != 0
    assert "rank 1 sent no heartbeat for 30 s, while this process waited for" in first.err
    left = files(project / "cache")
    assert 2 < len(left) < 9
    filled(ALONE, str(project), [])
    finished = files(project / "cache")
    assert {name: finished[name] for name in left} == left
    (project / "cache").rename(project / "of two")
    filled(ALONE, str(project), [])
    assert files(project / "cache") == finished
    assert not [path.name for path in project.rglob("*.part")]
