"""Training: what it changes, what it writes, and when it stops."""

import json
import math
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.training.training_data import open_data
from evit_deploy.errors import InputError, RecipeError, StageError
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, save_checkpoint
from evit_deploy.models.create import create_model
from evit_deploy.recipe.recipe import CompareSection, Recipe
from evit_deploy.recipe.sections import DataSection, ModelSection, TrainSection
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
from evit_deploy.training.compare import compare, evaluate
from evit_deploy.training.loop import Stage, fit, train
from evit_deploy.training.schedules import learning_rate
from evit_deploy.training.setup import scaled_init_, setup
from evit_deploy.training.step import TrainingRun
from tests.support.logs import notices
from tests.support.training import SPEC, TINY, FixedBatch, section, tiny


def recipe(**changes):
    run = TrainSection(steps=3, batch_size=16, learning_rate=1e-3, keep_rate_epochs=0.1)
    base = {
        "name": "tiny",
        "model": ModelSection(name="deit_tiny_patch16_224", image_size=16, args=TINY, init="scaled"),
        "data": DataSection(name="digits", evaluation_batch_size=360),
        "dense": run,
        "tokens": SPEC,
        "finetune": run,
        "compare": CompareSection(keep_rates=(0.9,)),
    }
    return Recipe(**(base | changes))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("autocast", ["none", "bf16"])
def test_fit_learns_a_fixed_batch_and_leaves_keys_and_plan_as_asked(mode, autocast):
    model = reduce_tokens_(tiny(), SPEC)
    keys, wanted = list(model.state_dict()), token_plan(model)
    run = section(steps=40, clip=1.0, keep_rate_epochs=40 / 3, model_mode=mode, autocast=autocast)
    losses = fit(model, FixedBatch(), run)
    assert len(losses) == 40
    assert losses[-1] < 0.5 * losses[0]
    assert list(model.state_dict()) == keys
    assert token_plan(model) == wanted
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert evaluate(model, FixedBatch(), 3).top1 == 1.0


def test_keep_rate_moves_from_one_to_the_target():
    model = reduce_tokens_(tiny(), SPEC)
    seen = []
    model.patch_embed.register_forward_hook(lambda *_: seen.append(token_plan(model).blocks[-1].tokens_out))
    fit(model, FixedBatch(), section(steps=10, keep_rate_epochs=5 / 3))
    reduced = token_plan(model).blocks[-1].tokens_out
    assert seen[0] == 17  # class token and 16 patches: nothing is dropped yet
    assert sorted(seen, reverse=True) == seen
    assert 17 > seen[3] > reduced
    assert seen[5:] == [reduced] * 5


def test_schedule_fits_locations_that_end_up_dropping_nothing():
    # 20 candidates reach block 2 in the end, of which 0.955 is all; on the way there are more, of which it is not
    spec = TokenSpec(keep_rate=(0.3, 0.955, 0.7), locations=(1, 2, 3), fuse=False)
    model = reduce_tokens_(tiny(img_size=32, depth=4), spec)
    wanted = token_plan(model)
    for step in range(21):
        set_keep_rate_(model, step / 20)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4)  # every block checks its tokens against the plan
    assert token_plan(model) == wanted


def test_keep_rate_is_at_its_target_at_once_without_a_schedule():
    model = reduce_tokens_(tiny(), SPEC)
    set_keep_rate_(model, 0.0)
    seen = []
    model.patch_embed.register_forward_hook(lambda *_: seen.append(token_plan(model).blocks[-1].tokens_out))
    fit(model, FixedBatch(), section(steps=2))
    assert seen == [token_plan(model).blocks[-1].tokens_out] * 2
    assert seen[0] < 17


