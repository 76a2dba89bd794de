"""Evo-LeViT (Evo-ViT, AAAI 2022, arXiv 2108.01390, on LeViT, arXiv 2104.01136).

Three stages of tokens on a shrinking grid. Unlike LeViT it has a class token, four classifiers, and absolute position
embeddings (at the stem and in each downsampling) instead of attention biases. Tokens therefore need no fixed position
within a stage, and a block can run on a subset: the *informative* tokens and one that *represents* the others, which
wait and receive the updates of their representative.

Plain LeViT is timm's ``levit_128s`` … ``levit_384``; its attention biases require every token at its position, so no
method can reduce it. Parameters have the names of the released checkpoints. Importing this module registers
``evo_levit_128s`` … ``evo_levit_384`` with ``timm.create_model``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.errors import InputError
from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.state import TokenState

STRIDE = 16
MLP_RATIO = 2
BLOCK_RATIO, DOWNSAMPLE_RATIO = 2, 4
"""Ratio of value width to key width: in blocks, and in downsampling attention."""
FIXED_ALPHA = 0.5
"""Weight of a block's own class attention in the moving average before it is learned (up to epoch 200)."""
HEADS = ("head", "head_dist", "head_cls", "head_cls_dist")
"""Classifiers of the mean over patches and of the class token, each with a second one for distillation."""


class LinearNorm(nn.Sequential):
    """A linear layer without bias and a batch norm over all tokens: ``c``, ``bn``.

    Args:
        inputs: Width of the incoming tokens.
        outputs: Width of the outgoing ones.
        gain: Initial weight of the norm; 0 at the end of a residual branch.
    """

    c: nn.Linear
    bn: nn.BatchNorm1d

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.add_module("c", nn.Linear(inputs, outputs, bias=False))
        self.add_module("bn", nn.BatchNorm1d(outputs))
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``[B, N, inputs]`` to ``[B, N, outputs]``."""
        return self.bn(self.c(x).flatten(0, 1)).unflatten(0, (-1, x.shape[1]))


class ConvNorm(nn.Sequential):
    """A 3 × 3 convolution of stride 2 without bias, and a batch norm: ``c``, ``bn``.

    Args:
        inputs: Channels in.
        outputs: Channels out.
    """

    c: nn.Conv2d
    bn: nn.BatchNorm2d

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False))
        self.add_module("bn", nn.BatchNorm2d(outputs))


class Classifier(nn.Sequential):
    """A batch norm and a linear layer: ``bn``, ``l``.

    Args:
        width: Width of the features.
        classes: Number of classes.
    """

    bn: nn.BatchNorm1d
    l: nn.Linear  # noqa: E741 -- the release's name

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(width))
        self.add_module("l", nn.Linear(width, classes))
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)


class Stem(nn.Sequential):
    """Four convolutions of stride 2 with Hardswish in between: total stride 16.

    Args:
        img_size: Height and width of the image.
        channels: Channels of the image.
        width: Width of the tokens.
    """

    patch_size = (STRIDE, STRIDE)
    img_size: tuple[int, int]

    def __init__(self, img_size: tuple[int, int], channels: int, width: int) -> None:
        super().__init__(
            ConvNorm(channels, width // 8), nn.Hardswish(),
            ConvNorm(width // 8, width // 4), nn.Hardswish(),
            ConvNorm(width // 4, width // 2), nn.Hardswish(),
            ConvNorm(width // 2, width),
        )  # fmt: skip
        self.img_size = img_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // STRIDE, self.img_size[1] // STRIDE

    @property
    def num_patches(self) -> int:
        """Number of patches."""
        return self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Images ``[B, C, H, W]`` to tokens ``[B, H·W/256, D]``."""
        size = self.img_size
        assert tuple(x.shape[2:]) == size, f"images of {tuple(x.shape[2:])} in a model that is built for {size}"
        return super().forward(x).flatten(2).transpose(1, 2)


