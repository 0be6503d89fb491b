"""Accelerate: a small classifier, three epochs, gradients clipped."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from task import Classifier, Pieces
from torch.utils.data import DataLoader, RandomSampler

accelerator = Accelerator()
set_seed(0)
model = Classifier()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
data = Pieces(128)
order = torch.Generator()
loader = DataLoader(data, batch_size=64 // accelerator.num_processes, sampler=RandomSampler(data, generator=order))
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for epoch in range(3):
    order.manual_seed(epoch)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["tokens"]), batch["labels"])
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        print(f"rank {accelerator.process_index} epoch {epoch} batch {index} loss {loss.item():.7f}", flush=True)

accelerator.wait_for_everyone()
accelerator.save(accelerator.unwrap_model(model).state_dict(), "accelerate.pt")
