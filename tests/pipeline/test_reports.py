import csv
import importlib.util
import json
import shutil

import jsonschema
import msgspec
import pytest

from evit_deploy.bundle.manifest import REPORT
from evit_deploy.documents import read_json
from evit_deploy.pages.bundle import report_page
from evit_deploy.pipeline.reports import RESULTS, report_bundles, side_by_side
from evit_deploy.report.comparison import as_csv
from evit_deploy.report.report import Report
from tests.support.paths import ROOT


def test_bundles_side_by_side_have_the_numbers_of_their_reports(converted, fewer, tmp_path):
    out = tmp_path / "out"
    report = report_bundles([converted.path, fewer.path], out=out)
    assert sorted(path.name for path in out.iterdir()) == sorted(RESULTS)
    name = converted.path.name
    assert [row.name for row in report.compared] == [f"{name}, dense", name, "fewer, dense", "fewer"]
    own = read_json(converted.file(REPORT), Report)
    wanted = {(row.runtime, row.batch): row.p50 for row in own.rows if row.variant == "model"}
    found = {(row.runtime, row.batch): row.p50 for row in report.rows if row.variant == name}
    assert found == {key: pytest.approx(value, rel=1e-4) for key, value in wanted.items()}
    assert read_json(out / "report.json", Report) == report
    with (out / "report.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    assert [float(line["p50"]) for line in cells] == [row.p50 for row in report.rows]
    assert all(name in (out / "report.tex").read_text().replace("\\_", "_") for name in ("fewer", name))


def test_one_bundle_keeps_its_own_report(converted, tmp_path):
    report_bundles([converted.path], out=tmp_path)
    assert read_json(tmp_path / "report.json", Report) == read_json(converted.file(REPORT), Report)


def test_reports_fit_the_published_schema(converted):
    spec = importlib.util.spec_from_file_location("generate_schema", ROOT / "docs" / "generate_schema.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PATH.read_text() == generator.schema(), "run: python docs/generate_schema.py"
    published = json.loads(generator.PATH.read_text())
    document = json.loads(converted.file(REPORT).read_text())
    jsonschema.validate(document, published)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document | {"rows": [{"runtime": 1}]}, published)


def test_machines_are_told_apart(converted):
    report = read_json(converted.file(REPORT), Report)
    other = msgspec.structs.replace(report, device=report.device | {"cpu": "Another"})
    together = side_by_side([("a", converted.manifest, report), ("b", converted.manifest, other)])
    runtimes = {row.variant: row.runtime for row in together.rows}
    assert runtimes["b"] == runtimes["a"].split(" (")[0] + " (Another)"
    assert any("different machines" in note for note in together.notes)


def test_a_thousand_bundles(converted, tmp_path):
    manifest, report = converted.manifest, read_json(converted.file(REPORT), Report)
    page = report_page(side_by_side([(f"bundle {i}", manifest, report) for i in range(1000)]), "many")
    assert len(page) < 12_000_000


def test_a_report_of_another_version_is_refused(cli, converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted.path, copy)
    document = json.loads((copy / REPORT).read_text()) | {"format": 99}
    (copy / REPORT).write_text(json.dumps(document))
    cli("report", copy, "--out", tmp_path / "out").refused(2, "later version", "format 99")
    assert not (tmp_path / "out").exists()


def test_a_report_that_was_changed_is_refused(cli, converted, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(converted.path, copy)
    text = (copy / REPORT).read_text()
    (copy / REPORT).write_text(text.replace('"passed": true', '"passed": false', 1))
    assert (copy / REPORT).read_text() != text
    cli("report", copy, "--out", tmp_path / "out").refused(2, "not the one that the manifest lists")
    assert not (tmp_path / "out").exists()


def test_a_report_that_fits_no_bundle_is_shown_as_it_is(converted):
    own = read_json(converted.file(REPORT), Report)
    rows = tuple(msgspec.structs.replace(row, batch=0, p50=0.0) for row in own.rows)
    known = side_by_side([("a", converted.manifest, own)]).compared
    compared = tuple(msgspec.structs.replace(row, name="<script>alert(1)</script>") for row in known)
    strange = msgspec.structs.replace(own, rows=rows, compared=compared)
    together = side_by_side([("a", converted.manifest, strange), ("b", converted.manifest, own)])
    assert [row.name for row in together.compared] == ["a, dense", "a", "b, dense", "b"]
    assert len(list(csv.DictReader(as_csv(together).splitlines()))) == len(together.rows)
    for page in (report_page(strange, "a", converted.manifest), report_page(together, "both")):
        assert "<script>alert" not in page


def test_a_page_replaces_a_page_and_nothing_else(cli, converted, tmp_path):
    place, other = tmp_path / "page.html", tmp_path / "notes.txt"
    other.write_text("mine")
    assert cli("report", converted.path, "--out", tmp_path / "out").code == 0
    shutil.copyfile(tmp_path / "out" / "report.html", place)
    quick = ("--runtime", "onnxruntime", "--batch-sizes", "1")
    result = cli("verify", converted.path, *quick, "--report", place)
    assert result.code == 0, result.err
    assert "Token plan" in place.read_text(encoding="utf-8")
    cli("verify", converted.path, *quick, "--report", other).refused(2, "not a page that evit-deploy wrote")
    cli("verify", converted.path, *quick, "--report", tmp_path).refused(2, "this is a folder")
    assert other.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        ([], ["no bundles"]),
        (["absent"], ["absent: no such bundle"]),
        (["{a}", "--out", "{model}"], ["this is a file"]),
        (["{a}", "--out", "{full}"], ["there are results already", "--force"]),
    ],
)
def test_refusals(arguments, hints, cli, converted, tmp_path):
    (tmp_path / "report.csv").write_text("mine")
    places = {"a": converted.path, "model": converted.file("model.onnx"), "full": tmp_path}
    cli("report", *(argument.format(**places) for argument in arguments)).refused(2, *hints)
    assert [path.name for path in tmp_path.iterdir()] == ["report.csv"]
