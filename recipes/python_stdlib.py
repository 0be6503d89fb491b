"""A small GPT learns Python from the interpreter's own standard library, then completes code that looks like Python.

shardwise train recipes/python_stdlib.py
shardwise show latest
shardwise sample latest "def "
"""

import shardwise as sw
from shardwise.models.gpt import GPT


def job(
    lr: float = 3e-3, layers: int = 4, width: int = 192, context: int = 128, batch: int = 32, steps: int = 250
) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: GPT(layers=layers, width=width, heads=6, vocab=4096, context=context),
        loss=sw.next_token_loss,
        data=sw.text(sw.python_stdlib(), vocab=4096, context=context),
        optimizer=sw.adamw(lr=lr, warmup=50, schedule="cosine"),
        global_batch=batch,
        steps=steps,
        seed=0,
        clip_norm=1.0,
        precision="bfloat16",
        eval_every=steps,
        small=dict(layers=2, width=48),
    )
