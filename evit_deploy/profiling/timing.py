"""Timing of candidates: interleaving, clocks and batch sizes.

Ratios are computed from the same round and are medians over rounds. All figures of a row use one clock: on a GPU,
compute time (:mod:`evit_deploy.profiling.clocks.gpu_times`); on a CPU with one thread, that thread's CPU time, which
other load on the machine hardly affects; with more threads, wall time. The wall time of whole calls is also recorded.

Candidates on the CPU and on a GPU are interleaved separately: together there would be few rounds, since calls on the
CPU take up to a hundred times as long, and an idle GPU lowers its clocks.
"""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
import numpy as np

from evit_deploy.environment.nvidia import current_device
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.profiling.batch_sizes import sizes_for
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.gpu_clocks import Watch, summarize_states
from evit_deploy.profiling.clocks.gpu_times import measure_on_gpu
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, Times, in_turns, random_feeds
from evit_deploy.profiling.engine_times import Timed, block_report, latency_report, launch_notes, time_parts
from evit_deploy.profiling.server_load import CLIENTS, measure_load
from evit_deploy.profiling.speedup import hidden_gains, rows_of, verdict
from evit_deploy.progress import doing, in_stages, stage
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Report
from evit_deploy.runtimes.runner import EngineRunner, Runner
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.plan import TokenPlan

_LOG = logging.getLogger(__name__)

SETTLE = 0.02
"""Seconds to wait between calls with several threads, because PyTorch's threads keep spinning for milliseconds after a
call. On two cores at batch 1, the model measured after eager took 10 % longer than its slice twin, and 1 % with this
pause."""


class Group(msgspec.Struct, frozen=True):
    """Candidates that are timed interleaved.

    Args:
        candidates: The candidates.
        runners: Their opened runners.
        on_gpu: Whether they compute on a GPU.
    """

    candidates: list[Candidate]
    runners: list[Runner]
    on_gpu: bool

    @property
    def threads_tell(self) -> bool:
        """Whether CPU time is meaningful: a server's work is not in this process."""
        return not any(RUNTIMES.get(candidate.runtime).served for candidate in self.candidates)

    @property
    def engines(self) -> list[Timed]:
        """The candidates with timing of parts and layers."""
        pairs = zip(self.candidates, self.runners, strict=True)
        return [Timed(candidate, runner) for candidate, runner in pairs if isinstance(runner, EngineRunner)]


def measure_all(
    candidates: Sequence[Candidate],
    plan: TokenPlan | None,
    batch_sizes: Sequence[int] | None,
    *,
    threads: int | None,
    duration: float,
    minimum_rounds: int = MINIMUM_ROUNDS,
    required: frozenset[str] | None = None,
) -> Report:
    """Times all candidates, interleaved with those on the same kind of device, at every batch size.

    Args:
        candidates: The candidates.
        plan: Token plan of the reduced models; ``None`` if unknown.
        batch_sizes: Images per call; ``None`` for 1, 8 and 32, and on a GPU 128, as far as all engines cover them.
        threads: CPU threads.
        duration: Seconds for each batch size on each kind of device.
        minimum_rounds: Rounds to run even if that takes longer.
        required: Runtimes that must run; others that fail when opened are skipped with a note. ``None``: all.

    Raises:
        InputError: An engine does not cover a requested batch size, or has another input shape than its twin; nothing
            was measured.
        MissingRequirement: A runtime is not installed.
    """
    with ExitStack() as stack:
        groups, notes = open_all(stack, candidates, threads, required)
        sizes = []
        for group in groups:
            _check_images(group)
            sizes.append(sizes_for([runner.profiles for runner in group.runners], batch_sizes, on_gpu=group.on_gpu))
        report = Report(notes=tuple(notes))
        for group, own in zip(groups, sizes, strict=True):
            report += _measure_group(group, plan, own, threads, duration, minimum_rounds)
    return report


