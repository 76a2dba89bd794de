"""Both plugin libraries in TensorRT's own plugin registry, of the oldest TensorRT that is supported and of the newest.

The registry is that of NVIDIA's lean runtime, which needs no GPU (:mod:`tests.support.tensorrt_lean`).
"""

import pytest

from evit_deploy.engines.plugin.library import CREATORS, LIBRARY
from tests.support import tensorrt_lean
from tests.support.tensorrt_lean import RELEASES

pytestmark = pytest.mark.tensorrt_headers

START = """
import json, sys
import tensorrt as trt
messages = []
class Logger(trt.ILogger):
    def __init__(self): trt.ILogger.__init__(self)
    def log(self, severity, message): messages.append(message)
registry = trt.get_plugin_registry()
def creator(): return registry.get_creator("TokenReorg", "1", "evit")
def names(): return [f"{one.plugin_namespace}::{one.name}" for one in registry.all_creators]
"""
LOADED = START + "from pathlib import Path\nfrom evit_deploy.engines.plugin.library import load_plugin\n"
"""As our own commands load the plugin."""
CREATE = """
import numpy as np
def create(*values):
    kind = trt.PluginFieldType.INT32
    fields = [trt.PluginField(name, np.array([value], np.int32), kind) for name, value in values]
    try:
        return creator().create_plugin("reorg", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    except RuntimeError as error:  # what the package makes of a null pointer
        return None
"""


@pytest.fixture(params=RELEASES)
def major(request) -> int:
    return request.param


def test_the_library_that_registers_itself_is_in_the_registry(major):
    before, after, version = tensorrt_lean.ask(
        major,
        LOADED + "before = names(); load_plugin(Path(sys.argv[1])); load_plugin(Path(sys.argv[1]))\n"
        "print(json.dumps([before, names(), trt.__version__]))",
        tensorrt_lean.plugin(major) / LIBRARY,
    )
    assert version == RELEASES[major]
    assert len(before) >= 5  # TensorRT's own: the registry is the real one
    assert sorted(set(after) - set(before)) == ["evit::TokenReorg"]
    assert len(after) == len(before) + 1


def test_the_library_of_creators_is_taken_from_its_file(major):
    before, after = tensorrt_lean.ask(
        major,
        START + "before = names(); handle = registry.load_library(sys.argv[1]); assert handle is not None\n"
        "print(json.dumps([before, names()]))",
        tensorrt_lean.plugin(major) / CREATORS,
    )
    assert sorted(set(after) - set(before)) == ["evit::TokenReorg"]


def test_both_libraries_in_one_process_are_one_too_many(major):
    folder = tensorrt_lean.plugin(major)
    taken = tensorrt_lean.ask(
        major,
        LOADED + "load_plugin(Path(sys.argv[1]))\n"
        "handle = registry.load_library(sys.argv[2]); print(json.dumps([handle is not None, names()]))",
        folder / LIBRARY,
        folder / CREATORS,
    )
    assert taken[0] is False
    assert taken[1].count("evit::TokenReorg") == 1


@pytest.mark.parametrize("library", [LIBRARY, CREATORS])
def test_plugins_are_created_from_their_fields(library, major):
    answer = tensorrt_lean.ask(
        major,
        START + CREATE + "import ctypes\n"
        "if sys.argv[1].endswith('creators.so'): registry.load_library(sys.argv[1])\n"
        "else: ctypes.CDLL(sys.argv[1])\n"
        "plugin = create(('keep', 138), ('fuse', 1), ('prefix', 1))\n"
        "core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)\n"
        "build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)\n"
        "fields = [field.name for field in creator().field_names]\n"
        "print(json.dumps([fields, core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs]))",
        tensorrt_lean.plugin(major) / library,
    )
    assert answer == [["keep", "fuse", "prefix"], "TokenReorg", "1", "evit", 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([("keep", 0), ("fuse", 1), ("prefix", 1)], "keep is 0, expected 1 to 4096"),
        ([("keep", 8), ("fuse", 2), ("prefix", 1)], "fuse is 2, expected 0 to 1"),
        ([("keep", 8), ("fuse", 1)], "field prefix is missing, expected keep, fuse and prefix"),
        ([("keep", 8), ("rate", 1)], "there is no field 'rate', expected keep, fuse and prefix"),
    ],
)
def test_wrong_fields_are_refused_with_a_sentence(values, words, major):
    created, said = tensorrt_lean.ask(
        major,
        # The library that registers itself asks TensorRT for its logger: that of the last builder or runtime.
        START + CREATE + "import ctypes, os, tempfile\n"
        "said = tempfile.TemporaryFile(); os.dup2(said.fileno(), 2)\n"
        f"ctypes.CDLL(sys.argv[1]); plugin = create(*{values!r}); said.seek(0)\n"
        "print(json.dumps([plugin is not None, said.read().decode()]))",
        tensorrt_lean.plugin(major) / LIBRARY,
    )
    assert created is False
    assert f"evit::TokenReorg: {words}" in said


def test_a_library_for_another_major_version_is_refused(major):
    other = next(number for number in RELEASES if number != major)
    path = tensorrt_lean.plugin(other) / LIBRARY
    before, after, ours, library = tensorrt_lean.ask(
        major,
        LOADED + "import ctypes\nfrom evit_deploy.engines.plugin.library import refusal_of\n"
        "from evit_deploy.errors import MissingRequirement\nbefore = names()\n"
        "try: load_plugin(Path(sys.argv[1])); ours = None\n"
        "except MissingRequirement as error: ours = str(error)\n"
        "library = refusal_of(ctypes.CDLL(sys.argv[1]))\n"
        "print(json.dumps([before, names(), ours, library]))",
        path,
    )
    assert after == before
    assert f"it was built for TensorRT {other}, and TensorRT {major} is installed" in ours
    assert library == f"the library was built for TensorRT {other}, this process has TensorRT {major}"
