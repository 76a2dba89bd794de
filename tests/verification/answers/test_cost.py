"""A model's answers beside its dense twin's: every figure of a row against its definition, written out again."""

import shutil

import numpy as np
import pytest
import torch

from evit_deploy.bundle.manifest import DENSE, MODEL
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.data.sources.sources import labeled_batches
from evit_deploy.export.card import feeds
from evit_deploy.report.report import ComparedRow
from evit_deploy.report.statistics import paired_interval, wilson
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.verification.answers.cost import Answered, Pair, dense_of, side_by_side, with_answers
from evit_deploy.verification.answers.pictures import pictures_of
from evit_deploy.verification.verify import verify
from tests.support.models import of_kind


def answers(file, bundle, data):
    """Answers and labels, image by image."""
    with opened("onnxruntime", file, 1) as runner:
        pairs = [
            (runner.infer(feeds(images))[bundle.manifest.answer], labels)
            for images, labels in labeled_batches(Folder(data), bundle.manifest.preprocess, 1)
        ]
    return np.concatenate([pair[0] for pair in pairs]), np.concatenate([pair[1] for pair in pairs])


def rows(bundle, data, runtime="onnxruntime"):
    report = verify(bundle.path, runtimes=[runtime], batch_sizes=(1,), threads=1, data=data)
    assert report.passed
    return report.compared


def unit(found):
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def others_nearest(found):
    near = unit(found.astype(np.float64)) @ unit(found.astype(np.float64)).T
    np.fill_diagonal(near, -2)
    return near.argmax(1)


def test_classes_beside_those_of_the_dense_twin(converted, pictures):
    dense, model = rows(converted, pictures)
    logits, truth = answers(converted.file(MODEL), converted, pictures)
    dense_logits, _ = answers(converted.file(DENSE), converted, pictures)
    right, dense_right = logits.argmax(1) == truth, dense_logits.argmax(1) == truth
    assert (right != dense_right).any()  # or nothing would be shown
    assert (dense.name, dense.method, dense.mac_ratio, dense.dense) == ("dense", "dense", 1, None)
    assert (model.name, model.method, model.settings, model.dense) == ("model", "evit", "keep_rate=0.6", "dense")
    assert model.gmacs < dense.gmacs
    for row, hits, found in ((dense, dense_right, dense_logits), (model, right, logits)):
        assert (row.images, row.runtime, row.precision) == (40, "onnxruntime", "fp32")
        assert row.top1 == pytest.approx(hits.mean())
        assert (row.top1_low, row.top1_high) == wilson(hits.sum(), 40)
        assert row.top5 == pytest.approx((np.argsort(-found, 1)[:, :5] == truth[:, None]).any(1).mean())
        assert (row.cosine, row.recall, row.neighbors) == (None,) * 3
    assert (dense.agreement, dense.to_dense) == (None, None)
    assert model.agreement == (logits.argmax(1) == dense_logits.argmax(1)).mean()
    assert (model.to_dense.other, model.to_dense.value) == ("dense", pytest.approx(right.mean() - dense_right.mean()))
    assert (model.to_dense.low, model.to_dense.high) == paired_interval(right, dense_right)


def test_without_labels_only_agreement_is_told(converted, pictures, tmp_path):
    for number, file in enumerate(Folder(pictures).files):
        shutil.copy(file, tmp_path / f"{number:02}.png")
    labeled, (dense, model) = rows(converted, pictures)[1], rows(converted, tmp_path)
    assert (model.images, model.agreement) == (40, labeled.agreement)
    for row in (dense, model):
        assert (row.top1, row.top5, row.to_dense, row.share) == (None,) * 4


def test_pytorch_is_held_against_its_own_twin(converted, half, pictures):
    for bundle in (converted, half):
        dense, model = rows(bundle, pictures, "eager")
        assert (dense.runtime, dense.precision, model.precision) == ("eager", "fp32", "fp32")  # whatever the files are
    assert rows(half, pictures)[0].precision == "fp16"
    reduced = reduce_tokens_(of_kind("plain"), converted.manifest.tokens)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(dense_of(reduced, None)(images), of_kind("plain")(images))


