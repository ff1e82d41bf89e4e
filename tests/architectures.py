"""Tiny models with random weights, of the architectures that transformers has for causal language models."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 336
# The sizes by the name of the config key; each config has some of them.
SIZES = {
    VOCABULARY: "vocab_size",
    512: "max_position_embeddings n_positions n_ctx seq_length max_sequence_length max_seq_len",
    64: "mamba_d_ssm",
    48: "intermediate_size intermediate_size_mlp ffn_dim d_ff n_inner ffn_hidden_size block_ff_dim",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim lru_width",
    16: (
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "q_lora_rank kv_lora_rank index_head_dim mamba_d_head mamba_head_dim mamba_headdim sliding_window "
        "attention_window_size window_size attention_chunk_size local_attention sliding_window_size "
        "index_topk keep_window_size chunk_size mamba_chunk_size"
    ),
    8: (
        "head_dim attention_head_size qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim mamba_d_state state_size"
    ),
    4: (
        "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads "
        "attention_heads decoder_attention_heads num_experts num_local_experts n_routed_experts "
        "moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads rotary_dim time_step_rank"
    ),
    2: (
        "decoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k "
        "linear_num_key_heads index_n_heads n_mamba_heads num_experts_per_token"
    ),
    1: (
        "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups n_groups mamba_ngroups num_mem_blocks"
    ),
}
LARGEST = 6_000_000  # parameters; an architecture whose config has other keys for its sizes is left out
CHANGES = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "modernbert-decoder": {"bos_token_id": 0},
    "nemotron": {"num_key_value_heads": 2},
    "zamba2": {"layer_types": None},
}


def kinds() -> list[str]:
    """The model types of all architectures for causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_architecture(kind: str, **changes: object) -> PreTrainedConfig:
    """The config of a tiny model of this type, with these keys changed."""
    default = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    keys = default.to_dict()
    settings = {name: size for size, names in SIZES.items() for name in names.split() if keys.get(name) is not None}
    if "head_dim" in keys:
        settings["head_dim"] = 8
    if "kv_lora_rank" in keys and "num_key_value_heads" in keys:  # multi-head latent attention
        settings["num_key_value_heads"] = 4
    if keys.get("layer_types"):
        different = list(dict.fromkeys(keys["layer_types"]))
        settings["layer_types"] = (different * 4)[:4]
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return type(default)(**settings | ends | CHANGES.get(kind, {}) | changes)


def random_model(kind: str, attn_implementation: str | None = None, **changes: object) -> PreTrainedModel:
    """A tiny model with random weights. Raises ValueError if it would not be tiny, or what transformers raises."""
    config = tiny_architecture(kind, **changes)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval().float()
