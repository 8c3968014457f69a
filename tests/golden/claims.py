"""Which fixtures we compute, and how: CLAIMS maps the beginning of a fixture's name to a function of the fixture.

A function builds ours from config.json, loads the weights by our importer of that layout, and compares every array.
DIFFERENCES lists where ours differs from the reference on purpose; the function then computes what the reference does
from outside.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.interchange.layouts import export_state, import_state
from pretrain.models.clip import Clip, eot_by_largest_id
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import AttnBlock, Codebook, Decoder, Downsample, Encoder, ResBlock, Upsample, Vqgan
from pretrain.schema.clip import ClipConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vqgan import MIDDLE, VqganConfig
from pretrain.tasks.autoregressive import code_loss
from pretrain.tasks.contrastive import contrastive_loss
from pretrain.tasks.reconstruction import codebook_loss
from tests.golden.fixture import Compared, Golden, gradients_of, waves

DIFFERENCES = {
    "clip_vit": "features: ours have length 1, compared before they are normalised; the scale of ours is at most 100, "
    "the reference's has no limit (no difference below it)",
    "easynlp_text2image_gpt": "greedy_from_two: ours always draws all codes, so the given ones are put in by a loop",
    "vq_quantizer": "indices: ours are [batch, codes of an image], compared in the reference's shape",
}
"""Beginning of the name -> what is not the same, and how it is compared."""

# ------------------------------------------------------------------------------------------------- CLIP


def clip_config(golden: Golden) -> ClipConfig:
    """Ours for the constructor's arguments of OpenAI's CLIP."""
    told = golden.config["kwargs"]
    vision = {"image_size": told["image_resolution"], "patch_size": told["vision_patch_size"]}
    vision |= {"width": told["vision_width"], "layers": told["vision_layers"], "heads": golden.config["vision_heads"]}
    text = {"vocab_size": told["vocab_size"], "context": told["context_length"], "width": told["transformer_width"]}
    text |= {"layers": told["transformer_layers"], "heads": told["transformer_heads"]}
    return ClipConfig.model_validate({"vision": vision, "text": text, "embed_dim": told["embed_dim"]})


def clip_vit(golden: Golden) -> list[Compared]:
    """Features, logits, loss and gradients of a CLIP with a vision transformer."""
    config = clip_config(golden)
    model = Clip(config)
    model.load_state_dict(import_state("openai-clip", config, golden.weights))
    found: dict[str, Tensor] = {}
    for tower, name in ((model.vision, "image_features"), (model.text, "text_features")):
        tower.project.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
    tokens = golden.inputs["text"]
    image, text, scale = model(golden.inputs["images"], tokens, eot_by_largest_id(tokens))
    logits = scale * image @ text.T
    found |= {"logits_per_image": logits, "logits_per_text": logits.T, "loss": contrastive_loss(logits)}
    found["loss"].backward()
    return golden.compare(found, export_state("openai-clip", config, gradients_of(model)))


# -------------------------------------------------------------------------------------------------- GPT


def easynlp_gpt(golden: Golden, layout: str = "mingpt") -> list[Compared]:
    """Logits, loss, gradients and greedy codes of EasyNLP's text-to-image GPT."""
    told, length = golden.config["config"], golden.config["text_len"]
    config = GptConfig(
        text_vocab=told["text_vocab_size"], image_vocab=told["img_vocab_size"], text_tokens=length,
        image_tokens=told["block_size"] - length, layers=told["n_layer"], width=told["n_embd"], heads=told["n_head"],
    )  # fmt: skip
    prefix = "transformer." if layout == "easynlp-gpt" else ""
    model = Gpt(config)
    model.load_state_dict(import_state(layout, config, {prefix + k: v for k, v in golden.weights.items()}))
    text, codes = golden.inputs["text"] - config.image_vocab, golden.inputs["codes"]
    sequence = torch.cat([golden.inputs["text"], codes], 1)[:, :-1]
    logits = model(text, codes)
    found = {"logits": logits, "target": codes, "loss": code_loss(logits, codes)}
    found["logits_all"] = model.step(sequence, start=0, last=sequence.shape[1])
    found["loss"].backward()
    found["greedy"] = model.sample(text, temperature=0)
    found["greedy_from_two"] = _greedy_from(model, text, codes[:, :2])
    found["top_k_logits"] = _top(logits[:, -1], golden.config["top_k"])
    gradients = export_state(layout, config, gradients_of(model))
    return golden.compare(found, {name.removeprefix(prefix): gradient for name, gradient in gradients.items()})


@torch.no_grad()
def _greedy_from(model: Gpt, text: Tensor, codes: Tensor) -> Tensor:
    """int64 [B, T], first codes int64 [B, n] -> int64 [B, I]: the likeliest code after code."""
    while codes.shape[1] < model.config.image_tokens:
        more = torch.cat([codes, codes[:, :1]], 1)  # what stands last is no input
        codes = torch.cat([codes, model(text, more)[:, -1:].argmax(-1)], 1)
    return codes


def _top(logits: Tensor, count: int) -> Tensor:
    """[B, V] -> the same with minus infinity below the `count` largest of each row."""
    return logits.masked_fill(logits < logits.topk(count).values[:, -1:], -torch.inf)


