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


@pytest.mark.parametrize(
    "statement",
    ["import evit_deploy", "import evit_deploy.registry, evit_deploy.errors, evit_deploy.tokens.plan"],
)
def test_importing_loads_nothing_heavy(statement):
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert "evit_deploy" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_a_public_name_loads_only_its_own_module():
    code = "import sys, json, evit_deploy\nevit_deploy.TokenSpec\nprint(json.dumps(sorted(sys.modules)))"
    loaded = set(json.loads(run_python(code)))
    assert "evit_deploy.tokens.plan" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


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
