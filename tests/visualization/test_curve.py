"""Patches removed by score, at random and inversely: each point is what the models themselves answer."""

import csv
import io
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from evit_deploy.data.images import preprocess_image
from evit_deploy.errors import InputError
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.report.statistics import wilson
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.verification.answers.retrieval import centered_cosines
from evit_deploy.visualization.curve import RemovalCurve, removal_curve
from tests.support.models import write_checkpoint

RATES = (0.8, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten class folders with two images each."""
    root, generator = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for number in range(20):
        path = root / f"class {number // 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (96, 120, 3), np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def curve(checkpoint_file, folder) -> RemovalCurve:
    return removal_curve(checkpoint_file, folder, rates=RATES)


def answers(checkpoint_file, folder, spec: TokenSpec | None) -> torch.Tensor:
    model = build_model(read_checkpoint(checkpoint_file))
    model = model if spec is None else reduce_tokens_(model, spec)
    preprocess = read_checkpoint(checkpoint_file).preprocess
    files = sorted(folder.rglob("*.png"), key=lambda file: int(file.stem))
    with torch.inference_mode():
        return torch.cat(
            [model(torch.from_numpy(np.stack([preprocess_image(f, preprocess) for f in part])))
             for part in (files[:16], files[16:])]
        )  # fmt: skip


@pytest.mark.parametrize(("removed", "method"), [("least attended first", "evit"), ("most attended first", "inverse")])
def test_each_point_is_what_the_model_answers(removed, method, curve, checkpoint_file, folder):
    dense = answers(checkpoint_file, folder, None).argmax(1).numpy()
    labels = np.arange(20) // 2
    assert curve.dense_top1 == (dense == labels).mean()
    for rate in RATES:
        point = next(one for one in curve.points if (one.removed, one.keep_rate) == (removed, rate))
        found = answers(checkpoint_file, folder, TokenSpec(rate, method=method)).argmax(1).numpy()
        assert point.images == 20
        assert point.agreement == (found == dense).mean()
        assert (point.agreement_low, point.agreement_high) == wilson(int((found == dense).sum()), 20)
        assert point.top1 == (found == labels).mean()
        plan = token_plan(reduce_tokens_(build_model(read_checkpoint(checkpoint_file)), TokenSpec(rate)))
        assert point.tokens == plan.blocks[-1].tokens_out - 1
        assert point.gmacs == plan.macs() / 1e9


def test_random_choices_are_the_mean_of_three(curve, checkpoint_file, folder):
    dense = answers(checkpoint_file, folder, None).argmax(1)
    for rate in RATES:
        point = next(one for one in curve.points if (one.removed, one.keep_rate) == ("at random", rate))
        specs = [TokenSpec(rate, method="random", options={"seed": seed}) for seed in range(3)]
        shares = [(answers(checkpoint_file, folder, spec).argmax(1) == dense).float().mean().item() for spec in specs]
        assert point.agreement == pytest.approx(np.mean(shares))


def test_a_table_a_csv_and_a_chart(curve):
    header, rows = curve.table()
    assert header == ("keep rate", "tokens", "GMACs", "least attended first", "at random", "most attended first")
    assert [row[0] for row in rows] == ["0.8", "0.3"]
    point = curve.points[0]
    assert rows[0][3] == f"{100 * point.top1:.1f} ({100 * point.agreement:.1f})"
    lines = list(csv.DictReader(io.StringIO(curve.csv())))
    assert len(lines) == 6
    assert float(lines[0]["agreement"]) == pytest.approx(point.agreement)
    assert lines[0]["cosine"] == ""
    text = " ".join(ElementTree.fromstring(curve.svg()).itertext())
    assert "least attended first" in text
    assert "keep rate at each location" in text
    assert "<table" in curve._repr_html_()


def test_a_bundle_is_asked_through_its_checkpoint(converted, checkpoint_file, folder, curve):
    found = removal_curve(converted.path, folder, rates=RATES)
    assert found.points == curve.points
    assert found.locations == (1, 2, 3)


def test_a_method_is_compared_and_embeddings_have_cosines(tmp_path, folder):
    source = write_checkpoint(tmp_path / "dino.safetensors", "registers, no classes")
    found = removal_curve(source, folder, rates=(0.5,), sample=6, method="merge", locations=(1, 2))
    assert [point.removed for point in found.points] == [
        "least attended first", "at random", "most attended first", "merge",
    ]  # fmt: skip
    assert all((point.agreement, point.top1, point.images) == (None, None, 6) for point in found.points)
    assert found.locations == (1, 2)
    assert (found.points[0].tokens, found.points[-1].tokens) == (11, 9)  # of 36: 18 + 1, 10 + 1; 18, 9
    model, preprocess = build_model(read_checkpoint(source)), read_checkpoint(source).preprocess
    files = sorted(folder.rglob("*.png"), key=lambda file: int(file.stem))
    chosen = np.linspace(0, 19, 6).astype(int)
    inputs = torch.from_numpy(np.stack([preprocess_image(files[number], preprocess) for number in chosen]))
    with torch.inference_mode():
        dense = model(inputs).numpy()
        reduced = reduce_tokens_(model, TokenSpec(0.5, locations=(1, 2)))(inputs).numpy()
    assert found.points[0].cosine == pytest.approx(centered_cosines(reduced, dense).mean(), abs=1e-5)
    assert found.caption == "centered cosine to the dense model"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"rates": (1.0,)}, "not a keep rate"),
        ({"rates": ()}, "not a keep rate"),
        ({"rates": (float("nan"),)}, "not a keep rate"),
        ({"sample": 0}, "no images"),
        ({"keep_rate": 0.5}, "separate keep rates"),
        ({"locations": (9,)}, "outside the model"),
    ],
)
def test_what_makes_no_curve_is_refused(arguments, what, checkpoint_file, folder):
    with pytest.raises(InputError, match=what):
        removal_curve(checkpoint_file, folder, **arguments)


def test_a_bundle_takes_no_tokens_and_an_image_has_to_be_one(converted, folder, tmp_path):
    with pytest.raises(InputError, match="options of a bundle are fixed"):
        removal_curve(converted.path, folder, method="merge")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot be read"):
        removal_curve(converted.path, [broken], rates=(0.5,))


def test_folders_that_are_not_the_classes_give_agreement_alone(checkpoint_file, folder, tmp_path):
    (tmp_path / "holiday").mkdir()
    for name in ("rome", "paris"):
        shutil.copytree(folder / "class 3", tmp_path / "holiday" / name)
    for place in (tmp_path / "holiday", folder / "class 3"):
        found = removal_curve(checkpoint_file, place, rates=(0.5,), sample=4)
        assert found.dense_top1 is None
        assert found.measure == "same class as the dense model"
