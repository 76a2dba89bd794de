"""The C++ example's readers under libFuzzer with sanitizers; ``EVIT_FUZZ_RUNS=1000000`` tries more."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from evit_deploy.bundle.manifest import GOLDEN, MANIFEST
from tests.fuzz.formats.images import seeds
from tests.fuzz.harness import CORPUS
from tests.fuzz.seeds import bundle
from tests.support.cpp_example import HEADERS, SOURCE, compiles
from tests.support.shared import made_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # building takes a minute or two
RUNS = os.environ.get("EVIT_FUZZ_RUNS", "20000")
SANITIZERS = "-fsanitize=fuzzer,address,undefined"
EMPTY = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }\n'


def _build(program: Path) -> None:
    options = ["-std=c++20", "-O1", "-g", "-fno-sanitize-recover=all", SANITIZERS, "-I", str(SOURCE)]
    files = [SOURCE / name for name in ("bundle.cpp", "golden.cpp", "image.cpp", "test/fuzz.cpp")]
    libraries = ["-lcrypto", "-lpng", "-lturbojpeg"]
    command = ["clang++", *options, *map(str, files), "-o", str(program), *libraries]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The readers with libFuzzer."""
    if shutil.which("clang++") is None:
        pytest.skip("fuzzing C++ needs clang: apt-get install clang")
    probe = ["clang++", SANITIZERS, "-x", "c++", "-", "-o", str(tmp_path_factory.mktemp("probe") / "probe")]
    if subprocess.run(probe, input=EMPTY, capture_output=True, text=True).returncode:
        pytest.skip("this clang has no libFuzzer with AddressSanitizer: apt-get install libclang-rt-dev")
    lacking = [header for header in HEADERS if not compiles(header)]
    if lacking:
        pytest.skip(f"building the example needs {', '.join(lacking)}")
    return made_once("cpp-fuzz/fuzz", _build)


@pytest.mark.parametrize("kind", ["manifest", "golden", "image"])
def test_readers_read_or_refuse(program, kind, tmp_path):
    corpus, folder = tmp_path / "corpus", tmp_path / "folder"
    for made in (corpus, folder):
        made.mkdir()
    valid = {
        "manifest": lambda: [(bundle() / MANIFEST).read_bytes()],
        "golden": lambda: [(bundle() / GOLDEN).read_bytes()],
        "image": lambda: [content for content in seeds() if content[:2] in (b"\xff\xd8", b"\x89P")],
    }[kind]()
    for number, content in enumerate(valid):
        (corpus / f"valid-{number}").write_bytes(content)
    kept = CORPUS / f"cpp-{kind}"
    for path in kept.glob("*") if kept.is_dir() else ():
        shutil.copy(path, corpus)
    command = [program, f"-runs={RUNS}", "-seed=1", "-timeout=20", "-rss_limit_mb=3000", "-max_len=600000",
               f"-artifact_prefix={tmp_path}/trouble-", corpus]  # fmt: skip
    environment = os.environ | {"EVIT_FUZZ": kind, "EVIT_FUZZ_FOLDER": str(folder)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"Done {RUNS} runs" in done.stderr
