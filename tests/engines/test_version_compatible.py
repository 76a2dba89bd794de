"""Version-compatible plans: without host code in them, so that they are loaded without trusting it."""

import msgspec
import numpy as np
import onnx
import pytest

from evit_deploy.engines import build
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import set_precision
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.runtimes.tensorrt import TensorRTRunner
from tests.support import tensorrt_lean
from tests.support.models import preprocess_for, seeded


@pytest.mark.tensorrt_lean
@pytest.mark.parametrize("major", tensorrt_lean.RELEASES)
@pytest.mark.parametrize("wanted", [True, False])
def test_the_lean_runtime_stays_out(wanted, major):
    program = (
        "import json, sys\nimport tensorrt\nfrom polygraphy.backend.trt import CreateConfig\n"
        "from evit_deploy.engines.build import _settings\n"
        "config = CreateConfig(**_settings(tensorrt, json.loads(sys.argv[1])), tf32=False)\n"
        "print(json.dumps([config.version_compatible, config.exclude_lean_runtime]\n"
        "  + [name in tensorrt.BuilderFlag.__members__ for name in ('VERSION_COMPATIBLE', 'EXCLUDE_LEAN_RUNTIME')]))"
    )
    options = BuildOptions(version_compatible=wanted, workspace=64, hardware_compatible=wanted)
    asked = msgspec.json.encode(options).decode()
    version_compatible, excluded, *known = tensorrt_lean.ask(major, program, asked)
    assert bool(version_compatible) is bool(excluded) is wanted
    assert known == [True, True]


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_our_own_runner_loads_such_a_plan(tmp_path):
    pytest.importorskip("tensorrt")
    model = seeded(img_size=64, embed_dim=64, depth=1, num_heads=2, num_classes=10)
    proto = export_onnx(model, name="seeded", preprocess=preprocess_for(model))
    onnx.save(set_precision(proto, "fp16"), tmp_path / "model.onnx")
    options = BuildOptions(batches=((1, 2, 2),), version_compatible=True)
    built = build.build_engine(tmp_path / "model.onnx", tmp_path / "engine.plan", "tensorrt", "fp16", options)
    assert built.engine.options["lean_runtime"] is False
    with TensorRTRunner(tmp_path / "engine.plan") as runner:
        assert runner.infer({"input": np.zeros((2, 3, 64, 64), np.float32)})["logits"].shape == (2, 10)
