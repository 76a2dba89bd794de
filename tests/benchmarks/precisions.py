"""FP16, BF16, INT8 and FP8 against FP32: accuracy on a trained model, speed on DeiT-S.

evit-deploy run recipes/digits.yaml
python tests/benchmarks/precisions.py accuracy runs/digits/evit.safetensors --out docs/results/precisions_accuracy.json
python tests/benchmarks/precisions.py speed --out docs/results/precisions_speed.json
"""

import argparse
import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import deit_small, save

from evit_deploy import TokenSpec, export_onnx, reduce_tokens_, set_precision, slice_twin, token_plan
from evit_deploy.data.images import sample_inputs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.training_data import open_data
from evit_deploy.export.precision import DTYPES
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.profiling.timing import measure
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.report.statistics import median_interval, wilson
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.reduce import dense_twin
from evit_deploy.verification.answers.answers import Answers, agreement_row, infer_all, named_patches

RUNS = (
    ("eager", "fp32"),
    ("eager", "fp16"),
    ("eager", "bf16"),
    ("onnxruntime", "fp32"),
    ("onnxruntime", "fp16"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "fp8"),
    ("openvino", "fp32"),
    ("openvino", "fp16"),
    ("openvino", "bf16"),
    ("openvino", "int8"),
)


def accuracy(checkpoint_path: Path, out: Path | None) -> None:
    """Every precision on the digits' 360 test images, compared with PyTorch in FP32."""
    checkpoint = read_checkpoint(checkpoint_path)
    assert checkpoint.tokens is not None
    model = reduce_tokens_(build_model(checkpoint), checkpoint.tokens).eval()
    plan = token_plan(model)
    preprocess: Any = checkpoint.preprocess
    data = open_data(load_recipe("digits").data, preprocess)
    batches = list(data.validation(360))
    images, labels = batches[0][0].numpy(), batches[0][1].numpy()
    proto = export_onnx(model, name=checkpoint.model, preprocess=preprocess)
    calibration = data.calibration(256)
    figures, first = [], None
    for runtime, precision in RUNS:
        if runtime == "eager":
            artifact: Any = copy.deepcopy(model).to(DTYPES[precision])
        else:
            artifact = set_precision(proto, precision, calibration=calibration)
        with opened(runtime, artifact, threads=1, with_indices=True) as runner:
            outputs = infer_all(runner, images, 60)
        answers = Answers(outputs["logits"], named_patches(outputs, plan))
        first = first or answers
        row = agreement_row("eager fp32", first, f"{runtime} {precision}", answers)
        right = int((answers.logits.argmax(1) == labels).sum())
        figures.append(
            {
                "runtime": runtime,
                "precision": precision,
                "top-1": right / len(labels),
                "interval": wilson(right, len(labels)),
                "top-1 agreement": row.top1,
                "kept patches in common": row.kept,
                "largest logit difference": row.logits,
                "logits' spread": float(first.logits.std()),
            }
        )
        kept = " / ".join(f"{100 * share:.1f}" for share in row.kept.values())
        print(f"{runtime:12} {precision:5} top-1 {100 * right / len(labels):6.2f}  agree {100 * row.top1:6.2f}  "
              f"kept {kept}  logits {row.logits:.2e}")  # fmt: skip
    save(out, figures)


def speed(out: Path | None, batch_sizes: list[int], rounds: int, keep_rate: float) -> None:
    """DeiT-S in every precision on both CPU runtimes, one thread, interleaved; ratios to dense FP32 on ONNX Runtime."""
    model = deit_small()
    preprocess = Preprocess.from_model(model)
    reduced = reduce_tokens_(model, TokenSpec(keep_rate=keep_rate))
    plan = token_plan(reduced)
    protos = {
        "model": export_onnx(reduced, name="deit_small_patch16_224", preprocess=preprocess),
        "dense": export_onnx(dense_twin(reduced), name="deit_small_patch16_224", preprocess=preprocess),
    }
    calibration = sample_inputs(preprocess, 16)
    labels, runners = [], []
    with ExitStack() as stack:
        for runtime, precision in RUNS:
            if runtime == "eager" or precision == "fp8":
                continue
            twins = {name: set_precision(p, precision, calibration=calibration) for name, p in protos.items()}
            twins["slice"] = slice_twin(twins["model"])
            for name, proto in twins.items():
                runners.append(stack.enter_context(opened(runtime, proto, threads=1)))
                labels.append((runtime, precision, name))
        figures = []
        for batch in batch_sizes:
            _, cpu = measure(runners, batch, duration=0.0, minimum_rounds=rounds)
            column = {label: cpu[:, index] for index, label in enumerate(labels)}
            base = column["onnxruntime", "fp32", "dense"]
            print(f"\nbatch {batch}")
            for runtime, precision in dict.fromkeys(label[:2] for label in labels):
                times = {name: column[runtime, precision, name] for name in ("model", "dense", "slice")}
                ratios = {
                    "over dense FP32 on ONNX Runtime": base / times["model"],
                    "over its own dense twin": times["dense"] / times["model"],
                    "MAC efficiency": times["dense"] / times["model"] / plan.computed_mac_ratio(),
                    "overhead over slice twin": times["model"] / times["slice"] - 1,
                }
                found = {name: [float(np.median(v)), *median_interval(v)] for name, v in ratios.items()}
                milliseconds = {name: 1e3 * float(np.median(v)) / batch for name, v in times.items()}
                figures.append({"batch": batch, "runtime": runtime, "precision": precision, "rounds": len(cpu),
                                "cpu ms per image": milliseconds, "ratios": found})  # fmt: skip
                print(f"  {runtime:12} {precision:5}", {k: round(v, 1) for k, v in milliseconds.items()},
                      {k: round(v[0], 3) for k, v in found.items()})  # fmt: skip
    save(out, {"keep rate": keep_rate, "computed MAC ratio": plan.computed_mac_ratio(), "rows": figures})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "speed"))
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "accuracy":
        accuracy(options.checkpoint, options.out)
    else:
        speed(options.out, [int(n) for n in options.batch_sizes.split(",")], options.rounds, options.keep_rate)


if __name__ == "__main__":
    main()
