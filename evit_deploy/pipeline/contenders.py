"""Comparisons described by a recipe: creates the bundles, unless they are up to date, and compares them.

As in any conversion, a bundle that fails verification is not published.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import timm
import torch

import evit_deploy
from evit_deploy.bundle.bundle import Bundle, changed_files, check_out, read_bundle
from evit_deploy.data.images import image_files
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.data.sources.class_folders import Folder
from evit_deploy.errors import InputError, RecipeError
from evit_deploy.files import sha256
from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint, resolve_tokens, save_checkpoint
from evit_deploy.models.identify import check_model_name
from evit_deploy.pipeline.compare import compare_named, reference_of, write_files
from evit_deploy.pipeline.convert import (
    FIRST_BATCHES,
    Job,
    check_folders,
    check_own_weights,
    convert_checkpoint,
    default_out,
)
from evit_deploy.pipeline.lowering import Lowering, lowering
from evit_deploy.profiling.side_by_side import check_runtime
from evit_deploy.progress import doing
from evit_deploy.recipe.options import CompareOptions, ProfileOptions
from evit_deploy.recipe.recipe import CompareEntry, CompareRecipe
from evit_deploy.registry import METHODS
from evit_deploy.report.report import Report
from evit_deploy.tokens.backbone import load_backbones
from evit_deploy.tokens.plan import TokenOptions, TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_

_LOG = logging.getLogger(__name__)

GLANCE = 0.5
"""Seconds per batch size of the conversion's own speed measurement; short, because the comparison measures again."""


class Wanted(msgspec.Struct, frozen=True):
    """A bundle of a comparison, before it is created.

    Args:
        entry: The recipe's entry.
        name: Name of its rows.
        path: Its folder.
        made: How to convert it; ``None`` for an existing bundle.
    """

    entry: CompareEntry
    name: str
    path: Path
    made: Lowering | None = None


def compare_recipe(recipe: CompareRecipe, out: str | Path, *, force: bool = False) -> Report:
    """Runs a comparison described by a recipe.

    Args:
        recipe: The comparison.
        out: Folder for new bundles and the files of the comparison (``compare.csv``, ``compare.md``, ``compare.tex``,
            ``compare.json``, ``compare.html``).
        force: Whether to recreate bundles that are up to date, and to replace bundles that are not of this recipe.

    Returns:
        See :func:`evit_deploy.pipeline.compare.compare`.

    Raises:
        InputError: The recipe cannot be run. Most causes are found before the first bundle is created.
        MissingRequirement: A package or a device is missing.
        GateFailed: A bundle failed verification.
        StageError: Exporting or writing failed.
    """
    out = Path(out)
    options = CompareOptions(**{name: getattr(recipe, name) for name in CompareOptions.__struct_fields__})
    for runtime in options.runtimes:
        check_runtime(runtime)
    wanted = [_wanted(recipe, entry, out) for entry in recipe.compare]
    _check_names(wanted)
    reference_of({one.name: str(one.path) for one in wanted}, options.reference)
    if options.data is not None:
        Folder(options.data)
    if options.images is not None:
        image_files(Path(options.images))
    bundles = [(one.name, read_bundle(one.path) if one.made is None else None) for one in wanted]
    _check_reducible(recipe, [one for one in wanted if one.made is not None])
    for one in wanted:
        if one.made is not None:
            check_out(one.path, force=force or _is_ours(one.path, recipe.name))
    notes: tuple[str, ...] = ()
    for number, one in enumerate(wanted):
        if one.made is not None:
            doing(_LOG, f"making {one.name} ({number + 1} of {len(wanted)})")
            bundles[number] = one.name, _bundle(recipe, one, out, force=force)
            notes = notes if _checkpoint(recipe, one.entry) else _SEEDED
    report = Report(notes=notes) + compare_named([(name, bundle) for name, bundle in bundles if bundle], options)
    write_files(report, out)
    return report


_SEEDED = (
    "Weights come from a seed: speed is what it would be with trained ones, and what is said of answers is not.",
)


def _wanted(recipe: CompareRecipe, entry: CompareEntry, out: Path) -> Wanted:
    """Resolves an entry and makes the checks that need no model."""
    if entry.bundle is not None:
        path = Path(entry.bundle)
        return Wanted(entry, entry.name or path.resolve().name, path)
    source = _checkpoint(recipe, entry) or _model(recipe, entry)
    if source is None:
        raise RecipeError("an entry names no model for a bundle", where="compare", seen=_as_text(entry),
                          wanted="a bundle, a checkpoint or a model")  # fmt: skip
    if _checkpoint(recipe, entry) is None:
        check_model_name(source, where="model")
        if entry.tokens is None:
            fix = "Add tokens, for example {method: evit, keep_rate: 0.7}."
            raise RecipeError(
                "weights from a seed do not determine the token reduction",
                where="compare",
                seen=_as_text(entry),
                fix=fix,
            )
    convert = recipe.convert
    if entry.precision is not None:
        convert = msgspec.structs.replace(convert, precision=entry.precision)
    made = lowering(convert)
    check_folders(made.options)
    name = entry.name or _default_name(recipe, entry, source)
    return Wanted(entry, name, out / name, made)


def _default_name(recipe: CompareRecipe, entry: CompareEntry, source: str) -> str:
    about = Checkpoint(source, "a file's" if Path(source).is_file() else None, {}, source, {})
    if entry.tokens is None:
        return Path(source).stem
    name = Path(default_out(about, entry.tokens)).name
    return name if entry.precision is None else f"{name}-{entry.precision}"


