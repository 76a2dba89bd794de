"""The parts of the suite, most important first; a part's module is only imported in its own process."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        number: Its position in the table; the background part has none.
        name: Its name for ``--only``.
        seconds: Time limit; rows that would exceed it are left out.
        settles: The question that it answers.
        target: ``module:function`` in this package.
        hidden: Whether it is only for tests.
    """

    number: str
    name: str
    seconds: int
    settles: str
    target: str
    hidden: bool = False


PARTS = (
    Part("0", "ceilings", 12, "versions, clocks; copy, GEMM, an empty node, host to device", "ceilings:measure"),
    Part("1", "truth", 30, "the kernel against the oracle and the host library's bits", "truth:check_bits"),
    Part("2", "capture", 10, "the same in a CUDA graph, on two streams", "truth:check_capture"),
    Part("3", "sanitizers", 60, "memcheck on all cases, the other tools on a subset", "sanitizers:check"),
    Part("4", "bandwidth", 75, "the kernel against copy, PyTorch and an empty node", "bandwidth:measure"),
    Part("5", "inference", 95, "DeiT-S reduced against dense and slice, in CUDA graphs", "inference:measure_graphs"),
    Part("6", "paper", 42, "the paper's protocol: TF32, eager, batch 128", "inference:measure_paper"),
    Part("7", "larger", 12, "DeiT-B at 128, ViT-L at 384 pixels", "inference:measure_larger"),
    Part("8", "training", 60, "a training step in BF16 at batch 256", "training:measure"),
    Part("9", "tests", 150, "pytest -m gpu", "product:run_tests"),
    Part("10", "commands", 150, "the command line as a user meets it", "product:run_commands"),
    Part("11", "profile", 20, "where the time of a forward pass goes, kernel by kernel", "profiling:measure"),
    Part("12", "methods", 60, "every method on DeiT-S against dense and slices, in CUDA graphs", "methods:measure"),
    Part("-", "hang", 2, "a part that hangs", "faults:hang", hidden=True),
    Part("-", "faulty", 5, "rows that run out of memory, fail, and go on", "faults:fail", hidden=True),
    Part("-", "missing", 5, "a part that cannot be imported", "nowhere:run", hidden=True),
    Part("-", "crash", 5, "a part whose process is ended", "faults:crash", hidden=True),
)
NAMES = {part.name: part for part in PARTS}

PROBE = Part("-", "probe", 90, "whether there is a GPU, and which libraries run on it", "probe:look", hidden=True)
"""Runs before all others."""
WARM_UP = "warm_up:compile_ahead"
"""Runs in the background during these parts, which are not timed:"""
BESIDE = ("truth", "capture", "sanitizers")
TOGETHER = ("tests", "commands")
"""Run in parallel if one directly follows the other."""


def groups(parts: list[Part]) -> list[list[Part]]:
    """The parts in order, with parallel ones grouped."""
    found: list[list[Part]] = []
    for part in parts:
        if found and part.name in TOGETHER and found[-1][-1].name in TOGETHER:
            found[-1].append(part)
        else:
            found.append([part])
    return found
