"""Runs all measurements that need a GPU, most important first, each part in a process with a deadline.

python tests/benchmarks/gpu_suite.py --budget 520 --out DIR

EVIT_DEPLOY_KERNEL names the kernel library; several can be compared with --library new=PATH --library old=PATH, and
PyTorch's models use the first. libevit_token_reorg_host.so and token_reorg_cases_gpu must be next to it; gpu_bundle.sh
prepares all of this. The suite writes to DIR: rows.jsonl (every row immediately, so that a killed run keeps them),
gpu_suite.json (all rows by part), log.txt and table.txt. gpu_results.py writes them to docs/results-gpu.md. --dry-run
runs every part at toy size on the CPU.

Exit codes: 0 if all requested parts ran, 1 if a part was cut short or not run, 2 usage, 3 no GPU, 130 interrupted.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from gpu.parts import BESIDE, NAMES, PARTS, PROBE, WARM_UP, Part, groups
from gpu.programs import programs
from gpu.rows import append, read
from gpu.tables import table

ROOT = Path(__file__).parents[2]
CLOSING = 4.0
"""Seconds reserved for the table."""
MOST_PROGRAMS = 8
"""Number of programs compiled ahead in parallel."""
COMPILE_THREADS = "4"
"""Of each of them: Inductor would start as many as there are cores. What it caches does not depend on that."""


class Interrupted(BaseException):
    """A signal requests the suite to end."""


class Process:
    """A process in a separate process group, which waits for a message before it starts.

    It exits when its standard input is closed, so that it never outlives the suite.

    Args:
        suite: The suite that owns it.
        name: Name of the part.
        target: ``module:function`` in ``gpu``.
        argument: Argument of the function; "" for none.
    """

    def __init__(self, suite: "Suite", name: str, target: str, argument: str = "") -> None:
        options = suite.options
        command = [sys.executable, __file__, "--child", name, "--target", target, "--out", str(options.out)]
        command += ["--argument", argument, *(["--dry-run"] if options.dry_run else [])]
        command += [part for name, path in suite.libraries.items() for part in ("--library", f"{name}={path}")]
        first = next(iter(suite.libraries.values()), None)
        environment = os.environ | {"EVIT_DEPLOY_KERNEL": str(first) if first else "none", "PYTHONUNBUFFERED": "1"}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if target == WARM_UP:
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = COMPILE_THREADS
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
        command += ["--scratch", str(self.scratch)]
        with (options.out / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, process_group=0
            )

    def begin(self, seconds: float) -> None:
        """Sends the start message, with the time limit."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; see its exit code
            self.process.stdin.write(f"{seconds}\n".encode())
            self.process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Its exit code; ``None`` if it is still running after the timeout."""
        try:
            return self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        """Kills the rest of its process group, and removes its folder."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):  # it never read the message
                self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Suite:
    """A run: its parts, files and running processes.

    Args:
        options: Options of the command line.
        parts: Parts to run, in order.
        libraries: Kernel libraries by name.
    """

    def __init__(self, options: argparse.Namespace, parts: list[Part], libraries: dict[str, Path]) -> None:
        self.options, self.parts, self.libraries = options, parts, libraries
        self.started, self.begun = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        self.rows_path, self.log_path = options.out / "rows.jsonl", options.out / "log.txt"
        self.states: dict[str, dict[str, Any]] = {part.name: {"state": "not run"} for part in parts}
        self.running: list[Process] = []
        self.ahead: dict[Process, str] = {}
        self.programs: list[str] = []
        self.compiled: set[str] = set()
        self.refused: dict[str, str] = {}

    @property
    def left(self) -> float:
        """Seconds of the budget left for parts."""
        return self.options.budget - CLOSING - (time.monotonic() - self.started)

    def start(self, part: Part) -> Process:
        """Starts a part's process, which imports its modules and waits."""
        process = Process(self, part.name, part.target)
        self.running.append(process)
        return process

    def finish(self, process: Process) -> None:
        """Ends a started process."""
        process.end()
        self.ahead.pop(process, None)
        if process in self.running:
            self.running.remove(process)

    def probe(self) -> int:
        """Checks for a GPU and for libraries that run on it; returns an exit code, 0 to continue."""
        process = self.start(PROBE)
        process.begin(PROBE.seconds)
        code = process.wait(PROBE.seconds)
        self.finish(process)
        if code:
            print(_tail(self.log_path), file=sys.stderr)
            return code
        rows = [row for row in read(self.rows_path) if row["part"] == PROBE.name]
        if code is None or not rows:
            print(f"gpu_suite: the GPU does not answer\n{_tail(self.log_path)}", file=sys.stderr)
            return 3
        self.refused = rows[-1]["refused"]
        for name, reason in self.refused.items():
            print(f"the library {name} does not run here: {reason}", flush=True)
            del self.libraries[name]
        return 0

    def run(self) -> None:
        """Runs all parts within the budget; time left by one is divided among those that follow."""
        waiting: list[Process] = []
        rest = groups(self.parts)
        while rest:
            group, *rest = rest
            processes, waiting = waiting or [self.start(part) for part in group], []
            if self.left < min(5, *(part.seconds for part in group)):
                waiting = processes
                break
            self._background(group, rest)
            wanted = sum(max(part.seconds for part in parts) for parts in (group, *rest))
            scale = max(1.0, 0.95 * self.left / wanted)
            waiting = [self.start(part) for part in rest[0]] if rest else []
            self._run_group(dict(zip(group, processes, strict=True)), scale)
            self.write()
            for part in group:
                words = _words(self.states[part.name])
                print(f"{part.number:>2} {part.name}: {words}; {self.left:.0f} s left", flush=True)
        for process in waiting:
            self.finish(process)
        self._stop_background()

    def _run_group(self, group: dict[Part, Process], scale: float) -> None:
        """Runs parts in parallel, each until its deadline."""
        begun, ends = time.monotonic(), {}
        for part, process in group.items():
            append(self.log_path, f"==== {part.name}")
            seconds = min(part.seconds * scale, self.left)
            ends[part] = begun + min(seconds + self.options.grace, max(self.left, 1))
            self.states[part.name] |= {"state": "interrupted", "seconds": None}
            process.begin(seconds)
        while ends:
            self._refill()
            for part, end in list(ends.items()):
                code = group[part].wait(min(0.3, end - time.monotonic()))
                if code is not None or time.monotonic() >= end:
                    self.finish(group[part])
                    self._note(part, code, begun, ends.pop(part))

    def _note(self, part: Part, code: int | None, begun: float, end: float) -> None:
        state = self.states[part.name]
        state["seconds"] = round(time.monotonic() - begun, 1)
        if code is None:
            state["state"] = f"ended at its deadline of {end - begun:.0f} s"
        elif code:
            state["state"] = f"failed: {_tail(self.log_path, 300)}" if code > 0 else f"ended by signal {-code}"
        else:
            state["state"] = "done"

    def _background(self, group: list[Part], rest: list[list[Part]]) -> None:
        """Compiles ahead while parts without timing run; timed parts run alone."""
        if all(part.name in BESIDE for part in group):
            following = {part.name for parts in rest for part in parts} if self.options.warm_up else set()
            known = self.compiled | set(self.ahead.values())
            self.programs = [name for name in programs(following, toy=self.options.dry_run) if name not in known]
            return
        # Wait for those that are nearly done: the part itself would compile them one by one.
        end = time.monotonic() + min(self.options.warm_up_wait, self.left / 10)
        while (self.ahead or self.programs) and time.monotonic() < end:
            self._refill()
            time.sleep(0.2)
        self._stop_background()

    def _refill(self) -> None:
        for process, name in list(self.ahead.items()):
            if (code := process.process.poll()) is not None:
                self.compiled.add(name)
                if code != 0:
                    print(f"   not compiled ahead (exit {code}): {name}", flush=True)
                self.finish(process)
        while self.programs and len(self.ahead) < MOST_PROGRAMS:
            name = self.programs.pop(0)
            process = Process(self, "warm-up", WARM_UP, name)
            process.begin(300)
            self.ahead[process] = name

    def _stop_background(self) -> None:
        for process, name in list(self.ahead.items()):
            print(f"   not compiled ahead: {name}", flush=True)
            self.finish(process)
        self.programs = []

    def end_all(self) -> None:
        """Ends all running processes."""
        self._stop_background()
        for process in list(self.running):
            self.finish(process)

    def write(self) -> dict[str, Any]:
        """Writes all results as one document, atomically."""
        rows = read(self.rows_path)
        document = {
            "command": " ".join(["python", *sys.argv]), "begun": self.begun, "budget": self.options.budget,
            "seconds": round(time.monotonic() - self.started, 1), "dry run": self.options.dry_run,
            "libraries": {name: path.name for name, path in self.libraries.items()}, "refused": self.refused,
            "parts": [
                {"number": part.number, "name": part.name, "settles": part.settles, **self.states[part.name],
                 "rows": [{k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part.name]}
                for part in self.parts
            ],
        }  # fmt: skip
        partial = self.options.out / "gpu_suite.json.part"
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.options.out / "gpu_suite.json")
        return document

    def close(self) -> int:
        """Writes everything and prints the table; returns the exit code."""
        document = self.write()
        text = table(document)
        (self.options.out / "table.txt").write_text(text, encoding="utf-8")
        print(text, flush=True)
        return 0 if all(state["state"] == "done" for state in self.states.values()) else 1


