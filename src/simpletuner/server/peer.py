"""Which user of this machine holds the other end of a loopback connection: the kernel tells (Linux)."""

import ipaddress
import os
import socket
import struct
import sys
from functools import cache
from pathlib import Path

TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
ROOT = 0

_ESTABLISHED = "01"
_NO_INODE = "0"
_OVERFLOW = Path("/proc/sys/kernel/overflowuid")

Address = tuple[str, int]


def knows_users(host: str) -> bool:
    """Whether this system tells whose a connection at the loopback address `host` is: tried with one of our own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        server = listening.getsockname()[:2]
        with socket.create_connection(server) as client:
            return is_own(client.getsockname()[:2], server)


def is_loopback(client: Address | None) -> bool:
    """Whether a connection comes from this machine."""
    if client is None:
        return False
    try:
        packed, _ = _normal(client)
    except ValueError:
        return False
    found = ipaddress.IPv6Address(packed)
    return (found.ipv4_mapped or found).is_loopback


def is_own(client: Address, server: Address) -> bool:
    """Whether the process at the `client` end of a connection to `server` runs as this user or as root."""
    uid = uid_of(client, server)
    # The kernel shows every user that it cannot name here (outside a container, say) as one and the same.
    return uid is not None and uid != _unnamed() and uid in (ROOT, os.geteuid())


def uid_of(client: Address, server: Address) -> int | None:
    """The user id of the process that holds the `client` end of a connection to `server`; None where that cannot be
    known: it is no connection of this machine, or its process has closed it.

    The table's columns are those of Linux's `Documentation/networking/proc_net_tcp.rst`. A socket that no process holds
    any more stands in it with user 0 and inode 0, which is not root.
    """
    ends = (_normal(client), _normal(server))
    port = f":{client[1]:04X} "
    for table in TABLES:
        try:
            lines = table.read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            if port not in line:
                continue
            _, local, remote, state, _, _, _, uid, _, inode, *_ = line.split()
            if state == _ESTABLISHED and inode != _NO_INODE and (_end(local), _end(remote)) == ends:
                return int(uid)
    return None


def _normal(address: Address) -> tuple[bytes, int]:
    """Address as 16 bytes, an IPv4 one as IPv6 maps it, and port."""
    host, port = address
    found = ipaddress.ip_address(host.partition("%")[0])
    return (_mapped(found.packed) if found.version == 4 else found.packed), port


def _end(text: str) -> tuple[bytes, int]:
    """One end as the table has it: words of four bytes in this machine's order, and the port."""
    address, _, port = text.partition(":")
    words = [int(address[place : place + 8], 16) for place in range(0, len(address), 8)]
    order = "<" if sys.byteorder == "little" else ">"
    packed = b"".join(struct.pack(f"{order}I", word) for word in words)
    return (_mapped(packed) if len(words) == 1 else packed), int(port, 16)


def _mapped(packed: bytes) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + packed


@cache
def _unnamed() -> int | None:
    try:
        return int(_OVERFLOW.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
