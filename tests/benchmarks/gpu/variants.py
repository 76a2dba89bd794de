"""The compared models: one set of seeded weights, with different token reorganizations."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from evit_deploy import TokenSpec, reduce_tokens_
from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.tokens.methods.evit import EViT
from evit_deploy.tokens.operators import torch_ops
from evit_deploy.tokens.reducer import TokenReducer

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
"""Replaces any architecture in a dry run."""


@dataclass(frozen=True)
class Variant:
    """One model.

    Attributes:
        rate: Keep rate; 1 is dense.
        how: ``evit`` (as in evit_deploy), ``body`` (the same with PyTorch's own operators), ``slice`` (keeps the first
            tokens without scores) or ``official`` (the structure of the released EViT code).
    """

    rate: float
    how: str = "evit"

    @property
    def name(self) -> str:
        """``dense``, ``0.7``, ``0.7 slice`` and the like."""
        first = "dense" if self.rate == 1 else f"{self.rate:g}"
        return first if self.how == "evit" else f"{first} {self.how}"


class BodyReducer(EViT):
    """EViT that scores and reorganizes tokens with PyTorch's operators, never the kernel; for eager calls."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        with torch_ops.using(None, x.device):
            return super().forward(x, q, k)


class OfficialBlock(nn.Module):
    """A block in the structure of the released code: the attention map is a tensor, and its class row is read from it.

    The kept tokens are gathered by ``topk``; the others are found as the complement by sorting the indices that were
    not chosen, gathered, and summed with their scores.

    Args:
        block: A timm block.
        keep: Number of kept tokens besides the class token; ``None`` for all.
    """

    def __init__(self, block: Any, keep: int | None) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N or keep + 2, C]``."""
        attn = self.attn
        q, k, v = attn.qkv(self.norm1(x)).unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * attn.scale).softmax(dim=-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        if self.keep is not None:
            x = _reorganized(x, weights[:, :, 0, 1:].mean(dim=1), self.keep)
        return x + self.mlp(self.norm2(x))


def _reorganized(x: Tensor, scores: Tensor, keep: int) -> Tensor:
    patches, candidates = x[:, 1:], x.shape[1] - 1
    kept = scores.topk(keep, dim=1, largest=True, sorted=True).indices
    numbers = torch.arange(candidates, device=x.device).expand(len(x), -1)
    rest = numbers.scatter(1, kept, 0).sort(dim=1).values[:, keep:]  # the chosen ones are sorted to the front

    def rows(index: Tensor) -> Tensor:
        return patches.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    fused = (rows(rest) * scores.gather(1, rest).unsqueeze(-1)).sum(dim=1, keepdim=True)
    return torch.cat([x[:, :1], rows(kept), fused.to(x.dtype)], dim=1)


def seeded(architecture: str, device: str, *, toy: bool = False, classes: int | None = None) -> Any:
    """A dense model on a device in FP32, with weights as general as trained ones: no bias is 0, scores differ."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = dict(TOY) if toy else ({} if classes is None else {"num_classes": classes})
    with torch.device(device):
        model: Any = timm.create_model(architecture, **arguments)
        width = model.embed_dim
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
            for block in model.blocks:
                block.attn.qkv.weight[: 2 * width] *= 4
    return model.eval()


def made(dense: Any, variant: Variant, *, share: bool = True) -> Any:
    """A variant of a dense model with the same weights, copied unless shared."""
    model: Any = copy_sharing_weights(dense) if share else copy.deepcopy(dense)
    if variant.rate == 1 and variant.how == "evit":
        return model
    method = "slice" if variant.how == "slice" else "evit"
    model = reduce_tokens_(model, TokenSpec(keep_rate=variant.rate, method=method))
    for index, block in enumerate(model.blocks):
        reducer = getattr(block, "reducer", None)
        if variant.how == "body" and reducer is not None:
            assert isinstance(reducer, TokenReducer)
            block.reducer = BodyReducer(reducer.plan, reducer.prefix, reducer.scale, reducer.options)
        elif variant.how == "official":
            model.blocks[index] = OfficialBlock(block, None if reducer is None else reducer.plan.keep)
    return model.train(dense.training)


class _Calls(TorchDispatchMode):
    """Counts calls of our operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == "evit":
            self.counts[name.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def kernel_calls(model: Any, images: Tensor) -> dict[str, int]:
    """How often a forward pass calls the kernels, by name of PyTorch's operator; none is an empty dictionary."""
    with torch.no_grad(), _Calls() as calls:
        model(images)
    return dict(calls.counts)


def compiled_calls(run: Callable[[], Any]) -> dict[str, int]:
    """The same for a compiled function, which dispatch modes cannot enter: counts the profiler's events of a call.

    A call that only replays a CUDA graph shows none.
    """
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    names = (event.name for event in seen.events() or ())
    return dict(Counter(name.removeprefix("evit::") for name in names if name.startswith("evit::")))
