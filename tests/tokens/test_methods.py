"""The contract that every registered method signs, and what each of ours keeps."""

import msgspec
import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evit_deploy.errors import InputError
from evit_deploy.models.timm_vit import ReducedBlock
from evit_deploy.registry import METHODS
from evit_deploy.tokens.operators import torch_ops
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import capture, reduce_tokens_, token_plan
from evit_deploy.tokens.reducer import TokenReducer
from tests.support import oracle
from tests.support.families import create, each_method, images, spec_of


@each_method
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", ["deit", "dinov2_registers"])
def test_methods_keep_the_contract(name, fuse, method):
    model, own = create(name), METHODS.get(method).own_parameters
    keys = list(model.state_dict())
    spec = spec_of(method, fuse=fuse)
    reduce_tokens_(model, spec)
    assert [key for key in model.state_dict() if not key.startswith(own)] == keys
    plan = token_plan(model)
    assert len(plan.locations) > 1
    blocks = [module for module in model.modules() if isinstance(module, ReducedBlock)]
    stateful = {block.reducer.stateful for block in blocks}
    assert [block.reducer.plan for block in blocks] == list(plan.blocks if stateful == {True} else plan.locations)
    reached = []
    for block in blocks:
        reducer = block.reducer
        assert isinstance(reducer, TokenReducer)
        assert not list(reducer.parameters())
        reducer.register_forward_hook(lambda _, inputs, output: reached.append((inputs[0], *output[:2])))
    pixels = images(model).requires_grad_()
    result = model(pixels)
    assert result.shape == (3, model.num_classes)
    assert result.isfinite().all()
    for row, (x, y, choice, *_) in zip(plan.locations, reached, strict=True):
        assert y.shape == (3, row.tokens_out, x.shape[2])
        assert y.dtype == x.dtype
        assert choice.shape == (3, row.choice_length)
        assert choice.dtype == torch.int32
        assert torch.equal(y[:, : plan.prefix], x[:, : plan.prefix])
        candidates = x.shape[1] - plan.prefix
        if row.choice == "merge":  # every candidate stays or moves, and those that move join one that stays
            assert oracle.is_valid_choice(choice[:, :candidates].numpy(), candidates)
            assert ((choice[:, candidates:] >= 0) & (choice[:, candidates:] < row.keep)).all()
            continue
        assert candidates == plan.patches or not row.aside
        assert oracle.is_valid_choice(choice.numpy(), candidates)
        for image in range(3):
            rows = x[image, plan.prefix :][choice[image, : row.keep].long()]
            assert torch.equal(y[image, plan.prefix : plan.prefix + row.keep], rows)
    result.sum().backward()
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().sum() > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None or key.startswith(own), key


@each_method
def test_methods_learn(method):
    """In training mode a gradient reaches every parameter, the method's own included."""
    model = create("deit").train()
    reduce_tokens_(model, spec_of(method))
    model(images(model)).sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@each_method
def test_methods_work_in_half_precision(method):
    model = create("deit").bfloat16()
    reduce_tokens_(model, spec_of(method))
    with torch.inference_mode():
        result = model(images(model).bfloat16())
    assert result.dtype == torch.bfloat16
    assert result.isfinite().all()


@each_method
def test_methods_refuse_options_they_do_not_have(method):
    with pytest.raises(InputError, match=f"the method '{method}' does not take these options.*no_such_option"):
        reduce_tokens_(create("deit"), spec_of(method, options={"no_such_option": 1}))


def kept_by(method: str, **options) -> list[torch.Tensor]:
    model = create("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, method=method, options=options))
    with capture(model) as seen:
        model(images(model))
        model(images(model))
    return seen.kept


def test_a_method_without_scores_has_kept_tokens_but_none_are_made_up():
    model = create("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, method="slice"))
    with capture(model) as seen:
        model(images(model))
    assert len(seen.kept) == 3
    assert seen.scores == []
    reducer = next(module for module in model.modules() if isinstance(module, TokenReducer))
    with pytest.raises(NotImplementedError, match="Slice does not implement"):
        reducer.scores(*3 * [torch.zeros(1, 5, 2, 4)])


def test_slice_keeps_the_first():
    assert all(kept.tolist() == [list(range(kept.shape[1]))] * 3 for kept in kept_by("slice"))


def test_random_follows_its_seed_and_differs_by_image_and_call():
    first, again, other = kept_by("random"), kept_by("random"), kept_by("random", seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0][0], first[0][1])
    assert not torch.equal(first[0], first[3])  # the same location in the second call


def test_inverse_keeps_the_lowest_scores():
    model = create("deit")
    reduce_tokens_(model, TokenSpec(keep_rate=0.6, method="inverse"))
    with capture(model) as seen:
        model(images(model))
    for kept, scores in zip(seen.kept, seen.scores, strict=True):
        np.testing.assert_array_equal(kept.numpy(), oracle.select(-scores.numpy(), kept.shape[1]))


class Crossings(TorchDispatchMode):
    """Notes what goes from one device to another, and what waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before, after = ({t.device.type for t in tree_leaves(x) if isinstance(t, torch.Tensor)} for x in (args, out))
        if "_local_scalar" in str(func) or (before and after and before != after):
            self.found.append(str(func))
        return out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        *((name, {}) for name in METHODS.own_names() if name != "random"),  # whose numbers are the CPU's on purpose
        ("evit", {"squeeze": True}),
        ("evit", {"normalize": True}),
        ("evo-vit", {"representative": True}),
        ("evo-vit", {"layer_wise": True}),
        ("tome", {"merge": 2, "proportional_attention": False}),
    ],
)
def test_methods_stay_on_the_device(method, options):
    """Or no CUDA graph holds them, and every call waits. Tensors that have nothing in them need no GPU."""
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=4, device="meta").eval()
    spec = spec_of(method)
    reduce_tokens_(model, msgspec.structs.replace(spec, options=spec.options | options))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda:0")
        pixels = torch.empty(2, 3, 64, 64, device="cuda:0")
        with torch_ops.using(None, "cuda:0"), torch.inference_mode(), Crossings() as crossings:
            assert model(pixels).device.type == "cuda"
    assert crossings.found == []
