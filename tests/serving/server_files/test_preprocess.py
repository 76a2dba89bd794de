"""The preprocessing that runs inside Triton: the same bits as evit-deploy's own, and an error for what is no image."""

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.serving.server_files import preprocess as triton_preprocess
from evit_deploy.serving.server_files.preprocess import ImageError, ImagePreprocess, TritonPythonModel
from tests.support.cpp_example import pictures

HALF = (0.5, 0.5, 0.5)
PREPROCESS = {
    "DeiT": Preprocess((224, 224)),
    "digits": Preprocess((32, 32), crop_pct=1.0, mean=HALF, std=HALF),
    "squash": Preprocess((96, 128), crop_pct=0.95, crop_mode="squash", interpolation="bilinear"),
    "border": Preprocess((112, 96), crop_pct=0.9, crop_mode="border", mean=(0.48, 0.46, 0.41)),
    "CLIP of Hugging Face": Preprocess((96, 96), crop_pct=1.0, crop_mode="center-floor"),
    "not square": Preprocess((64, 96), crop_pct=0.9, interpolation="lanczos"),
    "crop larger than the image": Preprocess((80, 80), crop_pct=1.25),
}


def settings(preprocess: Preprocess, **limits: int) -> dict[str, Any]:
    return json.loads(msgspec.json.encode(msgspec.to_builtins(preprocess) | limits))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def more_files() -> dict[str, bytes]:
    china, flower = sample_photographs()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    depths = np.asarray(china.convert("L"), np.uint16) * 257
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 1000, zip=True)
    return {
        "cmyk.jpg": encoded(china.convert("CMYK"), "JPEG"),
        "rotated by EXIF.jpg": encoded(china, "JPEG", exif=rotated),
        "16 bit.png": encoded(Image.fromarray(depths), "PNG"),
        "animated.png": encoded(china, "PNG", save_all=True, append_images=[flower]),
        "with text.png": encoded(flower, "PNG", pnginfo=text),
    }


FILES = {
    name: encoded(picture, "JPEG" if name.endswith(".jpg") else "PNG", **options)
    for name, (picture, options) in pictures().items()
} | more_files()


@pytest.mark.parametrize("mode", PREPROCESS)
@pytest.mark.parametrize("name", FILES)
def test_the_same_bits_as_in_training(name, mode, tmp_path):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    wanted = preprocess_image(path, PREPROCESS[mode])
    found = ImagePreprocess(settings(PREPROCESS[mode]))(FILES[name])
    assert (found.dtype, found.shape) == (np.float32, wanted.shape)
    np.testing.assert_array_equal(found, wanted)


sides = st.integers(1, 90)


@given(
    height=sides, width=sides, size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    crop_pct=st.floats(0.3, 1.6), crop_mode=st.sampled_from(["center", "center-floor", "squash", "border"]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]),
    mean=st.tuples(*[st.floats(0, 1)] * 3), std=st.tuples(*[st.floats(0.05, 1)] * 3),
)  # fmt: skip
@example(
    height=1, width=1, size=(1, 2), crop_pct=1.5, crop_mode="center", interpolation="nearest", mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)  # fmt: skip
