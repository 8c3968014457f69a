"""Public weight layouts <-> ours, as rules over names: no model of the other side is needed.

A layout is the complete list of rules for one configuration, so that a key too many or too few is named.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from pretrain.config import BertConfig, ClipConfig, ElectraConfig, GptConfig, VqganConfig
from pretrain.models.vqgan import Vqgan

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One of our tensors and the names it has there.

    same: one tensor, unchanged. stack: theirs stand on each other along dimension 0 of ours.
    transpose: theirs is ours transposed. scalar: theirs has shape (), ours (1,).
    copies: every one of theirs equals ours (tied weights); files may leave out all but the first.
    """

    ours: str
    theirs: tuple[str, ...]
    form: Literal["same", "stack", "transpose", "scalar", "copies"] = "same"


def _as_is(config: Any, state: State) -> State:
    return state


@dataclasses.dataclass(frozen=True)
class Layout:
    """kind: of the model configuration; rules: configuration -> every rule; ignored: endings of weightless keys.

    fixed: settings that no file of this layout says, as its programs have them built in.
    derived: settings that its programs compute from the shapes of what is exported.
    unpack and pack: what no rule can say, done to their state before import and after export.
    """

    kind: str
    rules: Callable[[Any], list[Rule]]
    ignored: tuple[str, ...] = ()
    unpack: Callable[[Any, State], State] = _as_is
    pack: Callable[[Any, State], State] = _as_is
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)


def import_state(layout: str, config: Any, state: Mapping[str, Tensor]) -> State:
    """Weights in `layout` -> our state dict. Raises DataError naming missing, unknown and contradicting keys."""
    rules = _rules(layout, config)
    state = LAYOUTS[layout].unpack(config, dict(state))
    state = {key: value for key, value in state.items() if not key.endswith(LAYOUTS[layout].ignored or ("\0",))}
    known = {name for rule in rules for name in rule.theirs}
    needed = {name for rule in rules for name in (rule.theirs[:1] if rule.form == "copies" else rule.theirs)}
    _refuse(layout, needed - state.keys(), state.keys() - known)
    return {rule.ours: _import(rule, state) for rule in rules}


def export_state(layout: str, config: Any, state: Mapping[str, Tensor]) -> State:
    """Our state dict -> weights in `layout`, each a tensor of its own. Raises DataError naming the keys that differ."""
    rules = _rules(layout, config)
    ours = {rule.ours for rule in rules}
    _refuse(layout, ours - state.keys(), state.keys() - ours)
    exported: State = {}
    for rule in rules:
        exported |= _export(rule, state[rule.ours].detach())
    return LAYOUTS[layout].pack(config, exported)


def _layout_of(layout: str, config: Any) -> Layout:
    """Raises DataError for a name that is not known, ConfigError for a layout of another family."""
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r} is not known; use one of {', '.join(sorted(LAYOUTS))}")
    if LAYOUTS[layout].kind != config.kind:
        fitting = ", ".join(sorted(name for name, known in LAYOUTS.items() if known.kind == config.kind))
        raise ConfigError(
            f"layout {layout!r} is for {LAYOUTS[layout].kind}, and the model is of kind {config.kind}; use {fitting}"
        )
    return LAYOUTS[layout]


def _rules(layout: str, config: Any) -> list[Rule]:
    known = _layout_of(layout, config)
    _check_settings(layout, config, known.fixed)
    return known.rules(config)


def check_derived(layout: str, config: Any) -> None:
    """Raises DataError for a setting that programs of the layout would derive otherwise from an exported file."""
    wanted = {name: value(config) for name, value in _layout_of(layout, config).derived.items()}
    _check_settings(layout, config, wanted)


