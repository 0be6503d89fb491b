"""Export: a checkpoint as plain safetensors, as a torch distributed checkpoint, or for Hugging Face transformers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors import SafetensorError
from torch import nn

from shardwise.checkpoint.load import newest_whole, read_tensors, scalars_of
from shardwise.checkpoint.manifest import MANIFEST, Manifest, read
from shardwise.checkpoint.resume import restore
from shardwise.checkpoint.state import real_name
from shardwise.checkpoint.store import LocalStore, pending
from shardwise.checkpoint.tensorfile import stream
from shardwise.errors import CheckpointError, did_you_mean

_WEIGHTS = "model.safetensors"


class _Export(Struct, frozen=True):
    """One export in the making: `target` writes into the folder `at` of the file system."""

    store: LocalStore
    manifest: Manifest
    module: nn.Module | None
    target: LocalStore
    folder: str

    @property
    def at(self) -> Path:
        return self.target.path / self.folder


def export(
    checkpoint: str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str],
    *,
    module: nn.Module | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the model of `checkpoint` as the new folder `out`, whole or not at all; returns its path.

    `checkpoint` is the folder of one, or a folder of several (a run's, too) of which the newest whole one is taken.
    `to` is one of

    - `safetensors`: `model.safetensors`, for `safetensors.torch.load_model` and `load_state_dict`;
    - `dcp`: model and optimizers under `model` and `optim`, as `torch.distributed.checkpoint.state_dict` names them;
    - `transformers`: what `save_pretrained` of a `PreTrainedModel` writes, or of a model of `peft` (its adapter alone),
      or a Llama of our GPT. It needs the `module` that was trained, built anew; the checkpoint is loaded into it.

    `tokenizer`, a `tokenizer.json`, is copied beside. Raises CheckpointError for an unknown or impossible format, an
    `out` that exists or cannot be written, and a damaged checkpoint; JobError for a GPT that no Llama equals.
    """
    if to not in FORMATS:
        raise CheckpointError(f"'{to}' is not a format that a checkpoint can be exported to{did_you_mean(to, FORMATS)}")
    place = Path(out)
    if place.exists():
        raise CheckpointError(f"{place} is already there. Give another place for the export, or delete it first.")
    store, manifest = _find(Path(checkpoint))
    work = _Export(store, manifest, module, LocalStore(place.absolute().parent), pending(place.name))
    try:
        if work.folder in work.target.folders():
            work.target.remove(work.folder)
        work.target.create(work.folder)
        FORMATS[to](work)
        if tokenizer is not None:
            _write(work, "tokenizer.json", Path(tokenizer).read_bytes())
            _write(work, "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}).encode())
        work.target.publish(work.folder, place.name)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"the export to {place} failed: {reason}. Make room there or give another place."
        ) from None
    finally:
        with suppress(OSError):
            if work.folder in work.target.folders():
                work.target.remove(work.folder)
    return place


def _find(path: Path) -> tuple[LocalStore, Manifest]:
    if (path / MANIFEST).is_file():
        store = LocalStore(path.absolute().parent)
        return store, read(store, path.absolute().name)
    for place in (path / "checkpoints", path):
        store = LocalStore(place)
        found = newest_whole(store)
        if found is not None:
            return store, found
    raise CheckpointError(f"there is no checkpoint in {path}. Give a run's folder, or that of one checkpoint.")


def _to_safetensors(work: _Export) -> None:
    # ties as `safetensors.torch.save_model` tells them
    _write_tensors(work, _model(work), _tied(work))


def _to_dcp(work: _Export) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    model: dict[str, Any] = _model(work)
    model |= {name: model[first] for name, first in _tied(work).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that no_dist is what we asked for
        try:
            save({"model": model, "optim": _optimizers(work)}, checkpoint_id=str(work.at), no_dist=True)
        except CheckpointException as error:
            raise OSError(str(next(iter(error.failures.values()))[0])) from None


def _to_transformers(work: _Export) -> None:
    from shardwise.models.gpt import GPT

    module = work.module
    # not imported: then the module cannot be one of its models
    kinds = [(sys.modules.get("transformers"), "PreTrainedModel"), (sys.modules.get("peft"), "PeftModel")]
    is_pretrained = any(isinstance(module, getattr(package, name)) for package, name in kinds if package is not None)
    if module is None or not (is_pretrained or isinstance(module, GPT)):
        raise CheckpointError(
            f"a {type(module).__name__} has no form in transformers, which knows its own models, peft's adapters and "
            "our GPT (as a Llama). Export it with --to safetensors or --to dcp."
        )
    restore(work.store, work.manifest, module)
    if isinstance(module, GPT):
        from shardwise.models.gpt_llama import to_llama

        config, state = to_llama(module)
        _write(work, "config.json", json.dumps(config, indent=2).encode())
        _write_tensors(work, state, {})
    else:
        module.save_pretrained(work.at)  # type: ignore[operator]


FORMATS: Mapping[str, Callable[[_Export], None]] = {
    "safetensors": _to_safetensors,
    "dcp": _to_dcp,
    "transformers": _to_transformers,
}


def _model(work: _Export) -> dict[str, torch.Tensor]:
    """Parameters and buffers under the module's own names."""
    found = read_tensors(work.store, work.manifest, ("model/", "buffer/"))
    return {real_name(name.partition("/")[2]): tensor for name, tensor in found.items()}


def _tied(work: _Export) -> dict[str, str]:
    tied = scalars_of(work.manifest).get("tied", {})
    return {real_name(name): real_name(first) for name, first in tied.items()}


def _optimizers(work: _Export) -> dict[str, Any]:
    """All optimizers in one, as `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives them."""
    tensors = read_tensors(work.store, work.manifest, ("optimizer/",))
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for one in scalars_of(work.manifest).get("optimizers", []):
        for name, entries in one["state"].items():
            state[real_name(name)] = {key: _value(saved, tensors) for key, saved in entries.items()}
        for group in one["groups"]:
            groups.append({"params": [real_name(name) for name in group["params"]], **group["options"]})
    return {"state": state, "param_groups": groups}


def _value(saved: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, inner),) = saved.items()
    if kind == "tensor":
        return tensors[inner]
    if kind in ("list", "tuple"):
        return [_value(item, tensors) for item in inner]
    return {key: _value(item, tensors) for key, item in inner.items()} if kind == "dict" else inner


def _write(work: _Export, name: str, raw: bytes) -> None:
    work.target.write(work.folder, name, [raw])


def _write_tensors(work: _Export, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    work.target.write(work.folder, _WEIGHTS, stream(tensors, hashlib.sha256(), metadata))
