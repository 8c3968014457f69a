"""FAMILIES: kind of the model -> its forward and loss on a Tape, call by call as in pretrain/models and objectives.

Letters: B rows of a micro-batch, S sequence, D width, H heads, V vocabulary, M masked positions, E embedding.
"""

from collections.abc import Callable

from launchers.plan.tape import FP32, Tape, Value, Weight
from pretrain.config import (
    BertConfig,
    ClipConfig,
    ElectraConfig,
    EncoderConfig,
    GptConfig,
    NormGroups,
    RunConfig,
    VqganConfig,
    group_count,
)

LOGITS, FEATURES, HEAD = "logits", "features", "head"
PIXEL_CHANNELS = 3


def trace(config: RunConfig, rows: int, on_gpu: bool = True) -> Tape:
    """One micro-batch of `rows` samples: the model, and its loss where that is the micro-batch's own."""
    tape = Tape(2 if config.train.precision == "bf16" else FP32, on_gpu)
    FAMILIES[config.model.kind](tape, config, rows)
    return tape


def trace_contrast(config: RunConfig, on_gpu: bool = True) -> Tape:
    """CLIP's loss of the whole global batch, which every rank computes once a step."""
    assert config.model.kind == "clip"
    tape = Tape(2 if config.train.precision == "bf16" else FP32, on_gpu)
    contrast(tape, config.train.global_batch, config.model.embed_dim)
    return tape


# ------------------------------------------------------------------------------------------- pieces


def mlp(tape: Tape, x: Value, width: int, activation: str = "gelu") -> Value:
    """Linear, activation, Linear; the middle is four times as wide."""
    inner = tape.linear(x, width, 4 * width)
    inner = tape.quick_gelu(inner) if activation == "quick_gelu" else tape.activation(inner)
    return tape.linear(inner, 4 * width, width)


