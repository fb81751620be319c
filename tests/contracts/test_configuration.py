"""What the configuration promises as a whole: one early report, the quickstart verbatim, no option that is a lie."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from simpletuner.config.datasets import ConditioningSet, Datasets, ImageSet, TextStore
from simpletuner.config.flags import SELECTORS
from simpletuner.config.load import LoadedConfig, load
from simpletuner.config.options.kinds import Slice
from simpletuner.config.other_keys import LATER_OPTIONS, OTHER_OPTIONS
from simpletuner.config.run import SLICES, RunConfig
from simpletuner.config.values import kinds

SOURCE = Path(__file__).parents[2] / "src" / "simpletuner"
SNIPPETS = Path(__file__).parents[1] / "fixtures" / "quickstart"

FIVE_MISTAKES = {
    "model_flavour": "tiny",
    "learning_rate": -1,
    "flux_lora_target": "al",
    "lora_rnak": 16,
    "validation_resolution": "1000",
}
FIVE_ANSWERS = """\
5 problems in the configuration:
  - learning_rate = -1: expected a number above 0.
  - flux_lora_target = 'al': expected all, attention, mlp or tiny.
  - lora_rnak: no such option. Did you mean lora_rank?
  - validation_resolution = '1000': expected a size such as 1024, 1024x768 or a comma list of them, each side \
