import pytest

from simpletuner.config import reference
from simpletuner.config.later import LATER_OPTIONS
from simpletuner.config.run import OPTION_NAMES


def test_the_page_is_what_the_schema_says() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "write it again: see reference.py"


def test_every_option_has_an_anchor() -> None:
    page = reference.page()
    assert all(page.count(f'<a id="{name}"></a>') == 1 for name in OPTION_NAMES)
    assert all(f"| `{name}` |" in page for name in LATER_OPTIONS)


def test_the_schema_carries_meaning_and_range() -> None:
    schema = reference.schema()
    assert list(schema["properties"]) == list(OPTION_NAMES)
    assert schema["properties"]["lora_rank"] == {
        "default": 16,
        "description": "Rank of each adapter: its width, and so its size and freedom.",
        "group": "LoRA",
        "minimum": 1,
        "title": "Lora Rank",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False


def test_the_check_fails_where_the_page_is_out_of_date(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "options.md")
    assert reference.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert reference.main(["--write"]) == 0
    assert reference.main(["--check"]) == 0
    assert reference.main([]) == 2
