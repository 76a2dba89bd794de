"""The valid files that hostile ones are made from, made when first needed."""

import functools
from pathlib import Path

from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from tests.support.models import write_checkpoint
from tests.support.shared import made_once


@functools.cache
def bundle() -> Path:
    """A bundle of the smallest model with an OpenVINO model in it. Read only."""

    def make(folder: Path) -> None:
        folder.mkdir()
        checkpoint = write_checkpoint(folder / "smallest.safetensors", "smallest")
        options = ConvertOptions(targets=("onnx", "openvino"))
        measure = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
        convert(checkpoint, keep_rate=0.6, options=options, measure=measure, out=folder / "bundle")

    return made_once("fuzz", make) / "bundle"
