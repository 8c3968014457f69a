"""The public layout of ViT classifiers, and transformers' config.json of it."""

from collections.abc import Mapping
from typing import Any

from pretrain.interchange.rules import HubConfig, PublicLayout, Rule, State, affine
from pretrain.schema.vit import VitConfig

EMBEDDINGS = "vit.embeddings"


def _transformers_vit(config: VitConfig) -> list[Rule]:
    rules = [
        *affine("patch", f"{EMBEDDINGS}.patch_embeddings.projection"),
        Rule("class_token", (f"{EMBEDDINGS}.cls_token",)),
        Rule("positions", (f"{EMBEDDINGS}.position_embeddings",)),
        *affine("norm", "vit.layernorm"),
        *affine("head", "classifier"),
    ]
    for number in range(config.layers):
        ours, theirs = f"blocks.{number}", f"vit.encoder.layer.{number}"
        attention = (f"{theirs}.attention.attention.{part}" for part in ("query", "key", "value"))
        rules += [
            *affine(f"{ours}.norm1", f"{theirs}.layernorm_before"),
            *affine(f"{ours}.attention.qkv", *attention, form="stack"),
            *affine(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
            *affine(f"{ours}.norm2", f"{theirs}.layernorm_after"),
            *affine(f"{ours}.mlp.rise", f"{theirs}.intermediate.dense"),
            *affine(f"{ours}.mlp.fall", f"{theirs}.output.dense"),
        ]
    return rules


NAMES_OF_5 = {
    "vit.layers.": "vit.encoder.layer.",
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
"""Names in the memory of transformers 5, which writes the published ones into its files."""


def _published(name: str) -> str:
    for new, old in NAMES_OF_5.items():
        name = name.replace(new, old)
    return name


def _without_batch(config: VitConfig, state: State) -> State:
    """Drop the batch dimension of the class token and the positions, and the pooler, which no classifier uses."""
    state = {_published(name): tensor for name, tensor in state.items() if not name.startswith("vit.pooler.")}
    for name, shape in (("cls_token", (-1,)), ("position_embeddings", (-1, config.width))):
        if f"{EMBEDDINGS}.{name}" in state:
            state[f"{EMBEDDINGS}.{name}"] = state[f"{EMBEDDINGS}.{name}"].reshape(shape)
    return state


def _with_batch(config: VitConfig, state: State) -> State:
    """Invert `_without_batch`."""
    for name in ("cls_token", "position_embeddings"):
        state[f"{EMBEDDINGS}.{name}"] = state[f"{EMBEDDINGS}.{name}"].reshape(1, -1, config.width)
    return state


def _entries(config: VitConfig) -> dict[str, Any]:
    names = {number: f"LABEL_{number}" for number in range(config.classes)}
    return {
        "": {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification"],
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": 3,
            "hidden_size": config.width,
            "intermediate_size": 4 * config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "hidden_act": config.activation,
            "layer_norm_eps": config.norm_eps,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "qkv_bias": True,
            "id2label": {str(number): name for number, name in names.items()},
            "label2id": {name: number for number, name in names.items()},
        }
    }


def _classes(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the number of labels, which transformers stores as their names; without any it means two."""
    tree = trees[""]
    names = tree.get("id2label")
    return {"classes": len(names) if isinstance(names, Mapping) else tree.get("num_labels", 2)}


_FIELDS = {
    "image_size": "image_size", "patch_size": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "activation": "hidden_act", "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
}  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "image_size": 224, "patch_size": 16, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "qkv_bias": True,
}  # fmt: skip
LAYOUTS: dict[str, PublicLayout] = {
    "transformers-vit": PublicLayout(
        "vit",
        _transformers_vit,
        unpack=_without_batch,
        pack=_with_batch,
        hub=HubConfig(
            _entries,
            _FIELDS,
            _DEFAULTS,
            further=_classes,
            no_effect=frozenset({"num_labels", "encoder_stride", "pooler_act", "pooler_output_size"}),
        ),
    ),
}
