"""The methods on digits in the wild, at equal multiply-adds: off the shelf, fine-tuned, and from scratch.

For every seed: one dense model; its weights with each method, without training and after the recipe's fine-tuning;
Evo-ViT and EViT also trained from the dense model's initial weights. The two levels are the multiply-adds of EViT at
keep rates 0.7 and 0.5; every method uses the setting closest to them on a fine grid. All use the same test images, so
differences are paired. Training runs are parallel; models that exist in the folder are not trained again.

python tests/benchmarks/digits_methods.py --seeds 0 1 2 --jobs 2 --out docs/results/digits_methods.json
"""

import argparse
import copy
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from common import save
from safetensors.torch import load_file, save_file

from evit_deploy import load_recipe, reduce_tokens_, token_plan
from evit_deploy.data.training.training_data import curriculum_of
from evit_deploy.errors import InputError
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.report.statistics import difference
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.training.compare import evaluate_each
from evit_deploy.training.loop import Stage, fit
from evit_deploy.training.setup import own_teacher, setup

LEVELS = (0.7, 0.5)
"""EViT's keep rates, whose multiply-adds the others match."""
LOCATIONS = (3, 6, 9)
FROM_SCRATCH = ("evit", "evo-vit")
PREDICTORS_RATE = 1e-3
"""DynamicViT's learning rate."""
Settings = dict[str, Any]


def _grid(method: str) -> Iterable[Settings]:
    """Candidate settings of a method, from which the one with the closest multiply-adds is chosen."""
    rates = [i / 100 for i in range(99, 4, -1)]
    if method == "tome":  # the finest step is one more in some of the blocks
        for r in range(1, 12):
            for more in range(12):
                yield {"method": "tome", "options": {"merge": [r + 1] * more + [r] * (12 - more)}}
            for blocks in range(6, 12):  # the last block merges none
                yield {"method": "tome", "options": {"merge": [r] * blocks}}
        return
    for rate in rates:
        if method == "evo-vit":
            yield {"method": method, "keep_rate": rate, "options": {"representative": True}}
        elif method == "merge":
            yield {"method": method, "keep_rate": rate, "fuse": False}
        elif method == "tps":
            yield {"method": "evit", "keep_rate": rate, "locations": LOCATIONS, "options": {"squeeze": True}}
        else:
            yield {"method": method, "keep_rate": rate, "locations": LOCATIONS}


def settings(method: str, level: float, model: Any) -> TokenSpec:
    """The settings of a method that come closest to EViT's multiply-adds at a keep rate."""

    def macs(spec: TokenSpec) -> float:
        try:
            return token_plan(reduce_tokens_(copy.deepcopy(plain), spec)).macs()
        except InputError:  # a setting that is impossible with so few patches
            return math.inf

    wanted = TokenSpec(keep_rate=level, locations=LOCATIONS)
    plain = copy.deepcopy(model)
    plain.global_pool = "token"  # a pooling head costs the same, and EViT does not support it
    if method in ("evit", "tps"):
        return (
            wanted if method == "evit" else TokenSpec(keep_rate=level, locations=LOCATIONS, options={"squeeze": True})
        )
    aim = macs(wanted)
    logging.disable(logging.WARNING)  # forty warnings about clamped schedules
    found = min((TokenSpec(**given) for given in _grid(method)), key=lambda spec: abs(macs(spec) - aim))
    logging.disable(logging.NOTSET)
    assert abs(macs(found) / aim - 1) < 0.02, f"nothing of {method} costs what EViT at {level} does"
    return found


