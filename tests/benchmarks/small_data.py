"""A few hundred images: gain of fine-tuning on them over no training, with recipes/small.yaml.

For every seed: a dense model from recipes/digits-in-the-wild.yaml and class folders of such images, few for training
and many for validation, with other glyphs and photographs. All rows of a seed use the same validation images.

evit-deploy train recipes/digits-in-the-wild.yaml --set seed=0 --out runs/wild-0        # and 1, 2
python tests/benchmarks/small_data.py runs/wild-{0,1,2}/dense.safetensors --out docs/results/small_data.json
"""

import argparse
import logging
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import save
from PIL import Image

from evit_deploy import load_recipe
from evit_deploy.data.training.digits.wild_digits import Split, WildDigits
from evit_deploy.training.compare import DENSE_NAME, finetuned_name, untrained_name
from evit_deploy.training.loop import train


def class_folders(root: Path, split: Split, count: int, seed: int, name: str, size: int = 64) -> None:
    """Writes images as ``<name><class>/<number>.png``."""
    images = WildDigits(split, count, size, seed=seed)
    for number in range(count):
        pixels, label = images[number]
        path = root / f"{name}{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(path)


def measure(checkpoint: Path, seed: int, rate: float, arguments: Any, work: Path) -> dict[str, Any]:
    """One fine-tune and its baseline."""
    overrides = [
        f"seed={seed}", f"model.checkpoint={checkpoint}", f"data.train={work / 'train'}",
        f"data.validation={work / 'validation'}", "data.workers=0", f"tokens.keep_rate={rate}",
        "data.flip=0", "data.crop=[1,1]", "data.color_jitter=0",  # these digits are aligned with the patch grid
        "finetune.evaluate_every=null", "finetune.threads=1", *arguments.overrides,
    ]  # fmt: skip
    new = ["dense.evaluate_every=null", "dense.threads=1"]
    overrides += new if arguments.new_classes else ["dense=null"]
    recipe = load_recipe("recipes/small.yaml", overrides)
    started = time.perf_counter()
    result = train(recipe, work / f"run-{rate:g}", device="cpu")
    top1 = {row.name: row.top1 for row in result.report.accuracy}
    found = {"dense": top1[DENSE_NAME], "untrained": top1[untrained_name(recipe.tokens)],
             "finetuned": top1[finetuned_name(recipe.tokens)]}  # fmt: skip
    return {"seed": seed, "keep_rate": rate, "seconds": time.perf_counter() - started, **found,
            "cpu_seconds": result.cpu_seconds["finetune"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="one dense model a seed, from 0 on")
    parser.add_argument("--images", type=int, default=300, help="to train on")
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--keep-rates", nargs="+", type=float, default=[0.7, 0.5])
    parser.add_argument("--new-classes", action="store_true", help="under names that the model does not know")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    rows = []
    for seed, checkpoint in enumerate(arguments.checkpoints):
        with TemporaryDirectory() as folder:
            work = Path(folder)
            name = "digit " if arguments.new_classes else ""
            class_folders(work / "train", "train", arguments.images, 1000 + seed, name)
            class_folders(work / "validation", "test", arguments.test_images, 0, name)
            for rate in arguments.keep_rates:
                rows.append(measure(checkpoint, seed, rate, arguments, work))
                print(rows[-1])
                save(arguments.out, rows)
    for rate in arguments.keep_rates:
        mine = [row for row in rows if row["keep_rate"] == rate]
        parts = {key: [100 * row[key] for row in mine] for key in ("dense", "untrained", "finetuned")}
        parts["gain"] = [b - a for a, b in zip(parts["untrained"], parts["finetuned"], strict=True)]
        texts = (
            f"{key} {statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"
            for key, values in parts.items()
        )
        print(f"keep rate {rate:g}: " + ", ".join(texts))


if __name__ == "__main__":
    main()
