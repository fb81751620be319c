import pytest

from simpletuner.config.flags import parse


def values(*arguments: str) -> dict[str, object]:
    return {name: given.value for name, given in parse(arguments).options.items()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--a",), {"a": True}),
        (("--a", "--b"), {"a": True, "b": True}),
        (("--a=true",), {"a": "true"}),
        (("--a", "false"), {"a": "false"}),
        (("--a", "-1"), {"a": "-1"}),
        (("--a=",), {"a": ""}),
        (("--a=b=c",), {"a": "b=c"}),
        (("--a=--b",), {"a": "--b"}),
        (("--a", "", "--b", "x y"), {"a": "", "b": "x y"}),
        (("--a=1", "--a=2"), {"a": "2"}),
    ],
)
def test_a_flag_takes_its_value_in_every_usual_form(arguments: tuple[str, ...], expected: dict[str, object]) -> None:
    assert values(*arguments) == expected


def test_a_repeatable_flag_has_all_its_values() -> None:
    given = parse(["--prompt", "a", "--steps=2", "--prompt=", "--prompt"], repeatable=["prompt"]).options
    assert {name: one.value for name, one in given.items()} == {"steps": "2", "prompt": ("a", "", "")}


def test_selectors_are_no_options() -> None:
    flags = parse(["--config", "x.json", "--lora_rank", "8"])
    assert flags.selectors == {"config": "x.json"}
    assert set(flags.options) == {"lora_rank"}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora_rank=8", "'lora_rank=8': expected a flag that begins with --."),
        ("-lora_rank", "'-lora_rank': expected a flag that begins with --."),
        ("env=cats", "'env=cats': expected a flag that begins with --. Did you mean --env cats?"),
        ("my job.yaml", "'my job.yaml': expected a flag that begins with --. Did you mean --config 'my job.yaml'?"),
        ("--env", "--env has no value: expected a name or path after it."),
        ("--config=", "--config has no value: expected a name or path after it."),
    ],
)
def test_what_is_no_flag_is_a_problem(word: str, message: str) -> None:
    assert [str(problem) for problem in parse([word]).problems] == [message]