# ------------------------------------------------------------------------------------------------ VQGAN


def vqgan_config(golden: Golden) -> VqganConfig:
    """Ours for taming's `ddconfig`, without a word of groups, as a user would write it."""
    told = golden.config["ddconfig"]
    sides = [told["resolution"] // 2**level for level in range(len(told["ch_mult"]))]
    config = VqganConfig(
        image_size=told["resolution"], channels=told["ch"], multipliers=tuple(told["ch_mult"]),
        attention_at=tuple(side for side in told["attn_resolutions"] if side in sides) or (MIDDLE,),
        latent_channels=told["z_channels"] * (2 if told.get("double_z") else 1),
        codebook_size=golden.config.get("n_embed", 4), code_width=golden.config.get("embed_dim", 4),
    )  # fmt: skip
    return config.model_copy(update={"res_blocks": told["num_res_blocks"]})  # fixtures may have none, to be small


def vqgan_encoder(golden: Golden) -> list[Compared]:
    """Latents of an image, and gradients."""
    encoder = Encoder(vqgan_config(golden))
    encoder.load_state_dict(golden.weights)
    z = encoder(golden.inputs["images"])
    found = {"z": z, "loss": waves(z)}
    found["loss"].backward()
    return golden.compare(found, gradients_of(encoder))


def vqgan_decoder(golden: Golden) -> list[Compared]:
    """An image of latents, and gradients."""
    decoder = Decoder(vqgan_config(golden))
    decoder.load_state_dict(golden.weights)
    images = decoder(golden.inputs["z"])
    found = {"images": images, "loss": waves(images)}
    found["loss"].backward()
    return golden.compare(found, gradients_of(decoder))


def vqgan_blocks(golden: Golden) -> list[Compared]:
    """Each block by itself."""
    a, b = golden.config["a"], golden.config["b"]
    blocks = nn.ModuleDict(
        {"resnet": ResBlock(a, b, 32), "attn": AttnBlock(b, 32), "down": Downsample(a), "up": Upsample(a)}
    )
    blocks.load_state_dict(golden.weights)
    x = golden.inputs["x"]
    found = {"resnet": blocks["resnet"](x), "down": blocks["down"](x), "up": blocks["up"](x)}
    found["attn"] = blocks["attn"](found["resnet"])
    found["loss"] = waves(found["attn"]) + waves(found["down"]) + waves(found["up"])
    found["loss"].backward()
    return golden.compare(found, gradients_of(blocks))


def vq_quantizer(golden: Golden) -> list[Compared]:
    """Nearest rows of a codebook, its loss, and gradients also of the latents."""
    told: dict[str, Any] = golden.config
    quantize = Codebook(told["n_e"], told["e_dim"])
    quantize.load_state_dict({name.removeprefix("quantize."): rows for name, rows in golden.weights.items()})
    z = golden.inputs["z"].requires_grad_()
    quantised = quantize(z)
    rows = quantize.embedding(quantised.codes).detach().view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    of_codebook = codebook_loss(quantised.latents, quantised.nearest, told["beta"], told["legacy"])
    found = {"zq": quantised.output, "codebook_loss": of_codebook, "entries": rows}
    found["indices"] = quantised.codes.reshape(golden.outputs["indices"].shape)
    found["loss"] = of_codebook + waves(quantised.output)
    found["loss"].backward()
    assert z.grad is not None
    found["grad_input.z"] = z.grad
    return golden.compare(found, {f"quantize.{name}": gradient for name, gradient in gradients_of(quantize).items()})


def vqmodel(golden: Golden) -> list[Compared]:
    """A whole VQGAN from image to image, and gradients."""
    config = vqgan_config(golden)
    model = Vqgan(config)
    model.load_state_dict(import_state("taming-vqgan", config, golden.weights))
    images = golden.inputs["images"]
    reconstruction, quantised = model(images)
    found = {"pre_quant": model.quant_conv(model.encoder(images)), "quant": quantised.output}
    found["indices"] = quantised.codes.reshape(golden.outputs["indices"].shape)
    found["reconstruction"] = reconstruction
    found["codebook_loss"] = codebook_loss(quantised.latents, quantised.nearest, 0.25, legacy=True)
    found["loss"] = (images - reconstruction).abs().mean() + found["codebook_loss"]
    found["loss"].backward()
    return golden.compare(found, export_state("taming-vqgan", config, gradients_of(model)))


CLAIMS: dict[str, Callable[[Golden], list[Compared]]] = {
    "clip_vit": clip_vit,
    "easynlp_text2image_gpt": easynlp_gpt,
    "vqgan_encoder": vqgan_encoder,
    "vqgan_decoder": vqgan_decoder,
    "vqgan_blocks": vqgan_blocks,
    "vq_quantizer_legacy": vq_quantizer,
    "vq_quantizer_fixed": vq_quantizer,
    "vqmodel": vqmodel,
}


def claim_of(name: str) -> Callable[[Golden], list[Compared]] | None:
    """The function of the longest beginning of the name that is claimed; None where nobody claims it yet."""
    claimed = [prefix for prefix in CLAIMS if name.startswith(prefix)]
    return CLAIMS[max(claimed, key=len)] if claimed else None
