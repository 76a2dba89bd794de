"""The log of a training run: which rows it has, and how it tells the way of the accuracy."""

import csv

import pytest
import torch

from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.training.log import COLUMNS, TrainingLog, sparkline
from evit_deploy.training.loop import Stage, fit, train
from evit_deploy.training.step import StepResult
from tests.support.logs import notices
from tests.support.training import SPEC, FixedBatch, recipe, section, tiny


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_evaluation_has_a_row(tmp_path):
    log, told = TrainingLog(tmp_path, "finetune", every=4), notices()
    fit(reduce_tokens_(tiny(), SPEC), FixedBatch(), section(steps=11, evaluate_every=1), stage=Stage("tiny", log=log))
    log.write()
    rows = rows_of(log.path)
    assert tuple(rows[0]) == COLUMNS
    assert [(row["step"], bool(row["validation_top1"])) for row in rows] == [
        ("3", True), ("4", False), ("6", True), ("8", False), ("9", True), ("11", False),
    ]  # fmt: skip
    assert [float(row["epoch"]) for row in rows] == pytest.approx([int(row["step"]) / 3 for row in rows], rel=1e-5)
    said = [text for text in told if "validation top-1 is" in text]
    assert len(said) == 3
    for row, text in zip([row for row in rows if row["validation_top1"]], said, strict=True):
        assert f"top-1 is {float(row['validation_top1']):.2%}, loss " in text


def test_a_row_has_the_means_of_the_steps_since_the_one_before(tmp_path):
    log = TrainingLog(tmp_path, "finetune", every=4)
    losses = fit(tiny(), FixedBatch(), section(steps=7, evaluate_every=1), stage=Stage("finetune", log=log))
    log.write()
    found = {int(row["step"]): float(row["loss"]) for row in rows_of(log.path)}
    wanted = {3: losses[:3], 4: losses[3:4], 6: losses[4:6], 7: losses[6:]}
    assert found == pytest.approx({step: sum(part) / len(part) for step, part in wanted.items()}, rel=1e-5)


def test_the_last_row_has_what_the_comparison_found_and_the_curve_ends_there(tmp_path):
    told, run = notices(), section(steps=6, batch_size=720, evaluate_every=2)  # a step an epoch
    report = train(recipe(finetune=run), tmp_path, device="cpu").report
    top1 = {row.name: row.top1 for row in report.accuracy}
    dense, finetune = (rows_of(tmp_path / f"{stage}.csv") for stage in ("dense", "finetune"))
    assert float(dense[-1]["validation_top1"]) == pytest.approx(top1["dense"], abs=1e-6)
    assert float(finetune[-1]["validation_top1"]) == pytest.approx(top1["evit 0.5, fine-tuned"], abs=1e-6)
    assert [row["step"] for row in finetune] == ["2", "4", "6"]
    start, _, end = (f"{float(row['validation_top1']):.2%}" for row in finetune)
    (curve,) = [text for text in told if ", epochs " in text and "top-1" in text]  # the dense was evaluated once
    (loss,) = [text for text in told if text.startswith("finetune: loss ")]
    assert loss.startswith(f"finetune: loss {float(finetune[0]['loss']):.3g} ")
    assert loss.endswith(f" {float(finetune[-1]['loss']):.3g}, epochs 2 to 6")
    assert curve.startswith(f"finetune: validation top-1 {start} ")
    assert f" {end}, epochs 2 to 6" in curve


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.0, 0.5, 1.0], "▁▅█"), ([1.0, 0.0], "█▁"), ([0.3], "▄"), ([0.3, 0.3], "▄▄"),
     ([i / 70 for i in range(71)], None)],
)  # fmt: skip
def test_sparklines(values, text):
    found = sparkline(values)
    if text is None:
        assert (len(found), found[0], found[-1]) == (60, "▁", "█")
        assert list(found) == sorted(found)
    else:
        assert found == text


def test_the_curve_tells_where_it_was_highest_unless_that_is_its_end(tmp_path):
    plan = token_plan(reduce_tokens_(tiny(), SPEC))
    log = TrainingLog(tmp_path, "dense", every=100)
    log.begin(0, per_epoch=2)
    curves, losses = [], []
    for top1 in (0.25, 0.75, 0.5, 0.75):
        losses.append(1.0)
        done = StepResult(torch.tensor([1.0, 0.5, 0.25]), 1, False, images=8, seconds=0.1, waited=0.0)
        log.add(done, losses, 1e-3, plan)
        log.evaluated(top1)
        curves.append(log.curve())
    assert curves == [
        None,
        "dense: validation top-1 25.00% ▁█ 75.00%, epochs 0.5 to 1",
        "dense: validation top-1 25.00% ▁█▅ 50.00%, epochs 0.5 to 1.5; highest at epoch 1: 75.00%",
        "dense: validation top-1 25.00% ▁█▅█ 75.00%, epochs 0.5 to 2",
    ]


def test_the_loss_is_a_line_of_means_that_fits_80_columns(tmp_path):
    plan = token_plan(reduce_tokens_(tiny(), SPEC))
    log = TrainingLog(tmp_path, "finetune", every=1)
    log.begin(0, per_epoch=2)
    losses = []
    assert log.loss_curve() is None
    for number in range(40):
        losses.append(40.0 - number)
        done = StepResult(torch.tensor([1.0]), 1, False, images=8, seconds=0.1, waited=0.0)
        log.add(done, losses, 1e-3, plan)
        log.evaluated(number / 100)
    assert log.loss_curve() == "finetune: loss 40 ██▇▇▇▆▆▅▅▅▄▄▄▃▃▂▂▂▁▁ 1, epochs 0.5 to 20"
    assert max(len(log.loss_curve() or ""), len(log.curve() or "")) <= 80
    losses.append(float("nan"))
    log.add(done, losses, 1e-3, plan)
    assert log.loss_curve() == "finetune: loss 40 is not finite nan, epochs 0.5 to 20.5"
