"""DeiT-S at keep rate 0.7, one thread: overhead of `predict` over a plain ONNX Runtime session on the same inputs.

Inputs are prepared, so that reading and resizing pictures, which a plain session does not do, is excluded.

python tests/benchmarks/predict_overhead.py --out docs/results/predict_overhead.json
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import deit_small, save

from evit_deploy import ProfileOptions, convert, load
from evit_deploy.profiling.clocks.turns import in_turns
from evit_deploy.report.statistics import median_interval


def bare_session(path: Path) -> onnxruntime.InferenceSession:
    """A plain session on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "deit_s.pth"
        torch.save(deit_small().state_dict(), checkpoint)
        measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
        bundle, _ = convert(checkpoint, model="deit_small_patch16_224", keep_rate=0.7, measure=measure)
        session = bare_session(bundle.file("model.onnx"))
        with load(bundle.path, "onnxruntime", threads=1) as model:
            for batch in map(int, options.batch_sizes.split(",")):
                images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
                calls: list[Callable[[], Any]] = [
                    lambda images=images: session.run(None, {"input": images}),
                    lambda images=images: model.predict(images),
                ]

                def turn(index: int, calls: list[Callable[[], Any]] = calls) -> float:
                    started = time.process_time()
                    calls[index]()
                    return time.process_time() - started

                in_turns(turn, 2, 0.0, 3)  # to warm up
                bare, predict = np.array(in_turns(turn, 2, 0.0, options.rounds)).T
                overhead = predict / bare - 1
                row = {
                    "batch": batch,
                    "rounds": len(bare),
                    "session ms": 1e3 * float(np.median(bare)),
                    "predict ms": 1e3 * float(np.median(predict)),
                    "overhead": [float(np.median(overhead)), *median_interval(overhead)],
                }
                figures.append(row)
                middle, low, high = row["overhead"]
                print(
                    f"batch {batch:3}, {len(bare)} rounds: session {row['session ms']:.2f} ms, predict "
                    f"{row['predict ms']:.2f} ms, overhead {100 * middle:+.2f} % [{100 * low:.2f}, {100 * high:.2f}]"
                )
    save(options.out, {"keep rate": 0.7, "batches": figures})


if __name__ == "__main__":
    main()
