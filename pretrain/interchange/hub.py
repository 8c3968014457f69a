"""Folders that `from_pretrained` of transformers reads: config.json beside model.safetensors."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.outputs import new_folder
from data_pipeline.vocabulary import Vocabulary
from pretrain.config import BertConfig, ClipConfig, ElectraConfig, EncoderConfig, GptConfig, TextTower, VisionTower
from pretrain.interchange.folder import CONFIG_FILE, save_weights
from pretrain.interchange.layouts import State, export_state

TOKEN_IDS_FILE = "token_ids.json"


def export_layout(directory: str | Path, layout: str, config: Any, state: State) -> Path:
    """Our state dict in a public layout -> the new folder; a folder in it for each model where there are several.

    Layouts of transformers get their config.json, OpenAI's a list of the ids that changed places. Raises DataError
    naming the keys that differ.
    """
    weights = export_state(layout, config, state)
    describe = CONFIGS.get(layout)
    with new_folder(directory) as folder:
        if layout == "openai-clip":
            _put_end_of_text_last(folder, config, weights)
        for part, tree in (describe(config) if describe else {"": None}).items():
            (folder / part).mkdir(exist_ok=True)
            prefix = f"{part}." if part else ""
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            save_weights(folder / part, own)
            if tree is not None:
                (folder / part / CONFIG_FILE).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return Path(directory)


def _put_end_of_text_last(folder: Path, config: ClipConfig, weights: State) -> None:
    """Exchange the rows of [SEP] and of the last id, and say so: OpenAI's text tower pools at the largest id."""
    end, last = Vocabulary.sep, config.text.vocab_size - 1
    rows = weights["token_embedding.weight"]
    rows[[end, last]] = rows[[last, end]]
    told = {"end_of_text": last, "exchanged_ids": [end, last]}
    (folder / TOKEN_IDS_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")
    print(
        f"openai-clip pools its text at the largest id: the end of text is {last} there, not {end}; exchange these two "
        f"ids in what the vocabulary gives ({TOKEN_IDS_FILE} says it too)",
        file=sys.stderr,
    )


def _text(config: EncoderConfig, architecture: str, width: int, heads: int) -> dict[str, Any]:
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
        "pad_token_id": Vocabulary.pad,
        "tie_word_embeddings": True,
    }


def _bert(config: BertConfig) -> dict[str, Any]:
    return {"": {"model_type": "bert", **_text(config, "BertForPreTraining", config.width, config.heads)}}


def _electra(config: ElectraConfig) -> dict[str, Any]:
    shared = {"model_type": "electra", "embedding_size": config.embedding_width}
    return {
        "discriminator": shared | _text(config, "ElectraForPreTraining", config.width, config.heads),
        "generator": shared | _text(config, "ElectraForMaskedLM", *config.generator_size),
    }


def _tower(tower: VisionTower | TextTower, config: ClipConfig) -> dict[str, Any]:
    sizes = {"hidden_size": tower.width, "intermediate_size": 4 * tower.width, "projection_dim": config.embed_dim}
    sizes |= {"num_hidden_layers": tower.layers, "num_attention_heads": tower.heads}
    return sizes | {"hidden_act": config.activation, "layer_norm_eps": config.norm_eps}


def _clip(config: ClipConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    pictures = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    words = {"vocab_size": text.vocab_size, "max_position_embeddings": text.context}
    words |= {"pad_token_id": Vocabulary.pad, "bos_token_id": Vocabulary.cls, "eos_token_id": Vocabulary.sep}
    return {
        "": {
            "model_type": "clip",
            "architectures": ["CLIPModel"],
            "projection_dim": config.embed_dim,
            "vision_config": pictures | _tower(vision, config),
            "text_config": words | _tower(text, config),
        }
    }


def _gpt2(config: GptConfig) -> dict[str, Any]:
    return {
        "": {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.image_vocab + config.text_vocab,
            "n_positions": config.text_tokens + config.image_tokens,
            "n_embd": config.width,
            "n_layer": config.layers,
            "n_head": config.heads,
            "activation_function": config.activation,
            "layer_norm_epsilon": config.norm_eps,
            **{name: config.dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    }


CONFIGS: dict[str, Callable[[Any], dict[str, dict[str, Any]]]] = {
    "transformers-bert": _bert,
    "transformers-electra": _electra,
    "transformers-clip": _clip,
    "transformers-gpt2": _gpt2,
}