class Bench:
    """One seed: its folder, its recipe, its data.

    Args:
        options: Options of the command line.
        seed: The random seed.
        pooled: Whether the model's head pools, as Evo-ViT's own does.
    """

    def __init__(self, options: argparse.Namespace, seed: int, *, pooled: bool = False) -> None:
        self.folder, self.seed, self.device = options.work / str(seed), seed, options.device
        self.folder.mkdir(parents=True, exist_ok=True)
        changes = [*options.overrides, f"seed={seed}"]
        if pooled:
            changes += ["model.args.global_pool=avg", "tokens.method=evo-vit"]
            changes += ["tokens.locations=null", "compare.baselines=[]", "expect.over={}"]
        self.recipe: Recipe = load_recipe(options.recipe, tuple(changes))
        torch.manual_seed(seed)
        self.model, _, self.data = setup(self.recipe)
        self.model.to(self.device)
        assert self.recipe.dense is not None
        self.dense_section = self.recipe.dense
        per_epoch = self.data.steps_per_epoch(self.dense_section.batch_size)
        self.epochs = (self.dense_section.steps or 0) / per_epoch

    def load_dense(self) -> None:
        self.model.load_state_dict(load_file(self.folder / "dense.safetensors"))

    def fit(self, spec: TokenSpec | None, section: Any, seed: int, **others: Any) -> None:
        torch.manual_seed(seed)
        if spec is not None:
            reduce_tokens_(self.model, spec)
        fit(self.model, self.data, section, seed=seed, **others)

    def note(self, name: str, what: Settings, spec: TokenSpec | None, began: float) -> None:
        """Evaluates, and writes the correctly classified images."""
        _, right = evaluate_each(self.model, self.data, 64, name)
        np.save(self.folder / f"{name}.npy", right)
        asked = msgspec.to_builtins(spec) if spec is not None else None
        row = what | {
            "gmacs": token_plan(self.model).macs() / 1e9,
            "tokens": asked,
            "seconds": time.monotonic() - began,
        }
        (self.folder / f"{name}.json").write_text(json.dumps(row | {"device": str(self.device)}))


def run_job(options: argparse.Namespace, job: str) -> None:
    """One training or evaluation in a separate process: ``seed/start[/method/level]``."""
    seed_text, start, *rest = job.split("/")
    seed, began = int(seed_text), time.monotonic()
    method, level = (rest[0], float(rest[1])) if rest else (None, None)
    what: Settings = {"seed": seed, "start": start, "method": method, "level": level}
    bench = Bench(options, seed, pooled=start == "scratch" and method == "evo-vit")
    name = "-".join([start, *rest])
    if start == "dense":
        curriculum = curriculum_of(bench.data)
        bench.fit(None, bench.dense_section, seed, stage=Stage("dense"), curriculum=curriculum)
        save_file(bench.model.state_dict(), bench.folder / "dense.safetensors")
        bench.note(name, what, None, began)
        return
    if start != "scratch":
        bench.load_dense()
    if method is None:  # the dense model, trained for as many more steps
        bench.fit(None, bench.recipe.finetune, seed + 1)
        bench.note(name, what, None, began)
        return
    assert level is not None
    spec = settings(method, level, bench.model)
    if start == "untrained":
        reduce_tokens_(bench.model, spec)
    elif start == "finetuned":
        _finetune(bench, spec)
    else:
        section = _from_scratch(bench, method)
        bench.fit(spec, section, seed, curriculum=curriculum_of(bench.data))
    bench.note(name, what, spec, began)


def _finetune(bench: Bench, spec: TokenSpec) -> None:
    """The recipe's fine-tuning; for DynamicViT, predictors at its paper's learning rate and the backbone at the
    others'."""
    section, seed = bench.recipe.finetune, bench.seed + 1
    if spec.method != "dynamicvit":
        bench.fit(spec, section, seed)
        return
    dense = copy.deepcopy(bench.model)
    torch.manual_seed(seed)
    reduce_tokens_(bench.model, spec)
    recipe = msgspec.structs.replace(bench.recipe, tokens=spec)
    teacher = own_teacher(recipe, bench.model, dense, bench.data.preprocess)
    section = msgspec.structs.replace(
        section, learning_rate=PREDICTORS_RATE, backbone_lr_scale=section.learning_rate / PREDICTORS_RATE,
        keep_rate_epochs=0.0, frozen=("cls_token", "pos_embed"),
    )  # fmt: skip
    bench.fit(None, section, seed, teacher=teacher)


