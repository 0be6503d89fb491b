"""A small residual network learns to tell ten kinds of clothing apart (Xiao et al. 2017): 60,000 images of 28 x 28.

The data set is Debian's package `dataset-fashion-mnist`, fetched once into the cache and checked.

    shardwise train recipes/fashion_mnist.py
"""

import shardwise as sw
from shardwise.models.resnet import ResNet


def job(lr: float = 0.1, width: int = 16, batch: int = 128, steps: int = 900) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: ResNet(classes=10, channels=1, width=width, depth=8),
        loss=sw.cross_entropy,
        data=sw.fashion_mnist(),
        optimizer=sw.sgd(lr=lr, momentum=0.9, weight_decay=5e-4, warmup=50, schedule="cosine"),
        metrics={"accuracy": sw.accuracy},
        global_batch=batch,
        steps=steps,
        eval_every=300,
        save_every=300,
        small=dict(width=4),
    )
