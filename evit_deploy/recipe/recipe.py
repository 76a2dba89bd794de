"""Recipes: one YAML file configures training, token reduction, comparison, conversion and profiling.

Every section is a struct. Errors for unknown keys, wrong types and values out of range name the key. The string below a
field is its documentation; ``recipe_schema`` adds it to the JSON Schema. Reading and checking a recipe takes
milliseconds, because nothing here imports PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.fields import field_docs, structs_in
from evit_deploy.recipe.file import load, read_document
from evit_deploy.recipe.options import (
    CompareOptions,
    ConvertOptions,
    ConvertSection,
    Precision,
    PreprocessOptions,
    ProfileSection,
)
from evit_deploy.recipe.sections import BatchSize, Section, Share, Threads
from evit_deploy.recipe.sections import DataSection as DataSection
from evit_deploy.recipe.sections import ModelSection as ModelSection
from evit_deploy.recipe.sections import TeacherSection as TeacherSection
from evit_deploy.recipe.sections import TrainSection as TrainSection
from evit_deploy.tokens.plan import TokenSpec

Published = Annotated[float, Meta(ge=0, le=1e9)]


class CompareSection(Section, frozen=True, kw_only=True):
    """Models to compare the fine-tuned model with on the validation images; none of them is trained."""

    untrained: bool = True
    """Whether to evaluate the dense weights with their tokens reduced but without fine-tuning."""
    baselines: tuple[str, ...] = ("random", "inverse")
    """Methods to apply to the dense weights instead of the recipe's: ``random`` keeps random tokens, ``inverse`` those
    with the lowest scores, ``slice`` the first ones."""
    keep_rates: tuple[Annotated[float, Meta(gt=0, le=1)], ...] = ()
    """Keep rates to evaluate without training, in addition to the recipe's."""


class ExpectSection(Section, frozen=True, kw_only=True):
    """Accuracy gates: the run fails if a model is below them; its results are kept."""

    dense: Share | None = None
    """Minimum top-1 of the dense model, as a share."""
    finetuned: Share | None = None
    """Minimum top-1 of the fine-tuned model, as a share."""
    finetuned_loss: Share | None = 0.0
    """How far the fine-tuned model's top-1 may be below that of its initial weights with the same token reduction.
    Fails only if the whole 95 % interval of the difference is lower; ``null`` turns the gate off."""
    untrained_loss: Share | None = None
    """How far top-1 may drop when the dense model's tokens are reduced without fine-tuning."""
    over: dict[str, Share] = msgspec.field(default_factory=dict)
    """For each of ``compare.baselines`` (``random``, ``inverse``): minimum lead of the recipe's method in top-1, both
    on the dense weights without fine-tuning. It shows that the method keeps the right tokens."""