def _from_scratch(bench: Bench, method: str) -> Any:
    """The published schedules: EViT's rate falls from epoch 10 to 110 of 300; Evo-ViT sorts everywhere up to 200."""
    if method == "evit":
        times = {"keep_rate_start": bench.epochs / 30, "keep_rate_epochs": bench.epochs / 3}
    else:
        times = {"layer_wise_epochs": bench.epochs * 2 / 3}
    return msgspec.structs.replace(bench.dense_section, **times)


def jobs_of(options: argparse.Namespace) -> list[tuple[str, str | None]]:
    """Every job and its dependency, longest first."""
    found: list[tuple[str, str | None]] = [(f"{seed}/dense", None) for seed in options.seeds]
    for seed in options.seeds:
        for level in LEVELS:
            found += [(f"{seed}/scratch/{m}/{level}", None) for m in options.methods if m in FROM_SCRATCH]
    for seed in options.seeds:
        dense = f"{seed}/dense"
        found.append((f"{seed}/dense, trained on", dense))
        for level in LEVELS:
            for method in options.methods:
                found.append((f"{seed}/finetuned/{method}/{level}", dense))
                if method != "dynamicvit":  # untrained predictors choose at random
                    found.append((f"{seed}/untrained/{method}/{level}", dense))
    wanted = [job for job in found if any(f"/{start}" in job[0] for start in options.starts)]
    return [job for job in wanted if not _done(options, job[0])]


def _done(options: argparse.Namespace, job: str) -> bool:
    seed, *name = job.split("/")
    return (options.work / seed / ("-".join(name) + ".json")).exists()


def run_all(options: argparse.Namespace) -> None:
    """Runs the jobs in parallel; returns those that failed."""
    waiting, running = jobs_of(options), dict[str, subprocess.Popen[bytes]]()
    options.work.mkdir(parents=True, exist_ok=True)
    began, failed = time.monotonic(), list[str]()
    while waiting or running:
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                failed += [job] if process.returncode else []
                print(f"{time.monotonic() - began:6.0f} s  {job}: {process.returncode or 'done'}", flush=True)
        for job, needs in list(waiting):
            if needs is not None and needs in failed:
                waiting.remove((job, needs))
                failed.append(job)
            elif len(running) < options.jobs and (needs is None or _done(options, needs)):
                waiting.remove((job, needs))
                log = (options.work / (job.replace("/", "-") + ".log")).open("wb")
                command = [sys.executable, *sys.argv, "--job", job]
                running[job] = subprocess.Popen(command, stdout=log, stderr=log)
        if time.monotonic() - began > options.budget:
            for process in running.values():
                process.kill()
            failed += [*running, *(job for job, _ in waiting)]
            break
        time.sleep(0.2)
    print("not done: " + ", ".join(failed) if failed else "all done", flush=True)


def write_table(options: argparse.Namespace) -> None:
    """Rows for all results in the folder, with paired differences to the dense model and to EViT."""
    rows = []
    for file in sorted(options.work.glob("*/*.json")):
        row = json.loads(file.read_text())
        right = np.load(file.with_suffix(".npy"))
        row |= {"top1": float(right.mean()), "images": len(right)}
        others = {"dense": "dense"}
        if row["method"] not in (None, "evit"):
            others["evit"] = f"{row['start']}-evit-{row['level']}"
        for name, stem in others.items():
            other = file.with_name(f"{stem}.npy")
            if other.exists() and file.stem != stem:
                found = difference(name, right, np.load(other))
                row[f"over {name}"] = [found.value, found.error]
        rows.append(row)
    save(options.out, rows)
    for row in rows:
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/digits-in-the-wild.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["evit", "tps", "merge", "evo-vit", "dynamicvit", "tome"])
    parser.add_argument("--starts", nargs="+", default=["dense", "scratch", "untrained", "finetuned"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trainings beside each other")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds, after which what is not done is left out")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="weights and answers")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.job:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        run_job(options, options.job)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_all(options)
    write_table(options)


if __name__ == "__main__":
    main()
