"""DALI's preprocessing, on the CPU: the same sizes and crops as evit-deploy's own, and nearly the same pixels.

Neither its GPU decoder nor Triton's DALI backend runs here.
"""

import io
import json

import msgspec
import numpy as np
import pytest
from PIL import Image

from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.data.preprocess import Preprocess

PREPROCESS = {
    "DeiT": Preprocess((224, 224)),
    "bilinear, crop 0.9": Preprocess((160, 160), crop_pct=0.9, interpolation="bilinear"),
    "squash": Preprocess((96, 128), crop_pct=0.95, crop_mode="squash"),
}
# Side lengths whose margins after resizing are even, odd, and odd the other way round.
SIZES = ((640, 427), (427, 640), (300, 301), (511, 333), (512, 333), (224, 224))


@pytest.mark.parametrize("name", PREPROCESS)
def test_near_to_pillow(name):
    dali = pytest.importorskip("nvidia.dali")
    from evit_deploy.serving.server_files import dali as triton_dali  # imports DALI

    preprocess = PREPROCESS[name]
    files, wanted = [], []
    for index, size in enumerate(SIZES):
        picture = sample_photographs()[index % 2].resize(size)
        file = io.BytesIO()
        picture.save(file, "PNG")
        files.append(np.frombuffer(file.getvalue() + bytes(100 * index), np.uint8))  # a batch is filled up with zeros
        wanted.append(preprocess_image(Image.open(file), preprocess))
    settings = json.loads(msgspec.json.encode(preprocess))

    @dali.pipeline_def(batch_size=len(files), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        return triton_dali.images(settings, "cpu")

    (found,) = pipeline().run(IMAGE=files)
    std = np.reshape(preprocess.std, (3, 1, 1))
    for index, want in enumerate(wanted):
        levels = np.abs(np.array(found[index]) - want) * std * 255
        assert levels.mean() < 0.3, SIZES[index]
        assert levels.max() < 8, SIZES[index]
