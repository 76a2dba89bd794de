"""`convert --keep-rates ... --precision ...` as a user gives it."""

import pytest

from evit_deploy.bundle.bundle import read_bundle
from tests.support.models import tree


@pytest.mark.parametrize(
    "rates",
    [["--keep-rates", "0.8", "0.6"], ["--keep-rates", "0.8,0.6"], ["--keep-rates", "0.8", "--keep-rates", "0.6"]],
)
def test_every_spelling_makes_the_same_bundles(cli, checkpoint_file, tmp_path, rates):
    result = cli("convert", *rates, checkpoint_file, "--out", tmp_path / "out", "--threads", "1")
    assert result.code == 0, result.err
    stem = checkpoint_file.stem
    names = [f"{stem}-evit-k0.8", f"{stem}-evit-k0.6"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert [read_bundle(tmp_path / "out" / name).manifest.tokens.keep_rate for name in names] == [0.8, 0.6]
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("evit-k")] == ["evit-k0.8", "evit-k0.6"]


def test_json_is_one_document(cli, checkpoint_file, tmp_path):
    arguments = ("--keep-rate", "0.7", "--precision", "fp32", "fp16", "--out", tmp_path / "out", "--threads", "1")
    document = cli("convert", checkpoint_file, *arguments, "--json").document
    assert document["passed"] is True
    assert [one["variant"] for one in document["variants"]] == ["evit-k0.7-fp32", "evit-k0.7-fp16"]


def test_a_variant_that_fails_is_said_at_the_end(cli, checkpoint_file, tmp_path):
    arguments = ("--keep-rates", "0.8", "0.6", "--min-speedup", "1000", "--out", tmp_path / "out", "--threads", "1")
    result = cli("convert", checkpoint_file, *arguments)
    assert result.code == 1
    assert "evit-k0.8" in result.err.splitlines()[-1]
    assert "evit-k0.6" in result.err.splitlines()[-1]
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".rejected"] * 2


def test_what_cannot_be_made_is_refused_before_any_work(cli, checkpoint_file, tmp_path):
    before = tree(tmp_path)
    out = ("--out", tmp_path / "out")
    cli("convert", checkpoint_file, "--keep-rates", "0.8", "0.8", *out).refused(2, "the same place")
    cli("convert", checkpoint_file, "--keep-rates", "0.8", "1.8", *out).refused(2, "1.8")
    cli("convert", checkpoint_file, "--keep-rates", "0.8", "--keep-rate", "0.7", *out).refused(2, "one of the two")
    cli("convert", checkpoint_file, "--keep-rates", *out).refused(2, "--keep-rates")
    cli("convert", checkpoint_file, "--keep-rate", "0.7", "--precision", "fp32", "fp17", *out).refused(2, "fp17")
    assert tree(tmp_path) == before
