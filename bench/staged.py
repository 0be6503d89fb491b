"""The model of `pipeline`, whole and in two halves that a user would write by hand, and what its ranks compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.case import Case
from shardwise.models.cuts import profile_calls
from shardwise.models.gpt import GPT
from shardwise.models.losses import next_token_loss
from shardwise.plan.stages import chain, cut
from shardwise.spec.profile import ModelProfile

MICROBATCHES = 8


def whole(case: Case) -> GPT:
    """The case's GPT with an output layer of its own: by hand nobody ties weights over two ranks."""
    torch.manual_seed(case.seed)
    sizes = {"layers": case.layers, "width": case.width, "heads": case.heads}
    return GPT(**sizes, vocab=case.vocab, context=case.context, tied=False)


def first_blocks(case: Case, stages: int) -> list[int]:
    """How many blocks come before each later stage, as the planner cuts it: every system gets the same cut."""
    example = {"tokens": torch.zeros(1, case.context, dtype=torch.int64)}
    profile = ModelProfile(blocks=(), calls=profile_calls(lambda: whole(case), example))
    calls = chain(profile)
    firsts = cut(len(profile.calls), stages, lambda stage, first, last: calls.forward_flops(first, last))
    blocks = [f"blocks.{number}" for number in range(case.layers)]
    return [sum(one.name in blocks for one in profile.calls[:first]) for first in firsts[1:]]


class Begin(nn.Module):
    """Tokens -> hidden state: the embedding and the first blocks."""

    def __init__(self, model: GPT, blocks: int) -> None:
        super().__init__()
        self.embed, self.blocks = model.embed, nn.ModuleList(list(model.blocks)[:blocks])
        self.register_buffer("rope", model.rope)

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rope[:, : tokens.shape[1]])
        return x


class End(nn.Module):
    """Hidden state -> logits: the other blocks and the output layer."""

    def __init__(self, model: GPT, blocks: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = nn.ModuleList(list(model.blocks)[blocks:]), model.norm, model.head
        self.register_buffer("rope", model.rope)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.rope[:, : x.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean next-token loss of a microbatch."""
    total, weight = next_token_loss(logits, {"targets": targets})
    return total / weight
