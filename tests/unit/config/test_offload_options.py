"""Options of offloading that are a word or a value: `auto`, a number, a boolean."""

from typing import Any

import pytest

from simpletuner.config.options.offload import OffloadOptions


@pytest.mark.parametrize(("given", "count"), [("auto", None), (0, 0), (12, 12), ("7", 7)])
def test_resident_blocks_are_auto_or_a_number(place: Any, given: object, count: int | None) -> None:
    place.config |= {"enable_group_offload": True, "group_offload_resident_blocks": given}
    loaded = place.load()
    assert loaded.config.resident_blocks == count
    assert loaded.notices == ()
    assert place.load(f"--group_offload_resident_blocks={given}").config.resident_blocks == count


@pytest.mark.parametrize(("given", "shown"), [(-1, '"-1"'), (1.5, "1.5"), ("some", "'some'"), (True, "true")])
def test_other_numbers_of_resident_blocks_are_refused(place: Any, given: object, shown: str) -> None:
    place.config["group_offload_resident_blocks"] = given
    (problem,) = place.problems()
    expected = "expected auto, or a whole number of at least 0."
    assert problem == f"group_offload_resident_blocks = {shown.replace(chr(34), '')}: {expected}"


@pytest.mark.parametrize(
    ("given", "on_gpu", "on_cpu"),
    [("auto", True, False), (True, True, False), (False, False, False), ("true", True, False), ("false", False, False)],
)
def test_the_stream_is_auto_or_a_boolean_as_before(place: Any, given: object, on_gpu: bool, on_cpu: bool) -> None:
    place.config |= {"enable_group_offload": True, "group_offload_use_stream": given}
    config = place.load().config
    assert (config.prefetches("cuda"), config.prefetches("cpu")) == (on_gpu, on_cpu)
    if given is not True:
        flag = f"--group_offload_use_stream={str(given).lower()}"
    else:
        flag = "--group_offload_use_stream"
    assert place.load(flag).config.group_offload_use_stream == config.group_offload_use_stream


def test_another_word_for_the_stream_is_refused(place: Any) -> None:
    place.config["group_offload_use_stream"] = "on"
    assert place.problems() == ["group_offload_use_stream = 'on': expected auto, true or false."]


def test_auto_streams_on_cuda_and_true_on_every_accelerator() -> None:
    assert not OffloadOptions().prefetches("mps")
    assert OffloadOptions(group_offload_use_stream="true").prefetches("mps")
