"""The public layouts of BERT and ELECTRA, and transformers' config.json of each."""

from collections.abc import Mapping
from typing import Any

from pretrain.interchange.rules import HubConfig, PublicLayout, Rule, affine, copies
from pretrain.schema.encoders import BertConfig, ElectraConfig, EncoderConfig


def _post_norm_blocks(ours: str, theirs: str, layers: int) -> list[Rule]:
    """Return the rules of the encoder of transformers' BERT and ELECTRA."""
    rules = []
    for number in range(layers):
        mine, other = f"{ours}.blocks.{number}", f"{theirs}.layer.{number}"
        of_qkv = (f"{other}.attention.self.{x}" for x in ("query", "key", "value"))
        rules += affine(f"{mine}.attention.qkv", *of_qkv, form="stack")
        rules += affine(f"{mine}.attention.out", f"{other}.attention.output.dense")
        rules += affine(f"{mine}.norm1", f"{other}.attention.output.LayerNorm")
        rules += affine(f"{mine}.mlp.rise", f"{other}.intermediate.dense")
        rules += affine(f"{mine}.mlp.fall", f"{other}.output.dense")
        rules += affine(f"{mine}.norm2", f"{other}.output.LayerNorm")
    return rules


def _transformers_bert(config: BertConfig) -> list[Rule]:
    head = "cls.predictions"
    return [
        copies("embeddings.word.weight", "bert.embeddings.word_embeddings.weight", f"{head}.decoder.weight"),
        Rule("embeddings.position.weight", ("bert.embeddings.position_embeddings.weight",)),
        Rule("embeddings.segment.weight", ("bert.embeddings.token_type_embeddings.weight",)),
        *affine("embeddings.norm", "bert.embeddings.LayerNorm"),
        *_post_norm_blocks("encoder", "bert.encoder", config.layers),
        *affine("pooler", "bert.pooler.dense"),
        *affine("mlm.transform", f"{head}.transform.dense"),
        *affine("mlm.norm", f"{head}.transform.LayerNorm"),
        copies("mlm.bias", f"{head}.bias", f"{head}.decoder.bias"),
        *affine("nsp", "cls.seq_relationship"),
    ]


def _transformers_electra(config: ElectraConfig) -> list[Rule]:
    """Two models: `discriminator.` prefixes ElectraForPreTraining, `generator.` prefixes ElectraForMaskedLM."""
    judge, maker = "discriminator", "generator"
    shared = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight"}
    shared |= {"segment.weight": "token_type_embeddings.weight"}
    shared |= {"norm.weight": "LayerNorm.weight", "norm.bias": "LayerNorm.bias"}
    rules = []
    for ours, theirs in shared.items():
        names = [f"{tower}.electra.embeddings.{theirs}" for tower in (judge, maker)]
        tied = [f"{maker}.generator_lm_head.weight"] if ours == "word.weight" else []
        rules.append(copies(f"embeddings.{ours}", *names, *tied))
    for tower, width in ((judge, config.width), (maker, round(config.width * config.generator_fraction))):
        if width != config.embedding_width:
            rules += affine(f"{tower}.project", f"{tower}.electra.embeddings_project")
        rules += _post_norm_blocks(tower, f"{tower}.electra.encoder", config.layers)
    return [
        *rules,
        *affine("rtd.transform", f"{judge}.discriminator_predictions.dense"),
        *affine("rtd.out", f"{judge}.discriminator_predictions.dense_prediction"),
        *affine("mlm.transform", f"{maker}.generator_predictions.dense"),
        *affine("mlm.norm", f"{maker}.generator_predictions.LayerNorm"),
        Rule("mlm.bias", (f"{maker}.generator_lm_head.bias",)),
    ]


def _entries(config: EncoderConfig, architecture: str, width: int, heads: int) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "type_vocab_size": config.type_vocab,
        "num_hidden_layers": config.layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "tie_word_embeddings": True,
    }


def _bert_entries(config: BertConfig) -> dict[str, Any]:
    return {"": {"model_type": "bert", **_entries(config, "BertForPreTraining", config.width, config.heads)}}


def _electra_entries(config: ElectraConfig) -> dict[str, Any]:
    shared = {"model_type": "electra", "embedding_size": config.embedding_width}
    return {
        "discriminator": shared | _entries(config, "ElectraForPreTraining", config.width, config.heads),
        "generator": shared | _entries(config, "ElectraForMaskedLM", *config.generator_size),
    }


def _generator_fraction(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    sizes = trees["generator"]["hidden_size"], trees["discriminator"]["hidden_size"]
    positive = all(isinstance(size, int) and size > 0 for size in sizes)
    return {"generator_fraction": sizes[0] / sizes[1] if positive else None}


_FIELDS = {
    "vocab_size": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
    "width": "hidden_size", "heads": "num_attention_heads", "type_vocab": "type_vocab_size",
    "activation": "hidden_act", "norm_eps": "layer_norm_eps", "dropout": "hidden_dropout_prob",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "tie_word_embeddings": True,
}  # fmt: skip
_ELECTRA_DEFAULTS = {"embedding_size": 128, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
_BERT_HUB = HubConfig(_bert_entries, _FIELDS | {"embedding_width": "hidden_size"}, _DEFAULTS)
_ELECTRA_HUB = HubConfig(
    _electra_entries,
    _FIELDS | {"embedding_width": "embedding_size"},
    _DEFAULTS | _ELECTRA_DEFAULTS,
    ("discriminator", "generator"),
    _generator_fraction,
)


LAYOUTS: dict[str, PublicLayout] = {
    "transformers-bert": PublicLayout(
        "bert",
        _transformers_bert,
        ignored=("embeddings.position_ids",),
        derived={"embedding_width": lambda config: config.width},
        hub=_BERT_HUB,
    ),
    "transformers-electra": PublicLayout(
        "electra", _transformers_electra, ignored=("embeddings.position_ids",), hub=_ELECTRA_HUB
    ),
}
