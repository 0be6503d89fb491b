"""`idx(...)`: the IDX files of MNIST and its kin (gz or raw), and Fashion-MNIST itself."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from shardwise.data import cache
from shardwise.data.fetch import fetch
from shardwise.data.rows import RowFile
from shardwise.data.samples import Prepared
from shardwise.errors import DataError

_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
_READ_BYTES = 1 << 20
_FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

PathLike = str | os.PathLike[str]


def idx(
    images_path: PathLike,
    labels_path: PathLike,
    eval_images: PathLike | None = None,
    eval_labels: PathLike | None = None,
) -> Idx:
    """IDX files, gzipped or not: batches `{"inputs": float32 [B, 1, H, W], "targets": int64 [B]}`.

    Bytes are scaled to 0..1, then to mean 0 and standard deviation 1 over the training set. Samples that are not
    two-dimensional keep their shape; other number types become float32 unscaled. Raises DataError from `prepare`.
    """
    if (eval_images is None) != (eval_labels is None):
        raise DataError("idx(...) needs eval_images and eval_labels together, or neither.")
    held = None if eval_images is None or eval_labels is None else (os.fspath(eval_images), os.fspath(eval_labels))
    return Idx((os.fspath(images_path), os.fspath(labels_path)), held)


def fashion_mnist() -> FashionMnist:
    """Fashion-MNIST (Xiao et al. 2017; MIT licence): 60 000 and 10 000 pictures of 28 x 28, 10 classes.

    It comes from the Debian package dataset-fashion-mnist, fetched once. Batches as of `idx`.
    """
    return FashionMnist()


@dataclass(frozen=True)
class FashionMnist:
    """Made by `fashion_mnist`."""

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Facts: as of `idx`. Raises DataError when the package can neither be found nor fetched."""
        folder = fetch("fashion-mnist", cache)
        paths = [str(folder / f"{name}.gz") for name in _FASHION]
        return Idx((paths[0], paths[1]), (paths[2], paths[3])).prepare(cache, seed=seed)


@dataclass(frozen=True)
class Idx:
    """Made by `idx`."""

    train: tuple[str, str]
    eval: tuple[str, str] | None

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """Unpack once into `cache`. Facts: samples, eval_samples, classes, shape, mean and std of the inputs."""
        train = _unpacked(*self.train, cache)
        held = _unpacked(*self.eval, cache) if self.eval else None
        facts = {key: train.facts[key] for key in ("samples", "classes", "shape", "mean", "std")}
        samples = IdxSamples(train, train.facts["mean"], train.facts["std"])
        if held is None:
            return Prepared(train=samples, facts=facts)
        if held.facts["shape"] != train.facts["shape"]:
            raise DataError(
                f"The samples of '{self.train[0]}' have shape {train.facts['shape']}, those of eval_images "
                f"{held.facts['shape']}. Give files of one kind."
            )
        facts |= {"eval_samples": held.facts["samples"]}
        return Prepared(train=samples, eval=IdxSamples(held, facts["mean"], facts["std"]), facts=facts)


class _Unpacked(NamedTuple):
    folder: Path
    facts: dict[str, Any]


class IdxSamples:
    """Unpacked IDX rows, read at offsets and normalised."""

    user_code = False
    weight_hint = 1

    def __init__(self, unpacked: _Unpacked, mean: float, std: float) -> None:
        facts = unpacked.facts
        size = math.prod(facts["shape"])
        self._rows = RowFile(
            unpacked.folder / "inputs.bin", facts["dtype"], length=size, stride=size, count=facts["samples"]
        )
        self._targets = np.fromfile(unpacked.folder / "targets.bin", dtype=np.int64)
        self._shape = (1, *facts["shape"]) if len(facts["shape"]) == 2 else tuple(facts["shape"])
        self._table = None
        if facts["dtype"] == "|u1":
            self._table = ((np.arange(256) / 255 - mean) / std).astype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Sequence[int], seeds: Sequence[int] = ()) -> dict[str, Any]:
        """`{"inputs": float32 [B, *shape], "targets": int64 [B]}`."""
        import torch

        read = self._rows.read(indices)
        scaled = read.astype(np.float32) if self._table is None else self._table[read]
        return {
            "inputs": torch.from_numpy(scaled.reshape(len(indices), *self._shape)),
            "targets": torch.from_numpy(self._targets[np.asarray(indices, dtype=np.int64)]),
        }


