"""DynamicViT's loss against the official code and the oracle; what its runs train, and what they refuse."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from evit_deploy.errors import RecipeError
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.recipe.recipe import DataSection, ModelSection, TeacherSection
from evit_deploy.recipe.sections import DynamicViTSection, TokenLabelSection
from evit_deploy.tokens.methods import dynamicvit
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
from evit_deploy.training.dynamicvit import WithDecisions, ratio_loss, token_loss
from evit_deploy.training.loop import fit, train
from evit_deploy.training.schedules import backbone_rate_scale
from evit_deploy.training.setup import setup
from evit_deploy.training.step import TrainingRun, parameter_groups
from evit_deploy.training.tasks import FrozenTeacher, Teacher, make_task
from tests.support.dynamicvit_models import HEADS, OFFICIAL, as_oracle, reduced, released, with_noise
from tests.support.families import create, images
from tests.support.method_oracles import dynamicvit as oracle
from tests.support.method_oracles.evo_vit import cross_entropy
from tests.support.official import read_official
from tests.support.training import RUN, FixedBatch, recipe, section, tiny

TOKENS = TokenSpec(keep_rate=0.5, locations=(1, 2), method="dynamicvit")


def in_training(model: nn.Module) -> nn.Module:
    """In training mode, but for batch norms, which the references know in evaluation."""
    for module in model.modules():
        module.training = not isinstance(module, nn.BatchNorm2d)
    return model


def taught(model: Any, dense: nn.Module) -> Teacher:
    return Teacher(dense.eval().requires_grad_(False), None)


# ---- the loss


@pytest.mark.parametrize("name", [*OFFICIAL])
def test_loss_and_gradients_are_the_official_ones(name, monkeypatch):
    file = read_official(name)
    model = in_training(released(file, file.weights, OFFICIAL[name]))
    with_noise(monkeypatch, file.noise())
    task = make_task(model, section(), taught(model, released(file, file.teacher(), OFFICIAL[name])))
    targets = torch.zeros(2, 100)
    targets[0, [3, 7]], targets[1, [7, 3]] = torch.tensor([0.8, 0.2]), torch.tensor([0.6, 0.4])
    found = task(torch.from_numpy(file.images), targets)
    np.testing.assert_allclose(found["output"].detach().numpy(), file.arrays["train:logits"], atol=1e-4)
    np.testing.assert_allclose(found["loss"].item(), file.arrays["train:loss"], atol=1e-4)
    found["loss"].backward()
    prefix = "train:gradient:"
    names = [key.removeprefix(prefix) for key in file.arrays if key.startswith(prefix)]
    assert any(key.startswith("score_predictor") for key in names)
    for key in names:
        wanted, gradient = file.arrays[prefix + key], model.get_parameter(key).grad.numpy()
        assert np.abs(gradient - wanted).max() <= 1e-3 * np.abs(wanted).max(), key


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_by_the_oracle(name, monkeypatch):
    model, dense = reduced(name), create(name)
    with torch.no_grad():
        for parameter in dense.parameters():  # a teacher that says something else
            parameter.mul_(1.1)
    noise = np.random.default_rng(5).gumbel(size=(3, 3, 16, 2))
    pixels, labels = images(model), torch.tensor([1, 0, 2])
    trained = oracle.train(
        as_oracle(model, name), pixels.numpy(), [1, 2, 3], lambda s, i, scores: oracle.soft(scores, noise[s, i]) >= 0.5
    )
    teacher = oracle.teach(as_oracle(dense, name), pixels.numpy())
    lvvit = name != "deit"
    parts = [
        cross_entropy(trained.logits, np.eye(trained.logits.shape[1])[labels.numpy()]),
        oracle.ratio_loss(trained.masks, [0.6, 0.36, 0.216]),
        oracle.divergence(trained.logits, teacher[0]),
        (oracle.token_divergence if lvvit else oracle.token_loss)(trained.tokens, teacher[1], trained.masks[-1]),
    ]
    assert min(parts) > 1e-3
    in_training(model)
    for factors in ((2.0, 0.5, 0.5), (3.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
        with_noise(monkeypatch, noise)
        keys = ("ratio_weight", "logits_weight", "tokens_weight")
        how = section(dynamicvit=DynamicViTSection(**dict(zip(keys, factors, strict=True))))
        loss = make_task(model, how, taught(model, dense))(pixels, labels)["loss"].item()
        assert loss == pytest.approx(parts[0] + np.dot(factors, parts[1:]), rel=1e-4)
    with_noise(monkeypatch, noise)
    alone = make_task(model, section(), None)(pixels, labels)["loss"].item()
    assert alone == pytest.approx(parts[0] + 2 * parts[1], rel=1e-4)


@pytest.mark.parametrize("progress", [0.0, 1.0])
@pytest.mark.parametrize("name", ["deit", "lvvit"])
def test_every_parameter_has_a_gradient_also_without_a_teacher_or_a_location(name, progress):
    """Several processes wait for all of them."""
    model = in_training(reduced(name))
    set_keep_rate_(model, progress)
    make_task(model, section(), None)(images(model), torch.tensor([1, 0, 2]))["loss"].backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


def test_the_ratio_loss_by_hand():
    masks = [torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 1]])]
    first, second = (0.05**2 + 0.3**2) / 2, (0.24**2 + 0.01**2) / 2
    assert ratio_loss(masks, [0.7, 0.49]).item() == pytest.approx((first + second) / 2)
    assert ratio_loss([], [0.7, 0.49]) == 0.0


def test_the_token_loss_by_hand():
    student, teacher = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 2.0], [9.0, 9.0], [0.0, 1.0]]])
    kept = torch.tensor([[1.0, 0.0, 1.0]])
    assert token_loss(student, teacher, kept, by_class=False).item() == pytest.approx((2.5 + 0.5) / 2)
    assert token_loss(student, teacher, torch.zeros(1, 3), by_class=False).item() == 0.0
    truth = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    wanted = (truth * (np.log(truth) - np.log(0.5))).sum()
    one = token_loss(student, teacher, torch.tensor([[1.0, 0.0, 0.0]]), by_class=True).item()
    assert one == pytest.approx(wanted)


def test_a_teacher_is_asked_for_its_own_normalization():
    model, dense = reduced("deit").train(), create("deit")
    for which, mean in ((model, 0.5), (dense, 0.4)):
        which.pretrained_cfg = dict(which.pretrained_cfg) | {"mean": (mean,) * 3, "std": (0.5,) * 3}
    teacher = FrozenTeacher(dense, model)
    found = teacher.normalize_input(torch.zeros(1, 3, 2, 2), *(torch.full((1, 3, 1, 1), 0.5) for _ in range(2)))
    torch.testing.assert_close(found, torch.full((1, 3, 2, 2), 0.2))


def test_predictors_learn_the_rate():
    torch.manual_seed(0)
    model = reduce_tokens_(tiny(), TokenSpec(keep_rate=0.75, locations=(1, 2), method="dynamicvit"))
    data = FixedBatch()

    def shares() -> list[float]:
        model.train()
        with torch.no_grad():
            return [mask.mean().item() for mask in WithDecisions(model)(data.images.repeat(8, 1, 1, 1)).masks]

    assert shares() == pytest.approx([0.5, 0.25], abs=0.06)
    fit(model, data, section(steps=150, dynamicvit=DynamicViTSection(ratio_weight=20.0)))
    assert not model.training
    assert [row.keep for row in token_plan(model).locations] == [12, 9]
    assert shares() == pytest.approx([0.75, 0.5625], abs=0.06)


# ---- who is trained, and how fast


def test_groups_of_the_optimizer():
    model = reduce_tokens_(tiny(), TOKENS)
    groups = parameter_groups(model, section(weight_decay=0.05))
    names = {id(value): name for name, value in model.named_parameters()}
    found = {(group["own"], group["weight_decay"]): {names[id(value)] for value in group["params"]} for group in groups}
    assert found.keys() == {(own, decay) for own in (False, True) for decay in (0.0, 0.05)}
    assert all(name.startswith("score_predictor.") for name in found[True, 0.0] | found[True, 0.05])
    assert "score_predictor.1.out_conv.4.weight" in found[True, 0.05]
    assert "score_predictor.1.in_conv.0.weight" in found[True, 0.0]
    assert {"blocks.0.attn.qkv.weight", "head.weight"} <= found[False, 0.05]
    assert {"blocks.0.norm1.weight", "head.bias", "cls_token", "pos_embed"} <= found[False, 0.0]
    assert sum(map(len, found.values())) == len(names)
    plain = parameter_groups(tiny(), section())
    assert [group["own"] for group in plain] == [False, False]


def test_the_backbone_stands_still_and_then_moves_slowly():
    how = section(epochs=None, steps=8, backbone_frozen_epochs=1, backbone_lr_scale=0.01, frozen=("cls_token",))
    assert [backbone_rate_scale(how, step, 3) for step in range(5)] == [0.0, 0.0, 0.0, 0.01, 0.01]
    model = reduce_tokens_(tiny(), TOKENS).train()
    run = TrainingRun(model, how)
    batches = FixedBatch().training(8, 0)
    rates, weights = [], []
    for scale in (0.0, 0.01, 1.0):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        assert run.advance(batches, 1e-3, moving=False, backbone=scale).finite
        rates.append({group["own"]: group["lr"] for group in run.optimizer.param_groups})
    weights.append(model.state_dict())
    assert rates == [{True: 1e-3, False: 1e-3 * scale} for scale in (0.0, 0.01, 1.0)]
    moved = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in itertools.pairwise(weights)
    ]
    assert moved[0]
    assert all(name.startswith("score_predictor.") for name in moved[0])
    assert {"blocks.0.attn.qkv.weight", "pos_embed"} <= moved[1]
    assert "cls_token" not in moved[1] | moved[2]
    run.finish()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_evaluation_on_the_way_removes_tokens():
    model, seen = reduce_tokens_(tiny(), TOKENS), []
    model.norm.register_forward_pre_hook(lambda norm, inputs: seen.append((norm.training, inputs[0].shape[1])))
    fit(model, FixedBatch(), section(steps=4, evaluate_every=1))
    assert set(seen) == {(True, 17), (False, 5)}


def test_a_keep_rate_schedule_runs():
    model = reduce_tokens_(tiny(), TOKENS)
    losses = fit(model, FixedBatch(), section(steps=8, keep_rate_start=1, keep_rate_epochs=1))
    assert np.isfinite(losses).all()
    assert [row.keep for row in token_plan(model).locations] == [8, 4]


@pytest.mark.parametrize("settings", [{"autocast": "bf16"}, {"checkpoint_activations": True}])
def test_a_run_with_less_memory(settings):
    losses = fit(reduce_tokens_(tiny(), TOKENS), FixedBatch(), section(steps=4, **settings))
    assert np.isfinite(losses).all()


@pytest.mark.slow
def test_a_compiled_run_trains():
    tokens = TokenSpec(keep_rate=0.5, locations=(1,), method="dynamicvit")
    losses = fit(reduce_tokens_(tiny(depth=2), tokens), FixedBatch(), section(steps=2, compile=True))
    assert np.isfinite(losses).all()


# ---- runs


def test_a_run_leaves_a_checkpoint_that_knows_its_predictors(tmp_path, caplog):
    run = section(steps=6, batch_size=16, backbone_frozen_epochs=0.01, backbone_lr_scale=0.1, frozen=("pos_embed",))
    result = train(recipe(tokens=TOKENS, finetune=run), tmp_path, device="cpu")
    checkpoint = read_checkpoint(result.checkpoint)
    assert checkpoint.tokens == TOKENS
    assert {name.split(".")[1] for name in checkpoint.method_weights} == {"0", "1"}
    model = reduce_tokens_(build_model(checkpoint), TOKENS)
    for name, value in model.score_predictor.state_dict(prefix="score_predictor.").items():
        assert torch.equal(value, checkpoint.method_weights[name])
    dense = read_checkpoint(result.dense)
    assert dense.tokens is None
    assert not dense.method_weights
    assert torch.equal(dense.weights["pos_embed"], checkpoint.weights["pos_embed"])
    assert not torch.equal(dense.weights["head.weight"], checkpoint.weights["head.weight"])
    assert "learns from the labels alone" not in caplog.text


def test_from_first_weights_there_is_nothing_to_learn_from(tmp_path, caplog):
    model = ModelSection(
        name="deit_tiny_patch16_224", image_size=16, pretrained=False,
        args={"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2},
    )  # fmt: skip
    train(recipe(tokens=TOKENS, model=model, dense=None, finetune=section(steps=2)), tmp_path, device="cpu")
    assert "learns from the labels alone" in caplog.text


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path):
    """Draws come from PyTorch's generator, which a state holds."""
    run = section(steps=6, save_every=2, ema=0.9)
    data = FixedBatch()
    whole = reduce_tokens_(tiny(), TOKENS).train()
    one = TrainingRun(whole, run)
    torch.manual_seed(1)
    batches = data.training(8, 0)
    for _ in range(2):
        one.advance(batches, 1e-3, moving=False)
    state = one.state()
    for _ in range(2):
        one.advance(batches, 1e-3, moving=False)
    other = reduce_tokens_(tiny(), TOKENS).train()
    two = TrainingRun(other, run)
    two.load(state)
    for _ in range(2):
        two.advance(batches, 1e-3, moving=False)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


