"""The page of a bundle, of a run and of any report, with the very numbers of the report."""

import base64
import io
import re
from html import unescape

import msgspec
import pytest
from PIL import Image

from evit_deploy.bundle.manifest import REPORT
from evit_deploy.documents import read_json
from evit_deploy.pages.bundle import report_page
from evit_deploy.pages.sections import Curve, Picture, trade_charts
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.report.report import (
    AccuracyRow,
    BlockErrorRow,
    BlockRow,
    Check,
    ComparedRow,
    Difference,
    ProfileRow,
    Report,
    SensitivityRow,
)
from tests.support.browser import WIDTHS, Browser

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c6360606000000004000127343e"
    "0a0000000049454e44ae426082"
)


def everything() -> Report:
    """A report with something in every table that a page has a chart of."""
    dense = ComparedRow("dense", "dense", "", "fp32", 4.6, 1.0, 197, images=100, runtime="onnxruntime", top1=0.8,
                        top1_low=0.71, top1_high=0.87)  # fmt: skip
    model = ComparedRow("model", "evit", "keep_rate=0.7", "fp32", 3.0, 1.53, 70, "dense", 100, "onnxruntime", 0.95,
                        0.78, 0.69, 0.85, to_dense=Difference("dense", -0.02, 0.01, -0.05, 0.01))  # fmt: skip
    rows = [
        ProfileRow("onnxruntime", variant, batch, 50, 1000 * batch / ms, ms, ms, ms, 0.01, speedup, low, high)
        for variant, batch, ms, speedup, low, high in (
            ("model", 1, 30.0, 1.40, 1.38, 1.42),
            ("dense", 1, 42.0, None, None, None),
            ("model", 8, 200.0, 1.50, 1.49, 1.52),
            ("dense", 8, 300.0, None, None, None),
        )
    ]
    blocks = [BlockRow("tensorrt", variant, 8, str(i), 197, 197, 4, 0.2, 0.1) for variant in ("model", "dense")
              for i in range(3)]  # fmt: skip
    return Report(
        checks=tuple(Check(f"onnxruntime, batch {batch}: logits", 1e-6, 1e-5, True) for batch in range(1, 20)),
        compared=(dense, model),
        rows=tuple(rows),
        blocks=tuple(blocks),
        block_errors=tuple(BlockErrorRow("onnxruntime", i, 4, error) for i, error in enumerate((1e-3, 2e-3, None))),
        accuracy=(AccuracyRow("dense", 0.8, None, 100, 0.71, 0.87),),
        sensitivity=(SensitivityRow("blocks.0.mlp.fc1", 0.01, 1.0, 1.0),),
        notes=("A note <b>of others</b>.",),
        versions={"torch": "2.11"},
        device={"cpu": "a processor"},
        commands=("evit-deploy convert 'a b.pth'",),
    )


CURVES = (
    Curve("finetune", tuple({"step": float(i), "loss": 2 / (1 + i), "validation_top1": i / 20} for i in range(9))),
)


def page_of_everything(manifest: object = None) -> str:
    return report_page(everything(), "a <bundle>", manifest, pictures=(Picture(PNG, "Kept"),), curves=CURVES)  # type: ignore[arg-type]


def test_the_verdict_comes_first(converted):
    text = page_of_everything(converted.manifest)
    headings = [unescape(heading) for heading in re.findall(r"<h2>(.*?)</h2>", text)]
    assert headings == ["Verdict", "Accuracy", "Agreement and checks", "Speed", "Accuracy against time", "Token plan",
                        "Time and error inside the model", "Patches that stay", "Environment and commands"]  # fmt: skip
    for said in ("Same answers as the PyTorch model", "1.50x [1.49, 1.52]", "95.0 % of 100 images", "-2.0 points"):
        assert said in text


