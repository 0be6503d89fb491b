"""PyTorch's own test-suite of `torch.distributed`, which ships in its wheel, run on a backend of ours.

`python -m tests.cpu.comm.torch_suite BACKEND FILE [TEST ...]` writes `{test: passed, skipped or its error}` to FILE.
The suite decides by the backend's name which tests apply; ours is let into those that gloo is let into.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

os.environ.setdefault("BACKEND", "shm")
os.environ.setdefault("WORLD_SIZE", "3")
os.environ.setdefault("TEMP_DIR", "/tmp")

import torch.multiprocessing
from torch.testing._internal.common_distributed import DistTestCases

from shardwise.comm.group import register

register()
for feature in DistTestCases.backend_feature.values():
    if "gloo" in feature:
        feature.add("shm")
DistTestCases.backend_feature["plugin"].add("shm")

LIKE_GLOO = {
    'BACKEND != "gloo"': 'BACKEND not in ("gloo", "shm")',
    'BACKEND == "gloo"': 'BACKEND in ("gloo", "shm")',
    'require_backend_is_available({"gloo"})': 'require_backend_is_available({"gloo", "shm"})',
}


def _source() -> str:
    found = importlib.util.find_spec("torch.testing._internal.distributed.distributed_test")
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).read_text()
    for ours, theirs in LIKE_GLOO.items():
        assert ours in text, f"the suite has changed: {ours} is not in it"
        text = text.replace(ours, theirs)
    return text


_suite: dict[str, Any] = globals()  # its classes are pickled, so they must be found in this module
exec(compile(_source(), "distributed_test.py", "exec", dont_inherit=True), _suite)


class TorchSuite(_suite["TestDistBackend"], _suite["DistributedTest"]._DistTestBase):  # type: ignore[misc, name-defined]
    """All tests of the suite; ranks are forked, because importing torch for each would take an hour."""

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(torch.multiprocessing.get_context("fork").Process)


class _Results(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.found[_name(test)] = "passed"

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self.found[_name(test)] = "skipped"

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self.found[_name(test)] = self._exc_info_to_string(err, test)[-1500:]  # type: ignore[attr-defined]

    def addError(self, test: unittest.TestCase, err: Any) -> None:
        self.addFailure(test, err)


def _name(test: unittest.TestCase) -> str:
    return test.id().rpartition(".")[2]


def main() -> None:
    out, chosen = sys.argv[2], sys.argv[3:]
    names = chosen or unittest.defaultTestLoader.getTestCaseNames(TorchSuite)
    results = _Results()
    for name in names:
        unittest.TestSuite([TorchSuite(name)]).run(results)
        Path(out).write_text(json.dumps(results.found, indent=1))


if __name__ == "__main__":
    os.environ["BACKEND"] = sys.argv[1]
    _suite["BACKEND"] = sys.argv[1]
    main()
