"""Small models of many architectures, with random weights and without dropout, and a batch for each. float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
TEXT = SIZES | {"max_position_embeddings": 64, "intermediate_size": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE |= {"image_size": 32, "patch_size": 8}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Class of transformers, its configuration's class, and what that is told.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100} | ENDS),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT),
    "opt": ("OPTForCausalLM", "OPTConfig", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100}),
    "bert": ("BertForMaskedLM", "BertConfig", TEXT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "vocab_size": 100},
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", TEXT | {"embedding_size": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", IMAGE),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 2, 1, 1]},
    ),
    "mamba": ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4} | ENDS),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 32, "vocab_size": 100}
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1}
        | ENDS,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT | ENDS, "vision_config": IMAGE, "projection_dim": 16},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "experts_implementation": "eager"},  # the grouped product has no float64
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED | {"head_dim": 8} | ENDS),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT | ENDS),
    "falcon": ("FalconForCausalLM", "FalconConfig", SIZES | ENDS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 8} | ENDS),
    "roformer": ("RoFormerForMaskedLM", "RoFormerConfig", TEXT | {"embedding_size": 16}),
    "deberta": (
        "DebertaForMaskedLM",
        "DebertaConfig",
        TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    ),
    "convbert": ("ConvBertForMaskedLM", "ConvBertConfig", TEXT | {"embedding_size": 32, "head_ratio": 2}),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64, "vocab_size": 100},
    ),
    "funnel": (
        "FunnelForMaskedLM",
        "FunnelConfig",
        {"block_sizes": [1, 1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "vocab_size": 100},
    ),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2}
        | {"chunk_size": 4, "vocab_size": 100}
        | ENDS,
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [2, 2], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
        | {"patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
        | {"decoder_hidden_size": 16, "drop_path_rate": 0.0},
    ),
    "ctrl": ("CTRLLMHeadModel", "CTRLConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 64, "vocab_size": 100}),
}


def _layer(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class UNet(nn.Module):
    """Outputs of its first layers are used by its last."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deeper, self.middle = _layer(3, 8), _layer(8, 16), _layer(16, 32)
        self.up, self.top, self.out = _layer(48, 16), _layer(24, 8), nn.Conv2d(8, 1, 1)
        self.pool, self.wide = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, pixel_values: Tensor) -> Tensor:
        first = self.down(pixel_values)
        second = self.deeper(self.pool(first))
        x = self.wide(self.middle(self.pool(second)))
        x = self.up(torch.cat([x, second], 1))
        return self.out(self.top(torch.cat([self.wide(x), first], 1)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm = nn.Embedding(100, 16), nn.LSTM(16, 16, 2, batch_first=True)
        self.head = nn.Linear(16, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(input_ids))[0])


class Translator(nn.Module):
    """torch's own transformer, with embeddings that are used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 16)
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        target = input_ids[:, :5]
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=self.head.weight.dtype)
        return self.head(self.transformer(self.words(input_ids), self.words(target), tgt_mask=mask))


class Mixer(nn.Module):
    """Two lists of layers that take turns, and sums outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.along = nn.ModuleList(self._mlp(16) for _ in range(3))
        self.across = nn.ModuleList(self._mlp(16) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def _mlp(self, width: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for along, across in zip(self.along, self.across, strict=True):
            x = x + along(x)
            x = x + across(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x.mean(1))


class Tied(nn.Module):
    """The embedding is the head too, and every block sees it again, weighed by parameters of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 16)
        self.weights = nn.Parameter(torch.ones(4))
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        first = x = self.words(input_ids)
        for weight, block in zip(self.weights, self.blocks, strict=True):
            x = torch.tanh(block(x)) + weight * first
        return {"logits": self.head(x)}


class Frozen(Tied):
    """Its embedding, which is its head too, is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.words.requires_grad_(False)
        self.weights.requires_grad_(False)


class Halves(nn.Module):
    """Its first layer returns two views of one tensor, of which the last layer sees the first again."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fork = nn.Embedding(100, 16), Fork()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        first, x = self.fork(self.words(input_ids))
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x * first)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.both(x).chunk(2, -1)


class InPlace(nn.Module):
    """It writes into what its parts return: into the embedding, and into what a block gives."""

    def __init__(self, *, trained: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 16).requires_grad_(trained)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)) for _ in range(4))
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(16, 100)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        x *= 4
        for block in self.blocks:
            x += block(x.clone())
        y = self.blocks[0](x)
        return self.head(self.act(y) + x)


class Spelled(nn.Module):
    """One block of attention and an MLP, whose weights are its own and have a dim for the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Parameter(torch.randn(16, 4, 4) / 4) for _ in range(3))
        self.out = nn.Parameter(torch.randn(4, 4, 16) / 4)
        self.up, self.down = nn.Parameter(torch.randn(16, 32) / 4), nn.Parameter(torch.randn(32, 16) / 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bte,ehd->bthd", x, one) for one in (self.query, self.key, self.value))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        x = x + torch.einsum("bqhd,hde->bqe", torch.einsum("bhqk,bkhd->bqhd", scores, v), self.out)
        return x + (x @ self.up).relu() @ self.down


class Spellings(nn.Module):
    """Blocks in a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(100, 16), nn.Linear(16, 100)
        self.stages = nn.ModuleList(nn.ModuleList(Spelled() for _ in range(2)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                x = block(x)
        return self.head(x)


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "lstm": Recurrent,
    "transformer": Translator,
    "mixer": Mixer,
    "tied": Tied,
    "frozen": Frozen,
    "halves": Halves,
    "spellings": Spellings,
    "inplace": InPlace,
    "inplace_frozen": lambda: InPlace(trained=False),
}
NAMES = (*PUBLISHED, *PLAIN)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in PLAIN:
        module = PLAIN[name]()
    else:
        import transformers

        kind, configuration, told = PUBLISHED[name]
        module = getattr(transformers, kind)(getattr(transformers, configuration)(**told))
    for part in module.modules():
        for chance in ("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(getattr(part, chance, None), float):
                setattr(part, chance, 0.0)
    return module.double().train()


def batch(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 100, (2, 12), generator=generator)
    image = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    if name in ("vit", "resnet", "swin", "segformer", "unet", "mixer"):
        return {"pixel_values": image}
    if name == "t5":
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :7]}
    if name == "whisper":
        sound = torch.randn(2, 8, 32, generator=generator, dtype=torch.float64)
        return {"input_features": sound, "decoder_input_ids": tokens[:, :7]}
    if name == "clip":
        return {"input_ids": tokens, "pixel_values": image}
    if name in (*PLAIN, "xlnet"):
        return {"input_ids": tokens}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def loss(output: Any, _: Any) -> tuple[Tensor, Tensor]:
    """Whatever the model is for: the mean square of what it computes."""
    if not isinstance(output, Tensor):
        keys = ("logits", "last_hidden_state", "logits_per_image")
        output = next(output[key] for key in keys if key in output)
    return output.square().sum(), output.new_tensor(output.numel())
