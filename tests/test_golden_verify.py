"""Verification has to catch a broken model, and nothing else: each kind of damage fails the check that is about it."""

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnx.helper as helper
import pytest
import scipy.stats
import torch
from models import images, of_kind, write_checkpoint
from onnx import ModelProto, numpy_helper
from PIL import Image

from evit_deploy.bundle import DENSE, GOLDEN, MANIFEST, MODEL, Bundle, read_bundle, sha256
from evit_deploy.data import _crop, preprocess_image, sample_inputs, sample_photographs
from evit_deploy.errors import InputError
from evit_deploy.export import LOGITS, kept_name
from evit_deploy.golden import FLOOR, Golden, agreement, load_golden, logit_error, make_golden
from evit_deploy.report import Report, wilson
from evit_deploy.tokens.plan import TokenSpec, make_plan
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.verify import verify, verify_runtime

BATCHES = (1, 2, 8)
EPS = float(np.finfo(np.float32).eps)


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
    report = verify(bundle.path, batch_sizes=BATCHES, threads=1)
    assert report.passed
    wanted = {"files as written", "onnxruntime: dense twin's logits"}
    for what in ("kept patches", "logits", "same answer at every place"):
        wanted |= every_batch(what) | {name.replace("onnxruntime", "eager") for name in every_batch(what)}
    assert {check.name for check in report.checks} == wanted
    assert report.notes == ()


# Damage after the bundle was written.