def test_learning_rate_rises_then_falls():
    run = section(steps=100, learning_rate=1.0, learning_rate_batch=16, warmup=0.1, min_learning_rate=0.1)
    rates = [learning_rate(run, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[10] == 0.5  # 8 of 16 images
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.3)
    assert 0.1 < rates[99] < 0.101


def test_epochs_become_steps_and_the_effective_rate_is_told():
    told = notices()
    run = section(steps=None, epochs=1.5, learning_rate=2e-5, learning_rate_batch=512)
    assert len(fit(tiny(), FixedBatch(), run)) == 4  # 1.5 × 3 steps, rounded to even
    assert "4 steps" in told[0]
    assert "3.125e-07 = 2e-05 × 8 / 512" in told[0]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_model_mode_decides_dropout(mode):
    model = tiny()
    seen = set()
    model.patch_embed.register_forward_hook(lambda *_: seen.add(model.training))
    fit(model, FixedBatch(), section(model_mode=mode))
    assert seen == {mode == "train"}


def test_label_smoothing_is_part_of_the_loss():
    model, data = tiny(), FixedBatch()
    with torch.no_grad():
        logs = model(data.images).log_softmax(1)
    right = -logs[range(8), data.labels].mean().item()
    spread = -logs.mean().item()
    assert right != pytest.approx(spread, rel=1e-3)
    (loss,) = fit(model, data, section(steps=1, label_smoothing=0.4))
    assert loss == pytest.approx(0.6 * right + 0.4 * spread, rel=1e-5)


def test_clip_shortens_the_gradient():
    norms = []
    for clip in (None, 0.01):
        model = tiny()
        fit(model, FixedBatch(), section(steps=1, clip=clip))
        norms.append(torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item())
    assert norms[0] > 0.02
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_decay_spares_biases_norms_positions_and_prefix_tokens():
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, embed_dim=24, num_heads=2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = TrainingRun(model, section(weight_decay=0.05)).optimizer.param_groups
    free, decayed = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decayed | free == set(names.values())
    assert {"cls_token", "dist_token", "pos_embed", "norm.weight", "head.bias", "blocks.0.norm1.weight"} <= free
    weights = {"patch_embed.proj", "head", "head_dist"} | {
        f"blocks.0.{layer}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert decayed == {f"{layer}.weight" for layer in weights}
    assert [group["weight_decay"] for group in groups] == [0.0, 0.05]


def test_scaled_init_makes_the_ends_of_branches_smaller():
    model = tiny()
    scaled_init_(model)
    block = backbone_of(model).blocks(model)[0]
    bound = math.sqrt(6 / (24 + 24)) / math.sqrt(6)  # Xavier's bound over √(2 · 3 blocks)
    assert bound * 0.9 < block.attn.proj.weight.abs().max() <= bound
    assert block.attn.qkv.weight.abs().max() > bound
    assert model.pos_embed.std().item() == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("step", [0, 3])
def test_a_loss_that_is_not_finite_stops_and_names_step_and_rate(step):
    model = reduce_tokens_(tiny(), SPEC)
    wanted = token_plan(model)
    told = notices()
    with pytest.raises(StageError, match="finetune, step 1: the loss is no longer finite") as error:
        fit(model, FixedBatch(poison=step), section(keep_rate_epochs=8 / 3), stage=Stage("finetune"))
    assert told[-1] == f"finetune: step {step + 1} was not finite; went back to step 1, once"
    assert "learning rate 0.00" in str(error.value)
    assert token_plan(model) == wanted
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops():
    model = tiny()
    model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(StageError, match="a gradient is no longer finite"):
        fit(model, FixedBatch(), section())


def test_evaluate_counts_and_leaves_the_mode():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([0.0, 6, 5, 4, 3, 2, 1]))

        def forward(self, x):
            return self.bias.expand(len(x), -1)

    class Labels(FixedBatch):
        def validation(self, batch_size, *, rank=0, world=1):
            yield torch.zeros(7, 3, 16, 16), torch.tensor([1, 1, 2, 3, 5, 6, 0])

    model = Constant().train()
    found = evaluate(model, Labels())
    assert (found.top1, found.top5, found.count) == (2 / 7, 5 / 7, 7)
    assert model.training


def test_compare_has_every_row_and_leaves_the_dense_model_dense():
    dense, evit = tiny(), reduce_tokens_(tiny(), SPEC)
    rows = compare(dense, evit, FixedBatch(), CompareSection(keep_rates=(0.7, 0.5), baselines=("inverse",)))
    assert [row.name for row in rows] == [
        "dense",
        "evit 0.5, not fine-tuned",
        "inverse 0.5, not fine-tuned",
        "evit 0.7, not fine-tuned",
        "inverse 0.7, not fine-tuned",
        "evit 0.5, fine-tuned",
    ]
    assert rows[0].gmacs > rows[3].gmacs > rows[1].gmacs == rows[2].gmacs == rows[5].gmacs
    assert rows[1].top1 == rows[5].top1  # the same weights here
    assert all(row.low <= row.top1 <= row.high and row.count == 8 for row in rows)
    assert token_plan(dense).locations == ()


def test_train_writes_checkpoints_that_read_back(tmp_path):
    told = notices()
    result = train(recipe(), tmp_path / "new" / "run", device="cpu")
    written = sorted(path.name for path in (tmp_path / "new" / "run").iterdir() if path.is_file())
    assert written == ["dense.csv", "dense.safetensors", "evit.safetensors", "finetune.csv"]
    with safe_open(result.checkpoint, "pt") as file:
        own = json.loads(file.metadata()["evit_deploy"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    assert own["model"] == "deit_tiny_patch16_224"
    assert own["tokens"]["keep_rate"] == 0.5
    assert own["labels"] == list("0123456789")
    checkpoint = read_checkpoint(result.checkpoint)
    model = build_model(checkpoint)
    assert checkpoint.tokens == SPEC
    assert checkpoint.preprocess.size == (16, 16)
    assert checkpoint.preprocess.mean == (0.5, 0.5, 0.5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert token_plan(reduce_tokens_(model, checkpoint.tokens)) == result.plan
    assert read_checkpoint(result.dense).tokens is None
    assert len(result.report.accuracy) == 8
    assert set(result.cpu_seconds) == {"dense", "finetune", "compare"}
    assert [text.split(":")[0] for text in told] == ["dense", "finetune"]


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    quick = {"compare": CompareSection(untrained=False, baselines=())}
    files = []
    for run, seed in enumerate((3, 3, 4)):
        torch.manual_seed(run)  # what came before must not matter
        files.append(train(recipe(seed=seed, **quick), tmp_path / str(run), device="cpu").checkpoint.read_bytes())
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_training_goes_on_from_a_checkpoint_with_other_arguments(tmp_path):
    first = train(recipe(), tmp_path / "first", device="cpu")
    told = notices()
    model = ModelSection(checkpoint=str(first.checkpoint), args={"drop_path_rate": 0.1})
    again = recipe(model=model, dense=None, tokens=TokenSpec(keep_rate=0.7, locations=(1,)))
    second = train(again, tmp_path / "second", device="cpu")
    assert any("replaces the checkpoint's own" in text for text in told)
    started, ended = read_checkpoint(second.dense).weights, read_checkpoint(first.checkpoint).weights
    assert all(torch.equal(started[name], ended[name]) for name in ended)
    assert read_checkpoint(second.checkpoint).tokens == again.tokens


def test_other_classes_get_a_new_classifier(tmp_path):
    args = TINY | {"num_classes": 4, "img_size": 16}
    source = tmp_path / "four.safetensors"
    save_checkpoint(
        source, tiny(), Checkpoint("", None, {}, "deit_tiny_patch16_224", args, preprocess=Preprocess(size=(16, 16)))
    )
    told = notices()
    model, checkpoint, _ = setup(recipe(model=ModelSection(checkpoint=str(source)), dense=None))
    assert any("a new classifier is trained" in text for text in told)
    assert model.head.out_features == checkpoint.model_args["num_classes"] == 10


def test_a_classifier_takes_the_place_of_a_projection(tmp_path):
    """As after training a CLIP tower: what is saved is a classifier's, and answers logits."""
    args = TINY | {"num_classes": 0, "projection": 24, "img_size": 16}
    source = tmp_path / "tower.safetensors"
    about = Checkpoint("", None, {}, "deit_tiny_patch16_224", args, preprocess=Preprocess(size=(16, 16)))
    save_checkpoint(source, create_model("deit_tiny_patch16_224", args), about)
    assert read_checkpoint(source).output == "embedding"
    model, checkpoint, _ = setup(recipe(model=ModelSection(checkpoint=str(source)), dense=None))
    assert (model.head.out_features, checkpoint.output) == (10, "logits")
    save_checkpoint(tmp_path / "trained.safetensors", model, checkpoint)
    trained = build_model(read_checkpoint(tmp_path / "trained.safetensors"))
    assert torch.equal(trained.head.weight, model.head.weight)  # type: ignore[union-attr]


def test_a_run_that_breaks_off_leaves_no_result_behind(tmp_path, monkeypatch):
    train(recipe(), tmp_path, device="cpu")
    before = (tmp_path / "dense.safetensors").read_bytes()

    def poisoned(*arguments):
        data = open_data(*arguments)
        batches = data.training
        data.training = lambda size, seed, **how: (
            (x * (math.nan if seed else 1), y) for x, y in batches(size, seed, **how)
        )
        return data

    # Fine-tuning has seed 1, dense training seed 0.
    monkeypatch.setattr(sys.modules["evit_deploy.training.setup"], "open_data", poisoned)
    with pytest.raises(StageError, match="finetune, step 1: the loss is no longer finite"):
        train(recipe(), tmp_path, device="cpu")
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert left == ["dense.csv", "dense.safetensors", "dense.state", "finetune.csv"]
    assert (tmp_path / "dense.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model": ModelSection()}, r"no model given.*--set model\.checkpoint"),
        ({"model": ModelSection(name="deit_tiny_patch16_24")}, "deit_tiny_patch16_224"),
        (
            {"model": ModelSection(name="deit_tiny_patch16_224", image_size=16, args={"dephts": 3})},
            "cannot build.*dephts",
        ),
        ({"model": ModelSection(checkpoint="none.pth")}, "none.pth"),
        ({"model": ModelSection(checkpoint="x.pth", init="scaled"), "dense": None}, "init has no effect"),
        ({"tokens": TokenSpec(keep_rate=0.5, locations=(3,))}, "outside the model"),
        ({"tokens": TokenSpec(keep_rate=0.5, method="evitt")}, "Did you mean 'evit'"),
        ({"compare": CompareSection(baselines=("inverze",))}, "Did you mean 'inverse'"),
        ({"finetune": TrainSection(steps=1, learning_rate=1, batch_size=2000)}, "larger than the training set"),
    ],
)
def test_what_cannot_work_is_refused_before_training(changes, word, tmp_path):
    with pytest.raises(InputError, match=word):
        train(recipe(**changes), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="this is a file"):
        train(recipe(), tmp_path / "file")


def test_recipe_error_is_an_input_error():
    assert issubclass(RecipeError, InputError)
