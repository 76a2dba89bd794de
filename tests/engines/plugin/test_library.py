"""Which plugin library is taken, and ``evit-deploy plugin``: built, looked at, refused."""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from evit_deploy.bundle.manifest import Engine
from evit_deploy.engines.plugin import build as plugin_build
from evit_deploy.engines.plugin import library as plugin
from evit_deploy.engines.plugin.build import build_plugin, check_plugin
from evit_deploy.engines.plugin.library import (
    CREATORS,
    LIBRARY,
    choose_plugin,
    load_plugin,
    misfit,
    plugin_for,
    provide_plugin,
)
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.files import sha256
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.tokens.operators.library import ABI, KERNEL, Identity, read_identity
from evit_deploy.tokens.operators.token_reorg import token_reorg
from tests.support import plugin_builds
from tests.support.plugin_files import LINE, library

ENGINE = Engine("tensorrt", "11.1.0", ("sm80",), None, "fp16", (BatchProfile(1, 8, 8),), None, {}, 1.0)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return plugin.cache()


@pytest.fixture
def installed(monkeypatch):
    """Sets the version of TensorRT that seems to be installed."""

    def set_version(version: str | None) -> None:
        for module in (plugin, plugin_build):
            monkeypatch.setattr(module, "version_of", lambda name: version)

    return set_version


# ---- choosing


def test_none_is_none(tmp_path):
    assert choose_plugin(None) is None
    assert choose_plugin("none") is None


def test_a_path_is_looked_at(tmp_path, installed):
    installed("11.4.0.106")
    path = library(tmp_path / "a.so")
    assert choose_plugin(path) == choose_plugin(str(path)) == path
    assert choose_plugin(path, sha256(path)) == path
    with pytest.raises(InputError, match=r"the plan was built with a different library.*convert again with this one"):
        choose_plugin(path, "0" * 64)
    with pytest.raises(InputError, match="the library cannot be read"):
        choose_plugin(tmp_path / "b.so")
    (tmp_path / "c.so").write_bytes(b"\x7fELF")
    with pytest.raises(InputError, match="not a library that evit-deploy built"):
        choose_plugin(tmp_path / "c.so")
    with pytest.raises(InputError, match=r"kind creators.*expected libevit_plugin\.so"):
        choose_plugin(library(tmp_path / "d.so", "creators"))
    with pytest.raises(InputError, match=r"a different interface \(got 7, expected 2\)"):
        choose_plugin(library(tmp_path / "e.so", abi=7))
    with pytest.raises(MissingRequirement, match=r"TensorRT 10, and TensorRT 11 is installed\..*plugin build"):
        choose_plugin(library(tmp_path / "f.so", tensorrt="10.15.1"))
    installed(None)
    assert choose_plugin(tmp_path / "f.so") == tmp_path / "f.so"  # nothing here to compare it with


def test_auto_is_the_newest_in_the_cache_that_fits(cache, installed):
    installed("11.4.0.106")
    with pytest.raises(MissingRequirement, match=r"no plugin for TensorRT 11\.4\.0\.106 is in .*plugin build"):
        choose_plugin("auto")
    old, new = library(cache / "0" / LIBRARY), library(cache / "1" / LIBRARY, more=b"new")
    library(cache / "2" / LIBRARY, tensorrt="10.15.1")
    library(cache / "3" / LIBRARY, abi=1)
    os.utime(old, (1, 1))
    assert choose_plugin("auto") == new
    assert choose_plugin("auto", sha256(old)) == old  # what a manifest names, not what is newest
    with pytest.raises(MissingRequirement, match=r"SHA-256 000000000000, which is not in .*--plugin PATH"):
        choose_plugin("auto", "0" * 64)


