"""timm's LeViT, which there is in its dense form alone: its plan, its export form, and what is refused."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.timm_levit import TimmLeViT
from evit_deploy.registry import METHODS
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from tests.support.checkpoints import saved
from tests.support.exports import answers, assert_close, export_onnx, operators
from tests.support.families import spec_of
from tests.support.levit_oracle import TINY_ARGS, weights
from tests.support.models import images
from tests.support.official import read_official

DENSE = TokenSpec(keep_rate=1.0)
TINY: dict[str, Any] = TINY_ARGS


def filled(**more: Any) -> Any:
    model: Any = timm.create_model("levit_128s", **(TINY | more))
    drawn = weights({key: value.shape for key, value in model.state_dict().items()})
    model.load_state_dict({key: torch.from_numpy(value) for key, value in drawn.items()})
    return model.eval()


@pytest.mark.parametrize("name", ["levit_128s", "levit_128", "levit_192", "levit_256", "levit_384"])
def test_plan_has_the_true_counts(name):
    model: Any = timm.create_model(name).eval()
    plan = token_plan(model)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, 224, 224))
    assert plan.macs() == plan.dense().macs() == counter.get_total_flops() / 2
    first, second, third = model.stages[0].blocks, model.stages[1].blocks, model.stages[2].blocks
    wanted = [(196, 196)] * len(first) + [(196, 49)] + [(49, 49)] * len(second) + [(49, 16)] + [(16, 16)] * len(third)
    assert [(row.tokens_in, row.tokens_out) for row in plan.blocks] == wanted
    assert (plan.prefix, plan.patches) == (0, 196)


@torch.inference_mode()
def test_the_dense_form_is_the_model():
    model = filled()
    x = torch.from_numpy(images(model, 2))
    before = model(x)
    assert torch.equal(reduce_tokens_(model, DENSE)(x), before)
    assert torch.equal(dense_twin(model)(x), before)


@pytest.mark.parametrize("distilled", [True, False])
@torch.inference_mode()
def test_the_lowered_model_is_the_model(distilled):
    model = filled(distilled=distilled).double()
    x = torch.from_numpy(images(model, 2)).double()
    for flat in (True, False):
        lowered = TimmLeViT.lower(model)
        for module in lowered.modules():
            if isinstance(getattr(module, "flat", None), bool):
                module.flat = flat
        torch.testing.assert_close(lowered(x), model(x), rtol=1e-10, atol=1e-10)
    assert not [module for module in lowered.modules() if "Norm" in type(module).__name__]
    assert type(model).__name__ == ("LevitDistilled" if distilled else "Levit")


def test_the_exported_file_answers_like_the_model():
    model = filled()
    proto = export_onnx(model, name="levit_128s", preprocess=Preprocess.from_model(model, 112))
    assert not {"BatchNormalization", "GatherND", "ScatterElements"} & set(operators(proto))
    x = images(model, 8)
    for batch in (1, 3, 8):
        assert_close(answers(proto, x[:batch])["logits"], model, x[:batch])


def test_a_released_file_gives_the_official_answers(tmp_path):
    file = read_official("levit_128s")
    content = {"model": {name: torch.from_numpy(value) for name, value in file.weights.items()}}
    checkpoint = read_checkpoint(saved(tmp_path, content, "LeViT-128S-96703c44.pth"))
    assert (checkpoint.model, checkpoint.model_args) == ("levit_128s", {"num_classes": 100, "img_size": 224})
    assert checkpoint.tokens is None
    with torch.inference_mode():
        logits = build_model(checkpoint)(torch.from_numpy(file.images)).numpy()
    assert np.abs(logits - file.arrays["logits"]).max() < 1e-4
    assert np.array_equal(logits, build_model(checkpoint, 224)(torch.from_numpy(file.images)).detach().numpy())
    with pytest.raises(InputError, match="takes one image size alone") as caught:
        build_model(checkpoint, 384)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("method", METHODS.own_names())
def test_every_method_is_refused(method):
    model = filled()
    with pytest.raises(UnsupportedModelError, match="its attention biases need every token in its place") as caught:
        reduce_tokens_(model, spec_of(method))
    assert "Take its Evo form" in str(caught.value)
    assert not token_plan(model).locations


def test_forms_that_are_not_handled_are_refused():
    with pytest.raises(UnsupportedModelError, match="convolutional form"):
        token_plan(timm.create_model("levit_conv_128s", **TINY))
    with pytest.raises(UnsupportedModelError, match="returns every token"):
        token_plan(timm.create_model("levit_128s", **TINY, global_pool=""))
