"""The recipes of the paper's tables, and recipes that extend others."""

import pytest
import timm
import torch

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from tests.support.paths import RECIPES

PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
# Top-1 as the paper prints it, typed anew from its tables: recipe -> table, top-1.
PUBLISHED = {
    "deit-small-0.9": (2, 79.8), "deit-small-0.8": (2, 79.8), "deit-small-0.7": (2, 79.5), "deit-small-0.6": (2, 78.9),
    "deit-small-0.5": (2, 78.5), "deit-base-0.9": (3, 81.8), "deit-base-0.8": (3, 81.7), "deit-base-0.7": (3, 81.3),
    "deit-base-0.6": (3, 80.9), "deit-base-0.5": (3, 80.0), "lvvit-small-0.7": (3, 83.0), "lvvit-small-0.5": (3, 82.5),
    "deit-small-locations-4-6-9": (4, 79.57), "deit-small-locations-2-6-9": (4, 79.47),
    "deit-small-locations-3-7-9": (4, 79.64), "deit-small-locations-3-5-9": (4, 79.54),
    "deit-small-0.7-450-epochs": (5, 80.2), "deit-small-0.7-600-epochs": (5, 81.0),
    "deit-small-0.5-256px": (6, 79.3), "deit-small-0.5-288px": (6, 80.1), "deit-small-0.5-304px": (6, 81.0),
    "deit-small-0.6-256px": (6, 80.0), "deit-small-0.6-288px": (6, 81.0), "deit-small-0.7-272px": (6, 80.3),
    "lvvit-small-0.9-240px": (6, 83.6), "lvvit-small-0.8-256px": (6, 83.6), "lvvit-small-0.7-256px": (6, 83.5),
    "lvvit-small-0.7-272px": (6, 83.7), "lvvit-small-0.5-304px": (6, 83.4), "lvvit-small-0.7-448px": (6, 84.7),
    "deit-small-0.7-oracle-300": (7, 80.8), "deit-small-0.7-oracle-450": (7, 81.0),
    "deit-small-0.7-oracle-600": (7, 81.3), "deit-base-0.7-oracle-300": (7, 82.1),
}  # fmt: skip
# Of other methods' papers and repositories: recipe -> top-1, G multiply-adds (cut off after one decimal).
ELSEWHERE: dict[str, tuple[float, float | None]] = {
    "dynamicvit-deit-small-0.7": (79.32, 2.9), "tome-deit-small-r13": (79.36, None),
}  # fmt: skip
# Evo-ViT's: top-1, images a second on a V100, and G multiply-adds as they are counted here.
EVO_VIT = {
    "evo-vit-deit-tiny": (72.0, 4027, 0.818), "evo-vit-deit-small": (79.4, 1510, 3.033),
    "evo-vit-deit-base": (81.3, 462, 11.658),
}  # fmt: skip
WITHOUT_ROW = {"deit-tiny-0.7", "deit-small-0.7-distilled"}