def _tail(path: Path, characters: int = 2000) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return " / ".join(line.strip() for line in text[-characters:].splitlines()[-12:] if line.strip())


def _words(state: dict[str, Any]) -> str:
    return f"{state['state']} ({state['seconds']} s)" if state.get("seconds") is not None else state["state"]


# ---- a part's own process


def child(options: argparse.Namespace, libraries: dict[str, Path]) -> None:
    """Imports the part, waits for the start message and runs it; ends when the suite does."""
    import gc
    import importlib
    import threading

    sys.path.insert(0, str(ROOT))
    import torch

    module, _, function = options.target.partition(":")
    run = getattr(importlib.import_module(f"gpu.{module}"), function)
    from gpu.device import DEVICES
    from gpu.job import Job
    from gpu.rows import Rows

    word = sys.stdin.readline()
    if not word:
        return
    threading.Thread(target=_end_with_the_suite, daemon=True).start()
    gc.collect()
    gc.freeze()  # imported objects stay: each collection before a CUDA graph would traverse them again
    rows = Rows(options.out / "rows.jsonl", options.child, float(word))
    if options.dry_run:
        torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # as in our runtimes and training, and in the official code
    device = DEVICES["cpu" if options.dry_run else "cuda"]()
    job = Job(rows, device, options.dry_run, libraries, options.scratch)
    with _on_the_cpu(libraries) if options.dry_run and options.child != PROBE.name else nullcontext():
        run(job, *([options.argument] if options.argument else []))


