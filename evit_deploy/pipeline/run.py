"""Runs a recipe: trains the dense model, fine-tunes, exports, verifies and profiles. Up-to-date stages are skipped.

A stage is up to date if its record has the same inputs (the relevant sections of the recipe, the files it starts from,
the package's version) and the files that it wrote are unchanged. The record is written last, so an interrupted run
continues with the stage that was interrupted.
"""

import hashlib
import logging
from pathlib import Path
from typing import Any

import msgspec

import evit_deploy
from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import MODEL, PAGE, REPORT
from evit_deploy.documents import read_json
from evit_deploy.environment.command import commands
from evit_deploy.errors import InputError
from evit_deploy.files import sha256, write_atomically
from evit_deploy.pages.bundle import report_page
from evit_deploy.pages.sections import Curve
from evit_deploy.progress import stage, stages
from evit_deploy.recipe.recipe import Recipe
from evit_deploy.recipe.sections import ModelSection
from evit_deploy.registry import TARGETS
from evit_deploy.report.report import AccuracyRow, Check, Difference, Report
from evit_deploy.report.statistics import accuracy_row

_LOG = logging.getLogger(__name__)

BUNDLE, RECORD = "bundle", "stages.json"
_DIGITS_NOTE = (
    "The digits cannot tell attentive from random dropping: one image is 0.28 points, and differences between the "
    "rows of less than one point mean nothing. They show that every stage works, not that the score picks well."
)


class Record(msgspec.Struct):
    """Inputs and outputs of a finished stage.

    Args:
        key: Hash of all inputs.
        files: Name -> SHA-256 of the files that it wrote.
        report: Its report.
    """

    key: str
    files: dict[str, str]
    report: Report = Report()


def run(recipe: Recipe, out: str | Path, *, force: bool = False, resume: bool = False) -> tuple[Bundle, Report]:
    """Runs a recipe.

    Args:
        recipe: The recipe.
        out: Folder for checkpoints and the bundle.
        force: Whether to run up-to-date stages again.
        resume: Whether to continue an interrupted training of the same recipe.

    Returns:
        The bundle in ``<out>/bundle`` and the report of all stages, which is also written to ``<out>/report.json`` and
        ``<out>/report.html``.

    Raises:
        InputError: The recipe cannot be run, or ``out`` contains files of another origin.
        GateFailed: A check failed.
        StageError: A stage failed; the results of earlier stages are kept.
    """
    from evit_deploy.pipeline.convert import check_folders
    from evit_deploy.training.loop import EVIT

    out = Path(out)
    made = _lowering(recipe)  # refuse an impossible conversion before hours of training
    notes = check_folders(made.options)
    with stages(3):
        stage(_LOG, "training")
        report = train_stage(recipe, out, force=force, resume=resume)
        stage(_LOG, "converting")
        checkpoint = out / EVIT
        bundle = None if force else _fresh_bundle(recipe, out / BUNDLE, checkpoint)
        if bundle is None:
            bundle, found = _convert(recipe, made, checkpoint, out / BUNDLE, notes)
        else:
            _LOG.info(f"up to date: {bundle.path}")
            found = read_json(bundle.file(REPORT), Report)
        stage(_LOG, "accuracy of the exported model")
        report += found + Report(accuracy=(_exported_accuracy(recipe, bundle),), commands=commands())
        _write_report(report, bundle, out)
    return bundle, report


def _write_report(report: Report, bundle: Bundle, out: Path) -> None:
    """Writes the report of the whole run (training, checks and speed) as ``report.json`` and ``report.html``."""
    from evit_deploy.training.log import read_log

    logs = {stage: read_log(out / f"{stage}.csv") for stage in ("dense", "finetune")}
    curves = [Curve(stage, tuple(rows)) for stage, rows in logs.items() if rows]
    page = report_page(report, bundle.path.absolute().parent.name, bundle.manifest, curves=curves)
    write_atomically(out / REPORT, msgspec.json.format(msgspec.json.encode(report), indent=2))
    write_atomically(out / PAGE, page.encode())


def _lowering(recipe: Recipe) -> Any:
    from evit_deploy.export.precision import QUANTIZED
    from evit_deploy.pipeline.lowering import lowering

    options = recipe.convert
    if options.normalize:
        raise InputError(
            "the trained model has classes, and logits cannot be normalized", where="convert.normalize", seen="true",
            fix="Leave it out.",
        )  # fmt: skip
    return lowering(options, calibrated=options.precision in QUANTIZED and options.calibration is None)


def _convert(recipe: Recipe, made: Any, path: Path, out: Path, notes: list[str]) -> tuple[Bundle, Report]:
    from evit_deploy.models.checkpoint import read_checkpoint
    from evit_deploy.pipeline.convert import Job, convert_checkpoint, stages_of

    with stages(stages_of(made)):
        stage(_LOG, "reading the checkpoint")
        checkpoint = read_checkpoint(path)
        images = _calibration(recipe, checkpoint.preprocess)
        job = Job(made, None, images, recipe.profile, out, force=True, recipe=_as_json(recipe))
        return convert_checkpoint(checkpoint, recipe.tokens, job, notes)