@example(  # narrower than the crop in one direction and wider in the other
    height=1, width=3, size=(3, 3), crop_pct=1.5, crop_mode="center-floor", interpolation="nearest",
    mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
)  # fmt: skip
def test_any_size_and_any_settings(height, width, size, crop_pct, crop_mode, interpolation, mean, std):
    preprocess = Preprocess(size, crop_pct, crop_mode, interpolation, mean, std)
    pixels = np.random.default_rng(height * 97 + width).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    own = ImagePreprocess(settings(preprocess))
    try:
        wanted = preprocess_image(image, preprocess)
    except (ValueError, ZeroDivisionError):  # resized to nothing
        with pytest.raises(ImageError, match="too narrow"):
            own(encoded(image, "PNG"))
        return
    np.testing.assert_array_equal(own(encoded(image, "PNG")), wanted)


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few hundred kilobytes at most with this many black pixels."""
    return encoded(Image.new("1", (width, height)), "PNG")


NO_IMAGES = {
    "nothing": (b"", "empty"),
    "text": (b"not an image", "not a JPEG or PNG image"),
    "a header alone": (b"\x89PNG\r\n\x1a\n", "not a JPEG or PNG image"),
    "half a JPEG": (FILES["china.jpg"][:20000], "cannot be read to its end"),
    "half a PNG": (FILES["china.png"][:20000], "cannot be read to its end"),
    "a GIF": (encoded(sample_photographs()[0], "GIF"), "not a JPEG or PNG image"),
    "100 megapixels": (bomb(10_000, 10_000), "too large (10000 x 10000 pixels"),
    "900 megapixels": (bomb(30_000, 30_000), "too large"),
    "a hair": (bomb(1, 30_000), "once it is resized, is too large"),
    "too many bytes": (bytes(triton_preprocess.MAX_BYTES + 1), f"{triton_preprocess.MAX_BYTES + 1} bytes"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_refused(name):
    content, words = NO_IMAGES[name]
    with pytest.raises(ImageError) as refusal:
        ImagePreprocess(settings(PREPROCESS["DeiT"]))(content)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 300
    assert "BytesIO" not in str(refusal.value)


def test_limits_are_parameters():
    china = FILES["china.jpg"]
    with pytest.raises(ImageError, match=r"640 x 427 pixels, at most 1000 "):
        ImagePreprocess(settings(PREPROCESS["digits"], max_pixels=1000))(china)
    with pytest.raises(ImageError, match="at most 99 are taken"):
        ImagePreprocess(settings(PREPROCESS["digits"], max_bytes=99))(china)


@given(
    name=st.sampled_from(["small.png", "palette.png", "odd.jpg", "progressive.jpg"]),
    cut=st.floats(0, 1), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
)  # fmt: skip
def test_a_damaged_file_is_an_input_or_an_error_never_a_crash(name, cut, changes):
    content = bytearray(FILES[name])
    del content[int(len(content) * cut) :]
    assume(content)
    for place, value in changes:
        content[int((len(content) - 1) * place)] = value
    try:
        found = ImagePreprocess(settings(PREPROCESS["digits"]))(bytes(content))
    except ImageError:
        return
    assert found.shape == (3, 32, 32)
    assert np.isfinite(found).all()


# ---- as the server calls it: triton_python_backend_utils exists inside a server only, so its few names stand in


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError(Exception):
    INVALID_ARG = 3

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class InferenceResponse:
    def __init__(self, output_tensors: Any = (), error: Any = None) -> None:
        self.output_tensors, self.error = output_tensors, error


@pytest.fixture
def model(monkeypatch) -> TritonPythonModel:
    backend: Any = types.ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.TritonError, backend.InferenceResponse = Tensor, TritonError, InferenceResponse
    backend.get_input_tensor_by_name = lambda request, name: Tensor(name, request[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    model = TritonPythonModel()
    parameter = {"string_value": json.dumps(settings(PREPROCESS["digits"]))}
    model.initialize({"model_config": json.dumps({"parameters": {"preprocess": parameter}})})
    return model


def request(*contents: bytes) -> dict[str, np.ndarray]:
    return {"IMAGE": np.array([[content] for content in contents], dtype=object)}


def test_one_answer_for_each_request_and_an_error_for_its_own_alone(model):
    good, other = FILES["china.jpg"], FILES["small.png"]
    first, bad, second = model.execute([request(good, other), request(good, good[:500], other), request(other)])
    (tensor,) = first.output_tensors
    assert (tensor.name, tensor.array.shape, tensor.array.dtype) == ("input", (2, 3, 32, 32), np.float32)
    own = ImagePreprocess(settings(PREPROCESS["digits"]))
    np.testing.assert_array_equal(tensor.array, np.stack([own(good), own(other)]))
    np.testing.assert_array_equal(second.output_tensors[0].array, own(other)[None])
    assert bad.error.code == TritonError.INVALID_ARG
    assert str(bad.error).startswith("image 2 of 3: ")
    assert not bad.output_tensors


def test_a_lone_image_is_not_numbered(model):
    (answer,) = model.execute([request(b"text")])
    assert str(answer.error).startswith("not a JPEG or PNG image")


def test_the_file_stands_on_its_own(tmp_path):
    """A server has numpy and Pillow, and neither evit-deploy nor PyTorch."""
    path = tmp_path / "model.py"
    path.write_bytes(Path(triton_preprocess.__file__).read_bytes())
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("model", {str(path)!r})
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
print(json.dumps(sorted(name.split(".")[0] for name in sys.modules)))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert loaded >= {"numpy", "PIL"}
    assert loaded.isdisjoint({"evit_deploy", "torch", "timm", "torchvision", "msgspec"})
