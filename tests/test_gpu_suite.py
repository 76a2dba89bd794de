"""The suite for a GPU, dry: every part on the CPU, and what must not end a run on a borrowed machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support import plugin_builds
from tests.support.paths import ROOT

SUITE, RESULTS = (ROOT / "tests" / "benchmarks" / name for name in ("gpu_suite.py", "gpu_results.py"))
PARTS = ["ceilings", "truth", "capture", "sanitizers", "bandwidth", "inference", "paper", "larger", "training", "tests",
         "commands", "profile", "methods"]  # fmt: skip


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SUITE), *map(str, arguments)]


def run(*arguments: object, kernel: Path | str = "none", timeout: float = 500) -> subprocess.CompletedProcess:
    environment = os.environ | {"EVIT_DEPLOY_KERNEL": str(kernel)}
    environment.pop("EVIT_DEPLOY_CASES_GPU", None)
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment, timeout=timeout)


def parts_of(folder: Path) -> dict[str, dict]:
    return {part["name"]: part for part in json.loads((folder / "gpu_suite.json").read_text())["parts"]}


def is_gone(process: int) -> bool:
    """Whether a process has ended, within a few seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.cpp
@pytest.mark.timeout(900)
def test_every_part_runs_dry_and_becomes_a_section_of_the_results(tmp_path):
    plugin_builds.need("cmake", "g++")
    built = plugin_builds.build("-DEVIT_CUDA=OFF", targets=("evit_token_reorg_host", "token_reorg_cases"))
    out = tmp_path / "out"
    library = built / "libevit_token_reorg_host.so"
    done = run("--dry-run", "--budget", 2400, "--out", out, kernel=library, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert len(done.stdout) < 12_000
    parts = parts_of(out)
    assert list(parts) == PARTS
    assert {name: part["state"] for name, part in parts.items() if part["state"] != "done"} == {}
    lost = [row for part in parts.values() for row in part["rows"] if {"failed", "skipped", "left_out"} & set(row)]
    assert lost == []
    wrong = [row for part in parts.values() for row in part["rows"] if row.get("wrong") or row.get("exit")]
    assert wrong == []
    assert sum(row.get("wrong") in ([], 0) for name in PARTS[1:4] for row in parts[name]["rows"]) >= 15 + 9 + 5
    reduced, both = {"0.9", "0.7", "0.5"}, {"token_reorg": 3, "class_scores": 3}
    for row in parts["inference"]["rows"]:  # compiled rows too
        assert row["kernel calls"] == {name: both if name in reduced else {} for name in row["ms"]}
    for row in parts["profile"]["rows"]:  # four blocks, of which three reduce
        assert {name: row["calls"][name] > 0 for name in ("GEMM", "attention", "layer norm", "GELU")} == dict.fromkeys(
            ("GEMM", "attention", "layer norm", "GELU"), True
        )
        assert (row["calls"]["score row"] > 0) == (row["variant"] in ("0.7", "0.5"))
        assert (row["calls"]["reorganization"] > 0) == (row["variant"] != "dense")
        assert sum(layer["calls"] for name, layer in row["linear"].items() if name.startswith("fc1")) == 4
    assert {row["name"] for row in parts["commands"]["rows"]} == {"doctor", "convert", "run", "verify", "profile"}
    assert "cases and batches right" in done.stdout

    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "results-gpu.md", docs)
    write = [sys.executable, str(RESULTS), str(out), "--docs", str(docs)]
    refused = subprocess.run(write, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "a dry run, whose figures mean nothing" in refused.stderr
    for _ in range(2):  # the second time it replaces what the first one wrote
        subprocess.run([*write, "--dry-run"], check=True)
    page = (docs / "results-gpu.md").read_text()
    assert page.count("| goal | wanted | measured |") == 1
    assert "| training step at 0.7, eager | at least 1.4 |" in page
    assert page.startswith("# Results: GPUs\n")
    assert page.endswith("<!-- gpu_results.py: end -->\n")
    stored = json.loads((docs / "results" / "gpu_suite.json").read_text())
    assert [part["name"] for part in stored["parts"]] == PARTS


@pytest.mark.slow
def test_what_fails_hangs_or_dies_does_not_stop_the_rest(tmp_path):
    broken = tmp_path / "libevit_token_reorg.so"
    broken.write_bytes(b"\x7fELF")
    arguments = "--dry-run", "--only", "bandwidth,faulty,missing,crash,hang,ceilings", "--budget", 60, "--grace", 1000
    done = run(*arguments, "--library", f"broken={broken}", "--out", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "the library broken does not run here: " in done.stdout
    assert "not a library that evit-deploy built" in done.stdout
    parts = parts_of(tmp_path)
    assert parts["bandwidth"]["rows"] == [{"failed": "no kernel library runs here"}]
    assert parts["faulty"]["state"] == "done"
    assert parts["faulty"]["rows"] == [
        {"batch": 1, "milliseconds": 1.0}, {"batch": 8, "skipped": "out of memory"},
        {"batch": 64, "failed": "RuntimeError: not this one"}, {"batch": 128, "milliseconds": 1.0},
    ]  # fmt: skip
    assert parts["crash"]["state"] == f"ended by signal {signal.SIGSEGV.value}"
    assert parts["crash"]["rows"] == [{"batch": 1}]
    assert "No module named 'gpu.nowhere'" in parts["missing"]["state"]
    assert parts["hang"]["state"].startswith("ended at its deadline of ")
    assert is_gone(parts["hang"]["rows"][0]["child"])
    assert parts["ceilings"]["state"] == "not run"
    assert parts["ceilings"]["rows"] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_what_was_measured_before_an_interruption_is_kept(tmp_path, number):
    started = subprocess.Popen(
        command("--dry-run", "--only", "faulty,hang", "--out", tmp_path), stdout=subprocess.PIPE, text=True
    )
    rows = tmp_path / "rows.jsonl"
    for _ in range(1200):
        if rows.is_file() and '"child"' in rows.read_text():
            break
        time.sleep(0.1)
    (row,) = [json.loads(line) for line in rows.read_text().splitlines() if '"child"' in line]
    started.send_signal(number)
    said = started.communicate(timeout=60)[0]
    assert is_gone(row["child"])
    if number == signal.SIGKILL:
        assert started.returncode == -signal.SIGKILL
    else:
        assert started.returncode == 130
        assert f"interrupted by {number.name}" in said
        assert "## parts" in said
        parts = parts_of(tmp_path)
        assert (parts["faulty"]["state"], parts["hang"]["state"]) == ("done", "interrupted")
        assert len(parts["faulty"]["rows"]) == 4
    assert sum('"faulty"' in line for line in rows.read_text().splitlines()) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path)
    assert done.returncode == 3
    assert "CUDA" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("count", [4, 40, 400])
def test_the_table_fits_the_end_of_a_log(monkeypatch, count):
    monkeypatch.syspath_prepend(SUITE.parent)
    from gpu.tables import table

    one, batches = [1.0, 0.9, 1.1], (1, 8, 64, 128)
    rows = [
        {"dtype": "fp16", "candidates": 196, "channels": 384, "batch": batches[i % 4], "again": False,
         "megabytes": 1.0, "microseconds": {"kernel": 5.0, "eager": 50.0, "copy": 4.0, "empty node": 1.0},
         "of copy": {"kernel": one}, "eager over kernel": one}
        for i in range(count)
    ]  # fmt: skip
    rest = [
        {"check": "cases", "library": "kernel", "dtype": "fp16", "wrong": [f"{'wrong ' * 20}{i}"]} for i in range(99)
    ]
    named = {"bandwidth": rows, "truth": rest if count == 400 else []}
    parts = [
        {"number": "0", "name": name, "state": "done", "seconds": 1.0, "rows": these} for name, these in named.items()
    ]
    text = table({"parts": parts, "dry run": False, "refused": {}, "begun": "today", "seconds": 1.0})
    assert 1000 < len(text) < 12_000
    assert ("cut off here" in text) == (count == 400)
    assert text.splitlines()[-1].split()[-2:] == ["not", "measured"]
    assert "kernel at batch 1, N 196, less two empty nodes" in text


def test_parts_run_in_the_order_asked_for_and_two_of_them_at_once(monkeypatch):
    monkeypatch.syspath_prepend(SUITE.parent)
    from gpu.parts import BESIDE, NAMES, groups

    def names(text: str) -> list[list[str]]:
        return [[part.name for part in group] for group in groups([NAMES[name] for name in text.split()])]

    together = names("commands tests training profile inference")
    assert together == [["commands", "tests"], ["training"], ["profile"], ["inference"]]
    assert names("tests paper commands") == [["tests"], ["paper"], ["commands"]]
    assert not set(together[0]) & set(BESIDE)  # they compile programs of their own, and have no time to spare


TRACE = [
    {"ph": "X", "cat": "user_annotation", "name": "evit|block|3 197", "ts": 10.0, "dur": 80.0, "args": {}},
    {"ph": "X", "cat": "user_annotation", "name": "evit|reorganization|", "ts": 20.0, "dur": 40.0, "args": {}},
    {"ph": "X", "cat": "user_annotation", "name": "evit|score row|", "ts": 30.0, "dur": 9.0, "args": {}},
    {"ph": "X", "cat": "user_annotation", "name": "evit|GEMM|fc1 139 800", "ts": 70.0, "dur": 9.0, "args": {}},
    {"ph": "X", "cat": "gpu_user_annotation", "name": "evit|GEMM|fc1 139 800", "ts": 0.0, "dur": 900.0, "args": {}},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "ts": 30.0, "dur": 5.0, "args": {"External id": 1}},
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    *(
        {"ph": "X", "cat": kind, "name": "cudaLaunchKernel", "ts": at, "dur": 1.0, "args": {"correlation": number}}
        for number, at, kind in ((1, 31.0, "cuda_runtime"), (2, 50.0, "cuda_driver"), (3, 71.0, "cuda_runtime"),
                                 (4, 85.0, "cuda_runtime"), (5, 95.0, "cuda_runtime"))
    ),
    {"ph": "X", "cat": "gpu_memset", "name": "Memset", "ts": 190.0, "dur": 2.0, "args": {"correlation": 5}},
    *(
        {"ph": "X", "cat": "kernel", "name": name, "ts": at, "dur": 7.0, "args": {"correlation": number}}
        for number, at, name in ((4, 130.0, "flash_fwd_kernel"), (3, 120.0, "nvjet_hsh"), (2, 110.0, "copy_gemm"),
                                 (1, 100.0, "vectorized_elementwise"), (9, 140.0, "sm90_xmma_gemm_f16"))
    ),
]  # fmt: skip