class Recipe(Section, frozen=True, kw_only=True):
    """The configuration of ``evit-deploy run`` and ``evit-deploy train``."""

    name: str
    """Name of the recipe, included in reports."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """Seed of all random numbers."""
    model: ModelSection
    """The model to start from."""
    data: DataSection
    """Images for training and evaluation."""
    dense: TrainSection | None = None
    """Training of the dense model before its tokens are reduced; ``null`` starts from the checkpoint, or from timm's
    pretrained weights."""
    tokens: TokenSpec
    """How tokens are reduced: keep_rate, locations, fuse, method, options."""
    finetune: TrainSection
    """Training of the model with its tokens reduced."""
    teacher: TeacherSection | None = None
    """Teacher used for distillation during fine-tuning, in addition to the labels."""
    published: dict[str, Published] | None = None
    """Published results for this recipe, printed with the results of the run: ``top1``, ``top5`` (percent) and others;
    for EViT's also the ``table``."""
    compare: CompareSection = CompareSection()
    """Models to compare the result with."""
    expect: ExpectSection = ExpectSection()
    """Accuracy that the result must reach."""
    convert: ConvertSection = ConvertSection()
    """How the result is converted."""
    profile: ProfileSection = ProfileSection()
    """How speed is measured."""

    @property
    def starts_from_weights(self) -> bool:
        """Whether the model with its tokens reduced starts from trained dense weights (the paper's oracle)."""
        return self.dense is not None or self.model.checkpoint is not None or self.model.pretrained

    def __post_init__(self) -> None:
        super().__post_init__()
        data = self.data
        expect, compare = self.expect, self.compare
        if self.convert.preprocess != PreprocessOptions():
            raise RecipeError(
                "a model is converted with the preprocessing of its training", where="convert.preprocess",
                fix="Use model.preprocess.",
            )  # fmt: skip
        if self.model.preprocess != PreprocessOptions() and data.name != "folder":
            raise RecipeError(
                f"the preprocessing of {data.name} is fixed", where="model.preprocess", fix="Leave it out."
            )
        strange = next((name for name in expect.over if name not in compare.baselines), None)
        if strange is not None:
            names = ", ".join(compare.baselines) or "none"
            fix = "Add it to compare.baselines."
            raise RecipeError("not a baseline", where="expect.over", seen=strange, wanted=names, fix=fix)
        if not compare.untrained and (expect.over or expect.untrained_loss is not None):
            what = "expect needs the model before fine-tuning, but compare.untrained is false"
            raise RecipeError(what, where="expect", fix="Set compare.untrained=true.")
        if data.name == "folder" and (data.mixup or data.cutmix):
            for key in ("dense", "finetune"):
                section = getattr(self, key)
                if section is not None and section.batch_size % 2:
                    raise RecipeError(
                        "mixup and CutMix need an even batch size", where=f"{key}.batch_size", seen=section.batch_size
                    )
        self._check_token_labels()
        self._check_dynamicvit()
        self._check_evo_vit()

    def _check_evo_vit(self) -> None:
        chosen = self.tokens.method == "evo-vit"
        for key, run in {"dense": self.dense, "finetune": self.finetune}.items():
            if run is not None and run.layer_wise_epochs and not (chosen and key == "finetune"):
                raise RecipeError(
                    "only the method evo-vit sorts patches", where=f"{key}.layer_wise_epochs",
                    seen=self.tokens.method, fix="Leave it out.",
                )  # fmt: skip
        if chosen and self.finetune.token_labels is not None:
            raise RecipeError(
                "evo-vit reorders patches, but token labels belong to positions",
                where="finetune.token_labels", fix="Leave it out.",
            )  # fmt: skip

    def _check_dynamicvit(self) -> None:
        chosen = self.tokens.method == "dynamicvit"
        for key, run in {"dense": self.dense, "finetune": self.finetune}.items():
            if run is not None and run.dynamicvit is not None and not (chosen and key == "finetune"):
                raise RecipeError(
                    "this is the loss of the method dynamicvit", where=f"{key}.dynamicvit", seen=self.tokens.method,
                    fix="Leave it out." if key == "dense" else "Leave it out, or set tokens.method=dynamicvit.",
                )  # fmt: skip
        kind = None if self.teacher is None else self.teacher.kind
        if kind is not None and (kind == "dense") != chosen:
            raise RecipeError(
                "a teacher of kind dense and the method dynamicvit go together", where="teacher.kind",
                seen=kind,
                wanted="dense" if chosen else "logits, token or token_labels",
                fix="Leave the teacher out: the dense weights that fine-tuning starts from take its place."
                if chosen else None,
            )  # fmt: skip
        if not chosen:
            return
        if self.finetune.token_labels is not None:
            raise RecipeError(
                "the loss of dynamicvit has no part for token labels", where="finetune.token_labels",
                fix="Leave it out: the dense teacher's output for each token replaces it.",
            )  # fmt: skip
        if self.finetune.model_mode == "eval":
            raise RecipeError(
                "in evaluation mode tokens are removed, and the predictors cannot learn which",
                where="finetune.model_mode", fix="Set finetune.model_mode=train.",
            )  # fmt: skip

    def _check_token_labels(self) -> None:
        data, teacher = self.data, self.teacher
        runs = {"dense": self.dense, "finetune": self.finetune}
        asked = {key: run.token_labels for key, run in runs.items() if run is not None and run.token_labels is not None}
        if data.token_labels is not None and not asked:
            fix = "Add finetune.token_labels={}, or leave data.token_labels out."
            raise RecipeError("nothing learns from the token labels", where="data.token_labels", fix=fix)
        for key, how in asked.items():
            if how.mix_token and data.name == "folder" and (data.mixup or data.cutmix):
                fix = f"Set data.mixup=0 and data.cutmix=0, or {key}.token_labels.mix_token=0."
                raise RecipeError("MixToken replaces mixup and CutMix", where=f"{key}.token_labels", fix=fix)
        if teacher is None or (teacher.kind != "token_labels" and "finetune" not in asked):
            return
        if teacher.kind != "token_labels":
            raise RecipeError(
                "token labels cannot be combined with another kind of teacher", where="teacher.kind",
                seen=teacher.kind, wanted="token_labels", fix="Set teacher.kind, or leave one of the two out.",
            )  # fmt: skip
        if "finetune" not in asked:
            fix = "Add finetune.token_labels={}."
            raise RecipeError("nothing learns from the teacher's token labels", where="teacher.kind", fix=fix)
        if data.token_labels is not None:
            fix = "Leave data.token_labels or the teacher out."
            raise RecipeError("token labels come both from a folder and from a teacher", where="teacher.kind", fix=fix)


