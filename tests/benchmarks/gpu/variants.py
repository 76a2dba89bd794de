"""The models that are compared: one set of seeded weights, and who reorganises the tokens and how."""

import copy
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evit_deploy import TokenSpec, reduce_tokens_
from evit_deploy.tokens.backbone import copy_sharing_weights
from evit_deploy.tokens.evit import EViT
from evit_deploy.tokens.op import reorganize, select
from evit_deploy.tokens.reduce import TokenReducer

TOY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 10}
"""What a dry run makes of any architecture."""


@dataclass(frozen=True)
class Variant:
    """One model.

    Attributes:
        rate: Keep rate; 1 is dense.
        how: ``evit`` (as the product does it), ``body`` (the same, reorganised by PyTorch's own operators), ``slice``
            (the first tokens stay, nothing is scored) or ``official`` (the structure of the released EViT code).
    """

    rate: float
    how: str = "evit"

    @property
    def name(self) -> str:
        """``dense``, ``0.7``, ``0.7 slice`` and the like."""
        first = "dense" if self.rate == 1 else f"{self.rate:g}"
        return first if self.how == "evit" else f"{first} {self.how}"


class BodyReducer(EViT):
    """EViT whose tokens are reorganised by PyTorch's operators, whatever kernel there is."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        assert self.plan.keep is not None
        scores = self.scores(x, q, k)
        kept = select(scores, self.plan.keep)
        return reorganize(x, scores, kept, self.plan.fused, self.prefix), kept.to(torch.int32)


class OfficialBlock(nn.Module):
    """A block in the structure of the released code: the attention map is a tensor, and its class row is read from it.

    The kept tokens are gathered by ``topk``; the others are found as the complement, by a sort of the numbers that were
    not chosen, gathered too, and summed up by their scores.

    Args:
        block: A timm block.
        keep: Tokens that stay besides the class token; ``None`` for all.
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
    rest = numbers.scatter(1, kept, 0).sort(dim=1).values[:, keep:]  # the chosen ones sort to the front

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
    """A variant of a dense model, with the same weights; its own copy of them unless they are shared."""
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
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(getattr(func, "namespace", "")) == "evit"
        return func(*args, **(kwargs or {}))


def kernel_calls(model: Any, images: Tensor) -> int:
    """How often a forward pass calls the kernel through PyTorch's operator."""
    with torch.no_grad(), _Calls() as calls:
        model(images)
    return calls.count