def measure_variants(
    variants: Sequence[tuple[Sequence[Candidate], TokenPlan]],
    batch_sizes: Sequence[int],
    threads: int | None,
    duration: float,
    minimum_rounds: int,
) -> list[Report]:
    """Times variants of one model interleaved on the CPU; their common dense twin is timed once.

    Args:
        variants: (candidates, token plan) of each variant. Dense twins on the same runtime must be equal.
        batch_sizes: Images per call.
        threads: CPU threads.
        duration: Seconds for each batch size.
        minimum_rounds: Rounds to run even if that takes longer.

    Returns:
        A report for each variant.

    Raises:
        MissingRequirement: A runtime is not installed.
    """
    everyone: list[Candidate] = []
    places: list[list[int]] = []
    twins: dict[str, int] = {}
    for candidates, _ in variants:
        own = []
        for candidate in candidates:
            place = twins.get(candidate.runtime) if candidate.variant == "dense" else None
            if place is None:
                place = len(everyone)
                everyone.append(candidate)
            if candidate.variant == "dense":
                twins[candidate.runtime] = place
            own.append(place)
        places.append(own)
    reports = [Report() for _ in variants]
    with ExitStack() as stack:
        (group,), _ = open_all(stack, everyone, threads, None)
        for batch in in_stages(batch_sizes):
            stage(_LOG, f"profiling batch {batch}")
            times = measure_on_cpu(group.runners, batch, duration, minimum_rounds, threads)
            for index, ((candidates, plan), own) in enumerate(zip(variants, places, strict=True)):
                rows = rows_of(candidates, plan, batch, [times[place] for place in own])
                reports[index] += Report(rows=tuple(rows))
    return [report + Report(notes=(*verdict(report.rows), *hidden_gains(report.rows))) for report in reports]


def open_all(
    stack: ExitStack, candidates: Sequence[Candidate], threads: int | None, required: frozenset[str] | None
) -> tuple[list[Group], list[str]]:
    """Opens the runner of every candidate.

    Args:
        stack: Exit stack that closes them.
        candidates: The candidates.
        threads: CPU threads.
        required: See :func:`measure_all`.

    Returns:
        The groups to interleave, and notes on skipped runtimes.

    Raises:
        InputError: A required runtime, or the only one, cannot run its artifact.
        MissingRequirement: A required runtime, or the only one, is not installed.
    """
    runners: dict[int, Runner] = {}
    failed: dict[str, InputError | MissingRequirement] = {}
    for index, candidate in enumerate(candidates):
        name = candidate.runtime
        try:
            if name not in failed:
                runners[index] = stack.enter_context(opened(name, candidate.artifact, threads))
        except (InputError, MissingRequirement) as error:
            if required is None or name in required:
                raise
            failed[name] = error
    taking_part = [index for index in runners if candidates[index].runtime not in failed]
    if failed and not taking_part:
        raise next(iter(failed.values()))
    groups = []
    for on_gpu in (False, True):
        own = [index for index in taking_part if candidates[index].on_gpu == on_gpu]
        if own:
            groups.append(Group([candidates[index] for index in own], [runners[index] for index in own], on_gpu))
    return groups, [f"{name} was not timed: {error}" for name, error in failed.items()]


def _check_images(group: Group) -> None:
    """Refuses twins with different input shapes, which cannot be compared."""
    first: dict[str, tuple[Candidate, list[tuple[int | None, ...]]]] = {}
    for candidate, runner in zip(group.candidates, group.runners, strict=True):
        taken = [spec.shape[1:] for spec in runner.inputs]
        other, wanted = first.setdefault(candidate.runtime, (candidate, taken))
        if taken != wanted:
            raise InputError(
                f"the {candidate.variant} takes different images than the {other.variant}", where=candidate.artifact,
                seen=taken, wanted=wanted, fix="Give the twin of this model.",
            )  # fmt: skip


