"""GPT and VQGAN against transformers at random initialisation, and every image layout there and back."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.modeling_janus import JanusVQVAE

from data_pipeline.errors import DataError
from pretrain.interchange.hub import export_layout
from pretrain.interchange.layouts import export_state, import_state
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import Vqgan
from pretrain.schema.gpt import GptConfig
from pretrain.schema.tasks import AutoregressiveConfig
from pretrain.schema.vqgan import VqganConfig
from pretrain.tasks.autoregressive import Autoregressive
from pretrain.tasks.collectives import ONE_DEVICE
from pretrain.tasks.reconstruction import codebook_loss

GPT = GptConfig(text_vocab=11, image_vocab=13, text_tokens=4, image_tokens=6, layers=2, width=16, heads=2)
VQGAN = VqganConfig(
    image_size=8, channels=128, multipliers=(1, 2), res_blocks=1, attention_at=(8,),
    latent_channels=16, codebook_size=12, code_width=8,
)  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + (0.5 if parameter.ndim == 1 else 0)
    return model


def gpt2(activation: str = "gelu", eps: float = 1e-5) -> nn.Module:
    sizes = {"vocab_size": 24, "n_positions": 10, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    numbers = {"activation_function": activation, "layer_norm_epsilon": eps}
    config = transformers.GPT2Config(**sizes, **dropouts, **numbers, tie_word_embeddings=False)
    return randomise(transformers.GPT2LMHeadModel(config))


def ours_from(reference: nn.Module, config: GptConfig = GPT) -> Gpt:
    model = Gpt(config)
    model.load_state_dict(import_state("transformers-gpt2", config, reference.state_dict()))
    return model


def gpt_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 11, (3, 4), generator=generator)
    return {"text": text, "codes": torch.randint(0, 13, (3, 6), generator=generator)}


def reference_logits(reference: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The whole vocabulary everywhere, cut to the image part at the image places."""
    tokens = torch.cat([batch["text"] + 13, batch["codes"]], 1)[:, :-1]
    return reference(tokens).logits[:, 3:, :13]


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).detach().abs().max() <= 1e-5 * max(1.0, float(theirs.detach().abs().max())))


def test_gpt_logits_loss_and_every_gradient_equal_gpt2():
    reference, batch = gpt2(), gpt_batch()
    objective = Autoregressive(ours_from(reference), AutoregressiveConfig(), ONE_DEVICE)
    logits = reference_logits(reference, batch)
    loss = F.cross_entropy(logits.reshape(-1, 13), batch["codes"].reshape(-1))
    ours = objective(batch)["loss"]
    loss.backward(), ours.backward()
    assert close(objective.model(batch["text"], batch["codes"]), logits) and close(ours, loss)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    wanted = import_state("transformers-gpt2", GPT, theirs)
    assert all(close(p.grad, wanted[name]) for name, p in objective.model.named_parameters())


@pytest.mark.parametrize(("activation", "eps"), [("gelu_new", 1e-5), ("relu", 0.1), ("gelu", 1e-2)])
def test_gpt_has_the_activation_and_epsilon_of_its_configuration(activation: str, eps: float) -> None:
    reference, batch = gpt2(activation, eps), gpt_batch()
    config = GPT.model_copy(update={"activation": activation, "norm_eps": eps})
    logits, model = reference_logits(reference, batch), ours_from(reference, config)
    assert close(model(batch["text"], batch["codes"]), logits)
    assert not close(ours_from(reference)(batch["text"], batch["codes"]), logits)
    for layout in ("mingpt", "easynlp-gpt"):
        with pytest.raises(DataError, match=f"programs of layout '{layout}' have"):
            export_state(layout, config, model.state_dict())


def test_gpt_stays_equal_over_three_optimizer_steps():
    reference, batch = gpt2(), gpt_batch()
    model = ours_from(reference)
    theirs, ours = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (reference, model))
    for _ in range(3):
        for optimizer, logits in (
            (theirs, reference_logits(reference, batch)),
            (ours, model(batch["text"], batch["codes"])),
        ):
            optimizer.zero_grad()
            F.cross_entropy(logits.reshape(-1, 13), batch["codes"].reshape(-1)).backward()
            optimizer.step()
    assert close(model(batch["text"], batch["codes"]), reference_logits(reference, batch))


def test_an_exported_gpt_computes_the_same_in_gpt2():
    model, batch = randomise(Gpt(GPT)), gpt_batch()
    reference = gpt2()
    reference.load_state_dict(export_state("transformers-gpt2", GPT, model.state_dict()))
    assert close(reference_logits(reference, batch), model(batch["text"], batch["codes"]))


# ------------------------------------------------------------------------------------------- VQGAN


def chameleon() -> nn.Module:
    config = transformers.ChameleonVQVAEConfig(
        embed_dim=8, num_embeddings=12, latent_channels=16, resolution=8, base_channels=128,
        channel_multiplier=[1, 2], num_res_blocks=1, attn_resolutions=[8],
    )  # fmt: skip
    return randomise(ChameleonVQVAE(config))


def vqgan_from(reference: nn.Module) -> Vqgan:
    model = Vqgan(VQGAN)
    model.load_state_dict(model.state_dict() | reference.state_dict())
    return model


def test_the_encoder_and_quantiser_have_the_names_of_the_reference():
    ours = {name for name in Vqgan(VQGAN).state_dict() if not name.startswith("decoder.")}
    assert ours == set(chameleon().state_dict())


