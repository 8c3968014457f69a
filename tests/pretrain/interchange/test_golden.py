"""Every importer against golden/: what the published implementations computed on weights of their own layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipeline.errors import DataError
from pretrain.interchange.layouts import export_state, import_state
from pretrain.models.clip import Clip, eot_by_largest_id
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import AttnBlock, Codebook, Decoder, Downsample, Encoder, ResBlock, Upsample, Vqgan
from pretrain.schema.clip import ClipConfig
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vqgan import VqganConfig
from pretrain.tasks.autoregressive import code_loss
from pretrain.tasks.contrastive import contrastive_loss
from pretrain.tasks.reconstruction import codebook_loss

TOLERANCE = 1e-5


class Golden:
    """One folder: weights, inputs, outputs and the configuration of the reference."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights, self.inputs, self.outputs = (
            load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")
        )

    def check(self, name: str, found: Tensor) -> None:
        """`found` is the output of that name, to TOLERANCE of the largest of them."""
        wanted = self.outputs[name]
        assert found.shape == wanted.shape, (name, found.shape, wanted.shape)
        if wanted.dtype == torch.int64:
            assert torch.equal(found, wanted), name
        else:
            off = float((found.detach() - wanted).abs().max())
            assert off <= TOLERANCE * max(1.0, float(wanted.abs().max())), (name, off)

    def check_gradients(self, found: dict[str, Tensor]) -> None:
        """Every gradient written down, whole or as [sum, sum of squares]; `found` goes by the reference's names."""
        told = [name for name in self.outputs if name.startswith(("grad.", "gradsum."))]
        assert len(told) > 0
        for name in told:
            kind, _, of = name.partition(".")
            gradient = found[of]
            self.check(name, gradient if kind == "grad" else torch.stack([gradient.sum(), gradient.square().sum()]))


@pytest.fixture
def golden(shared: Path, request: pytest.FixtureRequest) -> Golden:
    return Golden(shared / "golden" / request.param)


