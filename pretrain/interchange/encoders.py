"""The public layouts of BERT and ELECTRA."""

from pretrain.interchange.rules import PublicLayout, Rule, affine, copies
from pretrain.schema.encoders import BertConfig, ElectraConfig


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


LAYOUTS: dict[str, PublicLayout] = {
    "transformers-bert": PublicLayout(
        "bert",
        _transformers_bert,
        ignored=("embeddings.position_ids",),
        derived={"embedding_width": lambda config: config.width},
    ),
    "transformers-electra": PublicLayout("electra", _transformers_electra, ignored=("embeddings.position_ids",)),
}
