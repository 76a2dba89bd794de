"""The sections of a recipe that say what is trained: the model, the data, a training run, a teacher.

:mod:`evit_deploy.recipe.recipe` puts them together.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from evit_deploy.errors import RecipeError
from evit_deploy.recipe.fields import check_numbers

Share = Annotated[float, Meta(ge=0, le=1)]
# Every number has both ends, so that neither `inf` nor 10**400 reaches a library: C's int takes the largest counts.
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
BatchSize = Annotated[int, Meta(ge=1, le=65_536)]
Threads = Annotated[int, Meta(ge=1, le=4_096)]
ImageSize = Annotated[int, Meta(ge=1, le=4_096)]
CropMode = Literal["center", "center-floor", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What all sections have in common."""

    # Keys of which a recipe gives one: set over a file, it takes the place of the others there.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()

    def __post_init__(self) -> None:
        check_numbers(self)


class PreprocessOptions(Section, frozen=True, kw_only=True):
    """How images become inputs, and what classes are called, where the checkpoint is not to decide."""

    mean: tuple[Annotated[float, Meta(ge=-1e3, le=1e3)], ...] | None = None
    """Mean to subtract, one per channel, on images scaled to 0..1. [default: the checkpoint's]"""
    std: tuple[Annotated[float, Meta(ge=1e-6, le=1e3)], ...] | None = None
    """Standard deviation to divide by, one per channel. [default: the checkpoint's]"""
    crop_pct: Annotated[float, Meta(gt=0, le=1)] | None = None
    """Share of the resized image's side that the crop keeps, 0.875 for 224 of 256. [default: the checkpoint's]"""
    crop_mode: CropMode | None = None
    """How images are cropped: center, after resizing the shorter side; center-floor, the same with margins rounded as
    Hugging Face's processors do; squash, after resizing both; border, with a border. [default: the checkpoint's]"""
    interpolation: Interpolation | None = None
    """Resampling filter. [default: the checkpoint's]"""
    labels: str | None = None
    """File of class names, one on each line or JSON. [default: the checkpoint's; with labeled images and no other
    source, their folders' names]"""

    def __post_init__(self) -> None:
        if isinstance(self.labels, Path):  # a Path is as good as its text
            msgspec.structs.force_setattr(self, "labels", str(self.labels))
        super().__post_init__()