def test_embeddings_beside_those_of_the_dense_twin(embedding, pictures):
    assert embedding.manifest.answer == "embedding"
    dense, model = rows(embedding, pictures)
    found, labels = answers(embedding.file(MODEL), embedding, pictures)
    other, _ = answers(embedding.file(DENSE), embedding, pictures)
    near = (unit(found) * unit(other)).sum(1)
    middle = other.mean(0)
    centered = (unit(found - middle) * unit(other - middle)).sum(1)
    neighbors, dense_neighbors = others_nearest(found), others_nearest(other)
    right, dense_right = labels[neighbors] == labels, labels[dense_neighbors] == labels
    assert centered.mean() < near.mean()
    assert 0 < (neighbors == dense_neighbors).mean() < 1
    assert (right != dense_right).any()
    assert model.cosine == pytest.approx(near.mean(), abs=1e-5)
    assert model.cosine_low == pytest.approx(np.quantile(near, 0.05), abs=1e-5)
    assert model.cosine_centered == pytest.approx(centered.mean(), abs=1e-4)
    assert model.neighbors == (neighbors == dense_neighbors).mean()
    assert (dense.recall, model.recall) == (dense_right.mean(), right.mean())
    assert (model.recall_low, model.recall_high) == wilson(right.sum(), 40)
    assert model.to_dense.value == pytest.approx(right.mean() - dense_right.mean())
    assert (model.to_dense.low, model.to_dense.high) == paired_interval(right, dense_right)
    for row in (dense, model):
        assert (row.top1, row.top5, row.agreement) == (None,) * 3
    assert (dense.cosine, dense.neighbors, dense.to_dense) == (None,) * 3


def test_runtimes_are_held_against_each_other_by_cosine(embedding, pictures):
    report = verify(embedding.path, runtimes=["eager", "onnxruntime"], batch_sizes=(1,), threads=1, data=pictures)
    (row,) = report.agreement
    assert row.top1 is None
    assert 0.99999 < row.cosine < 1.00001


def test_embeddings_of_images_without_labels(embedding, pictures, tmp_path):
    for number, file in enumerate(Folder(pictures).files[:3]):
        shutil.copy(file, tmp_path / f"{number}.png")
    dense, model = rows(embedding, tmp_path)
    assert (model.recall, model.to_dense, dense.recall) == (None,) * 3
    assert None not in (model.cosine, model.cosine_centered, model.neighbors)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").unlink()
    _, alone = rows(embedding, tmp_path)  # one image has no other, and is its own mean
    assert (alone.images, alone.neighbors, alone.cosine_centered) == (1, None, None)
    assert alone.cosine == pytest.approx(alone.cosine_low)


def test_an_engine_or_a_server_without_a_twin_says_so(converted, pictures):
    manifest = converted.manifest
    pair = Pair("onnxruntime", converted.file(MODEL), None)
    report, found = side_by_side(pair, manifest, pictures_of(pictures, manifest), 1)
    (row,) = report.compared
    assert (row.name, row.dense, row.agreement, row.to_dense) == ("model", None, None, None)
    assert row.top1 == pytest.approx((found.logits.argmax(1) == np.arange(40) // 4).mean())
    assert any("no dense twin on onnxruntime" in note for note in report.notes)


def with_logits(logits, labels, dense=None):
    answered = {"model": logits} | ({} if dense is None else {"dense": dense})
    row = ComparedRow("model", "evit", "", "fp32", 1.0, 1.0, 9, dense="dense")
    return with_answers(row, None, Answered("onnxruntime", answered, labels))


@pytest.mark.parametrize(("classes", "told"), [(2, False), (5, False), (6, True)])
def test_of_few_classes_every_label_is_among_the_first_five(classes, told):
    logits, labels = np.random.default_rng(0).random((12, classes)), np.arange(12) % classes
    row = with_logits(logits, labels)
    assert row.top1 == (logits.argmax(1) == labels).mean()
    assert (row.top5 is not None) == told


def test_recall_where_no_class_has_two_images():
    found = np.random.default_rng(0).random((5, 8))
    row = ComparedRow("model", "evit", "", "fp32", 1.0, 1.0, 9, dense="dense")
    row = with_answers(row, None, Answered("x", {"model": found, "dense": found + 0.01}, np.arange(5), embeds=True))
    assert (row.recall, row.to_dense) == (None, None)
    assert row.cosine is not None