def test_numbers_are_those_of_the_report():
    text = page_of_everything()
    charts = [title for title, _ in trade_charts(everything())]
    assert charts == [
        f"{title} against time on onnxruntime, batch {batch}" for title in ("Top-1", "Agreement") for batch in (1, 8)
    ]
    assert [unescape(label) for label in re.findall(r'aria-label="(model: Top-1[^"]*)"', text)] == [
        "model: Top-1 78.00 %, 30.00 ms; evit keep_rate=0.7 fp32, 3 GMACs",
        "model: Top-1 78.00 %, 200.00 ms; evit keep_rate=0.7 fp32, 3 GMACs",
    ]
    assert "<code>evit-deploy convert &#x27;a b.pth&#x27;</code>" in text
    assert "a note" in text.lower()
    assert "<b>of others" not in text


def test_what_agrees_with_itself_needs_no_measurement():
    rows = everything()
    compared = tuple(msgspec.structs.replace(row, top1=None, top1_low=None, top1_high=None) for row in rows.compared)
    _, chart = next(trade_charts(msgspec.structs.replace(rows, compared=compared)))
    assert "dense: Agreement 100.00 %" in chart
    assert "model: Agreement 95.00 %" in chart


def test_a_failed_check_is_seen_at_once():
    failed = Check("onnxruntime, batch 1: logits", 1.0, 1e-5, False, "It is wrong.")
    text = report_page(Report(checks=(failed,)), "a")
    assert 'class="card bad"><dt>✗ Same answers?' in text
    assert "FAILED onnxruntime, batch 1: logits: It is wrong." in text


def test_an_empty_report_says_what_is_missing():
    text = report_page(Report(), "a")
    assert "Not checked." in text
    assert text.count("<h2>") == 2


def test_a_bundle_has_its_page(converted):
    text = converted.file("report.html").read_text(encoding="utf-8")
    report = read_json(converted.file(REPORT), Report)
    for row in report.rows:
        if row.speedup is not None and row.variant == "model":
            assert f"{row.speedup:.2f}x" in text
    for check in report.checks:
        assert check.name in unescape(text)
    assert len(text) < 3_000_000


def test_a_block_has_its_error_and_time_beside_its_tokens(converted):
    text = page_of_everything(converted.manifest)
    table = text[text.index("<h2>Token plan") :].partition("</table>")[0]
    titles = re.findall(r"<th scope[^>]*>(.*?)</th>", table)
    assert titles == [*converted.manifest.plan.header, "error", "ms"]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert [row[-2:] for row in rows] == [
        ["1.00e-03", "0.200"],
        ["2.00e-03", "0.200"],
        ["not finite", "0.200"],
        ["", ""],
    ]


def test_a_bundle_has_the_errors_of_its_blocks(converted):
    report = read_json(converted.file(REPORT), Report)
    assert [row.block for row in report.block_errors] == [row.block for row in converted.manifest.plan.blocks]
    text = converted.file("report.html").read_text(encoding="utf-8")
    for row in report.block_errors:
        assert row.error < 1e-4
        assert f'<td class="n">{row.error:.2e}</td>' in text
    assert "Error of each block" not in text  # a chart of the rounding of FP32


def test_it_shows_what_is_kept_of_the_users_pictures(checkpoint, pictures, tmp_path, monkeypatch):
    look = ProfileOptions(batch_sizes=(1,), duration=0.01)
    monkeypatch.setattr("evit_deploy.pipeline.convert.FIRST_LOOK", look)
    made, _ = convert(checkpoint, out=tmp_path / "made", options=ConvertOptions(data=str(pictures)), keep_rate=0.6)
    text = made.file("report.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.width > 200 * (1 + len(made.manifest.plan.locations))  # the original and each location
        assert image.height > 4 * 200  # four pictures
    (said,) = re.findall(r'<img alt="([^"]*)"', text)
    for row in made.manifest.plan.locations:
        assert f"lock {row.block}: " in said
    assert "Patches that stay" in text
    assert len(text) < 3_000_000


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_without_fault(width, dark, browser: Browser, converted, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page_of_everything(converted.manifest), encoding="utf-8")
    with browser.open(path, width, dark) as page:
        assert page.faults() == []
        # Every chart has drawn its marks.
        marks = "[...document.querySelectorAll('figure svg')].map(svg => svg.querySelectorAll('[tabindex]').length)"
        counts = page.evaluate(marks)
        assert len(counts) == 12
        assert all(counts)
        page.pdf(tmp_path / "report.pdf")
