"""The training sections of a recipe: model, data, training run and teacher.

:mod:`evit_deploy.recipe.recipe` combines them.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.fields import check_numbers

Share = Annotated[float, Meta(ge=0, le=1)]
# Every number has two limits, so that neither `inf` nor 10**400 reaches a library. The largest count fits a C int.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
BatchSize = Annotated[int, Meta(ge=1, le=65_536)]
Threads = Annotated[int, Meta(ge=1, le=4_096)]
ImageSize = Annotated[int, Meta(ge=1, le=4_096)]
CropMode = Literal["center", "center-floor", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all sections; checks numbers against their limits."""

    # Groups of mutually exclusive keys: an override of one removes the others that the file sets.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __post_init__(self) -> None:
        check_numbers(self)


class PreprocessOptions(Section, frozen=True, kw_only=True):
    """Preprocessing and class names that replace the checkpoint's."""

    mean: tuple[Annotated[float, Meta(ge=-1e3, le=1e3)], ...] | None = None
    """Mean to subtract, one value per channel, for images scaled to 0..1. [default: the checkpoint's]"""
    std: tuple[Annotated[float, Meta(ge=1e-6, le=1e3)], ...] | None = None
    """Standard deviation to divide by, one value per channel. [default: the checkpoint's]"""
    crop_pct: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Share of the resized image's side that the crop keeps: 0.875 for 224 of 256. [default: the checkpoint's]"""
    crop_mode: CropMode | None = None
    """How images are cropped: center, after resizing the shorter side; center-floor, the same with margins rounded as
    Hugging Face's processors do; squash, after resizing both sides; border, after padding. [default: the
    checkpoint's]"""
    interpolation: Interpolation | None = None
    """Resampling filter. [default: the checkpoint's]"""
    labels: str | None = None
    """File of class names, one per line or as JSON. [default: the checkpoint's, else the folder names of labeled
    images]"""

    def __post_init__(self) -> None:
        if isinstance(self.labels, Path):  # accept a Path as well
            msgspec.structs.force_setattr(self, "labels", str(self.labels))
        super().__post_init__()


