"""Every importer against golden/: what the published implementations computed on weights of their own layout."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import DataError
from pretrain.interchange.layouts import export_state, import_state
from tests.golden.claims import CLAIMS, claim_of, easynlp_gpt, vqgan_config
from tests.golden.fixture import Golden, compare


@pytest.mark.parametrize("name", CLAIMS)
def test_every_array_of_a_fixture_is_what_ours_computes(name: str, shared: Path) -> None:
    compared = CLAIMS[name](Golden(shared / "golden" / name))
    assert len(compared) > 4 and [array for array in compared if not array.agrees] == []


def test_easynlps_whole_file_is_read_as_its_gpt_alone(shared: Path) -> None:
    assert all(
        array.agrees for array in easynlp_gpt(Golden(shared / "golden" / "easynlp_text2image_gpt"), "easynlp-gpt")
    )


@pytest.mark.parametrize("change", [{"norm_groups": "width/4"}, {"norm_groups": 16}, {"local_encoder": True}])
def test_what_the_layout_of_taming_fixes_otherwise_is_refused_by_name(change: dict[str, Any], shared: Path) -> None:
    golden = Golden(shared / "golden" / "vqmodel")
    config = vqgan_config(golden).model_copy(update=change)
    name, value = next(iter(change.items()))
    for convert in (import_state, export_state):
        with pytest.raises(DataError, match=f"{name}={value}"):
            convert("taming-vqgan", config, golden.weights)


# --------------------------------------------------------------------------------- python -m tests.golden


def compared_by_command(repository: Path, *folders: Path) -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.golden", *map(str, folders)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_tells_what_agrees_what_differs_and_what_nobody_claims(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    """A fixture of another name that begins alike, one with a weight and one with an array changed, one unclaimed."""
    source = shared / "golden" / "vq_quantizer_fixed"
    folders = {name: tmp_path / name for name in ("vq_quantizer_fixed_2", "vq_quantizer_fixed_3", "vq_nobodys")}
    for folder in folders.values():
        shutil.copytree(source, folder, copy_function=shutil.copyfile)
    code, told = compared_by_command(repository, folders["vq_quantizer_fixed_2"])
    assert code == 0 and "vq_quantizer_fixed_2: 7 of 7 arrays agree" in told
    code, told = compared_by_command(repository, folders["vq_nobodys"], folders["vq_quantizer_fixed_2"])
    assert code == 2 and "vq_nobodys: no family claims it yet" in told and "7 of 7 arrays agree" in told
    arrays = load_file(source / "outputs.safetensors") | {"more": torch.ones(2)}
    arrays["zq"] = arrays["zq"] + 1e-3
    save_file(arrays, folders["vq_quantizer_fixed_3"] / "outputs.safetensors")
    code, told = compared_by_command(repository, *folders.values())
    assert code == 1 and re.search(r"zq: 0.001 .at most 1\.\d+e-05.  DIFFERS", told)
    assert "more: inf (at most 1e-05)  DIFFERS" in told and "vq_quantizer_fixed_3: 6 of 8 arrays agree" in told


@pytest.mark.parametrize(
    ("wanted", "found", "agrees"),
    [
        ([1.0, 100.0], [1.0, 100.0009], True),
        ([1.0, 100.0], [1.0, 100.0011], False),
        ([0.0, 0.1], [0.0, 0.10001], True),
        ([0.0, 0.1], [0.0, 0.10002], False),
        ([float("inf"), 1.0], [float("inf"), 1.0], True),
        ([-float("inf"), 1.0], [float("inf"), 1.0], False),
        ([1.0], [float("nan")], False),
        ([1.0], [1.0, 1.0], False),
        ([], [], True),
    ],
)
def test_arrays_agree_to_a_share_of_the_largest_value(wanted: list[float], found: list[float], agrees: bool) -> None:
    assert compare("x", torch.tensor(wanted), torch.tensor(found)).agrees is agrees
    assert not compare("x", torch.tensor(wanted), None).agrees


def test_whole_numbers_are_the_same_or_are_not() -> None:
    ids = torch.tensor([1, 2])
    assert compare("x", ids, ids.int()).agrees and not compare("x", ids, torch.tensor([1, 3])).agrees


def test_the_longest_beginning_claims_a_fixture() -> None:
    assert claim_of("vqgan_encoder_held_out") is CLAIMS["vqgan_encoder"] and claim_of("vqgan_loss") is None
    assert claim_of("clip_resnet") is None and claim_of("clip_vit") is CLAIMS["clip_vit"]
