"""The table of what a model costs: accuracy and latency of the same files, one table a runtime."""

import io

import msgspec
import pytest
from rich.console import Console

from evit_deploy.report.report import (
    AccuracyRow,
    AgreementRow,
    BlockRow,
    Check,
    ComparedRow,
    Difference,
    GpuSummary,
    LatencyRow,
    LoadRow,
    ProfileRow,
    Report,
    SensitivityRow,
    Summary,
)
from evit_deploy.report.tables import render, text_table


def shown(report, width=300):
    console = Console(file=io.StringIO(), width=width)
    render(report, console)
    return console.file.getvalue()


def answered(runtime, top1=(0.75, 0.7), **changes):
    dense = ComparedRow("dense", "dense", "", "fp32", 4.6, 1.0, 197, images=40, runtime=runtime, top1=top1[0],
                        top1_low=0.6, top1_high=0.85, top5=0.95)  # fmt: skip
    gap = Difference("dense", top1[1] - top1[0], 0.03, -0.12, 0.02)
    model = msgspec.structs.replace(dense, name="model", method="evit", settings="keep_rate=0.7", gmacs=3.0,
                                    tokens=72, dense="dense", top1=top1[1], agreement=0.9, to_dense=gap)  # fmt: skip
    return tuple(msgspec.structs.replace(row, **changes) for row in (dense, model))


def speed(runtime, variant, batch, p50):
    return ProfileRow(runtime, variant, batch, 5, 1e3 * batch / p50, p50, p50, p50, 0.01)


SPEEDS = tuple(
    speed(runtime, variant, batch, p50 * batch * factor)
    for runtime, factor in (("onnxruntime", 1), ("openvino", 2))
    for batch in (1, 8, 32)
    for variant, p50 in (("model", 3.25), ("slice", 3.0), ("dense", 5.5))
)


def lines_of(text):
    """Lines of the tables that begin with a variant, up to the table of times."""
    before = text.split("A row's figures")[0]
    return [line.split() for line in before.splitlines() if line.startswith(("dense ", "model "))]


def test_one_table_a_runtime_with_the_times_of_the_same_files():
    rows = (*answered("onnxruntime"), *answered("openvino", top1=(0.75, 0.725)))
    text = shown(Report(compared=rows, rows=SPEEDS))
    assert text.count("40 images, answered by ") == 2
    assert "40 images, answered by openvino; differences of top-1 in points" in text
    dense, model, _, other = lines_of(text)
    assert dense[-2:] == ["5.50", f"{1e3 / 5.5:.1f}"]  # milliseconds at batch 1, images a second at 32
    assert model[-6:] == ["-5.00", "(-12.0", "to", "+2.0)", "3.25", f"{1e3 / 3.25:.1f}"]
    assert other[-2:] == ["6.50", f"{1e3 / 6.5:.1f}"]
    assert "batch 1 " in text
    assert "batch 32" in text
    assert "reference" not in text


def test_without_times_there_are_no_columns_for_them():
    text = shown(Report(compared=answered("onnxruntime")))
    assert "images/s" not in text
    assert "70.00" in text


def test_of_a_few_classes_there_is_no_top_5():
    assert "top-5" in shown(Report(compared=answered("onnxruntime")))
    assert "top-5" not in shown(Report(compared=answered("onnxruntime", top5=None)))
    row = AccuracyRow("dense", 0.5, None, 100, 0.4, 0.6)
    assert "top-5" not in shown(Report(accuracy=(row,)))
    assert "top-5" in shown(Report(accuracy=(row, msgspec.structs.replace(row, top5=0.9))))


def test_embeddings_have_columns_of_their_own():
    nothing = {"top1_low": None, "top1_high": None, "top5": None, "agreement": None}
    rows = answered("onnxruntime", **nothing, recall=0.625, recall_low=0.5, recall_high=0.75)
    dense, model = (msgspec.structs.replace(row, top1=None) for row in rows)
    model = msgspec.structs.replace(model, cosine=0.98765, cosine_low=0.91, cosine_centered=0.8765, neighbors=0.775)
    text = shown(Report(compared=(dense, model)))
    for word in (
        "differences of recall@1",
        "recall@1 %",
        "62.50",
        "50.0 - 75.0",
        "0.9877",
        "0.9100",
        "0.8765",
        "77.50",
    ):
        assert word in text
    assert "top-1" not in text
    assert "agreement" not in text
    narrow = shown(Report(compared=(dense, model), rows=SPEEDS), 80)
    assert "…" not in narrow
    for word in ("0.8765", "77.50", "62.50", "-5.00 (-12.0 to +2.0)", "3.25"):
        assert word in narrow


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_narrow_terminal_keeps_what_it_costs(width):
    text = shown(Report(compared=answered("onnxruntime"), rows=SPEEDS), width)
    dense, model = lines_of(text)
    assert "…" not in text
    assert "70.00" in model
    assert "-5.00" in model
    assert "3.25" in model
    assert "75.00" in dense


def test_agreement_of_embeddings_is_their_lowest_cosine():
    logits = AgreementRow("eager", "onnxruntime", 9, 0.5, {}, 0.1)
    text = shown(Report(agreement=(logits,)))
    assert "top-1 %" in text
    assert "cosine" not in text
    text = shown(Report(agreement=(msgspec.structs.replace(logits, top1=None, cosine=0.999),)))
    assert "top-1 %" not in text
    assert "0.999000" in text