def _check_reducible(recipe: CompareRecipe, wanted: Sequence[Wanted]) -> None:
    """Reduces every model once, so that an impossible entry is refused before minutes of exports."""
    load_backbones()
    built: dict[tuple[str | None, str | None], tuple[torch.nn.Module, Checkpoint | None]] = {}
    for one in wanted:
        source, model = _checkpoint(recipe, one.entry), _model(recipe, one.entry)
        if (source, model) not in built:
            checkpoint = None if source is None else read_checkpoint(source, _architecture(source, model))
            module = timm.create_model(model or "") if checkpoint is None else build_model(checkpoint)
            built[source, model] = module, checkpoint
        module, checkpoint = built[source, model]
        spec, _ = _tokens(checkpoint or _about(model or ""), one.entry)
        if not METHODS.get(spec.method).exports:
            raise InputError(f"the method {spec.method!r} has no exported form", where="compare", fix="Name another.")
        if checkpoint is not None:
            check_own_weights(checkpoint, spec)
        reduce_tokens_(module, spec)


def _tokens(checkpoint: Checkpoint, entry: CompareEntry) -> tuple[TokenSpec, list[str]]:
    """Completes an entry's token reduction from the checkpoint; see :func:`resolve_tokens`."""
    asked: TokenOptions = {}
    spec = entry.tokens
    if spec is not None:
        asked["method"] = spec.method
        if METHODS.get(spec.method).fuses:
            asked["fuse"] = spec.fuse
        if spec.keep_rate is not None:
            asked["keep_rate"] = spec.keep_rate
        if spec.locations is not None:
            asked["locations"] = spec.locations
        if spec.options:
            asked["method_options"] = spec.options
    return resolve_tokens(checkpoint, **asked)


def _about(model: str) -> Checkpoint:
    return Checkpoint(model, None, {}, model, {})


def _architecture(source: str, model: str | None) -> str | None:
    """The timm name that sets the architecture of a checkpoint file; ``None`` if the source is itself a timm name."""
    return model if Path(source).is_file() else None


def _check_names(wanted: Sequence[Wanted]) -> None:
    names = [one.name for one in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RecipeError("two entries have the same name", where="compare", seen=twice, fix="Give each a name.")


def _checkpoint(recipe: CompareRecipe, entry: CompareEntry) -> str | None:
    return entry.checkpoint or (recipe.checkpoint if entry.model is None else None)


def _model(recipe: CompareRecipe, entry: CompareEntry) -> str | None:
    return entry.model or recipe.model


def _as_text(entry: CompareEntry) -> str:
    given = {name: value for name, value in msgspec.to_builtins(entry).items() if value is not None}
    return str(given) if given else "an empty entry"


def _bundle(recipe: CompareRecipe, one: Wanted, out: Path, *, force: bool) -> Bundle:
    """Returns the bundle of an entry, creating it unless it is up to date."""
    source = _checkpoint(recipe, one.entry)
    model = _model(recipe, one.entry)
    if source is None:
        assert model is not None  # checked by _wanted
        source, model = str(_seeded(recipe, one, model, out)), None
    record = {
        "name": recipe.name,
        "entry": msgspec.to_builtins(one.entry),
        "convert": msgspec.to_builtins(recipe.convert),
    }
    record = msgspec.json.decode(msgspec.json.encode(record))
    found = None if force else _up_to_date(one.path, record, source)
    if found is not None:
        _LOG.info(f"up to date: {one.path}")
        return found
    ours = force or _is_ours(one.path, recipe.name)
    checkpoint = read_checkpoint(source, _architecture(source, model))
    spec, notes = _tokens(checkpoint, one.entry)
    measure = ProfileOptions(batch_sizes=FIRST_BATCHES, duration=GLANCE, threads=recipe.threads)
    assert one.made is not None
    job = Job(one.made, measure=measure, out=one.path, force=ours, model=_architecture(source, model), recipe=record)
    return convert_checkpoint(checkpoint, spec, job, notes)[0]


def _seeded(recipe: CompareRecipe, one: Wanted, model: str, out: Path) -> Path:
    """Writes a checkpoint with random weights: one per model, or per entry for methods with learned layers."""
    spec, _ = _tokens(_about(model), one.entry)
    own = METHODS.get(spec.method).needs_own_weights
    path = out / f"{model}-seed{recipe.seed}{f'-{one.name}' if own else ''}.safetensors"
    seeded_checkpoint(model, recipe.seed, path, spec if own else None)
    return path


def seeded_checkpoint(model: str, seed: int, path: Path, spec: TokenSpec | None = None) -> None:
    """Writes a checkpoint of a model with random weights, the same for the same seed.

    Args:
        model: timm name.
        seed: Seed of the weights.
        path: The file.
        spec: Token reduction of a method with learned layers, to initialize these too, after the model's.

    Raises:
        StageError: The file could not be written.
    """
    load_backbones()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = timm.create_model(model).eval()
        if spec is not None:
            reduce_tokens_(made, spec)
    about = Checkpoint(str(path), None, {}, model, {}, preprocess=Preprocess.from_model(made))
    save_checkpoint(path, made, about)


def _read(path: Path) -> Bundle | None:
    try:
        return read_bundle(path)
    except InputError:
        return None


def _is_ours(path: Path, name: str) -> bool:
    """Whether a bundle was created by the recipe of this name and may therefore be replaced."""
    bundle = _read(path)
    return bundle is not None and (bundle.manifest.recipe or {}).get("name") == name


def _up_to_date(path: Path, record: dict[str, Any], source: str) -> Bundle | None:
    bundle = _read(path)
    if bundle is None:
        return None
    manifest = bundle.manifest
    file = Path(source)
    same = (
        manifest.recipe == record
        and manifest.parents[0].sha256 == (sha256(file) if file.is_file() else None)
        and manifest.versions.get("evit-deploy") == evit_deploy.__version__
        and manifest.results.get("passed") is True
    )
    return bundle if same and not changed_files(bundle) else None
