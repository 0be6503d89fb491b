"""Every description of data that a job can hold, and what preparing one gives: the door of this room."""

from __future__ import annotations

from shardwise.data.arrays import arrays
from shardwise.data.cache import cache_root
from shardwise.data.corpus import files, python_stdlib
from shardwise.data.datasets import dataset
from shardwise.data.fetch import fetch
from shardwise.data.idx import fashion_mnist, idx
from shardwise.data.images import images
from shardwise.data.labelled import imdb, labelled
from shardwise.data.samples import Data, Prepared, Samples, Stream
from shardwise.data.synthetic import synthetic
from shardwise.data.table import rows
from shardwise.data.text import text

__all__ = [
    "Data",
    "Prepared",
    "Samples",
    "Stream",
    "arrays",
    "cache_root",
    "dataset",
    "fashion_mnist",
    "fetch",
    "files",
    "idx",
    "images",
    "imdb",
    "labelled",
    "python_stdlib",
    "rows",
    "synthetic",
    "text",
]
