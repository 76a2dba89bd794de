"""Training on a GPU: that it learns, goes on, logs what a CPU logs, and that nothing in a step waits."""

import csv
import math
import warnings

import msgspec
import pytest
import torch

from evit_deploy.models.checkpoint import read_checkpoint
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.recipe.sections import DataSection, TeacherSection, TokenLabelSection
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.training.log import COLUMNS
from evit_deploy.training.loop import fit, train
from evit_deploy.training.step import TrainingRun
from evit_deploy.training.tasks import Teacher
from tests.support import labeled_images
from tests.support.logs import notices
from tests.support.paths import RECIPES
from tests.support.training import QUIET, RUN, SPEC, FixedBatch, Killed, recipe, section, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def rows(folder, stage="finetune"):
    with (folder / f"{stage}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("autocast", "compiled"), [("none", False), ("bf16", False), ("bf16", True)])
def test_the_digits_are_learned(autocast, compiled, tmp_path):
    whole = load_recipe(str(RECIPES / "digits.yaml"))
    quick = msgspec.structs.replace(
        whole,
        model=msgspec.structs.replace(whole.model, args={**whole.model.args, "depth": 2}),
        tokens=msgspec.structs.replace(whole.tokens, locations=(1,)),
        dense=msgspec.structs.replace(whole.dense, steps=120, autocast=autocast),
        finetune=msgspec.structs.replace(
            whole.finetune, steps=40, autocast=autocast, compile=compiled, keep_rate_epochs=0.5
        ),
        compare=QUIET["compare"],
        expect=type(whole.expect)(),
    )
    result = train(quick, tmp_path, device="cuda")
    assert all(weight.isfinite().all() for weight in read_checkpoint(result.checkpoint).weights.values())
    for stage, count in (("dense", 12), ("finetune", 4)):
        found = rows(tmp_path, stage)
        assert len(found) == count
        for row in found:
            assert tuple(row) == COLUMNS
            assert all(math.isfinite(float(value)) for value in row.values())
            assert 0 <= float(row["loader_wait"]) <= 1
            assert int(row["gpu_memory"]) > 0
    losses = [float(row["loss"]) for row in rows(tmp_path, "dense")]
    assert losses[-1] < 0.8 * losses[0]


def test_losses_are_those_of_a_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model = reduce_tokens_(tiny(), SPEC).to(device)
        run = section(steps=8, keep_rate_epochs=1, clip=1.0, ema=0.5, accumulate=2)
        found.append(fit(model, FixedBatch(), run))
    torch.testing.assert_close(*map(torch.tensor, found), rtol=2e-2, atol=0)  # convolutions may be TF32


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    """As on a CPU, but for the order of additions in a gradient, which a GPU leaves open."""
    train(recipe(), tmp_path / "whole", device="cuda")
    advance = TrainingRun.advance

    def killing(self, *arguments, **named):
        if self.step == 5:
            raise Killed
        return advance(self, *arguments, **named)

    monkeypatch.setattr(TrainingRun, "advance", killing)
    with pytest.raises(Killed):
        train(recipe(), tmp_path / "run", device="cuda")
    monkeypatch.setattr(TrainingRun, "advance", advance)
    told = notices()
    train(recipe(), tmp_path / "run", resume=True, device="cuda")
    assert "dense: goes on at step 4 of 12" in told
    assert not list((tmp_path / "run").glob("*.state"))
    for stage in ("dense", "finetune"):
        for one, other in zip(rows(tmp_path / "run", stage), rows(tmp_path / "whole", stage), strict=True):
            assert one["step"] == other["step"]
            assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-2)


def test_a_bad_batch_is_survived_on_a_gpu():
    class Once(FixedBatch):
        def training(self, batch_size, seed, **how):
            for number, (images, labels) in enumerate(super().training(batch_size, seed, **how)):
                yield images * (float("nan") if number == 5 else 1), labels

    told = notices()
    model = reduce_tokens_(tiny(), SPEC).to("cuda")
    losses = fit(model, Once(), section(steps=8, save_every=2))
    assert told[-1] == "finetune: step 6 was not finite; went back to step 5, once"
    assert len(losses) == 8
    assert all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


STEPS = {
    "fp32": {},
    "bf16": {"autocast": "bf16", "ema": 0.9, "clip": 1.0},
    "fp16": {"autocast": "fp16", "clip": 1.0},
    "accumulated": {"accumulate": 2, "channels_last": True, "checkpoint_activations": True},
    "compiled": {"compile": True, "autocast": "bf16"},
}


@pytest.fixture
def nothing_waits():
    """A function; from its call on, whatever waits for the GPU is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype, and says so
        yield lambda: torch.cuda.set_sync_debug_mode("error")
        torch.cuda.set_sync_debug_mode("default")


def check_that_nothing_waits(run, batches, begin):
    for _ in range(3):  # memory, statistics, the optimizer's state, programs
        run.advance(batches, 1e-3, moving=False)
    torch.cuda.synchronize()
    begin()
    sent = [run.advance(batches, 1e-3, moving=False) for _ in range(2)]
    with pytest.raises(RuntimeError, match="synchroniz"):  # the guard does its work
        next(run.model.parameters()).sum().item()
    torch.cuda.set_sync_debug_mode("default")
    assert all(done.finite for done in sent)


@pytest.mark.parametrize("name", [*STEPS, "taught"])
def test_nothing_in_a_step_waits(name, nothing_waits):
    model, teacher = reduce_tokens_(tiny(num_classes=10), SPEC).to("cuda").train(), None
    if name == "taught":
        master = tiny(embed_dim=48, num_classes=10).to("cuda").eval().requires_grad_(False)
        master.pretrained_cfg = dict(master.pretrained_cfg) | {"mean": (0.1, 0.2, 0.3)}
        teacher = Teacher(master, TeacherSection(name="x"))
    data = labeled_images.open_data(DataSection(name="digits"), labeled_images.Preprocess(size=(16, 16)))
    batches = data.training(8, 0, device="cuda")
    check_that_nothing_waits(TrainingRun(model, section(**STEPS.get(name, {})), teacher), batches, nothing_waits)


@pytest.mark.parametrize("what", ["mixed", "token labels"])
def test_no_batch_of_images_waits(what, labeled, nothing_waits):
    """Bytes that are normalized, erased and mixed on the GPU; label maps that are cropped there."""
    varied = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.9}
    if what == "mixed":
        data = labeled_images.opened(labeled, token_labels=None, mixup=0.8, cutmix=1.0, **varied)
        model = tiny(num_classes=3, img_size=labeled_images.SIZE, patch_size=16)
        run = TrainingRun(reduce_tokens_(model, SPEC).to("cuda").train(), section(batch_size=6))
    else:
        data = labeled_images.opened(labeled, **varied)
        model = reduce_tokens_(labeled_images.tiny(), labeled_images.SPEC).to("cuda").train()
        run = TrainingRun(model, labeled_images.section(token_labels=TokenLabelSection()))
    check_that_nothing_waits(run, data.training(6, 0, device="cuda"), nothing_waits)


def test_the_keep_rate_moves_and_a_run_is_evaluated_on_a_gpu():
    told = notices()
    model = reduce_tokens_(tiny(), SPEC).to("cuda")
    run = msgspec.structs.replace(RUN, batch_size=8, steps=9, keep_rate_epochs=3, evaluate_every=1, ema=None)
    assert len(fit(model, FixedBatch(), run)) == 9
    assert sum("top-1" in text for text in told) == 2
