"""Model repositories of the tiny model for ``tests/support/triton_server.py``; also their pytest fixtures."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.data.images import sample_photographs
from evit_deploy.serving.options import PackageOptions, TritonOptions
from evit_deploy.serving.package import package
from tests.support.triton_server import TritonServer

NAME, MODEL = "tiny", "tiny_model"


@pytest.fixture(scope="session")
def packaged(converted: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle as ``package --for triton`` writes it. Read only."""
    out = tmp_path_factory.mktemp("triton") / NAME
    place, _ = package(
        converted.path, "triton", options=PackageOptions(platform="onnxruntime", name=NAME),
        triton=TritonOptions(device="cpu"), out=out,
    )  # fmt: skip
    return place


@pytest.fixture(scope="session")
def triton(packaged: Path) -> Iterator[TritonServer]:
    """A server with that package, for tests that do not change it."""
    with TritonServer(packaged / "model_repository") as server:
        yield server


def copied(packaged: Path, place: Path, slow_ms: int = 0) -> Path:
    """A copy of the package's model repository for a separate server, optionally with slower calls."""
    repository = Path(shutil.copytree(packaged / "model_repository", place))
    if slow_ms:
        for config in (repository / MODEL).rglob("*.pbtxt"):
            text = f'\nparameters {{ key: "slow_ms" value {{ string_value: "{slow_ms}" }} }}\n'
            config.write_text(config.read_text() + text)
    return repository


def perturbed(model: Path, out: Path) -> Path:
    """The same model with a classifier scaled by 1.1, so that all answers differ."""
    proto = onnx.load(model)
    classifier = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("head."))
    classifier.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(classifier) + 0.1, classifier.name))
    out.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, out)
    return out


def photographs(count: int = 6) -> list[Image.Image]:
    """Real photographs of different shapes: scikit-learn's two, and parts of them."""
    generator = np.random.default_rng(0)
    found = sample_photographs()
    for number in range(count - len(found)):
        width, height = (int(side) for side in generator.integers(97, 400, 2))
        left, top = (int(generator.integers(0, 427 - side + 1)) for side in (width, height))
        found.append(found[number % 2].crop((left, top, left + width, top + height)))
    return found


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as a file."""
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def bomb(side: int = 10_000) -> bytes:
    """A PNG file of 100 megapixels in about ten kilobytes."""
    return encoded(Image.new("1", (side, side)))