# ---- refusals


FOLDER = DataSection(name="digits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense": RUN, "finetune": section(dynamicvit=DynamicViTSection()), "tokens": TokenSpec(keep_rate=0.5)},
         "finetune.dynamicvit.*the loss of the method dynamicvit"),
        ({"dense": section(dynamicvit=DynamicViTSection())}, "dense.dynamicvit"),
        ({"teacher": TeacherSection(name="deit_tiny_patch16_224")}, "Leave the teacher out"),
        ({"teacher": TeacherSection(name="deit_tiny_patch16_224", kind="dense"), "tokens": TokenSpec(keep_rate=0.5)},
         "go together"),
        ({"finetune": section(model_mode="eval")}, "model_mode=train"),
        ({"finetune": section(token_labels=TokenLabelSection())}, "no part for token labels"),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**({"tokens": TOKENS} | changes))


def test_a_dense_teacher_has_its_factors_elsewhere():
    with pytest.raises(RecipeError, match=r"finetune\.dynamicvit has the factor"):
        TeacherSection(name="deit_tiny_patch16_224", kind="dense", weight=0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS, "finetune": section(frozen=("cls_tokn",))}, "Did you mean 'cls_token'"),
        (
            {"tokens": TokenSpec(keep_rate=0.5, locations=(1,)), "finetune": section(backbone_lr_scale=0.1)},
            "Leave both",
        ),
        ({"tokens": TOKENS, "dense": section(backbone_frozen_epochs=1)}, "dense.backbone"),
    ],
)
def test_parts_that_are_not_there(changes, message):
    with pytest.raises(RecipeError, match=message):
        setup(recipe(**changes))


