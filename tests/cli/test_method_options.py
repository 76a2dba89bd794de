"""``--method-option`` on the way through ``convert``, and heads that pool."""

import msgspec
import pytest

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.errors import InputError
from evit_deploy.models.checkpoint import Checkpoint, save_checkpoint
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.training.setup import setup
from tests.support.command_line import QUICK
from tests.support.models import SMALLEST, preprocess_for, seeded
from tests.support.openvino_model import NEEDS_OPENVINO

SQUEEZE = ("--method-option", "squeeze=true")
SIZED = ("--method-option", "normalize=true", "--method-option", "sized=true")


@pytest.fixture
def pooled(tmp_path):
    """A checkpoint whose head takes the mean over patches."""
    name, args = SMALLEST[0], {**SMALLEST[1], "global_pool": "avg"}
    model = seeded(name, **args)
    about = Checkpoint("", None, {}, name, args, preprocess=preprocess_for(model))
    save_checkpoint(tmp_path / "pooled.safetensors", model, about)
    return tmp_path / "pooled.safetensors"


@pytest.mark.parametrize(
    ("options", "label"),
    [
        pytest.param(SQUEEZE, "k0.6-squeeze", marks=NEEDS_OPENVINO),
        pytest.param(SIZED, "k0.6-normalize-sized", marks=NEEDS_OPENVINO),
    ],
)
def test_a_bundle_of_a_model_that_pools(cli, pooled, options, label):
    targets = ("--target", "onnx", "--target", "openvino", "--with-indices")
    result = cli("convert", pooled, "--keep-rate", "0.6", *options, *targets, *QUICK)
    assert result.code == 0, result.err
    bundle = read_bundle(pooled.with_name(f"pooled-evit-{label}"))
    assert set(bundle.manifest.tokens.options) == {option.split("=")[0] for option in options[1::2]}
    assert bool(bundle.manifest.plan.merging) is (options is SQUEEZE)
    assert cli("verify", bundle.path, *QUICK).code == 0


def test_without_them_the_way_is_named(cli, pooled):
    asked = ("convert", pooled, "--keep-rate", "0.6")
    cli(*asked).refused(2, "its head pools the patch tokens", "normalize=true and sized=true", "tome", "evo-vit")
    cli(*asked, *SQUEEZE, "--method-option", "normalize=true").refused(2, "squeeze has none")
    cli(*asked, *SIZED, "--no-fuse").refused(2, "no place for a patch that is dropped")
    cli(*asked, "--method-option", "squeeze").refused(2, "--method-option", "expected OPTION=VALUE")
    cli(*asked, "--method-option", "squeeze=ja").refused(2, "Expected `bool`")


def test_a_recipe_may_train_a_head_that_pools():
    pooled = ("model.args.global_pool=avg", "tokens.options.squeeze=true")
    recipe = load_recipe("digits", (*pooled, "compare.baselines=[]"))
    assert setup(recipe)[0].global_pool == "avg"
    with pytest.raises(InputError, match="the method 'random' neither keeps them all nor carries their sizes"):
        setup(load_recipe("digits", pooled))
    with pytest.raises(InputError, match="its head pools the patch tokens"):
        setup(msgspec.structs.replace(recipe, tokens=msgspec.structs.replace(recipe.tokens, options={})))