def test_a_library_beside_a_plan_is_never_taken(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    beside = library(tmp_path / LIBRARY)
    with pytest.raises(MissingRequirement, match="which is not in"):
        choose_plugin("auto", sha256(beside))


def test_what_an_engine_needs(cache, tmp_path):
    path = library(cache / "0" / LIBRARY, tensorrt="99.0")
    needs = msgspec.structs.replace(ENGINE, plugin=sha256(path))
    for choice in (None, "none", "auto"):
        assert plugin_for(ENGINE, choice) is None
    with pytest.raises(InputError, match="needs no plugin: the operator's body is built in"):
        plugin_for(ENGINE, path)
    for choice in (None, "auto", path):
        assert plugin_for(needs, choice) == path
    with pytest.raises(InputError, match="--plugin none: the engine was built with a plugin"):
        plugin_for(needs, "none")
    with pytest.raises(InputError, match="a different library"):
        plugin_for(needs, library(tmp_path / "other.so"))
    assert plugin_for(None, None) is plugin_for(None, "auto") is None
    assert plugin_for(None, path) == path


def test_without_tensorrt_nothing_is_loaded(cache):
    path = library(cache / "0" / LIBRARY)  # loading it would fail
    assert provide_plugin(msgspec.structs.replace(ENGINE, plugin=sha256(path)), None) is None
    lacking = provide_plugin(msgspec.structs.replace(ENGINE, plugin="0" * 64), None)
    assert isinstance(lacking, MissingRequirement)


def test_majors_are_what_is_compared(installed):
    identity = Identity("registers", "0.1.0", 1, ("80",), "11.1.0")
    for version, fits in (("11.4.0.106", True), ("10.15.1", False), ("12.0", False), (None, True)):
        installed(version)
        assert (misfit(identity) is None) == fits


# ---- loading, building, checking


def test_what_is_no_library_is_not_loaded(tmp_path):
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputError, match=r"not a library that evit-deploy built.*plugin build"):
        load_plugin(tmp_path / "text.so")
    with pytest.raises(InputError, match="the library cannot be read"):
        load_plugin(tmp_path / "none.so")


@pytest.mark.slow
def test_build_and_check(cache, cli, tmp_path, monkeypatch):
    root = plugin_builds.tensorrt_headers()
    monkeypatch.setenv("TENSORRT_ROOT", str(root))
    done = cli("plugin", "build", "--architectures", "sm80,90")
    assert done.code == 0, done.err
    path = choose_plugin("auto")
    assert done.out == f"{path}\n"
    assert path is not None
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([LIBRARY, CREATORS, KERNEL])
    assert read_identity(path).architectures == ("80", "90")
    checked = cli("plugin", "check", "--json").document
    assert checked["passed"] is True
    assert any("for TensorRT" in note for note in checked["notes"])
    again = build_plugin(architectures=["80"])
    assert again == path.parent
    assert read_identity(path).architectures == ("80",)


@pytest.mark.cpp
def test_the_host_library_answers_like_pytorch(cli):
    document = cli("plugin", "check", str(plugin_builds.host_library()), "--json").document
    assert document["passed"] is True
    names = [check["name"] for check in document["checks"]]
    assert names[:2] == ["interface", "loads in a separate process"]
    for dtype in ("float32", "float16", "bfloat16"):
        assert {f"{dtype}: kept rows and indices as PyTorch's", f"{dtype}: fused row against PyTorch's"} <= set(names)


@pytest.mark.cpp
def test_a_wrong_kernel_fails_the_check(tmp_path, monkeypatch):
    original = token_reorg
    monkeypatch.setattr(plugin_build, "token_reorg", lambda *call: moved(original(*call)))
    report = check_plugin(plugin_builds.host_library())
    assert [check.name for check in report.failed] == [
        f"{dtype}: fused row against PyTorch's" for dtype in ("float32", "float16", "bfloat16")
    ]


def moved(answer):
    y, idx = answer
    y[0, -1, 0] += 1
    return y, idx


def test_a_damaged_library_fails_the_check(tmp_path, cli):
    done = cli("plugin", "check", str(library(tmp_path / "a.so")))
    assert done.code == 1
    assert "the library cannot be used: loads in a separate process" in done.err