def take(x: Tensor, rows: Tensor) -> Tensor:
    """Selects rows by index: ``[B, N, C]`` and int64 ``[B, M]`` to ``[B, M, C]``."""
    # Indexes whole rows: `gather` works by element, which takes five times as long on a CPU.
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (rows + first.unsqueeze(1)).flatten()).unflatten(0, (-1, rows.shape[1]))


def in_order(x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
    """Restores the grid order of the candidates and of the global attention.

    Args:
        x: Class token and all candidates ``[B, 1 + P, C]``; no candidate is waiting.
        state: Holds the current order.
    """
    if state.rows is None:
        return x, state
    x = torch.cat([x[:, :1], take(x[:, 1:], state.rows)], 1)
    attention = None if state.attention is None else state.attention.gather(1, state.rows)
    return x, TokenState(attention=attention)


def mixed(attention: Tensor | None, own: Tensor, alpha: Tensor | float) -> Tensor:
    """The moving average ``(1 - α) · g + α · own``; only candidates that took part are updated.

    Args:
        attention: g ``[B, P]``; ``None`` in the first block.
        own: Class attention of a block ``[B, K]`` for the first K candidates.
        alpha: α.
    """
    if attention is None:
        return own
    seen = own.shape[1]
    new = (1 - alpha) * attention[:, :seen] + alpha * own
    return new if seen == attention.shape[1] else torch.cat([new, attention[:, seen:]], 1)


class LeViTAttention(nn.Module):
    """Base of attention in blocks and in downsampling, and of their export forms."""

    learn_tradeoff: nn.Parameter
    learns_alpha: bool
    scale: float

    def alpha(self) -> Tensor | float:
        """Weight of this attention in the moving average."""
        return self.learn_tradeoff.sigmoid() if self.learns_alpha else FIXED_ALPHA

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, N, C]`` to the attention's output ``[B, n, C']``, q ``[B, n, H, d]`` and k ``[B, N, H, d]``."""
        raise NotImplementedError

    def forward(self, x: Tensor, ranks: bool = False) -> Any:
        """Returns the output; with ``ranks``, also the class token's attention to each candidate."""
        y, q, k = self.attend(x)
        return (y, class_scores(q, k, self.scale, prefix=1)) if ranks else y


class Attention(LeViTAttention):
    """Attention of a block, with :class:`LinearNorm` layers.

    Args:
        width: Width of the tokens.
        key_dim: Width of a head's keys; its values are twice as wide.
        num_heads: Number of heads.
    """

    def __init__(self, width: int, key_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = num_heads, key_dim, key_dim**-0.5
        self.learn_tradeoff, self.learns_alpha = nn.Parameter(torch.zeros(1)), True
        values = BLOCK_RATIO * key_dim * num_heads
        self.qkv = LinearNorm(width, values + 2 * key_dim * num_heads)
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(values, width, gain=0.0))

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[B, N, C]`` to the attention's output ``[B, N, C]``, q and k ``[B, N, H, d]``."""
        d = self.key_dim
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, -1)).split([d, d, BLOCK_RATIO * d], dim=3)
        return self.proj(_attended(q, k, v)), q, k


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return y.transpose(1, 2).flatten(2)


class Mlp(nn.Sequential):
    """Two layers with twice the width and Hardswish in between.

    Args:
        width: Width of the tokens.
    """

    def __init__(self, width: int) -> None:
        hidden = MLP_RATIO * width
        super().__init__(LinearNorm(width, hidden), nn.Hardswish(), LinearNorm(hidden, width, gain=0.0))