def attention(tape: Tape, x: Value, rows: int, width: int, heads: int, mask: int = 0, dropout: float = 0.0) -> Value:
    """One matrix makes queries, keys and values."""
    qkv = tape.linear(x, width, 3 * width)
    mixed = tape.attention([qkv], rows, heads, x.numel // width // rows, mask, dropout > 0)
    return tape.linear(mixed, width, width)


def pre_norm_block(tape: Tape, x: Value, rows: int, width: int, heads: int, activation: str) -> Value:
    with tape.block(x):
        x = tape.add(x, attention(tape, tape.norm(x, width), rows, width, heads))
        return tape.add(x, mlp(tape, tape.norm(x, width), width, activation))


def post_norm_block(tape: Tape, x: Value, rows: int, width: int, heads: int, mask: int, dropout: float) -> Value:
    with tape.block(x):
        inner = attention(tape, x, rows, width, heads, mask, dropout)
        x = tape.norm(tape.add(x, tape.dropout(inner, dropout)), width)
        return tape.norm(tape.add(x, tape.dropout(mlp(tape, x, width), dropout)), width)


def text_embeddings(tape: Tape, config: EncoderConfig, rows: int, tables: list[Weight]) -> Value:
    """norm(word + position + segment); `tables` is filled by the first call, which owns the parameters."""
    tokens, width, first = rows * config.context, config.embedding_width, not tables
    if first:
        tables += [tape.weight(n * width) for n in (config.vocab_size, config.context, config.type_vocab)]
    sizes = (tokens, config.context, tokens)
    parts = [tape.embedding(size, 0, width, table)[0] for size, table in zip(sizes, tables, strict=True)]
    x = tape.add(tape.add(parts[0], parts[1]), parts[2])
    count = len(tape.weights)
    x = tape.norm(x, width)
    if not first:
        del tape.weights[count:]
    return tape.dropout(x, config.dropout)


def text_encoder(tape: Tape, config: EncoderConfig, x: Value, rows: int, width: int, heads: int) -> Value:
    """Projection where the width differs, then post-norm blocks. Packed rows have a mask of their own."""
    if config.embedding_width != width:
        x = tape.linear(x, config.embedding_width, width)
    for _ in range(config.layers):
        x = post_norm_block(tape, x, rows, width, heads, rows * config.context, config.dropout)
    return x


def mlm_head(tape: Tape, config: EncoderConfig, width: int, places: int, word: Weight) -> None:
    """Logits at the masked places only, and their loss."""
    narrow = config.embedding_width
    with tape.named(HEAD):
        inner = tape.activation(tape.linear(Value(places * width), width, narrow))
        inner = tape.norm(inner, narrow)
        tape.weight(config.vocab_size)
        with tape.named(LOGITS):
            logits = tape.times(inner, word, narrow, config.vocab_size)
            tape.cross_entropy(logits)


def masked_places(config: RunConfig, rows: int) -> int:
    """B x M: what a full context masks, in every row."""
    assert config.objective.kind in ("mlm", "rtd") and config.model.kind in ("bert", "electra")
    return rows * max(1, round(config.objective.mask_rate * config.model.context))


# ------------------------------------------------------------------------------------------- families


def bert(tape: Tape, config: RunConfig, rows: int) -> None:
    model = config.model
    assert isinstance(model, BertConfig)
    tables: list[Weight] = []
    x = text_embeddings(tape, model, rows, tables)
    x = text_encoder(tape, model, x, rows, model.width, model.heads)
    tape.linear(Value(rows * model.width, of=x), model.width, model.width)
    mlm_head(tape, model, model.width, masked_places(config, rows), tables[0])
    tape.linear(Value(rows * model.width), model.width, 2)


def electra(tape: Tape, config: RunConfig, rows: int) -> None:
    model = config.model
    assert isinstance(model, ElectraConfig)
    width = round(model.width * model.generator_fraction)
    tables: list[Weight] = []
    with tape.named("generator"):
        x = text_embeddings(tape, model, rows, tables)
        text_encoder(tape, model, x, rows, width, max(1, width // 64))
    mlm_head(tape, model, width, masked_places(config, rows), tables[0])
    with tape.named("discriminator"):
        x = text_embeddings(tape, model, rows, tables)
        x = text_encoder(tape, model, x, rows, model.width, model.heads)
    with tape.named(HEAD):
        tape.linear(tape.activation(tape.linear(x, model.width, model.width)), model.width, 1)
        tape.keep(*(Value(rows * model.context) for _ in range(3)))


def gpt(tape: Tape, config: RunConfig, rows: int) -> None:
    """The last code is no input; the head stands at the image's places only."""
    model = config.model
    assert isinstance(model, GptConfig)
    width, length = model.width, model.text_tokens + model.image_tokens - 1
    x, _ = tape.embedding(rows * length, model.image_vocab + model.text_vocab, width)
    tape.weight((length + 1) * width)
    x = tape.dropout(tape.add(x, x), model.dropout)
    for _ in range(model.layers):
        with tape.block(x):
            normed = tape.norm(x, width)
            parts = [tape.linear(normed, width, width) for _ in range(3)]
            mixed = tape.attention(parts, rows, model.heads, length, 0, model.dropout > 0)
            x = tape.add(x, tape.dropout(tape.linear(mixed, width, width), model.dropout))
            x = tape.add(x, tape.dropout(mlp(tape, tape.norm(x, width), width), model.dropout))
    with tape.named(HEAD):
        normed = tape.norm(Value(rows * model.image_tokens * width, of=x), width)
        with tape.named(LOGITS):
            tape.cross_entropy(tape.linear(normed, width, model.image_vocab, bias=False))


def clip(tape: Tape, config: RunConfig, rows: int) -> None:
    """The towers; the loss is `trace_contrast`."""
    model = config.model
    assert isinstance(model, ClipConfig)
    tape.weight(1)
    with tape.named("image tower"):
        image_tower(tape, model, rows)
    with tape.named("text tower"):
        text_tower(tape, model, rows)


def image_tower(tape: Tape, model: ClipConfig, rows: int) -> None:
    vision, width = model.vision, model.vision.width
    patches = (vision.image_size // vision.patch_size) ** 2
    tape.weight(width)
    tape.weight((patches + 1) * width)
    pixels = Value(rows * PIXEL_CHANNELS * vision.image_size**2)
    kernel = vision.patch_size
    tape.convolution(
        pixels, vision.image_size, PIXEL_CHANNELS, width, kernel, kernel, False, True, vision.image_size // kernel
    )
    x = tape.norm(Value(rows * (patches + 1) * width), width)
    for _ in range(vision.layers):
        x = pre_norm_block(tape, x, rows, width, vision.heads, model.activation)
    pooled(tape, Value(rows * width, of=x), width, model.embed_dim)


def text_tower(tape: Tape, model: ClipConfig, rows: int) -> None:
    text, width = model.text, model.text.width
    x, _ = tape.embedding(rows * text.context, text.vocab_size, width)
    tape.weight(text.context * width)
    x = tape.add(x, x)
    for _ in range(text.layers):
        x = pre_norm_block(tape, x, rows, width, text.heads, model.activation)
    pooled(tape, Value(rows * width), width, model.embed_dim)


def pooled(tape: Tape, x: Value, width: int, embed: int) -> None:
    """Norm, projection, and the embedding brought to length 1."""
    projected = tape.linear(tape.norm(x, width), width, embed, bias=False)
    tape.keep(Value(projected.numel), Value(projected.numel))


def contrast(tape: Tape, batch: int, embed: int) -> None:
    """Logits of the whole global batch, [B, B], and cross-entropies by row and by column."""
    with tape.named(FEATURES):
        image, text = Value(batch * embed), Value(batch * embed)
        tape.keep(image, Value(batch * embed), text)
    with tape.named(LOGITS):
        flops = 2 * batch * batch * embed
        tape.matmul_flops[LOGITS] = tape.matmul_flops.get(LOGITS, 0) + flops
        logits = Value(batch * batch)  # float32 whatever the autocast
        tape.cross_entropy(logits)
        tape.cross_entropy(logits)


# ------------------------------------------------------------------------------------------- VQGAN


def vqgan(tape: Tape, config: RunConfig, rows: int) -> None:
    """Encoder, codebook, decoder and the losses of the pixels, before the discriminator takes part."""
    model = config.model
    assert isinstance(model, VqganConfig) and config.objective.kind == "reconstruction"
    pixels = Value(rows * PIXEL_CHANNELS * model.image_size**2)
    with tape.named("encoder"):
        latents = encoder(tape, model, pixels)
    grid, width = model.grid, model.code_width
    latents = tape.convolution(latents, grid, model.latent_channels, width, 1)
    tape.weight(model.codebook_size * width)
    places = rows * grid**2
    search = 2 * places * width * model.codebook_size
    tape.matmul_flops["codebook"] = search
    tape.without_gradient_flops += 2 * search
    tape.hold(places * model.codebook_size * FP32)
    tape.keep(Value(places, 8), *(Value(places * width) for _ in range(2)))
    with tape.named("decoder"):
        x = tape.convolution(Value(places * width), grid, width, model.latent_channels, 1)
        drawn = decoder(tape, model, x)
    pixel_losses(tape, drawn)
    if config.objective.discriminator_weight:
        discriminator(tape, model)


Groups = NormGroups | None
"""Of a GroupNorm; None in a local encoder, which normalises each place alone and has 1x1 kernels."""


def res_block(tape: Tape, x: Value, side: int, channels: int, out: int, groups: Groups) -> Value:
    kernel = 3 if groups else 1
    with tape.block(x):
        inner = tape.activation(norm(tape, x, side, channels, groups))
        inner = tape.convolution(inner, side, channels, out, kernel)
        inner = tape.activation(norm(tape, inner, side, out, groups))
        inner = tape.convolution(inner, side, out, out, kernel)
        skip = x if channels == out else tape.convolution(x, side, channels, out, 1)
        return tape.add(skip, inner)


def norm(tape: Tape, x: Value, side: int, channels: int, groups: Groups) -> Value:
    """GroupNorm, or over the channels of each place."""
    if not groups:
        return tape.norm(x, channels)
    return tape.norm(x, channels * side**2, channels, group_count(channels, groups))


def picture_attention(tape: Tape, x: Value, rows: int, side: int, channels: int, groups: Groups) -> Value:
    with tape.block(x):
        normed = norm(tape, x, side, channels, groups or 32)
        parts = [tape.convolution(normed, side, channels, channels, 1) for _ in range(3)]
        mixed = tape.attention(parts, rows, 1, side**2, 0, False)
        return tape.add(x, tape.convolution(tape.same(mixed), side, channels, channels, 1))


def level(
    tape: Tape, x: Value, rows: int, side: int, channels: int, out: int, blocks: int, attends: bool, groups: Groups
) -> Value:
    for index in range(blocks):
        x = res_block(tape, x, side, out if index else channels, out, groups)
        x = picture_attention(tape, x, rows, side, out, groups) if attends else x
    return x


def middle(tape: Tape, x: Value, rows: int, side: int, channels: int, attends: bool, groups: Groups) -> Value:
    x = res_block(tape, x, side, channels, channels, groups)
    x = picture_attention(tape, x, rows, side, channels, groups) if attends else x
    return res_block(tape, x, side, channels, channels, groups)


def encoder(tape: Tape, model: VqganConfig, pixels: Value) -> Value:
    rows, side = pixels.numel // PIXEL_CHANNELS // model.image_size**2, model.image_size
    widths, groups = model.widths, None if model.local_encoder else model.norm_groups
    x = tape.convolution(pixels, side, PIXEL_CHANNELS, model.channels, 3, fed=True)
    above = model.channels
    for index, width in enumerate(widths):
        x = level(tape, x, rows, side, above, width, model.res_blocks, side in model.attention_at, groups)
        if index < len(widths) - 1:
            padded = tape.same(x, rows * width * (side + 1) ** 2)
            x = tape.convolution(padded, side + 1, width, width, 3, side_out=side // 2)
            side //= 2
        above = width
    x = middle(tape, x, rows, side, above, bool(model.attention_at), groups)
    x = tape.activation(norm(tape, x, side, above, groups))
    return tape.convolution(x, side, above, model.latent_channels, 3 if groups else 1)


def decoder(tape: Tape, model: VqganConfig, x: Value) -> Value:
    widths, groups = model.widths, model.norm_groups
    side, below = model.grid, widths[-1]
    rows = x.numel // model.latent_channels // side**2
    x = tape.convolution(x, side, model.latent_channels, below, 3)
    x = middle(tape, x, rows, side, below, bool(model.attention_at), groups)
    for index in reversed(range(len(widths))):
        attends = model.image_size // 2**index in model.attention_at
        x = level(tape, x, rows, side, below, widths[index], model.res_blocks + 1, attends, groups)
        below = widths[index]
        if index:
            x = tape.same(x, 4 * x.numel)
            side *= 2
            x = tape.convolution(x, side, below, below, 3)
    x = tape.activation(norm(tape, x, side, below, groups))
    return tape.convolution(x, side, below, PIXEL_CHANNELS, 3)


def pixel_losses(tape: Tape, drawn: Value) -> None:
    """|x - y|, its square, and the differences between neighbours at three sizes."""
    with tape.named("losses"):
        for level, errors in enumerate((2, 1, 0)):
            tape.keep(*(Value(drawn.numel // 4**level) for _ in range(errors + 2)))


def discriminator(tape: Tape, model: VqganConfig) -> None:
    """Its parameters; it computes from `discriminator_start_step` on."""
    width = model.discriminator_channels
    tape.weights += [Weight(PIXEL_CHANNELS * width * 16, True), Weight(width, True)]
    for index in range(1, model.discriminator_layers + 1):
        wider = model.discriminator_channels * min(2**index, 8)
        tape.weights += [Weight(width * wider * 16, True), Weight(wider), Weight(wider)]
        width = wider
    tape.weights += [Weight(width * 16, True), Weight(1, True)]


FAMILIES: dict[str, Callable[[Tape, RunConfig, int], None]] = {
    "bert": bert,
    "clip": clip,
    "electra": electra,
    "gpt": gpt,
    "vqgan": vqgan,
}
