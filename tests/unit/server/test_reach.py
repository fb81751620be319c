"""Every path that a configuration, a list of datasets or a request names, against every way round the guards."""

import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simpletuner.cli.sample import SampleConfig, read_request
from simpletuner.config.datasets import ImageSet, TextStore
from simpletuner.config.load import PAGE_ROOTS_VARIABLE, Examined, examine
from simpletuner.config.options.kinds import Slice
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds
from simpletuner.server.app import create_app
from simpletuner.server.reach import PATHS, PathKind, Reach, of_the_page
from simpletuner.server.roots import Roots

SECRET = "the-secret-outside"
MODELS: tuple[type[Slice], ...] = (RunConfig, ImageSet, TextStore, SampleConfig)
GIVEN_BY_THE_SERVER = {"config", "lora", "run", "out"}
"""Flags that no configuration holds."""

NAMES = {
    PathKind.DOCUMENT: "secret.json",
    PathKind.FOLDER: "folder",
    PathKind.RUN: "folder",
    PathKind.ADAPTER: "secret.safetensors",
    PathKind.MODEL: "secret.safetensors",
}
"""What each kind of path looks for."""
OTHER_KINDS = {
    PathKind.DOCUMENT: "folder.json",
    PathKind.FOLDER: "notes.txt",
    PathKind.RUN: "config/mine",
    PathKind.ADAPTER: "notes.txt",
    PathKind.MODEL: "notes.txt",
}
"""Something in the workspace that is none."""
PIPES = {PathKind.DOCUMENT: "pipe.json"}

