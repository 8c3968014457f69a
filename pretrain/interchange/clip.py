"""The public layouts of CLIP, and transformers' config.json of it."""

from collections.abc import Callable
from typing import Any

from pretrain.interchange.rules import HubConfig, PublicLayout, Rule, affine
from pretrain.schema.clip import ClipConfig, TextTower, VisionTower


def _pre_norm_block(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a block of transformers' CLIP."""
    attention = f"{theirs}.self_attn"
    return [
        *affine(f"{ours}.norm1", f"{theirs}.layer_norm1"),
        *affine(f"{ours}.attention.qkv", *(f"{attention}.{x}_proj" for x in "qkv"), form="stack"),
        *affine(f"{ours}.attention.out", f"{attention}.out_proj"),
        *affine(f"{ours}.norm2", f"{theirs}.layer_norm2"),
        *affine(f"{ours}.mlp.rise", f"{theirs}.mlp.fc1"),
        *affine(f"{ours}.mlp.fall", f"{theirs}.mlp.fc2"),
    ]


def _openai_block(ours: str, theirs: str) -> list[Rule]:
    """Return the rules of a `resblocks` block of OpenAI's CLIP, whose attention is a torch MultiheadAttention."""
    return [
        *affine(f"{ours}.norm1", f"{theirs}.ln_1"),
        Rule(f"{ours}.attention.qkv.weight", (f"{theirs}.attn.in_proj_weight",)),
        Rule(f"{ours}.attention.qkv.bias", (f"{theirs}.attn.in_proj_bias",)),
        *affine(f"{ours}.attention.out", f"{theirs}.attn.out_proj"),
        *affine(f"{ours}.norm2", f"{theirs}.ln_2"),
        *affine(f"{ours}.mlp.rise", f"{theirs}.mlp.c_fc"),
        *affine(f"{ours}.mlp.fall", f"{theirs}.mlp.c_proj"),
    ]


def _transformers_clip(config: ClipConfig) -> list[Rule]:
    rules = [
        Rule("logit_scale", ("logit_scale",), "scalar"),
        Rule("vision.patch.weight", ("vision_model.embeddings.patch_embedding.weight",)),
        Rule("vision.class_token", ("vision_model.embeddings.class_embedding",)),
        Rule("vision.positions", ("vision_model.embeddings.position_embedding.weight",)),
        *affine("vision.norm_pre", "vision_model.pre_layrnorm"),
        *affine("vision.norm_post", "vision_model.post_layernorm"),
        Rule("vision.project.weight", ("visual_projection.weight",)),
        Rule("text.word.weight", ("text_model.embeddings.token_embedding.weight",)),
        Rule("text.positions", ("text_model.embeddings.position_embedding.weight",)),
        *affine("text.norm", "text_model.final_layer_norm"),
        Rule("text.project.weight", ("text_projection.weight",)),
    ]
    for tower, layers in (("vision", config.vision.layers), ("text", config.text.layers)):
        for number in range(layers):
            rules += _pre_norm_block(f"{tower}.blocks.{number}", f"{tower}_model.encoder.layers.{number}")
    return rules


def _openai_clip(config: ClipConfig) -> list[Rule]:
    rules = [
        Rule("logit_scale", ("logit_scale",), "scalar"),
        Rule("vision.patch.weight", ("visual.conv1.weight",)),
        Rule("vision.class_token", ("visual.class_embedding",)),
        Rule("vision.positions", ("visual.positional_embedding",)),
        *affine("vision.norm_pre", "visual.ln_pre"),
        *affine("vision.norm_post", "visual.ln_post"),
        Rule("vision.project.weight", ("visual.proj",), "transpose"),
        Rule("text.word.weight", ("token_embedding.weight",)),
        Rule("text.positions", ("positional_embedding",)),
        *affine("text.norm", "ln_final"),
        Rule("text.project.weight", ("text_projection",), "transpose"),
    ]
    if config.logit_bias is not None:  # open_clip's name of it
        rules.append(Rule("logit_bias", ("logit_bias",), "scalar"))
    for ours, theirs, layers in (("vision", "visual.", config.vision.layers), ("text", "", config.text.layers)):
        for number in range(layers):
            rules += _openai_block(f"{ours}.blocks.{number}", f"{theirs}transformer.resblocks.{number}")
    return rules


def _heads_of_64(tower: str) -> Callable[[ClipConfig], int | float]:
    """Return the number of heads that OpenAI's code gives a tower: its width / 64, a float if that is no integer."""

    def heads(config: ClipConfig) -> int | float:
        width: int = getattr(config, tower).width
        return width / 64 if width % 64 else width // 64

    return heads


def _tower(tower: VisionTower | TextTower, config: ClipConfig) -> dict[str, Any]:
    sizes = {"hidden_size": tower.width, "intermediate_size": 4 * tower.width, "projection_dim": config.embed_dim}
    sizes |= {"num_hidden_layers": tower.layers, "num_attention_heads": tower.heads}
    return sizes | {"hidden_act": config.activation, "layer_norm_eps": config.norm_eps}


def _clip_entries(config: ClipConfig) -> dict[str, Any]:
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


_TOWER = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
_VISION = _TOWER | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT = _TOWER | {"vocab_size": "vocab_size", "context": "max_position_embeddings"}
_TOWER_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "attention_dropout": 0.0,
}  # fmt: skip
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224}
_TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408}
_CLIP_HUB = HubConfig(
    _clip_entries,
    {
        **{f"vision.{ours}": f"vision_config.{theirs}" for ours, theirs in _VISION.items()},
        **{f"text.{ours}": f"text_config.{theirs}" for ours, theirs in _TEXT.items()},
        "embed_dim": "projection_dim",
        "activation": "text_config.hidden_act",
        "norm_eps": "text_config.layer_norm_eps",
    },
    {
        "vision_config": _TOWER_DEFAULTS | _VISION_DEFAULTS | {"patch_size": 32},
        "text_config": _TOWER_DEFAULTS | _TEXT_DEFAULTS | {"max_position_embeddings": 77},
        "projection_dim": 512,
    },
)

# open_clip uses the same names as OpenAI, whose files also contain three numbers
LAYOUTS: dict[str, PublicLayout] = {
    "transformers-clip": PublicLayout(
        "clip",
        _transformers_clip,
        ignored=("embeddings.position_ids",),
        fixed={"logit_bias": None},
        hub=_CLIP_HUB,
    ),
    "openai-clip": PublicLayout(
        "clip",
        _openai_clip,
        ignored=("input_resolution", "context_length", "vocab_size"),
        fixed={"norm_eps": 1e-5},
        derived={f"{tower}.heads": _heads_of_64(tower) for tower in ("vision", "text")},
    ),
}
