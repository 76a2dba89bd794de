"""A packaged model without classes on a real server: embeddings of tensors, of files, and by the client's command."""

import subprocess
import sys

import numpy as np
import pytest

from evit_deploy.data.images import preprocess_image
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.serving.options import TritonOptions
from tests.support.models import write_checkpoint
from tests.support.packages import make_package
from tests.support.triton_models import copied, encoded, photographs
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.triton


def test_embeddings_from_tensors_and_from_files(cli, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "features.safetensors", "registers, no classes")
    options = ConvertOptions(targets=("onnx",), normalize=True)
    measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
    bundle, _ = convert(checkpoint, keep_rate=0.7, options=options, measure=measure, out=tmp_path / "tiny")
    place, _ = make_package([bundle.path], "triton", name="tiny", triton=TritonOptions(device="cpu"))
    assert not list(place.rglob("labels.txt"))
    assert 'as_numpy("embedding")' in (place / "README.md").read_text()
    file = tmp_path / "photograph.png"
    file.write_bytes(encoded(photographs()[0], "PNG"))
    with OnnxRuntimeRunner(bundle.file("model.onnx"), threads=1) as runner:
        (wanted,) = runner.infer({"input": preprocess_image(file, bundle.manifest.preprocess)[None]})["embedding"]
    with TritonServer(copied(place, tmp_path / "models")) as server:
        result = cli("verify", place, "--url", server.http, "--model-name", "tiny", "--json", "--batch-sizes", "1,3")
        assert result.code == 0, result.err
        names = [check["name"] for check in result.document["checks"]]
        assert "triton, batch 3: embedding" in names
        assert "triton, ensemble tiny: photographs as files" in names
        line = [sys.executable, "-m", "evit_deploy.triton.client", "--url", server.http, "--model-name", "tiny"]
        out = tmp_path / "embeddings.npy"
        done = subprocess.run([*line, str(file), "--out", str(out)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{file}\t48\t1.000\n"
        np.testing.assert_allclose(np.load(out), wanted[None], rtol=0, atol=1e-5)
        labels = tmp_path / "labels.txt"
        labels.write_text("one\n")
        done = subprocess.run([*line, str(file), "--labels", str(labels)], capture_output=True, text=True, timeout=120)
        assert (done.returncode, "has no classes" in done.stderr) == (2, True)
