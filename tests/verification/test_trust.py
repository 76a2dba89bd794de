"""A proof does not depend on the honesty of what it proves: bundles that lie about themselves, hashes and all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import DENSE, GOLDEN, MANIFEST, MODEL
from evit_deploy.errors import InputError
from evit_deploy.files import sha256
from evit_deploy.report.report import Report
from evit_deploy.verification.golden import load_golden
from evit_deploy.verification.verify import hold_golden, verify
from tests.support.models import of_kind

Arrays = dict[str, np.ndarray]


@pytest.fixture(params=["alone", "with its checkpoint"])
def bundle(request: pytest.FixtureRequest, tmp_path: Path, converted: Bundle) -> Bundle:
    """A bundle to be changed, with and without what it was made from."""
    shutil.copytree(converted.path.parent, tmp_path / "work")
    if request.param == "alone":
        for checkpoint in (tmp_path / "work").glob("*.safetensors"):
            checkpoint.unlink()
    return read_bundle(tmp_path / "work" / converted.path.name)


def checked(bundle: Bundle) -> Report:
    return verify(bundle.path, runtimes=["onnxruntime"], batch_sizes=(1, 8), threads=1)


def failed(report: Report) -> set[str]:
    assert all(bool(check.reason) is not check.passed for check in report.checks if check.name.startswith("golden"))
    return {check.name for check in report.failed}


def change_manifest(bundle: Bundle, **changes: Any) -> None:
    """Writes other claims, and the hashes of the files as they are now."""
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes()) | changes
    manifest["files"] = {name: sha256(bundle.path / name) for name in manifest["files"]}
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))


def change_golden(bundle: Bundle, change: Callable[[Arrays], Any]) -> None:
    with np.load(bundle.path / GOLDEN) as archive:
        arrays = dict(archive)
    change(arrays)
    np.savez(bundle.path / GOLDEN, **arrays)  # type: ignore[arg-type]
    change_manifest(bundle)


def negate_the_head(bundle: Bundle, name: str = MODEL) -> None:
    proto = onnx.load(bundle.path / name)
    heads = [tensor for tensor in proto.graph.initializer if tensor.name.startswith("head.")]
    assert len(heads) == 2
    for head in heads:
        head.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(head), head.name))
    onnx.save(proto, bundle.path / name)
    change_manifest(bundle)


def test_the_honest_bundle_passes_and_says_what_it_was_held_against(bundle):
    report = checked(bundle)
    assert report.passed
    (note,) = report.notes
    alone = not list(bundle.path.parent.glob("*.safetensors"))
    assert note.startswith("Compared with the bundle's own golden answers" if alone else "The reference was computed")


LIES: dict[str, Callable[[Arrays], Any]] = {
    "terms": lambda arrays: arrays.update(terms=np.full_like(arrays["terms"], 1e12)),
    "expected": lambda arrays: arrays.update(expected=arrays["expected"] + 1e6),
    "ties everywhere": lambda arrays: [
        arrays.update({name: np.zeros_like(arrays[name]), "swapped": arrays["swapped"] + 1e6})
        for name in list(arrays)
        if name.startswith("margin_")
    ],
    "terms of the twin": lambda arrays: arrays.update(dense_terms=np.full_like(arrays["dense_terms"], 1e12)),
    "an own choice far away": lambda arrays: arrays.update(
        expected_free=arrays["expected_free"] + 1e6, **{n: np.zeros_like(a) for n, a in arrays.items() if "margin" in n}
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_another_model_does_not_pass_by_wide_tolerances(bundle, lie):
    change_golden(bundle, LIES[lie])
    negate_the_head(bundle, DENSE if "twin" in lie else MODEL)
    names = failed(checked(bundle))
    assert any(name.startswith("golden file: tolerance") for name in names)
    assert any(name.startswith("onnxruntime") for name in names), names


@pytest.mark.parametrize("name", [MODEL, DENSE])
def test_another_model_does_not_pass(bundle, name):
    negate_the_head(bundle, name)
    assert any(check.startswith("onnxruntime") for check in failed(checked(bundle)))


def test_a_bundle_that_lies_about_all_of_itself_is_found_by_its_checkpoint(bundle):
    """Alone it is another model with the right answers of that: the report says what it was held against."""
    negate_the_head(bundle)
    change_golden(bundle, lambda arrays: arrays.update({name: -arrays[name] for name in SIGNED}))
    report = checked(bundle)
    if report.notes[0].startswith("Compared with the bundle's own golden answers"):
        assert report.passed
    else:
        assert "golden logits: PyTorch's" in failed(report)


SIGNED = ("logits", "reference", "swapped", "expected", "expected_free")


def test_ties_explain_as_much_as_another_choice_changes(bundle):
    """Five times what it does is more than processors and draws differ by, and is no size of an answer."""

    def widen(arrays: Arrays) -> None:
        arrays["swapped"] = arrays["reference"] + 5 * (arrays["swapped"] - arrays["reference"])
        arrays.update({name: np.zeros_like(arrays[name]) for name in arrays if name.startswith("margin_")})

    change_golden(bundle, widen)
    assert "golden file: tolerance on ties" in failed(checked(bundle))


def test_patches_that_were_not_kept(bundle):
    """Other golden patches, and margins that call them ties."""

    def swap(arrays: Arrays) -> None:
        name = min(name for name in arrays if name.startswith("kept_"))
        patches = arrays[name.replace("kept", "margin")].shape[1] - 1
        for row in arrays[name]:
            absent = np.setdiff1d(np.arange(patches), row)
            row[0] = absent[0]
        arrays[name.replace("kept", "margin")][:] = 0

    change_golden(bundle, swap)
    assert any(name.startswith("golden") for name in failed(checked(bundle)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preprocess", {"mean": [0.1, 0.2, 0.3]}),
        ("preprocess", {"interpolation": "nearest"}),
        ("preprocess", {"crop_pct": 0.5}),
        ("tokens", {"keep_rate": 0.9}),
        ("model", "deit_small_patch16_224"),
        ("precision", "fp16"),
    ],
)
def test_a_manifest_does_not_contradict_the_model(bundle, field, value):
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    change_manifest(bundle, **{field: manifest[field] | value if isinstance(value, dict) else value})
    if field == "precision":  # the golden file says it too
        with pytest.raises(InputError, match="precision of the golden answers"):
            checked(bundle)
    else:
        assert f"{MODEL} as the manifest says" in failed(checked(bundle))


def test_a_plan_does_not_contradict_the_graph(bundle):
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    row = next(row for row in manifest["plan"]["blocks"] if row["keep"])
    row["keep"] -= 1
    change_manifest(bundle, plan=manifest["plan"])
    with pytest.raises(InputError, match=r"kept_\d+: an array of the wrong shape"):
        checked(bundle)


@pytest.mark.parametrize(
    "value", [{"crop_pct": 0}, {"crop_pct": 1e9}, {"interpolation": "evil"}, {"std": [0, 0, 0]}, {"mean": [0.5]},
              {"crop_mode": "../x"}, {"size": [0, 0]}, {"size": [32, 32]}, {"std": [0.5, -1, 0.5]}]
)  # fmt: skip
def test_preprocessing_that_cannot_be_done_is_refused_when_it_is_read(bundle, value):
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    change_manifest(bundle, preprocess=manifest["preprocess"] | value)
    with pytest.raises(InputError, match=MANIFEST):
        read_bundle(bundle.path)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": []},
        {"inputs": []},
        {"parents": []},
        {"precision": "fp3"},
        {"labels": ["a"]},
        {"format": 99},
        {"format": "1"},
        {"plan": {"prefix": 1, "patches": 4, "blocks": []}},
        {"plan": {"prefix": -1, "patches": 4, "blocks": []}},
        {"tokens": {"keep_rate": 7}},
        {"files": {"../../x": "0"}},
        {"files": [1]},
    ],
)
def test_a_manifest_of_no_model_is_refused(bundle, change):
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes()) | change
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(InputError, match=MANIFEST):
        read_bundle(bundle.path)


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"\xff", b"null", b"[]", b"{", b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(bundle, text):
    (bundle.path / MANIFEST).write_bytes(text)
    with pytest.raises(InputError, match=MANIFEST):
        read_bundle(bundle.path)


def test_leaving_out_the_model_does_not_make_tolerances_believed(bundle):
    """Local files of a bundle that lists no model.onnx have nothing to be proven by but the checkpoint."""
    for name in (MODEL, DENSE):
        (bundle.path / name).unlink()
    manifest = msgspec.json.decode((bundle.path / MANIFEST).read_bytes())
    del manifest["files"][MODEL], manifest["files"][DENSE]
    (bundle.path / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    left = read_bundle(bundle.path)
    golden = load_golden(left.file(GOLDEN), left.manifest)
    for served in (True, False):
        _, report = hold_golden(left, golden, None, "it is gone", served=served)
        assert report.passed == served
        assert "as they were written" in report.notes[0]
        assert "Give --against CHECKPOINT" in report.notes[0]
    # The checkpoint says nothing of what is quantized where.
    golden = msgspec.structs.replace(golden, precision="int8")
    _, report = hold_golden(left, golden, of_kind("plain"), "", served=False)
    assert not report.passed
    assert report.notes[0].endswith("to find them by. Verify the bundle.")
