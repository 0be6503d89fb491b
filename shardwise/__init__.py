"""Shardwise: distributed machine learning with Python. Names are handed on lazily; nothing is imported until used."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "Cluster": "spec.cluster",
    "EarlyStop": "spec.job",
    "Optimizer": "spec.job",
    "Plan": "spec.plan",
    "TrainJob": "spec.job",
    "accuracy": "models.losses",
    "adamw": "train.optimizers",
    "arrays": "data.arrays",
    "cross_entropy": "models.losses",
    "dataset": "data.datasets",
    "evaluate": "train.api",
    "fashion_mnist": "data.idx",
    "files": "data.corpus",
    "idx": "data.idx",
    "images": "data.images",
    "imdb": "data.labelled",
    "labelled": "data.labelled",
    "minilm": "data.weights",
    "mse": "models.losses",
    "next_token_loss": "models.losses",
    "optimizer": "train.optimizers",
    "pretrained": "checkpoint.pretrained",
    "python_stdlib": "data.corpus",
    "sample": "train.api",
    "session": "train.session",
    "sgd": "train.optimizers",
    "show": "train.api",
    "smollm2": "data.weights",
    "synthetic": "data.synthetic",
    "text": "data.text",
    "verify": "train.api",
}
_VERBS = ("plan", "train", "export")  # rooms whose verb is a function too: sw.train(job) and shardwise.train.run

__all__ = [*_NAMES, *_VERBS]


class _Verb(ModuleType):
    """A room that can be called: `sw.plan(...)` is `shardwise.train.api.plan(...)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("shardwise.train.api"), self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _Verb  # the import system sets a room here when it is first imported
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _NAMES:
            value = getattr(import_module(f"shardwise.{_NAMES[name]}"), name)
            super().__setattr__(name, value)
            return value
        if name == "export":
            return import_module("shardwise.train.api").export
        if name in _VERBS:
            return import_module(f"shardwise.{name}")
        raise AttributeError(f"module 'shardwise' has no attribute '{name}'")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
