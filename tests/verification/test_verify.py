"""Verification has to catch a broken model, and nothing else: each kind of damage fails the check that is about it."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto
from PIL import Image

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import DENSE, GOLDEN, MANIFEST, MODEL
from evit_deploy.data.images import _crop, preprocess_image, sample_inputs, sample_photographs
from evit_deploy.errors import InputError
from evit_deploy.files import sha256
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Report
from evit_deploy.report.statistics import wilson
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.verification.golden import load_golden
from evit_deploy.verification.verify import verify, verify_runtime
from tests.support.damage import (
    depend_on_the_neighbors,
    depend_on_the_place,
    keep_the_lowest,
    keep_the_second_best,
    lose_the_fused_row,
    poison_a_weight,
    reverse_the_order,
    shift_a_weight,
)
from tests.support.models import of_kind, write_checkpoint

BATCHES = (1, 2, 8)
FROM_CHECKPOINT = "The reference was computed again, in FP64, from the checkpoint."
RECOMPUTED = {
    "model.onnx as the manifest says", "dense/model.onnx as the manifest says", "report.json as the manifest says",
    "golden logits: PyTorch's", "golden logits of the dense twin", "golden file: tolerance",
    "golden file: tolerance on ties", "golden file: tolerance of the dense twin",
}  # fmt: skip


@pytest.fixture
def bundle(tmp_path, converted: Bundle) -> Bundle:
    """A bundle and its checkpoint that a test may break."""
    shutil.copytree(converted.path.parent, tmp_path / "work")
    return read_bundle(tmp_path / "work" / converted.path.name)


def rehash(bundle: Bundle) -> None:
    """Lists the files as they now are: a wrong model that was wrong from the start has the right hash."""
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    manifest["files"] = {name: sha256(bundle.path / name) for name in manifest["files"]}
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def rewrite(bundle: Bundle, change: Callable[[ModelProto], None], name: str = MODEL) -> None:
    proto = onnx.load(bundle.path / name)
    change(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, bundle.path / name)
    rehash(bundle)


def checked(bundle: Bundle, **options: Any) -> Report:
    return verify(bundle.path, runtimes=["onnxruntime"], batch_sizes=BATCHES, threads=1, **options)


def failed(report: Report) -> set[str]:
    assert all(check.reason for check in report.failed)
    return {check.name for check in report.failed}


def every_batch(what: str, batches: tuple[int, ...] = BATCHES) -> set[str]:
    return {f"onnxruntime, batch {batch}: {what}" for batch in batches}


def test_a_sound_bundle_passes(bundle):
    report = verify(bundle.path, runtimes=["eager", "onnxruntime"], batch_sizes=BATCHES, threads=1)
    assert report.passed
    assert not any(check.reason for check in report.checks)
    wanted = {"files as written", "onnxruntime: dense twin's logits", *RECOMPUTED}
    for what in ("kept patches", "logits", "same answer at every place"):
        wanted |= every_batch(what) | {name.replace("onnxruntime", "eager") for name in every_batch(what)}
    assert {check.name for check in report.checks} == wanted
    assert report.notes == (FROM_CHECKPOINT,)
    assert [(row.first, row.second) for row in report.agreement] == [
        ("pytorch fp32", "eager"), ("pytorch fp32", "onnxruntime"), ("eager", "onnxruntime"),
    ]  # fmt: skip
    for row in report.agreement:
        assert (row.images, row.top1, set(row.kept.values())) == (8, 1, {1})
        assert row.logits < 1e-5


def test_without_a_wish_every_runtime_that_can_is_used(bundle):
    report = verify(bundle.path, batch_sizes=(1,), threads=1)
    used = {check.name.split(",")[0] for check in report.checks if "batch 1: logits" in check.name}
    assert used >= {"eager", "onnxruntime"}
    assert used <= {"eager", "onnxruntime", "openvino", *(name for name in RUNTIMES.names() if "onnxruntime-" in name)}


# Damage after the bundle was written.


@pytest.mark.parametrize("name", [MODEL, DENSE, GOLDEN, "report.json"])
def test_a_changed_file_is_found_by_its_hash(bundle, name):
    content = bytearray((bundle.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.path / name).write_bytes(content)
    report = checked(bundle)
    assert failed(report) == {"files as written"}
    assert name in report.failed[0].reason
    (check,) = report.checks
    assert (check.value, check.limit) == (1, 0)


def test_a_missing_file_is_found(bundle):
    (bundle.path / DENSE).unlink()
    assert failed(checked(bundle)) == {"files as written"}


# Models that were wrong from the start.


def test_a_single_wrong_weight_fails_the_logits(bundle):
    rewrite(bundle, shift_a_weight)
    assert failed(checked(bundle)) == every_batch("logits")


def test_a_single_wrong_weight_of_the_dense_twin_fails_its_logits(bundle):
    rewrite(bundle, shift_a_weight, DENSE)
    assert failed(checked(bundle)) == {"onnxruntime: dense twin's logits"}


def test_keeping_other_patches_fails_the_kept_patches(bundle):
    rewrite(bundle, keep_the_lowest)
    report = checked(bundle)
    # no image is left whose logits could be compared, which is no pass
    assert failed(report) == every_batch("kept patches") | every_batch("logits")
    assert "no image keeps PyTorch's patches" in next(c.reason for c in report.failed if c.name.endswith("logits"))


def test_losing_the_fused_row_fails_the_logits(bundle):
    rewrite(bundle, lose_the_fused_row)
    wrong = failed(checked(bundle))
    assert every_batch("logits") <= wrong
    assert wrong <= every_batch("logits") | every_batch("kept patches")  # it is scored at the next location


def test_the_order_of_kept_patches_is_no_difference(bundle):
    # raw indices of later locations all change; the patches they stand for do not
    rewrite(bundle, reverse_the_order)
    assert failed(checked(bundle)) == set()


def test_an_answer_that_depends_on_the_place_in_the_batch(bundle):
    rewrite(bundle, depend_on_the_place)
    wanted = every_batch("same answer at every place", (2, 8)) | every_batch("logits", (2, 8))
    assert failed(checked(bundle)) == wanted


def test_an_answer_that_depends_on_the_other_images(bundle):
    # In a batch of equal images nothing is wrong, so only the logits of different images can show it.
    rewrite(bundle, depend_on_the_neighbors)
    assert failed(checked(bundle)) == every_batch("logits", (2, 8))


@pytest.mark.parametrize("answer", [np.nan, np.inf])
def test_answers_that_are_not_finite_fail(bundle, answer):
    rewrite(bundle, lambda proto: poison_a_weight(proto, answer))
    report = checked(bundle)
    assert every_batch("logits") <= failed(report)
    rewrite(bundle, lambda proto: poison_a_weight(proto, answer), DENSE)
    assert "onnxruntime: dense twin's logits" in failed(checked(bundle))


def test_keeping_the_second_best_fails_the_kept_patches(bundle):
    rewrite(bundle, keep_the_second_best)
    assert every_batch("kept patches") <= failed(checked(bundle))


def test_a_wrong_pytorch_model_is_found(bundle):
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    model: Any = reduce_tokens_(of_kind("plain"), bundle.manifest.tokens)
    assert verify_runtime("eager", model, golden, bundle.manifest.plan, BATCHES, 1)[0].passed
    with torch.no_grad():
        model.norm.bias[0] += 0.01
    report, _ = verify_runtime("eager", model, golden, bundle.manifest.plan, BATCHES, 1)
    assert {name.split(": ")[1] for name in failed(report)} == {"logits"}


# Where the checkpoint is.


def test_a_bundle_that_moved_with_its_checkpoint(bundle, tmp_path):
    (tmp_path / "work").rename(tmp_path / "elsewhere")
    report = verify(tmp_path / "elsewhere" / bundle.path.name, batch_sizes=(1,), threads=1)
    assert report.passed
    assert any(check.name.startswith("eager") for check in report.checks)


def test_a_checkpoint_that_is_gone_is_noted(bundle, tmp_path, checkpoint_file):
    (bundle.path.parent / checkpoint_file.name).rename(tmp_path / "moved.safetensors")
    report = verify(bundle.path, batch_sizes=(1,), threads=1)
    assert report.passed
    assert not any(check.name.startswith("eager") for check in report.checks)
    assert any("gone" in note and "--against" in note for note in report.notes)
    with pytest.raises(InputError, match=r"--runtime eager.*gone"):
        verify(bundle.path, runtimes=["eager"], threads=1)
    report = verify(bundle.path, batch_sizes=(1,), threads=1, against=tmp_path / "moved.safetensors")
    assert any(check.name.startswith("eager") for check in report.checks)
    assert report.notes == (FROM_CHECKPOINT,)


def test_another_checkpoint_is_refused(bundle, tmp_path):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(InputError, match="not the checkpoint it was made from"):
        verify(bundle.path, against=other, threads=1)
    with pytest.raises(InputError, match="--against"):
        verify(bundle.path, against=tmp_path / "absent.safetensors", threads=1)


def test_a_runtime_without_a_file_in_the_bundle(bundle):
    with pytest.raises(InputError, match=r"nothing that tensorrt runs \(got .*model\.onnx.*, expected engine\.plan"):
        verify(bundle, runtimes=["tensorrt"], threads=1)


def test_an_unknown_runtime(bundle):
    with pytest.raises(InputError, match="Did you mean 'onnxruntime'"):
        verify(bundle.path, runtimes=["onnxrutnime"])


# Pictures.


def independent(image: Image.Image, preprocess: Any) -> np.ndarray:
    """Resize the shorter side, crop the center, normalize; written without timm and torchvision."""
    size = preprocess.size[0]
    shorter = int(np.floor(size / preprocess.crop_pct))
    scale = shorter / min(image.size)
    width, height = (shorter if side == min(image.size) else int(side * scale) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float64) / 255
    return ((pixels - preprocess.mean) / preprocess.std).transpose(2, 0, 1)


def test_golden_inputs_are_the_sample_photographs(converted):
    golden, preprocess = load_golden(converted.file(GOLDEN), converted.manifest), converted.manifest.preprocess
    np.testing.assert_array_equal(golden.inputs, sample_inputs(preprocess, len(golden.inputs)))
    photographs = sample_photographs()
    assert [photograph.size for photograph in photographs] == [(640, 427)] * 2
    for i, given in enumerate(golden.inputs):
        crop = _crop(photographs[i % 2], seed=i)
        np.testing.assert_array_equal(given, preprocess_image(crop, preprocess))
        np.testing.assert_allclose(given, independent(crop, preprocess), atol=1e-5)
    assert len({given.tobytes() for given in golden.inputs}) == len(golden.inputs)


def image_folder(folder: Path, classes: int = 3, each: int = 3) -> Path:
    for label in range(classes):
        (folder / f"class {label}").mkdir(parents=True)
        for i in range(each):
            _crop(sample_photographs()[i % 2], seed=10 * label + i).save(folder / f"class {label}" / f"{i}.png")
    return folder


def test_accuracy_on_a_folder(bundle, tmp_path):
    folder = image_folder(tmp_path / "images")
    report = checked(bundle, data=folder)
    dense, row = report.compared
    model: Any = reduce_tokens_(of_kind("plain"), bundle.manifest.tokens)
    inputs = [independent(Image.open(path), bundle.manifest.preprocess) for path in sorted(folder.rglob("*.png"))]
    with torch.inference_mode():
        ranked = model(torch.from_numpy(np.stack(inputs)).float()).argsort(1, descending=True).numpy()
    labels = np.repeat(np.arange(3), 3)[:, None]
    assert (dense.name, row.name, row.runtime, row.images) == ("dense", "model", "onnxruntime", 9)
    assert row.top1 == (ranked[:, :1] == labels).mean()
    assert row.top5 == (ranked[:, :5] == labels).any(1).mean()
    assert (row.top1_low, row.top1_high) == wilson(round(9 * row.top1), 9)
    assert report.agreement == ()  # there is only one
    assert any("taken for its first 3" in note for note in report.notes)


def test_runtimes_are_compared_on_the_folder(bundle, tmp_path):
    folder = image_folder(tmp_path / "images")
    names = ["eager", "onnxruntime"]
    report = verify(bundle.path, runtimes=names, batch_sizes=(1,), threads=1, data=folder)
    (row,) = report.agreement
    assert (row.first, row.second, row.images, row.top1) == (*names, 9, 1)
    assert list(row.kept) == [str(location.block) for location in bundle.manifest.plan.locations]
    assert set(row.kept.values()) == {1}
    assert 0 <= row.logits < 1e-5
    assert [(row.runtime, row.name) for row in report.compared] == list(itertools.product(names, ("dense", "model")))
    rewrite(bundle, keep_the_lowest)
    (row,) = verify(bundle.path, runtimes=names, batch_sizes=(1,), threads=1, data=folder).agreement
    assert max(row.kept.values()) < 0.5
    assert row.logits > 0.01


def test_a_folder_that_does_not_fit(bundle, tmp_path):
    with pytest.raises(InputError, match="more class folders than the model has classes"):
        checked(bundle, data=image_folder(tmp_path / "images", classes=11, each=1))
    with pytest.raises(InputError, match="no such folder"):
        checked(bundle, data=tmp_path / "absent")
