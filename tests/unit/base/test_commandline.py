import pytest

from simpletuner.base.commandline import CommandArgument, split_arguments


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a", [CommandArgument(("a",), None, None)]),
        ("-a", [CommandArgument(("-a",), None, None)]),
        ("--a", [CommandArgument(("--a",), "a", None)]),
        ("--a b", [CommandArgument(("--a", "b"), "a", "b")]),
        ("--a -1", [CommandArgument(("--a", "-1"), "a", "-1")]),
        ("--a=", [CommandArgument(("--a=",), "a", "")]),
        ("--a=b=c d", [CommandArgument(("--a=b=c",), "a", "b=c"), CommandArgument(("d",), None, None)]),
        ("--a --b", [CommandArgument(("--a",), "a", None), CommandArgument(("--b",), "b", None)]),
        ("--switch b", [CommandArgument(("--switch",), "switch", None), CommandArgument(("b",), None, None)]),
        ("--switch=b", [CommandArgument(("--switch=b",), "switch", "b")]),
    ],
)
def test_a_command_line_in_parts(line: str, expected: list[CommandArgument]) -> None:
    words = line.split()
    found = list(split_arguments(words, lambda name: name != "switch"))
    assert found == expected
    assert [word for argument in found for word in argument.typed] == words
