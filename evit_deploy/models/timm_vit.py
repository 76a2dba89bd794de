"""timm's VisionTransformer with a class token: ViT (augreg, CLIP), DeiT, distilled DeiT, DeiT III, DINOv2."""

from typing import Any

import torch
from timm.layers import Attention
from timm.layers.patch_dropout import PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.errors import UnsupportedModelError
from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import backbone_of, shape_of
from evit_deploy.tokens.ending import for_inference
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.plan import ModelCost, ModelShape
from evit_deploy.tokens.state import TokenBlocks, TokenState

HEAD_TOKENS = 2
"""The class token, and the distillation token of models that have one. For other models the second row is unused:
TensorRT-RTX 1.7 has no fused attention for one query and 197 or 73 keys, but has one for two queries."""

# Classes that are known not to fit, with the reason for the error message.
_KNOWN_REASONS = (
    ("Swin", "it computes attention in windows, which need every patch at its position"),
    ("MaxxVit", "it computes attention in windows, which need every patch at its position"),
    ("Rope", "its position embedding is rotary: each attention needs every patch's place"),
    ("Eva", "its position embedding is rotary: each attention needs every patch's place"),
    ("RelPos", "its relative position bias needs every patch at its position"),
    ("Beit", "its relative position bias needs every patch at its position"),
    ("Naflex", "its patch count changes from image to image"),
)


class ReducedBlock(nn.Module):
    """A timm ``Block`` that reorganizes its tokens between attention and MLP.

    The children of the original block keep their names, so parameter names do not change. Unlike ``Block.forward``, q
    and k are passed to the reducer, and attention dropout does not affect the scores.

    Args:
        block: The block to replace; stored, so that it can be restored.
        reducer: The method's reducer for this block.
    """

    attn: Any
    norm1: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any
    reducer: Any

    def __init__(self, block: nn.Module, reducer: nn.Module) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.reducer = reducer
        self.train(block.training)
        self.replaced = (block,)  # a tuple, so that nn.Module does not register it as a child

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, state: TokenState | None = None
    ) -> Any:
        """Like ``Block.forward``, without masks, because they are undefined for reordered tokens.

        With a state, returns the tokens and the new state; see :class:`~evit_deploy.tokens.state.TokenBlocks`.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedModelError("a reduced block", ["an attention mask was given"])
        if state is not None:
            return self._carry(x, state)
        if self.reducer.stateful:
            raise UnsupportedModelError("a reduced block", ["it takes the state of the block before it: run them all"])
        return self.with_kept(x)[0]

    def _carry(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        x, state = self.reducer.before(x, state)
        mask = self.reducer.keep_mask(state)
        if mask is None:  # masked tokens are not removed
            _check_tokens(x, self.reducer)
            attended, q, k = attend(self.attn, self.norm1(x), self.reducer.key_bias(state))
        else:
            attended, q, k = attend_masked(self.attn, self.norm1(x), mask)
        x, state = self.reducer.between(x + self.drop_path1(self.ls1(attended)), q, k, state)
        return self.reducer.after(x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), state)

    def with_kept(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the block's tokens and the kept candidates, int32 ``[B, K]``, or ``None`` if nothing is dropped."""
        _check_tokens(x, self.reducer)
        attended, q, k = attend(self.attn, self.norm1(x))
        x, kept = x + self.drop_path1(self.ls1(attended)), None
        if self.reducer.plan.keep is not None:  # a keep-rate schedule starts at rate 1
            x, kept = self.reducer(x, q, k)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), kept


