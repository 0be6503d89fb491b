"""How fast a wire is: `link_probe.py ADDRESS SECONDS`, with `listen` at one end; the other end prints it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time

PORT, TRIES, LIMIT_S = 5001, 40, 30.0


def main(address: str, seconds: float, *, listens: bool) -> None:
    connection = _accept(address) if listens else _connect(address)
    connection.settimeout(LIMIT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    round_trip = _echo(connection) if listens else _round_trip(connection)
    threading.Thread(target=_flood, args=(connection,), daemon=True).start()
    mbit = _received(connection, seconds)
    if not listens:
        print(json.dumps({"mbit_per_s": mbit, "round_trip_ms": 1e3 * round_trip}), flush=True)
    os._exit(0)  # the other end may still be sending


def _accept(address: str) -> socket.socket:
    with socket.create_server((address, PORT)) as door:
        door.settimeout(LIMIT_S)
        return door.accept()[0]


def _connect(address: str) -> socket.socket:
    end = time.monotonic() + LIMIT_S
    while True:
        try:
            return socket.create_connection((address, PORT), timeout=LIMIT_S)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _echo(connection: socket.socket) -> float:
    for _ in range(TRIES):
        connection.sendall(connection.recv(1))
    return 0.0


def _round_trip(connection: socket.socket) -> float:
    """The median of `TRIES`, in seconds."""
    found = []
    for _ in range(TRIES):
        began = time.perf_counter()
        connection.sendall(b"x")
        connection.recv(1)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _flood(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(bytes(1 << 16))


def _received(connection: socket.socket, seconds: float) -> float:
    """Mbit/s that arrive in the last two thirds of `seconds`: the first is for TCP to find its window."""
    began = marked = time.perf_counter()
    total = 0
    with contextlib.suppress(ConnectionResetError):  # the other end was done a moment earlier
        while (now := time.perf_counter()) - began < seconds:
            if marked == began and now - began > seconds / 3:
                marked, total = now, 0
            total += len(connection.recv(1 << 18))
    return total * 8e-6 / (time.perf_counter() - marked)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), listens=sys.argv[3:] == ["listen"])
