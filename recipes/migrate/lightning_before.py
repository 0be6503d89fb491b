"""Lightning's Trainer: a small classifier, one epoch, then its accuracy on held-out pieces."""

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from task import Classifier, Pieces, in_order
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch["tokens"]), batch["labels"])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict, index: int) -> None:
        right = self.net(batch["tokens"]).argmax(-1) == batch["labels"]
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


L.seed_everything(0)
loader = DataLoader(in_order(Pieces(128)), batch_size=32)
held_out = DataLoader(Pieces(32, held_out=True), batch_size=64)
trainer = L.Trainer(max_epochs=1, log_every_n_steps=1, logger=CSVLogger("runs", name="lightning"))
trainer.fit(Module(), loader, held_out)