def test_a_kernel_is_what_the_innermost_range_around_its_launch_says_or_else_its_name(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SUITE.parent)
    from gpu.profiling import FORWARDS, kernels_of, sums

    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": TRACE}))
    kernels = kernels_of(tmp_path / "trace.json", on_cpu=False)
    assert [(kernel.kind, kernel.label, kernel.place) for kernel in kernels] == [
        ("score row", "", "3 197"), ("reorganization", "", "3 197"), ("GEMM", "fc1 139 800", "3 197"),
        ("attention", "", "3 197"), ("GEMM", "", ""), ("other", "", ""),
    ]  # fmt: skip
    found = sums(kernels * FORWARDS)
    assert found["microseconds"]["GEMM"] == 14.0
    assert found["calls"] | {"GEMM": 2, "other": 1} == found["calls"]
    assert found["linear"] == {"fc1 at 139": {"calls": 1, "microseconds": 7.0, "teraflops": 0.0}}
    assert found["attention"] == [{"block": 3, "tokens": 197, "microseconds": 7.0}]


def test_the_list_names_every_part():
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()[:-1]] == PARTS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--out DIR is needed"),
        (("--only", "speed", "--out", "x"), "no part is called 'speed'; there are ceilings, truth"),
        (("--library", "new=/nowhere.so", "--out", "x"), "/nowhere.so: no such library; gpu_bundle.sh"),
        (("--budget", "0", "--out", "x"), "--budget: 0 seconds, expected more than 0"),
        (("--out", "/dev/null/x"), "nothing can be written to --out /dev/null/x"),
    ],
)
def test_a_wrong_command_is_refused(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_the_variable_with_a_library_that_is_not_there_is_refused(tmp_path):
    done = run("--out", tmp_path, kernel="/nowhere.so")
    assert done.returncode == 2
    assert "EVIT_DEPLOY_KERNEL: /nowhere.so: no such library" in done.stderr


def test_a_run_that_was_killed_becomes_results_too_and_a_later_run_replaces_its_parts(tmp_path):
    def ceilings(folder: str, copy: float) -> Path:
        (tmp_path / folder).mkdir()
        begun = f"2026-11-2{int(folder == 'second')}T10:30:15+00:00"
        rows = [{"part": "probe", "gpu": "sm90", "refused": {}, "begun": begun},
                {"part": "ceilings", "what": "copy", "milliseconds": 1.0, "terabytes a second": copy}]  # fmt: skip
        if folder == "first":
            rows.append({"part": "tests", "exit": 0, "seconds": 1.0, "passed": 3})
            rows.append({"part": "ceilings", "what": "empty node", "microseconds": 0.75})
        else:
            rows.append({"part": "ceilings", "what": "empty node", "failed": "RuntimeError: no"})
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / folder / "rows.jsonl").write_text(f'{lines}{{"part": "cei')  # the last line was cut off
        return tmp_path / folder

    folders = ceilings("first", 1.25), ceilings("second", 2.75)
    shutil.copy(ROOT / "docs" / "results-gpu.md", tmp_path)
    done = subprocess.run(
        [sys.executable, str(RESULTS), *map(str, folders), "--docs", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "results-gpu.md").read_text()
    assert "| copy on the device, TB/s | 2.75 | 3.0 |" in page
    assert "| copy on the device, TB/s | 1.25 |" not in page
    assert "3 passed" in page
    before, second, first = page.split("### Ceilings\n\nRun of ")
    assert "| copy on the device, TB/s | 2.75 | 3.0 |" in second
    assert second.startswith("2026-11-21 10:30 UTC.\n")
    assert "empty node: failed: RuntimeError: no" in second
    assert "| empty node of a graph, µs | 0.75 |" in first  # what the later run did not measure
    assert first.startswith("2026-11-20 10:30 UTC: rows that the later run does not have.\n")
    assert "- Run of 2026-11-20 10:30 UTC, 0 s: ceilings, tests. " in before

    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([sys.executable, str(RESULTS), str(empty)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "nothing was measured there" in done.stderr
