"""``golden.npz``: read as it was written, and refused where it is damaged or another model's."""

import io
from typing import Any

import numpy as np
import pytest

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.errors import InputError
from evit_deploy.verification.golden import load_golden


def golden_bytes(converted: Bundle) -> dict[str, np.ndarray]:
    with np.load(converted.file(GOLDEN)) as archive:
        return dict(archive)


def test_the_golden_file_is_read_as_it_was_written(tmp_path, converted):
    golden = load_golden(converted.file(GOLDEN), converted.manifest)
    golden.save(tmp_path / GOLDEN)
    again = load_golden(tmp_path / GOLDEN, converted.manifest)
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
        assert golden.margin[row.block].shape == (len(golden.inputs), plan.patches + 1)


def test_pickled_arrays_are_refused(tmp_path, converted):
    arrays: dict[str, Any] = golden_bytes(converted)
    arrays["logits"] = np.array([{"a": 1}], object)
    np.savez(tmp_path / GOLDEN, **arrays)
    with pytest.raises(InputError, match=r"golden\.npz: logits: an array of another type \(got object"):
        load_golden(tmp_path / GOLDEN, converted.manifest)


@pytest.mark.parametrize(
    "missing", ["precision", "inputs", "swapped", "expected_free", "dense_reference", "kept_1", "margin_1"]
)
def test_a_golden_file_without_a_field(tmp_path, converted, missing):
    arrays: dict[str, Any] = golden_bytes(converted)
    del arrays[missing]
    np.savez(tmp_path / GOLDEN, **arrays)
    with pytest.raises(InputError, match=f"arrays are missing .*{missing}"):
        load_golden(tmp_path / GOLDEN, converted.manifest)


@pytest.mark.parametrize("name", ["other", "other_3", "kept_x", "kept_1_2"])
def test_a_golden_file_with_another_field(tmp_path, converted, name):
    np.savez(tmp_path / GOLDEN, **golden_bytes(converted) | {name: np.zeros(2)})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"golden\.npz"):
        load_golden(tmp_path / GOLDEN, converted.manifest)


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
            load_golden(tmp_path / GOLDEN, converted.manifest)
