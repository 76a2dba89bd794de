"""The published figures: which tables there are, that rows are the paper's models, and that recipes agree with them."""

import msgspec
import pytest

from evit_deploy.errors import InputError
from evit_deploy.paper.published import paper, published_table
from evit_deploy.recipe.recipe import load_recipe
from evit_deploy.recipe.shipped import names

NUMBERS = ["1", "2a", "2b", "3a", "3b", "4", "5", "6a", "6b", "7"]


def test_the_tables():
    assert list(paper().tables) == NUMBERS
    assert "2202.07800" in paper().source
    for table in paper().tables.values():
        found = [row.name for row in table.rows]
        assert len(found) == len(set(found)) >= 3
        assert all(row.published.top1 for row in table.rows)


@pytest.mark.parametrize(
    ("number", "hints"),
    [("2", "Did you mean 2a or 2b"), ("8", "expected 1, 2a"), ("", "expected 1, 2a"), ("2c", "Did you mean '2")],
)
def test_other_tables_are_refused_with_those_that_there_are(number, hints):
    with pytest.raises(InputError, match=r"no such table of the EViT paper") as caught:
        published_table(number)
    assert hints in str(caught.value)
    assert "6b, 7" in str(caught.value)


@pytest.mark.parametrize("number", NUMBERS)
def test_rows_are_what_the_recipes_train(number):
    for row in published_table(number).rows:
        if row.recipe is None:
            continue
        assert row.recipe in names()
        recipe = load_recipe(row.recipe)
        assert recipe.model.name == row.model
        published = recipe.published or {}
        for key in ("top1", "top5"):  # table 4 has a digit more of the row that it shares with table 2
            assert published[key] == pytest.approx(getattr(row.published, key), abs=0.05)
        assert (recipe.model.image_size or 224) == (row.image_size or 224)
        mine, asked = recipe.tokens.rates, row.tokens.rates
        assert (mine * 3 if len(mine) == 1 else mine) == (asked * 3 if len(asked) == 1 else asked)
        assert (recipe.tokens.locations or (3, 6, 9)) == (row.locations or (3, 6, 9))
        assert row.fuse == recipe.tokens.fuse


def test_a_figure_that_the_paper_does_not_have_is_refused():
    document = msgspec.to_builtins(paper())
    document["tables"]["1"]["rows"][0]["published"]["top2"] = 1.0
    with pytest.raises(msgspec.ValidationError, match="top2"):
        msgspec.convert(document, type(paper()))
