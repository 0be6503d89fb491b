"""Freed memory stays in the process, so that steps do not fault it in again."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shardwise.parallel.allocator import keep_freed_memory

COUNT = """
import resource, sys, torch
from shardwise.parallel.allocator import keep_freed_memory
kept = keep_freed_memory({}) if sys.argv[1] == "keep" else True
def step():
    return [torch.ones(n << 18) for n in (1, 50, 7)]
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[bool, int]:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True, timeout=60)
    kept, count = done.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not keep_freed_memory({}), reason="needs glibc")
def test_steps_fault_less_memory_in() -> None:
    kept, count = faults("keep")
    assert kept
    assert count < faults("leave")[1] / 3


def test_an_allocator_of_the_users_choice_is_left_alone() -> None:
    assert not keep_freed_memory({"LD_PRELOAD": "libjemalloc.so.2"})
    assert not keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000"})
