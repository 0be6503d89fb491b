"""Hugging Face's Trainer: a small classifier, one epoch, then its accuracy on held-out pieces."""

import torch.nn.functional as F
from task import Classifier, Pieces, in_order
from transformers import Trainer, TrainingArguments, set_seed


class WithLoss(Classifier):
    def forward(self, tokens, labels):
        scores = super().forward(tokens)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def accuracy(predicted):
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean()}


set_seed(0)
trainer = Trainer(
    model=WithLoss(),
    args=TrainingArguments(
        output_dir="runs/trainer",
        learning_rate=3e-3,
        per_device_train_batch_size=32,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        eval_strategy="epoch",
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=in_order(Pieces(128)),
    eval_dataset=Pieces(32, held_out=True),
    compute_metrics=accuracy,
)
trainer.train()
trainer.save_state()
trainer.save_model()
