"""The registries and the exception tree."""

import importlib.metadata
import subprocess
import sys

import pytest

from evit_deploy import errors
from evit_deploy.errors import (
    CheckpointError,
    EvitDeployError,
    GateFailed,
    InputError,
    MissingRequirement,
    RecipeError,
    StageError,
    UnsupportedModelError,
    did_you_mean,
    first_few,
)
from evit_deploy.registry import BACKBONES, METHODS, Registry


@pytest.fixture
def registry() -> Registry:
    return Registry("shape", {"fraction": "fractions:Fraction", "path": "pathlib:Path"})


# ---- registries


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_can_be_had(name):
    from evit_deploy.tokens.reducer import TokenReducer

    assert issubclass(METHODS.get(name), TokenReducer)


@pytest.mark.parametrize("name", BACKBONES.names())
def test_every_backbone_can_be_had(name):
    assert callable(BACKBONES.get(name).unsupported)


def test_a_name_is_imported_when_asked_for(registry):
    from fractions import Fraction

    assert registry.get("fraction") is Fraction
    assert registry.names() == ["fraction", "path"]


@pytest.mark.parametrize(("written", "meant"), [("fractoin", "fraction"), ("paths", "path")])
def test_an_unknown_name_says_what_was_meant(registry, written, meant):
    with pytest.raises(InputError) as error:
        registry.get(written)
    assert str(error.value) == (
        f"unknown shape (got {written!r}, expected one of fraction, path). Did you mean {meant!r}?"
    )


def test_a_name_like_no_other_gets_the_list_only(registry):
    with pytest.raises(InputError, match=r"expected one of fraction, path\)\.$"):
        registry.get("zzz")


def test_registering_adds_a_name(registry):
    registry.register("decimal", "decimal:Decimal")
    from decimal import Decimal

    assert registry.get("decimal") is Decimal
    assert registry.names()[-1] == "decimal"


def test_registering_the_same_twice_is_fine_and_something_else_is_not(registry):
    registry.register("path", "pathlib:Path")
    with pytest.raises(InputError, match=r"the shape 'path' is already pathlib:Path \(got 'os:path'\)"):
        registry.register("path", "os:path")
    from pathlib import Path

    assert registry.get("path") is Path


@pytest.mark.parametrize("target", ["pathlib.Path", "", "a:b:c"])
def test_a_malformed_target_is_refused(registry, target):
    with pytest.raises(InputError, match="not a shape target"):
        registry.register("other", target)
    assert "other" not in registry.names()


def test_registries_do_not_share_their_tables():
    targets = {"path": "pathlib:Path"}
    one, other = Registry("shape", targets), Registry("shape", targets)
    one.register("decimal", "decimal:Decimal")
    assert other.names() == ["path"]
    assert targets == {"path": "pathlib:Path"}


def test_entry_points_are_found_and_do_not_override_ours(registry, monkeypatch):
    asked = []

    def entry_points(*, group):
        asked.append(group)
        return [
            importlib.metadata.EntryPoint("path", "somebody.else:Path", group),
            importlib.metadata.EntryPoint("decimal", "decimal:Decimal", group),
        ]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    from decimal import Decimal
    from pathlib import Path

    assert registry.get("decimal") is Decimal  # found although nobody has listed the names before
    assert registry.get("path") is Path
    assert registry.names() == ["fraction", "path", "decimal"]
    assert asked == ["evit_deploy.shapes"]


# ---- errors


TREE = {
    EvitDeployError: (Exception, 4),
    InputError: (EvitDeployError, 2),
    CheckpointError: (InputError, 2),
    RecipeError: (InputError, 2),
    UnsupportedModelError: (InputError, 2),
    MissingRequirement: (EvitDeployError, 3),
    StageError: (EvitDeployError, 4),
    GateFailed: (EvitDeployError, 1),
}


@pytest.mark.parametrize("error", TREE, ids=lambda error: error.__name__)
def test_the_tree_and_its_exit_codes(error):
    parent, code = TREE[error]
    assert parent in error.__bases__
    assert error.exit_code == code
    assert issubclass(error, ValueError) == issubclass(error, InputError)


def test_the_tree_is_whole_and_drawn_in_the_docstring():
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(TREE)
    lines = [line.strip(" │├└─") for line in errors.__doc__.splitlines()]
    for error, (_, code) in TREE.items():
        assert any(line.split()[:2] == [error.__name__, str(code)] for line in lines), error.__name__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("no such file"), "no such file."),
        (InputError("no such file", where="a.pth"), "a.pth: no such file."),
        (InputError("bad rate", seen=2, wanted="(0, 1]"), "bad rate (got 2, expected (0, 1])."),
        (InputError("bad rate", seen=0), "bad rate (got 0)."),
        (InputError("bad rate", fix="Use 0.7."), "bad rate. Use 0.7."),
        (InputError("really?"), "really?"),
        (
            MissingRequirement("no TensorRT", where="--target", fix="Run: pip install tensorrt"),
            "--target: no TensorRT. Run: pip install tensorrt",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_messages_say_what_where_seen_wanted_and_fix_in_that_order(error, text):
    assert str(error) == text


def test_an_unsupported_model_names_all_reasons():
    error = UnsupportedModelError("Model", ["it has no class token", "it pools"])
    assert error.reasons == ["it has no class token", "it pools"]
    assert str(error).startswith("Model cannot be token-reduced exactly: it has no class token; it pools. Use a timm ")


@pytest.mark.parametrize(
    ("name", "options", "question"),
    [
        ("evti", {}, "Did you mean 'evit'?"),
        ("tensrt", {}, "Did you mean 'tensorrt'?"),
        ("trt", {}, "Did you mean 'tensorrt'?"),
        ("tensort", {"choices": 3}, "Did you mean 'tensorrt' or 'tensorrt-rtx'?"),
        ("evti", {"prefix": "tokens."}, "Did you mean 'tokens.evit'?"),
        (7, {}, None),
        ("", {}, None),
        ("zzz", {}, None),
    ],
)
def test_did_you_mean(name, options, question):
    assert did_you_mean(name, ["evit", "tensorrt", "tensorrt-rtx"], **options) == question


def test_nobody_pays_for_a_question_that_is_not_asked():
    code = "import sys, evit_deploy.cli, evit_deploy.errors, evit_deploy.registry; print('difflib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("names", "options", "text"),
    [
        ([], {}, ""),
        (["a", 2, "c"], {}, "a, 2, c"),
        (["a", "b", "c", "d", "e"], {}, "a, b, c and 2 more"),
        (["a", "b"], {"count": 1, "separator": "; "}, "a and 1 more"),
        (["a", "b"], {"separator": "; "}, "a; b"),
    ],
)
def test_the_first_few_of_many_names(names, options, text):
    assert first_few(iter(names), **options) == text


def test_a_help_page_lists_our_names_whatever_is_registered():
    registry = Registry("shape", {"round": "shapes:Round"})
    registry.register("square", "other:Square")
    assert registry.own_names() == ["round"]
    assert registry.names()[:2] == ["round", "square"]
