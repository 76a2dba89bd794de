"""What all tests share: one thread, the processes they run in, what is said of those left out, and ``--require``."""

import importlib.metadata
import os
from collections.abc import Iterator, Sequence

import hypothesis
import pytest
import torch

from tests.support import shared
from tests.support.exporter import export_once

torch.set_num_threads(1)
# The same examples on every run and machine: a test that fails here fails everywhere.
hypothesis.settings.register_profile("evit_deploy", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("evit_deploy")

pytest_plugins = [
    "pytester",
    "tests.support.browser",
    "tests.support.models",
    "tests.support.command_line",
    "tests.support.compared",
    "tests.support.cpp_example",
    "tests.support.labeled_images",
    "tests.support.logs",
    "tests.support.machines",
    "tests.support.openvino_model",
    "tests.support.packages",
    "tests.support.triton_models",
]

PACKAGES = ("torch", "timm", "onnx", "onnxruntime")
PROCESSES = 4  # at most: each takes 1.5 GB
DESELECTED = pytest.StashKey[int]()


@pytest.fixture(scope="session", autouse=True)
def exported_once() -> Iterator[None]:
    """Nothing is exported twice in a test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", export_once)
        yield


# ---- processes, and tests that are left out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All tests run in a process a core; those named on the command line in this one, where they begin at once."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(len(os.sched_getaffinity(0)), PROCESSES) if whole else 0


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    if items:
        config = items[0].config
        config.stash[DESELECTED] = config.stash.get(DESELECTED, 0) + len(items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # in a process of pytest-xdist, which says nothing of these itself
        session.config.workeroutput["deselected"] = session.config.stash.get(DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    if "deselected" in getattr(node, "workeroutput", {}):
        node.config.stash[DESELECTED] = node.workeroutput["deselected"]  # each process has collected them all


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count, chosen = config.stash.get(DESELECTED, 0), config.option.markexpr
    if count and chosen and not config.option.keyword:
        terminalreporter.write_line(f"{count} deselected by -m {chosen!r}; pytest -m '' runs all", yellow=True)


# ---- --require


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="MARKER,MARKER",
        help="a skipped test with one of these markers is a failure, so that a job cannot pass by skipping",
    )


def _required(config: pytest.Config) -> set[str]:
    return {name for name in config.getoption("--require").split(",") if name}


def pytest_configure(config: pytest.Config) -> None:
    shared.folder()  # before there are other processes
    known = {line.split(":")[0].split("(")[0].strip() for line in config.getini("markers")}
    unknown = _required(config) - known
    if unknown:
        raise pytest.UsageError(f"--require: no such marker: {', '.join(sorted(unknown))}")


def pytest_report_header() -> str:
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return ", ".join(versions)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    markers = sorted(_required(item.config).intersection(mark.name for mark in item.iter_markers()))
    if markers and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} is required ({', '.join(markers)}) and was skipped: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    required = _required(collector.config)
    if required and report.skipped:  # nobody can tell which markers a file has that was skipped while it was imported
        report.outcome = "failed"
        report.longrepr = (
            f"{collector.nodeid} was skipped as a whole under --require {','.join(sorted(required))}: {_reason(report)}"
        )
    return report
