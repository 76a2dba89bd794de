"""Evo-ViT's training: both heads' losses and their gradients, and the schedule from layers to stages."""

import msgspec
import numpy as np
import pytest
import timm
import torch
from torch import nn

from evit_deploy.errors import RecipeError
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, save_checkpoint
from evit_deploy.models.levit import EvoLeViT
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.recipe.sections import TrainSection
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.training import loop
from evit_deploy.training.evo_vit import EvoViTTask, has_two_heads
from evit_deploy.training.loop import fit
from evit_deploy.training.tasks import make_task
from tests.support import levit_oracle
from tests.support.method_oracles import evo_vit
from tests.support.method_oracles.vit import Model
from tests.support.models import TINY, images, preprocess_for, seeded
from tests.support.official import read_official
from tests.support.training import FixedBatch, tiny

SECTION = TrainSection(steps=8, batch_size=4, learning_rate=1e-3, layer_wise_epochs=1.5)
TARGETS = torch.zeros(3, 10)
TARGETS[range(3), [3, 7, 1]], TARGETS[range(3), [5, 2, 8]] = 0.8, 0.2


def model_of(representative: bool, **more):
    model = seeded("vit_tiny_patch16_224", **(TINY | {"depth": 6, "global_pool": "avg"} | more)).train()
    spec = TokenSpec(0.5, method="evo-vit", options={"representative": representative})
    return reduce_tokens_(model, spec)