def test_encoder_codes_codebook_loss_and_every_gradient_equal_chameleon():
    reference = chameleon()
    model, pixels = vqgan_from(reference), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    theirs = reference.encode(pixels)
    ours = model.quantize(model.quant_conv(model.encoder(pixels)))
    loss = codebook_loss(ours.latents, ours.nearest, commitment=0.25, legacy=True)
    assert torch.equal(ours.codes.flatten(), theirs.image_tokens.flatten())
    assert close(ours.output, theirs.quantized_last_hidden_state) and close(loss, theirs.embedding_loss)
    (theirs.embedding_loss + theirs.quantized_last_hidden_state.square().sum()).backward()
    (loss + ours.output.square().sum()).backward()
    wanted = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert len(wanted) > 30
    assert all(close(p.grad, wanted[name]) for name, p in model.named_parameters() if name in wanted)


def test_the_decoder_is_built_of_the_blocks_that_the_reference_confirms():
    model = vqgan_from(chameleon())
    x, decoder = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3)), model.decoder
    h = decoder.mid.block_2(decoder.mid.attn_1(decoder.mid.block_1(decoder.conv_in(x))))
    for block in decoder.up[1].block:
        h = block(h)
    h = decoder.up[1].upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    for block, attention in zip(decoder.up[0].block, decoder.up[0].attn, strict=True):
        h = attention(block(h))
    normed = F.group_norm(h, 32, decoder.norm_out.weight, decoder.norm_out.bias, 1e-6)
    assert close(decoder(x), decoder.conv_out(normed * normed.sigmoid()))


def janus() -> tuple[nn.Module, VqganConfig]:
    """A whole VQGAN, decoder and all; its attention stands at the smallest side alone."""
    config = transformers.models.janus.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=12, latent_channels=16, base_channels=128, channel_multiplier=[1, 1, 2],
        num_res_blocks=1,
    )  # fmt: skip
    ours = VQGAN.model_copy(update={"image_size": 8, "multipliers": (1, 1, 2), "attention_at": (2,)})
    return randomise(JanusVQVAE(config)), ours


def by_the_finest_side(name: str) -> str:
    """Its name for ours: `decoder.up` there begins with the smallest of the three sides."""
    front, up, rest = name.partition("decoder.up.")
    return f"{front}{up}{2 - int(rest[0])}{rest[1:]}" if up else name


def test_the_whole_vqgan_its_loss_and_every_gradient_equal_janus():
    reference, config = janus()
    model, pixels = Vqgan(config), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model.load_state_dict({by_the_finest_side(name): tensor for name, tensor in reference.state_dict().items()})
    encoded = reference.encode(pixels)
    # its own `decode` puts every code on the unit sphere first, as Janus was trained
    theirs = reference.decoder(reference.post_quant_conv(encoded.quantized_last_hidden_state))
    reconstruction, ours = model(pixels)
    loss = codebook_loss(ours.latents, ours.nearest, commitment=0.25, legacy=True)
    assert torch.equal(ours.codes.flatten(), encoded.image_tokens.flatten())
    assert close(reconstruction, theirs) and close(loss, encoded.embedding_loss)
    (encoded.embedding_loss + (theirs - pixels).abs().mean()).backward()
    (loss + (reconstruction - pixels).abs().mean()).backward()
    wanted = {by_the_finest_side(name): p.grad for name, p in reference.named_parameters()}
    found = dict(model.named_parameters())
    assert wanted.keys() == found.keys() and all(close(p.grad, wanted[name]) for name, p in found.items())


# ------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layout", "config"),
    [("mingpt", GPT), ("easynlp-gpt", GPT), ("transformers-gpt2", GPT), ("taming-vqgan", VQGAN)],
)
def test_every_layout_goes_there_and_back(layout, config):
    state = randomise({"gpt": Gpt, "vqgan": Vqgan}[config.kind](config)).state_dict()
    back = import_state(layout, config, export_state(layout, config, state))
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_taming_file_is_read_without_its_losses():
    state = Vqgan(VQGAN).state_dict()
    assert import_state("taming-vqgan", VQGAN, state | {"loss.logvar": torch.zeros(1)}).keys() == state.keys()


def test_an_easynlp_file_is_read_without_its_vqgan():
    file = export_state("easynlp-gpt", GPT, Gpt(GPT).state_dict())
    file |= {"first_stage_model.quant_conv.bias": torch.zeros(1), "transformer.blocks.0.attn.mask": torch.ones(1)}
    assert import_state("easynlp-gpt", GPT, file).keys() == Gpt(GPT).state_dict().keys()


def test_a_wrong_layout_names_the_missing_keys():
    with pytest.raises(DataError, match=r"37 missing: blocks\.0\.attn\.key\.bias"):
        import_state("mingpt", GPT, {})


def test_an_exported_gpt_is_one_that_from_pretrained_takes(tmp_path):
    model = randomise(Gpt(GPT)).eval()
    export_layout(tmp_path, "transformers-gpt2", GPT, model.state_dict())
    theirs, told = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    text, codes = torch.randint(11, (2, 4)), torch.randint(13, (2, 6))
    logits = theirs.eval()(input_ids=torch.cat([text + 13, codes[:, :-1]], 1)).logits[:, -6:, :13]
    torch.testing.assert_close(model(text, codes), logits, rtol=1e-4, atol=1e-5)