class Residual(nn.Module):
    """``x + m(x)``.

    Args:
        m: The branch.
        drop_path: Fraction of images for which the branch is dropped in training.
    """

    def __init__(self, m: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.m: Any = m
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same."""
        return x + self.drop_path(self.m(x))


class Reducible(nn.Module):
    """Base of the entries of ``blocks``: runs on tokens or, with a reducer, on tokens and a state."""

    reducer: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_module("reducer", None)


class Block(Reducible):
    """Attention and MLP: ``m1``, ``m2``.

    Args:
        width: Width of the tokens.
        key_dim: Of a head's keys.
        num_heads: Number of heads.
        drop_path: See :class:`Residual`.
    """

    def __init__(self, width: int, key_dim: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.m1 = Residual(Attention(width, key_dim, num_heads), drop_path)
        self.m2 = Residual(Mlp(width), drop_path)

    def forward(self, x: Tensor, state: TokenState | None = None) -> Any:
        """``[B, N, C]`` to the same."""
        if state is None:
            return self.m2(self.m1(x))
        found: tuple[Tensor, TokenState] = self.reducer.before(x, state)
        x, state = found
        self.reducer.check(x)
        if not self.reducer.plan.ranks:
            return self.m2(self.m1(x)), state
        y, own = self.m1.m(x, ranks=True)
        own = own if state.representative is None else own[:, :-1]
        state = state._replace(attention=mixed(state.attention, own, self.m1.m.alpha()))
        return self.m2(x + self.m1.drop_path(y)), state


class DownsampleMlp(Reducible):
    """The MLP after a downsampling: ``m``.

    Args:
        width: Width of the tokens.
        drop_path: See :class:`Residual`.
    """

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.m: Any = Mlp(width)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, state: TokenState | None = None) -> Any:
        """``[B, N, C]`` to the same."""
        y = x + self.drop_path(self.m(x))
        return y if state is None else (y, state)


class Downsampling(LeViTAttention, Reducible):
    """Downsampling of the tokens and of the global attention, whose sum is preserved."""

    asking: Tensor

    def forward(self, x: Tensor, state: TokenState | None = None) -> Any:  # type: ignore[override]
        """Class token and candidates ``[B, 1 + N, C]`` to ``[B, 1 + n, C']``."""
        if state is None:
            return super().forward(x)
        x, state = in_order(*self.reducer.before(x, state))
        self.reducer.check(x)
        before, places = state.attention, self.asking[1:] - 1
        if before is None or not self.reducer.plan.ranks:
            return super().forward(x), TokenState()
        y, own = super().forward(x, ranks=True)
        after = mixed(before.index_select(1, places), own.index_select(1, places), self.alpha())
        return y, TokenState(attention=after * (before.sum(1, keepdim=True) / after.sum(1, keepdim=True)))


class Downsample(Downsampling):
    """Attention without residual; its queries are the class token and every second row and column of the grid.

    Args:
        inputs: Width of the tokens.
        outputs: Width of the outgoing tokens.
        key_dim: Width of a head's keys; its values are four times as wide.
        grid: Rows and columns of the tokens.
    """

    def __init__(self, inputs: int, outputs: int, key_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.scale = inputs // key_dim, key_dim, key_dim**-0.5
        self.learn_tradeoff, self.learns_alpha = nn.Parameter(torch.zeros(1)), True
        values = DOWNSAMPLE_RATIO * inputs
        self.kv = LinearNorm(inputs, values + inputs)
        self.q = nn.Sequential(nn.Identity(), LinearNorm(inputs, inputs))
        self.proj = nn.Sequential(nn.Hardswish(), LinearNorm(values, outputs))
        self.poss = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, inputs))
        nn.init.trunc_normal_(self.poss, std=0.02)
        self.set_grid(grid)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Sets rows and columns of the tokens; the caller must update the position embeddings."""
        self.grid = grid
        self.register_buffer("asking", _asking(grid).to(self.poss.device), persistent=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens in order ``[B, 1 + N, C]`` to the output ``[B, 1 + n, C']``, q ``[B, 1 + n, H, d]`` and k."""
        x = x + self.poss
        heads = (self.num_heads, -1)
        k, v = self.kv(x).unflatten(-1, heads).split([self.key_dim, DOWNSAMPLE_RATIO * self.key_dim], dim=3)
        q = self.q(x.index_select(1, self.asking)).unflatten(-1, heads)
        return self.proj(_attended(q, k, v)), q, k


def _asking(grid: tuple[int, int]) -> Tensor:
    """Token indices of the class token and of every second row and column of a grid, int64."""
    places = torch.arange(1, 1 + grid[0] * grid[1]).reshape(grid)[::2, ::2].flatten()
    return torch.cat([places.new_zeros(1), places])


class EvoLeViT(nn.Module):
    """Evo-LeViT. The logits are computed from the mean over all patches and averaged over its two classifiers.

    As built it is dense: every block sees every token.

    Args:
        img_size: Height and width of the image, or its side; multiples of 16.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the features.
        embed_dim: Width of each stage.
        key_dim: Width of a head's keys.
        num_heads: Heads of the blocks of each stage.
        depth: Blocks of each stage.
        heads: Which of :data:`HEADS` exist; the first always does.
        drop_path_rate: Stochastic depth, the same in all blocks.
        global_pool: As in timm; only ``avg`` is supported.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: tuple[int, ...] = (128, 256, 384),
        key_dim: int = 16,
        num_heads: tuple[int, ...] = (4, 6, 8),
        depth: tuple[int, ...] = (2, 3, 4),
        heads: tuple[str, ...] = HEADS,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        assert len(embed_dim) == len(num_heads) == len(depth)
        assert tuple(heads[:1]) == HEADS[:1]
        assert set(heads) <= set(HEADS)
        assert global_pool == "avg"
        size = _pair(img_size)
        if any(side % STRIDE or side < STRIDE for side in size):
            raise InputError("not an image size for LeViT", seen=img_size, wanted=f"multiples of {STRIDE}")
        self.num_classes, self.global_pool, self.heads = num_classes, global_pool, tuple(heads)
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.embed_dim, self.depth = tuple(embed_dim), tuple(depth)
        self.num_prefix_tokens = 1
        self.patch_embed = Stem(size, in_chans, embed_dim[0])
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim[0]))
        self.poss = nn.Parameter(torch.zeros(1, grid[0] * grid[1] + 1, embed_dim[0]))
        nn.init.trunc_normal_(self.poss, std=0.02)
        blocks: list[nn.Module] = []
        for stage, (width, heads_here, count) in enumerate(zip(embed_dim, num_heads, depth, strict=True)):
            if stage:
                blocks.append(Downsample(embed_dim[stage - 1], width, key_dim, grid))
                blocks.append(DownsampleMlp(width, drop_path_rate))
                grid = halved(grid)
            blocks += [Block(width, key_dim, heads_here, drop_path_rate) for _ in range(count)]
        self.blocks = nn.Sequential(*blocks)
        self._begin_heads()

    def _begin_heads(self) -> None:
        for name in self.heads:
            made = Classifier(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()
            self.add_module(name, made.to(self.poss.device, self.poss.dtype).train(self.training))

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The linear layers of the classifiers that see the patches."""
        heads = [self.get_submodule(name) for name in self.heads if name in HEADS[:2]]
        return tuple(head.l if isinstance(head, Classifier) else head for head in heads)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reinitializes all classifiers."""
        if global_pool not in (None, "avg"):
            raise InputError(
                "LeViT classifies from the mean over patches", seen=global_pool, wanted="global_pool 'avg'"
            )
        self.num_classes = num_classes
        self._begin_heads()

    def no_weight_decay(self) -> set[str]:
        """Parameters excluded from weight decay."""
        return {name for name, _ in self.named_parameters() if "poss" in name}

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: Any = None) -> None:
        """Changes the image size; all position embeddings are resampled as in timm.

        A reduced model must be reduced again.
        """
        assert patch_size in (None, STRIDE, (STRIDE, STRIDE))
        if img_size is None:
            return
        size = _pair(img_size)
        grid = size[0] // STRIDE, size[1] // STRIDE
        old, self.patch_embed.img_size = self.patch_embed.grid_size, size
        self.poss = nn.Parameter(_resampled(self.poss.detach(), old, grid))
        for block in self.blocks:
            if isinstance(block, Downsample):
                block.poss = nn.Parameter(_resampled(block.poss.detach(), block.grid, grid))
                block.set_grid(grid)
                grid = halved(grid)

    def learn_alpha_(self, learned: bool) -> None:
        """Selects the α of the moving average of class attention: learned (from epoch 200 on) or ½ (before)."""
        for module in self.modules():
            if isinstance(module, LeViTAttention):
                module.learns_alpha = learned

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to the last stage's class token and patches, ``[B, 1 + P, D]``, in any order."""
        x = self.patch_embed(x)
        return self.blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.poss)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``[B, 1 + P, D]`` to logits; to the mean over patches with ``pre_logits``."""
        x = x[:, 1:].mean(1)
        if pre_logits or self.num_classes <= 0:
            return x
        seeing = [getattr(self, name)(x) for name in self.heads if name in HEADS[:2]]
        return torch.stack(seeing).mean(0) if len(seeing) > 1 else seeing[0]

    def head_logits(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of each classifier for tokens ``[B, 1 + P, D]``; the training loss uses all of them."""
        mean, token = x[:, 1:].mean(1), x[:, 0]
        return {name: getattr(self, name)(mean if name in HEADS[:2] else token) for name in self.heads}

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to logits ``[B, classes]``."""
        return self.forward_head(self.forward_features(x))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def halved(grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns after a downsampling: every second one, beginning with the first."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def _resampled(poss: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    return resample_abs_pos_embed(poss, list(new), list(old), num_prefix_tokens=1)


def stages(model: EvoLeViT) -> Iterator[list[int]]:
    """Block numbers of each stage, without the downsampling before it."""
    start = 0
    for stage, count in enumerate(model.depth):
        start += 2 if stage else 0
        yield list(range(start, start + count))
        start += count


# ---- names for timm

SIZES: dict[str, dict[str, Any]] = {
    "evo_levit_128s": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 6, 8), "depth": (2, 3, 4)},
    "evo_levit_128": {"embed_dim": (128, 256, 384), "key_dim": 16, "num_heads": (4, 8, 12), "depth": (4, 4, 4)},
    "evo_levit_192": {"embed_dim": (192, 288, 384), "key_dim": 32, "num_heads": (3, 5, 6), "depth": (4, 4, 4)},
    "evo_levit_256": {"embed_dim": (256, 384, 512), "key_dim": 32, "num_heads": (4, 6, 8), "depth": (4, 4, 4)},
    "evo_levit_384": {"embed_dim": (384, 512, 768), "key_dim": 32, "num_heads": (6, 9, 12), "depth": (4, 4, 4)},
}  # fmt: skip
"""Arguments that distinguish the sizes. The stochastic depth of 0.1 for training 384 belongs in the recipe."""

# No URL: the releases are single files, passed to evit-deploy by path.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "fixed_input_size": True,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed.0.c",
            "classifier": tuple(f"{head}.l" for head in HEADS),
            "license": "mit",
        }
        for name in SIZES
    }
)


def _create(name: str, pretrained: bool, given: dict[str, Any]) -> EvoLeViT:
    return build_model_with_cfg(EvoLeViT, name, pretrained, **(SIZES[name] | given))


@register_model
def evo_levit_128s(pretrained: bool = False, **given: Any) -> EvoLeViT:
    """Evo-LeViT-128S: 73.0 % top-1 on ImageNet as published."""
    return _create("evo_levit_128s", pretrained, given)


@register_model
def evo_levit_128(pretrained: bool = False, **given: Any) -> EvoLeViT:
    """Evo-LeViT-128: 74.4 %."""
    return _create("evo_levit_128", pretrained, given)


@register_model
def evo_levit_192(pretrained: bool = False, **given: Any) -> EvoLeViT:
    """Evo-LeViT-192: 76.8 %."""
    return _create("evo_levit_192", pretrained, given)


@register_model
def evo_levit_256(pretrained: bool = False, **given: Any) -> EvoLeViT:
    """Evo-LeViT-256: 78.8 %, 81.1 % at 384 pixels."""
    return _create("evo_levit_256", pretrained, given)


@register_model
def evo_levit_384(pretrained: bool = False, **given: Any) -> EvoLeViT:
    """Evo-LeViT-384: 80.7 %, 82.2 % at 384 pixels."""
    return _create("evo_levit_384", pretrained, given)