def test_every_row_has_its_recipe_and_figure():
    assert {path.stem for path in PAPER} == PUBLISHED.keys() | ELSEWHERE.keys() | EVO_VIT.keys() | WITHOUT_ROW
    for name, (table, top1) in PUBLISHED.items():
        published = load_recipe(RECIPES / "paper" / f"{name}.yaml").published
        assert published is not None
        assert (published["table"], published["top1"]) == (table, top1)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_recipe_is_listed_and_its_model_can_be_reduced(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert f"[{path.stem}](paper/{path.name})" in (RECIPES / "README.md").read_text()
    assert (recipe.published is None) == (path.stem in WITHOUT_ROW)
    assert recipe.model.name is not None
    size = {"img_size": recipe.model.image_size} if recipe.model.image_size else {}
    with torch.device("meta"):
        model = timm.create_model(recipe.model.name, **size, **recipe.model.args)
    dense = token_plan(model).macs()
    reduced = token_plan(reduce_tokens_(model, recipe.tokens))
    assert len(reduced.locations) == (12 if reduced.merging else 2 if path.stem in EVO_VIT else 3)
    assert reduced.macs() < dense
    assert backbone_of(model).image_size(model) == (recipe.model.image_size or 224,) * 2


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_recipe_of_another_method_has_its_figures(name):
    recipe = load_recipe(RECIPES / "paper" / f"{name}.yaml")
    top1, gmacs = ELSEWHERE[name]
    assert recipe.published == {"top1": top1} | ({"gmacs": gmacs} if gmacs else {})
    assert recipe.model.name is not None
    with torch.device("meta"):
        model = timm.create_model(recipe.model.name)
        macs = token_plan(reduce_tokens_(model, recipe.tokens)).macs()
    assert gmacs is None or int(macs / 1e8) / 10 == gmacs


@pytest.mark.parametrize("name", EVO_VIT)
def test_evo_vit_s_recipes_are_the_released_training(name):
    recipe, (top1, speed, gmacs) = load_recipe(RECIPES / "paper" / f"{name}.yaml"), EVO_VIT[name]
    assert recipe.published == {"top1": top1, "v100_images_per_second": speed}
    run = recipe.finetune
    assert run.images_per_step(8) == (2048 if "tiny" in name else 1024)
    assert (run.epochs, run.layer_wise_epochs) == (300, 200)
    assert recipe.model.name is not None
    with torch.device("meta"):
        model = timm.create_model(recipe.model.name, **recipe.model.args)
    assert token_plan(reduce_tokens_(model, recipe.tokens)).macs() / 1e9 == pytest.approx(gmacs, abs=5e-4)


def test_rates_per_location_cost_the_same():
    costs = []
    for name in ("deit-small-0.7", *(name for name in PUBLISHED if "locations" in name)):
        with torch.device("meta"):
            model = timm.create_model("deit_small_patch16_224")
        tokens = load_recipe(RECIPES / "paper" / f"{name}.yaml").tokens
        costs.append(token_plan(reduce_tokens_(model, tokens)).macs() / 1e9)
    assert max(costs) / min(costs) < 1.01  # the paper prints 3.23 to 3.25 G


def test_the_learning_rate_of_the_official_run():
    run = load_recipe(RECIPES / "paper" / "deit-small-0.7.yaml").finetune
    assert run.images_per_step(8) == 2048
    assert run.effective_learning_rate(8) == pytest.approx(2e-3)
    assert (run.keep_rate_start, run.keep_rate_epochs) == (10, 100)


# ---- extends


def test_a_recipe_lays_its_keys_over_another_s(tmp_path):
    (tmp_path / "base.yaml").write_text((RECIPES / "digits.yaml").read_text())
    (tmp_path / "own.yaml").write_text("extends: base.yaml\nname: own\ntokens: {keep_rate: 0.5}\ndense: null\n")
    base, own = (load_recipe(tmp_path / f"{name}.yaml") for name in ("base", "own"))
    assert (own.name, own.tokens.keep_rate, own.dense) == ("own", 0.5, None)
    assert (own.tokens.locations, own.finetune, own.model) == (base.tokens.locations, base.finetune, base.model)
    again = load_recipe(tmp_path / "own.yaml", ["tokens.keep_rate=0.6"])
    assert again.tokens.keep_rate == 0.6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: own.yaml\n", "extend each other in a circle"),
        ("extends: absent.yaml\n", "absent.yaml: no such recipe"),
        ("extends: [a, b]\n", "extends is the path of a recipe"),
        ("extends: digits.yaml\nnames: x\n", "unknown key 'names'"),
    ],
)
def test_what_cannot_be_extended(text, words, tmp_path):
    (tmp_path / "digits.yaml").write_text((RECIPES / "digits.yaml").read_text())
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        load_recipe(tmp_path / "own.yaml")


def test_a_shipped_recipe_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("recipes/paper/deit-small-0.5.yaml").tokens.keep_rate == 0.5
