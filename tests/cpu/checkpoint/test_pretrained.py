"""Weights of others, read into modules: by name, by part, from safetensors and GGUF, and what is wrong with files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

from shardwise.checkpoint import pretrained as module_under_test
from shardwise.checkpoint.pretrained import pretrained
from shardwise.data.gguf import llama_config, read_gguf
from shardwise.errors import CheckpointError
from shardwise.models.partial import build_part
from shardwise.spec.layout import Box, whole

gguf = pytest.importorskip("gguf")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 50), nn.BatchNorm1d(50), nn.Linear(50, 3))


def stored(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found = {name: tensor.to(dtype) for name, tensor in net().state_dict().items() if tensor.is_floating_point()}
    save_file(found, folder / "model.safetensors")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_come_by_name_in_the_dtype_of_the_module(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_CHUNK_BYTES", 256)  # many pieces
    found = stored(tmp_path, dtype)
    module = pretrained(net(), tmp_path)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, found[name].float()), name
        assert parameter.requires_grad


def test_a_parameter_that_is_not_contiguous(tmp_path: Path) -> None:
    save_file({"weight": torch.arange(12.0).view(3, 4)}, tmp_path / "model.safetensors")
    module = nn.Linear(4, 3, bias=False)
    module.weight = nn.Parameter(torch.zeros(4, 3).t())
    assert torch.equal(pretrained(module, tmp_path).weight, torch.arange(12.0).view(3, 4))  # type: ignore[arg-type]


def test_other_names_and_new_parameters(tmp_path: Path) -> None:
    found = stored(tmp_path)
    module = nn.ModuleDict({"body": nn.Linear(40, 50), "head": nn.Linear(50, 7)})
    before = module["head"].weight.detach().clone()  # type: ignore[union-attr, operator]
    for names in ({"body.weight": "0.weight", "body.bias": "0.bias"}, lambda name: name.replace("body", "0")):
        pretrained(module, tmp_path / "model.safetensors", names=names, new=["head.*"])
        assert torch.equal(module["body"].weight, found["0.weight"])  # type: ignore[arg-type]
        assert torch.equal(module["head"].weight, before)  # type: ignore[arg-type]


def test_several_files(tmp_path: Path) -> None:
    found = stored(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, (name, tensor) in enumerate(found.items()):
        parts[["a.safetensors", "b.safetensors"][number % 2]][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, tmp_path / file)
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "consolidated.safetensors")  # not in the index
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    module = pretrained(net(), tmp_path)
    assert all(torch.equal(parameter, found[name]) for name, parameter in module.named_parameters())


def test_a_rank_reads_its_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = stored(tmp_path)
    read: list[tuple[int, ...]] = []
    pieces = module_under_test._Stored.pieces
    monkeypatch.setattr(module_under_test._Stored, "pieces", lambda self: [read.append(self.shape), *pieces(self)][1:])
    module, _ = build_part(
        lambda: pretrained(net(), tmp_path), lambda name, shape: (whole(shape),) if name.startswith("2.") else ()
    )
    assert (50, 40) not in read
    assert (3, 50) in read
    assert torch.equal(module.get_parameter("2.weight"), found["2.weight"])
    assert not module.get_parameter("0.weight").detach().any()


def test_of_a_parameter_the_rows_that_a_rank_has(tmp_path: Path) -> None:
    found = stored(tmp_path)
    half = Box((25, 0), (25, 40))
    module, by_part = build_part(
        lambda: pretrained(net(), tmp_path), lambda name, shape: (half,) if name == "0.weight" else (whole(shape),)
    )
    assert by_part
    assert torch.equal(module.get_parameter("0.weight")[25:], found["0.weight"][25:])
    assert not module.get_parameter("0.weight").detach()[:25].any()


def write_llama(path: Path, quantised: str, **more: Any) -> dict[str, torch.Tensor]:
    """A tiny Llama as a GGUF file, through the format's own package; what is in it, dequantised, in its own order."""
    kind = gguf.GGMLQuantizationType[quantised]
    writer = gguf.GGUFWriter(path, more.get("kind", "llama"))
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    random = np.random.default_rng(3)
    shapes = {"token_embd.weight": (300, 64), "output_norm.weight": (64,)}
    for n in range(2):
        shapes |= {f"blk.{n}.attn_q.weight": (64, 64), f"blk.{n}.attn_k.weight": (32, 64)}
        shapes |= {f"blk.{n}.attn_v.weight": (32, 64), f"blk.{n}.attn_output.weight": (64, 64)}
        shapes |= {f"blk.{n}.ffn_gate.weight": (96, 64), f"blk.{n}.ffn_up.weight": (96, 64)}
        shapes |= {f"blk.{n}.ffn_down.weight": (64, 96)}
        shapes |= {f"blk.{n}.attn_norm.weight": (64,), f"blk.{n}.ffn_norm.weight": (64,)}
    found = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            values = gguf.quants.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
        found[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


@pytest.mark.parametrize("quantised", ["F32", "F16", "Q8_0", "Q4_1"])
def test_a_llama_of_a_gguf_file_is_the_one_of_transformers(
    quantised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shardwise.checkpoint import gguf as reader

    monkeypatch.setattr(reader, "_CHUNK_ELEMENTS", 2048)
    found = write_llama(tmp_path / "tiny.gguf", quantised)
    (tmp_path / "config.json").write_text(json.dumps(llama_config(read_gguf(tmp_path / "tiny.gguf"))))
    config = tf.LlamaConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.tie_word_embeddings, config.vocab_size) == (2, True, 300)
    module = pretrained(tf.LlamaForCausalLM(config), tmp_path)
    assert torch.equal(module.model.embed_tokens.weight, found["token_embd.weight"])  # type: ignore[union-attr]
    assert torch.equal(module.get_parameter("model.layers.1.mlp.down_proj.weight"), found["blk.1.ffn_down.weight"])
    key = module.get_parameter("model.layers.1.self_attn.k_proj.weight")
    # row 2 i + j of a head in the file is row i + 8 j of 16
    assert torch.equal(key, found["blk.1.attn_k.weight"].view(2, 8, 2, 64).transpose(1, 2).reshape(32, 64))
    query = module.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(query, found["blk.0.attn_q.weight"].view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64))


