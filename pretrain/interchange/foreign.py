"""Folders of transformers -> our configuration and weights. Settings that our models lack are refused by name.

A foreign config.json is read twice. First its fields become our configuration; then every entry that has an effect must
equal what our configuration would write (`HubConfig.write`). So unknown entries are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import flatten
from pretrain.interchange.folder import CONFIG_FILE, WEIGHTS_FILE
from pretrain.interchange.layouts import LAYOUTS, State, import_state
from pretrain.interchange.rules import HubConfig
from pretrain.models import MODELS
from pretrain.schema import ModelConfig

NEUTRAL: dict[str, Any] = {
    "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None, "position_embedding_type": "absolute", "attention_dropout": 0.0,
    "num_channels": 3, "dropout": 0.0,
}  # fmt: skip
"""Entries that can change the computation, with the value at which they do not."""
NO_EFFECT = frozenset({
    "architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "initializer_range",
    "initializer_factor", "logit_scale_init_value", "use_cache", "return_dict", "output_hidden_states",
    "output_attentions", "output_scores", "id2label", "label2id", "problem_type", "classifier_dropout",
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "gradient_checkpointing", "directionality",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "chunk_size_feed_forward", "task_specific_params", "finetuning_task", "tokenizer_class", "prefix",
    "torchscript", "tf_legacy_loss", "use_bfloat16", "summary_type", "summary_use_proj", "summary_activation",
    "summary_last_dropout", "attn_implementation", "_attn_implementation",
})  # fmt: skip
"""Entries about initialisation, outputs, other heads, or token ids, which belong to the tokenizer."""
GENERATION = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Generation settings, which older versions of transformers wrote into every file."""
NESTED_NO_EFFECT = ("model_type", "projection_dim")
"""Entries of a CLIP's towers that the enclosing config.json has too."""
SAME = {"gelu_pytorch_tanh": "gelu_new", "gelu_python": "gelu"}
"""Aliases of activations."""


def read_layout(directory: str | Path, layout: str) -> tuple[ModelConfig, State]:
    """Read a folder written by `save_pretrained` (for ELECTRA, one with `discriminator` and `generator`) -> ours.

    Raises ConfigError for a layout without a config.json of its own, DataError naming what does not fit.
    """
    hub = LAYOUTS[layout].hub if layout in LAYOUTS else None
    if hub is None or not hub.fields:
        raise ConfigError(f"--format {layout} cannot be imported; use {', '.join(importable())}")
    trees = {part: _tree(Path(directory, part, CONFIG_FILE), hub) for part in hub.parts}
    config = _config(trees, hub, LAYOUTS[layout].kind, Path(directory))
    for part, wanted in hub.write(config).items():
        _check(Path(directory, part, CONFIG_FILE), trees[part], wanted, NO_EFFECT | GENERATION | hub.no_effect)
    weights: State = {}
    for part in hub.parts:
        prefix = f"{part}." if part else ""
        weights |= {prefix + name: tensor for name, tensor in _weights(Path(directory, part, WEIGHTS_FILE)).items()}
    state = import_state(layout, config, weights)
    _check_shapes(directory, config, state)
    return config, state


def importable() -> list[str]:
    """Return the layouts whose config.json determines our configuration."""
    return sorted(name for name, layout in LAYOUTS.items() if layout.hub and layout.hub.fields)


def _tree(path: Path, hub: HubConfig) -> dict[str, Any]:
    """Read config.json; fill missing entries with transformers' defaults, and replace aliases of activations."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for name in ("text_config", "vision_config"):  # older files define a tower twice; the second definition wins
            if tree.get(f"{name}_dict"):
                tree[name] = tree.get(name, {}) | tree[f"{name}_dict"]
            tree.pop(f"{name}_dict", None)
        return _filled(tree, hub.defaults)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); use a folder that save_pretrained wrote") from None
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a transformers configuration ({error})") from None


def _filled(tree: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(defaults) | dict(tree)
    for key, value in defaults.items():
        if isinstance(value, Mapping):
            filled[key] = _filled(tree.get(key, {}), value)
    return {key: SAME.get(value, value) if key == "hidden_act" else value for key, value in filled.items()}


def _config(trees: Mapping[str, Mapping[str, Any]], hub: HubConfig, kind: str, directory: Path) -> ModelConfig:
    part, tree = next(iter(trees.items()))
    theirs = flatten(tree)
    ours: dict[str, Any] = {"kind": kind}
    for field, entry in hub.fields.items():
        section, _, name = field.rpartition(".")
        (ours.setdefault(section, {}) if section else ours)[name] = theirs.get(entry)
    ours |= hub.further(trees)
    try:
        config: ModelConfig = pydantic.TypeAdapter(ModelConfig).validate_python(ours)
        return config
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        entry = hub.fields.get(field, field)
        where = directory / part / CONFIG_FILE
        raise DataError(
            f"{where}: {entry}={theirs.get(entry)!r}: our model does not have that ({first['msg']})"
        ) from None


def _check(path: Path, tree: Mapping[str, Any], wanted: Mapping[str, Any], no_effect: frozenset[str]) -> None:
    """Raise DataError naming every entry with an effect that our model does not support."""
    expected = flatten(wanted)
    faults = []
    for key, value in flatten(tree).items():
        name = key.rpartition(".")[2]
        if any(part in no_effect for part in key.split(".")) or ("." in key and name in NESTED_NO_EFFECT):
            continue
        if key in expected or name in NEUTRAL:
            should = expected.get(key, NEUTRAL.get(name))
            faults += [f"{key}={value!r}, ours has {should!r}"] if value != should else []
        elif not (value is None or (name == "tie_word_embeddings" and "vision_config" in tree)):
            faults.append(f"{key}={value!r}is not supported")
    if faults:
        raise DataError(f"{path} describes a model that tessera does not support:\n  " + "\n  ".join(faults))


def _weights(path: Path) -> State:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the model with safetensors") from None


def _check_shapes(directory: str | Path, config: ModelConfig, state: State) -> None:
    with torch.device("meta"):
        ours = MODELS[config.kind](config).state_dict()
    for name, tensor in ours.items():
        if tensor.shape != state[name].shape:
            raise DataError(
                f"{directory}: {name} has shape {list(state[name].shape)}, {list(tensor.shape)} by its {CONFIG_FILE}"
            )