class EndingBlock(nn.Module):
    """The last block of a model whose head uses only the first tokens: computes queries, projection and MLP for them.

    The other tokens still provide keys and values. The result is equal up to the order of additions.

    Args:
        block: timm's ``Block`` or a :class:`ReducedBlock`, in evaluation mode.
        rows: Number of tokens to compute; at least those that the head uses.
    """

    norm1: Any
    ls1: Any
    norm2: Any
    mlp: Any
    ls2: Any

    def __init__(self, block: nn.Module, rows: int) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.rows = rows
        self.eval()

    def forward(self, x: Tensor, state: TokenState | None = None) -> Any:
        """``[B, N, C]`` to ``[B, rows, C]``; with a state, also returns the new state."""
        reducer: Any = getattr(self, "reducer", None)
        bias = None
        if state is not None:
            x, state = reducer.before(x, state)
            bias = reducer.key_bias(state)
        if reducer is not None:
            _check_tokens(x, reducer)
        x = x[:, : self.rows] + self.ls1(attend_from(self.attn, self.norm1(x), self.rows, bias))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x if state is None else (x, state)


def _check_tokens(x: Tensor, reducer: Any) -> None:
    wanted = reducer.plan.tokens_in
    if x.shape[1] != wanted:
        raise UnsupportedModelError(
            f"block {reducer.plan.block}",
            [f"{x.shape[1]} tokens arrived, the plan has {wanted}: another image size needs reduce_tokens_ again"],
        )


def attend(attn: nn.Module, x: Tensor, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Runs an attention module and also returns its queries and keys.

    Args:
        attn: timm's ``Attention`` or its lowered form.
        x: Normalized tokens ``[B, N, C]``.
        key_bias: Added to the attention logits of each key, ``[B, 1, 1, N]``.

    Returns:
        The attention's output ``[B, N, C]``, q and k ``[B, N, H, d]`` after their norms.
    """
    if isinstance(attn, LoweredAttention):
        return attn.attend(x, x, key_bias)
    assert isinstance(attn, Attention)
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim))
    q, k, v = qkv.unbind(2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    bias = None if key_bias is None else key_bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, dropout)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), q, k


def attend_from(attn: Any, x: Tensor, rows: int, key_bias: Tensor | None = None) -> Tensor:
    """The first rows of the output of :func:`attend`, computed with queries for these rows only.

    Args:
        attn: See :func:`attend`.
        x: See :func:`attend`.
        rows: Number of rows.
        key_bias: See :func:`attend`.

    Returns:
        ``[B, rows, C]``.
    """
    asking = x[:, :rows]
    if isinstance(attn, LoweredAttention):
        return attn.attend(asking, x, key_bias)[0]
    widths = [attn.attn_dim, 2 * attn.attn_dim]
    weights, biases = attn.qkv.weight.split(widths), (None, None)
    if attn.qkv.bias is not None:
        biases = attn.qkv.bias.split(widths)
    q = F.linear(asking, weights[0], biases[0]).unflatten(-1, (attn.num_heads, attn.head_dim))
    k, v = F.linear(x, weights[1], biases[1]).unflatten(-1, (2, attn.num_heads, attn.head_dim)).unbind(2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if key_bias is None else key_bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(asking).sigmoid()
    return attn.proj(y)


def attend_masked(attn: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`attend` for training, with masked tokens; the mask receives a gradient.

    Args:
        attn: timm's ``Attention``.
        x: Normalized tokens ``[B, N, C]``.
        mask: ``[B, N]``: 1 for visible tokens, else 0.
    """
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    q, k = attn.q_norm(q), attn.k_norm(k)
    logits = (q.transpose(1, 2) * attn.scale) @ k.permute(0, 2, 3, 1)
    y = attn.attn_drop(masked_softmax(logits, mask).to(v.dtype)) @ v.transpose(1, 2)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        y = y * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(y)), q, k


def masked_softmax(logits: Tensor, mask: Tensor, eps: float = 1e-6) -> Tensor:
    """DynamicViT's softmax: masked columns get almost no weight, except the diagonal.

    ``eps`` is distributed evenly, even if nothing is masked.

    Args:
        logits: ``[B, H, N, N]``.
        mask: ``[B, N]``.
        eps: Added to the sum.

    Returns:
        At least FP32 ``[B, H, N, N]``.
    """
    logits, columns = precise(logits), mask[:, None, None]
    own = torch.eye(mask.shape[1], dtype=mask.dtype, device=mask.device)
    shares = (logits - logits.amax(dim=-1, keepdim=True)).exp() * (columns + (1 - columns) * own)
    return (shares + eps / mask.shape[1]) / (shares.sum(dim=-1, keepdim=True) + eps)


