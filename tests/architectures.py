"""A tiny configuration of every architecture in the table, and models with random weights from them.

Two layers (three where layers are of two kinds), width 32, four heads; weights are of a size as if trained: with std
0.02 so narrow a model says nothing. Decoders share keys among heads where their architecture can.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from cl_dist.models.architectures import ARCHITECTURES

WORDS, WIDTH, HEADS, MAX_LENGTH, PAD, WINDOW = 50, 32, 4, 64, 1, 6
_SIZES: Mapping[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": MAX_LENGTH,
    "pad_token_id": PAD,
}
_ENCODER: Mapping[str, Any] = {**_SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_DECODER: Mapping[str, Any] = {**_SIZES, "bos_token_id": None, "eos_token_id": None, "num_key_value_heads": 2}
_SLIDING: Mapping[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "distilbert": {
        "vocab_size": WORDS,
        "dim": WIDTH,
        "n_layers": 2,
        "n_heads": HEADS,
        "hidden_dim": 48,
        "max_position_embeddings": MAX_LENGTH,
        "pad_token_id": PAD,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "deberta-v2": {  # as DeBERTa-v3
        **_ENCODER,
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": 32,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "modernbert": {
        **{key: value for key, value in _SIZES.items() if key != "num_hidden_layers"},
        "num_hidden_layers": 3,
        "layer_types": _SLIDING["layer_types"],
        "local_attention": 2 * WINDOW,
        "bos_token_id": None,
        "eos_token_id": None,
        "cls_token_id": None,
        "sep_token_id": None,
    },
    "gpt2": {
        "vocab_size": WORDS,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": HEADS,
        "n_positions": MAX_LENGTH,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gpt_neox": {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"},
    "llama": _DECODER,
    "mistral": {**_DECODER, "sliding_window": WINDOW},
    "qwen2": {**_DECODER, **_SLIDING, "use_sliding_window": True},
    "qwen3": {**_DECODER, "head_dim": 12, "attention_bias": True},
    "gemma": {**_DECODER, "head_dim": 12},
    "gemma2": {**_DECODER, **_SLIDING, "head_dim": 12, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 10},
    "gemma3_text": {**_DECODER, **_SLIDING, "head_dim": 12, "query_pre_attn_scalar": 10},
    "phi": {**_DECODER, "partial_rotary_factor": 0.5},
    "phi3": {**_DECODER, "sliding_window": WINDOW, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "olmo": {**_DECODER, "clip_qkv": 3.0},
    "olmo2": _DECODER,
}
KINDS = tuple(ARCHITECTURES)
DECODERS = tuple(kind for kind, row in ARCHITECTURES.items() if row.is_causal)


IDS = torch.randint(5, WORDS, (1, 20), generator=torch.Generator().manual_seed(0))
"""A text of 20 tokens, longer than the windows."""


def hidden(model: Any, ids: Tensor = IDS) -> Tensor:
    """Return the last hidden states of a base model."""
    found: Tensor = model(ids).last_hidden_state
    return found


def tiny(kind: str, causal: bool = False, **over: Any) -> PreTrainedModel:
    """Return a model of an architecture with random weights, equal ones at each call, ready to be evaluated.

    causal: with its language modelling head.
    """
    config = AutoConfig.for_model(kind, **{**TINY[kind], **over})
    with torch.random.fork_rng():
        torch.manual_seed(7)
        maker: Any = AutoModelForCausalLM if causal else AutoModel
        model = maker.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
            else:  # biases and norms are not 0 and 1
                parameter.data += torch.randn(parameter.shape) * 0.2
    made: PreTrainedModel = model.eval()
    return made