def _check_settings(layout: str, config: Any, wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        has = functools.reduce(getattr, name.split("."), config)
        if has != value:
            raise DataError(
                f"programs of layout {layout!r} have {name}={value}, the configuration has {name}={has}: the same "
                "weights compute something else there; use --format tessera, or train with that value"
            )


def _refuse(layout: str, missing: set[str], unknown: set[str]) -> None:
    found = [f"{len(keys)} {what}: {_few(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if found:
        raise DataError(
            f"the weights are not a {layout} of this configuration ({'; '.join(found)}); "
            "check its layers, widths and vocabulary, or name another layout"
        )


def _few(keys: Iterable[str]) -> str:
    names = sorted(keys)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _import(rule: Rule, state: Mapping[str, Tensor]) -> Tensor:
    first = state[rule.theirs[0]]
    if rule.form == "stack":
        return torch.cat([state[name] for name in rule.theirs])
    if rule.form == "transpose":
        return first.T.contiguous()
    if rule.form == "scalar":
        return first.reshape(1)
    for name in rule.theirs[1:]:
        if name in state and not torch.equal(state[name], first):
            raise DataError(f"{name} differs from {rule.theirs[0]}; here they are one tensor, import tied weights only")
    return first.clone()


def _export(rule: Rule, tensor: Tensor) -> State:
    if rule.form == "stack":
        parts = tensor.chunk(len(rule.theirs))
        return {name: part.clone() for name, part in zip(rule.theirs, parts, strict=True)}
    if rule.form == "transpose":
        return {rule.theirs[0]: tensor.T.contiguous()}
    if rule.form == "scalar":
        return {rule.theirs[0]: tensor.reshape(()).clone()}
    return {name: tensor.clone() for name in rule.theirs}


# ---------------------------------------------------------------------------------------------------- parts


def affine(ours: str, *theirs: str, form: Literal["same", "stack"] = "same") -> list[Rule]:
    """Weight and bias."""
    return [Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in theirs), form) for part in ("weight", "bias")]


def _pre_norm_block(ours: str, theirs: str) -> list[Rule]:
    """A block of transformers' CLIP."""
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
    """A `resblocks` block of OpenAI's CLIP, whose attention is a torch MultiheadAttention."""
    return [
        *affine(f"{ours}.norm1", f"{theirs}.ln_1"),
        Rule(f"{ours}.attention.qkv.weight", (f"{theirs}.attn.in_proj_weight",)),
        Rule(f"{ours}.attention.qkv.bias", (f"{theirs}.attn.in_proj_bias",)),
        *affine(f"{ours}.attention.out", f"{theirs}.attn.out_proj"),
        *affine(f"{ours}.norm2", f"{theirs}.ln_2"),
        *affine(f"{ours}.mlp.rise", f"{theirs}.mlp.c_fc"),
        *affine(f"{ours}.mlp.fall", f"{theirs}.mlp.c_proj"),
    ]


def _post_norm_blocks(ours: str, theirs: str, layers: int) -> list[Rule]:
    """The encoder of transformers' BERT and ELECTRA."""
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


def _copies(ours: str, *theirs: str) -> Rule:
    return Rule(ours, theirs, "copies")


# -------------------------------------------------------------------------------------------------- layouts


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
    for ours, theirs, layers in (("vision", "visual.", config.vision.layers), ("text", "", config.text.layers)):
        for number in range(layers):
            rules += _openai_block(f"{ours}.blocks.{number}", f"{theirs}transformer.resblocks.{number}")
    return rules


def _transformers_bert(config: BertConfig) -> list[Rule]:
    head = "cls.predictions"
    return [
        _copies("embeddings.word.weight", "bert.embeddings.word_embeddings.weight", f"{head}.decoder.weight"),
        Rule("embeddings.position.weight", ("bert.embeddings.position_embeddings.weight",)),
        Rule("embeddings.segment.weight", ("bert.embeddings.token_type_embeddings.weight",)),
        *affine("embeddings.norm", "bert.embeddings.LayerNorm"),
        *_post_norm_blocks("encoder", "bert.encoder", config.layers),
        *affine("pooler", "bert.pooler.dense"),
        *affine("mlm.transform", f"{head}.transform.dense"),
        *affine("mlm.norm", f"{head}.transform.LayerNorm"),
        _copies("mlm.bias", f"{head}.bias", f"{head}.decoder.bias"),
        *affine("nsp", "cls.seq_relationship"),
    ]


