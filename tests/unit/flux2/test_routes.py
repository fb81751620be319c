import subprocess
import sys

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.config.options.tread import TreadRoute
from simpletuner.config.run import RunConfig
from simpletuner.flux2.routes import Route, check, resolve


def typed(*routes: tuple[int, int]) -> list[TreadRoute]:
    return [TreadRoute(selection_ratio=0.5, start_layer_idx=start, end_layer_idx=end) for start, end in routes]


def config(*routes: tuple[int, int], **others: object) -> RunConfig:
    return RunConfig.model_validate({"tread_config": {"routes": [r.model_dump() for r in typed(*routes)]}} | others)


@pytest.mark.parametrize(
    ("route", "blocks", "expected"),
    [((2, -2), 56, (2, 54)), ((4, -4), 56, (4, 52)), ((2, -2), 8, (2, 6)), ((4, -4), 8, (4, 4)), ((-8, 7), 8, (0, 7))],
)
def test_layers_are_one_count_negative_from_the_end_and_the_end_included(
    route: tuple[int, int], blocks: int, expected: tuple[int, int]
) -> None:
    (found,) = resolve(typed(route), blocks)
    assert (found.start, found.end) == expected


def test_routes_come_in_the_order_of_the_blocks_and_may_touch() -> None:
    found = resolve(typed((5, 6), (0, 2), (3, 4)), 8)
    assert [(route.start, route.end) for route in found] == [(0, 2), (3, 4), (5, 6)]


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(typed((8, -9), (5, 2), (0, 4), (1, 1), (3, 4)), 8)
    assert [str(problem) for problem in caught.value.problems] == [
        "tread_config, route 1: start_layer_idx = 8: expected -8 to 7: the model has 8 blocks.",
        "tread_config, route 1: end_layer_idx = -9: expected -8 to 7: the model has 8 blocks.",
        "tread_config, route 2: it starts at block 5 and ends at block 2: expected a start at or before the end.",
        "tread_config: routes 3 and 4 share block 1: expected routes that share no block.",
        "tread_config: routes 3 and 5 share block 3: expected routes that share no block.",
    ]


def test_no_routes_are_none() -> None:
    assert resolve(RunConfig().tread_routes, 8) == ()


def test_the_flavours_own_blocks_are_known_before_anything_is_loaded() -> None:
    check(config((2, -2), model_flavour="tiny"))
    check(config((2, 50)))
    with pytest.raises(ConfigError, match="the model has 8 blocks"):
        check(config((2, 50), model_flavour="tiny"))
    with pytest.raises(ConfigError, match="the model has 56 blocks"):
        check(config((2, 56), pretrained_model_name_or_path="black-forest-labs/FLUX.2-dev"))
    check(config((2, 56), pretrained_model_name_or_path="models/another"))
    check(config((2, 56), pretrained_transformer_model_name_or_path="another.safetensors"))


def test_checking_needs_no_torch() -> None:
    code = "import sys, simpletuner.flux2.routes; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"), [(0.5, 4096, 2048), (1.0, 7, 7), (0.25, 16, 4), (0.01, 4, 1), (0.3, 10, 3)]
)
def test_how_many_tokens_are_kept(ratio: float, tokens: int, kept: int) -> None:
    assert Route(0, 0, ratio).keeps(tokens) == kept


def test_what_is_told() -> None:
    assert Route(2, 54, 0.5).description(4096, 56) == "TREAD keeps 2048 of 4096 image tokens in blocks 2–54 of 56"
    assert Route(4, 4, 0.25).description(16, 8) == "TREAD keeps 4 of 16 image tokens in block 4 of 8"