def saved(path: Path, **changes: Any) -> str:
    from evit_deploy.data.preprocess import Preprocess
    from evit_deploy.models.checkpoint import Checkpoint, save_checkpoint

    args = {
        "img_size": 16,
        "num_classes": 4,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 2,
        "mlp_ratio": 2,
    }
    model = timm.create_model("deit_tiny_patch16_224", **(args | changes))
    known = Checkpoint(
        str(path), None, {}, "deit_tiny_patch16_224", args | changes, preprocess=Preprocess(size=(16, 16))
    )
    save_checkpoint(path, model, known)
    return str(path)


def test_weights_that_do_not_know_the_classes_teach_nothing(tmp_path):
    model = ModelSection(checkpoint=saved(tmp_path / "four.safetensors"))
    with pytest.raises(RecipeError, match="do not know the data's classes"):
        setup(recipe(tokens=TOKENS, model=model, dense=None))
    none = DynamicViTSection(logits_weight=0, tokens_weight=0)
    setup(recipe(tokens=TOKENS, model=model, dense=None, finetune=section(dynamicvit=none)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"embed_dim": 48}, "a different architecture"), ({"patch_size": 8}, "a different architecture"), ({}, None)],
)
def test_a_dense_teacher_has_the_student_s_form(tmp_path, changes, message):
    teacher = TeacherSection(checkpoint=saved(tmp_path / "t.safetensors", num_classes=10, **changes), kind="dense")
    asked = recipe(tokens=TOKENS, teacher=teacher, dense=None, finetune=section(steps=2), model=ModelSection(
        checkpoint=saved(tmp_path / "s.safetensors")))  # fmt: skip
    if message is None:
        assert train(asked, tmp_path / "out", device="cpu").checkpoint.exists()
        return
    with pytest.raises(RecipeError, match=message):
        train(asked, tmp_path / "out", device="cpu")


def test_noise_is_logistic():
    torch.manual_seed(0)
    noise = dynamicvit.logistic_noise(torch.zeros(100_000))
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.var().item() == pytest.approx(np.pi**2 / 3, rel=0.03)
