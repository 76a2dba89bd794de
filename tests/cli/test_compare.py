"""`compare` and a comparison's recipe as a user runs them."""

import json

import pytest

from evit_deploy.bundle.manifest import MODEL
from tests.support.models import tree
from tests.support.paths import RECIPES

QUICK = ["--runtime", "onnxruntime", "--threads", "1", "--batch-sizes", "1", "--duration", "0.01"]


def test_tables_on_stdout_and_files_where_asked(cli, converted, fewer, pictures, tmp_path):
    out = tmp_path / "out"
    result = cli("compare", converted.path, fewer.path, *QUICK, "--data", pictures, "--out", out)
    assert (result.code, result.err) == (0, "")
    for text in ("40 images, answered by onnxruntime", "to dense", "keep_rate=0.4, fuse=no", "fewer", "dense",
                 "speed-up", "overhead", str(out)):  # fmt: skip
        assert text in result.out
    assert sorted(path.name for path in out.iterdir()) == [
        "compare.csv", "compare.html", "compare.json", "compare.md", "compare.tex",
    ]  # fmt: skip


def test_json_is_one_document_with_the_numbers_of_the_file(cli, converted, fewer, tmp_path):
    document = cli("compare", converted.path, fewer.path, *QUICK, "--json", "--out", tmp_path).document
    assert [row["name"] for row in document["compared"]] == ["dense", converted.path.name, "fewer"]
    assert [row["variant"] for row in document["rows"]] == ["dense", converted.path.name, "fewer"]
    assert document == json.loads((tmp_path / "compare.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([], ["got 0", "at least two bundles"]),
        (["{a}"], ["got 1", "at least two bundles"]),
        (["{a}", "{a}"], ["the same bundle twice"]),
        (["{a}", "absent"], ["absent: no such bundle"]),
        (["{a}", "{model}"], ["not a bundle"]),
        (["{a}", "{b}", "--runtime", "tensorrt"], ["--runtime", "tensorrt cannot run", "no engine.plan"]),
        (["{a}", "{b}", "--runtime", "triton"], ["not on a server"]),
        (["{a}", "{b}", "--reference", "fewer"], ["reference is about top-1"]),
        (["{a}", "{b}", "--data", "{data}", "--reference", "fewr"], ["--reference", "Did you mean 'fewer'?"]),
        (["{a}", "{b}", "--data", "absent"], ["absent", "no such folder"]),
        (["{a}", "{b}", "--data", "{data}", "--images", "{data}"], ["one of the two"]),
        (["{a}", "{b}", "--batch-sizes", "0"], ["--batch-sizes", "from 1 to 65536"]),
        (["{a}", "{b}", "--threads", "0"], ["--threads"]),
        (["{a}", "{b}", "--out", "{model}"], ["this is a file", "--out"]),
        (["{a}", "{b}", "--out", "/proc/here"], ["cannot write there"]),
        (["{a}", "{b}", "--out", "x" * 300], ["cannot write there"]),
    ],
    ids=lambda value: " ".join(value)[:40] if value and value[0].startswith("{") else "",
)
def test_compare_refuses(cli, converted, fewer, pictures, monkeypatch, tmp_path, arguments, hints):
    monkeypatch.chdir(tmp_path)
    named = {"a": converted.path, "b": fewer.path, "model": converted.file(MODEL), "data": pictures}
    before = [tree(bundle.path) for bundle in (converted, fewer)]
    cli("compare", *(argument.format(**named) for argument in arguments)).refused(2, *hints)
    assert [tree(bundle.path) for bundle in (converted, fewer)] == before
    assert tree(tmp_path) == {}


def test_a_refusal_as_json(cli, converted):
    error = cli("compare", converted.path, converted.path, "--json").document["error"]
    assert (error["type"], error["exit_code"]) == ("InputError", 2)


def test_a_recipe_makes_its_bundles_and_compares_them(cli, checkpoint_file, tmp_path):
    entries = "[{name: a, tokens: {keep_rate: 0.6}}, {name: b, tokens: {keep_rate: 0.4}}]"
    values = [f"checkpoint={checkpoint_file}", "model=null", f"compare={entries}", "duration=0.01", "batch_sizes=[1]"]
    sets = [part for value in values for part in ("--set", value)]
    document = cli("run", RECIPES / "compare.yaml", *sets, "--out", tmp_path / "out", "--json").document
    assert [row["name"] for row in document["compared"]] == ["dense", "a", "b"]
    assert (tmp_path / "out" / "b" / "manifest.json").is_file()
    assert document == json.loads((tmp_path / "out" / "compare.json").read_text())