class ModelSection(Section, frozen=True, kw_only=True):
    """The model to start from. At least one of ``name`` and ``checkpoint`` is needed by the time training begins."""

    name: str | None = None
    """timm name; needed without a checkpoint, and decides where a checkpoint fits several models."""
    checkpoint: str | None = None
    """Checkpoint file to start from, relative to the current directory."""
    args: dict[str, Any] = {}
    """Further arguments of ``timm.create_model`` (patch_size, embed_dim, depth, num_heads, mlp_ratio, ...). A
    ``global_pool`` other than ``token`` takes a method whose tokens serve heads that pool, and as baselines none."""
    image_size: ImageSize | None = None
    """Side of the square input in pixels; ``null`` is the model's own."""
    pretrained: bool = True
    """Without a checkpoint and without a ``dense`` section: whether to start from timm's pretrained weights. ``false``
    trains the model with its tokens reduced from scratch."""
    init: Literal["timm", "scaled"] = "timm"
    """First weights of a model trained from scratch. ``scaled``: Xavier with smaller residual branches and larger
    position embeddings, which learns several times faster on small data."""
    preprocess: PreprocessOptions = PreprocessOptions()
    """How images become inputs, where the checkpoint is not to decide; its ``labels`` come from the data here."""

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
    """The labeled images to train and to evaluate on, and how training images are varied."""

    alternatives = (("validation", "validation_share"),)

    name: Literal["digits", "digits-in-the-wild", "folder"]
    """``digits``: the 1,797 digits inside scikit-learn. ``digits-in-the-wild``: the same digits on crops of photographs
    inside scikit-learn and scikit-image; nothing to download for either. ``folder``: images of your own."""
    train: str | None = None
    """Training images (``folder`` only): a folder with one folder a class, ``FILE.tar`` of such, a folder with one tar
    a class, ``wds/FOLDER`` (WebDataset shards on a disk) or ``hfds/NAME`` (Hugging Face dataset, or its folder)."""
    validation: str | None = None
    """Validation images, in the same forms; classes are named as in ``train`` (``folder`` only)."""
    validation_share: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Instead of ``validation``: share of each class of ``train``, a folder of class folders, that is held out of
    training and validated on. Names decide which images, so it is the same ones every time."""
    train_split: str | None = None
    """``wds``: shards such as ``train-{0000..0009}.tar``, or a split of ``_info.json``; by default every shard.
    ``hfds``: the split, by default ``train``."""
    validation_split: str | None = None
    """Likewise for ``validation``; ``hfds``: by default ``validation``."""
    input_key: str | None = None
    """``hfds``: the column of images; by default ``image``."""
    target_key: str | None = None
    """``hfds``: the column of labels, by default ``label``. ``wds``: a field of the JSON beside an image; by default
    the label is in ``.cls``."""
    num_classes: Count | None = None
    """``wds``: how many classes there are."""
    token_labels: str | None = None
    """Folder of token label maps, ``<class>/<image's name>.pt``, one for every training image (``folder`` only, with
    ``train`` a folder of class folders). A run learns from them where it has ``token_labels``."""
    cache: str | None = None
    """Folder for decoded training images, made on first use (``folder`` only); ``null`` decodes them in every pass."""
    cache_size: Annotated[int, Meta(ge=16, le=16_384)] = 256
    """Longest shorter side of a cached image in pixels: crops are taken from no more detail than this."""
    max_corrupt: Annotated[float, Meta(ge=0, le=1e9)] = 0.01
    """Images that may be unreadable before the run stops: below 1 a share, from 1 on a number. In training another
    image takes their place, in validation they are left out (``folder`` only)."""
    repeated_augmentation: Count = 1
    """How often an image is shown in a row, with new augmentation each time; a pass then shows
    as many times fewer images. DeiT and EViT were trained with 3 (``folder`` only)."""
    images: Count = 100_000
    """Training images to make; more are not slower (``digits-in-the-wild`` only)."""
    test_images: Count = 2_000
    """Validation images to make, of other digits on other photographs (``digits-in-the-wild`` only)."""
    difficulty: Literal["easy", "medium", "hard"] = "easy"
    """``easy``: a digit has 3/8 of the image's side and begins on a grid of eighths. ``medium``: it begins anywhere.
    ``hard``: its size varies down to half of that, and it may be fainter (``digits-in-the-wild`` only)."""
    curriculum_threshold: Share = 0.7
    """Running training accuracy from which on the images of a model that begins from nothing become harder; 0 raises
    the level at every step (``digits-in-the-wild`` only)."""
    curriculum_rate: Annotated[float, Meta(gt=0, le=1)] = 0.005
    """How much harder they become in one step, from 0 (centered, white on black) to 1 (``digits-in-the-wild`` only)."""
    workers: Annotated[int, Meta(ge=0, le=1_024)] = 4
    """Processes that read or make images (not ``digits``); 0 does it in the main process."""
    evaluation_batch_size: BatchSize = 64
    """Images a batch while evaluating; has no influence on the result."""
    rotation: Annotated[float, Meta(ge=0, le=180)] = 10.0
    """Largest rotation in degrees, either way (``digits`` only)."""
    scale: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    """Largest change of size, as a share, either way (``digits`` only)."""
    shift: Share = 0.09
    """Largest shift in each direction, as a share of the image's side (``digits`` only)."""
    crop: tuple[Share, Share] = (0.08, 1.0)
    """Smallest and largest share of an image's area that a training crop has (``folder`` only)."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment or AutoAugment in timm's notation, or ``null`` (``folder`` only)."""
    color_jitter: Share = 0.4
    """Strength of color jitter; has no effect beside ``auto_augment`` (``folder`` only)."""
    flip: Share = 0.5
    """Probability that a training image is mirrored; 0 where left and right differ, as in writing (``folder`` only)."""
    random_erasing: Share = 0.25
    """Probability that a rectangle of a training image is replaced by noise (``folder`` only)."""
    mixup: Annotated[float, Meta(ge=0, le=1e3)] = 0.8
    """Mixup's alpha; 0 switches it off (``folder`` only)."""
    cutmix: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """CutMix's alpha; 0 switches it off (``folder`` only)."""
    mix_switch: Share = 0.5
    """Probability of CutMix instead of mixup where both are on (``folder`` only)."""

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
    """Learning from a label for every patch token, beside the image's own (LV-ViT, section 3.2).

    The labels are ``data.token_labels``, or a teacher's of kind ``token_labels``.
    """

    weight: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """Factor on the tokens' part of the loss; the class token's has 1."""
    mix_token: Annotated[float, Meta(ge=0, le=1e3)] = 1.0
    """MixToken's alpha: a box of each image's patch tokens, with their labels, comes from another image of the batch.
    0 switches it off."""


