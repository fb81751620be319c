"""The numbers of processes and machines that torchrun and Slurm tell by the environment."""

from typing import Any

import pytest

from simpletuner.config.launched import first_node

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
}


def place_in(config: Any) -> tuple[Any, ...]:
    return config.num_processes, config.num_machines, config.machine_rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a[01-03,7],b2", "a01"),
        ("b2", "b2"),
        ("b2,a[1-2]", "b2"),
        ("rack[2-3]n[04,06-09].lan,c1", "rack2n04.lan"),
        ("n[7]", "n7"),
        ("10.77.0.[1-2]", "10.77.0.1"),
        ("", ""),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


def test_torchrun_says_how_many_machines_there_are(place: Any) -> None:
    assert place_in(place.load(environ=TORCHRUN).config) == (8, 2, 1)
    assert place_in(place.load("--num_machines=2", environ=TORCHRUN).config) == (8, 2, 1)
    assert place_in(place.load(environ=TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}).config) == (8, 1, 0)
    assert place.problems("--num_machines=4", environ=TORCHRUN) == [
        "--num_machines = 4, and torchrun started 2 machines: expected 2. Remove it, or start simpletuner train "
        "without torchrun: it starts the processes itself."
    ]


def test_slurm_says_where_the_machines_are(place: Any) -> None:
    config = place.load("--num_processes=8", environ=SLURM).config
    assert place_in(config) == (8, 2, 1)
    assert (config.main_process_ip, config.main_process_port) == ("gpu07", 11234)
    config = place.load("--main_process_ip=10.0.0.1", "--main_process_port=29500", environ=SLURM).config
    assert (place_in(config), config.main_process_ip, config.main_process_port) == ((None, 2, 1), "10.0.0.1", 29500)
    for other in ("--num_machines=1", "--num_machines=3"):
        assert place.load(other, environ=SLURM).config.main_process_ip == "127.0.0.1"
    assert place_in(place.load(environ=SLURM | {"SLURM_STEP_NUM_NODES": "1"}).config) == (None, 1, 0)
    assert place_in(place.load(environ={**SLURM, **TORCHRUN}).config) == (8, 2, 1)
    eight = SLURM | {"SLURM_STEP_NUM_TASKS": "8"}
    assert place.problems(environ=eight) == [
        "srun started 8 tasks on 2 nodes: expected one on each node, which starts that node's processes. "
        "Let srun start one task on each node; or give --num_machines=1, if each task trains its own run."
    ]
    assert place_in(place.load("--num_machines=1", environ=eight).config) == (None, 1, 0)
