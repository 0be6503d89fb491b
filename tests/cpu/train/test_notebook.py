"""A job of a notebook cell trains from the notebook: the kernel has threads, and verbs return what a cell shows."""

from __future__ import annotations

import ast
import importlib.util
import os
import textwrap
from typing import Any

import pytest

MISSING = [name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install -e '.[dev]'"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]
CELLS = (
    """
    import threading

    import torch
    from torch import nn

    import shardwise as sw

    WIDTH = 16
    torch.randn(256, 256) @ torch.randn(256, 256)
    threading.active_count(), torch.get_num_threads()
    """,
    """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))

        def forward(self, inputs):
            return self.layers(inputs)
    """,
    """
    def samples(count, seed):
        inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
        return {"inputs": inputs, "targets": (inputs.sum(1) > 0).long()}
    """,
    """
    def job(lr: float = 0.05, steps: int = 30) -> sw.TrainJob:
        return sw.TrainJob(
            model=Net,
            loss=sw.cross_entropy,
            data=sw.arrays(samples(512, 0), samples(128, 1)),
            metrics={"accuracy": sw.accuracy},
            optimizer=sw.adamw(lr=lr),
            global_batch=32,
            steps=steps,
            eval_every=steps,
        )
    """,
    "sw.plan(job, plan='data=2')",
    "result = sw.train(job, plan='data=2', lr=0.03)\nresult",
    "sw.show(result.path)",
    "found = sw.evaluate(result.path)\nassert abs(found['loss'] - result.summary.evaluation.loss) < 1e-6\nfound",
    """
    found = result.summary
    result.status, found.step, found.ranks, found.parameters["lr"], found.loss.first, found.loss.last
    """,
)
PLAN, TRAIN, SHOW, VALUES = 4, 5, 6, 8  # places in CELLS


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each cell of CELLS displays, by MIME type, after all ran in one kernel."""
    import nbformat
    from nbclient import NotebookClient

    folder = tmp_path_factory.mktemp("notebook")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(text).strip()) for text in CELLS])
    client = NotebookClient(book, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    try:
        client.create_kernel_manager()
        client.start_new_kernel()
        client.start_new_kernel_client()
    except Exception as error:
        pytest.skip(f"the kernel does not start here: {type(error).__name__}: {error}")
    with client.setup_kernel():
        for index, cell in enumerate(book.cells):
            client.execute_cell(cell, index)
    assert (folder / "runs" / "latest" / "code" / "cell.py").is_file()
    return [next((out["data"] for out in cell.outputs if "data" in out), {}) for cell in book.cells]


def test_a_verb_is_shown_as_a_table(cells: list[dict[str, Any]]) -> None:
    plan, trained, shown = (cells[index]["text/html"] for index in (PLAN, TRAIN, SHOW))
    assert ">data=2<" in plan
    assert "predicted step" in plan
    for text in (trained, shown):
        assert "finished, 30 steps" in text
        assert ">lr=0.03 steps=30<" in text
        assert "held out" in text


def test_a_verb_returns_a_value(cells: list[dict[str, Any]]) -> None:
    status, step, ranks, rate, first, last = ast.literal_eval(cells[VALUES]["text/plain"])
    assert (status, step, ranks, rate) == ("finished", 30, 2, 0.03)
    assert last < first / 4


def test_the_kernel_had_threads_before_it_trained(cells: list[dict[str, Any]]) -> None:
    threads, of_torch = ast.literal_eval(cells[0]["text/plain"])
    assert threads > 2
    assert of_torch >= 2
