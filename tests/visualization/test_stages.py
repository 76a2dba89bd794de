"""What became of each patch, followed by hand through the choices that a model makes."""

import itertools

import numpy as np
import pytest
import torch

from evit_deploy.registry import METHODS
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from evit_deploy.visualization.stages import stages_of
from tests.support.models import images, seeded

SPECS = {
    "evit": TokenSpec(0.6),
    "evit, nothing fused": TokenSpec(0.6, fuse=False),
    "evit, squeezed": TokenSpec(0.6, options={"squeeze": True}),
    "merge": TokenSpec(0.6, method="merge", fuse=False),
    "tome": TokenSpec(method="tome", options={"merge": 5}),
    "dynamicvit": TokenSpec(0.6, method="dynamicvit", fuse=False),
    "evo-vit": TokenSpec(0.5, method="evo-vit", fuse=False),
    "random": TokenSpec(0.6, method="random"),
}
GRID, PATCHES = (6, 6), 36


def followed(choice_rows, plan):
    """For every location the patches in each token behind the prefix, then how many of these were kept."""
    tokens = [{patch} for patch in range(PATCHES)]
    for numbers, row in zip(choice_rows, plan.locations, strict=True):
        numbers = numbers.tolist()
        if row.choice == "merge":
            moving = len(tokens) - row.keep
            stay, move = numbers[: row.keep], numbers[row.keep : row.keep + moving]
            after = [set(tokens[number]) for number in stay]
            for number, place in zip(move, numbers[row.keep + moving :], strict=True):
                after[place] |= tokens[number]
            tokens, kept = after, len(after)
        elif row.aside:
            tokens, kept = [tokens[number] for number in numbers], row.keep
        else:
            rest = [token for number, token in enumerate(tokens) if number not in numbers]
            tokens, kept = [tokens[number] for number in numbers], len(numbers)
            if row.fused:
                tokens.append(set().union(*rest))
        yield row, [set(token) for token in tokens], kept


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_patch_is_where_its_token_is(spec):
    model = reduce_tokens_(seeded(), spec)
    plan, method, inputs = token_plan(model), METHODS.get(spec.method), images(model, 3)
    with capture(model) as seen:
        model(torch.from_numpy(inputs))
    choices = [choice.numpy() for choice in seen.kept]
    found = stages_of(choices, plan, GRID, method)
    assert len(found) == 3
    for image, stages in enumerate(found):
        assert len(stages) == len(plan.locations)
        for stage, (row, tokens, count) in zip(stages, followed([c[image] for c in choices], plan), strict=True):
            assert stage.block == row.block
            own = {patch for token in tokens[:count] if len(token) == 1 or row.choice == "merge" for patch in token}
            assert set(np.flatnonzero(stage.kept).tolist()) == own
            for patch in range(PATCHES):
                holding = [token for token in tokens if patch in token]
                assert stage.groups[patch] == (min(holding[0]) if holding else -1)
            several = sorted(sorted(token) for token in tokens if len(token) > 1)
            assert stage.tokens() == several
            assert stage.count == (len(tokens) if row.choice == "merge" else len(own))
            assert stage.patches == PATCHES
            assert stage.scores is None


@pytest.mark.parametrize("spec", [SPECS["evit"], SPECS["evit, nothing fused"], SPECS["dynamicvit"], SPECS["evo-vit"]])
def test_the_kept_patches_have_the_highest_scores(spec):
    model = reduce_tokens_(seeded(), spec)
    with capture(model) as seen:
        model(torch.from_numpy(images(model, 3)))
    choices, scores = ([one.numpy() for one in part] for part in (seen.kept, seen.scores))
    plan = token_plan(model)
    before = [np.ones(PATCHES, bool)] * 3
    for number, row in enumerate(plan.locations):
        for image, stages in enumerate(stages_of(choices, plan, GRID, METHODS.get(spec.method), scores)):
            stage = stages[number]
            known = ~np.isnan(stage.scores)
            np.testing.assert_array_equal(known, before[image])  # those that were left, one by one
            assert stage.scores[stage.kept].min() >= stage.scores[known & ~stage.kept].max()
            if not row.aside:
                before[image] = stage.kept


def test_the_scores_of_tome_are_of_the_tokens_that_choose():
    model = reduce_tokens_(seeded(), SPECS["tome"])
    with capture(model) as seen:
        model(torch.from_numpy(images(model, 2)))
    choices, scores = ([one.numpy() for one in part] for part in (seen.kept, seen.scores))
    stages = stages_of(choices, token_plan(model), GRID, METHODS.get("tome"), scores)[0]
    # One token in front: candidates 1, 3, 5, … are at even places, and look for a partner.
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(stages[0].scores)), np.arange(1, PATCHES, 2))
    np.testing.assert_allclose(stages[0].scores[1::2], 1 - scores[0][0].max(axis=1), rtol=1e-6)
    moved = choices[0][0][31:36]
    assert np.nanmax(stages[0].scores[moved]) <= np.nanmin(np.delete(stages[0].scores, moved))


def test_the_scores_of_merge_are_what_it_ranks_by():
    model = reduce_tokens_(seeded(), SPECS["merge"])
    with capture(model) as seen:
        model(torch.from_numpy(images(model, 2)))
    choices = [choice.numpy() for choice in seen.kept]
    scores = [tuple(part.numpy() for part in one) for one in seen.scores]
    for image, stages in enumerate(stages_of(choices, token_plan(model), GRID, METHODS.get("merge"), scores)):
        keep = stages[0].count
        staying = choices[0][image][:keep]
        assert stages[0].scores[staying].min() >= np.delete(stages[0].scores, staying).max() - 1e-6
        for stage, following in itertools.pairwise(stages):  # patches of one token share its score
            for token in stage.tokens():
                assert len(set(following.scores[token].tolist())) == 1


def test_behind_a_downsampling_a_token_covers_several_patches():
    model = reduce_tokens_(seeded("evo_levit_128s", num_classes=10), TokenSpec(method="evo-vit", keep_rate=0.5))
    plan = token_plan(model)
    with capture(model) as seen:
        model(torch.from_numpy(images(model, 2)))
    choices, scores = ([one.numpy() for one in part] for part in (seen.kept, seen.scores))
    found = stages_of(choices, plan, (14, 14), METHODS.get("evo-vit"), scores)
    for image, stages in enumerate(found):
        places: tuple[int, ...] = ()
        for number, (stage, row) in enumerate(zip(stages, plan.locations, strict=True)):
            places = row.places or places or tuple(range(plan.patches))
            side = {196: 1, 49: 2, 16: 4}[len(places)]
            assert (stage.count, stage.patches, stage.does) == (row.keep, len(places), "updated")
            kept = {places[place] for place in choices[number][image][: row.keep]}
            for patch in range(196):
                corner = patch // 14 // side * side * 14 + patch % 14 // side * side
                assert stage.kept[patch] == (corner in kept)
                assert stage.groups[patch] == patch
                at = places.index(corner)
                np.testing.assert_allclose(stage.scores[patch], scores[number][image][at], rtol=1e-6)
    assert {stage.patches for stage in found[0]} == {49, 16}  # its first stage reduces nothing
