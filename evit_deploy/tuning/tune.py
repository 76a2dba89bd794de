"""Finds the schedule of token counts that changes a model's answers least within a time budget on this device.

Tuning has three steps. The staircase of the device predicts the time of any schedule. A search over schedules that just
meet a time compares their answers to calibration images with the dense model's. The best schedules and the default one
are exported and timed as complete models, interleaved with the dense model, and one of them is chosen.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.data.images import image_files
from evit_deploy.data.sources.class_folders import is_labeled
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError, Interrupted
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.files import write_atomically
from evit_deploy.models.checkpoint import Checkpoint, read_checkpoint
from evit_deploy.pipeline.convert import CALIBRATION_IMAGES, convert, default_out
from evit_deploy.pipeline.lowering import Lowering, lowering
from evit_deploy.progress import stage, stages, step
from evit_deploy.recipe.options import ConvertOptions, TuneOptions, seconds_in
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.targets.target import PORTABLE
from evit_deploy.tokens.plan import TokenOptions, TokenSpec
from evit_deploy.tuning.answers import Answers, Nearness
from evit_deploy.tuning.bench import Bench
from evit_deploy.tuning.finalists import expected_row, finalists_of, measure_whole, measured_rows
from evit_deploy.tuning.findings import Finding, Findings, Shape
from evit_deploy.tuning.results.choice import Budget, chosen, goals_for, verdict
from evit_deploy.tuning.results.front import TunedRow, Tuning, pareto
from evit_deploy.tuning.results.outputs import BUNDLE, FINDINGS, STAIRCASE, begin, check_place, write
from evit_deploy.tuning.schedules import Schedule
from evit_deploy.tuning.search import Fitter, Goal, search
from evit_deploy.tuning.staircase import Staircase, corrected, counts_for, measure_staircase
from evit_deploy.tuning.subject import DEFAULT_RATE, Subject, check_request, read_subject
from evit_deploy.verification.answers.pictures import embeds

_LOG = logging.getLogger(__name__)

_COUNTS, _ENGINE_COUNTS = 24, 10
"""How many token counts to measure; fewer if each needs an engine, which takes minutes to build."""
_FAST = 0.4
"""Keep rate of the third complete model that corrects the staircase, in addition to the dense and the default one."""
_FEW_IMAGES = 64


def tune(
    source: str | Path,
    *,
    options: TuneOptions,
    model: str | None = None,
    out: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
    bundle: bool = False,
    tokens: TokenOptions | None = None,
) -> Tuning:
    """Finds the schedule that meets a budget with answers closest to the dense model's.

    Args:
        source: File, folder, hub id or timm name.
        options: The budget, the images, the runtime to measure on and the length of the search.
        model: timm name of the architecture.
        out: Folder for the findings, the tables and the recipe; by default ``<stem>-tune`` next to the checkpoint.
        force: Whether to overwrite existing results and start again.
        resume: Whether to continue with the existing findings; other processes may add to them at the same time.
        bundle: Whether to also convert the winner, into ``bundle`` inside ``out``.
        tokens: Method, its options and fusion. Rates and locations are not allowed, since they are searched for.

    Returns:
        The results; :attr:`~evit_deploy.tuning.results.front.Tuning.met` is true if the budget is met. Otherwise, the
        winner is the finalist closest to the budget.

    Raises:
        InputError: An argument is invalid, or the dense model already meets the budget.
        MissingRequirement: A package or a device is not available.
        GateFailed: The timings on this device are too noisy to rank schedules.
        Interrupted: The search was interrupted; continue it with ``resume``.
    """
    asked: TokenOptions = tokens or {}
    check_request(options, asked)
    if options.data is not None and not is_labeled(Path(options.data)):
        raise InputError("these images have no labels", where=options.data, wanted="<class>/<image> files")
    wanted = _convert_options(options)
    made = lowering(wanted)
    runtime = _runtime(options, made)
    origin = str(source), model
    with stages(4 + bundle):
        stage(_LOG, "reading the checkpoint")
        checkpoint = read_checkpoint(source, model)
        place = Path(out) if out is not None else _default_place(checkpoint)
        about = _about(checkpoint, options, asked)
        check_place(place, about, force=force, resume=resume)
        subject = read_subject(checkpoint, options, made, model, asked)
        begin(place, about, force=force)
        bench = _bench(subject, made, runtime, options)
        stage(_LOG, f"measuring the staircase of {runtime}")
        fitter = Fitter(subject.planner, _staircase(subject, bench, options, place))
        budget = _budget(options, fitter, embeds(subject.manifest))
        stage(_LOG, "trying schedules on the calibration images")
        findings = Findings(place / FINDINGS)
        _search(subject, fitter, goals_for(budget, fitter, options.trials), findings, options)
        stage(_LOG, "measuring the finalists whole")
        rows = _measured(subject, bench, fitter, (budget, findings.all()), options)
        default = f"default-{DEFAULT_RATE:g}"
        met, winner = chosen(rows, budget, default)
        found = Tuning(
            met=met,
            budget=str(budget),
            verdict=verdict(rows, winner, budget, met=met),
            winner=winner.name,
            finalists=tuple(rows),
            front=pareto(_expected(findings.all(), fitter)),
            staircase=fitter.staircase,
            looked_at=len({finding.schedule for finding in findings.all()}),
            images=len(subject.images),
            notes=_notes(subject, options),
            versions=versions(),
            device=device(),
        )
        write(found, place, origin, wanted)
        if bundle:
            stage(_LOG, "converting the winner")
            made_bundle = _bundle(winner, place, origin, wanted, options)
            found = msgspec.structs.replace(found, bundle=made_bundle)
            write(found, place, origin, wanted)
    return found


def _convert_options(options: TuneOptions) -> ConvertOptions:
    """Conversion options with a single batch size, so that engines are optimized for it."""
    target = options.target or PORTABLE
    calibration = options.calibration if options.precision in QUANTIZED else None
    if not TARGETS.get(target).engine:
        return ConvertOptions(targets=(target,), precision=options.precision, calibration=calibration)
    sizes = ((options.batch,) * 3,)
    return ConvertOptions(
        targets=(target,),
        precision=options.precision,
        calibration=calibration,
        batches=sizes,  # type: ignore[arg-type]
    )


def _runtime(options: TuneOptions, made: Lowering) -> str:
    """Selects the runtime to measure on.

    Raises:
        InputError: The runtime is a server, or no runtime can run this target here.
        MissingRequirement: The runtime is not available.
    """
    own = made.provers(options.target or PORTABLE)
    if options.runtime is None and not own:
        raise InputError("no runtime here can run this target", where="--target", seen=options.target)
    name = options.runtime or own[0]
    if RUNTIMES.get(name).served:
        raise InputError("a search runs in this process, not on a server", where="--runtime", seen=name)
    missing = RUNTIMES.get(name).missing()
    if missing is not None:
        raise missing
    return name


def _default_place(checkpoint: Checkpoint) -> Path:
    """``<stem>-tune`` in the folder that ``convert`` would write to."""
    like = default_out(checkpoint, TokenSpec(keep_rate=DEFAULT_RATE))
    return like.with_name(like.name.removesuffix(f"-evit-k{DEFAULT_RATE:g}") + "-tune")


def _about(checkpoint: Checkpoint, options: TuneOptions, tokens: TokenOptions) -> dict[str, Any]:
    """Settings that findings depend on; a search with other settings cannot continue with them."""
    names = [file.name for file in image_files(Path(options.calibration or ""))]
    own = ("min_speedup", "max_latency", "max_drop", "sample", "target", "precision", "runtime", "batch", "threads")
    return {
        "checkpoint": checkpoint.sha256 or checkpoint.source,
        "tokens": dict(tokens),
        "calibration": f"{len(names)} images, {names[0]} to {names[-1]}",
        **{name: getattr(options, name) for name in own},
    }


def _bench(subject: Subject, made: Lowering, runtime: str, options: TuneOptions) -> Bench:
    ranges = subject.images[:CALIBRATION_IMAGES] if made.precision in QUANTIZED else None
    about = subject.manifest.model, subject.manifest.preprocess
    return Bench(runtime, made, about, options.batch, options.threads, ranges)


def _staircase(subject: Subject, bench: Bench, options: TuneOptions, place: Path) -> Staircase:
    """Reads the staircase of an earlier run, or measures one and corrects it by the times of three complete models."""
    known = place / STAIRCASE
    if known.exists():
        try:
            return msgspec.json.decode(known.read_bytes(), type=Staircase)
        except msgspec.DecodeError as error:
            fix = "Give --force to measure it anew."
            raise InputError(f"not a staircase: {error}", where=known, fix=fix) from None
    shape = subject.planner.shape
    counts = counts_for(shape.prefix, shape.patches, _ENGINE_COUNTS if bench.made.engine_target else _COUNTS)
    rough = measure_staircase(subject.model, subject.planner, bench, counts, options.duration)
    default = subject.planner.spec
    specs = [TokenSpec(keep_rate=1.0), default, msgspec.structs.replace(default, keep_rate=_FAST)]
    times = measure_whole(subject, bench, specs, options.duration / 2)
    expected = [rough.seconds(subject.planner.plan_of(spec)) for spec in specs]
    staircase = corrected(rough, expected, [float(np.median(own.rounds)) for own in times])
    write_atomically(known, msgspec.json.format(msgspec.json.encode(staircase), indent=2))
    return staircase


def _budget(options: TuneOptions, fitter: Fitter, embedding: bool) -> Budget:
    """Creates the budget from the options.

    Raises:
        InputError: The dense model already meets it.
    """
    if options.max_drop is not None:
        return Budget("drop", options.max_drop, fitter.dense, "recall@1" if embedding else "top-1")
    if options.min_speedup is not None:
        return Budget("speedup", options.min_speedup, fitter.dense)
    seconds = seconds_in(options.max_latency or "")
    if seconds >= fitter.dense:
        raise InputError(
            "the dense model is as fast as that already", where="--max-latency", seen=options.max_latency,
            wanted=f"less than {1e3 * fitter.dense:.3g}ms", fix="There is nothing to reduce, or ask for less.",
        )  # fmt: skip
    return Budget("latency", seconds, fitter.dense)


def _search(subject: Subject, fitter: Fitter, goals: Sequence[Goal], findings: Findings, options: TuneOptions) -> None:
    """Runs the search for each goal.

    Raises:
        Interrupted: The search was interrupted.
    """
    before, total = torch.get_num_threads(), sum(goal.trials for goal in goals)
    torch.set_num_threads(options.threads or before)
    try:
        answers = Answers(subject.model, subject.images[:: subject.every], classes=not embeds(subject.manifest))

        def look(schedule: Schedule) -> Nearness:
            step(_LOG, "trying schedules on the calibration images", len(findings.all()), total)
            return answers.nearness(subject.planner.spec_of(schedule))

        default = subject.planner.schedule_of(subject.planner.spec)
        if findings.nearness(default) is None:
            shape = Shape(default.locations, (1.0,) * len(default.locations))
            findings.add(Finding("default", shape, default, look(default)))
        for goal in goals:
            search(fitter, goal, findings, look, options.seed)
    except KeyboardInterrupt as error:
        raise Interrupted(f"{len(findings.all())} of {total} schedules were tried") from error
    finally:
        torch.set_num_threads(before)


def _expected(found: Sequence[Finding], fitter: Fitter) -> list[TunedRow]:
    """One row per evaluated schedule, numbered in the order of evaluation; the default schedule keeps its name."""
    default = fitter.planner.schedule_of(fitter.planner.spec)
    unique = {finding.schedule: finding for finding in reversed(found)}
    rows = []
    for number, finding in enumerate(reversed(unique.values())):
        name = f"default-{DEFAULT_RATE:g}" if finding.schedule == default else f"s{number}"
        rows.append(expected_row(name, finding, fitter))
    return rows


def _measured(
    subject: Subject, bench: Bench, fitter: Fitter, found: tuple[Budget, Sequence[Finding]], options: TuneOptions
) -> list[TunedRow]:
    budget, findings = found
    default = fitter.planner.schedule_of(fitter.planner.spec)
    rows = {row.schedule: row for row in _expected(findings, fitter)}
    finalists = [rows[schedule] for schedule in finalists_of(findings, default, budget)]
    measured = measured_rows(subject, bench, finalists, options.duration)
    return [measured[0], *sorted(measured[1:], key=lambda row: -row.milliseconds)]


def _notes(subject: Subject, options: TuneOptions) -> tuple[str, ...]:
    notes = [*subject.manifest.notes, *(subject.pictures.notes if subject.pictures is not None else ())]
    if len(subject.images) < _FEW_IMAGES:
        few = len(subject.images)
        notes.append(f"Few calibration images ({few}): schedules that are near each other are not told apart.")
    return tuple(notes)


def _bundle(
    winner: TunedRow, place: Path, origin: tuple[str, str | None], wanted: ConvertOptions, options: TuneOptions
) -> str:
    """Converts the winner; returns the path of the bundle."""
    spec = winner.tokens
    tokens: TokenOptions = {"method": spec.method, "keep_rate": spec.rates, "locations": winner.schedule.locations}
    if spec.options:
        tokens["method_options"] = spec.options
    if not spec.fuse:
        tokens["fuse"] = False
    asked = msgspec.structs.replace(wanted, data=options.data)
    made, _ = convert(origin[0], model=origin[1], options=asked, out=place / BUNDLE, force=True, **tokens)
    return str(made.path)
