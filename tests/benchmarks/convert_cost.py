"""Cost of `convert` for each model size, in separate processes: wall and CPU seconds and peak memory.

    python tests/benchmarks/convert_cost.py --out docs/results/convert_cost.json
    python tests/benchmarks/convert_cost.py deit_small --source ../before --label before --no-variants \\
        --out docs/results/convert_cost.json

The stages are those of `convert -v`, timed from outside by its output lines. With `--source` the script measures
another state of the project, and adds its figures to the file under another label. The last column is the additional
cost of a second keep rate in the same process.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MODELS = {
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}
MAKE_CHECKPOINT = """
import sys, torch
from common import general_weights
torch.save(general_weights(sys.argv[1]).state_dict(), sys.argv[2])
"""
_STAGE = re.compile(r"(?:\[\d+/\d+\] )?(.*)")


def measure(arguments: list[str], source: Path | None) -> dict[str, Any]:
    """Runs one command to its end.

    Args:
        arguments: Arguments of `evit-deploy`.
        source: Folder of another state of the project; by default the installed one.

    Returns:
        Wall seconds, CPU seconds, peak megabytes, and of each step the seconds and the largest megabytes seen.
    """
    environment = dict(os.environ) | ({"PYTHONPATH": str(source)} if source else {})
    reading, writing = os.pipe()
    started = time.perf_counter()
    child = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "evit_deploy", *arguments, "-v"],
        environment,
        file_actions=[(os.POSIX_SPAWN_DUP2, writing, 2), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    os.close(writing)
    steps: list[dict[str, Any]] = [{"step": "starting", "at": 0.0, "peak MB": 0.0}]
    watching = threading.Event()
    sampler = threading.Thread(target=_sample, args=(child, steps, watching), daemon=True)
    sampler.start()
    lines = []
    with os.fdopen(reading, encoding="utf-8", errors="replace") as stderr:
        for line in stderr:
            lines.append(line)
            found = _STAGE.match(line.strip())
            if found and line.startswith("["):
                steps.append({"step": found[1], "at": time.perf_counter() - started, "peak MB": 0.0})
    _, status, usage = os.wait4(child, 0)
    watching.set()
    sampler.join()
    assert status == 0, f"evit-deploy {' '.join(arguments)} failed:\n{''.join(lines[-5:])}"
    wall = time.perf_counter() - started
    ends = [step["at"] for step in steps[1:]] + [wall]
    return {
        "wall s": wall,
        "cpu s": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss / 1e3,
        "steps": [
            {"step": step["step"], "s": round(end - step["at"], 2), "peak MB": round(step["peak MB"])}
            for step, end in zip(steps, ends, strict=True)
        ],
    }


def _sample(child: int, steps: list[dict[str, Any]], ended: threading.Event) -> None:
    """Records the child's resident memory for its current step, fifty times a second."""
    page = os.sysconf("SC_PAGE_SIZE")
    while not ended.wait(0.02):
        try:
            resident = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * page / 1e6
        except (OSError, IndexError):
            return
        steps[-1]["peak MB"] = max(steps[-1]["peak MB"], resident)


def measure_model(model: str, runs: int, source: Path | None, *, variants: bool) -> dict[str, Any]:
    """Converts a seeded model of one size; returns the medians of the runs, and the steps of the fastest."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / f"{model}.pth"
        # Not in this process: a child's peak memory includes that of its parent at the start.
        maker = [sys.executable, "-c", MAKE_CHECKPOINT, MODELS[model], str(checkpoint)]
        subprocess.run(maker, check=True, cwd=Path(__file__).parent)
        target = ["--target", "onnx", "--force"]
        found = [measure(["convert", str(checkpoint), "--keep-rate", "0.7", *target], source) for _ in range(runs)]
        keys = ("wall s", "cpu s", "peak MB")
        figures: dict[str, Any] = {key: statistics.median(run[key] for run in found) for key in keys}
        figures |= {"weights MB": checkpoint.stat().st_size / 1e6}
        figures |= {"steps": min(found, key=lambda run: run["wall s"])["steps"], "runs": found}
        for run in found:
            run.pop("steps")
        if variants:
            two = measure(["convert", str(checkpoint), "--keep-rates", "0.7", "0.5", *target], source)
            two.pop("steps")
            figures["two keep rates"] = two
            figures["second variant s"] = two["wall s"] - figures["wall s"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=None, choices=MODELS, metavar="MODEL")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--source", type=Path, help="another state of the project to measure")
    parser.add_argument("--label", default="now", help="what the figures are filed under")
    parser.add_argument("--no-variants", action="store_true", help="leave the second keep rate out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    if options.out is not None and options.out.exists():
        figures = json.loads(options.out.read_text())["figures"]
    for model in options.models or MODELS:
        found = measure_model(model, options.runs, options.source, variants=not options.no_variants)
        figures.setdefault(options.label, {})[model] = found
        print(model, {key: round(value, 2) for key, value in found.items() if isinstance(value, float)})
        for step in found["steps"]:
            print(f"    {step['s']:7.2f} s {step['peak MB']:7.0f} MB  {step['step']}")
    from common import save  # imported after all children, because it loads PyTorch

    save(options.out, figures)


if __name__ == "__main__":
    main()
