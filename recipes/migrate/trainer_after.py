"""Hugging Face's Trainer: a small classifier, one epoch, then its accuracy on held-out pieces."""

from task import Classifier, Pieces

import shardwise as sw


def job() -> sw.TrainJob:
    return sw.TrainJob(
        model=Classifier,
        loss=sw.cross_entropy,
        metrics={"accuracy": sw.accuracy},
        data=sw.dataset(Pieces(128), eval=Pieces(32, held_out=True)),
        optimizer=sw.adamw(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0, schedule="linear"),
        global_batch=32,
        steps=32,
        clip_norm=1.0,
        eval_every=32,
    )
