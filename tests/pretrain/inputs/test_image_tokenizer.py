"""An exported VQGAN as the tokenizer of the data pipeline."""

import json

import numpy as np
import pytest
import torch

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.codes import ImageTokenizer
from pretrain.inputs.image_tokenizer import CHUNK, VqganTokenizer, load_tokenizer, load_tokenizer_of
from pretrain.inputs.pixels import to_tensor
from pretrain.interchange.folder import export_model
from pretrain.models.gpt import Gpt
from pretrain.models.vqgan import Vqgan
from pretrain.schema.gpt import GptConfig
from pretrain.schema.vqgan import VqganConfig

SMALL = VqganConfig(
    image_size=16, channels=16, multipliers=(1, 2, 2), res_blocks=1, attention_at=(),
    latent_channels=8, codebook_size=20, code_width=4,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (CHUNK + 5, 16, 16, 3)).astype(np.uint8)


def model(seed: int = 0) -> Vqgan:
    torch.manual_seed(seed)
    made = Vqgan(SMALL)
    torch.nn.init.normal_(made.quantize.embedding.weight, std=0.3)
    return made


def test_an_exported_folder_is_a_tokenizer_with_the_same_codes(tmp_path):
    made = model()
    export_model(tmp_path, SMALL, made.state_dict())
    tokenizer: ImageTokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.image_size, tokenizer.codes_per_image, tokenizer.codebook_size) == (16, 16, 20)
    assert tokenizer.id == VqganTokenizer(made).id and len(tokenizer.id) == 12
    assert np.array_equal(tokenizer.encode(IMAGES), VqganTokenizer(made).encode(IMAGES))


def test_codes_and_pictures_are_those_of_the_model():
    made, tokenizer = model(), VqganTokenizer(model())
    codes = tokenizer.encode(IMAGES)
    with torch.no_grad():
        wanted = made.eval().encode(to_tensor(IMAGES))
    assert codes.dtype == np.uint16 and (codes == wanted.numpy()).mean() > 0.99 and len(np.unique(codes)) > 3
    pictures = tokenizer.decode(codes)
    assert pictures.shape == IMAGES.shape and pictures.dtype == np.uint8


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_codes_of_an_image_do_not_depend_on_what_stands_beside_it(precision):
    tokenizer = VqganTokenizer(model(), precision)
    whole = tokenizer.encode(IMAGES)
    pieces = [tokenizer.encode(IMAGES[start : start + size]) for start, size in ((0, 1), (1, 7), (8, CHUNK - 3))]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(whole[::-1], tokenizer.encode(IMAGES[::-1].copy()))


def test_the_id_changes_with_weights_configuration_and_precision():
    ids = [VqganTokenizer(model(0)).id, VqganTokenizer(model(1)).id, VqganTokenizer(model(0), "bf16").id]
    torch.manual_seed(0)
    ids.append(VqganTokenizer(Vqgan(SMALL.model_copy(update={"image_size": 32}))).id)
    assert len(set(ids)) == 4 and VqganTokenizer(model(0)).id == ids[0]


def test_no_images_give_no_codes():
    tokenizer = VqganTokenizer(model())
    codes = tokenizer.encode(IMAGES[:0])
    assert codes.shape == (0, 16) and tokenizer.decode(codes).shape == (0, 16, 16, 3)


def test_what_does_not_fit_is_refused(tmp_path):
    tokenizer = VqganTokenizer(model())
    with pytest.raises(DataError, match=r"resize to uint8 \[B, 16, 16, 3\]"):
        tokenizer.encode(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(DataError, match="below 20"):
        tokenizer.decode(np.full((1, 16), 20, np.uint16))
    config = GptConfig(text_vocab=5, image_vocab=4, text_tokens=2, image_tokens=4, layers=1, width=8, heads=1)
    export_model(tmp_path, config, Gpt(config).state_dict())
    with pytest.raises(ConfigError, match="holds a gpt, an image tokenizer must be a vqgan"):
        load_tokenizer(tmp_path)


def test_the_run_of_a_tokenizer_in_place_of_its_export_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": SMALL.model_dump(mode="json"), "train": {}}))
    with pytest.raises(ConfigError, match="is a run, not an exported model; .*`tessera checkpoint export`"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_codes_are_the_nearest_rows_in_float32_whatever_the_network_runs_in(precision):
    made, tokenizer = model(), VqganTokenizer(model(), precision)
    found = tokenizer.encode(IMAGES[:CHUNK])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        latents = made.eval().quant_conv(made.encoder(to_tensor(IMAGES[:CHUNK])))
    assert latents.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    table = made.quantize.embedding.weight.detach().double().numpy()
    nearest = np.empty_like(found)
    for image, grid in enumerate(latents.double().numpy()):
        for place in range(grid.shape[1] * grid.shape[2]):
            vector = grid[:, place // grid.shape[2], place % grid.shape[2]]
            nearest[image, place] = min(range(len(table)), key=lambda row: ((vector - table[row]) ** 2).sum())
    assert (found == nearest).mean() > 0.999


def test_a_tokenizer_is_opened_in_the_precision_that_made_the_codes(tmp_path):
    made = model()
    export_model(tmp_path, SMALL, made.state_dict())
    ids = {precision: VqganTokenizer(made, precision).id for precision in ("fp32", "bf16")}
    for there, wanted in [([], "fp32"), ([ids["bf16"]], "bf16"), (list(ids.values()), "fp32"), (["f" * 12], "fp32")]:
        opened = load_tokenizer_of(tmp_path, there.__contains__)
        assert (opened.id, opened.precision) == (ids[wanted], wanted)