def _unpacked(images: str, labels: str, root: Path) -> _Unpacked:
    key = cache.key_of("idx", 1, _digest(images), _digest(labels))
    folder = cache.folder(root, "idx", key, lambda made: _unpack(images, labels, made))
    return _Unpacked(folder, json.loads((folder / "facts.json").read_text()))


def _unpack(images: str, labels: str, made: Path) -> None:
    dtype, shape, histogram = _copy(images, made / "inputs.bin")
    kind, counts, _ = _copy(labels, made / "raw.bin")
    if kind.kind not in "ui" or len(counts) != 1:
        raise DataError(f"'{labels}' does not hold labels: they are one whole number a sample, a one-dimensional file.")
    if counts[0] != shape[0]:
        raise DataError(
            f"'{images}' has {shape[0]} samples but '{labels}' has {counts[0]} labels. Give files that belong together."
        )
    if not shape[0]:
        raise DataError(f"'{images}' has no samples in it.")
    targets = np.fromfile(made / "raw.bin", dtype=kind).astype(np.int64)
    (made / "raw.bin").unlink()
    (made / "targets.bin").write_bytes(targets.tobytes())
    values = np.arange(256) / 255
    mean = float(histogram @ values / max(1, histogram.sum()))
    std = math.sqrt(float(histogram @ (values - mean) ** 2 / max(1, histogram.sum()))) or 1.0
    facts = {
        "samples": shape[0],
        "shape": shape[1:],
        "dtype": dtype.str,
        "classes": int(targets.max()) + 1,
        "mean": mean,
        "std": std,
    }
    (made / "facts.json").write_text(json.dumps(facts))


def _copy(source: str, target: Path) -> tuple[np.dtype[Any], list[int], Any]:
    """Unpack one file's numbers in this machine's byte order; its dtype, shape, and histogram if they are bytes."""
    histogram = np.zeros(256, dtype=np.int64)
    with _opened(source) as file, open(target, "wb") as out:
        dtype, shape = _header(file, source)
        left = math.prod(shape) * dtype.itemsize
        native = dtype.newbyteorder("=")
        while left:
            raw = _read(file, source, min(left, _READ_BYTES))
            left -= len(raw)
            part = np.frombuffer(raw, dtype=dtype)
            if dtype.itemsize == 1 and dtype.kind == "u":
                histogram += np.bincount(part, minlength=256)
            out.write(part.astype(native).tobytes())
        if _read(file, source, 1, exact=False):
            raise _corrupt(source, f"it goes on after the {math.prod(shape)} numbers that its header announces")
    return native, shape, histogram


def _header(file: BinaryIO, source: str) -> tuple[np.dtype[Any], list[int]]:
    magic = _read(file, source, 4)
    if magic[:2] != b"\0\0" or magic[2] not in _DTYPES or not magic[3]:
        raise _corrupt(source, f"it begins with {magic.hex(' ')}, not with an IDX magic number")
    shape = list(struct.unpack(f">{magic[3]}I", _read(file, source, 4 * magic[3])))
    return np.dtype(">" + _DTYPES[magic[2]]), shape


def _opened(source: str) -> BinaryIO:
    try:
        with open(source, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        return cast("BinaryIO", gzip.open(source, "rb")) if zipped else open(source, "rb")
    except OSError as error:
        raise _unreadable(source, error) from error


def _read(file: BinaryIO, source: str, size: int, *, exact: bool = True) -> bytes:
    parts, left = [], size
    try:
        while left and (raw := file.read(left)):
            parts.append(raw)
            left -= len(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise _corrupt(source, str(error)) from error
    if left and exact:
        raise _corrupt(source, "it ends before the numbers that its header announces")
    return b"".join(parts)


def _digest(source: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(source, "rb") as file:
            while raw := file.read(_READ_BYTES):
                digest.update(raw)
    except OSError as error:
        raise _unreadable(source, error) from error
    return digest.hexdigest()


def _corrupt(source: str, why: str) -> DataError:
    return DataError(f"'{source}' is not a whole IDX file: {why}. Fetch it again.")


def _unreadable(source: str, error: OSError) -> DataError:
    return DataError(f"'{source}' cannot be read: {error.strerror}. Correct the path of the IDX file.")
