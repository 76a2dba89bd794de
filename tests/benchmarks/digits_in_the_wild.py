"""The paper's comparison on digits in the wild: reduced tokens untrained, from the oracle and from scratch.

For every seed: a dense model; its weights with tokens reduced by EViT, at random and inversely at equal counts, with
and without fusion; EViT fine-tuned from it (the oracle); the dense model trained for as many more steps, the fair
baseline of a fine-tuned one; EViT from scratch. All use the same test images, so differences are paired. Models that
exist in the folder are not trained again, so an interrupted run continues.

python tests/benchmarks/digits_in_the_wild.py --seeds 0 1 2 --out docs/results/digits_in_the_wild.json
"""

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import save
from safetensors.torch import load_file, save_file

from evit_deploy import load_recipe, reduce_tokens_, token_plan
from evit_deploy.data.training.training_data import curriculum_of
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.report.statistics import difference
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.training.compare import evaluate_each, with_method
from evit_deploy.training.loop import Stage, fit
from evit_deploy.training.setup import setup

RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
Model = dict[str, Any]


class Table:
    """Rows of one seed, each with the correctly classified images; stored in a folder."""

    def __init__(self, folder: Path, seed: int, rows: list[Model], written: Callable[[], None], only: bool) -> None:
        self.folder, self.seed, self.rows, self.written, self.only = folder / str(seed), seed, rows, written, only
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, what: Model, make: Callable[[], Any], data: Any, against: Model | None = None) -> None:
        file = self._file(what)
        if not file.exists() and self.only:
            return
        if not file.exists():
            model = make()
            _, right = evaluate_each(model, data, 64, file.stem)
            np.save(file, right)
            (self.folder / f"{file.stem}.gmacs").write_text(str(token_plan(model).macs() / 1e9))
        right = np.load(file)
        row = {"seed": self.seed, **what, "top1": float(right.mean()), "images": len(right),
               "gmacs": float((self.folder / f"{file.stem}.gmacs").read_text())}  # fmt: skip
        for name, other in (("dense", {"start": "dense"}), ("evit", against)):
            if other is not None:
                found = difference(name, right, np.load(self._file(other)))
                row[f"over {name}"] = [found.value, found.error]
        print(row, flush=True)
        self.rows.append(row)
        self.written()

    def weights(self, name: str, model: Any, train: Callable[[], None]) -> None:
        """Trains in place, unless a result exists."""
        file = self.folder / f"{name}.safetensors"
        if file.exists():
            model.load_state_dict(load_file(file))
        else:
            train()
            save_file(model.state_dict(), file)

    def _file(self, what: Model) -> Path:
        return self.folder / ("-".join(str(value) for value in what.values()) + ".npy")


class Seen:
    """The validation images, created once for all rows."""

    def __init__(self, data: Any) -> None:
        self._data, self._made = data, list(data.validation(64))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def validation(self, *_: Any, **__: Any) -> Iterator[Any]:
        return iter(self._made)


def one_seed(table: Table, recipe: Recipe, options: argparse.Namespace) -> None:
    torch.manual_seed(recipe.seed)
    fresh, _, opened = setup(recipe)
    data: Any = Seen(opened)
    dense_section, finetune = recipe.dense, recipe.finetune
    assert dense_section is not None
    first = copy.deepcopy(fresh)
    dense = fresh

    def train_dense() -> None:
        fit(dense, data, dense_section, seed=recipe.seed, stage=Stage("dense"), curriculum=curriculum_of(data))

    table.weights("dense", dense, train_dense)
    table.add({"start": "dense"}, lambda: dense, data)

    def spec(rate: float, fuse: bool) -> TokenSpec:
        return msgspec.structs.replace(recipe.tokens, keep_rate=rate, fuse=fuse)

    def trained(model: Any, wanted: TokenSpec, section: Any, seed: int, **others: Any) -> Any:
        torch.manual_seed(seed)
        reduce_tokens_(model, wanted)
        fit(model, data, section, seed=seed, **others)
        return model

    for rate in RATES:
        for fuse in (True, False):
            of = {"rate": rate, "fuse": fuse}
            own = {"start": "untrained", **of, "method": "evit"}
            for method in ("evit", "random", "inverse"):
                reduced = with_method(spec(rate, fuse), method)
                table.add({**own, "method": method}, lambda r=reduced: reduce_tokens_(copy.deepcopy(dense), r), data,
                          None if method == "evit" else own)  # fmt: skip

    def trained_on(wanted: TokenSpec) -> Any:
        return trained(copy.deepcopy(dense), wanted, finetune, recipe.seed + 1)

    table.add({"start": "dense, trained on"}, partial(trained_on, TokenSpec(keep_rate=1.0)), data)
    for rate in options.oracle:
        for fuse in (True, False):
            table.add({"start": "oracle", "rate": rate, "fuse": fuse}, partial(trained_on, spec(rate, fuse)), data)
    # The published schedule: the rate falls from epoch 10 to 110 of 300.
    per_epoch = data.steps_per_epoch(dense_section.batch_size)
    epochs = (dense_section.steps or 0) / per_epoch
    scratch = msgspec.structs.replace(dense_section, keep_rate_start=epochs / 30, keep_rate_epochs=epochs / 3)

    def from_scratch(wanted: TokenSpec) -> Any:
        return trained(copy.deepcopy(first), wanted, scratch, recipe.seed, curriculum=curriculum_of(data))

    for rate in options.scratch:
        for fuse in (True, False) if options.scratch_unfused else (True,):
            what = {"start": "scratch", "rate": rate, "fuse": fuse}
            table.add(what, partial(from_scratch, spec(rate, fuse)), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/digits-in-the-wild.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--oracle", type=float, nargs="*", default=RATES, help="keep rates to fine-tune at")
    parser.add_argument("--scratch", type=float, nargs="*", default=RATES, help="keep rates to train at from scratch")
    parser.add_argument("--scratch-unfused", action="store_true", help="from scratch without fusion too")
    parser.add_argument("--finished", action="store_true", help="train nothing: only what the folder already holds")
    parser.add_argument("--work", type=Path, default=Path("runs/comparison"), help="weights and answers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    options = parser.parse_args()
    rows: list[Model] = []
    for seed in options.seeds:
        table = Table(options.work, seed, rows, lambda: save(options.out, rows), options.finished)
        one_seed(table, load_recipe(options.recipe, (*options.overrides, f"seed={seed}")), options)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