class DynamicViTSection(Section, frozen=True, kw_only=True):
    """Factors of the parts of DynamicViT's loss beside the labels, whose part has 1; for its method alone."""

    ratio_weight: Annotated[float, Meta(ge=0, le=1e3)] = 2.0
    """Of how far the share of the patches that is kept is from the keep rate's; 5 in the paper's DeiT-B."""
    logits_weight: Annotated[float, Meta(ge=0, le=1e3)] = 0.5
    """Of how far the logits are from those of the dense model that fine-tuning starts from, or of a ``dense``
    teacher."""
    tokens_weight: Annotated[float, Meta(ge=0, le=1e3)] = 0.5
    """Of how far the tokens that are kept are from the teacher's."""


class TrainSection(Section, frozen=True, kw_only=True):
    """One training run: AdamW, linear warm-up, cosine decay. Exactly one of ``steps`` and ``epochs`` is needed."""

    alternatives = (("steps", "epochs"),)

    steps: Count | None = None
    """Length in optimizer steps."""
    epochs: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Length in passes over the training images; incomplete batches are left out."""
    batch_size: Annotated[int, Meta(ge=2, le=65_536)] = 64
    """Images at a time in every process; even where mixup or CutMix is on."""
    accumulate: Count = 1
    """Batches whose gradients are added up to one step: a step has processes × accumulate × batch_size images."""
    processes: Count | None = None
    """Processes (GPUs) that the recipe was written for; with another number, the ``accumulate`` that restores the batch
    is logged."""
    learning_rate: Annotated[float, Meta(gt=0, le=1e3)]
    """Highest learning rate, reached after the warm-up."""
    learning_rate_batch: Count | None = None
    """Images a step that ``learning_rate`` is meant for: it is scaled by the step's images over this number. ``null``:
    used as it is."""
    min_learning_rate: Annotated[float, Meta(ge=0, le=1e3)] = 0.0
    """Learning rate at the end, whatever the images of a step. Only where so few scale the highest rate below it is it
    scaled like that one, with a warning."""
    warmup: Share = 0.0
    """Share of the run over which the learning rate rises from 0."""
    betas: tuple[Annotated[float, Meta(ge=0, lt=1)], Annotated[float, Meta(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW's averaging factors of gradient and squared gradient."""
    weight_decay: Annotated[float, Meta(ge=0, le=1e3)] = 0.05
    """AdamW's weight decay; biases, norms, position embeddings and class tokens have none."""
    clip: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    """Largest gradient norm; longer gradients are shortened to it."""
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Share of each target, a patch token's as well, that is spread over all classes."""
    token_labels: TokenLabelSection | None = None
    """How patch tokens learn from their own labels; ``null`` leaves that to the image's label."""
    dynamicvit: DynamicViTSection | None = None
    """Factors of the loss that the method ``dynamicvit`` is trained with; ``null`` leaves them as they are there."""
    backbone_lr_scale: Share = 1.0
    """Factor on the learning rate of all but the layers of the reduction method's own (``dynamicvit`` has some)."""
    backbone_frozen_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs at the beginning in which all but these layers stand still."""
    frozen: tuple[str, ...] = ()
    """Parameters that stand still all the time: names such as ``cls_token``, or patterns such as ``blocks.[0-5].*``."""
    keep_rate_start: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epoch from which the keep rate moves from 1 towards its target, by a cosine. Has no effect where no tokens are
    reduced."""
    keep_rate_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs that this takes; 0 is at once."""
    layer_wise_epochs: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Epochs in which every block sorts the patches again, from the first location on (``evo-vit`` only); from then on,
    and in the model that is kept, a stage sorts once. Evaluations on the way are of the form that is being trained."""
    model_mode: Literal["train", "eval"] = "train"
    """``eval`` trains without dropout and stochastic depth, as the official EViT fine-tune does."""
    autocast: Literal["none", "bf16", "fp16"] = "none"
    """Computes matrix products in a shorter type; weights stay float32. ``fp16`` scales the loss."""
    ema: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """Decay of a running average of the weights, which is evaluated and kept in their place; ``null`` keeps none."""
    compile: bool = False
    """Whether to compile the model with ``torch.compile`` while its token counts stand still."""
    checkpoint_activations: bool = False
    """Whether to compute activations again in the backward pass instead of keeping them: less memory, more time."""
    channels_last: bool = False
    """Whether images and the patch embedding have their channels last in memory."""
    evaluate_every: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Epochs between evaluations, at the keep rate of the moment; ``null`` evaluates at the end."""
    save_every: Count = 500
    """Steps between writes of the state that an interrupted run continues from: at most this many steps are lost."""
    threads: Threads | None = None
    """CPU threads for PyTorch; ``null`` leaves its own choice."""

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
        """Whether a parameter is among those that stand still.

        Args:
            parameter: Its name in the model.
        """
        return any(fnmatchcase(parameter, pattern) for pattern in self.frozen)

    def images_per_step(self, world: int = 1) -> int:
        """Images of one optimizer step, over all processes."""
        return self.batch_size * self.accumulate * world

    def effective_learning_rate(self, world: int = 1) -> float:
        """The highest learning rate after scaling to the images of a step."""
        images = self.images_per_step(world)
        return self.learning_rate * images / (self.learning_rate_batch or images)

    def lowest_learning_rate(self, world: int = 1) -> float:
        """The learning rate at the end: ``min_learning_rate``, scaled only where that is above the highest rate."""
        highest = self.effective_learning_rate(world)
        return self.min_learning_rate * (1.0 if self.min_learning_rate <= highest else highest / self.learning_rate)


class TeacherSection(Section, frozen=True, kw_only=True):
    """A trained model that the student is to agree with (DeiT, section 4)."""

    name: str | None = None
    """timm name; needed without a checkpoint, and decides where a checkpoint fits several models."""
    checkpoint: str | None = None
    """Checkpoint file; ``null`` takes timm's pretrained weights."""
    kind: Literal["logits", "token", "token_labels", "dense"] = "logits"
    """``logits``: the student's logits follow the teacher's. ``token``: those of its distillation token do. ``dense``:
    logits and patch tokens follow a dense model of the same form, as ``finetune.dynamicvit`` says; without a teacher
    that method takes the dense weights that it starts from.
    ``token_labels``: what the teacher says about a patch is the label of that patch; ``finetune.token_labels`` says
    how they are learned."""
    hard: bool = False
    """Whether a ``token`` student learns the teacher's decision instead of its probabilities."""
    weight: Share = 0.5
    """Share of the teacher in the loss."""
    temperature: Annotated[float, Meta(gt=0, le=100)] = 1.0
    """Both sides' logits are divided by it."""

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
