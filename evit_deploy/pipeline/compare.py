"""Comparison of bundles: configuration, accuracy and speed, measured in one interleaved run."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from evit_deploy.bundle.bundle import Bundle, changed_files, read_bundle
from evit_deploy.bundle.manifest import Manifest
from evit_deploy.data.images import image_files
from evit_deploy.data.sources.class_folders import is_labeled
from evit_deploy.environment.command import commands
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError, MissingRequirement, did_you_mean
from evit_deploy.files import write_atomically
from evit_deploy.files.drafts import draft
from evit_deploy.pages.bundle import report_page
from evit_deploy.profiling.side_by_side import Contender, Lane, Parents, choose_runtimes, lane_of, measure_lane, named
from evit_deploy.progress import doing, step
from evit_deploy.recipe.options import CompareOptions
from evit_deploy.report.comparison import as_csv, as_latex, as_markdown, rounded
from evit_deploy.report.report import ComparedRow, Report
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import opened
from evit_deploy.verification.answers.answers import DATA_BATCH, outputs_of
from evit_deploy.verification.answers.cost import Answered, row_of_plan, settings_of, with_answers
from evit_deploy.verification.answers.pictures import Pictures, embeds, pictures_of

_LOG = logging.getLogger(__name__)

CSV, MARKDOWN, LATEX, JSON, PAGE = "compare.csv", "compare.md", "compare.tex", "compare.json", "compare.html"
RESULTS = (CSV, MARKDOWN, LATEX, JSON, PAGE)


def compare(
    bundles: Sequence[str | Path],
    *,
    options: CompareOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> Report:
    """Compares bundles of the same task, of any methods and keep rates, in one interleaved run.

    Every bundle is compared with its dense twin (one for all bundles of the same dense model) and with the slice
    twin of the same token counts. On each runtime and at each batch size they all take turns.

    Args:
        bundles: Their folders, at least two.
        options: Runtimes, batch sizes, images, reference.
        out: Folder for ``compare.csv``, ``compare.md``, ``compare.tex``, ``compare.json`` and ``compare.html``, which
            contain the same numbers.
        force: Whether to replace existing files.

    Returns:
        A report with ``compared``, one row for each bundle and dense twin, and ``rows``, the speed of each, with
        its name as ``variant``. Numbers are rounded to five significant digits.

    Raises:
        InputError: The bundles cannot be compared with these options; nothing was measured.
        MissingRequirement: A requested runtime is not installed.
    """
    place = Path(out) if out is not None else None
    if place is not None:
        check_place(place, RESULTS, force=force)
    named_bundles = [(str(path), read_bundle(path)) for path in bundles]
    report = compare_named(short_names(named_bundles), options or CompareOptions())
    if place is not None:
        write_files(report, place)
    return report


def compare_named(bundles: Sequence[tuple[str, Bundle]], options: CompareOptions) -> Report:
    """:func:`compare` of bundles that have names.

    Args:
        bundles: Name and bundle; names are unique.
        options: Runtimes, batch sizes, images, reference.

    Raises:
        InputError: See :func:`compare`.
        MissingRequirement: See :func:`compare`.
    """
    _check_bundles(bundles)
    contenders = named(bundles)
    reference = reference_of({name: str(bundle.path) for name, bundle in bundles}, options.reference)
    remarks = _check_images(contenders, options)
    parents = Parents()
    runtimes, notes = choose_runtimes(contenders, options.runtimes, options.batch_sizes, parents)
    report, answers = Report(notes=(*remarks, *notes), versions=versions(), device=device(), commands=commands()), None
    failed: list[InputError | MissingRequirement] = []
    with draft() as scratch:
        for runtime in runtimes:
            doing(_LOG, f"preparing the models for {runtime}")
            lane = lane_of(runtime, contenders, parents, scratch.folder)
            with ExitStack() as stack:
                try:
                    runners = [
                        stack.enter_context(opened(runtime, entry.candidate.artifact, options.threads))
                        for entry in lane.entries
                    ]
                except (InputError, MissingRequirement) as error:  # some runtimes fail only when a model is opened
                    if options.runtimes:
                        raise
                    failed.append(error)
                    report += Report(notes=(f"{runtime} was left out: {error}",))
                    continue
                if answers is None and (options.data or options.images):
                    answers = _answers(lane, runners, contenders, options)
                report += measure_lane(lane, runners, options)
    if failed and not report.rows:
        raise failed[0]
    rows = tuple(map(rounded, report.rows))
    return msgspec.structs.replace(report, rows=rows, compared=tuple(_compared(contenders, reference, answers)))


def write_files(report: Report, place: Path) -> None:
    """Writes a comparison as CSV, Markdown, LaTeX, JSON and a page.

    Raises:
        StageError: A file could not be written.
    """
    write_atomically(place / CSV, as_csv(report).encode())
    write_atomically(place / MARKDOWN, as_markdown(report).encode())
    write_atomically(place / LATEX, as_latex(report).encode())
    write_atomically(place / PAGE, report_page(report, "Comparison").encode())
    write_atomically(place / JSON, msgspec.json.format(msgspec.json.encode(report), indent=2))


def check_place(place: Path, names: Sequence[str], *, force: bool) -> None:
    """Checks, before any work, that results can be written to a folder.

    Args:
        place: The folder.
        names: The files to write.
        force: Whether to replace existing files.

    Raises:
        InputError: Files exist and ``force`` is false, or the folder cannot be written.
    """
    try:
        if place.exists() and not place.is_dir():
            raise InputError("this is a file", where=place, wanted="a folder", fix="Give another --out.")
        there = [name for name in names if (place / name).exists()]
        if there and not force:
            fix = "Give --force to replace them, or another --out."
            raise InputError(f"there are results already ({', '.join(there)})", where=place, fix=fix)
        folder = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
        with draft(folder):
            pass
    except OSError as error:  # such as a name that is too long, or a folder without write permission
        raise InputError(f"cannot write there ({error.strerror})", where=place, fix="Give another --out.") from None


def short_names(bundles: Sequence[tuple[str, Bundle]]) -> list[tuple[str, Bundle]]:
    """Names bundles after their folders, or by their paths if two folders have the same name.

    Args:
        bundles: (path, bundle) pairs.
    """
    short = [bundle.path.resolve().name for _, bundle in bundles]
    unique = len(set(short)) == len(short)
    return [(name if unique else path, bundle) for name, (path, bundle) in zip(short, bundles, strict=True)]


def _check_bundles(bundles: Sequence[tuple[str, Bundle]]) -> None:
    if len(bundles) < 2:
        raise InputError(
            "one bundle is compared with nothing" if bundles else "nothing to compare", seen=len(bundles),
            wanted="at least two bundles", fix="evit-deploy profile measures one against its baselines.",
        )  # fmt: skip
    seen: dict[object, str] = {}
    for name, bundle in bundles:
        content = msgspec.json.encode(bundle.manifest.files, order="sorted")
        for key in (bundle.path.resolve(), content):
            if key in seen:
                raise InputError("the same bundle twice", where=bundle.path, seen=f"{seen[key]} and {name}",
                                 fix="Name each bundle once.")  # fmt: skip
            seen[key] = name
    for _, bundle in bundles:
        changed = changed_files(bundle)
        if changed:
            what = "files are not what the manifest says: " + ", ".join(changed)
            raise InputError(what, where=bundle.path, fix="Convert again.")


def reference_of(paths: Mapping[str, str], asked: str | None) -> str:
    """Returns the name of the bundle to compare the others with. Default: the first.

    Args:
        paths: Name -> path.
        asked: A name or a path.

    Raises:
        InputError: No bundle has this name or path.
    """
    if asked is None:
        return next(iter(paths))
    if asked in paths:
        return asked
    found = [name for name, path in paths.items() if path and Path(path).resolve() == Path(asked).resolve()]
    if not found:
        raise InputError(
            "the reference is not among the bundles", where="--reference", seen=repr(asked),
            wanted="one of " + ", ".join(paths), fix=did_you_mean(asked, paths),
        )  # fmt: skip
    return found[0]


def _check_images(contenders: Sequence[Contender], options: CompareOptions) -> tuple[str, ...]:
    """Refuses unusable images, and bundles with answers that cannot be compared.

    Returns:
        Notes about the images.
    """
    first = contenders[0]
    if options.images is not None:
        image_files(Path(options.images))
    for one in contenders if options.images is not None or options.data is not None else ():
        if embeds(one.bundle.manifest) != embeds(first.bundle.manifest):
            what = f"one of {first.name} and {one.name} answers with classes, the other with an embedding"
            fix = "Leave the images out to compare speed alone."
            raise InputError(what, wanted="bundles of the same task", fix=fix)
    if options.data is None:
        return ()
    for one in contenders:
        _check_same_task(first, one, own_preprocessing=options.own_preprocessing)
    if not is_labeled(Path(options.data)):
        fix = "Give such images with --images, for what needs no labels."
        raise InputError("these images have no labels", where=options.data, wanted="<class>/<image> files", fix=fix)
    for one in contenders:
        pictures_of(Path(options.data), one.bundle.manifest)
    return _pictures(contenders, options).notes


def _check_same_task(first: Contender, other: Contender, *, own_preprocessing: bool) -> None:
    one, two = first.bundle.manifest, other.bundle.manifest
    names = f"{first.name} and {other.name}"
    classes = [manifest.outputs[0].shape[-1] for manifest in (one, two)]
    if classes[0] != classes[1] and not embeds(one):
        raise InputError(f"{names} have different classes", where="--data", seen=f"{classes[0]} and {classes[1]}",
                         wanted="bundles of the same task", fix="Leave --data out to compare speed alone.")  # fmt: skip
    if one.labels is not None and two.labels is not None and one.labels != two.labels:
        which = next(i for i, pair in enumerate(zip(one.labels, two.labels, strict=False)) if pair[0] != pair[1])
        raise InputError(f"{names} have different class names", where="--data",
                         seen=f"class {which} is {one.labels[which]!r} and {two.labels[which]!r}",
                         wanted="bundles of the same task", fix="Leave --data out to compare speed alone.")  # fmt: skip
    mine, others = (msgspec.structs.asdict(manifest.preprocess) for manifest in (one, two))
    differing = [key for key in mine if mine[key] != others[key]]
    if differing and not own_preprocessing:
        seen = "; ".join(f"{key} {mine[key]} and {others[key]}" for key in differing)
        what = "take images of other sizes" if "size" in differing else "prepare images differently"
        raise InputError(
            f"{names} {what}", where="--data", seen=seen,
            fix="Give --own-preprocessing to let each prepare the images in its own way.",
        )  # fmt: skip


def _answers(
    lane: Lane, runners: Sequence[Runner], contenders: Sequence[Contender], options: CompareOptions
) -> Answered:
    """Runs every bundle and dense twin on the images; models with equal preprocessing share each decoded image."""
    pictures = _pictures(contenders, options)
    alike: dict[tuple[object, int], list[tuple[str, Runner]]] = {}
    manifests = {one.dense: one.bundle.manifest for one in reversed(contenders)}
    manifests |= {one.name: one.bundle.manifest for one in contenders}
    for entry, runner in zip(lane.entries, runners, strict=True):
        if entry.name is not None:
            manifest = manifests[entry.name]
            alike.setdefault((manifest.preprocess, _channels(manifest)), []).append((entry.name, runner))
    answers: dict[str, list[np.ndarray]] = {}
    labels: np.ndarray | None = None
    for group in alike.values():
        truth: list[np.ndarray] = []
        done, total = 0, len(pictures)
        for images, known in pictures.batches(manifests[group[0][0]], DATA_BATCH):
            step(_LOG, "answering the images", done, total)
            for name, runner in group:
                answers.setdefault(name, []).append(outputs_of(runner, images)[manifests[name].answer])
            if known is not None:
                truth.append(known)
            done += len(images)
        labels = np.concatenate(truth) if truth else None
    together = {name: np.concatenate(parts) for name, parts in answers.items()}
    return Answered(lane.runtime, together, labels, embeds(contenders[0].bundle.manifest))


def _channels(manifest: Manifest) -> int:
    return int(manifest.inputs[0].shape[1] or 3)


def _pictures(contenders: Sequence[Contender], options: CompareOptions) -> Pictures:
    """The images, with labels in the bundles' class order (class names, where known, were checked to be equal)."""
    if options.data is None:
        return Pictures(Path(options.images or ""), None)
    manifests = [one.bundle.manifest for one in contenders]
    return pictures_of(Path(options.data), next((m for m in manifests if m.labels is not None), manifests[0]))


def _compared(contenders: Sequence[Contender], reference: str, answers: Answered | None) -> Iterator[ComparedRow]:
    """Yields a row for each bundle, and for each dense twin before the first bundle compared with it."""
    known: set[str] = set()
    for one in contenders:
        manifest = one.bundle.manifest
        if one.dense not in known:
            known.add(one.dense)
            plan = manifest.plan.dense()
            row = row_of_plan(one.dense, "dense", "", manifest.precision, plan)
            yield rounded(with_answers(row, None, answers))
        row = row_of_plan(one.name, manifest.kind, settings_of(manifest.tokens), manifest.precision, manifest.plan)
        row = msgspec.structs.replace(row, dense=one.dense)
        yield rounded(with_answers(row, reference, answers))
