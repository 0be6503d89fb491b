"""Plain DistributedDataParallel: a small classifier, three epochs."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from task import Classifier, Pieces
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(Classifier())
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = Pieces(128)
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=64 // world, sampler=sampler)

for epoch in range(3):
    sampler.set_epoch(epoch)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["tokens"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"rank {rank} epoch {epoch} batch {index} loss {loss.item():.7f}", flush=True)

if rank == 0:
    torch.save(model.module.state_dict(), "ddp.pt")
dist.destroy_process_group()
