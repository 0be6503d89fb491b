"""Lightning's Trainer: a small classifier, three epochs, evaluated after each."""

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
    global_batch=64,
    epochs=3,
    eval_every=16,
) as run:
    for batch in run.batches():
        run.step(batch)
