"""The generated pages are what the code says, and a stale one is found."""

import json
import shutil
from pathlib import Path

import pytest

import generate_docs
from simpletuner.config.flavours import KLEIN_4B
from simpletuner.config.other_keys import LATER_OPTIONS, OTHER_OPTIONS
from simpletuner.config.run import OPTION_NAMES
from simpletuner.runs.events import EVENTS, Picture


def test_options_and_events_are_what_the_code_says() -> None:
    pages = {
        "options.md": generate_docs.options_page(),
        "events.md": generate_docs.events_page(),
        "recipes.md": generate_docs.recipes_page(),
    }
    for name, text in pages.items():
        assert (generate_docs.DOCS / name).read_text(encoding="utf-8") == text, "run `.ci/run docs`"


def test_every_field_of_an_event_is_one_row() -> None:
    for event in (*EVENTS.values(), Picture):
        table = generate_docs.event_section(event).split("| key", 1)[1].splitlines()[2:]
        assert len(table) == len(event.model_fields) - ("type" in event.model_fields)
        assert all(row.startswith("| ") and row.endswith(" |") for row in table)


def test_every_option_has_an_anchor() -> None:
    page = generate_docs.options_page()
    assert all(page.count(f'<a id="{name}"></a>') == 1 for name in OPTION_NAMES)
    assert all(f"`{name}`" in page for name in LATER_OPTIONS)


def test_every_other_key_is_on_the_page_for_those_who_come_from_elsewhere() -> None:
    page = (generate_docs.DOCS / "coming-from.md").read_text(encoding="utf-8")
    assert generate_docs.other_keys_tables() in page, "run `.ci/run docs`"
    named = [*OTHER_OPTIONS.keys, *OTHER_OPTIONS.nicknames, *(f"{prefix}…" for prefix in OTHER_OPTIONS.prefixes)]
    assert [name for name in named if f"`{name}`" not in page and name not in LATER_OPTIONS] == []


def test_the_schema_carries_meaning_and_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate_docs.main(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert list(schema["properties"]) == list(OPTION_NAMES)
    assert schema["properties"]["lora_rank"] == {
        "default": 16,
        "description": "Rank of each adapter. A higher rank can learn more but makes a larger file.",
        "group": "LoRA",
        "minimum": 1,
        "title": "Lora Rank",
        "type": "integer",
    }
    assert schema["additionalProperties"] is False


def test_a_row_of_the_plan() -> None:
    row = generate_docs.plan_row("klein-4b", KLEIN_4B, "int4-quanto", (512, 512))
    assert row in (generate_docs.DOCS / "plan.md").read_text(encoding="utf-8")


def test_a_row_of_many_gpus() -> None:
    row = generate_docs._many_gpus_row("klein-4b", KLEIN_4B, "lora", "int8-quanto")
    assert row in (generate_docs.DOCS / "many-gpus.md").read_text(encoding="utf-8")


def test_a_row_of_many_machines() -> None:
    row = generate_docs._many_machines_row("klein-4b", KLEIN_4B, "lora", "ddp")
    assert row in (generate_docs.DOCS / "many-machines.md").read_text(encoding="utf-8")


def test_an_estimate_lies_between_all_and_nothing_hidden() -> None:
    flop = round(generate_docs.ESTIMATE_FLOP_PER_S)  # one second
    assert generate_docs.images_per_second(8, 2, flop, 3.0) == pytest.approx((4.0, 16 / 3))
    assert generate_docs.images_per_second(8, 2, flop, 0.0) == pytest.approx((16.0, 16.0))


def test_without_an_action_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate_docs.main([])
    assert "--write" in capsys.readouterr().err


@pytest.mark.slow  # the whole table of the plan, three times; `.ci/run check` does it each time
def test_stale_pages_are_named_and_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: tuple[str, ...] = ("events.md", "options.md", "plan.md", "recipes.md", "klein.md", "coming-from.md")
    names += ("many-gpus.md", "many-machines.md")
    for name in names:
        shutil.copy(generate_docs.DOCS / name, tmp_path)
    (tmp_path / "options.md").unlink()
    plan = tmp_path / "plan.md"
    plan.write_text(plan.read_text(encoding="utf-8").replace("| dev | int8", "| dev | int9"), encoding="utf-8")
    assert generate_docs.main(["--check"], tmp_path) == 1
    told = capsys.readouterr().err
    assert [name for name in names if name in told] == ["options.md", "plan.md"]
    assert generate_docs.main(["--write"], tmp_path) == 0
    assert generate_docs.main(["--check"], tmp_path) == 0
    assert all((tmp_path / name).read_bytes() == (generate_docs.DOCS / name).read_bytes() for name in names)
