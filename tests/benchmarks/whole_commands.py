"""Whole processes: `convert` of a DeiT-S checkpoint, `doctor` and `--help`, wall seconds, CPU seconds and peak memory.

python tests/benchmarks/whole_commands.py --out docs/results/whole_commands.json
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAKE_CHECKPOINT = "import sys, torch; from common import deit_small; torch.save(deit_small().state_dict(), sys.argv[1])"


def measure_command(arguments: list[str]) -> dict[str, float]:
    """Runs one child to its end; the operating system's own accounting of it."""
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "evit_deploy", *arguments], os.environ)
    _, status, usage = os.wait4(child, 0)
    assert status == 0, f"evit-deploy {' '.join(arguments)} failed"
    return {
        "wall s": time.perf_counter() - started,
        "cpu s": usage.ru_utime + usage.ru_stime,
        "peak MB": usage.ru_maxrss / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, bundle = Path(folder) / "deit_s.pth", Path(folder) / "bundle"
        # Not here: a child's peak counts from what its parent held when it was started.
        subprocess.run([sys.executable, "-c", MAKE_CHECKPOINT, str(checkpoint)], check=True, cwd=Path(__file__).parent)
        commands = {
            "--help": ["--help"],
            "doctor": ["doctor"],
            "convert deit_s.pth --keep-rate 0.7": [
                "convert",
                str(checkpoint),
                "--keep-rate",
                "0.7",
                "--out",
                str(bundle),
                "-q",
            ],
        }
        for name, arguments in commands.items():
            runs = []
            for _ in range(options.runs):
                shutil.rmtree(bundle, ignore_errors=True)
                runs.append(measure_command(arguments))
            figures[name] = {key: statistics.median(run[key] for run in runs) for key in runs[0]} | {"runs": runs}
    for name, figure in figures.items():
        print(name, {key: round(value, 3) for key, value in figure.items() if key != "runs"})
    from common import save  # loads PyTorch, so after all children

    save(options.out, figures)


if __name__ == "__main__":
    main()
