"""Lightning's Trainer: a small classifier, one epoch, then its accuracy on held-out pieces."""

import torch
from task import Classifier, Pieces

import shardwise as sw

torch.manual_seed(0)
net = Classifier()
with sw.session(
    model=net,
    data=Pieces(128),
    eval_data=Pieces(32, held_out=True),
    loss=sw.cross_entropy,
    metrics={"accuracy": sw.accuracy},
    optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
    global_batch=32,
    eval_every=32,
) as run:
    for batch in run.batches():
        run.step(batch)
