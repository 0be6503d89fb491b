"""Hugging Face's Trainer: a small classifier, three epochs, evaluated after each."""

import torch.nn.functional as F
from task import Classifier, Pieces, in_order
from transformers import Trainer, TrainingArguments, set_seed


def loss(output, labels, num_items_in_batch=None):
    return F.cross_entropy(output, labels)


def accuracy(predicted):
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean()}


set_seed(0)
trainer = Trainer(
    model=Classifier(),
    args=TrainingArguments(
        output_dir="runs/trainer",
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=16,
        logging_steps=1,
        report_to="none",
    ),
    train_dataset=in_order(Pieces(128), epochs=3),
    eval_dataset=Pieces(32, held_out=True),
    compute_loss_func=loss,
    compute_metrics=accuracy,
)
trainer.train()
trainer.save_state()
trainer.save_model()
