"""Every path that a configuration, a list of datasets or a request names, against every way round the guards."""

import json
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from simpletuner.base.errors import ConfigError
from simpletuner.cli.sample import SampleConfig, read_request
from simpletuner.config.datasets import ConditioningSet, ImageSet, TextStore
from simpletuner.config.load import PAGE_ROOTS_VARIABLE, ExaminedConfig, examine
from simpletuner.config.options.kinds import Slice
from simpletuner.config.run import RunConfig
from simpletuner.config.values import kinds
from simpletuner.server.app import create_app
from simpletuner.server.reach import PATHS, PathKind, Reach, page_reach
from simpletuner.server.roots import Roots

SECRET = "the-secret-outside"
ENTRIES: dict[type[Slice], dict[str, str]] = {
    ImageSet: {"dataset_type": "image"},
    ConditioningSet: {"dataset_type": "conditioning", "conditioning_type": "mask"},
    TextStore: {"dataset_type": "text_embeds"},
}
"""What tells the kinds of entries in a list of datasets apart."""
MODELS: tuple[type[Slice], ...] = (RunConfig, *ENTRIES, SampleConfig)
GIVEN_BY_THE_SERVER = {"config", "lora", "run", "out", "references"}
"""Flags that no configuration holds; `references` also stand in a prompt library."""
LISTS_OR_FILES = {"caption_filter_list"}
"""Dataset keys that are a list of texts, or the path of a file with one."""