def _calibration(recipe: Recipe, preprocess: Any) -> Any:
    """Evenly spaced training images without augmentation; ``None`` if they are not needed for calibration."""
    from evit_deploy.data.training.training_data import open_data
    from evit_deploy.export.precision import QUANTIZED

    if recipe.convert.precision not in QUANTIZED or recipe.convert.calibration is not None:
        return None
    return open_data(recipe.data, preprocess).calibration(recipe.convert.calibration_images)


def train_stage(
    recipe: Recipe,
    out: Path,
    *,
    force: bool = False,
    resume: bool = False,
) -> Report:
    """Runs the training stages of a recipe; up-to-date dense weights of an earlier run are reused.

    Args:
        recipe: The recipe.
        out: Folder for ``dense.safetensors`` and ``evit.safetensors``.
        force: Whether to repeat up-to-date stages, and to replace checkpoints of unknown origin.
        resume: Whether to continue an interrupted run of the same recipe; if it saved nothing, the run starts from the
            beginning.

    Returns:
        The comparison table, and the checks of the recipe's ``expect`` section.

    Raises:
        InputError: See :func:`run`.
        GateFailed: A model is less accurate than the recipe expects.
        StageError: Training failed.
    """
    from accelerate import PartialState

    from evit_deploy.training.loop import DENSE, EVIT, train
    from evit_deploy.training.state import state_path

    records = {} if force else _read_records(out)
    dense_key = _key("dense", recipe.model, recipe.data, recipe.dense, recipe.seed, _file_hash(recipe.model.checkpoint))
    evit_key = _key(dense_key, recipe.tokens, recipe.finetune, recipe.teacher, recipe.compare)
    record = records.get("evit")
    if _fresh(record, evit_key, out):
        _LOG.info(f"up to date: {out / EVIT}")
        assert record is not None
        return _expected(recipe, record.report, out)
    interrupted = any(state_path(out, stage).exists() for stage in ("dense", "finetune"))
    if resume and not interrupted:
        _refuse_other_recipe(out, records, {"dense": dense_key, "evit": evit_key})
    if not force and not (resume and interrupted):
        _refuse_strangers(out, records, (DENSE, EVIT))
    todo = recipe
    begun = (
        resume and state_path(out, "dense").exists()
    )  # the state in finetune.state then also belongs to the full recipe
    if recipe.dense is not None and not begun and _fresh(records.get("dense"), dense_key, out):
        _LOG.info(f"up to date: {out / DENSE}")
        todo = msgspec.structs.replace(recipe, dense=None, model=ModelSection(checkpoint=str(out / DENSE)))
    if force:
        for stage in ("dense", "finetune"):
            state_path(out, stage).unlink(missing_ok=True)

    def note_dense(path: Path) -> None:  # at once, so that the weights can be reused if fine-tuning is interrupted
        _write_records(out, {"dense": Record(dense_key, {DENSE: sha256(path)})})

    result = train(todo, out, resume=resume, dense_saved=note_dense)
    notes = (_DIGITS_NOTE,) if recipe.data.name == "digits" else ()
    notes += _published(recipe)
    report = result.report + Report(notes=notes)
    PartialState().wait_for_everyone()  # until the first process has written its files
    records = {"evit": Record(evit_key, {EVIT: sha256(out / EVIT)}, report)}
    if result.dense is not None:
        records["dense"] = Record(dense_key, {DENSE: sha256(out / DENSE)})
    if PartialState().is_main_process:
        _write_records(out, records)
    return _expected(recipe, report, out)


def _published(recipe: Recipe) -> tuple[str, ...]:
    """A note with the paper's results for this recipe."""
    if not recipe.published:
        return ()
    figures = ", ".join(f"{key} {value:g}" for key, value in recipe.published.items() if key != "table")
    source = f" (EViT, table {recipe.published['table']:g})" if "table" in recipe.published else ""
    return (f"Published{source}: {figures}.",)


def _gained(recipe: Recipe, report: Report) -> list[Check]:
    """Checks that fine-tuning does not significantly lower accuracy, as happened in OpenGVLab/DiffRate#5."""
    allowed = recipe.expect.finetuned_loss
    gained = next((row.gained for row in report.accuracy if row.gained is not None), None)
    if allowed is None or gained is None or gained.high is None or gained.low is None:
        return []
    reason = (
        f"{100 * gained.value:+.2f} points, 95 % interval {100 * gained.low:+.2f} to {100 * gained.high:+.2f}. "
        "Try a lower learning_rate or a shorter run; expect.finetuned_loss says what may be lost."
    )
    name = f"top-1, fine-tuned less {gained.other}: upper end of the interval"
    return [Check(name, gained.high, 0.0 - allowed, gained.high >= -allowed, reason)]