@pytest.mark.parametrize("name", [MODEL, DENSE, GOLDEN, "report.json"])
def test_a_changed_file_is_found_by_its_hash(bundle, name):
    content = bytearray((bundle.path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.path / name).write_bytes(content)
    report = checked(bundle)
    assert failed(report) == {"files as written"}
    assert name in report.failed[0].reason
    assert len(report.checks) == 1


def test_a_missing_file_is_found(bundle):
    (bundle.path / DENSE).unlink()
    assert failed(checked(bundle)) == {"files as written"}


# Models that were wrong from the start.


def head_weight(proto: ModelProto) -> onnx.TensorProto:
    names = {name for node in proto.graph.node if LOGITS in node.output for name in node.input}
    return next(tensor for tensor in proto.graph.initializer if tensor.name in names and len(tensor.dims) == 2)


def shift_a_weight(proto: ModelProto) -> None:
    tensor = head_weight(proto)
    array = numpy_helper.to_array(tensor).copy()
    array[3, 3] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def test_a_single_wrong_weight_fails_the_logits(bundle):
    rewrite(bundle, shift_a_weight)
    assert failed(checked(bundle)) == every_batch("logits")


def test_a_single_wrong_weight_of_the_dense_twin_fails_its_logits(bundle):
    rewrite(bundle, shift_a_weight, DENSE)
    assert failed(checked(bundle)) == {"onnxruntime: dense twin's logits"}


def function_node(proto: ModelProto, output: str) -> onnx.NodeProto:
    return next(node for node in proto.functions[0].node if output in node.output)


def keep_the_lowest(proto: ModelProto) -> None:
    node = function_node(proto, "order")
    next(a for a in node.attribute if a.name == "largest").i = 0


def test_keeping_other_patches_fails_the_kept_patches(bundle):
    rewrite(bundle, keep_the_lowest)
    report = checked(bundle)
    # no image is left whose logits could be compared, which is no pass
    assert failed(report) == every_batch("kept patches") | every_batch("logits")
    assert "no image keeps PyTorch's patches" in next(c.reason for c in report.failed if c.name.endswith("logits"))


def lose_the_fused_row(proto: ModelProto) -> None:
    node = function_node(proto, "sum_float")
    index = list(proto.functions[0].node).index(node)
    node.output[0] = "sum_before"
    proto.functions[0].node.insert(index + 1, helper.make_node("Mul", ["sum_before", "zero"], ["sum_float"]))


def test_losing_the_fused_row_fails_the_logits(bundle):
    rewrite(bundle, lose_the_fused_row)
    wrong = failed(checked(bundle))
    assert every_batch("logits") <= wrong
    assert wrong <= every_batch("logits") | every_batch("kept patches")  # it is scored at the next location


def reverse_the_order(proto: ModelProto) -> None:
    node = function_node(proto, "order")
    index = list(proto.functions[0].node).index(node)
    node.output[1] = "order_before"
    for name, value in (("back", -1), ("beginning", -(2**62))):
        constant = helper.make_node("Constant", [], [name], value_ints=[value])
        proto.functions[0].node.insert(0, constant)
    reverse = helper.make_node("Slice", ["order_before", "back", "beginning", "axis_1", "back"], ["order"])
    proto.functions[0].node.insert(index + 3, reverse)


def test_the_order_of_kept_patches_is_no_difference(bundle):
    # raw indices of later locations all change; the patches they stand for do not
    rewrite(bundle, reverse_the_order)
    assert failed(checked(bundle)) == set()


def depend_on_the_place(proto: ModelProto) -> None:
    """Adds a hundredth of the place in the batch to the logits; the first image is right."""
    graph = proto.graph
    node = next(node for node in graph.node if LOGITS in node.output)
    node.output[list(node.output).index(LOGITS)] = "right"
    one, axis = (numpy_helper.from_array(np.array(v, t), n) for n, v, t in (("c", [0.01], "f4"), ("axis", 0, "i8")))
    graph.initializer.append(axis)
    graph.node.extend(
        [
            helper.make_node("Shape", ["right"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["hundredths"], value=one),
            helper.make_node("CumSum", ["hundredths", "axis"], ["shift"], exclusive=1),
            helper.make_node("Add", ["right", "shift"], [LOGITS]),
        ]
    )


def test_an_answer_that_depends_on_the_place_in_the_batch(bundle):
    rewrite(bundle, depend_on_the_place)
    wanted = every_batch("same answer at every place", (2, 8)) | every_batch("logits", (2, 8))
    assert failed(checked(bundle)) == wanted


def depend_on_the_neighbours(proto: ModelProto) -> None:
    """Takes the mean of the batch's logits in place of each image's own mean."""
    graph = proto.graph
    node = next(node for node in graph.node if LOGITS in node.output)
    node.output[list(node.output).index(LOGITS)] = "right"
    graph.node.extend(
        [
            helper.make_node("ReduceMean", ["right", "class_axis"], ["own_mean"], keepdims=1),
            helper.make_node("ReduceMean", ["right"], ["mean_of_all"], keepdims=1),
            helper.make_node("Sub", ["right", "own_mean"], ["centred"]),
            helper.make_node("Add", ["centred", "mean_of_all"], [LOGITS]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "class_axis"))


def test_an_answer_that_depends_on_the_other_images(bundle):
    # In a batch of equal images nothing is wrong, so only the logits of different images can show it.
    rewrite(bundle, depend_on_the_neighbours)
    assert failed(checked(bundle)) == every_batch("logits", (2, 8))


def test_a_wrong_pytorch_model_is_found(bundle):
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest.plan)
    model: Any = reduce_tokens_(of_kind("plain"), bundle.manifest.tokens)
    assert verify_runtime("eager", model, golden, bundle.manifest.plan, BATCHES, 1).passed
    with torch.no_grad():
        model.norm.bias[0] += 0.01
    report = verify_runtime("eager", model, golden, bundle.manifest.plan, BATCHES, 1)
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
    assert report.notes == ()


def test_another_checkpoint_is_refused(bundle, tmp_path):
    other = write_checkpoint(tmp_path / "other.safetensors", seed=1)
    with pytest.raises(InputError, match="not the checkpoint it was made from"):
        verify(bundle.path, against=other, threads=1)
    with pytest.raises(InputError, match="--against"):
        verify(bundle.path, against=tmp_path / "absent.safetensors", threads=1)


def test_an_unknown_runtime(bundle):
    with pytest.raises(InputError, match="Did you mean 'onnxruntime'"):
        verify(bundle.path, runtimes=["onnxrutnime"])


# Pictures.


def independent(image: Image.Image, preprocess: Any) -> np.ndarray:
    """Resize the shorter side, crop the centre, normalise; written without timm and torchvision."""
    size = preprocess.size[0]
    shorter = int(np.floor(size / preprocess.crop_pct))
    scale = shorter / min(image.size)
    width, height = (shorter if side == min(image.size) else int(side * scale) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    pixels = np.asarray(resized.crop((left, top, left + size, top + size)), np.float64) / 255
    return ((pixels - preprocess.mean) / preprocess.std).transpose(2, 0, 1)


def test_golden_inputs_are_the_sample_photographs(converted):
    golden, preprocess = load_golden(converted.file(GOLDEN), converted.manifest.plan), converted.manifest.preprocess
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
    (row,) = report.accuracy
    model: Any = reduce_tokens_(of_kind("plain"), bundle.manifest.tokens)
    inputs = [independent(Image.open(path), bundle.manifest.preprocess) for path in sorted(folder.rglob("*.png"))]
    with torch.inference_mode():
        ranked = model(torch.from_numpy(np.stack(inputs)).float()).argsort(1, descending=True).numpy()
    labels = np.repeat(np.arange(3), 3)[:, None]
    assert row.count == 9
    assert row.top1 == (ranked[:, :1] == labels).mean()
    assert row.top5 == (ranked[:, :5] == labels).any(1).mean()
    assert (row.low, row.high) == wilson(round(9 * row.top1), 9)


def test_a_folder_that_does_not_fit(bundle, tmp_path):
    with pytest.raises(InputError, match="more class folders than the model has classes"):
        checked(bundle, data=image_folder(tmp_path / "images", classes=11, each=1))
    with pytest.raises(InputError, match="no such folder"):
        checked(bundle, data=tmp_path / "absent")


# The golden file.


def golden_bytes(converted: Bundle) -> dict[str, np.ndarray]:
    with np.load(converted.file(GOLDEN)) as archive:
        return dict(archive)


def test_the_golden_file_is_read_as_it_was_written(tmp_path, converted):
    golden = load_golden(converted.file(GOLDEN), converted.manifest.plan)
    golden.save(tmp_path / GOLDEN)
    again = load_golden(tmp_path / GOLDEN, converted.manifest.plan)
    arrays, arrays_again = golden._arrays(), again._arrays()
    assert arrays.keys() == arrays_again.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, arrays_again[name])
    plan = converted.manifest.plan
    assert list(golden.kept) == list(golden.margin) == [row.block for row in plan.locations]
    for row in plan.locations:
        kept = golden.kept[row.block]
        assert kept.shape == (len(golden.inputs), row.keep + row.fused)
        assert (kept[:, -1] == -1).all()
        assert kept.max() < plan.patches


def test_pickled_arrays_are_refused(tmp_path, converted):
    arrays: dict[str, Any] = golden_bytes(converted)
    np.savez(tmp_path / GOLDEN, **arrays | {"logits": np.array([{"a": 1}], object)})
    with pytest.raises(InputError, match=r"golden\.npz.*allow_pickle"):
        load_golden(tmp_path / GOLDEN, converted.manifest.plan)


@pytest.mark.parametrize("missing", ["inputs", "logits", "dense_reference", "kept_1", "margin_1"])
def test_a_golden_file_without_a_field(tmp_path, converted, missing):
    arrays: dict[str, Any] = golden_bytes(converted)
    del arrays[missing]
    np.savez(tmp_path / GOLDEN, **arrays)
    with pytest.raises(InputError, match="not those of the plan" if "_1" in missing else missing):
        load_golden(tmp_path / GOLDEN, converted.manifest.plan)


@pytest.mark.parametrize("name", ["other", "other_3", "kept_x", "kept_1_2"])
def test_a_golden_file_with_another_field(tmp_path, converted, name):
    np.savez(tmp_path / GOLDEN, **golden_bytes(converted) | {name: np.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"golden\.npz"):
        load_golden(tmp_path / GOLDEN, converted.manifest.plan)


def test_a_damaged_golden_file(tmp_path, converted):
    content = converted.file(GOLDEN).read_bytes()
    plain = io.BytesIO()
    np.save(plain, np.zeros(3))
    damaged = [content[: len(content) // 2], content[:-1], b"", b"text", plain.getvalue()]
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255  # the archive has a checksum
    for broken in [*damaged, bytes(flipped)]:
        (tmp_path / GOLDEN).write_bytes(broken)
        with pytest.raises(InputError, match=r"golden\.npz"):
            load_golden(tmp_path / GOLDEN, converted.manifest.plan)


# Ties and tolerances.

PLAN = make_plan(TokenSpec(keep_rate=0.5, locations=(0, 1), fuse=True), prefix=1, patches=6, depth=3)


def synthetic(margin0: list[float], margin1: list[float]) -> Golden:
    """Three images; keeps patches 0, 1, 2 of 6, then candidates 0 and 1 (patches 0 and 1) of the 4."""
    logits = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]], np.float32)
    kept = {0: np.tile([0, 1, 2, -1], (3, 1)), 1: np.tile([0, 1, -1], (3, 1))}
    margin = {0: np.array(margin0), 1: np.array(margin1)}
    inputs = np.zeros((3, 1, 1, 1), np.float32)
    return Golden(inputs, logits, logits.astype(np.float64), logits, logits.astype(np.float64), kept, margin)


def outputs_of(golden: Golden, **changes: np.ndarray) -> dict[str, np.ndarray]:
    kept0, kept1 = np.tile([0, 1, 2], (3, 1)).astype(np.int32), np.tile([0, 1], (3, 1)).astype(np.int32)
    return {LOGITS: golden.logits.copy(), kept_name(0): kept0, kept_name(1): kept1} | changes


def compared(golden: Golden, outputs: dict[str, np.ndarray]) -> Any:
    return agreement(golden, np.arange(3), outputs, PLAN)


CLEAR = [9.0, 9.0, 9.0]


def test_equal_answers_agree():
    found = compared(synthetic(CLEAR, CLEAR), outputs_of(synthetic(CLEAR, CLEAR)))
    assert (found.same, found.ties, found.wrong, found.top1, found.error) == (1, 0, 0, 1, 0)
    assert found.limit == FLOOR * EPS * 3


def test_a_clear_difference_is_wrong_and_a_tie_is_not():
    other = np.array([[0, 1, 2], [0, 1, 3], [0, 1, 2]], np.int32)
    wrong = compared(synthetic(CLEAR, CLEAR), outputs_of(synthetic(CLEAR, CLEAR), kept_0=other))
    assert (wrong.same, wrong.ties, wrong.wrong) == (2 / 3, 0, 1 / 3)
    golden = synthetic([9, 0.5, 9], CLEAR)
    broken = golden.logits + np.array([[0], [5], [0]], np.float32)  # of another set come other logits
    tie = compared(golden, outputs_of(golden, kept_0=other, logits=broken))
    assert (tie.same, tie.ties, tie.wrong, tie.error) == (2 / 3, 1 / 3, 0, 0)


def test_a_difference_after_a_tie_follows_from_it():
    golden = synthetic([9, 0.5, 9], CLEAR)
    kept0 = np.array([[0, 1, 2], [0, 1, 5], [0, 1, 2]], np.int32)
    kept1 = np.array([[0, 1], [2, 3], [0, 1]], np.int32)
    assert compared(golden, outputs_of(golden, kept_0=kept0, kept_1=kept1)).wrong == 0
    # ... but a clear one that comes first is not excused by a later tie
    golden = synthetic(CLEAR, [9, 0.5, 9])
    assert compared(golden, outputs_of(golden, kept_0=kept0, kept_1=kept1)).wrong == 1 / 3


def test_kept_sets_are_compared_in_original_patch_numbers():
    golden = synthetic(CLEAR, CLEAR)
    # The first location gives 2, 0, 1 in this order: patches 0 and 1 are candidates 1 and 2 of the second.
    turned = outputs_of(
        golden, kept_0=np.tile([2, 0, 1], (3, 1)).astype(np.int32), kept_1=np.tile([2, 1], (3, 1)).astype(np.int32)
    )
    assert compared(golden, turned).same == 1
    raw = outputs_of(golden, kept_0=np.tile([2, 0, 1], (3, 1)).astype(np.int32))  # now 0, 1 stand for 2 and 0
    assert compared(golden, raw).wrong == 1


def test_logits_are_compared_wherever_the_choice_is_the_same():
    golden = synthetic([9, 0.5, 9], CLEAR)  # also on a tie: the reference made the same choice
    for image in range(3):
        shifted = golden.logits.copy()
        shifted[image] += 5
        assert compared(golden, outputs_of(golden, logits=shifted)).error == 5


def test_nothing_to_compare_is_no_agreement():
    golden = synthetic([0.5] * 3, CLEAR)
    found = compared(golden, outputs_of(golden, kept_0=np.tile([0, 1, 3], (3, 1)).astype(np.int32)))
    assert np.isnan(found.error)
    assert (found.same, found.ties, found.wrong) == (0, 1, 0)


def test_the_reference_keeps_what_the_fp32_model_kept():
    """All patches alike: FP64 left to itself would break the ties by other rounding, and answer something else."""
    model = of_kind("plain")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
    dense = copy.deepcopy(model)
    reduce_tokens_(model, TokenSpec(keep_rate=0.6))
    generator = np.random.default_rng(0)
    inputs = 0.5 + 1e-7 * generator.standard_normal(images(model, 3).shape).astype(np.float32)
    golden = make_golden(model, dense, inputs)
    error, limit = logit_error(golden.logits, golden.reference, np.arange(3), golden.logits)
    assert error <= limit < 1e-4


def test_equal_patches_are_a_tie_in_the_golden_file():
    model = of_kind("plain")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0  # without a place, equal patches get equal scores
    dense = copy.deepcopy(model)
    reduce_tokens_(model, TokenSpec(keep_rate=0.6))
    inputs = images(model, 3)
    inputs[1] = 0.5
    golden = make_golden(model, dense, inputs)
    first = golden.margin[1]
    assert first[1] < 1
    assert (first[[0, 2]] > 1).all()


def test_a_model_on_a_tie_may_choose_otherwise(tmp_path):
    # Ties broken the other way round, as OpenVINO may do: not wrong, and the remaining images are still compared.
    model: Any = of_kind("plain")
    with torch.no_grad():
        model.pos_embed[:, 1:] = 0
    dense = copy.deepcopy(model)
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, locations=(1,)))
    inputs = images(model, 3)
    inputs[1] = 0.5
    golden = make_golden(model, dense, inputs)
    plan = model.token_plan
    outputs = {LOGITS: golden.logits.copy(), kept_name(1): golden.kept[1][:, :-1].copy()}
    outputs[kept_name(1)][1] = np.arange(plan.patches - plan.locations[0].keep, plan.patches)
    found = agreement(golden, np.arange(3), outputs, plan)
    assert (found.same, found.ties, found.wrong) == (2 / 3, 1 / 3, 0)
    assert found.error <= found.limit


def test_the_limit_is_twice_eagers_error_or_the_floor():
    reference = np.array([[4.0, -8.0]])
    for eager_error, limit in ((1e-3, 2e-3), (0.0, FLOOR * EPS * 8), (1e-7, FLOOR * EPS * 8)):
        error, found = logit_error(
            reference + eager_error, reference, np.array([0, 0]), reference + np.array([[0.5], [-0.25]])
        )
        assert error == 0.5
        assert found == pytest.approx(limit, rel=1e-9)
    error, found = logit_error(reference, reference, np.array([], int), np.empty((0, 2)))
    assert np.isnan(error)
    assert found == 0


@pytest.mark.parametrize("answer", [np.nan, np.inf])
def test_answers_that_are_not_finite_fail(bundle, answer):
    def poison(proto: ModelProto) -> None:
        tensor = head_weight(proto)
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0] = answer
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    rewrite(bundle, poison)
    assert every_batch("logits") <= failed(checked(bundle))


@pytest.mark.parametrize("count", [1, 5, 9, 360, 50000])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.983, 1])
def test_wilson_interval(count, share):
    right = round(share * count)
    wanted = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_interval_of_nothing():
    assert wilson(0, 0) == (0, 1)