def _transformers_electra(config: ElectraConfig) -> list[Rule]:
    """Two models in one dict: `discriminator.` before ElectraForPreTraining, `generator.` before ElectraForMaskedLM."""
    judge, maker = "discriminator", "generator"
    shared = {"word.weight": "word_embeddings.weight", "position.weight": "position_embeddings.weight"}
    shared |= {"segment.weight": "token_type_embeddings.weight"}
    shared |= {"norm.weight": "LayerNorm.weight", "norm.bias": "LayerNorm.bias"}
    rules = []
    for ours, theirs in shared.items():
        names = [f"{tower}.electra.embeddings.{theirs}" for tower in (judge, maker)]
        tied = [f"{maker}.generator_lm_head.weight"] if ours == "word.weight" else []
        rules.append(_copies(f"embeddings.{ours}", *names, *tied))
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
    """The GPT beside the VQGAN (`first_stage_model.`, which is of the taming layout) in one file."""
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
    """c_attn -> query, key, value; positions get a batch dimension; of the head only the image vocabulary stays."""
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
    """The reverse; the head's rows of text ids are zero: take the softmax over the image vocabulary."""
    for number in range(config.layers):
        for part in ("weight", "bias"):
            parts = [state.pop(f"transformer.h.{number}.attn.{x}.{part}") for x in ("query", "key", "value")]
            state[f"transformer.h.{number}.attn.c_attn.{part}"] = torch.cat(parts, -1)
    state["transformer.wpe.weight"] = state["transformer.wpe.weight"][0].clone()
    head = state["lm_head.weight"]
    state["lm_head.weight"] = torch.cat([head, head.new_zeros(config.text_vocab, config.width)])
    return state


def _taming_vqgan(config: VqganConfig) -> list[Rule]:
    """Our names are theirs. Raises DataError for another number of groups, and for a middle without attention."""
    if not config.attention_at:
        raise DataError(
            "programs of layout 'taming-vqgan' have attention in the middle blocks, the configuration has "
            "attention_at=[]; use --format tessera, or train with attention_at=[middle]"
        )
    if set(config.group_counts()) != {32}:
        raise DataError(
            f"programs of layout 'taming-vqgan' have 32 groups in every GroupNorm, the configuration has "
            f"norm_groups={config.norm_groups} over {config.channels} channels: the same weights compute something "
            "else; use --format tessera, or train with norm_groups=32"
        )
    with torch.device("meta"):
        return [Rule(name, (name,)) for name in Vqgan(config).state_dict()]


def _without(prefix: str) -> Callable[[Any, State], State]:
    """Leaves out what belongs to another model of the same file."""
    return lambda config, state: {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}


def _heads_of_64(tower: str) -> Callable[[ClipConfig], int | float]:
    """Heads that OpenAI's programs give a tower: one for every 64 of its width."""

    def heads(config: ClipConfig) -> int | float:
        width: int = getattr(config, tower).width
        return width / 64 if width % 64 else width // 64

    return heads


MINGPT = {"activation": "gelu", "norm_eps": 1e-5}
# open_clip writes the same names as OpenAI, whose files carry three numbers besides the weights
LAYOUTS: dict[str, Layout] = {
    "transformers-clip": Layout("clip", _transformers_clip, ignored=("embeddings.position_ids",)),
    "openai-clip": Layout(
        "clip",
        _openai_clip,
        ignored=("input_resolution", "context_length", "vocab_size"),
        fixed={"norm_eps": 1e-5},
        derived={f"{tower}.heads": _heads_of_64(tower) for tower in ("vision", "text")},
    ),
    "transformers-bert": Layout(
        "bert",
        _transformers_bert,
        ignored=("embeddings.position_ids",),
        derived={"embedding_width": lambda config: config.width},
    ),
    "transformers-electra": Layout("electra", _transformers_electra, ignored=("embeddings.position_ids",)),
    "mingpt": Layout("gpt", _mingpt, ignored=("attn.mask",), fixed=MINGPT),
    "easynlp-gpt": Layout(
        "gpt", _easynlp_gpt, ignored=("attn.mask",), unpack=_without("first_stage_model."), fixed=MINGPT
    ),
    "transformers-gpt2": Layout(
        "gpt", _transformers_gpt2, ignored=("attn.bias", "attn.masked_bias"), unpack=_unpack_gpt2, pack=_pack_gpt2
    ),
    "taming-vqgan": Layout("vqgan", _taming_vqgan, unpack=_without("loss."), fixed={"local_encoder": False}),
}
