"""Table of supported architectures: the module paths of a transformer, one row per `model_type` of transformers.

Paths are relative to the base model (`layers`, `embeddings`) or to a layer (all others), so a row applies to the base
model and to the same model with a language modelling head.
Taken from the modelling code of transformers 5.23; tests/cl_dist/models/test_architectures.py tests every row.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from cl_dist.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SubBlock:
    """A sub-block of a transformer layer."""

    name: str
    output: str
    """Module whose output is added to the residual stream; a plugin wraps it. In decoders that normalise this output
    (Gemma 2 and 3, OLMo 2) it is that norm."""
    norm: str | None
    """Its norm: after the residual sum (BERT), before the sub-block (GPT-2), or on its output. Norms without weights
    are not replaced; None if another sub-block uses the same norm."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a layer, with H heads of size d, and G groups of heads that share keys and values."""

    projections: tuple[str, ...]
    """Query, key and value projections: three layers, or one joint layer."""
    output: str
    """The output projection of the concatenated heads: H d inputs."""
    layout: Literal["separate", "joined", "per_head"] = "separate"
    """Output order of a joint layer: joined is all queries, then all keys, then all values; per_head is the query, key
    and value of each head in turn."""
    norms: tuple[str, ...] = ()
    """Norms of queries and of keys, if the configuration has them. Norms with d weights are shared by all heads."""
    positions: Literal["absolute", "rotary", "relative"] = "rotary"
    """rotary rotates queries and keys by their position; relative adds position terms that also depend on them."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table."""

    layers: str
    sub_blocks: tuple[SubBlock, ...]
    attention: Attention
    embeddings: tuple[str, ...]
    """Modules between token ids and the first layer."""
    is_causal: bool = True
    """Whether a token attends to earlier tokens only."""

    @property
    def lora(self) -> tuple[str, ...]:
        """Default target modules of LoRA: the query and value projections of every attention."""
        ends = (self.attention.projections[0], self.attention.projections[-1])
        return tuple(dict.fromkeys(path.rpartition(".")[2] for path in ends))


def _post_norm(attention: Attention) -> Architecture:
    """Return the row of an encoder laid out as BERT."""
    return Architecture(
        layers="encoder.layer",
        sub_blocks=(
            SubBlock("attention", "attention.output.dropout", "attention.output.LayerNorm"),
            SubBlock("ffn", "output.dropout", "output.LayerNorm"),
        ),
        attention=attention,
        embeddings=("embeddings",),
        is_causal=False,
    )


def _pre_norm(
    attention: str = "self_attn.o_proj", ffn: str = "mlp.down_proj", joined: str | None = None, norms: bool = False
) -> Architecture:
    """Return the row of a decoder laid out as Llama; attention and ffn are the sub-blocks' output modules."""
    separate = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return Architecture(
        layers="layers",
        sub_blocks=(
            SubBlock("attention", attention, "input_layernorm"),
            SubBlock("ffn", ffn, "post_attention_layernorm"),
        ),
        attention=Attention(
            projections=separate if joined is None else (joined,),
            output="self_attn.o_proj",
            layout="separate" if joined is None else "joined",
            norms=("self_attn.q_norm", "self_attn.k_norm") if norms else (),
        ),
        embeddings=("embed_tokens",),
    )


def _normed_output(norms: bool) -> Architecture:
    """Return the row of a decoder that normalises the output of its sub-blocks: Gemma 2 and 3, OLMo 2.

    The output norm is the task-specific one.
    """
    sub_blocks = (("attention", "post_attention_layernorm"), ("ffn", "post_feedforward_layernorm"))
    return Architecture(
        layers="layers",
        sub_blocks=tuple(SubBlock(name, norm, norm) for name, norm in sub_blocks),
        attention=_pre_norm(norms=norms).attention,
        embeddings=("embed_tokens",),
    )


def _bert(query: str, key: str, value: str, positions: Literal["absolute", "relative"]) -> Architecture:
    names = (f"attention.self.{query}", f"attention.self.{key}", f"attention.self.{value}")
    return _post_norm(Attention(names, "attention.output.dense", positions=positions))


