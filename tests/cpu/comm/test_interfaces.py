"""Which networks join hosts: tables made up, and a connection tried."""

from __future__ import annotations

import socket

import pytest

from shardwise.comm.interfaces import Interface, _reached, asked_for, own_interfaces, shared_networks


def table(*pairs: tuple[str, str]) -> list[Interface]:
    return [
        Interface(f"eth{i}", address, network)
        for i, (address, network) in enumerate([("127.0.0.1", "127.0.0.0/8"), *pairs])
    ]


FAST, SLOW, BRIDGE = "10.0.0.0/24", "192.168.1.0/24", "172.17.0.0/16"


def test_networks_are_shared_when_every_host_has_an_address_of_its_own_there() -> None:
    one = table(("10.0.0.1", FAST), ("172.17.0.1", BRIDGE), ("192.168.1.1", SLOW))
    other = table(("192.168.1.2", SLOW), ("172.17.0.1", BRIDGE), ("10.0.0.2", FAST))
    assert shared_networks([one, other], "192.168.1.1") == [SLOW, FAST]
    assert shared_networks([one, other], None) == [FAST, SLOW]
    assert shared_networks([one, other, table(("10.0.0.3", FAST))], None) == [FAST]


def test_public_networks_are_never_taken_unasked() -> None:
    both = [table(("10.0.0.1", FAST), ("8.8.8.1", "8.8.8.0/24")), table(("10.0.0.2", FAST), ("8.8.8.2", "8.8.8.0/24"))]
    assert shared_networks(both, None) == [FAST]


def test_two_addresses_in_one_network_are_no_second_path() -> None:
    twice = table(("10.0.0.1", FAST), ("10.0.0.2", FAST))
    assert shared_networks([twice, table(("10.0.0.3", FAST))], None) == []


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, ()),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, ("eth0",)),
        ({"SHARDWISE_INTERFACES": "eth0, eth1", "GLOO_SOCKET_IFNAME": "lo"}, ("eth0", "eth1")),
    ],
)
def test_the_environment_names_interfaces(environ: dict[str, str], names: tuple[str, ...]) -> None:
    assert asked_for(environ) == names


def test_this_host_has_a_loopback_interface() -> None:
    assert "127.0.0.0/8" in [each.network for each in own_interfaces()]


def test_a_network_joins_hosts_when_all_of_them_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there, socket.create_server(("127.0.0.1", 0)) as closed:
        answers, refuses = there.getsockname(), closed.getsockname()
        closed.close()
        assert _reached([[answers], [answers, answers], [answers, refuses], []]) == [True, True, False, True]