@pytest.mark.cpp
def test_a_library_that_crashes_is_told(tmp_path):
    plugin_builds.need("g++")
    source, path = tmp_path / "crash.cpp", tmp_path / "crash.so"
    text = (
        (LINE % (b"registers", ABI, b"80-real,120", b"11.1.0")).removeprefix(b"\x7fELF ").removesuffix(b"\0").decode()
    )
    source.write_text(
        f'#include <csignal>\nextern "C" const char identity[] = "{text}";\n'
        "[[gnu::constructor]] void start() { std::raise(SIGSEGV); }\n"
    )
    plugin_builds.run("g++", "-shared", "-fPIC", str(source), "-o", str(path))
    failed = check_plugin(path).failed
    assert [check.name for check in failed] == ["loads in a separate process"]
    assert failed[0].reason == "the process that loaded it was ended by signal 11: the file is damaged"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["build", "--tensorrt-root", "/nowhere"], 2, "expected include/NvInferRuntime.h"),
        (["build", "--out", __file__], 2, "this is a file (expected a folder for the libraries)"),
        (["build", "--architectures", "hopper"], 2, "--architectures: not a CUDA architecture (got 'hopper'"),
        (["build", "--architectures", ""], 2, "not a CUDA architecture (got ''"),
        (["build", "--architectures", "9000"], 2, "not a CUDA architecture (got '9000'"),
        (["check", "absent.so"], 2, "absent.so: the library cannot be read"),
        (["check"], 3, "Run: evit-deploy plugin build"),
        (["chekc"], 2, "Did you mean 'check'?"),
    ],
)
def test_wrong_uses_are_told(arguments, code, words, cli, cache, monkeypatch):
    plugin_builds.need("cmake", "nvcc", "c++")
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    cli("plugin", *arguments).refused(code, words)
    assert not cache.exists()


@pytest.mark.parametrize("tool", ["cmake", "nvcc", "c++"])
def test_a_missing_tool_is_named(tool, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None if name == tool else f"/bin/{name}")
    with pytest.raises(MissingRequirement, match=rf"{tool.replace('+', '.')} was not found"):
        build_plugin()


@pytest.mark.slow
@pytest.mark.cpp
def test_a_compiler_s_complaint_is_quoted(tmp_path, monkeypatch):
    plugin_builds.need("cmake", "nvcc", "c++")
    root = tmp_path / "trt"
    (root / "include").mkdir(parents=True)
    (root / "include" / "NvInferRuntime.h").write_text("#error these are no headers\n")
    (root / "include" / "NvInferVersion.h").write_text(
        "#define NV_TENSORRT_MAJOR 11\n#define NV_TENSORRT_MINOR 1\n#define NV_TENSORRT_PATCH 0\n"
    )
    with pytest.raises(StageError, match=r"the plugin does not compile: .*these are no headers"):
        build_plugin(tmp_path / "out", tensorrt_root=root, architectures=["80"])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(small_disk, tmp_path):
    built = [library(tmp_path / name, more=bytes(8 << 20)) for name in (LIBRARY, CREATORS)]
    with pytest.raises(StageError, match="the libraries could not be written"):
        plugin_build._install(built, small_disk / "plugins")
    assert not list((small_disk / "plugins").glob("*"))


@pytest.mark.nvcc
@pytest.mark.slow
def test_the_kernel_alone_needs_no_tensorrt(cache, monkeypatch):
    plugin_builds.need("cmake", "g++", "nvcc")
    monkeypatch.setenv("TENSORRT_ROOT", "/nowhere")
    folder = build_plugin(architectures=["80"], kernel_only=True)
    assert [path.name for path in folder.iterdir()] == [KERNEL]
    assert folder.parent == cache
    assert check_plugin(folder / KERNEL).passed
    with pytest.raises(InputError, match="--kernel-only: TensorRT is left out"):
        build_plugin(kernel_only=True, tensorrt_root=Path("/nowhere"))


@pytest.mark.gpu
@pytest.mark.tensorrt
def test_tensorrt_takes_the_plugin(tmp_path):
    pytest.importorskip("tensorrt")
    folder = build_plugin(tmp_path, tensorrt_root=plugin_builds.tensorrt_headers())
    load_plugin(folder / LIBRARY)
    load_plugin(folder / LIBRARY)  # once is enough
    assert check_plugin(folder / LIBRARY).passed
