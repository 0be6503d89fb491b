"""Our GPT as a Llama checkpoint of Hugging Face transformers: the same function, other names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from shardwise.errors import JobError
from shardwise.models.gpt import GPT


def to_llama(gpt: GPT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The `config.json` entries and the state of a `LlamaForCausalLM` that gives the same logits.

    The tensors are views of the GPT's own; `lm_head.weight` is left out when it is tied, as transformers saves it.
    Raises JobError for a GPT with LayerNorm or GELU, which Llama does not have.
    """
    config = gpt.config
    if config["norm"] != "rms" or config["activation"] != "swiglu":
        raise JobError(
            f"a GPT with norm='{config['norm']}' and activation='{config['activation']}' has no form in transformers: "
            "Llama needs norm='rms' and activation='swiglu'. Export it as safetensors instead."
        )
    return _llama_config(config, str(gpt.embed.weight.dtype).removeprefix("torch.")), _llama_state(gpt)


def _llama_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config["vocab"],
        "hidden_size": config["width"],
        "intermediate_size": config["mlp"],
        "num_hidden_layers": config["layers"],
        "num_attention_heads": config["heads"],
        "num_key_value_heads": config["kv_heads"],
        "head_dim": config["width"] // config["heads"],
        "max_position_embeddings": config["context"],
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config["rope_base"],  # transformers 4; version 5 reads the next entry
        "rope_parameters": {"rope_type": "default", "rope_theta": config["rope_base"]},
        "tie_word_embeddings": config["tied"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config["dropout"],
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    }


def _llama_state(gpt: GPT) -> dict[str, Tensor]:
    config = gpt.config
    head_width = config["width"] // config["heads"]
    rows = [config["heads"] * head_width, config["kv_heads"] * head_width, config["kv_heads"] * head_width]
    own = {name: tensor.detach() for name, tensor in gpt.state_dict().items()}
    state = {"model.embed_tokens.weight": own["embed.weight"], "model.norm.weight": own["norm.weight"]}
    if not config["tied"]:
        state["lm_head.weight"] = own["head.weight"]
    for layer in range(config["layers"]):
        ours, llamas = f"blocks.{layer}", f"model.layers.{layer}"
        q, k, v = own[f"{ours}.attention.qkv.weight"].split(rows)
        gate, up = own[f"{ours}.mlp.up.weight"].chunk(2)
        state |= {
            f"{llamas}.input_layernorm.weight": own[f"{ours}.attention_norm.weight"],
            f"{llamas}.self_attn.q_proj.weight": q,
            f"{llamas}.self_attn.k_proj.weight": k,
            f"{llamas}.self_attn.v_proj.weight": v,
            f"{llamas}.self_attn.o_proj.weight": own[f"{ours}.attention.out.weight"],
            f"{llamas}.post_attention_layernorm.weight": own[f"{ours}.mlp_norm.weight"],
            f"{llamas}.mlp.gate_proj.weight": gate,
            f"{llamas}.mlp.up_proj.weight": up,
            f"{llamas}.mlp.down_proj.weight": own[f"{ours}.mlp.down.weight"],
        }
    return state
