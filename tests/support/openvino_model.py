"""The plain model in OpenVINO's format, and how to run it."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evit_deploy.export.card import INPUT
from evit_deploy.export.openvino import save_openvino
from evit_deploy.runtimes.openvino import OpenVINORunner
from tests.support.exports import exported, reduced
from tests.support.models import images

NEEDS_OPENVINO = [
    pytest.mark.openvino,
    pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed"),
]


def inputs(count: int = 3) -> dict[str, np.ndarray]:
    return {INPUT: images(reduced("plain"), count)}


@pytest.fixture(scope="module")
def ir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain model in OpenVINO's format. Read only."""
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    save_openvino(exported("plain"), path)
    return path


def run(artifact: Any, feeds: dict[str, np.ndarray], **options: Any) -> dict[str, np.ndarray]:
    with OpenVINORunner(artifact, threads=1, **options) as runner:
        return runner.infer(feeds)
