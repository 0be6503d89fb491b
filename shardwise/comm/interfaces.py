"""Which network interfaces join the hosts of a group: those asked for, or networks that all of them share."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.distributed.distributed_c10d as dist

from shardwise.errors import CommError

INTERFACES = "SHARDWISE_INTERFACES"  # names with commas; the first of one host is joined to the first of the others
GLOO = "GLOO_SOCKET_IFNAME"
REACH_S = 0.3  # how long hosts try whether a network that they seem to share joins them
_GET_ADDRESS, _GET_MASK = 0x8915, 0x891B  # Linux's numbers of SIOCGIFADDR and SIOCGIFNETMASK


class Interface(NamedTuple):
    """A network interface of one host: IPv4 address and network, such as `10.0.0.0/24`."""

    name: str
    address: str
    network: str


def asked_for(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The interfaces that the environment names, the fastest first if they are unlike."""
    words = (environ.get(INTERFACES) or environ.get(GLOO) or "").split(",")
    return tuple(word.strip() for word in words if word.strip())


def agree(store: dist.Store, host: int, hosts: int, leader: bool, main: str | None) -> list[str]:
    """The names of this host's interfaces, one for each path to the others; empty: the one of address `main` alone.

    Every rank calls it; the first of each host (`leader`) speaks for it. Raises CommError where the hosts name unlike
    numbers of interfaces, or one that is not there.
    """
    if leader:
        _refuse_unknown(asked_for())
        store.set(f"asked/{host}", json.dumps(asked_for()))
    asked = [json.loads(store.get(f"asked/{h}")) for h in range(hosts)]
    if any(asked):
        if len({len(names) for names in asked}) > 1:
            said = "; ".join(f"host {h}: {','.join(names) or 'none'}" for h, names in enumerate(asked))
            raise CommError(
                f"{INTERFACES} names unlike numbers of interfaces on the hosts ({said}). Name as many on each."
            )
        return list(asked[host])
    if leader:
        store.set(f"interfaces/{host}", json.dumps(own_interfaces()))
    tables = [[Interface(*each) for each in json.loads(store.get(f"interfaces/{h}"))] for h in range(hosts)]
    networks = shared_networks(tables, main)
    if len(networks) < 2:
        return []
    rows = [{each.network: each for each in table} for table in tables]
    if leader:
        _try(store, host, [[row[network].address for network in networks] for row in rows])
    reached = [json.loads(store.get(f"reached/{h}")) for h in range(hosts)]
    joined = [network for i, network in enumerate(networks) if all(row[i] for row in reached)]
    return [rows[host][network].name for network in joined] if len(joined) > 1 else []


def shared_networks(tables: Sequence[Sequence[Interface]], main: str | None) -> list[str]:
    """Private networks that every host is in, with an address of its own; the one of address `main` comes first.

    Bridges that every host has for itself (a container engine's) show in equal addresses and are left out.
    """
    found = []
    for network in {each.network for each in tables[0]}:
        addresses = [[each.address for each in table if each.network == network] for table in tables]
        single = [mine[0] for mine in addresses if len(mine) == 1]
        about = ipaddress.ip_network(network)
        private = about.is_private and not about.is_loopback and not about.is_link_local
        if private and len(set(single)) == len(tables):
            found.append(network)
    inside = (lambda n: ipaddress.ip_address(main) in ipaddress.ip_network(n)) if main else (lambda n: False)
    return sorted(found, key=lambda network: (not inside(network), network))


def own_interfaces() -> list[Interface]:
    """The interfaces of this host that have an IPv4 address."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                address, mask = (_ask(asking, name, what) for what in (_GET_ADDRESS, _GET_MASK))
                network = ipaddress.ip_network(f"{address}/{mask}", strict=False)
                found.append(Interface(name, address, str(network)))
    return found


def _ask(asking: socket.socket, name: str, what: int) -> str:
    import fcntl  # not on every system; where it is missing there is nothing to find

    answer = fcntl.ioctl(asking.fileno(), what, struct.pack("256s", name[:15].encode()))
    return socket.inet_ntoa(answer[20:24])


def _refuse_unknown(names: Sequence[str]) -> None:
    here = [name for _, name in socket.if_nameindex()]
    for name in names:
        if name not in here:
            raise CommError(
                f"{INTERFACES} names '{name}', and this host has no such interface, only {', '.join(here)}. Correct it."
            )


def _try(store: dist.Store, host: int, addresses: Sequence[Sequence[str]]) -> None:
    """Say which networks joined this host to all others: the kernel answers connections that nobody accepts."""
    listeners = [socket.create_server((address, 0)) for address in addresses[host]]
    try:
        store.set(f"ports/{host}", json.dumps([listener.getsockname()[1] for listener in listeners]))
        others = [h for h in range(len(addresses)) if h != host]
        ports = {h: json.loads(store.get(f"ports/{h}")) for h in others}
        targets = [[(addresses[h][i], ports[h][i]) for h in others] for i in range(len(listeners))]
        store.set(f"reached/{host}", json.dumps(_reached(targets)))
        for h in others:
            store.get(f"reached/{h}")  # they have tried when they say so
    finally:
        for listener in listeners:
            listener.close()


def _reached(targets: Sequence[Sequence[tuple[str, int]]]) -> list[bool]:
    """For each list of targets whether all of them took a connection within REACH_S."""
    missing = [len(each) for each in targets]
    end = time.monotonic() + REACH_S
    with selectors.DefaultSelector() as waiting, contextlib.ExitStack() as opened:
        for i, each in enumerate(targets):
            for target in each:
                tried = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
                tried.setblocking(False)
                tried.connect_ex(target)
                waiting.register(tried, selectors.EVENT_WRITE, i)
        while any(missing) and time.monotonic() < end:
            for key, _ in waiting.select(max(0.0, end - time.monotonic())):
                waiting.unregister(key.fileobj)
                failed = key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # type: ignore[union-attr]
                missing[key.data] -= not failed
    return [count == 0 for count in missing]
