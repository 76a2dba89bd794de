"""Importing the package costs nothing, and the lazy names are what they say."""

import importlib
import json
import subprocess
import sys
import types

import pytest

import evit_deploy

HEAVY = ("torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "rich")


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(statement: str) -> set[str]:
    return set(json.loads(run_python(f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))")))


@pytest.mark.parametrize(
    "modules",
    [
        (),
        ("registry", "errors", "progress", "files"),
        ("environment.machine", "environment.nvidia", "environment.requirements", "environment.availability"),
        ("report.report", "report.tables"),
        ("tokens.plan", "tokens.backbone"),
        ("recipe.recipe", "recipe.options", "recipe.sections", "recipe.file", "serving.options"),
        ("data.preprocess", "bundle.bundle", "bundle.manifest"),
        ("targets.target", "engines.options", "doctor.doctor"),
        ("cli",),
    ],
    ids=lambda modules: modules[0] if modules else "the package",
)
def test_importing_loads_nothing_heavy(modules):
    found = loaded("import " + ", ".join(["evit_deploy", *(f"evit_deploy.{module}" for module in modules)]))
    assert "evit_deploy" in found
    assert found.isdisjoint(HEAVY), sorted(found.intersection(HEAVY))


@pytest.mark.parametrize(
    "module",
    ["report.statistics", "data.images", "data.sources.sources", "runtimes.runner", "triton.connection"],
)  # fmt: skip
def test_what_computes_with_arrays_needs_numpy_alone(module):
    found = loaded(f"import evit_deploy.{module}")
    assert "numpy" in found
    assert found.isdisjoint(set(HEAVY) - {"numpy"}), sorted(found.intersection(HEAVY))


def test_a_public_name_loads_only_its_own_module():
    found = loaded("import evit_deploy\nevit_deploy.TokenSpec")
    assert "evit_deploy.tokens.plan" in found
    assert found.isdisjoint(HEAVY), sorted(found.intersection(HEAVY))


@pytest.mark.parametrize("name", evit_deploy.__all__)
def test_every_public_name_exists_and_is_no_module(name):
    home = f"evit_deploy.{evit_deploy._MODULE_OF[name]}"
    importlib.import_module(home)  # a module that is named like a function would take its place on the package
    value = getattr(evit_deploy, name)
    assert not isinstance(value, types.ModuleType)
    assert value is getattr(sys.modules[home], name)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'evit_deploy' has no attribute 'reduce_token'"):
        _ = evit_deploy.reduce_token