NAMES = {
    PathKind.DOCUMENT: "secret.json",
    PathKind.TEXTS: "secret.json",
    PathKind.FOLDER: "folder",
    PathKind.RUN: "folder",
    PathKind.ADAPTER: "secret.safetensors",
    PathKind.MODEL: "secret.safetensors",
    PathKind.IMAGE: "secret.png",
}
"""What each kind of path looks for."""
OTHER_KINDS = {
    PathKind.DOCUMENT: "folder.json",
    PathKind.TEXTS: "folder.json",
    PathKind.FOLDER: "notes.txt",
    PathKind.RUN: "config/mine",
    PathKind.ADAPTER: "notes.txt",
    PathKind.MODEL: "notes.txt",
    PathKind.IMAGE: "notes.txt",
}
"""Something in the workspace that is none."""
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
WAYS = [*ATTACKS, "another kind", "pipe"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must neither be read nor changed."""
    folder = tmp_path / "outside"
    (folder / "folder").mkdir(parents=True)
    for name in ("secret.json", "secret.safetensors", "secret.png", "folder/one.png"):
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
        for name in ("secret.json", "secret.safetensors", "secret.png"):
            (workspace / folder / name).write_text(json.dumps({SECRET: SECRET}))
        (workspace / folder / "folder").mkdir()
    for name in (".secret.json", ".secret.safetensors", ".secret.png", ".simpletuner/queue/000001.json"):
        (workspace / name).write_text(json.dumps({SECRET: SECRET}))
    (workspace / ".folder").mkdir()
    (workspace / "notes.txt").write_text(SECRET)
    (workspace / "output" / "run" / "events.jsonl").write_text("")
    (workspace / "output" / "run" / "config.json").write_text(json.dumps({SECRET: SECRET}))
    (workspace / "config" / "mine" / "config.json").write_text("{}")
    (workspace / "config" / "mine" / "multidatabackend.json").write_text("[]")
    (workspace / "link").symlink_to(outside)
    (workspace / "visible").symlink_to(".git")
    for name in ("secret.json", "secret.safetensors", "secret.png", "folder"):
        (workspace / f"link-{name}").symlink_to(outside / name)
    for name in ("pipe", "pipe.json"):
        os.mkfifo(workspace / name)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("HOME", str(outside))
    monkeypatch.setenv("SECRET_PLACE", str(outside))
    monkeypatch.setenv("SECRET_NAME", SECRET)
    return workspace


def attack_value(attack: str, key: str, outside: Path) -> str:
    """What an attack gives an option or dataset key."""
    kind = PATHS[key].kind
    if attack == "another kind":
        return OTHER_KINDS[kind]
    if attack == "pipe":
        return "pipe.json" if kind in (PathKind.DOCUMENT, PathKind.TEXTS) else "pipe"
    return ATTACKS[attack].format(outside=outside).replace("NAME", NAMES[kind])


def examined(workspace: Path, config: dict[str, Any], datasets: Any = ()) -> ExaminedConfig:
    """What a command that the page started says of a configuration."""
    (workspace / "config" / "mine" / "config.json").write_text(json.dumps(config))
    (workspace / "config" / "mine" / "multidatabackend.json").write_text(json.dumps(list(datasets)))
    return examine(["--env=mine"], folder=Path(), environ=os.environ, rule=Reach(workspace).refusal)


def is_refused(key: str, found: ExaminedConfig | ConfigError) -> bool:
    """Whether a problem says that `key` is against the rule."""
    reasons = ("lies outside the folders", "is hidden", "the page does not fill in", PATHS[key].kind.value)
    said = [str(problem) for problem in found.problems if f"{key} = " in problem.found]
    return any(reason in text for text in said for reason in reasons)


def text_of(found: ExaminedConfig) -> str:
    """All that may come back to a client."""
    said = [*map(asdict, found.problems), *found.notices, found.config.model_dump(mode="json"), found.prompts]
    return json.dumps(said, default=str)


def test_every_key_that_names_a_path_is_in_the_table() -> None:
    marked = {
        key for model in MODELS for key, kind in kinds(model).items() if kind.is_path or kind.is_model or kind.is_json
    }
    assert marked | GIVEN_BY_THE_SERVER | LISTS_OR_FILES == set(PATHS)


def test_every_key_that_sounds_like_a_path_is_marked_as_one() -> None:
    sounds_like_one = re.compile(r"(_dir|_path|_file|_folder|_library|_config|_dir_\w+)$")
    texts = {key for model in MODELS for key, kind in kinds(model).items() if kind.base is str and not kind.choices}
    assert {key for key in texts if sounds_like_one.search(key)} <= set(PATHS)


@pytest.mark.parametrize("attack", WAYS)
def test_no_option_goes_round_the_guards(attacked: Path, outside: Path, attack: str) -> None:
    config = {}
    for key in sorted(set(kinds(RunConfig)) & set(PATHS)):
        value = attack_value(attack, key, outside)
        # What is no name of a .json file is a JSON value itself, and in such a name no placeholder is filled in.
        if not kinds(RunConfig)[key].is_json or (value.endswith(".json") and "{" not in value):
            config[key] = value
    found = examined(attacked, config)
    assert [key for key in config if not is_refused(key, found)] == []
    assert SECRET not in text_of(found)
    assert not [key for key in config if str(outside) in str(getattr(found.config, key))]


@pytest.mark.parametrize("attack", WAYS)
@pytest.mark.parametrize("model", ENTRIES)
def test_no_dataset_key_goes_round_the_guards(attacked: Path, outside: Path, model: type[Slice], attack: str) -> None:
    paths = {key: attack_value(attack, key, outside) for key in sorted(set(kinds(model)) & set(PATHS))}
    entry = {"id": "set", **ENTRIES[model]}
    found = examined(attacked, {}, [entry | paths])
    assert [key for key in paths if not is_refused(key, found)] == []
    assert SECRET not in text_of(found)
    assert found.datasets is None


@pytest.mark.parametrize("attack", WAYS)
def test_no_reference_of_a_prompt_goes_round_the_guards(attacked: Path, outside: Path, attack: str) -> None:
    library = {"one": {"prompt": "x", "references": [attack_value(attack, "references", outside)]}}
    (attacked / "config" / "mine" / "user_prompt_library.json").write_text(json.dumps(library))
    found = examined(attacked, {})
    assert is_refused("references", found)
    assert found.prompts == {}


def test_a_set_named_like_a_way_out_has_no_cache_there(attacked: Path) -> None:
    found = examined(attacked, {}, [{"id": "../../../outside", "instance_data_dir": "inner"}])
    assert any(
        "cache_dir_vae" in problem.found and "outside the folders" in problem.found for problem in found.problems
    )


@pytest.mark.parametrize("attack", WAYS)
def test_no_option_of_sample_goes_round_the_guards(attacked: Path, outside: Path, attack: str) -> None:
    keys = [key for key, kind in kinds(SampleConfig).items() if key in PATHS and (kind.is_path or kind.is_model)]
    flags = [f"--{key}={attack_value(attack, key, outside)}" for key in keys]
    with pytest.raises(ConfigError) as told:
        read_request([*flags, "--prompt=x"], os.environ | Reach(attacked).variable())
    assert [key for key in keys if not is_refused(key, told.value)] == []
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("attack", WAYS)
def test_no_reference_of_sample_goes_round_the_guards(attacked: Path, outside: Path, attack: str) -> None:
    flag = f"--references={attack_value(attack, 'references', outside)}"
    with pytest.raises(ConfigError) as told:
        read_request([flag, "--prompt=x"], os.environ | Reach(attacked).variable())
    assert is_refused("references", told.value)


def test_sample_does_not_read_a_runs_config_through_a_link_that_leads_out(attacked: Path, outside: Path) -> None:
    (attacked / "output" / "run" / "config.json").unlink()
    (attacked / "output" / "run" / "config.json").symlink_to(outside / "secret.json")
    with pytest.raises(ConfigError, match="lies outside the folders") as told:
        read_request(["--run=output/run", "--prompt=x"], os.environ | Reach(attacked).variable())
    assert SECRET not in str(told.value)


@pytest.mark.parametrize("name", ["config.json", "multidatabackend.json", "user_prompt_library.json"])
def test_no_document_beside_the_config_is_a_link_that_leads_out(attacked: Path, outside: Path, name: str) -> None:
    path = attacked / "config" / "mine" / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "secret.json")
    found = examine(["--env=mine"], folder=Path(), environ=os.environ, rule=Reach(attacked).refusal)
    assert any("lies outside the folders of this page" in problem.found for problem in found.problems)
    assert SECRET not in text_of(found)


def test_a_run_writes_over_no_configuration_and_not_into_the_workspace_itself(attacked: Path) -> None:
    for place in ("config/mine", ".", "{model_family}/.."):
        assert is_refused("output_dir", examined(attacked, {"output_dir": place})), place
    for place in ("output/run", "output/new", "folder"):
        assert not is_refused("output_dir", examined(attacked, {"output_dir": place})), place


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
    assert page_reach(reach.variable()) == reach
    assert page_reach({}) is None
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
        values = {attack: attack_value(attack, DOCUMENT_OPTIONS[document], outside) for attack in WAYS}
        for attack, value in (values | {"record of a run": "output/run/config.json"}).items():
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


def test_an_example_is_not_drawn_through_a_link_that_leads_out(attacked: Path, outside: Path) -> None:
    (attacked / "datasets").symlink_to(outside)
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        answer = client.post("/api/environments", json={"name": "new", "kind": "example", "source": "tiny-lora"})
    assert answer.status_code == 403
    assert not (outside / "tiny-lora").exists()


def test_nothing_is_asked_of_a_run_through_a_link_that_leads_out(attacked: Path, outside: Path) -> None:
    (attacked / "output" / "run" / "control").symlink_to(outside / "folder")
    with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
        for wish in ("stop", "save", "validate"):
            assert client.post(f"/api/run/{wish}", json={"run": "output/run"}).status_code == 403
    assert [path.name for path in (outside / "folder").iterdir()] == ["one.png"]


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


@pytest.mark.slow
def test_a_run_that_the_page_starts_holds_its_own_configuration_to_the_rule(attacked: Path, outside: Path) -> None:
    environment = attacked / "config" / "mine"
    sets = [{"id": "set", "instance_data_dir": "inner", "resolution": 128}]
    (environment / "multidatabackend.json").write_text(json.dumps(sets))
    for attempt in range(10):  # on a machine so busy that the process has read it before, once more
        config = {"model_flavour": "tiny", "output_dir": f"output/new-{attempt}"}
        (environment / "config.json").write_text(json.dumps(config))
        with TestClient(create_app(Roots(attacked)), base_url="http://localhost:8001") as client:
            started = client.post("/api/run/start", json={"environment": "mine"}).raise_for_status().json()
            config["init_lora"] = str(outside / NAMES[PathKind.ADAPTER])
            (environment / "config.json").write_text(json.dumps(config))
            while started["state"] in ("starting", "running"):
                time.sleep(0.05)
                started = client.get("/api/run", params={"run": started["run"]}).json()
        assert started["state"] == "failed"  # there is no image in its set either
        if "lies outside the folders of this page" in started["error"]:
            break
    else:
        raise AssertionError(started["error"])
