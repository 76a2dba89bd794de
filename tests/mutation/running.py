"""Tests run against mutants: each in a forked process that has everything imported and collected already.

Which tests run is found by tracing: those that reach the changed statement, the quickest first. A mutant of the body of
a function is put into the running interpreter; any other (defaults, decorators, fields, constants) is imported anew.
"""

import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import msgspec
import pytest

from tests.mutation.mutants import Mutant, codes, statement, within_functions
from tests.support import shared
from tests.support.paths import ROOT

HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "sklearn", "hypothesis", "PIL",
         "scipy", "safetensors", "accelerate", "rich", "click", "openvino", "cryptography", "transformers")  # fmt: skip
SECONDS = 10
"""So long the tests of one mutant may take, by what they took unchanged."""
LEFT_OUT = "slow or gpu or nvcc or triton or tensorrt_lean or tensorrt_headers or browser"
OPTIONS = ["-o", "addopts=", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:xdist",
           "--capture=no", "-m", f"not ({LEFT_OUT})"]  # fmt: skip


class Reach(msgspec.Struct):
    """What a test reached.

    Args:
        seconds: How long it took, with what it shares with others.
        passed: Whether it passed.
        lines: By module, the lines that ran.
        kept: Likewise, what ran while something was made that a run keeps; see :mod:`tests.support.shared`.
        of: Hash of the file of the test.
    """

    seconds: float
    passed: bool
    lines: dict[str, set[int]] = {}
    kept: dict[str, set[int]] = {}
    of: str = ""


class Result(msgspec.Struct):
    """What became of a mutant.

    Args:
        key: Of the mutant.
        module: Of the mutant.
        outcome: ``killed``, ``timeout``, ``survived`` or ``unreached``.
        seconds: How long its tests took.
        tests: How many there were.
        by: The test that failed.
    """

    key: str
    module: str
    outcome: str
    seconds: float
    tests: int
    by: str = ""


# ---- processes


def _aside(work: Callable[[Path], None], limit: float) -> tuple[bytes | None, float]:
    """Does something in a forked process with a temporary folder of its own; what it wrote to ``answer`` there.

    The limit is one of processor time: on a busy machine no mutant is killed by a clock. One that only waits has ten
    times as long by the clock.
    """
    folder = Path(tempfile.mkdtemp(prefix="evit-mutant-"))
    begun = time.monotonic()
    process = os.fork()
    if not process:
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit)))
            silent = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(silent, number)
            tempfile.tempdir = str(folder)
            os.environ["TMPDIR"] = str(folder)
            work(folder / "answer")
        finally:
            os._exit(0)
    while not os.waitpid(process, os.WNOHANG)[0]:
        if time.monotonic() - begun > 10 * limit:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what its tests may have started
    answer = folder / "answer"
    content = answer.read_bytes() if answer.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    return content, time.monotonic() - begun


def _run(items: list[pytest.Item], folder: Path) -> Iterator[tuple[pytest.Item, bool, bool]]:
    """Runs tests, and says of each whether it failed and whether it was skipped."""
    from _pytest.runner import runtestprotocol

    factory = items[0].config._tmp_path_factory  # type: ignore[attr-defined]
    factory._basetemp, factory._given_basetemp = None, folder / "pytest"
    for item, after in zip(items, [*items[1:], None], strict=True):
        reports = runtestprotocol(item, log=False, nextitem=after)
        yield item, any(report.failed for report in reports), any(report.skipped for report in reports)


# ---- what tests reach


