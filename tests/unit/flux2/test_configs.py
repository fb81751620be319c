"""A model folder's JSON, damaged in every field: always an error with the file's name, never another exception."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simpletuner.base.errors import AccessError
from simpletuner.config.options.model import ModelOptions
from simpletuner.flux2.configs import Component, read_component_config
from simpletuner.flux2.source import Source, Weights, locate, transformer_spec

CONFIGS: dict[Component, str] = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
}
WRONG: list[Any] = ["x", -1, None, [1, "a"], 10**400, float("nan")]
INDEX = "text_encoder/model.safetensors.index.json"


def replace(file: Path, text: str | bytes) -> None:
    """Write a new file: the one that is there is a hard link."""
    file.unlink(missing_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())


def found_in(folder: Path) -> Source:
    return locate(ModelOptions(model_flavour="tiny", pretrained_model_name_or_path=str(folder)), report=print)


def mutations(value: Any) -> Iterator[Any]:
    """`value`, each time with another field gone or of a wrong type."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield {name: other for name, other in value.items() if name != key}
            for wrong in (*WRONG, *(mutations(inner) if isinstance(inner, dict) else ())):
                yield value | {key: wrong}


@pytest.mark.parametrize("component", CONFIGS)
def test_every_field_of_a_config_may_be_wrong(component: Component, tiny_folder: Path, tmp_path: Path) -> None:
    original = json.loads((tiny_folder / CONFIGS[component]).read_text(encoding="utf-8"))
    original.pop("vision_config", None)  # not used
    path = tmp_path / "config.json"
    refused = []
    for config in mutations(original):
        path.write_text(json.dumps(config), encoding="utf-8")
        try:
            read = read_component_config(component, path)
            if component == "transformer":
                transformer_spec(Weights((), read), str(path))
        except AccessError as error:
            refused.append(str(error))
    assert len(refused) > 60
    assert all(str(path) in text for text in refused)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("transformer/config.json", "", "config.json is empty"),
        ("vae/config.json", '{"_class_name": "Auto', r"vae/config\.json is not JSON, line 1: Unterminated"),
        ("vae/config.json", "[" * 100_000, r"is not JSON"),
        ("vae/config.json", b"\xff\xfe{\0}\0", r"is not JSON"),
        ("text_encoder/config.json", "[1, 2]", r"holds \[1, 2\]: expected a JSON object"),
        (
            "text_encoder/config.json",
            '{"model_type": "mistral3", "text_config": 7}',
            "has text_config = 7: expected an",
        ),
        ("text_encoder/config.json", '{"model_type": "mistral3", "text_config": {}}', "has no hidden_size: expected a"),
        ("tokenizer/tokenizer.json", "{}", "has no vocabulary"),
        ("tokenizer/tokenizer_config.json", "null", "tokenizer_config.json holds null: expected a JSON object"),
        ("tokenizer/chat_template.jinja", b"\xff\xff", "not UTF-8 text"),
    ],
)
def test_a_damaged_file_is_named(repository: Path, name: str, text: str | bytes, message: str) -> None:
    replace(repository / name, text)
    with pytest.raises(AccessError, match=message) as caught:
        found_in(repository)
    assert name in str(caught.value)


def test_damaged_files_are_named_all_at_once(repository: Path) -> None:
    for component in ("transformer", "vae"):
        replace(repository / component / "config.json", "{")
    with pytest.raises(AccessError, match="2 problems") as caught:
        found_in(repository)
    assert "transformer/config.json" in str(caught.value)
    assert "vae/config.json" in str(caught.value)


@pytest.mark.parametrize("shard", ["../../x.safetensors", "/etc/x.safetensors", "a/../x.safetensors", "x.bin", 3, None])
def test_an_index_names_files_beside_it_only(repository: Path, shard: object) -> None:
    for place in (repository.parent, repository.parent.parent):
        (place / "x.safetensors").write_bytes(b"not to be opened")
    (repository / "text_encoder/model.safetensors").unlink()
    replace(repository / INDEX, json.dumps({"weight_map": {"model.embed_tokens.weight": shard}}))
    with pytest.raises(AccessError, match=r"index\.json maps model\.embed_tokens\.weight to .*in the same folder"):
        found_in(repository)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", '{"weight_map": 1}'])
def test_an_index_without_its_map_is_named(repository: Path, text: str) -> None:
    (repository / "text_encoder/model.safetensors").unlink()
    replace(repository / INDEX, text)
    with pytest.raises(AccessError, match=r"model\.safetensors\.index\.json"):
        found_in(repository)


def test_a_shard_may_be_a_link_to_somewhere_else(repository: Path, tmp_path: Path) -> None:
    """As in the Hub's cache: the name is judged, not where it leads."""
    weights = repository / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    assert found_in(repository).vae.files == (weights,)


def test_a_folder_of_quantized_weights_is_known_by_its_config(repository: Path) -> None:
    config = json.loads((repository / "transformer/config.json").read_text(encoding="utf-8"))
    replace(
        repository / "transformer/config.json", json.dumps(config | {"quantization_config": {"load_in_4bit": True}})
    )
    with pytest.raises(AccessError, match=r"quantized weights.*Name the model that is not quantized"):
        found_in(repository)
