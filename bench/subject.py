"""A system under test as the harness holds it: launched by its own launcher, asked over sockets, always ended."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench.launched import ROOT, Launched
from bench.line import ADDRESS, Line, Message
from bench.rounds import Lost


class Subject:
    """One system: the processes that `command` starts, and a line to each of its `ranks`."""

    def __init__(
        self, name: str, command: Sequence[str], *, ranks: int, env: Mapping[str, str], folder: str | Path = ROOT
    ) -> None:
        self.name = name
        self.ranks = ranks
        self.facts: Message = {}
        self.lines: list[Line] = []
        self._told = False
        self.launched = Launched(command, env=env, folder=folder)

    def start(self, deadline_s: float) -> None:
        """Launch it and wait until every rank has connected. Raises Lost when that fails or takes longer."""
        address = str(Path(self.launched.scratch.name) / "line")
        self.launched.env[ADDRESS] = address
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
            door.bind(address)
            door.listen(self.ranks)
            self.launched.start()
            self._accept(door, deadline_s)

    def run(self, steps: int, deadline_s: float) -> list[Message]:
        """Let every rank do `steps` steps; each answers `{"seconds": [...], "losses": [...]}`. Raises Lost."""
        return self.ask({"do": "run", "steps": steps}, deadline_s)

    def checksums(self, deadline_s: float) -> list[float]:
        """What every rank's `checksum()` returns. Raises Lost."""
        return [float(answer["checksum"]) for answer in self.ask({"do": "checksum"}, deadline_s)]

    def dismiss(self) -> None:
        """Tell the ranks to stop, without waiting for it."""
        self.launched.thaw()
        self._told = self._told or bool(self.lines)
        for line in self.lines:
            try:
                line.send({"do": "stop"})
            except OSError:
                continue
            finally:
                line.close()
        self.lines = []

    def close(self, grace_s: float = 15.0) -> None:
        """Tell the ranks to stop, give the launcher `grace_s` to end by itself, then kill whatever is left.

        Ranks that never connected cannot be told: they get no time.
        """
        self.dismiss()
        self.launched.close(grace_s if self._told else 0.0)

    def _accept(self, door: socket.socket, deadline_s: float) -> None:
        found: dict[int, Line] = {}
        end = time.monotonic() + deadline_s
        door.settimeout(0.2)
        while len(found) < self.ranks:
            if time.monotonic() > end:
                raise self._lost(f"hung: {len(found)} of {self.ranks} ranks after {deadline_s:.0f} s")
            if self.launched.gone():
                raise self._lost(f"ended with status {self.launched.status} before it was ready")
            try:
                connection, _ = door.accept()
            except TimeoutError:
                continue
            line = Line(connection)
            hello = line.receive(5.0)
            if hello is None or hello["world"] != self.ranks:
                raise self._lost(f"said {hello} where {self.ranks} ranks were asked for")
            found[hello["rank"]] = line
            self.facts |= {key: value for key, value in hello.items() if key not in ("rank", "world", "pid")}
        self.lines = [found[rank] for rank in sorted(found)]

    def ask(self, command: Message, deadline_s: float) -> list[Message]:
        """What every rank answers to `command`. Raises Lost."""
        end = time.monotonic() + deadline_s
        answers: list[Message] = []
        try:
            for line in self.lines:
                line.send(command)
            for line in self.lines:
                answer = line.receive(max(0.0, end - time.monotonic()))
                if answer is None:
                    raise self._lost("died")
                answers.append(answer)
        except TimeoutError:
            raise Lost(f"hung: no answer within {deadline_s:.0f} s") from None
        except OSError as error:
            raise self._lost(f"died ({error})") from None
        if not answers:
            raise Lost("was not started")
        return answers

    def _lost(self, how: str) -> Lost:
        tail = self.launched.tail()
        return Lost(f"{how}; {tail}" if tail else how)


def close_all(subjects: Iterable[Subject]) -> None:
    """End several systems: all are asked first, so that they end side by side."""
    chosen = list(subjects)
    for subject in chosen:
        subject.dismiss()
    for subject in chosen:
        subject.close()