def _measure_group(
    group: Group,
    plan: TokenPlan | None,
    sizes: Sequence[int],
    threads: int | None,
    duration: float,
    minimum_rounds: int,
) -> Report:
    report, engines = Report(), group.engines
    threads = threads if group.threads_tell else None
    with ExitStack() as stack:
        watch, notes = watched(stack) if group.on_gpu else (None, [])
        for batch in in_stages(sizes):
            stage(_LOG, f"profiling batch {batch}" + " on the GPU" * group.on_gpu)
            mark = len(watch.states) if watch else 0
            times = (
                measure_on_gpu(group.runners, random_feeds(group.runners, batch), duration, minimum_rounds)
                if group.on_gpu
                else measure_on_cpu(group.runners, batch, duration, minimum_rounds, threads)
            )
            report += Report(rows=tuple(rows_of(group.candidates, plan, batch, times)))
            for candidate, runner in zip(group.candidates, group.runners, strict=True):
                if RUNTIMES.get(candidate.runtime).served:
                    doing(_LOG, f"profiling batch {batch} with {CLIENTS} clients")
                    (feeds,) = random_feeds([runner], batch)
                    report += Report(load=(measure_load(candidate.artifact, feeds, duration),))
            if engines:
                report += latency_report(engines, time_parts(engines, batch, duration), batch)
            if watch:
                watch.look()
                report += Report(gpu=(summarize_states(watch.states[mark:], batch),))
    for engine in engines:
        if engine.candidate.variant != "slice":
            doing(_LOG, f"profiling the blocks of {engine.label}")
            dense = plan.dense() if plan is not None and engine.candidate.variant == "dense" else plan
            report += block_report(engine, dense)
    notes += [*verdict(report.rows), *hidden_gains(report.rows), *launch_notes(report.latencies)]
    notes += [f"{engine.label}: {note}" for engine in engines for note in engine.runner.notes]
    notes += watch.notes if watch else []
    first = watch.states[0] if watch else None
    device = (
        {"gpu": first.name, "driver": first.driver, "compute_capability": first.compute_capability} if first else {}
    )
    return report + Report(notes=tuple(notes), device=device)


def watched(stack: ExitStack) -> tuple[Watch | None, list[str]]:
    """Watches the GPU's clocks until the stack is closed; returns a note if that is not possible."""
    try:
        return stack.enter_context(Watch(current_device())), []
    except MissingRequirement as error:
        return None, [f"The GPU's clocks were not watched: {error}"]


def measure_on_cpu(
    runners: Sequence[Runner], batch: int, duration: float, minimum_rounds: int, threads: int | None
) -> list[Times]:
    """Times runners interleaved: with one thread by CPU time and wall time, with more threads by wall time only.

    Args:
        runners: Opened runners.
        batch: Images per call.
        duration: Seconds.
        minimum_rounds: Rounds to run even if that takes longer.
        threads: CPU threads; must be ``None`` for a server, which computes in another process.
    """
    alone = threads == 1
    wall, cpu = measure(runners, batch, duration, minimum_rounds, 0.0 if alone else SETTLE)
    if alone:
        return [Times("cpu", own[:, None], whole) for own, whole in zip(cpu.T, wall.T, strict=True)]
    return [Times("wall", whole[:, None]) for whole in wall.T]


def measure(
    runners: Sequence[Runner], batch: int, duration: float, minimum_rounds: int, settle: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Times runners on a CPU interleaved, one whole call per turn, from arrays to arrays.

    Args:
        runners: Opened runners.
        batch: Images per call.
        duration: Seconds.
        minimum_rounds: Rounds to run even if that takes longer.
        settle: Seconds to wait before each call.

    Returns:
        Seconds of wall time and of this thread's CPU time, ``[rounds, runners]`` each.
    """
    feeds = random_feeds(runners, batch)
    for runner, images in zip(runners, feeds, strict=True):
        runner.infer(images)  # the first call allocates, plans and compiles
        runner.synchronize()

    def turn(index: int) -> tuple[float, float]:
        time.sleep(settle)
        started, thread_started = time.perf_counter(), time.thread_time()
        runners[index].infer(feeds[index])
        runners[index].synchronize()
        return time.perf_counter() - started, time.thread_time() - thread_started

    both = np.array(in_turns(turn, len(runners), duration, minimum_rounds))
    return both[..., 0], both[..., 1]
