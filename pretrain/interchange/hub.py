"""Export to folders that transformers' `from_pretrained` reads: config.json and model.safetensors."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.outputs import new_folder
from data_pipeline.vocabulary import Vocabulary
from pretrain.interchange.folder import CONFIG_FILE, save_weights, write_notes
from pretrain.interchange.layouts import LAYOUTS, State, check_derived, export_state
from pretrain.schema.clip import ClipConfig

TOKEN_IDS_FILE = "token_ids.json"


def export_layout(
    directory: str | Path, layout: str, config: Any, state: State, more: Mapping[str, Any] | None = None
) -> Path:
    """Write our state dict in a public layout -> the new folder, with a subfolder per model if there are several.

    Layouts of transformers get their config.json, OpenAI's a list of the exchanged token ids. Raises DataError naming
    the keys or settings that differ. more: entries of tessera.json besides the model.
    """
    check_derived(layout, config)
    weights = export_state(layout, config, state)
    hub = LAYOUTS[layout].hub
    with new_folder(directory) as folder:
        if layout == "openai-clip":
            _put_end_of_text_last(folder, config, weights)
        for part, tree in (hub.write(config) if hub else {"": None}).items():
            (folder / part).mkdir(exist_ok=True)
            prefix = f"{part}." if part else ""
            own = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            save_weights(folder / part, own)
            if tree is not None:
                (folder / part / CONFIG_FILE).write_text(
                    json.dumps(_with_token_ids(tree), indent=2) + "\n", encoding="utf-8"
                )
        write_notes(folder, config, more)
    return Path(directory)


def _with_token_ids(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the special token ids of our vocabularies, for a text encoder or the text tower of a CLIP."""
    ids = {"pad_token_id": Vocabulary.pad}
    if "text_config" in tree:
        ids |= {"bos_token_id": Vocabulary.cls, "eos_token_id": Vocabulary.sep}
        return tree | {"text_config": tree["text_config"] | ids}
    return tree | (ids if "type_vocab_size" in tree else {})


def _put_end_of_text_last(folder: Path, config: ClipConfig, weights: State) -> None:
    """Swap the rows of [SEP] and the last id, and report it: OpenAI's text tower pools at the largest id."""
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
