"""Every name of TensorRT's Python package that our code uses is there, in each version and in TensorRT-RTX.

The names are read off our own sources, so that a new use is looked up too: what is asked of the module (``trt.X.Y``),
and of its objects as far as it is clear what they are.
"""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import evit_deploy
from tests.support import tensorrt_lean
from tests.support.tensorrt_lean import RELEASES

PACKAGE = Path(evit_deploy.__file__).parent
MODULE = ("trt", "_trt")
"""What the module is called in our sources."""
HELD = {
    "runtimes/tensorrt.py": {
        "_engine": "ICudaEngine", "engine": "ICudaEngine", "_runtime": "Runtime", "runtime": "Runtime",
        "context": "IExecutionContext",
    },
    "runtimes/tensorrt_lane.py": {"engine": "ICudaEngine", "context": "IExecutionContext"},
    "engines/build.py": {"network": "INetworkDefinition", "builder": "Builder", "registry": "IPluginRegistry"},
}  # fmt: skip
"""Parameters and attributes of our sources, and what they hold; what comes of a call is known by itself."""
MADE = {
    "deserialize_cuda_engine": "ICudaEngine",
    "create_execution_context": "IExecutionContext",
    "create_engine_inspector": "EngineInspector",
    "create_runtime_config": "IRuntimeConfig",
    "get_plugin_registry": "IPluginRegistry",
    "get_input": "ITensor",
    "get_layer": "ILayer",
}
"""Functions, and what they give."""
RTX_ALONE = ("TensorRTRTXRunner", "engine_validity", "_refuse_registered_plugin")
"""What in our sources meets TensorRT-RTX only."""
EXPECTED = {
    "Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context", "ICudaEngine.num_io_tensors",
    "IExecutionContext.execute_async_v3", "IExecutionContext.set_optimization_profile_async",
    "EngineInspector.get_engine_information", "LayerInformationFormat.JSON", "LayerType.PLUGIN_V3",
    "INetworkDefinition.num_layers", "IExecutionContext.profiler", "ILogger.Severity.INTERNAL_ERROR",
    "ProfilingVerbosity.DETAILED",
}  # fmt: skip
"""Some of the names that have to be found, so that the search itself is tested."""


class Names(ast.NodeVisitor):
    """The dotted names of TensorRT's module that a source uses, each with the class or function it stands in."""

    def __init__(self, held: dict[str, str]) -> None:
        self.found: set[tuple[str, str]] = set()
        self._held, self._scopes = [held], [""]

    def _visit_scope(self, node: ast.AST, name: str) -> None:
        self._scopes.append(name if not self._scopes[-1] else self._scopes[-1])  # the outermost counts
        self._held.append(dict(self._held[-1]))
        self.generic_visit(node)
        self._scopes.pop()
        self._held.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_scope(node, node.name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._visit_scope(node, node.name)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        made = self._name_of(node.value) or None
        for target in node.targets:
            if isinstance(target, ast.Name) and made is not None:
                self._held[-1][target.id] = made

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        name = self._name_of(node)
        if name and not node.attr.startswith("__"):
            self.found.add((name, self._scopes[-1]))

    def _name_of(self, node: ast.AST) -> str | None:
        """The dotted name below the module of what an expression is; of what a call makes, its class."""
        if isinstance(node, ast.Name):
            return "" if node.id in MODULE else self._held[-1].get(node.id)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return "" if node.attr in MODULE else self._held[-1].get(node.attr)
            owner = self._name_of(node.value)
            if owner is None:
                return self._held[-1].get(node.attr)  # lane.context
            return f"{owner}.{node.attr}".removeprefix(".")
        if isinstance(node, ast.Call):
            called = self._name_of(node.func)
            if called is None:
                return None
            last = called.rpartition(".")[2]
            return MADE.get(last) or (called if last[:1].isupper() else None)
        return None


def names_of(source: Path) -> set[tuple[str, str]]:
    """A source's names of TensorRT, with where they stand."""
    names = Names(HELD.get(source.relative_to(PACKAGE).as_posix(), {}))
    names.visit(ast.parse(source.read_text()))
    return names.found


def used(*, rtx: bool) -> list[str]:
    """The names that our sources use of TensorRT, or of TensorRT-RTX."""
    found = {
        name for source in PACKAGE.rglob("*.py") for name, scope in names_of(source) if rtx or scope not in RTX_ALONE
    }
    # The direction of a tensor is asked for by a text.
    return sorted(found | {"TensorIOMode.INPUT", "TensorIOMode.OUTPUT"})


def absent(module: object, names: list[str]) -> Iterator[str]:
    """Which of the names a module does not have."""
    for name in names:
        owner = module
        for part in name.split("."):
            if not hasattr(owner, part):
                yield name
                break
            owner = getattr(owner, part)


def test_the_names_are_found():
    assert set(used(rtx=False)) >= EXPECTED
    assert "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE" not in used(rtx=False)
    assert "CudaGraphStrategy" in used(rtx=True)
    sources = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if names_of(path)}
    assert sources >= set(HELD)


@pytest.mark.tensorrt_lean
@pytest.mark.parametrize("major", RELEASES)
def test_tensorrt_has_every_name(major):
    program = (
        "import json, sys\nimport tensorrt\nfrom tests.engines.test_tensorrt_names import absent\n"
        "print(json.dumps([tensorrt.__version__, list(absent(tensorrt, sys.argv[1:]))]))"
    )
    version, missing = tensorrt_lean.ask(major, program, *used(rtx=False), "BuilderFlag.EXCLUDE_LEAN_RUNTIME")
    assert version == RELEASES[major]
    assert missing == []


@pytest.mark.tensorrt_lean
@pytest.mark.parametrize("major", RELEASES)
def test_a_name_that_is_not_there_is_noticed(major):
    program = (
        "import json, sys\nimport tensorrt\nfrom tests.engines.test_tensorrt_names import absent\n"
        "print(json.dumps(list(absent(tensorrt, sys.argv[1:]))))"
    )
    names = ("BuilderFlag.VERSION_COMPATIBLE", "CudaGraphStrategy.DISABLED", "ICudaEngine.get_binding_name")
    assert tensorrt_lean.ask(major, program, *names) == list(names[1:])


@pytest.mark.tensorrt_rtx
def test_tensorrt_rtx_has_every_name():
    pytest.importorskip("tensorrt_rtx")
    assert list(absent(importlib.import_module("tensorrt_rtx"), used(rtx=True))) == []