class LoweredAttention(nn.Module):
    """Attention in export form: three projections into the 3-D ONNX ``Attention`` operator.

    Compared with the plain export, this saves a Split, three Squeezes and four Transposes per block.
    """

    flat: bool = True
    """Whether linear layers run on 2-D tokens ``[B·N, C]``, so that each exports as one ``Gemm`` including its bias; on
    ``[B, N, C]`` it exports as ``MatMul`` and ``Add``. The export sets this on every module that has it."""
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        for i, name in enumerate("qkv"):
            self.add_module(name, _slice_linear(attn.qkv, i * attn.attn_dim, (i + 1) * attn.attn_dim))
        self.q_norm, self.k_norm, self.norm = attn.q_norm, attn.k_norm, attn.norm
        self.gate, self.proj = attn.gate, attn.proj
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale

    def attend(self, asking: Tensor, x: Tensor, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`attend`; the query tokens are all tokens, or the first ones."""
        asking_rows, seen = (tokens.flatten(0, 1) if self.flat else tokens for tokens in (asking, x))
        q, queries = self._heads(self.q(asking_rows), self.q_norm, asking)
        k, keys = self._heads(self.k(seen), self.k_norm, x)
        # The operator broadcasts masks, but ONNX Runtime's kernel requires a row for each query.
        mask = None if key_bias is None else key_bias.expand(-1, -1, asking.shape[1], -1)
        y, *_ = torch.onnx.ops.attention(
            queries,
            keys,
            self._tokens(self.v(seen), x),
            attn_mask=mask,
            q_num_heads=self.num_heads,
            kv_num_heads=self.num_heads,
            scale=self.scale,
        )
        y = self.norm(y.flatten(0, 1) if self.flat else y)
        if self.gate is not None:
            y = y * self.gate(asking_rows).sigmoid()
        return self._tokens(self.proj(y), asking), q, k

    def _heads(self, rows: Tensor, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries or keys as ``[B, N, H, d]``, and in the operator's form ``[B, N, H·d]``."""
        heads = rows.unflatten(-1, (self.num_heads, self.head_dim))
        if not self.flat and isinstance(norm, nn.Identity):
            return heads, rows  # reshaping twice would leave a no-op Reshape in the file
        heads = self._tokens(norm(heads), x)
        return heads, heads.flatten(2)

    def _tokens(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, x.shape[1])) if self.flat else rows

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Like timm's ``Attention.forward``, without masks."""
        return self.attend(x, x)[0]


class LoweredMlp(nn.Module):
    """An MLP on 2-D tokens; see :class:`LoweredAttention`."""

    flat: bool = True

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, N, C]``."""
        return self.inner(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1])) if self.flat else self.inner(x)


def run_blocks(model: Any, images: Tensor) -> tuple[Tensor, TokenState]:
    """Runs a model up to its last block, including its method's state; for losses that use the state.

    Args:
        model: A ``VisionTransformer`` whose method carries state.
        images: ``[B, C, H, W]``.

    Returns:
        Tokens before the model's last norm ``[B, N, C]``, and the state.
    """
    assert isinstance(model.blocks, TokenBlocks)
    return model.blocks.carry(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))


def _slice_linear(linear: nn.Linear, start: int, end: int) -> nn.Linear:
    part = nn.Linear(linear.in_features, end - start, bias=linear.bias is not None, device="meta")
    part.weight = nn.Parameter(linear.weight[start:end], requires_grad=False)
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias[start:end], requires_grad=False)
    return part


def unusual_blocks(model: Any) -> list[str]:
    """Reasons why the first block other than timm's plain one cannot be reduced; empty if all are plain."""
    for index, block in enumerate(map(TimmViT.original, model.blocks)):
        if type(block) is not Block:
            return [f"block {index} is a {type(block).__name__}, not a Block"]
        if type(block.attn) is not Attention:
            return [f"block {index} uses {type(block.attn).__name__}, not plain Attention"]
    return []


