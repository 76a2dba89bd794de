"""``golden.npz``: read as it was written, and refused where it is damaged or another model's."""

import io
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import GOLDEN, TensorSpec
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


def test_answers_are_as_wide_as_the_first_output(tmp_path, converted):
    kept = TensorSpec("kept_1", "int32", (None, 22))  # as a bundle converted with --with-indices has
    manifest = msgspec.structs.replace(converted.manifest, outputs=(*converted.manifest.outputs, kept))
    golden = load_golden(converted.file(GOLDEN), manifest)
    assert golden.logits.shape == (len(golden.inputs), 10)


@pytest.mark.parametrize(("fused", "aside"), [(False, 0), (True, 3)])
def test_kept_patches_without_a_token_for_the_rest(tmp_path, converted, fused, aside):
    """Of a model that adds none, and of one (Evo-ViT) whose token for the rest is no choice of later blocks."""
    replace, plan = msgspec.structs.replace, converted.manifest.plan
    blocks = tuple(replace(row, fused=fused, aside=aside) if row.keep else row for row in plan.blocks)
    manifest = replace(converted.manifest, plan=replace(plan, blocks=blocks))
    arrays = golden_bytes(converted)
    for name in [name for name in arrays if name.startswith("kept_")]:
        arrays[name] = arrays[name][:, :-1]
    np.savez(tmp_path / GOLDEN, **arrays)  # type: ignore[arg-type]
    assert [kept.shape[1] for kept in load_golden(tmp_path / GOLDEN, manifest).kept.values()] == [
        row.keep for row in plan.locations
    ]
    with pytest.raises(InputError, match=r"kept_\d: an array of the wrong shape"):
        load_golden(converted.file(GOLDEN), manifest)


def test_pickled_arrays_are_refused(tmp_path, converted):
    arrays: dict[str, Any] = golden_bytes(converted)
    arrays["logits"] = np.array([{"a": 1}], object)
    np.savez(tmp_path / GOLDEN, **arrays)
    with pytest.raises(InputError, match=r"golden\.npz: logits: an array of the wrong type \(got object"):
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


def _huge(converted: Bundle, path: Path) -> None:
    """1.5 MB that unpack to more than a gigabyte."""
    arrays = golden_bytes(converted)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                if name == "inputs":
                    header = {"descr": "<f4", "fortran_order": False, "shape": (400_000, 3, 32, 32)}
                    np.lib.format.write_array_header_1_0(file, header)
                    for _ in range(400):
                        file.write(bytes(3 << 20))
                else:
                    np.lib.format.write_array(file, array)


def _changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Bundle, Path], None]:
    def write(converted: Bundle, path: Path) -> None:
        arrays: dict[str, Any] = golden_bytes(converted)
        change(arrays)
        np.savez(path, **arrays)

    return write


def _twice(converted: Bundle, path: Path) -> None:
    np.savez(path, **golden_bytes(converted))  # type: ignore[arg-type]
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("logits.npy", archive.read("logits.npy"))


def _longer_than_it_is(converted: Bundle, path: Path) -> None:
    np.savez(path, **golden_bytes(converted))  # type: ignore[arg-type]
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("logits.npy").header_offset
    header = content.index(b"'shape': (", start)
    changed = content[:header] + content[header:].replace(b"'shape': (8,", b"'shape': (9,", 1)
    path.write_bytes(changed)


BROKEN: dict[str, tuple[Callable[[Bundle, Path], None], str]] = {
    "packed": (_huge, "compressed"),
    "not finite": (_changed(lambda a: a["logits"].__setitem__((0, 0), np.nan)), "logits: a number that is not finite"),
    "infinite": (_changed(lambda a: a["reference"].__setitem__((0, 0), np.inf)), "reference: a number that is not"),
    "a margin of no number": (
        _changed(lambda a: a["margin_1"].__setitem__((0, 0), np.nan)), "margin_1: a number that is not finite"
    ),
    "no images": (_changed(lambda a: a.update({n: v[:0] for n, v in a.items() if v.ndim})), "of the wrong shape"),
    "fewer images": (_changed(lambda a: a.update(logits=a["logits"][:4])), "logits: an array of the wrong shape"),
    "other classes": (_changed(lambda a: a.update(logits=a["logits"][:, :-1])), "logits: an array of the wrong shape"),
    "another rank": (_changed(lambda a: a.update(terms=a["terms"][:, None])), "terms: an array of the wrong shape"),
    "another type": (_changed(lambda a: a.update(logits=a["logits"].astype(np.int8))), "of the wrong type"),
    "complex": (_changed(lambda a: a.update(logits=a["logits"].astype(complex))), "logits: an array of the wrong type"),
    "a long precision": (_changed(lambda a: a.update(precision=np.array("x" * 999))), "precision: an array"),
    "another precision": (_changed(lambda a: a.update(precision=np.array("bf16"))), "precision of the golden"),
    "no such patch": (
        _changed(lambda a: a["kept_1"].__setitem__((0, 0), 36)), r"kept_1.*got -1 to 36, expected -1 to 35"
    ),
    "a patch below": (_changed(lambda a: a["kept_1"].__setitem__((0, 0), -2)), r"kept_1.*got -2 to \d+, expected -1"),
    "twice": (_twice, "do not belong there"),
    "longer": (_longer_than_it_is, "golden"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_arrays_are_looked_at_before_they_are_read(tmp_path, converted, name):
    write, said = BROKEN[name]
    write(converted, tmp_path / GOLDEN)
    tracemalloc.start()
    with pytest.raises(InputError, match=said):
        load_golden(tmp_path / GOLDEN, converted.manifest)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
