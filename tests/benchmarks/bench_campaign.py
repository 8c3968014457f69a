"""The kill campaign over tiny runs of every family: a model so small that an attempt is mostly its start.

python tests/benchmarks/bench_campaign.py FOLDER FAMILY --kills 70 --seed 1         clip, electra or gpt; a local folder
python tests/benchmarks/bench_campaign.py FOLDER FAMILY --kills 30 --seed 2 --s3    checkpoints on a Ceph gateway

Two processes, ZeRO-3, dropout in ELECTRA. FOLDER keeps data, recipes and runs; what `tessera chaos` prints and
leaves with is passed on. It wants a machine of its own: an attempt takes some seconds of two cores.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gateway import CREDENTIALS, start_gateway  # noqa: E402
from tests.pretrain.commands import Material, clip, command, electra, environment, recipe, vqgan  # noqa: E402

SCENES, PIECES = 400, 200
STEPS_A_KILL = 3


def made(*arguments: str | Path) -> None:
    subprocess.run(command(*arguments), env=environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def material_in(folder: Path) -> Material:
    """Scenes, a vocabulary, and codes by a tokenizer with random weights; made once."""
    data, vocabulary, tokenizer = folder / "scenes", folder / "vocab" / "vocab.model", folder / "tokenizer"
    if not (folder / "ready").exists():
        build = {"source": {"kind": "scenes", "count": SCENES, "seed": 0}, "output": str(data), "shard_size": 100}
        made("data", "build", recipe(build, folder / "build.yaml"), "--json")
        words = {"dataset": str(data), "output": str(folder / "vocab"), "size": PIECES, "kind": "bpe"}
        made("vocab", "train", recipe(words | {"character_coverage": 1.0}, folder / "vocab.yaml"), "--json")
        export_tokenizer(Material(data, vocabulary), tokenizer)
        made("data", "encode", data, "--image-tokenizer", tokenizer, "--json")
        (folder / "ready").touch()
    return Material(data, vocabulary)


def export_tokenizer(material: Material, folder: Path) -> None:
    import torch

    from data_pipeline.settings import check_settings
    from pretrain.config import RunConfig
    from pretrain.interchange.folder import export_model
    from pretrain.models import MODELS

    torch.manual_seed(0)
    config = check_settings(RunConfig, vqgan(material, folder), "tokenizer").model
    export_model(folder, config, MODELS["vqgan"](config).state_dict())


def gpt(material: Material, run: Path, **train: Any) -> dict[str, Any]:
    """A run of a tiny text-to-image GPT over codes."""
    model = {"kind": "gpt", "text_vocab": PIECES, "image_vocab": 32, "text_tokens": 8, "image_tokens": 64}
    tree = electra(material, run, **train)
    tree["data"]["image_tokenizer"] = str(run.parent / "tokenizer")
    return tree | {
        "model": model | {"layers": 2, "width": 32, "heads": 2},
        "task": {"kind": "autoregressive", "caption_drop": 0.1},
    }


FAMILIES: dict[str, Callable[..., dict[str, Any]]] = {"clip": clip, "electra": electra, "gpt": gpt}


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """-> a bucket on a gateway of its own, and the environment that leads there."""
    gateway = start_gateway(folder)
    try:
        yield f"s3://{gateway.make_bucket()}", {**CREDENTIALS, "AWS_ENDPOINT_URL": gateway.endpoint}
    finally:
        gateway.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("--kills", type=int, default=70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--s3", action="store_true")
    options = parser.parse_args()
    folder = options.folder.resolve()
    steps = max(20, STEPS_A_KILL * options.kills)
    name = f"{options.family}{'-s3' if options.s3 else ''}"
    tree = FAMILIES[options.family](material_in(folder), folder / name, steps=steps, checkpoint_every_steps=4)
    argv = command("chaos", recipe(tree, folder / f"{name}.yaml"), "--kills", options.kills, "--seed", options.seed)
    with s3(folder / f"ceph-{name}-{options.seed}") if options.s3 else contextlib.nullcontext(("", {})) as place:
        elsewhere = [f"train.checkpoints={place[0]}/{name}"] if options.s3 else []
        done = subprocess.run([*argv, *elsewhere], env=environment(**place[1]), cwd=ROOT)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
