"""The public layouts of text-to-image GPTs, and transformers' config.json of GPT-2."""

from typing import Any

import torch

from pretrain.interchange.rules import HubConfig, PublicLayout, Rule, State, affine, without
from pretrain.schema.gpt import GptConfig


def _mingpt(config: GptConfig, prefix: str = "") -> list[Rule]:
    rules = [
        Rule("embed.token.weight", (f"{prefix}tok_emb.weight",)),
        Rule("embed.position", (f"{prefix}pos_emb",)),
        *affine("norm", f"{prefix}ln_f"),
        Rule("head.weight", (f"{prefix}head.weight",)),
    ]
    names = {"norm1": "ln1", "norm2": "ln2", "rise": "mlp.0", "fall": "mlp.2"}
    names |= {f"attention.{part}": f"attn.{part}" for part in ("query", "key", "value")}
    names |= {"attention.out": "attn.proj"}
    for number in range(config.layers):
        for ours, theirs in names.items():
            rules += affine(f"blocks.{number}.{ours}", f"{prefix}blocks.{number}.{theirs}")
    return rules


def _easynlp_gpt(config: GptConfig) -> list[Rule]:
    """The GPT in a file that also holds the VQGAN (`first_stage_model.`, in the taming layout)."""
    return _mingpt(config, "transformer.")


def _transformers_gpt2(config: GptConfig) -> list[Rule]:
    rules = [
        Rule("embed.token.weight", ("transformer.wte.weight",)),
        Rule("embed.position", ("transformer.wpe.weight",)),
        *affine("norm", "transformer.ln_f"),
        Rule("head.weight", ("lm_head.weight",)),
    ]
    matrices = {f"attention.{part}": f"attn.{part}" for part in ("query", "key", "value")}
    matrices |= {"attention.out": "attn.c_proj", "rise": "mlp.c_fc", "fall": "mlp.c_proj"}
    for number in range(config.layers):
        mine, other = f"blocks.{number}", f"transformer.h.{number}"
        rules += [*affine(f"{mine}.norm1", f"{other}.ln_1"), *affine(f"{mine}.norm2", f"{other}.ln_2")]
        for ours, theirs in matrices.items():
            rules.append(Rule(f"{mine}.{ours}.weight", (f"{other}.{theirs}.weight",), "transpose"))
            rules.append(Rule(f"{mine}.{ours}.bias", (f"{other}.{theirs}.bias",)))
    return rules


def _unpack_gpt2(config: GptConfig, state: State) -> State:
    """Split c_attn into query, key, value; add a batch dimension to positions; reduce the head to image codes."""
    for number in range(config.layers):
        for part in ("weight", "bias"):
            packed = state.pop(f"transformer.h.{number}.attn.c_attn.{part}", None)
            if packed is not None:
                names = (f"transformer.h.{number}.attn.{x}.{part}" for x in ("query", "key", "value"))
                state |= dict(zip(names, packed.chunk(3, -1), strict=True))
    if "transformer.wpe.weight" in state:
        state["transformer.wpe.weight"] = state["transformer.wpe.weight"][None]
    if "lm_head.weight" in state:
        state["lm_head.weight"] = state["lm_head.weight"][: config.image_vocab]
    return state


def _pack_gpt2(config: GptConfig, state: State) -> State:
    """Invert `_unpack_gpt2`. The head's rows for text ids are zero: take the softmax over the image vocabulary only."""
    for number in range(config.layers):
        for part in ("weight", "bias"):
            parts = [state.pop(f"transformer.h.{number}.attn.{x}.{part}") for x in ("query", "key", "value")]
            state[f"transformer.h.{number}.attn.c_attn.{part}"] = torch.cat(parts, -1)
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][0].clone()
    head = state["lm_head.weight"]
    state["lm_head.weight"] = torch.cat([head, head.new_zeros(config.text_vocab, config.width)])
    return state


def _gpt2_entries(config: GptConfig) -> dict[str, Any]:
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


MINGPT = {"activation": "gelu", "norm_eps": 1e-5}
LAYOUTS: dict[str, PublicLayout] = {
    "mingpt": PublicLayout("gpt", _mingpt, ignored=("attn.mask",), fixed=MINGPT),
    "easynlp-gpt": PublicLayout(
        "gpt", _easynlp_gpt, ignored=("attn.mask",), unpack=without("first_stage_model."), fixed=MINGPT
    ),
    "transformers-gpt2": PublicLayout(
        "gpt",
        _transformers_gpt2,
        ignored=("attn.bias", "attn.masked_bias"),
        unpack=_unpack_gpt2,
        pack=_pack_gpt2,
        hub=HubConfig(_gpt2_entries),
    ),
}