ATTACKS = {
    "outside": "{outside}/NAME",
    "parent": "../outside/NAME",
    "parent of a folder": "inner/../../outside/NAME",
    "home": "~/NAME",
    "link to a folder": "link/NAME",
    "link to a file": "link-NAME",
    "hidden folder": ".git/NAME",
    "hidden file": ".NAME",
    "hidden by a link": "visible/NAME",
    "hidden by a placeholder": ".{{model_family}}/NAME",
    "placeholder": "{{model_family}}/../../outside/NAME",
    "variable": "{{env:SECRET_PLACE}}/NAME",
    "variable in a name": "{{env:SECRET_NAME}}-NAME",
    "queue entry": ".simpletuner/queue/000001.json",
    "server's state": ".simpletuner/NAME",
    "process": "/proc/self/cwd/../outside/NAME",
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must neither be read nor changed."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    for name in ("secret.json", "secret.safetensors", "folder/one.png"):
        (folder / name).write_text(json.dumps({SECRET: SECRET}))
    return folder


@pytest.fixture
def attacked(workspace: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with something of everything that an attack may name."""
    for folder in (
        ".git",
        ".simpletuner/queue",
        ".flux2",
        "inner",
        "folder",
        "folder.json",
        "config/mine",
        "output/run",
    ):
        (workspace / folder).mkdir(parents=True)
    for folder in (".git", ".simpletuner", ".flux2"):
        for name in ("secret.json", "secret.safetensors"):
            (workspace / folder / name).write_text(json.dumps({SECRET: SECRET}))
        (workspace / folder / "folder").mkdir()
    for name in (".secret.json", ".secret.safetensors", ".simpletuner/queue/000001.json"):
        (workspace / name).write_text(json.dumps({SECRET: SECRET}))
    (workspace / ".folder").mkdir()
    (workspace / "notes.txt").write_text(SECRET)
    (workspace / "output" / "run" / "events.jsonl").write_text("")
    (workspace / "output" / "run" / "config.json").write_text(json.dumps({SECRET: SECRET}))
    (workspace / "config" / "mine" / "config.json").write_text("{}")
    (workspace / "config" / "mine" / "multidatabackend.json").write_text("[]")
    (workspace / "link").symlink_to(outside)
    (workspace / "visible").symlink_to(".git")
    for name in ("secret.json", "secret.safetensors", "folder"):
        (workspace / f"link-{name}").symlink_to(outside / name)
    for name in ("pipe", "pipe.json"):
        os.mkfifo(workspace / name)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(outside))
    monkeypatch.setenv("SECRET_PLACE", str(outside))
    monkeypatch.setenv("SECRET_NAME", SECRET)
    return workspace


def attacks(key: str, outside: Path) -> Iterator[tuple[str, str]]:
    """Each attack by the option or dataset key, and its value."""
    kind = PATHS[key].kind
    for name, value in ATTACKS.items():
        yield name, value.format(outside=outside).replace("NAME", NAMES[kind])
    yield "another kind", OTHER_KINDS[kind]
    yield "pipe", PIPES.get(kind, "pipe")
    if kind is PathKind.DOCUMENT:
        yield "record of a run", "output/run/config.json"
    if kind is PathKind.RUN:
        yield "workspace", "."


def examined(workspace: Path, config: dict[str, Any], datasets: Any = ()) -> Examined:
    """What a command that the page started says of a configuration."""
    (workspace / "config" / "mine" / "config.json").write_text(json.dumps(config))
    (workspace / "config" / "mine" / "multidatabackend.json").write_text(json.dumps(list(datasets)))
    return examine(["--env=mine"], folder=Path(), environ=os.environ, rule=Reach(workspace).refusal)


def is_refused(key: str, found: Examined) -> bool:
    """Whether a problem says that `key` is against the rule."""
    reasons = ("lies outside the folders", "is hidden", "is not filled in for the page", PATHS[key].kind.value)
    said = [str(problem) for problem in found.problems if f"{key} = " in problem.found]
    return any(reason in text for text in said for reason in reasons)


def text_of(found: Examined) -> str:
    """All that may come back to a client."""
    said = [*map(asdict, found.problems), *found.notices, found.config.model_dump(mode="json"), found.prompts]
    return json.dumps(said, default=str)


def test_every_key_that_names_a_path_is_in_the_table() -> None:
    marked = {
        key for model in MODELS for key, kind in kinds(model).items() if kind.is_path or kind.is_model or kind.is_json
    }
    assert marked | GIVEN_BY_THE_SERVER == set(PATHS)


def test_every_key_that_sounds_like_a_path_is_marked_as_one() -> None:
    sounds_like_one = re.compile(r"(_dir|_path|_file|_folder|_library|_config|_dir_\w+)$")
    texts = {key for model in MODELS for key, kind in kinds(model).items() if kind.base is str and not kind.choices}
    assert {key for key in texts if sounds_like_one.search(key)} <= set(PATHS)


@pytest.mark.parametrize("key", sorted(set(kinds(RunConfig)) & set(PATHS)))
def test_no_option_goes_round_the_guards(attacked: Path, outside: Path, key: str) -> None:
    for attack, value in attacks(key, outside):
        if kinds(RunConfig)[key].is_json and not value.endswith(".json"):
            continue  # a value, and no file's name
        found = examined(attacked, {key: value})
        # In the name of a file with JSON, no placeholder is filled in.
        is_as_typed = kinds(RunConfig)[key].is_json and "{env:" in value
        assert is_refused(key, found) or (is_as_typed and key in {problem.key for problem in found.problems}), attack
        assert SECRET not in text_of(found), attack
        assert not getattr(found.config, key) or getattr(found.config, key) in (value, RunConfig().model_dump()[key])


@pytest.mark.parametrize(
    ("model", "key"),
    [(model, key) for model in (ImageSet, TextStore) for key in sorted(set(kinds(model)) & set(PATHS))],
)
def test_no_dataset_key_goes_round_the_guards(attacked: Path, outside: Path, model: type[Slice], key: str) -> None:
    kind = {"id": "set", "dataset_type": "image" if model is ImageSet else "text_embeds"}
    entry = kind | ({"instance_data_dir": "inner"} if model is ImageSet else {})
    for attack, value in attacks(key, outside):
        found = examined(attacked, {}, [entry | {key: value}])
        assert is_refused(key, found), attack
        assert SECRET not in text_of(found), attack
        assert found.datasets is None


def test_a_set_named_like_a_way_out_has_no_cache_there(attacked: Path) -> None:
    found = examined(attacked, {}, [{"id": "../../../outside", "instance_data_dir": "inner"}])
    assert any(
        "cache_dir_vae" in problem.found and "outside the folders" in problem.found for problem in found.problems
    )


@pytest.mark.parametrize("key", sorted(set(kinds(SampleConfig)) & set(PATHS) - {"lora"}))
def test_no_option_of_sample_goes_round_the_guards(attacked: Path, outside: Path, key: str) -> None:
    environ = os.environ | Reach(attacked).variable()
    for attack, value in attacks(key, outside):
        if kinds(SampleConfig)[key].is_json:
            continue
        with pytest.raises(Exception, match=re.escape(key)) as told:
            read_request([f"--{key}={value}", "--prompt=x"], environ)
        assert SECRET not in str(told.value).replace(value, ""), attack


@pytest.mark.parametrize("name", ["config.json", "multidatabackend.json", "user_prompt_library.json"])
def test_no_document_beside_the_config_is_a_link_that_leads_out(attacked: Path, outside: Path, name: str) -> None:
    path = attacked / "config" / "mine" / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "secret.json")
    found = examine(["--env=mine"], folder=Path(), environ=os.environ, rule=Reach(attacked).refusal)
    assert any("lies outside the folders of this page" in problem.found for problem in found.problems)
    assert SECRET not in text_of(found)


def test_what_the_rule_allows_is_as_without_it(attacked: Path) -> None:
    config = {
        "model_flavour": "tiny",
        "output_dir": "output/{model_family}",
        "data_backend_config": "{output_dir}/../../sets.json",
        "pretrained_model_name_or_path": "some/model",
        "resume_from_checkpoint": "latest",
        "tread_config": "routes.json",
        "cache_dir": "inner",
        "report_to": "none",
    }
    (attacked / "output" / "flux2").mkdir()
    (attacked / "sets.json").write_text('[{"id": "set", "instance_data_dir": "inner", "resolution": 128}]')
    (attacked / "routes.json").write_text(
        '{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 2}]}'
    )
    confined = examined(attacked, config)
    assert confined.problems == ()
    assert confined == examine(["--env=mine"], folder=Path(), environ=os.environ)


def test_a_root_that_is_hidden_itself_is_no_hidden_path(tmp_path: Path) -> None:
    root = tmp_path / ".cache" / "models"
    (root / "one").mkdir(parents=True)
    reach = Reach(tmp_path / "workspace", (root,))
    assert reach.refusal("pretrained_model_name_or_path", str(root / "one")) is None
    assert reach.refusal("pretrained_model_name_or_path", str(root / ".one")) is not None


def test_a_command_knows_the_roots_from_its_environment_and_no_option_comes_of_it(workspace: Path) -> None:
    reach = Reach(workspace, (workspace.parent / "other",))
    assert of_the_page(reach.variable()) == reach
    assert of_the_page({}) is None
    found = examine([], folder=workspace, environ=reach.variable())
    assert PAGE_ROOTS_VARIABLE not in text_of(found)


DOCUMENT_OPTIONS = {"datasets": "data_backend_config", "prompts": "user_prompt_library"}


@pytest.mark.parametrize("document", DOCUMENT_OPTIONS)
def test_the_page_neither_reads_nor_writes_what_a_config_must_not_name(
    attacked: Path, outside: Path, document: str
) -> None:
    before = {path: path.read_bytes() for path in attacked.parent.rglob("*") if path.is_file()}
    config = attacked / "config" / "mine" / "config.json"
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        for attack, value in attacks(DOCUMENT_OPTIONS[document], outside):
            config.write_text(json.dumps({DOCUMENT_OPTIONS[document]: value}))
            told = client.get("/api/environment", params={"name": "mine"})
            assert told.json()["documents"][document] == {"path": value, "text": None, "revision": ""}, attack
            for revision in ("", "0" * 64):
                answer = client.put(
                    "/api/environment/document",
                    params={"name": "mine", "document": document},
                    json={"text": "{}", "revision": revision},
                )
                assert answer.status_code in (403, 422), attack
                assert SECRET not in told.text + answer.text
    after = {path: path.read_bytes() for path in attacked.parent.rglob("*") if path.is_file()}
    assert before | {config: b""} == after | {config: b""}


def test_a_document_is_edited_where_a_placeholder_leads(attacked: Path) -> None:
    config = attacked / "config" / "mine" / "config.json"
    config.write_text(json.dumps({"data_backend_config": "inner/{model_family}.json"}))
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        told = client.get("/api/environment", params={"name": "mine"}).json()["documents"]["datasets"]
        assert told["path"] == "inner/flux2.json"


def test_a_check_tells_every_path_and_no_secret(attacked: Path, outside: Path) -> None:
    options = {key: str(outside / NAMES[PATHS[key].kind]) for key in sorted(set(kinds(RunConfig)) & set(PATHS))}
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        # The datasets are given too, so that a flag replaces their place.
        answer = client.post("/api/check", json={"name": "mine", "config": json.dumps(options), "datasets": "[]"})
    told = {problem["key"] for problem in answer.json()["problems"] if "outside the folders" in problem["text"]}
    assert told == set(options)
    assert SECRET not in answer.text


STARTS = ["run/start", "queue", "jobs/scan", "jobs/cache", "plan"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"output_dir": "{model_family}/../../outside/run"},
        {"output_dir": "output/{env:SECRET_NAME}"},
        {"data_backend_config": "link/secret.json"},
        {"tread_config": "../outside/secret.json"},
    ],
)
@pytest.mark.parametrize("route", STARTS)
def test_nothing_starts_with_what_a_config_must_not_name(
    attacked: Path, outside: Path, route: str, config: dict[str, str]
) -> None:
    text = json.dumps(config | {"model_flavour": "tiny"})
    (attacked / "config" / "mine" / "config.json").write_text(text)
    body = {"name": "mine", "config": text} if route == "plan" else {"environment": "mine"}
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        answer = client.post(f"/api/{route}", json=body)
        if route.startswith("jobs/"):
            where = f"/api/jobs/{answer.json()['id']}"
            while (answer := client.get(where)).json()["state"] == "running":
                time.sleep(0.05)
            assert answer.json()["state"] == "failed"
        else:
            assert answer.status_code == 422
    assert SECRET not in answer.text
    assert not (outside / "run").exists()
    assert not list((attacked / ".simpletuner" / "queue").glob("00000[2-9]*"))