def _expected(recipe: Recipe, report: Report, out: Path) -> Report:
    """Adds the recipe's ``expect`` section as checks.

    Raises:
        GateFailed: A check failed; the checkpoints are kept.
    """
    from evit_deploy.training.compare import DENSE_NAME, finetuned_name, untrained_name, with_method

    expect, tokens = recipe.expect, recipe.tokens
    wanted = {DENSE_NAME: expect.dense, finetuned_name(tokens): expect.finetuned}
    checks = [
        Check(f"top-1, {row.name}", row.top1, limit, row.top1 >= limit, "Less accurate than expected.")
        for row in report.accuracy
        if (limit := wanted.get(row.name)) is not None
    ]
    own = untrained_name(tokens)
    baselines = {untrained_name(with_method(tokens, method)): limit for method, limit in expect.over.items()}
    for row in report.accuracy:
        if row.against is not None and row.name in baselines:
            checks.append(_gap(f"{row.against.other} over {row.name}", -1, row.against, baselines[row.name]))
        elif row.against is not None and row.name == own and expect.untrained_loss is not None:
            checks.append(_gap(f"{row.name} over {row.against.other}", 1, row.against, -expect.untrained_loss))
    report += Report(checks=(*checks, *_gained(recipe, report)))
    fix = f"{report.failed[0].reason} The checkpoints were kept." if report.failed else None
    report.raise_if_failed("{name}", where=out, seen="{value:.4f}", wanted="at least {limit}", fix=fix)
    return report


def _gap(name: str, sign: int, found: Difference, limit: float) -> Check:
    value = sign * found.value
    reason = f"{100 * value:+.2f} points, standard error {100 * found.error:.2f}."
    return Check(f"top-1, {name}", value, limit, value >= limit, reason)


def _key(*inputs: Any) -> str:
    content = [evit_deploy.__version__, *map(msgspec.to_builtins, inputs)]
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it is read back from a manifest: with lists instead of tuples."""
    return msgspec.json.decode(msgspec.json.encode(recipe))


def _file_hash(path: str | None) -> str | None:
    return sha256(Path(path)) if path is not None and Path(path).is_file() else None


def _read_records(out: Path) -> dict[str, Record]:
    try:
        return read_json(out / RECORD, dict[str, Record])
    except InputError:
        return {}


def _write_records(out: Path, records: dict[str, Record]) -> None:
    write_atomically(out / RECORD, msgspec.json.format(msgspec.json.encode(records), indent=2))


def _fresh(record: Record | None, key: str, out: Path) -> bool:
    if record is None or record.key != key:
        return False
    return all((out / name).is_file() and sha256(out / name) == value for name, value in record.files.items())


def _refuse_strangers(out: Path, records: dict[str, Record], names: tuple[str, ...]) -> None:
    """Refuses to overwrite checkpoints that are in no record."""
    known = {digest for record in records.values() for digest in record.files.values()}
    for name in names:
        if (out / name).exists() and sha256(out / name) not in known:
            raise InputError(
                f"it contains a {name} that this recipe did not write", where=out,
                fix="Give another --out, move it away, or replace it with --force.",
            )  # fmt: skip


def _refuse_other_recipe(out: Path, records: dict[str, Record], keys: dict[str, str]) -> None:
    """Refuses ``--resume`` in a folder of another recipe if there is no saved state to continue from.

    Dense weights of this recipe are accepted: fine-tuning may have been killed before its first saved state.
    """
    if any(record.key != keys.get(name) for name, record in records.items()):
        raise InputError(
            "there is no interrupted run to continue, and the results here are of a different recipe", where=out,
            fix="Give another --out, or leave --resume out to replace them.",
        )  # fmt: skip


def _fresh_bundle(recipe: Recipe, path: Path, checkpoint: Path) -> Bundle | None:
    try:
        bundle = read_bundle(path)
    except InputError:
        return None
    manifest = bundle.manifest
    same = (
        manifest.recipe == _as_json(recipe)
        and manifest.parents[0].sha256 == sha256(checkpoint)
        and manifest.versions.get("evit-deploy") == evit_deploy.__version__
        and manifest.results.get("passed") is True
    )
    return bundle if same and not bundles.changed_files(bundle) else None


def _exported_accuracy(recipe: Recipe, bundle: Bundle) -> AccuracyRow:
    """Accuracy of the exported file on the recipe's validation images."""
    from evit_deploy.data.training.training_data import open_data
    from evit_deploy.export.card import LOGITS, feeds
    from evit_deploy.runtimes.select import opened
    from evit_deploy.targets.target import PORTABLE
    from evit_deploy.training.compare import finetuned_name

    manifest = bundle.manifest
    data = open_data(recipe.data, manifest.preprocess)
    (runtime,) = TARGETS.get(PORTABLE).provers(manifest.precision, None)
    name = f"{finetuned_name(recipe.tokens)}, exported ({runtime}, {manifest.precision})"
    with opened(runtime, bundle.file(MODEL), recipe.profile.threads) as runner:
        batches = data.validation(recipe.data.evaluation_batch_size)
        answers = ((runner.infer(feeds(images.numpy()))[LOGITS], labels.numpy()) for images, labels in batches)
        return accuracy_row(name, answers, manifest.plan.macs() / 1e9)