_GPT2 = Architecture(
    layers="h",
    sub_blocks=(SubBlock("attention", "attn.resid_dropout", "ln_1"), SubBlock("ffn", "mlp.dropout", "ln_2")),
    attention=Attention(("attn.c_attn",), "attn.c_proj", layout="joined", positions="absolute"),
    embeddings=("wte", "wpe"),
)
_GPT_NEOX = Architecture(
    layers="layers",
    sub_blocks=(
        SubBlock("attention", "post_attention_dropout", "input_layernorm"),
        SubBlock("ffn", "post_mlp_dropout", "post_attention_layernorm"),
    ),
    attention=Attention(("attention.query_key_value",), "attention.dense", layout="per_head"),
    embeddings=("embed_in",),
)
_PHI = Architecture(  # both sub-blocks share a norm and a dropout; plugins come before the dropout
    layers="layers",
    sub_blocks=(
        SubBlock("attention", "self_attn.dense", "input_layernorm"),
        SubBlock("ffn", "mlp.fc2", None),
    ),
    attention=Attention(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.dense",
        norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    ),
    embeddings=("embed_tokens",),
)
_DISTILBERT = Architecture(
    layers="transformer.layer",
    sub_blocks=(
        SubBlock("attention", "attention.out_lin", "sa_layer_norm"),
        SubBlock("ffn", "ffn.dropout", "output_layer_norm"),
    ),
    attention=Attention(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", positions="absolute"
    ),
    embeddings=("embeddings",),
    is_causal=False,
)
_MODERNBERT = Architecture(  # the first layer's attention has no norm of its own
    layers="layers",
    sub_blocks=(SubBlock("attention", "attn.out_drop", "attn_norm"), SubBlock("ffn", "mlp.Wo", "mlp_norm")),
    attention=Attention(("attn.Wqkv",), "attn.Wo", layout="joined"),
    embeddings=("embeddings",),
    is_causal=False,
)
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _bert("query", "key", "value", "absolute"),
    "roberta": _bert("query", "key", "value", "absolute"),
    "distilbert": _DISTILBERT,
    "deberta-v2": _bert("query_proj", "key_proj", "value_proj", "relative"),
    "modernbert": _MODERNBERT,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _pre_norm(),
    "mistral": _pre_norm(),
    "qwen2": _pre_norm(),
    "qwen3": _pre_norm(norms=True),
    "gemma": _pre_norm(),
    "gemma2": _normed_output(norms=False),
    "gemma3_text": _normed_output(norms=True),
    "phi": _PHI,
    "phi3": _pre_norm("resid_attn_dropout", "resid_mlp_dropout", joined="self_attn.qkv_proj"),
    "olmo": _pre_norm(),
    "olmo2": _normed_output(norms=True),
}
"""To support an architecture, add its row here, and a tiny configuration to tests/architectures.py."""


def architecture(model: PreTrainedModel) -> Architecture:
    """Return the table row of a model.

    Raises:
        ConfigError: If its architecture is not supported.
    """
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"model_type={kind!r}: expected one of {', '.join(ARCHITECTURES)}; to support it, add its row to "
            "ARCHITECTURES in cl_dist/models/architectures.py and a tiny configuration to tests/architectures.py"
        )
    return ARCHITECTURES[kind]


def path_in(model: PreTrainedModel, path: str) -> str:
    """Convert a path in the base model to a path in the model."""
    return path if model.base_model is model else f"{model.base_model_prefix}.{path}"


def layers_of(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Return the layers with their paths in the model, from the first to the last."""
    path = path_in(model, architecture(model).layers)
    return [(f"{path}.{name}", layer) for name, layer in model.get_submodule(path).named_children()]


def embedding_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of the parameters between token ids and the first layer, and of the language modelling head."""
    untyped: Any = model
    head = untyped.get_output_embeddings()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    inside = tuple(f"{path_in(model, path)}." for path in architecture(model).embeddings)
    return frozenset(name for name, p in model.named_parameters() if name.startswith(inside) or id(p) in of_head)
