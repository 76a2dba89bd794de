"""The TensorRT plugin and TensorRT-RTX: refused wherever the two could meet, because RTX's parser ends the process.

TensorRT-RTX has a plugin registry, and takes the library of creators into it; but it has no layers for plugins.
"""

from pathlib import Path

import onnx
import pytest

from evit_deploy.engines.build import build_engine
from evit_deploy.engines.plugin.library import CREATORS, PLUGIN
from evit_deploy.errors import InputError, StageError
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import set_precision
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.runtimes.tensorrt import TensorRTRTXRunner
from evit_deploy.tokens.operators.token_reorg import DOMAIN, NAME
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support import tensorrt_lean
from tests.support.models import preprocess_for, seeded

rtx = pytest.mark.tensorrt_rtx

RTX = "tensorrt-rtx"
OPTIONS = BuildOptions(batches=((1, 2, 4),), gpus=("sm80",))
AT_START = """
import ctypes
import tensorrt_rtx
assert tensorrt_rtx.get_plugin_registry().load_library({library!r}) is not None
"""
"""As a ``sitecustomize``: what runs at the start of every Python, the builder's process included."""


@pytest.fixture
def model(tmp_path) -> Path:
    """A reduced model in FP16: with the operator in it that there is a plugin for."""
    pytest.importorskip("tensorrt_rtx")
    model = seeded(img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=10)
    proto = export_onnx(
        reduce_tokens_(model, TokenSpec(keep_rate=0.5, locations=(0,))), name="seeded", preprocess=preprocess_for(model)
    )
    onnx.save(set_precision(proto, "fp16"), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@rtx
def test_the_plugin_is_the_operator_s():
    assert PLUGIN == (DOMAIN, NAME)


@pytest.mark.tensorrt_headers
def test_a_plugin_in_the_builder_s_process_is_refused(model, tmp_path, monkeypatch):
    library = tensorrt_lean.plugin(11) / CREATORS
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(AT_START.format(library=str(library)))
    monkeypatch.syspath_prepend(tmp_path / "start")
    with pytest.raises(StageError, match=r"TensorRT-RTX takes no plugins, and evit::TokenReorg is registered"):
        build_engine(model, tmp_path / "engine.plan", RTX, "fp16", OPTIONS)
    assert not (tmp_path / "engine.plan").exists()
    (tmp_path / "start" / "sitecustomize.py").unlink()
    assert build_engine(model, tmp_path / "engine.plan", RTX, "fp16", OPTIONS).engine.target == RTX


@rtx
@pytest.mark.parametrize("library", ["auto", "libevit_plugin.so", CREATORS])
def test_a_plugin_that_is_asked_for_is_refused(library, model, tmp_path):
    options = BuildOptions(batches=((1, 2, 4),), gpus=("sm80",), plugin=library)
    with pytest.raises(InputError, match=r"--plugin: TensorRT-RTX takes no plugins: the operator's body is built in"):
        build_engine(model, tmp_path / "engine.plan", RTX, "fp16", options)


@rtx
def test_the_runner_refuses_one_too(tmp_path):
    runner = TensorRTRTXRunner(tmp_path / "engine.plan", plugin=tmp_path / CREATORS)
    with pytest.raises(InputError, match="TensorRT-RTX takes no plugins"), runner:
        pass