class ModelSection(Section, frozen=True, kw_only=True):
    """The model to start from. Training needs ``name``, ``checkpoint`` or both."""

    name: str | None = None
    """timm name; needed without a checkpoint, or when a checkpoint fits several models."""
    checkpoint: str | None = None
    """Checkpoint file to start from, relative to the current directory."""
    args: dict[str, Any] = {}
    """Further arguments of ``timm.create_model`` (patch_size, embed_dim, depth, num_heads, mlp_ratio, ...). A
    ``global_pool`` other than ``token`` needs a method that supports pooling heads, and ``compare.baselines: []``."""
    image_size: ImageSize | None = None
    """Side of the square input in pixels; ``null`` uses the model's."""
    pretrained: bool = True
    """Without a checkpoint and without a ``dense`` section: whether to start from timm's pretrained weights. ``false``
    trains the model with its tokens reduced from scratch."""
    init: Literal["timm", "scaled"] = "timm"
    """Initial weights of a model trained from scratch. ``scaled``: Xavier with smaller residual branches and larger
    position embeddings, which learns several times faster on small data."""
    preprocess: PreprocessOptions = PreprocessOptions()
    """Preprocessing that replaces the checkpoint's; class names always come from the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preprocess.labels is not None:
            raise RecipeError(
                "class names come from the training images", where="model.preprocess.labels",
                seen=self.preprocess.labels, fix="Leave it out.",
            )  # fmt: skip
        if not self.pretrained and (self.checkpoint is not None or self.name is None):
            raise RecipeError(
                "training from scratch needs a name and no checkpoint", where="model.pretrained", seen=False
            )
        elsewhere = {"num_classes": "the data decides it", "pretrained": "it is model.pretrained",
                     "img_size": "use image_size"}  # fmt: skip
        for key, reason in elsewhere.items():
            if key in self.args:
                raise RecipeError(f"{key} is not set here: {reason}", where="model.args")


class DataSection(Section, frozen=True, kw_only=True):
    """Labeled images for training and evaluation, and the augmentation of training images."""

    alternatives = (("validation", "validation_share"),)

    name: Literal["digits", "digits-in-the-wild", "folder"]
    """``digits``: the 1,797 digits inside scikit-learn. ``digits-in-the-wild``: the same digits on crops of photographs
    inside scikit-learn and scikit-image. Neither needs a download. ``folder``: your own images."""
    train: str | None = None
    """Training images (``folder`` only): a folder with one folder per class, a ``FILE.tar`` of such a folder, a folder
    with one tar file per class, ``wds/FOLDER`` (local WebDataset shards) or ``hfds/NAME`` (Hugging Face dataset, by
    name or folder)."""
    validation: str | None = None
    """Validation images in one of the same forms, with the class names of ``train`` (``folder`` only)."""
    validation_share: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Instead of ``validation``: share of each class of ``train``, a folder of class folders, to hold out of training
    and validate on. File names decide which images these are, so every run holds out the same ones."""
    train_split: str | None = None
    """``wds``: shards such as ``train-{0000..0009}.tar``, or a split of ``_info.json``; by default every shard.
    ``hfds``: the split, by default ``train``."""
    validation_split: str | None = None
    """The same for ``validation``; ``hfds``: by default ``validation``."""
    input_key: str | None = None
    """``hfds``: column of the images, by default ``image``."""
    target_key: str | None = None
    """``hfds``: column of the labels, by default ``label``. ``wds``: field of each image's JSON file; by default the
    label is in the ``.cls`` file."""
    num_classes: Count | None = None
    """``wds``: number of classes."""
    token_labels: str | None = None
    """Folder of token label maps, ``<class>/<image's name>.pt``, one for every training image (``folder`` only, with
    ``train`` a folder of class folders). Used by runs that have a ``token_labels`` section."""
    cache: str | None = None
    """Folder to cache decoded training images in (``folder`` only); ``null`` decodes them in every pass."""
    cache_size: Annotated[int, Meta(ge=16, le=16_384)] = 256
    """Maximum length of a cached image's shorter side in pixels; crops have no more detail than this."""
    max_corrupt: Annotated[float, Meta(ge=0, le=1e9)] = 0.01
    """Unreadable images to tolerate before the run stops: a share below 1, a number from 1 on. In training another
    image replaces an unreadable one, in validation it is skipped (``folder`` only)."""
    repeated_augmentation: Count = 1
    """How many times in a row an image is used, each time with new augmentation; a pass covers fewer images by this
    factor. DeiT and EViT were trained with 3 (``folder`` only)."""
    images: Count = 100_000
    """Training images to generate; the number does not affect speed (``digits-in-the-wild`` only)."""
    test_images: Count = 2_000
    """Validation images to generate, from other digits and photographs (``digits-in-the-wild`` only)."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """``easy``: a digit covers 3/8 of the image's side and is placed on a grid of eighths. ``medium``: it is placed
    anywhere. ``hard``: it can also be down to half that size, and fainter (``digits-in-the-wild`` only)."""
    curriculum_threshold: Share = 0.7
    """Running training accuracy above which images become harder while a model is trained from scratch; 0 raises the
    level at every step (``digits-in-the-wild`` only)."""
    curriculum_rate: Annotated[float, Meta(gt=0, le=1)] = 0.005
    """Increase of the level in one step, from 0 (centered, white on black) to 1 (``digits-in-the-wild`` only)."""
    workers: Annotated[int, Meta(ge=0, le=1_024)] = 4
    """Processes that read or generate images (not ``digits``); 0 uses the main process."""
    evaluation_batch_size: BatchSize = 64
    """Images per batch in evaluation; does not affect the result."""
    rotation: Annotated[float, Meta(ge=0, le=180)] = 10.0
    """Maximum rotation in degrees, in either direction (``digits`` only)."""
    scale: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Maximum change of size as a share, in either direction (``digits`` only)."""
    shift: Share = 0.09
    """Maximum shift in each direction, as a share of the image's side (``digits`` only)."""
    crop: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of an image's area that a training crop covers (``folder`` only)."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment or AutoAugment in timm's notation, or ``null`` (``folder`` only)."""
    color_jitter: Share = 0.4
    """Strength of color jitter; not used together with ``auto_augment`` (``folder`` only)."""
    flip: Share = 0.5
    """Probability that a training image is mirrored; 0 where left and right differ, as in writing (``folder`` only)."""
    random_erasing: Share = 0.25
    """Probability that a rectangle of a training image is replaced by noise (``folder`` only)."""
    mixup: Annotated[float, Meta(ge=0, le=1e3)] = 0.8
    """Mixup's alpha; 0 turns it off (``folder`` only)."""
    cutmix: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """CutMix's alpha; 0 turns it off (``folder`` only)."""
    mix_switch: Share = 0.5
    """Probability of CutMix instead of mixup when both are on (``folder`` only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.crop[0] <= self.crop[1]:
            raise RecipeError("crop is not a range", seen=list(self.crop), wanted="0 < smallest <= largest <= 1")
        if self.max_corrupt >= 1 and self.max_corrupt % 1:
            raise RecipeError("max_corrupt is neither a share nor a number", seen=self.max_corrupt,
                              wanted="below 1, or a whole number")  # fmt: skip
        if self.name != "folder" and (self.train or self.validation or self.validation_share or self.token_labels):
            raise RecipeError("the digits have no folders", where="data", fix="Set data.name=folder to use images.")
        if self.validation is not None and self.validation_share is not None:
            raise RecipeError(
                "the validation images are not clear", where="data", seen="validation and validation_share",
                wanted="one of them",
            )  # fmt: skip
        if self.token_labels is not None and (self.mixup or self.cutmix):
            raise RecipeError(
                "mixup and CutMix mix images, but a token label map belongs to one image", where="data",
                seen=f"mixup {self.mixup:g}, cutmix {self.cutmix:g}",
                fix="Set data.mixup=0 and data.cutmix=0; mix_token of the run's token_labels takes their place.",
            )  # fmt: skip
        if self.token_labels is not None and (self.auto_augment or "").startswith("augmix"):
            raise RecipeError(
                "AugMix lays versions of an image over each other, which token labels cannot follow",
                where="data.auto_augment", seen=self.auto_augment, wanted="RandAugment, AutoAugment or null",
            )  # fmt: skip


class TokenLabelSection(Section, frozen=True, kw_only=True):
    """Training with a label for every patch token, in addition to the image's label (LV-ViT, section 3.2).

    The labels come from ``data.token_labels`` or from a teacher of kind ``token_labels``.
    """

    weight: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """Weight of the patch tokens' loss; the class token's loss has weight 1."""
    mix_token: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """MixToken's alpha: a box of each image's patch tokens, with their labels, comes from another image of the batch.
    0 turns it off."""


class DynamicViTSection(Section, frozen=True, kw_only=True):
    """Weights of DynamicViT's additional losses; the classification loss has weight 1. For its method only."""

    ratio_weight: Annotated[float, Meta(ge=0, le=1e3)] = 2.0
    """Weight of the difference between the share of patches kept and the keep rate; 5 in the paper's DeiT-B."""
    logits_weight: Annotated[float, Meta(ge=0, le=1e3)] = 0.5
    """Weight of the logits' distance from those of the dense model that fine-tuning starts from, or of a ``dense``
    teacher."""
    tokens_weight: Annotated[float, Meta(ge=0, le=1e3)] = 0.5
    """Weight of the kept tokens' distance from the teacher's."""


