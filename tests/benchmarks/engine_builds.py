"""TensorRT-RTX engines of DeiT-S built ahead of time: seconds, megabytes and layers. No GPU needed.

python tests/benchmarks/engine_builds.py --out docs/results/engine_builds.json
"""

import argparse
import tempfile
from pathlib import Path

import onnx
from common import deit_small, save

from evit_deploy import TokenSpec, export_onnx, reduce_tokens_, set_precision, token_plan
from evit_deploy.data.images import sample_inputs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.engines.audit import engine_checks
from evit_deploy.engines.build import build_engine
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.recipe.options import BuildOptions

BUILDS = (
    *((precision, gpu) for precision in ("fp16", "bf16", "int8") for gpu in ("sm80", "sm89", "sm120")),
    *(("fp8", gpu) for gpu in ("sm89", "sm120")),
    ("fp32", "sm80"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep-rate", type=float, default=0.7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = reduce_tokens_(deit_small(), TokenSpec(keep_rate=options.keep_rate))
    preprocess = Preprocess.from_model(model)
    proto = export_onnx(model, name="deit_small_patch16_224", preprocess=preprocess)
    calibration = sample_inputs(preprocess, 16)
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        path, plan = Path(folder) / "model.onnx", Path(folder) / "engine.plan"
        for precision, gpu in BUILDS:
            onnx.save(set_precision(proto, precision, base="fp16", calibration=calibration), path)
            built = build_engine(path, plan, "tensorrt-rtx", precision, BuildOptions(gpus=(gpu,)))
            report = engine_checks(built, plan, token_plan(model), listing=plan_layers)
            figures.append(
                {
                    "precision": precision,
                    "gpu": gpu,
                    "seconds": built.engine.seconds,
                    "megabytes": round(plan.stat().st_size / 1e6, 1),
                    "TensorRT-RTX": built.engine.version,
                    "checks": {check.name: [check.value, check.limit, check.passed] for check in report.checks},
                }
            )
            held = ", ".join(f"{check.name} {check.value} of {check.limit}" for check in report.checks)
            print(f"{precision:5} {gpu:6} {built.engine.seconds:5.2f} s  {figures[-1]['megabytes']:6.1f} MB  {held}")
    save(options.out, figures)


if __name__ == "__main__":
    main()
