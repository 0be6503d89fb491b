"""The compiled part of `shm` and of codecs: beside this file if it was built with a C compiler, else absent."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import importlib
import importlib.machinery
from ctypes import c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

NAME = "_shm"
MODULE = f"shardwise.comm.{NAME}"
TRANSPORT = "SHARDWISE_TRANSPORT"  # what carries host memory between ranks: one of
TRANSPORTS = ("auto", "shm", "shm-torch", "gloo")  # shm-torch: shared memory without the compiled kernel


class Kind(enum.IntEnum):
    """Operations, numbered as in shm_kernel.c."""

    BARRIER = 0
    ALL_REDUCE = 1
    REDUCE = 2
    BROADCAST = 3
    ALL_GATHER = 4
    REDUCE_SCATTER = 5
    GATHER = 6
    SCATTER = 7
    ALL_TO_ALL = 8
    SEND = 9
    RECV = 10


class Outcome(enum.IntEnum):
    """What waiting for an operation returns."""

    OK = 0
    AGAIN = 1
    FAILED = 2


_FIVE = [c_void_p] * 5
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "shm_fixed": (c_uint64, [c_int, c_uint64, c_uint64]),
    "shm_open_group": (c_void_p, [c_void_p, c_int, c_int, *[c_uint64] * 3, c_int, c_void_p, c_void_p]),
    "shm_start": (c_void_p, [c_void_p, *[c_int] * 4, c_uint64, *[c_int, c_void_p, c_void_p] * 2]),
    "shm_begin": (c_void_p, [c_void_p, c_uint64, c_void_p, c_void_p, c_uint64]),
    "shm_post": (c_void_p, [c_void_p, c_uint64, c_void_p, c_void_p, c_uint64]),
    "shm_end": (c_int, [c_void_p, c_void_p, c_double]),
    "shm_message": (c_void_p, [c_void_p, c_int, c_int, c_int64, c_void_p, c_uint64]),
    "shm_wait": (c_int, [c_void_p, c_void_p, c_double]),
    "shm_test": (c_int, [c_void_p, c_void_p]),
    "shm_peer": (c_int, [c_void_p]),
    "shm_release": (None, [c_void_p, c_void_p]),
    "shm_abort": (None, [c_void_p, c_char_p]),
    "shm_why": (c_int, [c_void_p, c_void_p, c_int]),
    "shm_settle": (None, [c_void_p]),
    "shm_leave": (None, [c_void_p]),
    "shm_free": (None, [c_void_p]),
    "shm_reduce": (None, [c_void_p, c_void_p, c_int, c_uint64, c_int, c_int]),
    "codec_encode": (None, [c_void_p, c_void_p, c_void_p, c_uint64, c_uint64, c_int, c_float, c_float]),
    "codec_decode": (None, [c_void_p, c_void_p, c_void_p, c_uint64, c_uint64, c_int]),
    "replica_tell": (None, [*_FIVE, c_uint64, c_uint64, c_int, c_float, c_float]),
    "replica_follow": (None, [*_FIVE, c_uint64, c_uint64, c_int, c_int, c_uint64, c_uint64, c_int, c_float, c_float]),
}


def library() -> Path | None:
    """The compiled kernel, or None where the package was built without one."""
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (here / f"{NAME}{suffix}").exists():
            return here / f"{NAME}{suffix}"
    return None


@functools.cache
def loadable() -> bool:
    """Whether there is a compiled kernel that this system can load."""
    try:
        kernel()
    except OSError:
        return False
    return True


@functools.cache
def kernel() -> Any:
    """The kernel's functions. Raises OSError where `library` is None or this system cannot load it."""
    path = library()
    if path is None:
        raise OSError("shardwise was built without a C compiler, so it has no shared-memory kernel.")
    loaded = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name, None)
        if function is None:
            raise OSError(f"{path} was built from other sources: it has no {name}. Install shardwise again.")
        function.restype, function.argtypes = result, arguments
    with contextlib.suppress(ImportError):  # the same functions without ctypes, where Python's headers were there
        loaded.__dict__.update({k: v for k, v in vars(importlib.import_module(MODULE)).items() if k in _SIGNATURES})
    return loaded
