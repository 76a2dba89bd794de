"""Several bundles of one checkpoint: what is shared, that each is what it would be alone, and one that fails."""

import msgspec
import numpy as np
import onnx
import pytest

from evit_deploy.bundle.bundle import changed_files, read_bundle
from evit_deploy.bundle.manifest import DENSE, GOLDEN, MODEL
from evit_deploy.errors import InputError
from evit_deploy.export import portable as exporting
from evit_deploy.pipeline import convert as converting
from evit_deploy.pipeline import lowering
from evit_deploy.pipeline.convert import convert
from evit_deploy.pipeline.variants import convert_variants
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.report.report import Check, Report
from evit_deploy.verification import golden
from evit_deploy.verification.golden import load_golden
from tests.support.models import tree, write_checkpoint

QUICK = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)
ONNX = ConvertOptions(targets=("onnx",))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two keep rates in two precisions, and what was asked of exporter and PyTorch on the way."""
    runs, asked, written = [], [], []
    export, ask, write = exporting._run_exporter, golden._in_full, lowering.portable
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_run_exporter", lambda *a: (runs.append(1), export(*a))[1])
        patch.setattr(lowering, "portable", lambda *a, **named: (written.append(1), write(*a, **named))[1])
        patch.setattr(golden, "_in_full", lambda *a: (asked.append(1), ask(*a))[1])
        checkpoint = write_checkpoint(tmp_path_factory.mktemp("several") / "tiny.safetensors")
        out = checkpoint.with_name("out")
        found = convert_variants(
            checkpoint, keep_rates=(0.8, 0.6), precisions=("fp32", "fp16"), options=ONNX, measure=QUICK, out=out
        )  # fmt: skip
    return checkpoint, found, (len(runs), len(asked), len(written))


def test_each_has_its_place_and_is_whole(made):
    checkpoint, found, _ = made
    names = [f"tiny-evit-k{rate}-{precision}" for rate in (0.8, 0.6) for precision in ("fp32", "fp16")]
    assert [bundle.path.name for bundle, _ in found] == names
    assert sorted(path.name for path in checkpoint.with_name("out").iterdir()) == sorted(names)
    for bundle, report in found:
        assert report.passed
        assert changed_files(bundle) == []
        assert {row.variant for row in report.rows} == {"model", "slice", "dense"}
        assert read_bundle(bundle.path).manifest == bundle.manifest
    assert [bundle.manifest.precision for bundle, _ in found] == ["fp32", "fp16"] * 2
    assert [bundle.manifest.tokens.keep_rate for bundle, _ in found] == [0.8, 0.8, 0.6, 0.6]


def test_the_work_is_shared(made):
    _, found, (runs, asked, written) = made
    assert runs == 2  # the dense model's last block is computed for its head alone; that of the others reduces
    assert asked == 3  # two keep rates and the dense model
    assert written == 6  # four variants and, in each precision, one twin
    twins = [bundle.file(DENSE).read_bytes() for bundle, _ in found]
    assert twins[0] == twins[2]
    assert twins[1] == twins[3]
    rows = [[row for row in report.rows if row.variant == "dense"] for _, report in found]
    assert rows[0] == rows[2]  # one twin took turns with both


def test_each_is_what_it_would_be_alone(made, tmp_path):
    checkpoint, found, _ = made
    for bundle, _ in found[2:]:
        options = msgspec.structs.replace(ONNX, precision=bundle.manifest.precision)
        alone, _ = convert(checkpoint, keep_rate=0.6, options=options, measure=QUICK, out=tmp_path / bundle.path.name)
        for name in (MODEL, DENSE):
            one, other = (onnx.load(b.file(name)) for b in (alone, bundle))
            assert [t.SerializeToString() for t in one.graph.initializer] == [
                t.SerializeToString() for t in other.graph.initializer
            ]
            assert list(one.graph.node) == list(other.graph.node)
        one, other = (load_golden(b.file(GOLDEN), bundle.manifest) for b in (alone, bundle))
        for field in ("logits", "reference", "swapped", "expected", "expected_free", "dense_expected", "terms"):
            assert np.array_equal(getattr(one, field), getattr(other, field)), field


def test_a_failed_gate_does_not_stop_the_others(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors", "smallest")
    broken = Report(checks=(Check("fp16", 1.0, 0.0, False, "It breaks the model."),))
    monkeypatch.setattr(converting, "verify_precision", lambda g, answer: broken if g.precision == "fp16" else Report())
    found = convert_variants(checkpoint, keep_rate=0.6, precisions=("fp16", "fp32"), options=ONNX, measure=QUICK)
    assert [report.passed for _, report in found] == [False, True]
    places = [bundle.path.name for bundle, _ in found]
    assert places == ["tiny-evit-k0.6-fp16.rejected", "tiny-evit-k0.6-fp32"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*places, checkpoint.name])
    assert found[0][1].rows == ()
    assert read_bundle(found[0][0].path).manifest.results["passed"] is False
    assert {row.variant for row in found[1][1].rows} == {"model", "slice", "dense"}


def test_what_is_there_is_refused_before_any_work(made):
    checkpoint, _, _ = made
    before = tree(checkpoint.parent)
    with pytest.raises(InputError, match="exists already"):
        convert_variants(
            checkpoint,
            keep_rates=(0.9, 0.6),
            precisions=("fp32", "fp16"),
            options=ONNX,
            out=checkpoint.with_name("out"),
        )
    with pytest.raises(InputError, match="the same place"):
        convert_variants(checkpoint, keep_rates=(0.9, 0.9), options=ONNX)
    with pytest.raises(InputError, match="keep_rate is for one model"):
        convert_variants(checkpoint, keep_rates=(0.9,), keep_rate=0.7, options=ONNX)
    with pytest.raises(InputError, match="out of range"):
        convert_variants(checkpoint, keep_rates=(0.9, 1.5), options=ONNX)
    with pytest.raises(InputError, match="unknown precision"):
        convert_variants(checkpoint, keep_rates=(0.9,), precisions=("fp32", "fp12"), options=ONNX)
    assert tree(checkpoint.parent) == before
