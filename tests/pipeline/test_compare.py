"""`compare`: bundles of several methods and rates beside their dense twin, and what cannot be compared."""

import csv
import io
import json
import shutil
import sys
import types
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from evit_deploy import RUNTIMES, CompareOptions, InputError, MissingRequirement, compare, read_bundle
from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import DENSE, MANIFEST, MODEL
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.sources import labeled_batches
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.pipeline.compare import CSV, JSON, MARKDOWN, RESULTS, reference_of, settings_of
from evit_deploy.report.report import Report
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.plan import TokenSpec
from tests.support.models import tree

QUICK = {"runtimes": ("onnxruntime",), "batch_sizes": (1, 2), "duration": 0.01, "threads": 1}


def options(**changes) -> CompareOptions:
    return CompareOptions(**(QUICK | changes))


def answers(file: Path, bundle: Bundle, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels, image by image."""
    with opened("onnxruntime", file, 1) as runner:
        pairs = [
            (runner.infer(feeds(images))[LOGITS], labels)
            for images, labels in labeled_batches(Folder(data), bundle.manifest.preprocess, 1)
        ]
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


@pytest.fixture(scope="module")
def whole(converted, fewer, pictures, tmp_path_factory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("compared") / "here"
    return compare([converted.path, fewer.path], options=options(data=pictures), out=out), out


def test_every_bundle_beside_its_dense_baseline(whole, converted, fewer):
    report, _ = whole
    names = ["dense", converted.path.name, "fewer"]
    assert [row.name for row in report.compared] == names
    assert [(row.variant, row.batch) for row in report.rows] == [(name, batch) for batch in (1, 2) for name in names]
    dense, first, second = report.compared
    assert (dense.method, dense.dense, dense.mac_ratio) == ("dense", None, 1.0)
    for row, bundle in ((first, converted), (second, fewer)):
        plan = bundle.manifest.plan
        assert (row.method, row.precision, row.dense) == ("evit", "fp32", "dense")
        assert row.tokens == plan.blocks[-1].tokens_out
        assert row.gmacs == pytest.approx(plan.macs() / 1e9, rel=1e-4)
        assert row.mac_ratio == pytest.approx(plan.mac_ratio(), rel=1e-4)
    assert dense.tokens == 37 > first.tokens > second.tokens
    assert second.settings == "keep_rate=0.4, fuse=no"
    for row in report.rows:
        twin = row.variant == "dense"
        assert (row.speedup is None, row.overhead is None, row.mac_efficiency is None) == (twin,) * 3
        assert (row.clock, row.rounds >= 5) == ("cpu", True)
    assert {"evit-deploy", "onnxruntime"} <= set(report.versions)


def test_accuracy_and_agreement_are_those_of_the_files(whole, converted, fewer, pictures):
    report, _ = whole
    dense, truth = answers(converted.file(DENSE), converted, pictures)
    right = {"dense": dense.argmax(1) == truth}
    agreement = {}
    for name, bundle in ((converted.path.name, converted), ("fewer", fewer)):
        logits, _ = answers(bundle.file(MODEL), bundle, pictures)
        right[name] = logits.argmax(1) == truth
        agreement[name] = (logits.argmax(1) == dense.argmax(1)).mean()
    assert len({hits.tobytes() for hits in right.values()}) == 3  # or the comparison would show nothing
    assert 0 < min(agreement.values()) < 1
    for row in report.compared:
        assert (row.images, row.runtime) == (40, "onnxruntime")
        assert row.top1 == pytest.approx(right[row.name].mean())
        assert row.top1_low < row.top1 < row.top1_high
        assert row.top5 >= row.top1
        if row.dense is not None:
            assert row.agreement == pytest.approx(agreement[row.name])
            assert row.to_dense.value == pytest.approx(right[row.name].mean() - right["dense"].mean(), abs=1e-5)
            assert row.to_dense.low < row.to_dense.value < row.to_dense.high
    first, second = report.compared[1:]
    assert report.compared[0].to_dense is None
    assert first.to_reference is None  # it is the reference
    assert second.to_reference.other == first.name
    assert second.to_reference.value == pytest.approx(right["fewer"].mean() - right[first.name].mean(), abs=1e-5)


def test_three_files_with_the_numbers_of_the_report(whole):
    report, out = whole
    assert sorted(path.name for path in out.iterdir()) == sorted(RESULTS)
    assert msgspec.json.decode((out / JSON).read_bytes(), type=Report) == report
    lines = list(csv.DictReader(io.StringIO((out / CSV).read_text())))
    markdown = (out / MARKDOWN).read_text()
    for line, row in zip(lines, report.rows, strict=True):
        assert (line["name"], int(line["batch"]), float(line["p99"])) == (row.variant, row.batch, row.p99)
        assert line["speedup"] == ("" if row.speedup is None else str(row.speedup))
        assert line["images_per_second"] in markdown


def test_results_are_not_replaced_unasked(whole, converted, fewer, tmp_path):
    _, there = whole
    out = shutil.copytree(there, tmp_path / "out")
    before = tree(out)
    with pytest.raises(
        InputError,
        match=r"results already .compare\.csv, compare\.md, compare\.tex, compare\.json, compare\.html.*--force",
    ):
        compare([converted.path, fewer.path], options=options(), out=out)
    with pytest.raises(InputError, match="this is a file"):
        compare([converted.path, fewer.path], options=options(), out=out / CSV)
    assert tree(out) == before
    compare([converted.path, fewer.path], options=options(batch_sizes=(1,)), out=out, force=True)
    assert tree(out) != before


def test_agreement_needs_no_labels(converted, fewer, whole, pictures, tmp_path):
    for number, file in enumerate(Folder(pictures).files):
        shutil.copy(file, tmp_path / f"{number:02}.png")
    (tmp_path / "notes.txt").write_text("no image")
    report = compare([converted.path, fewer.path], options=options(images=tmp_path, batch_sizes=(1,)))
    for row, labeled in zip(report.compared, whole[0].compared, strict=True):
        assert (row.images, row.agreement) == (40, labeled.agreement)
        assert (row.top1, row.top5, row.to_dense, row.to_reference) == (None,) * 4


def test_precisions_and_weights_of_their_own_have_baselines_of_their_own(converted, half, other_weights, pictures):
    bundles = [converted.path, half.path, other_weights.path]
    report = compare(bundles, options=options(batch_sizes=(1,), data=pictures, reference=half.path))
    first = converted.path.name
    assert [(row.name, row.precision) for row in report.compared] == [
        (f"dense of {first}", "fp32"), (first, "fp32"), ("dense of half", "fp16"), ("half", "fp16"),
        ("dense of other-weights", "fp32"), ("other-weights", "fp32"),
    ]  # fmt: skip
    own = {row.name: row for row in report.compared}
    assert own["half"].to_reference is None
    assert own[first].to_reference.other == own["other-weights"].to_reference.other == "half"
    assert own["half"].to_dense.other == "dense of half"
    assert own["half"].agreement == own[first].agreement  # the same choices, but for rounding
    assert own["dense of other-weights"].top1 != own[f"dense of {first}"].top1
    assert {row.variant for row in report.rows} == set(own)


def test_without_a_wish_on_every_runtime_that_runs_all(converted, fewer):
    report = compare([converted.path, fewer.path], options=options(runtimes=(), batch_sizes=(1,)))
    runtimes = list(dict.fromkeys(row.runtime for row in report.rows))
    assert {"onnxruntime", "eager"} <= set(runtimes)
    assert len(report.rows) == 3 * len(runtimes)
    eager = [row for row in report.rows if row.runtime == "eager"]
    assert all(row.overhead is None for row in eager)
    assert all(row.speedup is not None for row in eager[1:])


class Broken(OnnxRuntimeRunner):
    """Takes every file, and turns out not to run here when it is opened."""

    def __enter__(self):
        raise MissingRequirement("its driver is too old")


def test_a_runtime_that_turns_out_not_to_run_is_left_out_unless_it_was_asked_for(converted, fewer, monkeypatch):
    known = {"broken": f"{__name__}:Broken", "onnxruntime": RUNTIMES._targets["onnxruntime"]}
    monkeypatch.setattr(RUNTIMES, "_targets", known)
    monkeypatch.setattr(RUNTIMES, "_scanned", True)
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.SimpleNamespace(Broken=Broken))
    bundles = [converted.path, fewer.path]
    report = compare(bundles, options=options(runtimes=(), batch_sizes=(1,)))
    assert {row.runtime for row in report.rows} == {"onnxruntime"}
    assert "broken was left out: its driver is too old." in report.notes
    with pytest.raises(MissingRequirement, match="too old"):
        compare(bundles, options=options(runtimes=("broken", "onnxruntime")))
    monkeypatch.setattr(RUNTIMES, "_targets", {"broken": known["broken"]})
    with pytest.raises(MissingRequirement, match="too old"):
        compare(bundles, options=options(runtimes=()))


def changed(bundle: Bundle, path: Path, **changes) -> Path:
    """A copy whose manifest says something else."""
    shutil.copytree(bundle.path, path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | changes))
    return path


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_bundles(converted, count):
    with pytest.raises(InputError, match=f"got {count}, expected at least two bundles"):
        compare([converted.path] * count)


def test_the_same_bundle_twice(converted, fewer, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(converted.path)
    copy = shutil.copytree(converted.path, tmp_path / "copy")
    monkeypatch.chdir(converted.path.parent)
    for again in (converted.path, tmp_path / "link", copy, converted.path.name):
        with pytest.raises(InputError, match="the same bundle twice"):
            compare([converted.path, fewer.path, again])


def test_what_is_no_bundle(converted, tmp_path):
    for path, why in ((tmp_path, "not a bundle"), (tmp_path / "absent", "no such"), (converted.file(MODEL), "not a")):
        with pytest.raises(InputError, match=why):
            compare([converted.path, path])


def test_a_bundle_that_is_not_what_its_manifest_says(converted, fewer, tmp_path):
    broken = shutil.copytree(fewer.path, tmp_path / "broken")
    (broken / MODEL).write_bytes(b"")
    with pytest.raises(InputError, match=r"broken: files are not what the manifest says: model\.onnx"):
        compare([converted.path, broken])


def test_another_task_is_refused_where_accuracy_is_compared(converted, fewer, pictures, tmp_path):
    manifest = json.loads((fewer.path / MANIFEST).read_text())
    classes = [manifest["outputs"][0] | {"shape": [None, 7]}]
    preprocess = manifest["preprocess"]
    letters, digits = list("abcdefghij"), list("abcdefghi0")
    named = changed(converted, tmp_path / "named", labels=letters)
    inputs = [manifest["inputs"][0] | {"shape": [None, 3, 64, 64]}]
    smaller, tighter = preprocess | {"size": [64, 64]}, preprocess | {"crop_pct": 0.5}
    for first, changes, message in (
        (converted.path, {"outputs": classes}, r"have different classes .got 10 and 7"),
        (named, {"labels": digits}, r"have different class names .got class 9 is 'j' and '0'"),
        (
            converted.path,
            {"preprocess": smaller, "inputs": inputs},
            r"images of other sizes .got size .96, 96. and .64",
        ),
        (converted.path, {"preprocess": tighter}, r"prepare images differently .got crop_pct 0.9 and 0.5.*--own-prep"),
    ):
        other = changed(fewer, tmp_path / f"other{len(list(tmp_path.iterdir()))}", **changes)
        with pytest.raises(InputError, match=message):
            compare([first, other], options=options(data=pictures))
    same = changed(fewer, tmp_path / "same", labels=letters)
    assert compare([named, same], options=options(data=pictures, batch_sizes=(1,))).compared[2].top1 is not None


def test_each_may_prepare_images_in_its_own_way_if_that_is_said(converted, fewer, whole, pictures, tmp_path):
    preprocess = json.loads((fewer.path / MANIFEST).read_text())["preprocess"]
    other = changed(fewer, tmp_path / "other", preprocess=preprocess | {"mean": [0.1, 0.2, 0.9]})
    report = compare([converted.path, other], options=options(data=pictures, own_preprocessing=True, batch_sizes=(1,)))
    own = {row.name: row for row in report.compared}
    logits, truth = answers(fewer.file(MODEL), read_bundle(other), pictures)
    assert own["other"].top1 == pytest.approx((logits.argmax(1) == truth).mean())
    dense, _ = answers(fewer.file(DENSE), read_bundle(other), pictures)
    assert own["other"].agreement == pytest.approx((logits.argmax(1) == dense.argmax(1)).mean())
    assert own["other"].dense == "dense of other"
    assert own[converted.path.name].top1 == whole[0].compared[1].top1
    compare([converted.path, other], options=options(images=pictures, batch_sizes=(1,)))  # no top-1, nothing to refuse


def test_images_that_do_not_fit(converted, fewer, pictures, tmp_path):
    for number in range(11):
        folder = tmp_path / "many" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "x.png")
    (tmp_path / "empty").mkdir()
    bundles = [converted.path, fewer.path]
    for changes, message in (
        ({"data": tmp_path / "many"}, "more class folders than the model has classes"),
        ({"data": tmp_path / "absent"}, "no such folder"),
        ({"images": tmp_path / "empty"}, "no images here"),
        ({"data": pictures, "reference": "fewr"}, "not among the bundles.*Did you mean 'fewer'"),
    ):
        with pytest.raises(InputError, match=message):
            compare(bundles, options=options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "a", "images": "b"}, "one of the two"),
        ({"reference": "a"}, "reference is about top-1"),
        ({"own_preprocessing": True, "images": "b"}, "own_preprocessing is about top-1"),
    ],
)
def test_options_that_contradict_each_other(changes, message):
    with pytest.raises(InputError, match=message):
        CompareOptions(**changes)


def test_bundles_of_one_folder_name_are_called_by_their_paths(converted, fewer, tmp_path):
    paths = [shutil.copytree(bundle.path, tmp_path / name / "bundle") for name, bundle in
             (("a", converted), ("b", fewer))]  # fmt: skip
    report = compare(paths, options=options(batch_sizes=(1,)))
    assert [row.name for row in report.compared] == ["dense", *map(str, paths)]


def test_a_reference_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    paths = {"first": str(tmp_path / "a"), "second": "b"}
    assert reference_of(paths, None) == "first"
    assert reference_of(paths, "second") == "second"
    assert reference_of(paths, str(tmp_path / "b")) == "second"
    assert reference_of(paths, "./b/") == "second"


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (TokenSpec(keep_rate=0.7), "keep_rate=0.7"),
        (TokenSpec(keep_rate=(0.7, 0.65, 0.5), locations=(2, 5, 8)), "keep_rate=0.7/0.65/0.5, locations=2/5/8"),
        (TokenSpec(keep_rate=0.5, fuse=False), "keep_rate=0.5, fuse=no"),
        (TokenSpec(keep_rate=0.5, method="random", options={"seed": 3}), "keep_rate=0.5, seed=3"),
    ],
)
def test_settings_say_what_was_asked_for(spec, text):
    assert settings_of(spec) == text


def test_models_without_classes_are_compared_by_cosine_and_recall(embedding, embedding_fewer, pictures, tmp_path):
    paths = [embedding.path, embedding_fewer.path]
    report = compare(paths, options=options(data=pictures, batch_sizes=(1,)), out=tmp_path / "out")
    dense, first, second = report.compared
    assert 1 > first.cosine_centered > second.cosine_centered > 0  # fewer tokens, further away
    assert first.cosine > first.cosine_centered
    for row in (first, second):
        assert row.to_dense.value == pytest.approx(row.recall - dense.recall, abs=1e-4)
        assert (row.top1, row.top5, row.agreement) == (None,) * 3
    assert second.to_reference.value == pytest.approx(second.recall - first.recall, abs=1e-4)
    (line, *_) = csv.DictReader(io.StringIO((tmp_path / "out" / CSV).read_text()))
    assert float(line["recall"]) == dense.recall
    markdown = (tmp_path / "out" / MARKDOWN).read_text()
    for word in ("recall@1 less the dense twin's", "recall@1 less that of embedding", "centered cosine"):
        assert f"| {word} |" in markdown
    assert "top-1" not in markdown
    bare = compare(paths, options=options(images=pictures, batch_sizes=(1,))).compared
    assert [row.cosine for row in bare] == [row.cosine for row in report.compared]
    assert {row.recall for row in bare} == {None}


def test_answers_of_different_kinds_are_not_compared(converted, embedding, pictures):
    for images in ({"images": pictures}, {"data": pictures}):
        with pytest.raises(InputError, match="answers with classes, the other with an embedding"):
            compare([converted.path, embedding.path], options=options(**images))