@pytest.mark.parametrize("representative", [False, True])
@pytest.mark.parametrize("layer_wise", [False, True])
def test_loss_and_gradients_are_the_oracle_s(layer_wise, representative):
    model = model_of(representative).double()
    task = make_task(model, SECTION, None)
    assert isinstance(task, EvoViTTask)
    reduce_tokens_(model, TokenSpec(0.5, method="evo-vit",
                                    options={"representative": representative, "layer_wise": layer_wise}))  # fmt: skip
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name in ("norm_cls", "head_cls"):
            for parameter in getattr(model, name).parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    pictures = images(model, 3)
    make = evo_vit.layer_wise if layer_wise else evo_vit.stage_wise
    where = {"first": 2} if layer_wise else {"sorts": (2, 4)}
    schedule = make(6, keep=0.5, representative=representative, **where)

    def wanted(weights) -> tuple[float, np.ndarray]:
        result = evo_vit.forward(Model(weights, TINY["num_heads"], "mean"), pictures, schedule)
        return evo_vit.loss(result, TARGETS.numpy()), result.logits

    weights = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    done = task(torch.from_numpy(pictures).double(), TARGETS.double())
    loss, logits = wanted(weights)
    assert done["loss"].item() == pytest.approx(loss, abs=1e-9)
    np.testing.assert_allclose(done["output"].detach().numpy(), logits, rtol=0, atol=1e-9)
    done["loss"].backward()
    names = ("head.weight", "head_cls.weight", "norm_cls.bias", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc1.weight",
             "blocks.5.attn.qkv.weight", "cls_token")  # fmt: skip
    gradients = {name: dict(model.named_parameters())[name].grad.numpy() for name in names}
    step = 1e-6
    moved = [
        wanted(weights | {name: weights[name] + by * grad / np.linalg.norm(grad) for name, grad in gradients.items()})
        for by in (-step, step)
    ]
    slope = sum(float(np.linalg.norm(gradient)) for gradient in gradients.values())
    assert (moved[1][0] - moved[0][0]) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_both_heads_of_a_released_model_learn_as_in_the_official_code(tmp_path):
    file = read_official("evo_deit_tiny")
    path = tmp_path / "evo.pth"
    torch.save({"model": {name: torch.from_numpy(value) for name, value in file.weights.items()}}, path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.tokens is not None
    model = reduce_tokens_(build_model(checkpoint), checkpoint.tokens).train()
    targets = torch.zeros(2, 100)
    targets[0, [3, 7]], targets[1, [7, 3]] = torch.tensor([0.8, 0.2]), torch.tensor([0.6, 0.4])
    done = make_task(model, SECTION, None)(torch.from_numpy(file.images), targets)
    assert done["loss"].item() == pytest.approx(float(file.arrays["stage:train:loss"]), abs=1e-4)
    done["loss"].backward()
    known = {"head_cls.weight", "norm_cls.weight", "head.weight"}
    found = dict(model.named_parameters())
    prefix = "stage:train:gradient:"
    for name in known & {key.removeprefix(prefix) for key in file.arrays if key.startswith(prefix)}:
        np.testing.assert_allclose(found[name].grad.numpy(), file.arrays[prefix + name], rtol=1e-3, atol=1e-5)


def test_a_class_token_s_model_learns_by_its_own_head():
    model = model_of(False, global_pool="token")
    assert not has_two_heads(model)
    task = make_task(model, SECTION, None)
    assert not isinstance(task, EvoViTTask)
    assert not hasattr(model, "head_cls")


def test_layers_sort_first_and_stages_from_the_given_epoch_on():
    model, seen = tiny(depth=6, global_pool="avg"), []
    reduce_tokens_(model, TokenSpec(0.5, method="evo-vit"))
    hook = model.blocks[0].register_forward_pre_hook(
        lambda *_: seen.append([row.block for row in token_plan(model).locations])
    )
    fit(model, FixedBatch(), SECTION)  # 3 steps an epoch
    hook.remove()
    assert seen == [[2, 3, 4, 5]] * 5 + [[2, 4]] * 3
    assert [row.block for row in token_plan(model).locations] == [2, 4]
    assert model.head_cls.weight.shape == (4, 24)


def test_a_run_that_goes_on_is_where_it_was():
    """Whatever was set before: what a step wants hangs on the step alone."""
    model = reduce_tokens_(tiny(depth=6, global_pool="avg"), TokenSpec(0.5, method="evo-vit"))
    settings, plan, moving = loop._set_tokens_(model, SECTION, 4, 3, None)
    assert [row.block for row in plan.locations] == [2, 3, 4, 5]
    assert not moving
    _, plan, _ = loop._set_tokens_(model, SECTION, 5, 3, settings)
    assert [row.block for row in plan.locations] == [2, 4]


@pytest.mark.slow
def test_two_programs_are_compiled():
    import torch._dynamo.testing

    model = reduce_tokens_(tiny(depth=6, global_pool="avg"), TokenSpec(0.5, method="evo-vit"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(model, FixedBatch(), msgspec.structs.replace(SECTION, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_second_head_is_saved_and_comes_back_but_for_other_classes(tmp_path):
    model = model_of(False)
    make_task(model, SECTION, None)
    args = TINY | {"depth": 6, "global_pool": "avg"}
    about = Checkpoint("", None, {}, "vit_tiny_patch16_224", args, TokenSpec(0.5, method="evo-vit"),
                       preprocess_for(model))  # fmt: skip
    save_checkpoint(tmp_path / "m.safetensors", model, about)
    read = read_checkpoint(tmp_path / "m.safetensors")
    assert read.tokens is not None
    again = reduce_tokens_(build_model(read), read.tokens)
    assert torch.equal(again.head_cls.weight, model.head_cls.weight)
    assert torch.equal(again.norm_cls.weight, model.norm_cls.weight)
    other = build_model(read)
    other.reset_classifier(7)
    reduce_tokens_(other, read.tokens)
    assert other.head_cls.weight.shape == (7, TINY["embed_dim"])
    reduce_tokens_(other, TokenSpec(keep_rate=1.0))
    assert not any(isinstance(module, nn.Linear) and name == "head_cls" for name, module in other.named_modules())


@pytest.mark.parametrize(
    ("tokens", "run", "words"),
    [
        ({"keep_rate": 0.5}, {"layer_wise_epochs": 1}, "only the method evo-vit sorts patches"),
        ({"method": "evo-vit"}, {"token_labels": {}}, "evo-vit reorders patches"),
    ],
)
def test_what_a_recipe_cannot_ask_for(tokens, run, words):
    finetune = {"steps": 1, "learning_rate": 1e-3} | run
    recipe = {"name": "x", "model": {"name": "lvvit_s"}, "data": {"name": "digits"}, "tokens": tokens,
              "finetune": finetune}  # fmt: skip
    with pytest.raises((RecipeError, msgspec.ValidationError), match=words):
        msgspec.convert(recipe, Recipe)


def evo_levit():
    model = timm.create_model("evo_levit_128s", **(levit_oracle.TINY_ARGS | {"num_classes": 4})).train()
    return reduce_tokens_(model, TokenSpec(method="evo-vit", keep_rate=0.5))


def test_all_heads_of_an_evo_levit_learn():
    model = evo_levit()
    task = make_task(model, SECTION, None)
    pictures, targets = torch.randn(4, 3, 112, 112), torch.tensor([0, 1, 2, 3])
    done = task(pictures, targets)
    model.eval()
    said = {name: nn.functional.cross_entropy(logits, targets) for name, logits in evo_levit_heads(model, pictures)}
    model.train()
    assert said.keys() == {"head", "head_dist", "head_cls", "head_cls_dist"}
    assert done["loss"].isfinite()
    done["loss"].backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("learn_tradeoff"):  # the first block's own sets the average, and has none to mix with
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    assert all(getattr(model, name).l.weight.grad.abs().sum() > 0 for name in said)
    # in evaluation mode batch norms give the same numbers twice, so that the loss can be added up by hand
    model.eval()
    wanted = ((said["head"] + said["head_dist"]) / 2 + (said["head_cls"] + said["head_cls_dist"]) / 2) / 2
    assert make_task(model, SECTION, None)(pictures, targets)["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def evo_levit_heads(model, pictures):
    with torch.no_grad():
        return model.head_logits(model.forward_features(pictures)).items()


def test_an_evo_levit_learns_its_alpha_from_when_on_stages_sort(monkeypatch):
    seen = []
    learn = EvoLeViT.learn_alpha_
    monkeypatch.setattr(EvoLeViT, "learn_alpha_", lambda model, on: (seen.append(on), learn(model, on))[1])
    model = evo_levit()

    class Data(FixedBatch):
        def __init__(self):
            super().__init__()
            self.images = torch.randn(8, 3, 112, 112, generator=torch.Generator().manual_seed(0))

    section = TrainSection(steps=4, batch_size=8, learning_rate=1e-3, layer_wise_epochs=2 / 3)  # an epoch is 3 steps
    losses = fit(model, Data(), section)
    assert len(losses) == 4
    assert seen[:4] == [False, False, True, True]
