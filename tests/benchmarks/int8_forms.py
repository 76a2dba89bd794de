"""The two forms of INT8 on CPUs: signed and symmetric with float biases, for engines, and unsigned with INT32 biases.

DeiT-S at keep rate 0.7, one thread, interleaved; FP32 is included. The form for engines is measured twice: as in an
engine's bundle, with the rest in FP16, and with the rest in FP32, so that the form is the only difference.

python tests/benchmarks/int8_forms.py --out docs/results/int8_forms.json
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import deit_small, save

from evit_deploy import TokenSpec, export_onnx, reduce_tokens_, set_precision
from evit_deploy.data.images import sample_inputs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.export.quantization import quantize
from evit_deploy.profiling.timing import measure
from evit_deploy.report.statistics import median_interval
from evit_deploy.runtimes.select import opened
from evit_deploy.verification.answers.answers import infer_all

RUNTIMES = ("onnxruntime", "openvino")
FP32, CPU, ENGINE, FORM = "fp32", "int8 for CPUs", "int8 for engines", "int8 for engines, rest FP32"
PAIRS = ((ENGINE, CPU), (FORM, CPU), (FP32, CPU), (FORM, FP32))


def files(keep_rate: float) -> tuple[dict[str, Any], np.ndarray]:
    """The same weights in every form, and images that were not used for calibration."""
    model = deit_small()
    preprocess = Preprocess.from_model(model)
    proto = export_onnx(
        reduce_tokens_(model, TokenSpec(keep_rate=keep_rate)), name="deit_small_patch16_224", preprocess=preprocess
    )
    images = sample_inputs(preprocess, 32)
    calibration, others = images[:16], images[16:]
    forms = {
        FP32: proto,
        CPU: set_precision(proto, "int8", base="fp32", calibration=calibration),
        ENGINE: set_precision(proto, "int8", base="fp16", calibration=calibration),
        FORM: quantize(proto, "int8", "fp16", calibration).proto,  # the source of the previous one
    }
    return forms, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    forms, images = files(options.keep_rate)
    with ExitStack() as stack:
        labels = [(runtime, form) for runtime in RUNTIMES for form in forms]
        runners = [stack.enter_context(opened(runtime, forms[form], threads=1)) for runtime, form in labels]
        logits = {label: infer_all(runner, images, 8)["logits"] for label, runner in zip(labels, runners, strict=True)}
        errors = {}
        for runtime, form in labels:
            exact = logits[runtime, FP32]
            spread = np.linalg.norm(exact - exact.mean(axis=1, keepdims=True))
            errors[f"{runtime} {form}"] = float(np.linalg.norm(logits[runtime, form] - exact) / spread)
        print("error over spread of logits:", {name: round(error, 4) for name, error in errors.items()})
        figures = []
        for batch in map(int, options.batch_sizes.split(",")):
            _, cpu = measure(runners, batch, duration=0.0, minimum_rounds=options.rounds)
            for runtime in RUNTIMES:
                times = {form: cpu[:, labels.index((runtime, form))] for form in forms}
                milliseconds = {form: 1e3 * float(np.median(time)) / batch for form, time in times.items()}
                ratios = {f"{slow} / {quick}": times[slow] / times[quick] for slow, quick in PAIRS}
                found = {name: [float(np.median(v)), *median_interval(v)] for name, v in ratios.items()}
                figures.append({"batch": batch, "runtime": runtime, "rounds": len(cpu),
                                "cpu ms per image": milliseconds, "ratios of cpu time": found})  # fmt: skip
                print(f"\nbatch {batch}, {runtime}, {len(cpu)} rounds; CPU ms per image:",
                      {form: round(value, 1) for form, value in milliseconds.items()})  # fmt: skip
                for name, (middle, low, high) in found.items():
                    print(f"  {name:45} {middle:6.3f}   [{low:.3f}, {high:.3f}]")
    save(options.out, {"keep rate": options.keep_rate, "error over spread of logits": errors, "rows": figures})


if __name__ == "__main__":
    main()