class _Tracer:
    def __init__(self, modules: list[str]) -> None:
        self.names = {str(ROOT / module): module for module in modules}
        self.lines: dict[str, set[int]] = {module: set() for module in modules}

    def _local(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self.lines[self.names[frame.f_code.co_filename]].add(frame.f_lineno)
        return self._local

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._local if frame.f_code.co_filename in self.names else None

    def __enter__(self) -> "_Tracer":
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def _noting(kept: dict[str, set[int]], tracer: _Tracer) -> None:
    """Notes what ran while something was made once, beside it, and reads that where it is not made again."""
    whole = shared.made_once

    def made_once(name: str, make: Callable[[Path], None]) -> Path:
        beside = shared.folder() / "reached" / name.replace("/", " ")
        beside.parent.mkdir(exist_ok=True)

        def noting(path: Path) -> None:
            before = {module: set(lines) for module, lines in tracer.lines.items()}
            for lines in tracer.lines.values():
                lines.clear()
            make(path)
            beside.write_text(json.dumps({module: sorted(lines) for module, lines in tracer.lines.items()}))
            for module, lines in before.items():
                tracer.lines[module] |= lines

        path = whole(name, noting)
        if beside.exists():
            for module, lines in json.loads(beside.read_text()).items():
                kept.setdefault(module, set()).update(lines)
        return path

    for module in list(sys.modules.values()):
        if getattr(module, "made_once", None) is whole:
            module.made_once = made_once  # type: ignore[attr-defined]


def _trace(item: pytest.Item, modules: list[str]) -> Reach:
    def work(answer: Path) -> None:
        kept: dict[str, set[int]] = {}
        with _Tracer(modules) as tracer:
            _noting(kept, tracer)
            begun = time.monotonic()
            _, failed, skipped = next(_run([item], answer.parent))
        reach = Reach(time.monotonic() - begun, not failed and not skipped, tracer.lines, kept)
        answer.write_bytes(msgspec.json.encode(reach))

    content, seconds = _aside(work, 300)
    return msgspec.json.decode(content, type=Reach) if content else Reach(seconds, False)


# ---- mutants


@functools.cache
def _functions(path: str) -> list[FunctionType]:
    """All functions of a module that are alive."""
    found = [one for one in gc.get_objects() if isinstance(one, FunctionType)]
    return [function for function in found if function.__code__.co_filename == path]


def _exchange(mutant: Mutant) -> None:
    """Puts the changed bodies of functions into all functions that are alive."""
    path = str(ROOT / mutant.module)
    new = {(code.co_qualname, code.co_firstlineno): code for code in codes(compile(mutant.source(), path, "exec"))}
    for function in _functions(path):
        code = new.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
        if code is not None and code != function.__code__:
            function.__code__ = code


class _Changed(importlib.abc.MetaPathFinder):
    """Imports the mutant in place of its module."""

    def __init__(self, mutant: Mutant) -> None:
        self.name = mutant.module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        path, source = str(ROOT / mutant.module), mutant.source()

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return compile(source, path, "exec")

        self.spec = importlib.util.spec_from_file_location(self.name, path, loader=Loader(self.name, path))

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        return self.spec if fullname == self.name else None


def _chosen(mutant: Mutant, reaches: dict[str, Reach], hot: bool, anew: bool) -> list[str]:
    """Tests that reach a mutant, the quickest first; with ``anew`` also those that do when all is made anew."""
    module, lines = mutant.module, _lines(mutant, hot)
    passed = {name: reach for name, reach in reaches.items() if reach.passed}
    kept = [name for name, reach in passed.items() if anew and lines & reach.kept.get(module, set())]
    reached = [name for name, reach in passed.items() if lines & reach.lines.get(module, set())]
    turns: dict[str, int] = {}
    order = []
    for name in sorted({*reached, *kept}, key=lambda name: passed[name].seconds):
        function = name.split("[")[0]
        order.append((turns.setdefault(function, 0), passed[name].seconds, name))
        turns[function] += 1
    total, chosen = 0.0, []
    for _, seconds, name in sorted(order):  # one case of each test before the second of any
        if total + seconds <= SECONDS or not chosen:
            total += seconds
            chosen.append(name)
    return chosen


def _lines(mutant: Mutant, hot: bool) -> set[int]:
    """Lines that a mutant may change: of its statement, or of the module."""
    return set(statement(mutant.module, mutant.line)) if hot else set(range(1 << 14))


def _in_shared(mutant: Mutant) -> bool:
    """Whether what the tests share was made with the lines of a mutant."""
    lines = _lines(mutant, hot=True)
    files = (shared.folder() / "reached").iterdir()
    return any(lines & set(json.loads(file.read_text()).get(mutant.module, [])) for file in files)


def _anew(mutant: Mutant, hot: bool) -> None:
    """Gives this process a shared folder of its own, with what was made before without the lines of a mutant."""
    old, new = shared.folder(), Path(tempfile.mkdtemp(prefix="evit-tests-"))
    lines = _lines(mutant, hot)
    reached = {file.name: json.loads(file.read_text()).get(mutant.module, []) for file in (old / "reached").iterdir()}
    stale = {name for name, found in reached.items() if lines & set(found)}
    if any(name.endswith(".onnx") for name in stale):  # what is made of an export is made anew with it
        stale = set(reached)
    for name in sorted(reached.keys() - stale):
        for place in (f"state/{name}", f"reached/{name}", name.replace(" ", "/")):
            (new / place).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (old / place).is_dir() else shutil.copy
            copy(old / place, new / place)
    os.environ[shared.FOLDER] = str(new)
    shared.folder.cache_clear()


def _judge(mutant: Mutant, chosen: list[str], reaches: dict[str, Reach], work: Callable[[Path], None]) -> Result:
    if not chosen:
        return Result(mutant.key, mutant.module, "unreached", 0.0, 0)
    usual = sum(reaches[name].seconds for name in chosen)
    content, seconds = _aside(work, 45 + 4 * usual)
    outcome, by = ("timeout", "") if content is None else content.decode().split(" ", 1)
    return Result(mutant.key, mutant.module, outcome, round(seconds, 2), len(chosen), by)


class Hot:
    """Pytest's loop: traces what tests reach, then runs them against mutants of function bodies."""

    def __init__(self, modules: list[str], mutants: list[Mutant], folder: Path) -> None:
        self.modules, self.mutants, self.folder = modules, mutants, folder

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        file = self.folder / "reach.json"
        reaches = msgspec.json.decode(file.read_bytes(), type=dict[str, Reach]) if file.exists() else {}
        items = {item.nodeid: item for item in session.items}
        files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {item.path for item in items.values()}}
        new = [item for name, item in items.items() if name not in reaches or reaches[name].of != files[item.path]]
        for number, item in enumerate(new):
            reach = reaches[item.nodeid] = _trace(item, self.modules)
            reach.of = files[item.path]
            if number % 20 == 19 or number == len(new) - 1:
                file.write_bytes(msgspec.json.encode(reaches))
                print(f"traced {number + 1} of {len(new)} tests", flush=True)
            if not reach.passed:
                print(f"left out: {item.nodeid} ({reach.seconds:.1f} s)", flush=True)
        reaches = {name: reach for name, reach in reaches.items() if name in items}
        for module in self.modules:
            _functions(str(ROOT / module))
        gc.collect()
        gc.freeze()  # so that forked processes share what is here
        gc.disable()
        killers: dict[str, list[str]] = {}
        for mutant in self.mutants:
            if not within_functions(mutant):
                continue
            known = killers.setdefault(mutant.module, [])
            usual = _chosen(mutant, reaches, hot=True, anew=False)
            quick = [name for name in known if name in usual and reaches[name].seconds < 1]
            usual = list(dict.fromkeys([*quick[:5], *usual]))
            result = _judge(mutant, usual, reaches, self._work(mutant, [items[name] for name in usual], False))
            if result.by:
                killers[mutant.module] = list(dict.fromkeys([result.by, *known]))
            elif result.outcome != "timeout":  # it may show in what the tests share, once that is made anew
                every = _chosen(mutant, reaches, hot=True, anew=True)
                if _in_shared(mutant):
                    result = _judge(mutant, every, reaches, self._work(mutant, [items[n] for n in every], True))
            note(self.folder, result)
        return True

    def _work(self, mutant: Mutant, items: list[pytest.Item], anew: bool) -> Callable[[Path], None]:
        def work(answer: Path) -> None:
            if anew:
                _anew(mutant, hot=True)
            _exchange(mutant)
            found = next((item.nodeid for item, failed, _ in _run(items, answer.parent) if failed), None)
            answer.write_text(f"killed {found}" if found else "survived ")

        return work


