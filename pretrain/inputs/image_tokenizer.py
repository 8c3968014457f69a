"""An exported VQGAN as the image tokenizer of the data pipeline: uint8 pixels <-> uint16 codes.

Images are encoded in chunks of a fixed size, the last one padded with zeros, so that the result for an image does not
depend on the number of images in the batch. Letters: B images, S image side, I codes per image.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError, DataError
from pretrain.inputs.pixels import to_images, to_tensor
from pretrain.interchange.folder import load_model
from pretrain.models.vqgan import Vqgan
from pretrain.schema.vqgan import MIDDLE, VqganConfig

CHUNK = 32
PREPROCESSING = "rgb/127.5-1"
Precision = Literal["bf16", "fp32"]


def load_tokenizer(directory: str | Path, precision: Precision = "fp32", device: str = "cpu") -> "VqganTokenizer":
    """Load the tokenizer from an exported folder. Raises DataError if there is none, ConfigError if it is no VQGAN."""
    model, config = load_model(directory)
    if not isinstance(model, Vqgan) or not isinstance(config, VqganConfig):
        raise ConfigError(
            f"{directory} holds a {config.kind}, an image tokenizer must be a vqgan; export one and use its folder"
        )
    return VqganTokenizer(model, precision, device)


def load_tokenizer_of(
    directory: str | Path, is_there: Callable[[str], object], device: str = "cpu"
) -> "VqganTokenizer":
    """Load the tokenizer in bf16 if codes with its bf16 id exist and none with its fp32 id, otherwise in fp32."""
    tokenizer = load_tokenizer(directory, "fp32", device)
    if not is_there(tokenizer.id) and is_there(tokenizer_id(tokenizer.model, "bf16")):
        return VqganTokenizer(tokenizer.model, "bf16", device)
    return tokenizer


class VqganTokenizer:
    """ImageTokenizer of data_pipeline.shards.codes. The network runs in `precision`, the argmin always in float32.

    bf16 is about twice as fast, but gives other codes where two codebook rows are almost equally close: 4 in 100 of the
    demo's codes. The precision is part of the id.
    """

    def __init__(self, model: Vqgan, precision: Precision = "fp32", device: str = "cpu") -> None:
        self.id = tokenizer_id(model, precision)
        self.image_size = model.config.image_size
        self.codes_per_image = model.config.grid**2
        self.codebook_size = model.config.codebook_size
        self.precision = precision
        self.device = torch.device(device)
        # On a CPU channels-last is an eighth slower (f16 at 256 px: 1.50 s of CPU time per image, else 1.35 s).
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model: Vqgan = model.eval().to(device=self.device, memory_format=layout)  # type: ignore[call-overload]

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> uint16 [B, I]. Raises DataError for another shape or dtype."""
        if images.ndim != 4 or images.shape[1:] != (self.image_size, self.image_size, 3) or images.dtype != np.uint8:
            raise DataError(
                f"images of {images.dtype} {list(images.shape)} do not fit tokenizer {self.id}; "
                f"resize to uint8 [B, {self.image_size}, {self.image_size}, 3]"
            )
        codes = self._in_chunks(to_tensor(images), self.model.encode)
        return codes.cpu().numpy().astype(np.uint16)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint16 [B, I] -> uint8 [B, S, S, 3]. Raises DataError for another shape or for codes outside the codebook."""
        if codes.ndim != 2 or codes.shape[1] != self.codes_per_image or codes.max(initial=0) >= self.codebook_size:
            raise DataError(
                f"codes of shape {list(codes.shape)} up to {codes.max(initial=0)} do not fit tokenizer {self.id}: "
                f"[B, {self.codes_per_image}] below {self.codebook_size}; decode with the tokenizer that made them"
            )
        return to_images(self._in_chunks(torch.from_numpy(codes.astype(np.int64)), self.model.decode))

    @torch.no_grad()
    def _in_chunks(self, rows: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `function` to [B, ...] in chunks of CHUNK rows, for any B including 0."""
        results = []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            for start in range(0, max(1, len(rows)), CHUNK):
                chunk = rows[start : start + CHUNK]
                filling = chunk.new_zeros(CHUNK - len(chunk), *chunk.shape[1:])
                results.append(function(torch.cat([chunk, filling]).to(self.device))[: len(chunk)])
        return torch.cat(results)


def tokenizer_id(model: Vqgan, precision: Precision) -> str:
    """Return 12 hex digits over configuration, weights, preprocessing and precision, all that determines the codes."""
    digest = hashlib.sha256(f"{_settings_text(model.config)} {PREPROCESSING} {precision}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _settings_text(config: VqganConfig) -> str:
    """Return the configuration as canonical JSON, as earlier versions wrote it, so that ids do not change.

    Omits `norm_groups` where it has the value that was fixed before the field existed. Writes attention "middle" as a
    side that no level has: usually the default, 16.
    """
    as_before = config.group_counts() == config.group_counts("width/4")
    tree = config.model_dump(mode="json", exclude={"norm_groups"} if as_before else set())
    if config.attention_at == (MIDDLE,):
        tree["attention_at"] = [16]
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)
