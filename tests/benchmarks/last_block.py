"""Savings of computing the last block only for the tokens that the head uses, in ONNX Runtime on one thread.

python tests/benchmarks/last_block.py [--model deit_small_patch16_224] [--rounds 24] [--out FILE]

Each model is exported twice, with the last block complete and partial. All files take turns; ratios compare the
thread's CPU times within a round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.export.portable import portable
from evit_deploy.models import timm_vit
from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_

RATES = (1.0, 0.7)
BATCHES = (1, 8)


def session(name: str, rate: float, whole: bool) -> onnxruntime.InferenceSession:
    """A model's file in ONNX Runtime; seeded weights."""
    torch.manual_seed(0)
    model = reduce_tokens_(timm.create_model(name).eval(), TokenSpec(keep_rate=rate))
    real = timm_vit.for_inference
    if whole:
        timm_vit.for_inference = lambda model: copy_sharing_weights(model).eval()
    try:
        proto = portable(model, name=name, preprocess=Preprocess.from_model(model)).whole()
    finally:
        timm_vit.for_inference = real
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    sessions = {(rate, whole): session(asked.model, rate, whole) for rate in RATES for whole in (True, False)}
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        shape = (batch, *sessions[1.0, True].get_inputs()[0].shape[1:])
        feeds = {"input": np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}
        answers = {key: one.run(None, feeds)[0] for key, one in sessions.items()}
        times: dict[Any, list[float]] = {key: [] for key in sessions}
        for _ in range(asked.rounds):
            for key, one in sessions.items():
                begun = time.thread_time()
                one.run(None, feeds)
                times[key].append(time.thread_time() - begun)
        for rate in RATES:
            ratios = [a / b for a, b in zip(times[rate, True], times[rate, False], strict=True)]
            low, middle, high = statistics.quantiles(ratios)
            different = float(np.abs(answers[rate, True] - answers[rate, False]).max())
            rows.append({"batch": batch, "keep_rate": rate, "whole_over_part": round(middle, 4),
                         "quartiles": [round(low, 4), round(high, 4)], "largest_difference": different})  # fmt: skip
            print(rows[-1], flush=True)
    if asked.out:
        found = {"model": asked.model, "rounds": asked.rounds, "onnxruntime": onnxruntime.__version__, "rows": rows}
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
