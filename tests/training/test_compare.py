"""Differences between models on the same images, and what a recipe can ask of them."""

import msgspec
import numpy as np
import pytest
import timm
import torch

from evit_deploy.errors import GateFailed, RecipeError
from evit_deploy.pipeline.run import _expected
from evit_deploy.recipe.recipe import CompareSection, ExpectSection, load_recipe
from evit_deploy.report.report import AccuracyRow, Difference, Report
from evit_deploy.report.statistics import difference
from evit_deploy.report.tables import render
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.training.compare import compare, untrained_name

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2, "img_size": 16, "num_classes": 4}


def test_difference_is_paired():
    right = np.array([True] * 50 + [False] * 50)
    other = np.array([True] * 40 + [False] * 60)
    found = difference("dense", right, other)
    ends = pytest.approx(0.03425, abs=1e-5), pytest.approx(0.16183, abs=1e-5)
    assert found == Difference("dense", pytest.approx(0.1), pytest.approx((0.1 * 0.9 / 100) ** 0.5), *ends)
    assert difference("dense", other, right).value == -found.value
    same = difference("dense", right, right)
    assert (same.value, same.error) == (0.0, 0.0)  # however uncertain each of them is


class Few:
    """Nine images and labels, of which both orders of evaluation see the same."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.images = 3 * torch.randn(9, 3, 16, 16, generator=generator)

    def validation(self, batch_size, *, rank=0, world=1):
        yield from zip(self.images.split(batch_size), (torch.arange(9) % 4).split(batch_size), strict=True)


def test_every_row_is_held_against_the_row_it_belongs_to():
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", **TINY)
    evit = reduce_tokens_(
        timm.create_model("deit_tiny_patch16_224", **TINY), TokenSpec(keep_rate=0.5, locations=(1, 2))
    )
    rows = {row.name: row for row in compare(dense, evit, Few(), CompareSection(keep_rates=(0.3,)), 4)}
    others = {name: row.against and row.against.other for name, row in rows.items()}
    own = {rate: untrained_name(TokenSpec(keep_rate=rate)) for rate in (0.5, 0.3)}
    assert others == {
        "dense": None,
        own[0.5]: "dense",
        "random 0.5, not fine-tuned": own[0.5],
        "inverse 0.5, not fine-tuned": own[0.5],
        own[0.3]: "dense",
        "random 0.3, not fine-tuned": own[0.3],
        "inverse 0.3, not fine-tuned": own[0.3],
        "evit 0.5, fine-tuned": "dense",
    }
    for row in rows.values():
        if row.against is not None:
            assert row.against.value == pytest.approx(row.top1 - rows[row.against.other].top1)
    alone = compare(dense, evit, Few(), CompareSection(untrained=False), 4)
    assert {row.against.other for row in alone[1:]} == {"dense"}


def report(evit=-0.01, random=-0.06, inverse=-0.15, gained=0.01):
    def row(name, top1, other=None, value=0.0, gained=None):
        against = None if other is None else Difference(other, value, 0.004)
        return AccuracyRow(name, top1, 1.0, 1000, 0.0, 1.0, against=against, gained=gained)

    own = "evit 0.7, not fine-tuned"
    return Report(
        accuracy=(
            row("dense", 0.7),
            row(own, 0.7 + evit, "dense", evit),
            row("random 0.7, not fine-tuned", 0.7 + evit + random, own, random),
            row("inverse 0.7, not fine-tuned", 0.7 + evit + inverse, own, inverse),
            row(
                "evit 0.7, fine-tuned",
                0.7,
                "dense",
                0.0,
                Difference(own, gained, 0.004, gained - 0.008, gained + 0.008),
            ),
        )
    )


def wild(**expect):
    recipe = load_recipe("digits-in-the-wild")
    limits = {"dense": 0.6, "untrained_loss": 0.02, "over": {"random": 0.05, "inverse": 0.1}} | expect
    return msgspec.structs.replace(recipe, expect=ExpectSection(**limits))


GAINED = "top-1, fine-tuned less evit 0.7, not fine-tuned: upper end of the interval"


def test_a_fine_tune_that_loses_accuracy_fails(tmp_path):
    with pytest.raises(GateFailed, match=r"interval \(got -0.0020.*-1.00 points.*-1.80 to -0.20.*finetuned_loss.*kept"):
        _expected(wild(), report(gained=-0.01), tmp_path)


@pytest.mark.parametrize(("lost", "allowed"), [(0.007, 0.0), (0.01, 0.005), (0.5, None)])
def test_a_loss_within_noise_or_that_is_allowed_passes(lost, allowed, tmp_path):
    assert _expected(wild(finetuned_loss=allowed), report(gained=-lost), tmp_path).passed


def test_a_loss_above_what_is_allowed_fails(tmp_path):
    with pytest.raises(GateFailed, match=r"-0\.0120, expected at least -0\.005"):
        _expected(wild(finetuned_loss=0.005), report(gained=-0.02), tmp_path)


def test_the_fine_tuned_model_is_held_against_its_start_image_by_image():
    torch.manual_seed(0)
    dense = timm.create_model("deit_tiny_patch16_224", **TINY)
    spec, data = TokenSpec(keep_rate=0.5, locations=(1, 2)), Few()
    evit = reduce_tokens_(timm.create_model("deit_tiny_patch16_224", **TINY), spec)
    rows = compare(dense, evit, data, CompareSection(baselines=()), 4)
    right = []
    for model in (evit, reduce_tokens_(dense, spec)):
        with torch.inference_mode():
            right.append(model.eval()(data.images).argmax(1).numpy() == np.arange(9) % 4)
    assert (right[0] != right[1]).any()
    assert rows[-1].gained == difference(untrained_name(spec), *right)
    assert [row.gained for row in rows[:-1]] == [None, None]
    assert compare(dense, evit, data, CompareSection(untrained=False, baselines=()), 4)[-1].gained is None


def test_expected_differences_become_checks(tmp_path):
    checks = {check.name: check for check in _expected(wild(), report(), tmp_path).checks}
    gained = checks.pop(GAINED)
    assert (gained.value, gained.limit) == (pytest.approx(0.018), 0)
    own = "evit 0.7, not fine-tuned"
    assert {name: (check.value, check.limit) for name, check in checks.items()} == {
        "top-1, dense": (0.7, 0.6),
        f"top-1, {own} over dense": (-0.01, -0.02),
        f"top-1, {own} over random 0.7, not fine-tuned": (0.06, 0.05),
        f"top-1, {own} over inverse 0.7, not fine-tuned": (0.15, 0.1),
    }
    assert "standard error 0.40" in checks[f"top-1, {own} over dense"].reason


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"evit": -0.03}, "over dense"), ({"random": -0.04}, "over random"), ({"inverse": 0.0}, "over inverse")],
)
def test_a_difference_that_is_too_small_fails_the_run(changes, word, tmp_path):
    with pytest.raises(GateFailed, match=word):
        _expected(wild(), report(**changes), tmp_path)


def test_expectations_of_what_is_not_compared_are_refused():
    recipe = load_recipe("digits-in-the-wild")
    with pytest.raises(RecipeError, match=r"not a baseline.*slice.*random, inverse"):
        wild(over={"slice": 0.1})
    with pytest.raises(RecipeError, match=r"compare\.untrained"):
        msgspec.structs.replace(recipe, compare=CompareSection(untrained=False))


def test_differences_are_printed_where_there_are_any(capsys):
    from rich.console import Console

    console = Console(width=160)
    render(report(), console)
    assert "-6.00 ± 0.40" in capsys.readouterr().out
    render(Report(accuracy=report().accuracy[:1]), console)
    assert "difference" not in capsys.readouterr().out
