"""Lowering of a model: defaults, early refusals, the export, and the targets one after another."""

import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from evit_deploy.bundle.manifest import DENSE, MODEL, Engine
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.engines.options import flag
from evit_deploy.engines.plugin.library import choose_plugin
from evit_deploy.errors import InputError, MissingRequirement, first_few
from evit_deploy.export.blocks import Known
from evit_deploy.export.card import read_card
from evit_deploy.export.portable import portable
from evit_deploy.export.precision import PRECISIONS, QUANTIZED, lowered
from evit_deploy.export.quantization import Quantized, layers_like
from evit_deploy.export.variants import with_indices
from evit_deploy.progress import doing, stage
from evit_deploy.recipe.options import BuildOptions, ConvertOptions, Linear
from evit_deploy.registry import RUNTIMES, TARGETS
from evit_deploy.report.report import Report, SensitivityRow
from evit_deploy.targets.target import PORTABLE, Exported, Target, all_targets
from evit_deploy.verification.answers.sensitivity import Shown, kept_within, layer_costs, of_array

_LOG = logging.getLogger(__name__)


class Lowering(msgspec.Struct, frozen=True):
    """Targets and precision of a conversion, with all defaults filled in.

    Args:
        targets: Names in the registry of targets, starting with the portable one, from which the others are made.
        precision: Precision of the ONNX file, and so of every target.
        options: The requested options.
    """

    targets: tuple[str, ...]
    precision: str
    options: ConvertOptions

    @property
    def engine_target(self) -> str | None:
        """The target that builds ``engine.plan``, if any."""
        return next((name for name in self.targets if TARGETS.get(name).engine), None)

    @property
    def base(self) -> str:
        """Precision of unquantized parts: GPUs do not fuse FP32 attention, and FP16 is slow on CPUs."""
        return "fp16" if self.engine_target else "fp32"

    @property
    def linear(self) -> Linear:
        """Form of the linear layers. All targets are made from one file, so an engine target, if any, decides."""
        return self.options.linear or TARGETS.get(self.engine_target or PORTABLE).linear

    @property
    def runtimes(self) -> tuple[str, ...]:
        """Runtimes that verify the targets here; an engine for other GPUs has none."""
        found = [self.provers(name) for name in self.targets]
        return tuple(dict.fromkeys(runtime for runtimes in found for runtime in runtimes))

    def provers(self, target: str) -> tuple[str, ...]:
        """Runtimes that verify one target here."""
        made: type[Target] = TARGETS.get(target)
        return made.provers(self.precision, self.options_of(target))

    def options_of(self, target: str) -> Any:
        """Returns the options of one target.

        Raises:
            InputError: The target has no such option, or a value is invalid.
        """
        kind = TARGETS.get(target).Options
        if kind is BuildOptions:
            return self.options.build
        try:
            return msgspec.convert(self.options.target_options.get(target, {}), kind, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(kind.__struct_fields__) or "no options"
            raise InputError(
                f"{target} does not take these options: {error}", where=f"target_options.{target}", wanted=known
            ) from None


def lowering(options: ConvertOptions | None = None, *, calibrated: bool = False) -> Lowering:
    """Fills in the defaults and checks, before any work, that this machine can create every target.

    Args:
        options: The requested options. Without targets: an engine for this machine if TensorRT is usable, else
            ``onnx``.
        calibrated: Whether calibration images come from another source than ``options.calibration``.

    Raises:
        InputError: Targets, precision and options contradict one another.
        MissingRequirement: A package or a device is missing.
    """
    options = options or ConvertOptions()
    known = all_targets()
    if options.plugin == "auto":
        choose_plugin(options.plugin)  # report a missing plugin before anything else
    for name in options.targets:
        if name not in known:
            TARGETS.get(name)  # raises, with the nearest name
    targets = tuple(dict.fromkeys(options.targets)) or _automatic(known)
    engines = [name for name in targets if known[name].engine]
    if len(engines) > 1:
        raise InputError(
            "a bundle holds one engine", where="--target", seen=" and ".join(engines), wanted="one of them",
            fix="Convert once for each.",
        )  # fmt: skip
    precision = options.precision or ("fp16" if engines else "fp32")
    _check_precision(precision, targets, calibrated or options.calibration is not None)
    made = Lowering((PORTABLE, *(name for name in targets if name != PORTABLE)), precision, options)
    _check_quantized(made)
    _refuse_unused(made)
    for name in made.targets:
        for error in known[name].refuse(precision, made.options_of(name)):
            raise error
    _check_runtimes(made)
    return made


def _automatic(known: dict[str, type[Target]]) -> tuple[str, ...]:
    return next(((name,) for name, target in known.items() if target.automatic()), (PORTABLE,))


def _check_precision(precision: str, targets: Sequence[str], calibrated: bool) -> None:
    if precision not in PRECISIONS:
        raise InputError("unknown precision", where="--precision", seen=repr(precision), wanted=", ".join(PRECISIONS))
    for name in targets:
        able = TARGETS.get(name).precisions
        if precision not in able:
            others = [
                other for other, target in all_targets().items() if target.engine and precision in target.precisions
            ]
            fix = f"Use --precision {next((p for p in ('int8', 'fp16') if p in able), able[0])}"
            raise InputError(
                f"{name} has no {precision}", where="--precision", seen=precision, wanted=", ".join(able),
                fix=f"{fix}, or --target {others[0]}." if TARGETS.get(name).engine and others else f"{fix}.",
            )  # fmt: skip
    if precision in QUANTIZED and not calibrated:
        raise InputError(
            f"{precision} needs real images, from which it learns the range of every activation",
            where=f"--precision {precision}",
            fix="Give a folder of them with --calibration: 128 or more, like those that the model will see.",
        )
    if calibrated and precision not in QUANTIZED:
        raise InputError(
            f"{precision} needs no calibration images", where="--calibration", fix="Leave it out, or ask for int8."
        )


def _check_quantized(made: Lowering) -> None:
    """Refuses options of quantization for a precision that is not quantized."""
    default = ConvertOptions()
    for field in ("keep_precision", "max_drop", "sensitivity"):
        if made.precision not in QUANTIZED and getattr(made.options, field) != getattr(default, field):
            what = f"{made.precision} quantizes no layer, which this is about"
            raise InputError(what, where=flag(field), fix="Leave it out, or ask for int8.")


def _refuse_unused(made: Lowering) -> None:
    """Refuses options that would have no effect."""
    strange = next((name for name in made.options.target_options if name not in made.targets), None)
    if strange is not None:
        raise InputError(
            "options of a target that is not made", where="target_options", seen=strange, wanted=", ".join(made.targets)
        )
    if made.engine_target is not None:
        return
    default = BuildOptions()
    for field in BuildOptions.__struct_fields__:
        if getattr(made.options, field) not in (getattr(default, field), "none"):
            builders = [name for name, target in all_targets().items() if target.engine]
            fix = "Leave it out, or add a --target that builds an engine: " + ", ".join(builders) + "."
            raise InputError("there is no engine to build", where=flag(field), fix=fix)


def _check_runtimes(made: Lowering) -> None:
    """Checks that the runtimes that verify the targets are installed."""
    for name in made.runtimes:
        missing = RUNTIMES.get(name).missing()
        if missing is not None:
            why = "ONNX Runtime has no bf16 on a CPU" if made.precision == "bf16" else "it was asked for"
            raise MissingRequirement(f"{name} is needed ({why}): {missing.what}", seen=missing.seen, fix=missing.fix)


class Written(msgspec.Struct, frozen=True):
    """Result of :func:`write_targets`.

    Args:
        engine: The manifest's record of the model's engine, if one was built.
        report: Checks of the targets.
    """

    engine: Engine | None
    report: Report


class Exports(msgspec.Struct):
    """Cache for exports of the same weights; :func:`export` reads and extends it.

    Args:
        known: Exported blocks, by form of the linear layers.
        dense: Dense twins on disk, by precision, base precision, form and unquantized layers. Later exports copy these
            files, so remove the entry when you move or delete one.
    """

    known: dict[str, Known] = {}
    dense: dict[tuple[str, ...], Path] = {}


class Files(msgspec.Struct, frozen=True):
    """Result of :func:`export`.

    Args:
        quantized: For ``int8`` and ``fp8``: the model and its twin, without index outputs; no twin if it was copied.
        unquantized: Names of the linear layers that stayed in the base precision.
        report: Notes and sensitivity of the layers.
    """

    quantized: tuple[onnx.ModelProto, onnx.ModelProto | None] | None = None
    unquantized: tuple[str, ...] = ()
    report: Report = Report()


def export(
    models: tuple[Any, Any],
    made: Lowering,
    about: tuple[str, Preprocess],
    calibration: np.ndarray | None,
    folder: Path,
    exports: Exports,
    shown: Shown | None = None,
) -> Files:
    """Exports a model and its dense twin, sets their precision and writes both.

    Args:
        models: The reduced model and its dense twin, FP32.
        made: Precision and options.
        about: timm name and preprocessing.
        calibration: Calibration images for ``int8`` and ``fp8``, float32 ``[n, C, H, W]``.
        folder: Folder to write to.
        exports: Cache of earlier exports.
        shown: Images on which ``max_drop`` is measured. Default: the calibration images.

    Raises:
        GateFailed: Quantizing costs more than ``max_drop``, whichever layers stay in the base precision.
        InputError: A pattern of ``keep_precision`` names no layer, or weights are too large for the precision.
        StageError: The exporter or the quantizer failed.
    """
    known = exports.known.setdefault(made.linear, Known())
    unquantized: tuple[str, ...] = ()
    report = Report()

    def of_the_model(quantized: Quantized) -> Collection[str]:
        nonlocal report
        assert calibration is not None
        kept, report = _chosen(quantized, made, calibration, shown or Shown(of_array(calibration)))
        return kept

    (folder / DENSE).parent.mkdir()
    protos: list[onnx.ModelProto | None] = []
    kind: tuple[str, ...] = ()
    for model, file, label in zip(models, (MODEL, DENSE), ("to ONNX", "the dense twin"), strict=True):
        kind = made.precision, made.base, made.linear, *unquantized
        earlier = exports.dense.get(kind) if file == DENSE else None
        if earlier is not None:
            shutil.copyfile(earlier, folder / file)
            continue
        doing(_LOG, f"exporting {label}")
        exported = portable(model, name=about[0], preprocess=about[1], linear=made.linear, known=known)
        indices = made.options.indices
        if made.precision == "fp32":
            exported.save(folder / file, indices=indices)
            continue
        doing(_LOG, f"setting {made.precision}")
        # Leave the same layers of the twin unquantized, so that only the tokens make a difference in speed.
        choose = of_the_model if file == MODEL else lambda quantized: unquantized  # noqa: B023 -- called at once
        proto = lowered(exported.whole(), made.precision, made.base, calibration, choose)
        onnx.save(with_indices(proto) if indices else proto, folder / file)
        protos.append(proto)
        card = read_card(proto)
        unquantized = card.unquantized if file == MODEL and card is not None else unquantized
    exports.dense.setdefault(kind, folder / DENSE)  # `kind` is the twin's after the loop
    if made.precision not in QUANTIZED:
        return Files()
    quantized: Any = protos[0], protos[1] if len(protos) > 1 else None
    return Files(quantized, unquantized, report)


def _chosen(
    quantized: Quantized, made: Lowering, calibration: np.ndarray, shown: Shown
) -> tuple[Collection[str], Report]:
    """Chooses the layers to leave in the base precision: those named by the user, and those needed for ``max_drop``."""
    options, report = made.options, Report()
    kept: Sequence[str] = layers_like(options.keep_precision, quantized.layers)
    costs: Sequence[SensitivityRow] = ()

    def measured() -> Sequence[SensitivityRow]:
        doing(_LOG, "measuring what each layer costs")
        return layer_costs(quantized, calibration, embeds=shown.embeds, threads=shown.threads)

    if options.max_drop is not None:
        found = kept_within(quantized, options.max_drop, shown, kept, measured)
        kept, costs = found.layers, found.costs
        check = msgspec.structs.replace(found.check, name=f"{made.precision}: {found.check.name}")
        report = Report(checks=(check,), notes=found.notes)
    if options.sensitivity and not costs:
        costs = measured()
    rows = tuple(msgspec.structs.replace(row, kept=row.layer in kept) for row in costs)
    return kept, report + _kept_note(kept, quantized, made) + Report(sensitivity=rows)


def _kept_note(kept: Sequence[str], quantized: Quantized, made: Lowering) -> Report:
    """A note about the share of the model that is not quantized."""
    if not kept:
        return Report()
    total, share = len(quantized.layers), quantized.share(kept)
    return Report(
        notes=(
            f"In {made.base} remain {len(kept)} of {total} linear layers, {100 * share:.1f} % of their weights: "
            f"{first_few(kept, 8)}.",
        )
    )


def write_targets(exported: Exported, made: Lowering) -> Written:
    """Writes every target of an exported model and audits it."""
    engine, report = None, Report()
    for name in made.targets:
        target: type[Target] = TARGETS.get(name)
        if name != PORTABLE:
            stage(_LOG, f"building the engines with {name}" if target.engine else f"writing the files of {name}")
        artifacts = target.write(exported, made.options_of(name))
        report += target.audit(artifacts, exported.plan)
        built = next((artifact.engine for artifact in artifacts if not artifact.dense and artifact.engine), None)
        engine = built or engine
        if built is not None and not made.provers(name):
            report += Report(
                notes=(f"The engine was built ahead of time and not run: verify it on {', '.join(built.gpus)}.",)
            )
    return Written(engine, report)