def whole_file(folder: Path) -> bytes:
    stored(folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("keep", [0, 5, 8, 40, 400, 2000, -1])
def test_a_file_that_is_cut_off(keep: int, tmp_path: Path) -> None:
    raw = whole_file(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match="not (a )?whole"):
        pretrained(net(), tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 4, 100, 1000, 3000, -100])
def test_a_gguf_file_that_is_cut_off(keep: int, tmp_path: Path) -> None:
    write_llama(tmp_path / "tiny.gguf", "Q8_0")
    raw = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match="not whole|no GGUF file|cut off"):
        pretrained(net(), tmp_path)


def test_what_does_not_fit(tmp_path: Path) -> None:
    stored(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack 2 parameters of the module: 'weight', 'bias' \(they have '0"):
        pretrained(nn.Linear(40, 50), tmp_path)
    with pytest.raises(CheckpointError, match=r"'0.weight' .* has the shape \[50, 40\], and \[50, 41\] in the module"):
        pretrained(nn.Linear(41, 50), tmp_path, names=lambda name: f"0.{name}")


def test_pickles_and_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no .safetensors and no .gguf file.$"):
        pretrained(net(), tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="A pickle can run code"):
            pretrained(net(), path)
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        pretrained(net(), tmp_path / "nowhere.safetensors")
    write_llama(tmp_path / "other.gguf", "F32", kind="gemma3")
    with pytest.raises(CheckpointError, match="of the kind 'gemma3'"):
        pretrained(net(), tmp_path / "other.gguf")


@pytest.mark.parametrize("said", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[" * 100_000])
def test_an_index_that_names_no_files_is_an_error(said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(said)
    with pytest.raises(CheckpointError, match="does not say which files have the weights"):
        pretrained(nn.Linear(2, 2), tmp_path)
