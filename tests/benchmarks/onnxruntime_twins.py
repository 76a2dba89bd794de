"""DeiT-S at keep rate 0.7 on ONNX Runtime, one thread: model, slice twin, dense twin, and timm's plain export.

python tests/benchmarks/onnxruntime_twins.py --out docs/results/onnxruntime_twins.json
"""

import argparse
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import torch
from common import deit_small, save

from evit_deploy import TokenSpec, export_onnx, reduce_tokens_, slice_twin, token_plan
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.profiling.timing import measure
from evit_deploy.report.statistics import median_interval
from evit_deploy.runtimes.select import opened


def plain_export(model: torch.nn.Module, path: Path) -> None:
    """The export without evit-deploy: torch.onnx.export of timm's model, same opset, dynamic batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (torch.zeros(2, 3, 224, 224),),
            dynamo=True,
            opset_version=23,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            verbose=False,
        )
        program.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", default="1,8,32")
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = deit_small()
    preprocess = Preprocess.from_model(model)
    figures = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("plain", "dense", "slice", "model")}
        plain_export(model, paths["plain"])
        onnx.save(export_onnx(model, name="deit_small_patch16_224", preprocess=preprocess), paths["dense"])
        reduce_tokens_(model, TokenSpec(keep_rate=options.keep_rate))
        exported = export_onnx(model, name="deit_small_patch16_224", preprocess=preprocess)
        onnx.save(exported, paths["model"])
        onnx.save(slice_twin(exported), paths["slice"])
        runners = [stack.enter_context(opened("onnxruntime", path, threads=1)) for path in paths.values()]
        mac_ratio = token_plan(model).computed_mac_ratio()
        for batch in map(int, options.batch_sizes.split(",")):
            _, cpu = measure(runners, batch, duration=0.0, minimum_rounds=options.rounds)
            plain, dense, sliced, reduced = cpu.T
            ratios = {
                "overhead over slice twin": reduced / sliced - 1,
                "MAC efficiency": dense / reduced / mac_ratio,
                "MAC efficiency of the slice twin": dense / sliced / mac_ratio,
                "speed-up over dense twin": dense / reduced,
                "speed-up over plain export": plain / reduced,
                "dense twin over plain export": plain / dense,
            }
            milliseconds = {name: 1e3 * float(np.median(cpu[:, i])) / batch for i, name in enumerate(paths)}
            rows = {name: [float(np.median(v)), *median_interval(v)] for name, v in ratios.items()}
            figures.append({"batch": batch, "rounds": len(cpu), "cpu ms per image": milliseconds, "ratios": rows})
            print(
                f"\nbatch {batch}, {len(cpu)} rounds; CPU ms per image:",
                {k: round(v, 2) for k, v in milliseconds.items()},
            )
            for name, (middle, low, high) in rows.items():
                print(f"  {name:34} {middle:7.4f}   [{low:.4f}, {high:.4f}]")
    save(options.out, {"keep rate": options.keep_rate, "computed MAC ratio": mac_ratio, "batches": figures})


if __name__ == "__main__":
    main()
