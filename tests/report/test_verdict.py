"""The sentence that a report begins with."""

import msgspec
import pytest

from evit_deploy.report.report import AgreementRow, Check, ComparedRow, Difference, ProfileRow, Report
from evit_deploy.report.verdict import folded, verdict

HELD = tuple(
    Check(f"{runtime}, batch {batch}: {question}", value, limit, True)
    for runtime in ("onnxruntime", "openvino")
    for batch in (1, 8)
    for question, value, limit in (("kept patches", "100%", "100%"), ("logits", 1e-6 * batch, 2e-5))
)
WRONG = Check("openvino, batch 8: logits", 0.5, 1e-6, False, "far off")


def row(variant, batch, images_per_second, speedup=None, low=None, high=None, runtime="onnxruntime"):
    ms = 1e3 * batch / images_per_second
    return ProfileRow(runtime, variant, batch, 9, images_per_second, ms, ms, ms, 0.01, speedup, low, high)


FASTER = (row("model", 8, 147.0, 1.47, 1.45, 1.49), row("dense", 8, 100.0))


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (Report(), None),
        (Report(checks=HELD), "Same answers as the PyTorch model on onnxruntime and openvino."),
        (Report(checks=HELD[:2], agreement=(AgreementRow("pytorch fp32", "onnxruntime", 64, 1.0, {}, 0.0),)),
         "Same answers as the PyTorch model to 64 images on onnxruntime."),
        (Report(checks=(*HELD, WRONG)), "FAILED: 1 of 9 checks, first: openvino, batch 8: logits."),
        (Report(checks=(*HELD[:2], Check("fp16: error over spread of logits", 0.0, 1.0, True))),
         "Same answers as the PyTorch model on onnxruntime, within the rounding of fp16."),
        (Report(checks=(*HELD[:2], Check("int8: error over spread of logits", 0.0, 1.0, True))),
         "Same answers on onnxruntime as its int8 model in float arithmetic."),
        (Report(rows=FASTER), "1.47x [1.45, 1.49] as fast as its dense twin on onnxruntime at batch 8."),
        (Report(checks=HELD[:2], rows=FASTER),
         "Same answers as the PyTorch model on onnxruntime; 1.47x [1.45, 1.49] as fast as its dense twin on "
         "onnxruntime at batch 8."),
        (Report(rows=(row("model", 8, 90.0, 0.9, 0.88, 0.93),)),
         "Not faster than its dense twin on onnxruntime at batch 8: 0.90x [0.88, 0.93]."),
        (Report(rows=(row("model", 8, 101.0, 1.01, 0.98, 1.04),)),
         "1.01x [0.98, 1.04] as fast as its dense twin on onnxruntime at batch 8, which is within noise."),
        (Report(rows=(row("model", 8, 101.0, 6.56, 1.41, 9.28),)),
         "6.56x [1.41, 9.28] as fast as its dense twin on onnxruntime at batch 8, too noisy to rely "
         "on: measure longer."),
        (Report(rows=(row("model", 8, 123.4),)),
         "123.4 images/s on onnxruntime at batch 8, with no dense twin to compare with."),
        (Report(rows=(row("slice", 8, 123.4),)), None),
        # A gate on speed says nothing of answers.
        (Report(checks=(Check("onnxruntime, batch 8: speed-up", 1.47, 1.2, True),), rows=FASTER),
         "1.47x [1.45, 1.49] as fast as its dense twin on onnxruntime at batch 8."),
    ],
)  # fmt: skip
def test_the_sentence(report, said):
    assert verdict(report) == said


def test_speed_is_that_of_the_fastest_runtime_at_the_largest_batch():
    slower = row("model", 8, 120.0, 1.9, 1.8, 2.0, runtime="openvino")
    alone = row("model", 1, 999.0, 1.1, 1.0, 1.2)
    assert verdict(Report(rows=(alone, slower, *FASTER))) == verdict(Report(rows=FASTER))


def compared(name, agreement=None, **more):
    return ComparedRow(name, "evit", "", "fp32", 3.0, 1.5, 72, dense="dense", images=64, runtime="onnxruntime",
                       agreement=agreement, **more)  # fmt: skip


def test_what_it_costs():
    gap = Difference("dense", -0.05, 0.03, -0.12, 0.02)
    assert verdict(Report(compared=(compared("model", 0.9375, top1=0.7, to_dense=gap),), rows=FASTER)) == (
        "The same class as its dense twin on 93.8 % of 64 images; top-1 -5.0 points [-12.0, +2.0]; "
        "1.47x [1.45, 1.49] as fast as its dense twin on onnxruntime at batch 8."
    )
    assert verdict(Report(compared=(compared("model", cosine_centered=0.98765),))) == (
        "Embeddings with a centered cosine of 0.9877 to its dense twin's on 64 images."
    )


def test_of_several_bundles_the_fastest_and_the_closest():
    rows = (compared("a", 0.9), compared("b", 0.8))
    speeds = tuple(msgspec.structs.replace(row("model", 8, n, s, s, s), variant=name)
                   for name, n, s in (("a", 140.0, 1.4), ("b", 190.0, 1.9), ("dense", 100.0, None)))  # fmt: skip
    assert verdict(Report(compared=rows, rows=speeds)) == (
        "Fastest on onnxruntime at batch 8: b, 1.90x [1.90, 1.90] as fast as its dense twin; closest to its dense "
        "twin: a, the same class as its dense twin on 90.0 % of 64 images."
    )


def test_checks_that_held_at_several_batch_sizes_are_one_line_with_the_worst_value():
    assert [(check.name, check.value) for check in folded((*HELD, WRONG))] == [
        ("onnxruntime, batch 1, 8: kept patches", "100%"),
        ("onnxruntime, batch 1, 8: logits", 8e-6),
        ("openvino, batch 1, 8: kept patches", "100%"),
        ("openvino, batch 1, 8: logits", 8e-6),
        ("openvino, batch 8: logits", 0.5),
    ]


def test_checks_of_other_limits_or_values_stay_apart():
    other = (msgspec.structs.replace(HELD[1], limit=9.0), msgspec.structs.replace(HELD[0], value="98%"))
    assert len(folded((*HELD[:2], *other))) == 4
    gates = tuple(Check(f"onnxruntime, batch {n}: speed-up", 1.0 + n, 1.2, True) for n in (1, 8))
    assert list(gates) == folded(gates)