def from_golden(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("golden", names, indirect=True)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def waves(x: Tensor) -> Tensor:
    """The loss of the single parts: sum of cos(i) x_i over sqrt(n)."""
    flat = x.flatten()
    return (torch.arange(len(flat), dtype=torch.float64).cos().float() * flat).sum() / len(flat) ** 0.5


def clip_config(golden: Golden) -> ClipConfig:
    told = golden.config["kwargs"]
    vision = {"image_size": told["image_resolution"], "patch_size": told["vision_patch_size"]}
    vision |= {"width": told["vision_width"], "layers": told["vision_layers"], "heads": golden.config["vision_heads"]}
    text = {"vocab_size": told["vocab_size"], "context": told["context_length"], "width": told["transformer_width"]}
    text |= {"layers": told["transformer_layers"], "heads": told["transformer_heads"]}
    return ClipConfig.model_validate({"vision": vision, "text": text, "embed_dim": told["embed_dim"]})


@from_golden("clip_vit")
def test_openai_clip(golden: Golden) -> None:
    config = clip_config(golden)
    model = Clip(config)
    model.load_state_dict(import_state("openai-clip", config, golden.weights))
    tokens = golden.inputs["text"]
    image, text, scale = model(golden.inputs["images"], tokens, eot_by_largest_id(tokens))
    for name in ("image", "text"):
        golden.outputs[f"{name}_features"] = F.normalize(golden.outputs[f"{name}_features"], dim=-1)
    golden.check("image_features", image)
    golden.check("text_features", text)
    logits = scale * image @ text.T
    golden.check("logits_per_image", logits)
    golden.check("logits_per_text", logits.T)
    loss = contrastive_loss(logits)
    golden.check("loss", loss)
    loss.backward()
    golden.check_gradients(export_state("openai-clip", config, gradients(model)))


@from_golden("easynlp_text2image_gpt")
@pytest.mark.parametrize("layout", ["mingpt", "easynlp-gpt"])
def test_easynlp_gpt(golden: Golden, layout: str) -> None:
    told, length = golden.config["config"], golden.config["text_len"]
    config = GptConfig(
        text_vocab=told["text_vocab_size"], image_vocab=told["img_vocab_size"], text_tokens=length,
        image_tokens=told["block_size"] - length, layers=told["n_layer"], width=told["n_embd"], heads=told["n_head"],
    )  # fmt: skip
    prefix = "transformer." if layout == "easynlp-gpt" else ""
    model = Gpt(config)
    model.load_state_dict(import_state(layout, config, {prefix + k: v for k, v in golden.weights.items()}))
    text, codes = golden.inputs["text"] - config.image_vocab, golden.inputs["codes"]
    logits = model(text, codes)
    golden.check("logits", logits)
    golden.check("greedy", model.sample(text, temperature=0))
    loss = code_loss(logits, codes)
    golden.check("loss", loss)
    loss.backward()
    found = export_state(layout, config, gradients(model))
    golden.check_gradients({name.removeprefix(prefix): gradient for name, gradient in found.items()})


# ------------------------------------------------------------------------------------------------ VQGAN


def vqgan_config(golden: Golden) -> VqganConfig:
    """Without a word of groups, as a user would write it."""
    told = golden.config["ddconfig"]
    config = VqganConfig(
        image_size=told["resolution"], channels=told["ch"], multipliers=tuple(told["ch_mult"]),
        attention_at=tuple(told["attn_resolutions"]), latent_channels=told["z_channels"],
        codebook_size=golden.config.get("n_embed", 4), code_width=golden.config.get("embed_dim", 4),
    )  # fmt: skip
    return config.model_copy(update={"res_blocks": told["num_res_blocks"]})  # one folder has none, to be small


@from_golden("vqgan_encoder")
def test_taming_encoder(golden: Golden) -> None:
    encoder = Encoder(vqgan_config(golden))
    encoder.load_state_dict(golden.weights)
    z = encoder(golden.inputs["images"])
    golden.check("z", z)
    waves(z).backward()
    golden.check_gradients(gradients(encoder))


@from_golden("vqgan_decoder")
def test_taming_decoder(golden: Golden) -> None:
    decoder = Decoder(vqgan_config(golden))
    decoder.load_state_dict(golden.weights)
    images = decoder(golden.inputs["z"])
    golden.check("images", images)
    waves(images).backward()
    golden.check_gradients(gradients(decoder))


@from_golden("vqgan_blocks")
def test_taming_blocks(golden: Golden) -> None:
    a, b = golden.config["a"], golden.config["b"]
    blocks = nn.ModuleDict(
        {"resnet": ResBlock(a, b, 32), "attn": AttnBlock(b, 32), "down": Downsample(a), "up": Upsample(a)}
    )
    blocks.load_state_dict(golden.weights)
    x = golden.inputs["x"]
    found = {"resnet": blocks["resnet"](x), "down": blocks["down"](x), "up": blocks["up"](x)}
    found["attn"] = blocks["attn"](found["resnet"])
    for name, value in found.items():
        golden.check(name, value)
    (waves(found["attn"]) + waves(found["down"]) + waves(found["up"])).backward()
    golden.check_gradients(gradients(blocks))


@from_golden("vq_quantizer_legacy", "vq_quantizer_fixed")
def test_taming_quantizer(golden: Golden) -> None:
    told = golden.config
    quantize = Codebook(told["n_e"], told["e_dim"])
    quantize.load_state_dict({name.removeprefix("quantize."): rows for name, rows in golden.weights.items()})
    z = golden.inputs["z"].requires_grad_()
    found = quantize(z)
    of_codebook = codebook_loss(found.latents, found.nearest, told["beta"], told["legacy"])
    golden.check("zq", found.output)
    golden.check("indices", found.codes.flatten())
    golden.check("codebook_loss", of_codebook)
    loss = of_codebook + waves(found.output)
    golden.check("loss", loss)
    loss.backward()
    assert z.grad is not None
    golden.check("grad_input.z", z.grad)
    golden.check_gradients({f"quantize.{name}": gradient for name, gradient in gradients(quantize).items()})


@from_golden("vqmodel")
def test_taming_vqgan(golden: Golden) -> None:
    config = vqgan_config(golden)
    model = Vqgan(config)
    model.load_state_dict(import_state("taming-vqgan", config, golden.weights))
    images = golden.inputs["images"]
    reconstruction, quantised = model(images)
    golden.check("pre_quant", model.quant_conv(model.encoder(images)))
    golden.check("quant", quantised.output)
    golden.check("indices", quantised.codes.flatten())
    golden.check("reconstruction", reconstruction)
    of_codebook = codebook_loss(quantised.latents, quantised.nearest, 0.25, legacy=True)
    golden.check("codebook_loss", of_codebook)
    loss = (images - reconstruction).abs().mean() + of_codebook
    golden.check("loss", loss)
    loss.backward()
    golden.check_gradients(export_state("taming-vqgan", config, gradients(model)))


@from_golden("vqmodel")
@pytest.mark.parametrize("change", [{"norm_groups": "width/4"}, {"norm_groups": 16}, {"local_encoder": True}])
def test_what_the_layout_of_taming_fixes_otherwise_is_refused_by_name(golden: Golden, change: dict[str, Any]) -> None:
    config = vqgan_config(golden).model_copy(update=change)
    name, value = next(iter(change.items()))
    for convert in (import_state, export_state):
        with pytest.raises(DataError, match=f"{name}={value}"):
            convert("taming-vqgan", config, golden.weights)
