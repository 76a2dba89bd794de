"""The long run: many inputs a format, all that is wrong collected.

    python -m tests.fuzz [--inputs 20000] [--found FOLDER] [--json FILE] [FORMAT...]

Every format runs in a process of its own. An input that broke a rule is written to the folder, one for each kind of
trouble and place in our code; put those that are worth keeping into ``tests/fuzz/corpus/<format>/``. A process that
dies leaves its last input there.
"""

import argparse
import faulthandler
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis
import torch

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import Format, Violation, attempt, corpus, watch

HANGS = 120
"""Seconds after which one input has made its reader hang; the process ends then."""


def run(form: Format, count: int, found: Path, seed: int) -> dict[str, Any]:
    """Tries so many inputs of a format; what was wrong lies in the folder afterwards."""
    strategy = form.inputs()
    kinds: Counter[str] = Counter()
    wrong: dict[str, str] = {}
    longest = 0.0
    last = found / f"{form.name}.last"
    with tempfile.TemporaryDirectory(prefix="evit-fuzz-") as name:
        folder = tempfile.tempdir = name
        watch()
        for path in corpus(form):  # the first ones import what readers import
            attempt(form, path.read_bytes(), Path(folder))
        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count, deadline=None, database=None, phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(strategy)
        def one(content: bytes) -> None:
            nonlocal longest
            last.write_bytes(content)
            faulthandler.dump_traceback_later(HANGS, exit=True)
            try:
                outcome = attempt(form, content, Path(folder))
                kinds[outcome.kind] += 1
                longest = max(longest, outcome.seconds)
            except Violation as trouble:
                kinds["WRONG"] += 1
                label = f"{_place(trouble)} {str(trouble).split(':')[0]}"
                if label not in wrong:
                    wrong[label] = str(trouble)
                    (found / f"{form.name}-{len(wrong)}").write_bytes(content)
            finally:
                faulthandler.cancel_dump_traceback_later()

        one()
    last.unlink(missing_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "format": form.name, "inputs": sum(kinds.values()), "kinds": dict(kinds.most_common()), "wrong": wrong,
        "peak_mb": round(peak / 1024), "grown_mb": round((peak - baseline) / 1024), "longest_s": round(longest, 2),
    }  # fmt: skip


def _place(trouble: Violation) -> str:
    """The innermost line of our own code."""
    frames = traceback.extract_tb(trouble.__cause__.__traceback__) if trouble.__cause__ else []
    ours = [frame for frame in frames if f"evit_deploy{os.sep}" in frame.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""


def main() -> None:
    """Runs the formats one after another."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile inputs for every reader.")
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--here", action="store_true", help="in this process, one format")
    given = parser.parse_args()
    given.found.mkdir(parents=True, exist_ok=True)
    if given.here:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable()
        faulthandler.enable()
        form = FORMATS[given.formats[0]]
        print(json.dumps(run(form, max(1, round(given.inputs * form.share)), given.found, given.seed)))
        return
    results = []
    for name in given.formats or FORMATS:
        options = ["--inputs", str(given.inputs), "--seed", str(given.seed), "--found", str(given.found), "--here"]
        done = subprocess.run([sys.executable, "-m", "tests.fuzz", name, *options], stdout=subprocess.PIPE, text=True)
        lines = done.stdout.splitlines()
        died = {"format": name, "wrong": {"died": f"the process ended with {done.returncode}"}}
        results.append(json.loads(lines[-1]) if done.returncode == 0 and lines else died)
        print(json.dumps(results[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["wrong"] for result in results))


if __name__ == "__main__":
    main()
