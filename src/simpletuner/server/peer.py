"""Find the local user at the other end of a loopback connection, from the kernel's tables (Linux)."""

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
_OVERFLOW_FILE = Path("/proc/sys/kernel/overflowuid")

Address = tuple[str, int]


def reports_users(host: str) -> bool:
    """Whether this system reports the user of a connection at loopback address `host`; tested with a real one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listening:
        server = listening.getsockname()[:2]
        with socket.create_connection(server) as client:
            return is_own_user(client.getsockname()[:2], server)


def is_loopback(client: Address | None) -> bool:
    """Whether a connection comes from this machine."""
    if client is None:
        return False
    try:
        packed, _ = _normal(client)
    except ValueError:
        return False
    address = ipaddress.IPv6Address(packed)
    return (address.ipv4_mapped or address).is_loopback


def is_own_user(client: Address, server: Address) -> bool:
    """Whether the process at the `client` end of a connection to `server` runs as this user or as root."""
    uid = uid_of(client, server)
    # The kernel reports every user without a mapping in this namespace (outside a container, say) as the overflow uid.
    return uid is not None and uid != _overflow_uid() and uid in (ROOT, os.geteuid())


def uid_of(client: Address, server: Address) -> int | None:
    """Return the user id of the process at the `client` end of a connection to `server`; None if it cannot be known:
    the connection does not come from this machine, or its process has closed it.

    Linux's `Documentation/networking/proc_net_tcp.rst` documents the table's columns. A socket that no process holds
    any more is listed with user 0 and inode 0, which does not mean root.
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
    """Return the address as 16 bytes (IPv4 mapped to IPv6) and the port."""
    host, port = address
    parsed = ipaddress.ip_address(host.partition("%")[0])
    return (_mapped(parsed.packed) if parsed.version == 4 else parsed.packed), port


def _end(text: str) -> tuple[bytes, int]:
    """Parse one end in the table's form: words of four bytes in this machine's byte order, and the port."""
    address, _, port = text.partition(":")
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    order = "<" if sys.byteorder == "little" else ">"
    packed = b"".join(struct.pack(f"{order}I", word) for word in words)
    return (_mapped(packed) if len(words) == 1 else packed), int(port, 16)


def _mapped(packed: bytes) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + packed


@cache
def _overflow_uid() -> int | None:
    try:
        return int(_OVERFLOW_FILE.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
