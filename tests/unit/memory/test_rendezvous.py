"""Processes that another program started find each other, and listen on the loopback interface alone."""

import json
import os
import socket
import subprocess
import sys

import pytest

from simpletuner.base.errors import ConfigError
from simpletuner.memory import rendezvous

RANK = """
import json, os, pathlib
from simpletuner.memory.rendezvous import join

world = join(os.environ, 20)
told = world.gather_json(world.rank)
sockets = {os.readlink(path) for path in pathlib.Path("/proc/self/fd").iterdir() if path.is_symlink()}
lines = [l.split() for t in ("tcp", "tcp6") for l in pathlib.Path(f"/proc/self/net/{t}").read_text().splitlines()[1:]]
listens = sorted({l[1].split(":")[0] for l in lines if l[3] == "0A" and f"socket:[{l[9]}]" in sockets})
print(json.dumps([world.rank, told, listens]), flush=True)
world.barrier("the end")
os._exit(0)
"""


@pytest.mark.slow
def test_ranks_without_an_agent_meet_at_a_store_on_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", RANK],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [json.loads(rank.communicate(timeout=60)[0].splitlines()[-1]) for rank in ranks]
    assert answers == [[rank, [0, 1], ["0100007F"]] for rank in range(2)]


def test_interfaces_that_the_user_names_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    rendezvous.restrict_to_interface(rendezvous.LOOPBACK_ADDRESS)
    assert [os.environ[name] for name in names] == ["lo", "eth1", "1"]
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "eth0")])
    with pytest.raises(ConfigError, match="no network interface is known to reach each other; there are eth0"):
        rendezvous.restrict_to_interface(rendezvous.LOOPBACK_ADDRESS)