class TimmViT:
    """The backbone's entry in the registry; see :class:`evit_deploy.tokens.backbone.Backbone`."""

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Reasons why this model cannot be reduced exactly; empty if it can."""
        name = type(model).__name__
        if type(model) not in (VisionTransformer, VisionTransformerDistilled):
            known = next((reason for part, reason in _KNOWN_REASONS if part in name), None)
            return [known or "it is not a timm VisionTransformer"]
        reasons = []
        if model.attn_pool is not None:
            reasons.append("its head pools all patch tokens by attention")
        elif not model.global_pool:
            reasons.append("it returns every token (global_pool=''), and most of them would be dropped")
        if isinstance(model.patch_drop, PatchDropout):
            reasons.append("it drops patches at random while training (patch_drop_rate > 0), so counts are not fixed")
        return reasons + unusual_blocks(model)

    @staticmethod
    def shape(model: Any) -> ModelShape:
        """The model's shape, as needed for a token plan."""
        return shape_of(backbone_of(model), model, model.embed_dim)

    @staticmethod
    def pools(model: VisionTransformer) -> bool:
        """Whether the head uses all patch tokens."""
        return model.global_pool != "token"

    @staticmethod
    def method(name: str) -> Any:
        """The method with this name, in its default form."""
        return METHODS.get(name)

    @staticmethod
    def prefix_tokens(model: VisionTransformer) -> int:
        """Class, distillation and register tokens."""
        return model.num_prefix_tokens

    @staticmethod
    def patches(model: Any) -> int:
        """Number of patch tokens at the model's image size."""
        return model.patch_embed.num_patches

    @staticmethod
    def image_size(model: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = model.patch_embed.img_size
        return height, width

    @staticmethod
    def channels(model: Any) -> int:
        """Channels of the input image."""
        return model.patch_embed.proj.in_channels

    @staticmethod
    def blocks(model: VisionTransformer) -> nn.Sequential:
        """The transformer blocks."""
        return model.blocks

    @staticmethod
    def set_blocks(model: VisionTransformer, blocks: nn.Sequential) -> None:
        """Replaces the model's container of blocks."""
        model.blocks = blocks

    @staticmethod
    def scale(block: Any) -> float:
        """Factor on the attention logits of a block."""
        return block.attn.scale

    @staticmethod
    def cost(model: Any) -> ModelCost:
        """Multiply-adds of the parts; all blocks are equal."""
        block = model.blocks[0]
        linears = [m for name, m in block.attn.named_modules() if isinstance(m, nn.Linear)]
        heads = [m for m in (model.head, getattr(model, "head_dist", None)) if isinstance(m, nn.Linear)]
        return ModelCost(
            stem=model.patch_embed.num_patches * model.patch_embed.proj.weight.numel(),
            token_attention=sum(m.weight.numel() for m in linears),
            token_mlp=sum(m.weight.numel() for m in block.mlp.modules() if isinstance(m, nn.Linear)),
            width=block.attn.attn_dim,
            head=sum(m.weight.numel() for m in heads),
            head_tokens=HEAD_TOKENS if model.global_pool == "token" else 0,
            key_value=2 * block.attn.attn_dim * model.embed_dim,
        )

    @staticmethod
    def reduced(block: nn.Module, reducer: nn.Module) -> nn.Module:
        """A copy of the block that also applies the reducer."""
        return ReducedBlock(block, reducer)

    @staticmethod
    def original(block: Any) -> Any:
        """The block that a reduced block replaced, or the block itself."""
        return block.replaced[0] if isinstance(block, ReducedBlock) else block

    @staticmethod
    def ending(block: nn.Module, rows: int) -> nn.Module:
        """The last block, computed only for its first tokens."""
        return EndingBlock(block, rows)

    @staticmethod
    def lower(model: Any) -> Any:
        """A copy in export form; weights that need not be split are shared."""
        lowered = for_inference(model)
        for block in lowered.blocks:
            attn, mlp = LoweredAttention(block.attn), LoweredMlp(block.mlp)
            block.attn, block.mlp = attn, mlp
        return lowered.eval()