def test_what_fine_tuning_gained_is_told_with_its_interval():
    row = AccuracyRow(
        "evit 0.7, fine-tuned", 0.7, 0.9, 1000, 0.67, 0.73, gained=Difference("x", 0.02, 0.01, 0.001, 0.04)
    )
    row = msgspec.structs.replace(row, gmacs=3.0, against=Difference("dense", -0.01, 0.004))
    assert "+2.00 (+0.1 to +4.0)" in shown(Report(accuracy=(row,)))
    assert "…" not in shown(Report(accuracy=(row,)), 80)
    assert "by fine-tuning" not in shown(Report(accuracy=(msgspec.structs.replace(row, gained=None),)))


def test_names_are_shown_and_not_obeyed():
    name = "[red]\x1b[2J[link=x]:bug:\nNOT ok\u202e"
    rows = [msgspec.structs.replace(row, name=name) for row in answered("onnxruntime")[1:]]
    report = Report(
        checks=(Check(name, passed=False, value=1.0, limit=0.5, reason=name),),
        compared=tuple(rows), rows=(speed("onnxruntime", name, 1, 2.0),), notes=(name,),
    )  # fmt: skip
    safe = r"[red]\x1b[2J[link=x]:bug:\nNOT ok\u202e"
    text = shown(report)
    assert text.count(safe) >= 5
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not any(line.startswith("NOT ok") for line in text.splitlines())
    assert safe in text_table(("file",), [(name,)], 200)


def every_table():
    part = Summary(3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)
    name = "deit_small_distilled_patch16_224-evit-k0.7"
    ratios = {"speedup": 1.47, "mac_ratio": 1.5, "mac_efficiency": 0.97, "overhead": 0.03, "end_to_end_p50": 3.3,
              "end_to_end_images_per_second": 12345.6, "end_to_end_speedup": 1.4}  # fmt: skip
    gap = Difference("dense", -0.01, 0.004, -0.02, 0.0)
    questions = "logits on ties", "same answer at every place", "kept patches"
    return Report(
        checks=tuple(
            Check(f"torch-tensorrt, batch {n}: {question}", 1.2e-6, 2.4e-6, True)
            for n in (1, 128)
            for question in questions
        ),
        compared=answered("onnxruntime", name=name),
        rows=tuple(msgspec.structs.replace(row, **ratios) for row in SPEEDS),
        latencies=(LatencyRow("tensorrt-rtx", "model", 128, 12345.6, part, part, part, part, part, 1.5, 0.03),),
        blocks=(BlockRow("tensorrt-rtx", "model", 128, "3-4", 197, 138, 23, 1.234, 0.123),),
        load=(LoadRow(name, 8, 16, 1234, 1234.5, 12.34, 45.67, 7.9),),
        gpu=(GpuSummary("NVIDIA A100-SXM4-80GB", "550.54", "sm80", 128, 44, (1200, 1410), 1410, (1593, 1593), 1593, 0.1,
                        ("power cap", "thermal"), 77, 390.0, 400.0),),
        accuracy=(AccuracyRow("evit 0.7, fine-tuned from trained weights", 0.7, 0.9, 1000, 0.67, 0.73, 3.0, gap, gap),),
        agreement=(AgreementRow("pytorch fp32", "torch-tensorrt", 64, 1.0, dict.fromkeys("369", 1.0), 1e-6, 0.99),),
        sensitivity=(SensitivityRow("blocks.11.mlp.fc1 of a model with a long name", 0.1, 0.2, 0.3, True),),
        notes=("A sentence that is longer than the terminal is wide, as many of the sentences of this library are.",),
    )  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_no_table_is_wider_than_the_terminal_and_no_cell_is_cut(width):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    render(every_table(), console)
    text = console.file.getvalue()
    names = {"deit_small_distilled_patch16_224-evit-k0.7;"}  # whole, to be copied
    assert [line for line in text.splitlines() if len(line.rstrip()) > width and not names & {*line.split()}] == []
    assert "…" not in text
    joined = "".join(text.split())
    for cell in ("307.7", "1.47x", "torch-tensorrt", "1410of1410", "k0.7", "1.234", "12.3%", "1.2e-06"):
        assert cell in joined


def test_at_80_columns_every_table_is_still_a_table():
    text = shown(every_table(), 80)
    assert text.count("───\n") == 9
    assert "speed-up 1.47x;" not in text
    assert "speed-up 1.47x;" in shown(every_table(), 40)


@pytest.mark.parametrize("width", [80, 200])
def test_a_speed_up_has_its_interval(width):
    row = ProfileRow(
        "onnxruntime", "model", 8, 50, 123.4, 64.8, 65.0, 66.0, 0.01, 1.4, 1.384, 1.419, 1.6, 1.6, 0.9, 0.02
    )
    whole = msgspec.structs.replace(row, end_to_end_p50=66.0, end_to_end_images_per_second=121.0, clock="cpu")
    text = shown(Report(rows=(whole,)), width)
    assert "1.40x  1.38 - 1.42" in text
    assert "interval" in text
    assert "interval" not in shown(Report(rows=(msgspec.structs.replace(whole, speedup_low=None),)), width)
