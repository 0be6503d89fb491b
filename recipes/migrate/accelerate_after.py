"""Accelerate: a small classifier, three epochs, gradients clipped."""

import torch
import torch.nn.functional as F
from task import Classifier, Pieces
from torch.utils.data import DataLoader, RandomSampler

import shardwise as sw

run = sw.session()
torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = Pieces(128)
order = torch.Generator()
loader = DataLoader(data, batch_size=64, sampler=RandomSampler(data, generator=order))
model, optimizer, loader = run.prepare(model, optimizer, loader)

for epoch in range(3):
    order.manual_seed(epoch)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["tokens"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        print(f"rank {run.rank} epoch {epoch} batch {index} loss {loss.item():.7f}", flush=True)

if run.rank == 0:
    torch.save(model.state_dict(), "accelerate.pt")
