"""`images(...)`: a folder with one folder of pictures for each class, decoded as they are needed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shardwise.data.samples import Prepared
from shardwise.data.user_code import collated, named, one_by_one
from shardwise.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_TRAIN, _EVAL = ("train", "training"), ("eval", "val", "valid", "validation", "test")

Transform = Callable[[Any], Any]


def images(
    folder: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    transform: Transform | None = None,
    *,
    eval_transform: Transform | None = None,
    held_out: float = 0.05,
) -> Images:
    """Pictures in `folder/CLASS/...`, or in `folder/train/CLASS/...` and `folder/val/CLASS/...` (or test, eval).

    Batches: `{"inputs": [B, ...], "targets": int64 [B]}`, classes numbered in sorted order. A picture is converted to
    RGB; with `size` (pixels, or height and width) its shorter side is scaled and the middle cut out; then
    `transform(PIL.Image)` makes a tensor or array of it, by default float32 [3, H, W] in -1..1. `eval_transform`
    (default: `transform`) is used for evaluation. Without a folder of its own for evaluation, `held_out` of each class,
    chosen by a hash of the file names, is kept for it. Raises DataError from `prepare`, and for a broken picture when
    it is read.
    """
    pixels = (size, size) if isinstance(size, int) else size
    if pixels is not None and min(pixels) < 1:
        raise DataError(f"size={size} of the images: it is in pixels and must be at least 1.")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out} of the images: it is a share, from 0 to below 1.")
    return Images(os.fspath(folder), pixels, transform, eval_transform or transform, held_out)


@dataclass(frozen=True)
class Images:
    """Made by `images`."""

    folder: str
    size: tuple[int, int] | None
    transform: Transform | None
    eval_transform: Transform | None
    held_out: float

    def prepare(self, cache: Path, *, seed: int = 0) -> Prepared:
        """List the files; nothing is written. Facts: samples, eval_samples, classes (a number), class_names."""
        base = Path(self.folder)
        if not base.is_dir():
            raise DataError(f"There is no folder '{self.folder}' (looked for {base.absolute()}). Correct its path.")
        apart = _first_folder(base, _EVAL)
        top = (_first_folder(base, _TRAIN) if apart else None) or base
        names = sorted(entry.name for entry in _folders(top) if entry != apart)
        train = [(path, number) for number, name in enumerate(names) for path in _pictures(top / name)]
        held: list[tuple[str, int]] = []
        if apart:
            held = _listed_as(apart, names)
        elif self.held_out:
            train, held = _split(train, top, self.held_out)
        if not train:
            raise DataError(
                f"The folder '{top}' has no pictures in class folders. Put them in {top}/CLASS/, with one of the "
                f"suffixes {', '.join(SUFFIXES)}."
            )
        facts: dict[str, Any] = {"samples": len(train), "classes": len(names), "class_names": names}
        samples = ImageSamples(train, self.size, self.transform)
        if not held:
            return Prepared(train=samples, facts=facts)
        facts["eval_samples"] = len(held)
        return Prepared(train=samples, eval=ImageSamples(held, self.size, self.eval_transform), facts=facts)


class ImageSamples:
    """Picture files, decoded when asked for."""

    weight_hint = 1

    def __init__(
        self, listed: Sequence[tuple[str, int]], size: tuple[int, int] | None, transform: Transform | None
    ) -> None:
        self._paths = [path for path, _ in listed]
        self._targets = np.array([target for _, target in listed], dtype=np.int64)
        self._size, self._transform = size, transform

    @property
    def user_code(self) -> bool:
        return self._transform is not None

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> dict[str, Any]:
        """`{"inputs", "targets"}`. Raises DataError that names the file and the sample."""
        import torch

        if self._transform is None:
            items = [self._one(index) for index in indices]
            if len({item.shape for item in items}) > 1:
                raise DataError(
                    f"The pictures in '{os.path.dirname(self._paths[indices[0]])}' and beside it differ in size. Give "
                    "images(..., size=...) so that they can share a batch."
                )
            inputs = torch.from_numpy(np.stack(items))
        else:
            inputs = collated(None, one_by_one(self._one, indices, seeds, "picture"), indices, seeds[0])
        return {"inputs": inputs, "targets": torch.from_numpy(self._targets[np.asarray(indices, dtype=np.int64)])}

    def _one(self, index: int) -> Any:
        path = self._paths[index]
        with named(f"picture {index}, '{path}',"):
            picture = _decoded(path, self._size)
        return _scaled(picture) if self._transform is None else self._transform(picture)


def _decoded(path: str, size: tuple[int, int] | None) -> Any:
    """An RGB PIL.Image; with `size`, scaled on its shorter side and cut in the middle."""
    from PIL import Image, ImageOps

    with Image.open(path) as picture:
        if size is not None:
            picture.draft("RGB", (size[1], size[0]))  # lets a JPEG decode at a lower resolution
        found = picture.convert("RGB")
    return found if size is None else ImageOps.fit(found, (size[1], size[0]), Image.Resampling.BILINEAR)


def _scaled(picture: Any) -> npt.NDArray[np.float32]:
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1)


def _folders(top: Path) -> list[Path]:
    try:
        return [entry for entry in top.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"The folder '{top}' cannot be read: {error.strerror}.") from error


def _first_folder(base: Path, names: Sequence[str]) -> Path | None:
    return next((base / name for name in names if (base / name).is_dir()), None)


def _pictures(folder: Path) -> list[str]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(where, name) for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    return sorted(found)


def _listed_as(top: Path, classes: list[str]) -> list[tuple[str, int]]:
    """The pictures of the evaluation folder; its classes must be among those trained on."""
    unknown = sorted(entry.name for entry in _folders(top) if entry.name not in classes)
    if unknown:
        raise DataError(f"The folder '{top}' has the class {unknown[0]!r}, which the training folder has not.")
    return [(path, number) for number, name in enumerate(classes) for path in _pictures(top / name)]


def _split(
    listed: list[tuple[str, int]], top: Path, share: float
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Of each class the files with the smallest hash of their relative name, rounded; never a class's last file."""
    by_class: dict[int, list[tuple[str, int]]] = {}
    for entry in listed:
        by_class.setdefault(entry[1], []).append(entry)
    held: set[str] = set()
    for entries in by_class.values():
        count = min(len(entries) - 1, round(share * len(entries)))
        held.update(path for path, _ in sorted(entries, key=lambda entry: _rank(entry[0], top))[:count])
    return [entry for entry in listed if entry[0] not in held], [entry for entry in listed if entry[0] in held]


def _rank(path: str, top: Path) -> bytes:
    return hashlib.sha256(os.fsencode(os.path.relpath(path, top))).digest()