class _First:
    """Notes the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")


def cold(mutant: Mutant, folder: Path) -> Result:
    """Runs the tests of a module against a mutant of it that is imported in its place."""
    reaches = msgspec.json.decode((folder / "reach.json").read_bytes(), type=dict[str, Reach])
    chosen = _chosen(mutant, reaches, hot=False, anew=True)

    def work(answer: Path) -> None:
        _anew(mutant, hot=False)
        sys.meta_path.insert(0, _Changed(mutant))
        first = _First()
        options = [*OPTIONS, "-x", "--basetemp", str(answer.parent / "pytest")]
        code = pytest.main([*options, *chosen], plugins=[first])
        answer.write_text("survived " if code == 0 else f"killed {first.failed or 'collection'}")

    return _judge(mutant, chosen, reaches, work)


def note(folder: Path, result: Result) -> None:
    """Adds a result to those of a run."""
    with (folder / "results.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(result) + b"\n")


def judge(mutants: list[Mutant], modules: list[str], tests: list[str], folder: Path) -> None:
    """Runs tests against mutants; what becomes of each is added to ``results.jsonl``.

    Args:
        mutants: In the order in which to try them.
        modules: Those that may be mutated.
        tests: Files of tests.
        folder: Of this run; another run with the same goes on with it.
    """
    for name in HEAVY:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    assert "evit_deploy" not in sys.modules
    os.environ[shared.FOLDER] = str(folder / "shared")
    (folder / "shared").mkdir(exist_ok=True)
    process = os.fork()
    if not process:
        code = 1
        try:
            code = pytest.main([*OPTIONS, *tests], plugins=[Hot(modules, mutants, folder)])
        finally:
            os._exit(code)
    if os.waitpid(process, 0)[1]:
        raise SystemExit("the tests could not be collected or traced")
    for mutant in mutants:
        if not within_functions(mutant):
            note(folder, cold(mutant, folder))
