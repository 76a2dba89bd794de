"""Whole runs with token labels: interrupted, shared among processes, taught, and refused."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import timm
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.training_data import open_data
from evit_deploy.errors import InputError, RecipeError, UnsupportedModelError
from evit_deploy.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from evit_deploy.recipe.recipe import Recipe, dump_recipe, load_recipe
from evit_deploy.recipe.sections import DataSection, ModelSection, TeacherSection, TokenLabelSection, TrainSection
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.training import step as training_run
from evit_deploy.training.loop import EVIT, fit, train
from evit_deploy.training.tasks import Teacher, make_task
from evit_deploy.training.token_labels import token_logits
from tests.support.labeled_images import ARGS, CLASSES, SIZE, SPEC, data_section, section, tiny, write_map
from tests.support.logs import notices
from tests.support.paths import RECIPES
from tests.support.training import QUIET, Killed, losses_of

LABELED = TokenLabelSection()
RUN = TrainSection(
    steps=9, batch_size=6, learning_rate=1e-3, keep_rate_epochs=1, save_every=2, ema=0.9, label_smoothing=0.1,
    threads=1, token_labels=LABELED,
)  # fmt: skip
MODEL = ModelSection(name="lvvit_s", image_size=SIZE, args=ARGS | {"drop_path_rate": 0.2}, pretrained=False)
AUGMENTED = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.25}


def recipe(labeled: Path, **changes) -> Recipe:
    base = {
        "name": "tiny",
        "model": MODEL,
        "data": data_section(labeled, **AUGMENTED),
        "tokens": SPEC,
        "finetune": RUN,
    }
    return Recipe(**(base | QUIET | changes))


# ---- nothing lost, and several processes


def test_a_run_that_was_killed_goes_on_bit_for_bit(labeled, tmp_path, monkeypatch):
    train(recipe(labeled), tmp_path / "whole", device="cpu")
    advance = training_run.TrainingRun.advance

    def killing(self, *arguments, **named):
        if self.step == 5:
            raise Killed
        return advance(self, *arguments, **named)

    monkeypatch.setattr(training_run.TrainingRun, "advance", killing)
    with pytest.raises(Killed):
        train(recipe(labeled), tmp_path / "run", device="cpu")
    monkeypatch.setattr(training_run.TrainingRun, "advance", advance)
    told = notices()
    train(recipe(labeled), tmp_path / "run", resume=True, device="cpu")
    assert "finetune: goes on at step 5 of 9" in told
    assert (tmp_path / "run" / EVIT).read_bytes() == (tmp_path / "whole" / EVIT).read_bytes()


@pytest.mark.slow
def test_two_processes_do_what_one_does(labeled, tmp_path):
    # Tokens are mixed, and batch norm is done, among the images of one process: without them nothing is left to differ.
    run = msgspec.structs.replace(
        RUN, steps=20, batch_size=8, ema=None, model_mode="eval", token_labels=TokenLabelSection(mix_token=0)
    )
    still = msgspec.structs.replace(MODEL, args=ARGS)
    alone = recipe(labeled, finetune=run, model=still)
    half = msgspec.structs.replace(alone, finetune=msgspec.structs.replace(run, batch_size=4))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29713"]
    for name, what, how in (("one", alone, []), ("two", half, launcher)):
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(what))
        command = [sys.executable, *how, "-m", "evit_deploy", "train", str(tmp_path / f"{name}.yaml"), "--out"]
        done = subprocess.run(
            [*command, str(tmp_path / name)], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "8 images a step" in done.stderr
    losses = [losses_of(tmp_path / name) for name in ("one", "two")]
    assert len(losses[0]) == 2
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
    one, two = (read_checkpoint(tmp_path / name / EVIT).weights for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=2e-3)


# ---- a teacher


def test_a_teacher_s_tokens_are_labels():
    student, teacher = reduce_tokens_(tiny(), SPEC).eval(), tiny(depth=2).eval()
    student.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    teacher.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    how = TeacherSection(checkpoint="x", kind="token_labels")
    images, targets = torch.rand(4, 3, SIZE, SIZE) * 2 - 1, torch.tensor([0, 2, 1, 1])
    loss = make_task(student, section(label_smoothing=0.1), Teacher(teacher, how))(images, targets)["loss"]
    found = token_logits(student, images)
    said = token_logits(teacher, images / 2 + 0.5).token_logits.softmax(-1)
    total = torch.nn.functional.cross_entropy(found.class_logits, targets, label_smoothing=0.1)
    for i in range(4):
        known = found.kept[i] >= 0
        each = said[i, found.kept[i, known]] * found.token_logits[i, known].log_softmax(-1)
        total = total - 0.7 * each.sum(-1).mean() / 4
    torch.testing.assert_close(loss, total)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_digits_learn_from_a_teacher(tmp_path):
    model = ModelSection(name="lvvit_s", image_size=SIZE, args=ARGS)
    plain = msgspec.structs.replace(RUN, steps=2, batch_size=16, token_labels=None, threads=None)
    data = DataSection(name="digits", evaluation_batch_size=360)
    digits = Recipe(name="tiny", model=model, data=data, dense=plain, tokens=SPEC, finetune=plain, **QUIET)
    first = train(digits, tmp_path / "teacher", device="cpu")
    results = []
    for teacher, labels in ((TeacherSection(checkpoint=str(first.dense), kind="token_labels"), LABELED), (None, None)):
        finetune = msgspec.structs.replace(plain, token_labels=labels)
        start = ModelSection(checkpoint=str(first.dense))
        taught = msgspec.structs.replace(digits, model=start, dense=None, finetune=finetune, teacher=teacher)
        out = tmp_path / str(len(results))
        results.append(read_checkpoint(train(taught, out, device="cpu").checkpoint).weights)
    assert any(not torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- refusals


TAUGHT = TeacherSection(checkpoint="none.pth", kind="token_labels")
FOLDER = {"name": "folder", "mixup": 0, "cutmix": 0}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataSection(**FOLDER | {"mixup": 0.8}, token_labels="x"), "a token label map belongs to one image"),
        (lambda: DataSection(**FOLDER, token_labels="x", auto_augment="augmix-m5-w4-d2"), "AugMix"),
        (lambda: DataSection(name="digits", token_labels="x"), "the digits have no folders"),
        (lambda: TeacherSection(checkpoint="x", kind="token_labels", weight=0.3), "no effect on a teacher"),
        (
            lambda: recipe(Path(), finetune=msgspec.structs.replace(RUN, token_labels=None)),
            r"data\.token_labels: nothing learns .* Add finetune\.token_labels=\{\}",
        ),
        (
            lambda: recipe(Path(), data=DataSection(name="folder")),
            r"MixToken replaces mixup and CutMix\. Set data\.mixup=0",
        ),
        (lambda: recipe(Path(), teacher=TAUGHT), "from a folder and from a teacher"),
        (lambda: recipe(Path(), teacher=TeacherSection(checkpoint="x")), "cannot be combined with another kind"),
        (
            lambda: recipe(
                Path(), data=DataSection(**FOLDER), teacher=TAUGHT,
                finetune=msgspec.structs.replace(RUN, token_labels=None),
            ),
            "nothing learns from the teacher's token labels",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_contradicts_itself_is_refused(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def damaged(labeled: Path, tmp_path: Path, **changes) -> DataSection:
    """The folder's data, with maps that may be changed."""
    labels = tmp_path / "labels"
    for file in (labeled / "labels").rglob("*.pt"):
        target = labels / file.relative_to(labeled / "labels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return data_section(labeled, token_labels=str(labels), **changes)


def refused(what: Recipe, tmp_path: Path, words: str, error: type[Exception] = RecipeError) -> None:
    with pytest.raises(error, match=words):
        train(what, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_is_refused_before_training(labeled, tmp_path):
    none = recipe(labeled, data=data_section(labeled, token_labels=None))
    refused(none, tmp_path, r"finetune\.token_labels: no token labels given\. Give --set data\.token_labels=FOLDER")
    both = recipe(
        labeled,
        data=none.data,
        teacher=TAUGHT,
        dense=RUN,
        model=msgspec.structs.replace(MODEL, pretrained=True),
    )
    refused(both, tmp_path, r"dense\.token_labels: no token labels given.*the teacher is finetune's alone")
    deit = ModelSection(name="deit_tiny_patch16_224", image_size=SIZE, pretrained=False)
    refused(recipe(labeled, model=deit), tmp_path, "no classifier on every token .*LV-ViT")
    for tokens in (TokenSpec(method="tome", options={"merge": 2}), TokenSpec(0.7, options={"squeeze": True})):
        refused(
            recipe(labeled, tokens=tokens),
            tmp_path,
            "finetune.token_labels: token labels need tokens that are patches",
        )
    refused(
        recipe(labeled, data=data_section(labeled, token_labels="nowhere")),
        tmp_path,
        "nowhere: no such folder",
        InputError,
    )
    with pytest.raises(UnsupportedModelError, match="no classifier on every token"):
        fit(torch.nn.Linear(2, 2), open_data(none.data, Preprocess(size=(SIZE, SIZE))), RUN)
    with pytest.raises(InputError, match="the images have no token labels"):
        fit(tiny(), open_data(none.data, Preprocess(size=(SIZE, SIZE))), RUN)


def test_maps_that_do_not_fit_are_refused(labeled, tmp_path):
    data = damaged(labeled, tmp_path)
    labels = Path(data.token_labels or "")
    (labels / "bee" / "3.pt").unlink()
    words = r"labels: 1 of 24 training images have no token labels \(got no bee/3\.pt, expected <class>/"
    refused(recipe(labeled, data=data), tmp_path, words, InputError)
    write_map(labels / "bee" / "3.pt", 3, torch.Generator(), size=4)
    with pytest.raises(InputError, match=r"bee/3\.pt: a token label map of a different size .*at most 0 of 24"):
        train(recipe(labeled, data=data), tmp_path / "begun", device="cpu")
    write_map(labels / "ant" / "0.pt", 40, torch.Generator())
    refused(recipe(labeled, data=data), tmp_path, r"ant/0\.pt: token labels of unknown classes .*0 to 2", InputError)


def test_two_images_do_not_share_a_map(labeled, tmp_path):
    data = damaged(labeled, tmp_path)
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in (labeled / "train" / name).iterdir():
            (tmp_path / "train" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "train" / "cat" / "0.again.JPEG").write_bytes((labeled / "train" / "cat" / "0.JPEG").read_bytes())
    twice = msgspec.structs.replace(data, train=str(tmp_path / "train"))
    refused(recipe(labeled, data=twice), tmp_path, r"cat/0\.pt: two training images have the same", InputError)


def test_a_map_that_cannot_be_read_gives_way_like_an_image(labeled, tmp_path):
    data = damaged(labeled, tmp_path, max_corrupt=1)
    (Path(data.token_labels or "") / "bee" / "3.pt").write_bytes(b"PK\x03\x04 nothing")
    told = notices()
    found = open_data(data, Preprocess(size=(SIZE, SIZE))).training(24, 0)
    _, targets, maps, *_ = next(found)
    assert len(targets) == 24
    assert torch.isfinite(maps).all()
    assert "bee/3.pt: not a token label map" in told[0]


def test_teachers_that_cannot_label_are_refused(labeled, tmp_path):
    data = data_section(labeled, token_labels=None)
    shape = {"num_classes": 3, "img_size": SIZE, "embed_dim": 24, "depth": 1, "num_heads": 2}
    deit, name = tmp_path / "deit.safetensors", "deit_tiny_patch16_224"
    save_checkpoint(
        deit,
        timm.create_model(name, **shape),
        Checkpoint("", None, {}, name, shape, preprocess=Preprocess(size=(SIZE, SIZE))),
    )
    first = train(recipe(labeled, finetune=msgspec.structs.replace(RUN, steps=1)), tmp_path / "first", device="cpu")
    for path, words in (
        (deit, "the teacher has no classifier on every"),
        (first.checkpoint, "the teacher drops tokens"),
    ):
        teacher = TeacherSection(checkpoint=str(path), kind="token_labels")
        refused(recipe(labeled, data=data, teacher=teacher), tmp_path, words)


def test_the_paper_s_lvvit_recipes_learn_from_token_labels():
    folder = RECIPES / "paper"
    files = sorted(folder.glob("lvvit*.yaml"))
    assert len(files) == 8
    for file in files:
        run = load_recipe(file, ["data.token_labels=LABELS"])
        assert run.finetune.token_labels == TokenLabelSection(weight=1.0, mix_token=1.0)
        assert (run.data.mixup, run.data.cutmix, run.data.repeated_augmentation) == (0, 0, 1)
        rate, ema = (5e-6, None) if run.model.image_size == 448 else (1.6e-3, 0.99992)  # the first is a fine-tune
        assert run.finetune.effective_learning_rate(8) == pytest.approx(rate)
        assert run.finetune.ema == ema
    assert load_recipe(folder / "deit-small-0.7.yaml").finetune.token_labels is None