divisible by 16.
  - config/multidatabackend.json, cats: instance_data_dir = 'datasets/cats': no such folder. The path is relative to \
{folder}/datasets.
"""


@pytest.fixture
def five_mistakes(tmp_path: Path) -> Path:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(FIVE_MISTAKES))
    datasets = [{"id": "cats", "instance_data_dir": "datasets/cats"}]
    (tmp_path / "config" / "multidatabackend.json").write_text(json.dumps(datasets))
    return tmp_path


def test_five_mistakes_get_one_report_at_once_and_without_torch(five_mistakes: Path) -> None:
    def answer(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", *options, "-m", "simpletuner", "train"]
        return subprocess.run(command, cwd=five_mistakes, capture_output=True, text=True, check=False)

    report = answer()
    assert (report.returncode, report.stdout) == (2, "")
    assert report.stderr == FIVE_ANSWERS.format(folder=five_mistakes)
    # benchmarks/start_up.py times it. What makes it slow is what it imports.
    traced = answer("-X", "importtime").stderr
    imported = {line.rsplit("|", 1)[1].strip() for line in traced.splitlines() if "|" in line}
    assert {"pydantic", "simpletuner.config.load"} <= imported
    assert not imported & {"torch", "numpy", "diffusers", "transformers", "safetensors", "huggingface_hub"}
    assert not imported & {f"simpletuner.{package}" for package in ("data", "flow", "memory", "train")}


@pytest.fixture
def quickstart(tmp_path: Path) -> Path:
    """A folder that holds what the quickstart tells its reader to write."""
    (tmp_path / "datasets" / "my-dataset").mkdir(parents=True)
    (tmp_path / "config").mkdir()
    for name in ("config.json", "multidatabackend.json", "user_prompt_library.json"):
        (tmp_path / "config" / name).write_bytes((SNIPPETS / name).read_bytes())
    return tmp_path


def merged(folder: Path, snippet: str) -> LoadedConfig:
    """The configuration with a fragment of the quickstart merged over its config."""
    path = folder / "config" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | json.loads((SNIPPETS / snippet).read_bytes())))
    return load([], folder=folder, environ={})


def test_the_quickstart_is_accepted_as_it_stands(quickstart: Path) -> None:
    loaded = load([], folder=quickstart, environ={})
    typed = json.loads((SNIPPETS / "config.json").read_bytes())
    assert {key: value for key, value in loaded.config.model_dump().items() if key in typed} == typed
    (image_set,) = loaded.datasets.train_sets
    typed_set, typed_store = json.loads((SNIPPETS / "multidatabackend.json").read_bytes())
    typed_set |= {key: str(quickstart / typed_set[key]) for key in ("cache_dir_vae", "instance_data_dir")}
    assert {key: value for key, value in image_set.model_dump().items() if key in typed_set} == typed_set
    typed_store["cache_dir"] = str(quickstart / typed_store["cache_dir"])
    assert loaded.datasets.text_store_of(image_set).model_dump(include=typed_store.keys()) == typed_store
    assert list(loaded.prompts) == ["portrait_subject", "artistic_subject", "cinematic_subject"]


def test_the_quickstart_trains_tiny_with_three_flags(quickstart: Path) -> None:
    flags = ["--model_flavour", "tiny", "--output_dir", "out", "--max_train_steps", "4"]
    config = load(flags, folder=quickstart, environ={}).config
    assert (config.model_flavour, config.max_train_steps, config.pretrained_model_name_or_path) == ("tiny", 4, None)


def route(start: int, end: int) -> dict[str, object]:
    return {"selection_ratio": 0.5, "start_layer_idx": start, "end_layer_idx": end}


@pytest.mark.parametrize(
    ("snippet", "expected"),
    [
        ("guidance-constant.json", {"flux_guidance_mode": "constant", "flux_guidance_value": 1.0}),
        ("guidance-random-range.json", {"flux_guidance_min": 1.0, "flux_guidance_max": 5.0}),
        ("lora-target.json", {"flux_lora_target": "all"}),
        (
            "quantization.json",
            {
                "base_model_precision": "int8-quanto",
                "text_encoder_1_precision": "int8-quanto",
                "base_model_default_dtype": "bf16",
            },
        ),
        ("tread-start2.json", {"tread_config": {"routes": [route(2, -2)]}}),
        ("tread-start4.json", {"tread_config": {"routes": [route(4, -4)]}}),
    ],
)
def test_its_fragments_are_accepted(quickstart: Path, snippet: str, expected: dict[str, object]) -> None:
    config = merged(quickstart, snippet).config
    assert config.model_dump(include=set(expected)) == expected


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """Every source file that may read an option: not the options, nor what only checks or documents them."""
    silent = {"rules.py", "record.py", "reference.py", "flags.py", "listing.py", "datasets.py"}
    for path in SOURCE.rglob("*.py"):
        inside = path.relative_to(SOURCE).parts
        if inside[0] != "config" or (inside[1] != "options" and path.name not in silent):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def attributes(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


@cache
def read_attributes() -> frozenset[str]:
    """Names of the attributes that the program reads; parsed when a test first asks for them."""
    return frozenset().union(*(attributes(tree) for _, tree in trees()))


def derived(model: type[Slice]) -> dict[str, set[str]]:
    """What each property of `model` is made of."""
    tree = ast.parse(inspect.getsource(sys.modules[model.__module__]))
    return {
        node.name: attributes(node)
        for definition in tree.body
        if isinstance(definition, ast.ClassDef) and definition.name == model.__name__
        for node in definition.body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("model", [*SLICES, ImageSet, ConditioningSet, TextStore], ids=lambda model: model.__name__)
def test_every_option_is_read(model: type[Slice]) -> None:
    """An option that nothing reads is a lie. One with a single value has nothing to tell: all else is refused."""
    properties = derived(model) | derived(Datasets)
    everywhere = read_attributes()
    read = everywhere.union(*(sources for name, sources in properties.items() if name in everywhere))
    unread = [name for name, kind in kinds(model).items() if name not in read and len(kind.choices) != 1]
    assert unread == []


def test_no_key_of_the_table_of_other_keys_is_an_option_or_read() -> None:
    assert not OTHER_OPTIONS.keys.keys() & RunConfig.model_fields.keys()
    assert not LATER_OPTIONS.keys() & read_attributes()


def declared_flags() -> set[str]:
    """Every flag that a command declares: a field whose value is `Flag(...).default(...)`."""
    return {
        node.target.id.replace("_", "-")
        for path, tree in trees()
        if "cli" in path.parts
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func).endswith(".default")
    }


def options_named(inside: str) -> set[str]:
    """Every `--option` in a text of the sources, inside the command's folder or outside of it."""
    texts = (
        node.value
        for path, tree in trees()
        if ("cli" in path.parts) == (inside == "cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {match for text in texts for match in re.findall(r"(?<![\w-])--([a-z_]+)", text)}


def test_no_remedy_names_an_option_that_is_not_there() -> None:
    known = {*RunConfig.model_fields, *OTHER_OPTIONS.keys, *SELECTORS} | options_named("cli") | declared_flags()
    of_nvidia_smi, of_torchrun = {"query", "format"}, {"standalone", "nproc"}
    assert options_named("elsewhere") - known - of_nvidia_smi - of_torchrun == set()