class Sweep(Section, frozen=True, kw_only=True):
    """A recipe that measures the speed of many keep rates side by side, without training.

    Weights are random, because speed does not depend on them.
    """

    name: str
    """Name of the recipe, included in reports."""
    models: Annotated[tuple[str, ...], Meta(min_length=1)]
    """timm names."""
    keep_rates: Annotated[tuple[Annotated[float, Meta(gt=0, lt=1)], ...], Meta(min_length=1)]
    """Keep rates to measure, in addition to the dense model."""
    fuse: Annotated[tuple[bool, ...], Meta(min_length=1)] = (True,)
    """With fusion, without, or both."""
    runtimes: Annotated[tuple[str, ...], Meta(min_length=1)] = ("eager:fp32",)
    """``runtime:precision`` each: ``eager:fp32``, ``torch.compile:fp16``, ``tensorrt:fp16``. On a GPU PyTorch's
    runtimes also accept ``tf32``: FP32 with matrix products in TF32. ``fp32`` never uses TF32."""
    batch_size: BatchSize = 128
    """Images per call."""
    duration: Annotated[float, Meta(gt=0, le=1e6)] = 60.0
    """Seconds to measure each model on each kind of device, all its variants there in turn."""
    threads: Threads | None = None
    """CPU threads; ``null`` uses the runtime's default."""
    published: dict[str, dict[str, Published]] = msgspec.field(default_factory=dict)
    """Published images/s by model and variant (``dense``, ``0.7``, ``0.7 without fusion``)."""


class CompareEntry(Section, frozen=True, kw_only=True):
    """One bundle of a comparison: an existing bundle, or a model and token reduction to create one from."""

    bundle: str | None = None
    """An existing bundle; only ``name`` can be given with it."""
    checkpoint: str | None = None
    """Checkpoint to convert: a file, or a timm name to download weights for. [default: the recipe's]"""
    model: str | None = None
    """timm name. With a checkpoint it sets the architecture; without one the weights are random. [default: the
    recipe's]"""
    tokens: TokenSpec | None = None
    """How tokens are reduced: method, keep_rate, locations, fuse, options. [default: the checkpoint's]"""
    precision: Precision | None = None
    """Precision of this bundle's files. [default: that of ``convert``]"""
    name: str | None = None
    """Name in the tables and of the bundle's folder. [default: model, method and keep rate]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = (self.checkpoint, self.model, self.tokens, self.precision)
        if self.bundle is not None and any(other is not None for other in others):
            raise RecipeError("an existing bundle accepts only a name", where="compare", seen=self.bundle)
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name):
            raise RecipeError("not a name for a folder", where="compare", seen=repr(self.name))


class CompareRecipe(CompareOptions, frozen=True, kw_only=True):
    """A recipe that compares bundles in one interleaved run, and first creates those that do not exist.

    Without a checkpoint in the entry or the recipe, weights are random: speed does not depend on them.
    """

    name: str
    """Name of the recipe, included in reports."""
    seed: Annotated[int, Meta(ge=0, lt=2**32)] = 0
    """Seed of random weights, for entries without a checkpoint."""
    checkpoint: str | None = None
    """Checkpoint for entries without one."""
    model: str | None = None
    """timm name for entries with neither a model nor a checkpoint."""
    convert: ConvertOptions = ConvertOptions(targets=("onnx",))
    """How bundles are created: targets, precision, options of the builder."""
    compare: Annotated[tuple[CompareEntry, ...], Meta(min_length=2)]
    """The bundles, at least two."""


def is_comparison(path: str | Path) -> bool:
    """Whether a recipe file is a :class:`CompareRecipe` (its ``compare`` is a list); false if it cannot be read."""
    try:
        return isinstance(read_document(Path(path)).get("compare"), list)
    except RecipeError:
        return False


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> CompareRecipe:
    """Reads and checks a comparison; see :func:`load_recipe`."""
    return load(path, overrides, CompareRecipe)


def is_sweep(path: str | Path) -> bool:
    """Whether a recipe file is a :class:`Sweep` (it has ``models``); false if it cannot be read."""
    try:
        return "models" in read_document(Path(path))
    except RecipeError:
        return False


def load_sweep(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads and checks a sweep; see :func:`load_recipe`."""
    return load(path, overrides, Sweep)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: A YAML file, or the name of a recipe that comes with the package (``digits``, ``recipes/digits.yaml``).
        overrides: ``section.key=value`` each, applied in order; values are parsed as YAML.

    Raises:
        RecipeError: The file cannot be read, or the recipe or an override is invalid.
    """
    return load(path, overrides, Recipe)


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML with every default written out; ``load_recipe`` reads it back as an equal recipe."""
    return yaml.safe_dump(msgspec.to_builtins(recipe), sort_keys=False, allow_unicode=True)


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON Schema of a recipe with the documentation of every field, for completion in editors."""
    schema = msgspec.json.schema(Recipe)
    for struct in structs_in(Recipe):
        properties = schema["$defs"][struct.__name__]["properties"]
        for field, text in field_docs(struct).items():
            properties[field] = {"description": text, **properties[field]}
    return schema