def _on_the_cpu(libraries: dict[str, Path]) -> AbstractContextManager[None]:
    """Lets a dry run use the kernels of the host library, if there is one, as on a GPU."""
    from evit_deploy.tokens.operators import torch_ops
    from evit_deploy.tokens.operators.kernel import TokenReorgKernel

    path = next(iter(libraries.values()), None)
    return nullcontext() if path is None else torch_ops.using(TokenReorgKernel(path), "cpu")


def _end_with_the_suite() -> None:
    os.read(0, 1)  # not sys.stdin, whose lock must not be held by a thread at exit
    os.killpg(0, signal.SIGKILL)


# ---- the command line


def _library(text: str) -> tuple[str, Path]:
    name, _, path = text.rpartition("=")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(
            f"{path}: no such library; gpu_bundle.sh or evit-deploy plugin build makes one"
        )
    return name or "kernel", Path(path).resolve()


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in NAMES:
            known = ", ".join(part.name for part in PARTS if not part.hidden)
            raise argparse.ArgumentTypeError(f"no part is called {name!r}; there are {known}")
    return names


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=520, help="seconds for everything [default: 520]")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--only", type=_names, metavar="PART,...", help="these parts, in this order")
    parser.add_argument("--skip", type=_names, metavar="PART,...", default=[])
    parser.add_argument("--list", action="store_true", help="the parts, what they settle and take")
    parser.add_argument("--dry-run", action="store_true", help="every part at toy size on the CPU")
    parser.add_argument("--library", type=_library, action="append", metavar="NAME=PATH", help="kernel library")
    parser.add_argument(
        "--grace", type=float, default=12, help="seconds a part gets beyond its own, to finish a row [default: 12]"
    )
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false", help="compile nothing ahead")
    parser.add_argument(
        "--warm-up-wait", type=float, default=20, metavar="SECONDS",
        help="how long to wait for what is being compiled ahead before a part that is timed [default: 20]",
    )  # fmt: skip
    for name in ("--child", "--target", "--argument"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget <= 0:
        parser.error(f"argument --budget: {options.budget:g} seconds, expected more than 0")
    if not options.list and options.out is None:
        parser.error("--out DIR is needed")
    told = os.environ.get("EVIT_DEPLOY_KERNEL", "none")
    if options.library is None and told != "none":
        try:
            options.library = [_library(told)]
        except argparse.ArgumentTypeError as error:
            parser.error(f"EVIT_DEPLOY_KERNEL: {error}")
    return options


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(signal.Signals(number).name)


def main() -> int:
    options = _options()
    libraries = dict(options.library or [])
    if options.child:
        child(options, libraries)
        return 0
    parts = [NAMES[name] for name in options.only] if options.only else [part for part in PARTS if not part.hidden]
    parts = [part for part in parts if part.name not in options.skip]
    if options.list:
        for part in parts:
            print(f"{part.number:>2} {part.name:10} {part.seconds:4} s  {part.settles}")
        print(f"{sum(part.seconds for part in parts):18} s")
        return 0
    options.out = options.out.resolve()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in ("rows.jsonl", "log.txt", "table.txt", "gpu_suite.json"):
            (options.out / name).unlink(missing_ok=True)
    except OSError as error:
        print(f"gpu_suite: nothing can be written to --out {options.out} ({error.strerror})", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    suite = Suite(options, parts, libraries)
    try:
        if code := suite.probe():
            return code
        suite.run()
        return suite.close()
    except Interrupted as error:
        print(f"interrupted by {error}", flush=True)
        suite.end_all()
        suite.close()
        return 130
    finally:
        suite.end_all()


if __name__ == "__main__":
    sys.exit(main())
