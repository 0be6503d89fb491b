"""Arrays, IDX files, image folders, labelled texts and synthetic data."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardwise.data import idx as idx_module
from shardwise.data.arrays import arrays
from shardwise.data.idx import fashion_mnist, idx
from shardwise.data.images import images
from shardwise.data.labelled import imdb, labelled
from shardwise.data.loader import open_batches
from shardwise.data.synthetic import synthetic
from shardwise.data.tokens import open_tokenizer
from shardwise.errors import DataError

NOWHERE = Path("/nonexistent")


def test_arrays_keep_rows_together_and_dtypes(tmp_path: Path) -> None:
    inputs = np.arange(24, dtype=np.float32).reshape(8, 3)
    for given in (inputs, torch.from_numpy(inputs), inputs.astype(">f4")):
        samples = arrays((given, np.arange(8, dtype=np.uint8))).prepare(tmp_path).train
        batch = samples.batch([5, 0], [0, 0])
        assert batch["inputs"].tolist() == inputs[[5, 0]].tolist()
        assert batch["inputs"].dtype == torch.float32
        assert batch["targets"].dtype == torch.int64
        assert batch["targets"].tolist() == [5, 0]
    found = arrays({"a": inputs, "b": [1.0] * 8}, eval={"a": inputs[:2], "b": [1.0] * 2}).prepare(tmp_path)
    assert set(found.train.batch([1], [0])) == {"a", "b"}
    assert found.facts == {"samples": 8, "eval_samples": 2}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ((np.zeros((3, 2)), np.zeros(4)), "inputs has 3, targets has 4"),
        ((np.zeros((0, 2)), np.zeros(0)), "have no rows"),
        ((np.array(["a", "b"]), np.zeros(2)), "not numeric"),
        ((np.zeros(2), np.float64(1)), "targets of train is a single number"),
        ((1, 2, 3), "has 3 parts"),
        ({}, "there is no array"),
    ],
)
def test_bad_arrays_are_refused(train: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        arrays(train).prepare(NOWHERE)


def idx_bytes(numbers: np.ndarray, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, numbers.ndim]) + struct.pack(f">{numbers.ndim}I", *numbers.shape)
    return header + numbers.astype(numbers.dtype.newbyteorder(">")).tobytes()


def write_idx(top: Path, *, zipped: bool, count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    pictures = np.random.default_rng(0).integers(0, 256, (count, 5, 4)).astype(np.uint8)
    labels = (np.arange(count) % 3).astype(np.uint8)
    pack = gzip.compress if zipped else bytes
    (top / "images").write_bytes(pack(idx_bytes(pictures)))
    (top / "labels").write_bytes(pack(idx_bytes(labels)))
    return pictures, labels


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_normalised_by_the_training_set(tmp_path: Path, zipped: bool) -> None:
    pictures, labels = write_idx(tmp_path, zipped=zipped)
    paths = (tmp_path / "images", tmp_path / "labels")
    found = idx(*paths, *paths).prepare(tmp_path / "cache")
    for samples in (found.train, found.eval):
        assert samples is not None
        batch = samples.batch([7, 3], [0, 0])
        scaled = pictures / 255
        expected = ((scaled[[7, 3]] - scaled.mean()) / scaled.std())[:, None]
        assert batch["inputs"].shape == (2, 1, 5, 4)
        assert batch["inputs"].dtype == torch.float32
        np.testing.assert_allclose(batch["inputs"].numpy(), expected, rtol=1e-4, atol=1e-6)
        assert batch["targets"].tolist() == labels[[7, 3]].tolist()
    assert (found.facts["samples"], found.facts["eval_samples"], found.facts["classes"]) == (12, 12, 3)


def test_idx_numbers_that_are_not_bytes_keep_their_values_and_shape(tmp_path: Path) -> None:
    numbers = np.linspace(-5, 900, 24, dtype=np.float32).reshape(2, 3, 2, 2)
    (tmp_path / "images").write_bytes(idx_bytes(numbers, 0x0D))
    (tmp_path / "labels").write_bytes(idx_bytes(np.array([300, 1], dtype=np.int16), 0x0B))
    batch = idx(tmp_path / "images", tmp_path / "labels").prepare(tmp_path / "cache").train.batch([1, 0], [0, 0])
    assert np.array_equal(batch["inputs"].numpy(), numbers[[1, 0]])
    assert batch["targets"].tolist() == [1, 300]


def test_bad_idx_files_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, zipped=True)
    whole = (tmp_path / "images").read_bytes()
    plain = gzip.decompress(whole)
    bad = {
        "not an IDX": (b"PNG...........", "begins with 50 4e 47 2e, not with an IDX magic number"),
        "cut": (plain[:-3], "ends before the numbers that its header announces"),
        "header cut": (plain[:6], "ends before"),
        "longer": (plain + b"x", "goes on after the 240 numbers"),
        "zip cut": (whole[:-20], "not a whole IDX file"),
        "zip altered": (whole[:40] + bytes([whole[40] ^ 255]) + whole[41:], "not a whole IDX file"),
        "fewer": (idx_bytes(np.zeros((11, 5, 4), dtype=np.uint8)), "has 11 samples but .* has 12 labels"),
        "none": (idx_bytes(np.zeros((0, 5, 4), dtype=np.uint8)), "has 0 samples but"),
    }
    for name, (raw, message) in bad.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message):
            idx(tmp_path / name, tmp_path / "labels").prepare(tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "idx").iterdir() if path.is_dir()]
    with pytest.raises(DataError, match="does not hold labels"):
        idx(tmp_path / "images", tmp_path / "images").prepare(tmp_path / "cache")
    with pytest.raises(DataError, match=r"gone' cannot be read"):
        idx(tmp_path / "gone", tmp_path / "labels").prepare(tmp_path / "cache")
    with pytest.raises(DataError, match="together"):
        idx("a", "b", "c")


def test_fashion_mnist_is_its_four_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(idx_module._FASHION):
        write_idx(tmp_path, zipped=True, count=12 if number < 2 else 6)
        (tmp_path / ("labels" if "labels" in name else "images")).rename(tmp_path / f"{name}.gz")
    monkeypatch.setattr(idx_module, "fetch", lambda name, root: tmp_path if name == "fashion-mnist" else None)
    found = fashion_mnist().prepare(tmp_path / "cache")
    assert (found.facts["samples"], found.facts["eval_samples"]) == (12, 6)


def picture_folder(top: Path, per_class: int = 10, size: tuple[int, int] = (8, 6)) -> Path:
    for number, name in enumerate(("cat", "dog", "eel")):
        (top / name).mkdir(parents=True)
        for index in range(per_class):
            Image.new("RGB", size, (number * 100, index, 7)).save(top / name / f"{index:02}.png")
    return top


def test_image_folders_are_classes_and_pixels_are_scaled(tmp_path: Path) -> None:
    found = images(picture_folder(tmp_path / "pictures"), held_out=0.2).prepare(tmp_path)
    assert found.facts["class_names"] == ["cat", "dog", "eel"]
    assert (found.facts["samples"], found.facts["eval_samples"], found.facts["classes"]) == (24, 6, 3)
    seen = []
    for samples in (found.train, found.eval):
        assert samples is not None
        batch = samples.batch(range(len(samples)), range(len(samples)))
        assert batch["inputs"].shape[1:] == (3, 6, 8)
        assert batch["inputs"].dtype == torch.float32
        pixels = ((batch["inputs"] + 1) * 127.5).round()
        assert pixels[:, 0, 2, 3].tolist() == [target * 100 for target in batch["targets"].tolist()]
        seen += [(int(t), int(p)) for t, p in zip(batch["targets"], pixels[:, 1, 0, 0], strict=True)]
    assert sorted(seen) == [(number, index) for number in range(3) for index in range(10)]


def test_image_folders_with_a_split_of_their_own(tmp_path: Path) -> None:
    picture_folder(tmp_path / "train", 4)
    picture_folder(tmp_path / "val", 2)
    found = images(tmp_path, size=4).prepare(tmp_path)
    assert (found.facts["samples"], found.facts["eval_samples"]) == (12, 6)
    assert found.train.batch([0], [0])["inputs"].shape == (1, 3, 4, 4)
    (tmp_path / "val" / "fox").mkdir()
    with pytest.raises(DataError, match="class 'fox', which the training folder has not"):
        images(tmp_path, size=4).prepare(tmp_path)


def test_size_scales_the_shorter_side_and_keeps_the_middle(tmp_path: Path) -> None:
    (tmp_path / "only").mkdir()
    picture = Image.new("RGB", (40, 20), (255, 255, 255))
    picture.paste((0, 0, 0), (10, 0, 30, 20))  # the middle square is black
    picture.save(tmp_path / "only" / "a.png")
    batch = images(tmp_path, size=10, held_out=0).prepare(tmp_path).train.batch([0], [0])
    assert batch["inputs"].shape == (1, 3, 10, 10)
    assert float(batch["inputs"][0, :, :, 1:-1].max()) < -0.9


@pytest.mark.parametrize("workers", [0, 2])
def test_a_random_transform_follows_the_seed(tmp_path: Path, workers: int) -> None:
    def transform(picture: Image.Image) -> torch.Tensor:
        return torch.rand(2) + picture.size[0]

    samples = images(picture_folder(tmp_path / "pictures"), transform=transform, held_out=0).prepare(tmp_path).train
    expected = torch.cat([samples.batch([i], [0])["inputs"] for i in range(3)])
    assert expected[0].tolist() == expected[1].tolist()  # the same seed
    runs = []
    for _ in range(2):
        with open_batches(samples, global_batch=5, seed=2, rank=0, ranks=1, steps=4, workers=workers) as batches:
            runs.append(torch.cat([micro.batch["inputs"] for local in batches for micro in local.micro]))
    assert torch.equal(runs[0], runs[1])
    assert len({tuple(row) for row in runs[0].tolist()}) == 20


def test_bad_pictures_are_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "pictures", 2)
    (folder / "cat" / "00.png").write_bytes(b"not a picture")
    samples = images(folder, held_out=0).prepare(tmp_path).train
    with pytest.raises(DataError, match=r"Picture 0, '.*cat/00.png', failed: UnidentifiedImageError"):
        samples.batch([1, 0], [0, 0])
    Image.new("RGB", (5, 5)).save(folder / "cat" / "00.png")
    with pytest.raises(DataError, match="differ in size. Give images"):
        samples.batch([1, 0], [0, 0])
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="no pictures in class folders"):
        images(tmp_path / "empty").prepare(tmp_path)
    with pytest.raises(DataError, match="no folder '.*gone'"):
        images(tmp_path / "gone").prepare(tmp_path)
    with pytest.raises(DataError, match="size=0"):
        images(tmp_path, size=0)


TEXTS = [(f"the {word} film number {i} was " + word * 2, i % 2) for i, word in enumerate(["good", "bad"] * 40)]


def test_labelled_texts_are_rows_with_a_mask(tmp_path: Path) -> None:
    found = labelled([*TEXTS, TEXTS[0]], vocab=300, length=12, held_out=0.25).prepare(tmp_path)
    tokenizer = open_tokenizer(found.facts["tokenizer"])
    end, pad = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|pad|>")
    assert (found.facts["samples"], found.facts["eval_samples"]) == (60, 20)  # the duplicate is gone
    labels = dict(TEXTS)
    seen = []
    for samples in (found.train, found.eval):
        assert samples is not None
        batch = samples.batch(range(len(samples)), [0] * len(samples))
        assert batch["tokens"].shape == batch["mask"].shape == (len(samples), 12)
        assert (batch["tokens"].dtype, batch["mask"].dtype) == (torch.int64, torch.bool)
        for tokens, mask, target in zip(batch["tokens"], batch["mask"], batch["targets"], strict=True):
            kept = tokens[mask].tolist()
            assert kept[-1] == end
            assert set(tokens[~mask].tolist()) <= {pad}
            start = tokenizer.decode(kept[:-1])
            text = next(text for text in labels if text.startswith(start) and labels[text] == int(target))
            seen.append(text)
    assert len(seen) == 80
    assert 0.2 < found.facts["majority_accuracy"] < 0.8


def test_labelled_texts_in_the_tokens_of_another_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "good", "bad", "film", "number", "was"]
    theirs = Tokenizer(models.WordLevel({word: 7 + n for n, word in enumerate(words)}, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.enable_truncation(3)
    theirs.save(str(tmp_path / "tokenizer.json"))
    found = labelled(TEXTS, vocab=300, length=6, tokenizer=tmp_path / "tokenizer.json").prepare(tmp_path)
    rows = found.train.batch(range(8), [0] * 8)["tokens"].tolist()
    assert all((row[0], row[1], row[5]) == (9, 11, 10) for row in rows)  # [CLS] the ... [SEP]
    assert {row[2] for row in rows} == {12, 13}
    short = labelled([("the film", 0), ("the bad film", 1)], 300, 8, 0, tokenizer=tmp_path / "tokenizer.json")
    batch = short.prepare(tmp_path).train.batch([0, 1], [0, 0])
    by_class = dict(zip(batch["targets"].tolist(), batch["tokens"].tolist(), strict=True))
    assert by_class[0] == [9, 11, 14, 10, 7, 7, 7, 7]
    assert sorted(batch["mask"].sum(1).tolist()) == [4, 5]
    theirs.add_tokens([f"word{n}" for n in range(300)])
    theirs.save(str(tmp_path / "large.json"))
    large = labelled(TEXTS, vocab=260, length=6, tokenizer=tmp_path / "large.json")
    with pytest.raises(DataError, match="more than vocab=260"):
        large.prepare(tmp_path)


def test_imdb_reads_the_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    from shardwise.data import labelled as module

    reviews = [{"t": text.replace(" film", "<br />film"), "s": label} for text, label in TEXTS]
    (tmp_path / "reviews.json").write_text(json.dumps(reviews))
    monkeypatch.setattr(module, "fetch", lambda name, root: tmp_path)
    found = imdb(vocab=300, length=40).prepare(tmp_path / "cache")
    tokenizer = open_tokenizer(found.facts["tokenizer"])
    batch = found.train.batch([0], [0])
    assert "\nfilm" in tokenizer.decode(batch["tokens"][0][batch["mask"][0]].tolist())


@pytest.mark.parametrize(
    ("pairs", "how", "message"),
    [
        ([], {}, "labelled texts are empty"),
        ([("a", 0), ("b", -1)], {}, "label -1"),
        ([("a", 0), ("b", 2)], {"classes": 2}, "label 2; labels are 0 to classes - 1 = 1"),
        ([("a", 0), ("b", 1)], {"vocab": 400}, "vocab=400 is more than this corpus supports"),
        ([("a", 0)], {"length": 1}, "length=1"),
        ([("a", 0)], {"held_out": 1}, "held_out=1"),
        ([("a", 0)], {"vocab": 257}, "vocab=257"),
    ],
)
def test_bad_labelled_texts_are_refused(tmp_path: Path, pairs: Any, how: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        labelled(pairs, **{"vocab": 258, "length": 8, **how}).prepare(tmp_path)


def test_synthetic_samples_are_functions_of_their_index() -> None:
    for kind in ("classes", "regression", "text"):
        found = synthetic(kind, samples=50, eval_samples=10, shape=(2, 3), context=16).prepare(NOWHERE)  # type: ignore[arg-type]
        whole = found.train.batch(range(50), range(50))
        part = found.train.batch([31, 4], [0, 0])
        assert found.eval is not None
        for key, value in part.items():
            assert torch.equal(value, whole[key][[31, 4]])
        held = found.eval.batch(range(10), range(10))
        first = next(iter(whole))
        rows = {tuple(row.flatten().tolist()) for row in whole[first]}
        assert not rows & {tuple(row.flatten().tolist()) for row in held[first]}


def test_synthetic_data_can_be_learned() -> None:
    classes = synthetic("classes", samples=500, shape=(20,), classes=4, noise=0.5).prepare(NOWHERE).train
    batch = classes.batch(range(500), range(500))
    assert set(batch["targets"].tolist()) == {0, 1, 2, 3}
    means = torch.stack([batch["inputs"][batch["targets"] == c].mean(0) for c in range(4)])
    assert (torch.cdist(batch["inputs"], means).argmin(1) == batch["targets"]).float().mean() > 0.95
    lines = (
        synthetic("regression", samples=500, shape=(5,), noise=0.1).prepare(NOWHERE).train.batch(range(500), range(500))
    )
    fit = torch.linalg.lstsq(lines["inputs"], lines["targets"]).solution
    left = (lines["inputs"] @ fit - lines["targets"]).std()
    assert float(left) == pytest.approx(0.1, rel=0.15)
    text = (
        synthetic("text", samples=200, vocab=11, context=32, noise=1.0)
        .prepare(NOWHERE)
        .train.batch(range(200), range(200))
    )
    follows = {(int(a), int(b)) for a, b in zip(text["tokens"].flatten(), text["targets"].flatten(), strict=True)}
    assert {a for a, _ in follows} == set(range(11))
    table = torch.zeros(11, 11)
    for a, b in zip(text["tokens"].flatten(), text["targets"].flatten(), strict=True):
        table[a, b] += 1
    assert 0.85 < float(table.max(1).values.sum() / table.sum()) < 0.97
    assert torch.equal(text["tokens"][:, 1:], text["targets"][:, :-1])


def test_bad_synthetic_settings_are_refused() -> None:
    with pytest.raises(DataError, match="samples of the synthetic data is 0"):
        synthetic(samples=0)
    with pytest.raises(DataError, match="kind='images'"):
        synthetic("images")  # type: ignore[arg-type]
