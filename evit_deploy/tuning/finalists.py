"""Exports the finalists, times them interleaved with the dense model, and compares their answers on more images."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np

from evit_deploy.files.drafts import draft
from evit_deploy.pipeline.lowering import Exports
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.turns import Times
from evit_deploy.profiling.speedup import ratios_to_dense, row_of
from evit_deploy.progress import doing, step
from evit_deploy.report.report import ComparedRow
from evit_deploy.runtimes.select import opened
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tuning.answers import nearness
from evit_deploy.tuning.bench import Bench
from evit_deploy.tuning.findings import Finding
from evit_deploy.tuning.results.choice import AS_DEFAULT, BUDGET, DENSE, TIGHTER, Budget
from evit_deploy.tuning.results.front import TunedRow
from evit_deploy.tuning.schedules import Schedule
from evit_deploy.tuning.search import Fitter
from evit_deploy.tuning.subject import Subject
from evit_deploy.verification.answers.answers import DATA_BATCH, outputs_of
from evit_deploy.verification.answers.cost import Answered, row_of_plan, settings_of, with_answers
from evit_deploy.verification.answers.pictures import embeds

_LOG = logging.getLogger(__name__)

_BEST = 3
"""Number of finalists for the budget; every other goal has one."""


def finalists_of(found: Sequence[Finding], default: Schedule, budget: Budget) -> list[Schedule]:
    """Selects the finalists: the default schedule, the best for the budget, and the best of each other goal.

    With a time budget, the only other goals are the slightly smaller time and the default schedule's time; the rest
    only contribute to the front.

    Args:
        found: All findings.
        default: The default schedule.
        budget: The budget to meet.
    """
    chosen = [default]
    for goal in dict.fromkeys(finding.goal for finding in found):
        if budget.seconds is not None and goal not in (BUDGET, TIGHTER, AS_DEFAULT):
            continue
        own = sorted((one for one in found if one.goal == goal), key=lambda one: -one.nearness.cosine)
        schedules = list(dict.fromkeys(one.schedule for one in own))
        chosen += schedules[: _BEST if goal == BUDGET else 1]
    return list(dict.fromkeys(chosen))


def expected_row(name: str, finding: Finding, fitter: Fitter) -> TunedRow:
    """Row of a schedule with the results of the search, before it is measured."""
    spec = fitter.planner.spec_of(finding.schedule)
    plan, near = fitter.planner.plan_of(spec), finding.nearness
    expected = 1e3 * fitter.seconds(finding.schedule)
    return TunedRow(name, finding.schedule, spec, plan.macs() / 1e9, expected, near.cosine, near.agreement)


def measure_whole(subject: Subject, bench: Bench, specs: Sequence[TokenSpec], duration: float) -> list[Times]:
    """Times complete models interleaved, each exported in the same way as by ``convert``.

    Args:
        subject: The dense model.
        bench: Builds and times the models.
        specs: Token spec of each model.
        duration: Total time in seconds.
    """
    with draft() as scratch:
        return bench.times(_artifacts(subject, bench, specs, scratch), duration)


def _artifacts(subject: Subject, bench: Bench, specs: Sequence[TokenSpec], scratch: Any) -> list[Any]:
    exports, artifacts = Exports(), []
    for number, spec in enumerate(specs):
        folder = scratch.folder / str(number)
        folder.mkdir()
        artifacts.append(bench.artifact(subject.reduced(spec), folder, exports))
    return artifacts


def measured_rows(subject: Subject, bench: Bench, rows: Sequence[TunedRow], duration: float) -> list[TunedRow]:
    """Measures times and answers of the exported finalists; returns their rows after the dense model's.

    Args:
        subject: The dense model and the images.
        bench: Builds and times the models.
        rows: The finalists.
        duration: Total time in seconds.
    """
    dense_spec = TokenSpec(keep_rate=1.0)
    plan = subject.planner.plan_of(dense_spec)
    classes = not embeds(subject.manifest)
    dense = TunedRow(DENSE, Schedule((), ()), dense_spec, plan.macs() / 1e9, 0.0, 1.0, 1.0 if classes else None)
    everyone = [dense, *rows]
    plans = [subject.planner.plan_of(row.tokens) for row in everyone]
    with draft() as scratch:
        artifacts = _artifacts(subject, bench, [row.tokens for row in everyone], scratch)
        times = bench.times(artifacts, duration)
        doing(_LOG, "answering the calibration images")
        answers, labeled = _answers(subject, bench, [row.name for row in everyone], artifacts)
    on_gpu = Candidate(bench.runtime, "model", artifacts[0]).on_gpu
    found = []
    for row, plan, own in zip(everyone, plans, times, strict=True):
        speed = row_of(bench.runtime, row.name, bench.batch, own, on_gpu=on_gpu)
        if row is dense:
            row = msgspec.structs.replace(row, expected=speed.p50)
        else:
            speed = msgspec.structs.replace(speed, **ratios_to_dense(times[0], own, plan))
        near = nearness(answers[row.name], answers[DENSE], classes=classes)
        compared = _compared(row, plan, subject, labeled) if labeled is not None else None
        found.append(msgspec.structs.replace(row, measured=speed, confirmed=near, answers=compared))
    return found


def _compared(row: TunedRow, plan: TokenPlan, subject: Subject, labeled: Answered) -> ComparedRow:
    known = row_of_plan(row.name, row.tokens.method, settings_of(row.tokens), subject.manifest.precision, plan)
    return with_answers(msgspec.structs.replace(known, dense=DENSE), None, labeled)


def _answers(
    subject: Subject, bench: Bench, names: Sequence[str], artifacts: Sequence[Any]
) -> tuple[dict[str, np.ndarray], Answered | None]:
    """Answers of every model to the calibration images, and to the labeled images if there are any."""
    answer, pictures = subject.manifest.answer, subject.pictures
    with ExitStack() as stack:
        opening = [stack.enter_context(opened(bench.runtime, artifact, bench.threads)) for artifact in artifacts]
        runners = dict(zip(names, opening, strict=True))
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for start in range(0, len(subject.images), DATA_BATCH):
            step(_LOG, "answering the calibration images", start, len(subject.images))
            for name, runner in runners.items():
                parts[name].append(outputs_of(runner, subject.images[start : start + DATA_BATCH])[answer])
        near = {name: np.concatenate(own) for name, own in parts.items()}
        if pictures is None:
            return near, None
        parts, truth = {name: [] for name in names}, []
        for images, labels in pictures.batches(subject.manifest, DATA_BATCH):
            step(_LOG, "answering the labeled images", sum(map(len, truth)), len(pictures))
            assert labels is not None  # tune() only accepts labeled images
            truth.append(labels)
            for name, runner in runners.items():
                parts[name].append(outputs_of(runner, images)[answer])
    together = {name: np.concatenate(own) for name, own in parts.items()}
    return near, Answered(bench.runtime, together, np.concatenate(truth), embeds(subject.manifest))
