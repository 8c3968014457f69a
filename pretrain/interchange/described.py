"""Our configurations as transformers' config.json, for the layouts that have one; without token ids."""

from collections.abc import Callable
from typing import Any

from pretrain.schema.clip import ClipConfig, TextTower, VisionTower
from pretrain.schema.encoders import BertConfig, ElectraConfig, EncoderConfig
from pretrain.schema.gpt import GptConfig


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
