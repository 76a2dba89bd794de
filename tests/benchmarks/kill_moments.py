"""Kills real commands with ``kill -9`` at random moments, and inspects what they leave.

python tests/benchmarks/kill_moments.py --out docs/results/kill_moments.json

Each command first runs to its end, to measure its duration. It is then started repeatedly, and killed at a moment drawn
uniformly from that time (for training: since its folder exists). After each kill the visible files are checked before
any cleanup: with ``--force`` there must be one complete bundle or package, with the hash of every file. Then the first
step of the next run is executed, after which no hidden files may remain. A training run is resumed; its checkpoints
must equal those of an uninterrupted run, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evit_deploy.bundle.bundle import changed_files, check_out, read_bundle
from evit_deploy.bundle.manifest import PACKAGE
from evit_deploy.files import hashes
from evit_deploy.files.drafts import PREFIX, sweep
from evit_deploy.recipe.recipe import dump_recipe
from tests.benchmarks.common import save
from tests.support.models import write_checkpoint
from tests.support.training import RUN, recipe

KILLS = {"convert": 80, "train": 50, "package": 40, "verify": 30}


class Case:
    """One command in a user's folder.

    Args:
        folder: The folder; contains ``bundle`` and other files, and ``temporary`` for temporary files of libraries.
        arguments: Arguments of the command.
    """

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.temporary = folder, folder / "temporary"
        self.begins: Path | None = None
        self.began = 0.0
        self.temporary.mkdir(exist_ok=True)
        self.command = [sys.executable, "-m", "evit_deploy", *map(str, arguments)]
        self.environment = os.environ | {"TMPDIR": str(self.temporary), "CUDA_VISIBLE_DEVICES": ""}

    def run(self, *more: str, kill_after: float | None = None) -> int:
        """Runs it to its end, or kills it after some seconds; returns the exit code."""
        with subprocess.Popen(
            [*self.command, *more], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            try:
                while self.begins and not self.begins.exists() and process.poll() is None:
                    time.sleep(0.01)
                self.began = time.perf_counter()
                _, said = process.communicate(timeout=kill_after)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                return -signal.SIGKILL
        if process.returncode:
            sys.stderr.write(said.decode())
        return process.returncode

    def hidden(self) -> list[str]:
        """Leftovers that only a run in progress may have, here and in the folder for temporary files."""
        return [str(path) for place in (self.folder, self.temporary) for path in place.glob(f"{PREFIX}*")]


def bundle_wrong(place: Path) -> str:
    """Faults of a bundle; empty if there are none."""
    if not place.is_dir():
        return "there is none"
    changed = changed_files(read_bundle(place))
    return f"changed: {changed}" if changed else ""


def package_wrong(place: Path) -> str:
    """Faults of a package; empty if there are none."""
    if not (place / PACKAGE).is_file():
        return "there is none"
    listed = json.loads((place / PACKAGE).read_bytes())["files"]
    found = hashes(place)
    found.pop(PACKAGE)
    return "" if found == listed else "files are not those that it lists"


def kills(case: Case, count: int, wrong: Callable[[], str], clear: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Kills a command at random moments.

    Args:
        case: The command.
        count: Number of kills.
        wrong: Checks the leftovers; resumes training.
        clear: Called before each start.
    """
    whole = 0.0
    for _ in range(2):  # the second run has caches, and a bundle to replace
        clear()
        assert case.run() == 0
        whole = time.perf_counter() - case.began
    moments, seen, problems = random.Random(0), Counter[str](), []
    for _ in range(count):
        clear()
        moment = moments.uniform(0, whole)
        seen["killed" if case.run(kill_after=moment) == -signal.SIGKILL else "ended before"] += 1
        seen["left something hidden"] += bool(case.hidden())
        problem = wrong()
        check_out(case.folder / "bundle", force=True)  # the first step of the next run
        sweep(case.temporary)
        if left := case.hidden():
            problem += f" hidden after the next run: {left}"
        if problem:
            problems.append([round(moment, 3), problem])
    return {"seconds": round(whole, 2), **seen, "wrong": problems}


def convert(folder: Path, count: int) -> dict[str, Any]:
    """Replaces a bundle."""
    checkpoint, out = write_checkpoint(folder / "smallest.safetensors", "smallest"), folder / "bundle"
    case = Case(folder, "convert", checkpoint, "--keep-rate", 0.5, "--threads", 1, "--out", out, "--force")
    return kills(case, count, lambda: bundle_wrong(out))


def package(folder: Path, count: int) -> dict[str, Any]:
    """Replaces a package."""
    bundle, out = a_bundle(folder), folder / "package"
    case = Case(folder, "package", bundle, "--for", "triton", "--out", out, "--force")
    return kills(case, count, lambda: package_wrong(out) or bundle_wrong(bundle))


def verify(folder: Path, count: int) -> dict[str, Any]:
    """Reads a bundle."""
    bundle = a_bundle(folder)
    return kills(Case(folder, "verify", bundle, "--threads", 1), count, lambda: bundle_wrong(bundle))


def a_bundle(folder: Path) -> Path:
    """A bundle to package and verify."""
    checkpoint, out = write_checkpoint(folder / "smallest.safetensors", "smallest"), folder / "bundle"
    assert Case(folder, "convert", checkpoint, "--keep-rate", 0.5, "--threads", 1, "--out", out).run() == 0
    return out


def train(folder: Path, count: int) -> dict[str, Any]:
    """Trains in two stages, and resumes after each kill."""
    names, out, resumed = ("dense.safetensors", "evit.safetensors"), folder / "run", Counter[str]()
    longer = msgspec.structs.replace(RUN, steps=100, save_every=5)
    (folder / "tiny.yaml").write_text(dump_recipe(recipe(dense=longer, finetune=longer)))
    case = Case(folder, "train", folder / "tiny.yaml", "--out", out)
    case.begins = out  # otherwise most kills would hit the imports
    assert case.run() == 0
    expected = {name: (out / name).read_bytes() for name in names}

    def wrong() -> str:
        saved = [name for name in ("finetune.state", "dense.safetensors", "dense.state") if (out / name).exists()]
        resumed[f"resumed from {saved[0] if saved else 'nothing'}"] += 1
        if case.run("--resume"):
            return "it cannot be gone on with"
        left = [name for name in os.listdir(out) if name.startswith(".") or name.endswith(".state")]
        same = {name: (out / name).read_bytes() for name in names} == expected
        return ("" if same else "other checkpoints") + (f" left: {left}" if left else "")

    return kills(case, count, wrong, lambda: shutil.rmtree(out, ignore_errors=True)) | resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=KILLS, nargs="+", default=list(KILLS))
    parser.add_argument("--kills", type=int, help="of each command, instead of 200 in all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures = {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = globals()[name](Path(folder), options.kills or KILLS[name])
        print(name, figures[name], flush=True)
        save(options.out, figures)


if __name__ == "__main__":
    main()
