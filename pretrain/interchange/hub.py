"""Export to folders that transformers' `from_pretrained` reads: config.json and model.safetensors."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.outputs import new_folder
from data_pipeline.text.tokenizer import TextTokenizer
from pretrain.interchange.folder import CONFIG_FILE, save_weights, write_notes
from pretrain.interchange.layouts import LAYOUTS, State, check_derived, export_state
from pretrain.schema.clip import ClipConfig

TOKEN_IDS_FILE = "token_ids.json"
POOLED_AT_END = ("openai-clip", "transformers-clip")
"""Layouts whose text tower finds the end of a text by its id: they need the tokenizer's `sep`."""
WITH_TOKEN_IDS = (*POOLED_AT_END, "transformers-bert", "transformers-electra")
"""Layouts that record special ids of the text tokenizer."""
LARGEST_ID = 2
"""The `eos_token_id` with which transformers' CLIP pools at the largest id of a text instead."""


def export_layout(
    directory: str | Path,
    layout: str,
    config: Any,
    state: State,
    more: Mapping[str, Any] | None = None,
    tokenizer: TextTokenizer | None = None,
) -> Path:
    """Write our state dict in a public layout -> the new folder, with a subfolder per model if there are several.

    Layouts of transformers get their config.json, OpenAI's a list of the exchanged token ids. Raises DataError naming
    the keys or settings that differ. more: entries of tessera.json besides the model. tokenizer: the model's, for
    WITH_TOKEN_IDS; if None, config.json names no token ids and no rows of the weights are exchanged.
    """
    check_derived(layout, config)
    _check_end_of_text(layout, tokenizer)
    weights = export_state(layout, config, state)
    hub = LAYOUTS[layout].hub
    with new_folder(directory) as folder:
        if layout == "openai-clip" and tokenizer:
            _put_end_of_text_last(folder, config, weights, tokenizer.sep)
        for part, tree in (hub.write(config) if hub else {"": None}).items():
            (folder / part).mkdir(exist_ok=True)
            prefix = f"{part}." if part else ""
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            save_weights(folder / part, own)
            if tree is not None:
                (folder / part / CONFIG_FILE).write_text(
                    json.dumps(_with_token_ids(tree, tokenizer), indent=2) + "\n", encoding="utf-8"
                )
        write_notes(folder, config, more)
    return Path(directory)


def _check_end_of_text(layout: str, tokenizer: TextTokenizer | None) -> None:
    """Raise DataError where transformers would not take the tokenizer's `sep` for what it is."""
    if layout == "transformers-clip" and tokenizer and tokenizer.sep == LARGEST_ID:
        raise DataError(
            f"the text tokenizer ends a text with id {LARGEST_ID}; transformers' CLIP takes an eos_token_id of "
            f"{LARGEST_ID} for the largest id of the text, and would pool elsewhere; use --format openai-clip"
        )


def _with_token_ids(tree: dict[str, Any], tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """Add the tokenizer's special ids, for a text encoder or the text tower of a CLIP."""
    if tokenizer is None:
        return tree
    ids = {"pad_token_id": tokenizer.pad}
    if "text_config" in tree:
        ids |= {"bos_token_id": tokenizer.cls, "eos_token_id": tokenizer.sep}
        return tree | {"text_config": tree["text_config"] | ids}
    return tree | (ids if "type_vocab_size" in tree else {})


def _put_end_of_text_last(folder: Path, config: ClipConfig, weights: State, end: int) -> None:
    """Swap the rows of `end` and the last id, and report it: OpenAI's text tower pools at the largest id."""
    last = config.text.vocab_size - 1
    rows = weights["token_embedding.weight"]
    rows[[end, last]] = rows[[last, end]]
    told = {"end_of_text": last, "exchanged_ids": [end, last]}
    (folder / TOKEN_IDS_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")
    print(
        f"openai-clip pools its text at the largest id: the end of text is {last} there, not {end}; exchange these two "
        f"ids in what the vocabulary gives ({TOKEN_IDS_FILE} says it too)",
        file=sys.stderr,
    )