class TrainSection(Section, frozen=True, kw_only=True):
    """One training run: AdamW, linear warm-up, cosine decay. Exactly one of ``steps`` and ``epochs`` is needed."""

    alternatives = (("steps", "epochs"),)

    steps: Count | None = None
    """Length in optimizer steps."""
    epochs: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Length in passes over the training images; incomplete batches are dropped."""
    batch_size: Annotated[int, Meta(ge=2, le=65_536)] = 64
    """Images per batch in every process; must be even with mixup or CutMix."""
    accumulate: Count = 1
    """Batches whose gradients are summed for one step: a step has processes × accumulate × batch_size images."""
    processes: Count | None = None
    """Processes (GPUs) that the recipe was written for; with another number, the ``accumulate`` that restores the batch
    is logged."""
    learning_rate: Annotated[float, Meta(gt=0, le=1e3)]
    """Highest learning rate, reached after the warm-up."""
    learning_rate_batch: Count | None = None
    """Images per step that ``learning_rate`` is meant for: the rate is multiplied by the step's images divided by this
    number. ``null``: not scaled."""
    min_learning_rate: Annotated[float, Meta(ge=0, le=1e3)] = 0.0
    """Learning rate at the end. Not scaled by the images of a step, unless that scales the highest rate below it; then
    it is scaled too, with a warning."""
    warmup: Share = 0.0
    """Share of the run over which the learning rate rises from 0."""
    betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's decay rates for the averages of the gradient and the squared gradient."""
    weight_decay: Annotated[float, Meta(ge=0, le=1e3)] = 0.05
    """AdamW's weight decay; not applied to biases, norms, position embeddings and class tokens."""
    clip: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """Maximum gradient norm; larger gradients are scaled down to it. ``null``: no clipping."""
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of each target, including a patch token's, that is spread over all classes."""
    token_labels: TokenLabelSection | None = None
    """Training with patch token labels; ``null`` uses only the image's label."""
    dynamicvit: DynamicViTSection | None = None
    """Loss weights for training the method ``dynamicvit``; ``null`` uses the defaults."""
    backbone_lr_scale: Share = 1.0
    """Factor on the learning rate of the backbone: all layers but those that the reduction method adds (``dynamicvit``
    adds some)."""
    backbone_frozen_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs at the beginning in which the backbone is frozen."""
    frozen: tuple[str, ...] = ()
    """Parameters that are never trained: names such as ``cls_token``, or patterns such as ``blocks.[0-5].*``."""
    keep_rate_start: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epoch at which the keep rate starts to move from 1 to its target along a cosine. Has no effect where no tokens
    are reduced."""
    keep_rate_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs that this takes; 0 changes it at once."""
    layer_wise_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs in which every block from the first location on sorts the patches again (``evo-vit`` only). Afterwards,
    and in the resulting model, each stage sorts once. Evaluations in between use the form that is being trained."""
    model_mode: Literal["train", "eval"] = "train"
    """``eval`` trains without dropout and stochastic depth, as the official EViT fine-tuning does."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Lower precision for matrix products; weights stay float32. ``fp16`` also scales the loss."""
    ema: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and saved instead of them; ``null``
    turns it off."""
    compile: bool = False
    """Whether to compile the model with ``torch.compile`` while its token counts do not change."""
    checkpoint_activations: bool = False
    """Whether to recompute activations in the backward pass instead of storing them: less memory, more time."""
    channels_last: bool = False
    """Whether images and the patch embedding use the channels-last memory format."""
    evaluate_every: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Epochs between evaluations, at the current keep rate; ``null`` evaluates only at the end."""
    save_every: Count = 500
    """Steps between saved training states; an interruption loses at most this many steps."""
    threads: Threads | None = None
    """CPU threads for PyTorch; ``null`` uses PyTorch's default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            seen = "neither" if self.steps is None else "both"
            raise RecipeError("the length of the run is not clear", seen=seen, wanted="either steps or epochs")
        if self.lowest_learning_rate() > self.effective_learning_rate():
            raise RecipeError(
                "min_learning_rate is above the highest learning rate", seen=self.min_learning_rate,
                wanted=f"at most {max(self.learning_rate, self.effective_learning_rate()):g}",
                fix="Lower it, or raise learning_rate.",
            )  # fmt: skip

    def freezes(self, parameter: str) -> bool:
        """Whether a parameter is frozen.

        Args:
            parameter: Name of the parameter in the model.
        """
        return any(fnmatchcase(parameter, pattern) for pattern in self.frozen)

    def images_per_step(self, world: int = 1) -> int:
        """Images of one optimizer step in all processes."""
        return self.batch_size * self.accumulate * world

    def effective_learning_rate(self, world: int = 1) -> float:
        """The highest learning rate, scaled to the images of a step."""
        images = self.images_per_step(world)
        return self.learning_rate * images / (self.learning_rate_batch or images)

    def lowest_learning_rate(self, world: int = 1) -> float:
        """The learning rate at the end: ``min_learning_rate``, scaled only where that is above the highest rate."""
        highest = self.effective_learning_rate(world)
        return self.min_learning_rate * (1.0 if self.min_learning_rate <= highest else highest / self.learning_rate)


class TeacherSection(Section, frozen=True, kw_only=True):
    """A trained model for knowledge distillation (DeiT, section 4)."""

    name: str | None = None
    """timm name; needed without a checkpoint, or when a checkpoint fits several models."""
    checkpoint: str | None = None
    """Checkpoint file; ``null`` uses timm's pretrained weights."""
    kind: Literal["logits", "token", "token_labels", "dense"] = "logits"
    """``logits``: the student's logits learn from the teacher's. ``token``: the logits of its distillation token do.
    ``dense``: logits and patch tokens learn from a dense model of the same architecture, with the weights of
    ``finetune.dynamicvit``; without a teacher that method uses its initial dense weights. ``token_labels``: the
    teacher's output for each patch is that patch's label, used as ``finetune.token_labels`` configures."""
    hard: bool = False
    """Whether a ``token`` student learns the teacher's predicted class instead of its probabilities."""
    weight: Share = 0.5
    """Share of the distillation loss in the total loss."""
    temperature: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Temperature that divides the logits of student and teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is None and self.checkpoint is None:
            raise RecipeError("no teacher given", where="teacher", wanted="a name, a checkpoint or both")
        factors = {"token_labels": "finetune.token_labels.weight", "dense": "finetune.dynamicvit"}
        if self.kind in factors and (self.weight, self.temperature, self.hard) != (0.5, 1.0, False):
            raise RecipeError(
                f"weight, temperature and hard have no effect on a teacher of kind {self.kind}", where="teacher",
                fix=f"Leave them out; {factors[self.kind]} has the factor.",
            )  # fmt: skip
