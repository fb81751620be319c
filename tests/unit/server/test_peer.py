"""Whose connection it is, as the kernel tells."""

import ipaddress
import os
import socket
import subprocess

import pytest

from simpletuner.server import peer

OTHER_USER = 12_345


@pytest.mark.parametrize(
    ("bound", "connected"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("127.0.0.1", "::ffff:127.0.0.1"), ("127.3.2.1", "127.3.2.1")],
)
def test_a_connection_of_this_user_is_known(bound: str, connected: str) -> None:
    version = ipaddress.ip_address(bound).version
    with socket.create_server((bound, 0), family=socket.AF_INET if version == 4 else socket.AF_INET6) as listening:
        server = listening.getsockname()[:2]
        client = socket.create_connection((connected, server[1]))
        accepted, address = listening.accept()
        with accepted:
            assert peer.uid_of(address[:2], server) == os.geteuid()
            assert peer.is_own_user(address[:2], server)
            assert peer.uid_of(server, server) is None
            client.close()
            # The kernel's table has it still, as user 0 without an inode: not root, but nobody's.
            assert peer.uid_of(address[:2], server) is None
            assert not peer.is_own_user(address[:2], server)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_this_system_tells_users_apart(host: str) -> None:
    assert peer.reports_users(host)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
@pytest.mark.parametrize("uid", [OTHER_USER, 65_534])
def test_a_connection_of_another_user_is_not_ours(uid: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = listening.getsockname()
        command = ["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/$0; head -c 1 <&3", str(server[1])]
        with subprocess.Popen(command, user=uid, group=uid, cwd="/"):
            accepted, address = listening.accept()
            with accepted:
                assert peer.uid_of(address, server) == uid
                assert not peer.is_own_user(address, server)


def test_without_the_kernels_table_nobody_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "TABLES", ())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = listening.getsockname()
        with socket.create_connection(server) as client:
            assert not peer.is_own_user(client.getsockname(), server)
    assert not peer.reports_users("127.0.0.1")


def test_a_user_that_the_kernel_cannot_name_is_not_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_overflow_uid", os.geteuid)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = listening.getsockname()
        with socket.create_connection(server) as client:
            assert not peer.is_own_user(client.getsockname(), server)
