"""`profile` with images: speed and answers of the same files in one report."""

import shutil

import pytest

from evit_deploy import InputError, ProfileOptions, profile
from evit_deploy.bundle.manifest import MODEL
from evit_deploy.verification.verify import verify
from tests.support.models import tree

QUICK = ProfileOptions(batch_sizes=(1, 2), duration=0.01, threads=1)


def test_what_is_timed_is_what_answers(converted, pictures):
    names = ["onnxruntime", "eager"]
    report = profile(converted.path, runtimes=names, measure=QUICK, data=pictures)
    assert [(row.runtime, row.name) for row in report.compared] == [(n, v) for n in names for v in ("dense", "model")]
    timed = {(row.runtime, row.variant) for row in report.rows}
    assert timed > {(row.runtime, row.name) for row in report.compared}  # the slice twin answers nothing
    told = verify(converted.path, runtimes=names, batch_sizes=(1,), threads=1, data=pictures).compared
    assert set(report.compared) == set(told)


def test_pytorch_answers_in_the_precision_that_is_timed(half, pictures):
    report = profile(half.path, runtimes=["eager"], measure=QUICK, data=pictures)
    assert [row.precision for row in report.compared] == ["fp16", "fp16"]


def test_without_images_nothing_is_answered(converted):
    report = profile(converted.path, runtimes=["onnxruntime"], measure=QUICK)
    assert report.compared == ()
    assert {row.variant for row in report.rows} == {"model", "slice", "dense"}


def test_a_checkpoint_elsewhere_is_found_by_against(converted, pictures, checkpoint_file, tmp_path):
    shutil.copytree(converted.path, tmp_path / "moved")
    report = profile(tmp_path / "moved", runtimes=["eager"], measure=QUICK, data=pictures, against=checkpoint_file)
    assert [row.name for row in report.compared] == ["dense", "model"]


def test_images_that_do_not_fit_are_refused_before_the_measurement(converted, pictures, checkpoint_file, tmp_path):
    for target in (converted.file(MODEL), checkpoint_file):
        with pytest.raises(InputError, match=r"--data: only a bundle's answers.*Leave --data out"):
            profile(target, data=pictures, measure=QUICK)
    with pytest.raises(InputError, match="no such folder"):
        profile(converted.path, data=tmp_path / "absent", measure=QUICK)
    broken = shutil.copytree(converted.path, tmp_path / "broken")
    (broken / MODEL).write_bytes(b"other")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="not what the manifest says"):
        profile(broken, data=pictures, measure=QUICK)
    assert tree(tmp_path) == before
