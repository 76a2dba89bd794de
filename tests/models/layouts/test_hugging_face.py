"""What a config of transformers says: honored, and refused where it contradicts the tensors or is not valid."""

import pytest
import torch

from evit_deploy.errors import CheckpointError
from tests.support.layouts import identified, owned, written


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return written(owned("ViT"), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return written(owned("DINOv2"), tmp_path_factory.mktemp("dinov2"))


def refusal(weights, config, **more):
    with pytest.raises(CheckpointError) as caught:
        identified(weights, config, **more)
    message = str(caught.value)
    assert message.startswith("weights: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("hidden_size", 64, "hidden_size 64 in the config and 48 in the tensors"),
        ("num_hidden_layers", 12, "num_hidden_layers 12 in the config and 4 in the tensors"),
        ("intermediate_size", 96, "intermediate_size 96 in the config and 100 in the tensors"),
        ("patch_size", 32, "patch_size 32 in the config and 16 in the tensors"),
        ("image_size", 224, "image_size 224 in the config and 96 in the tensors"),
        ("image_size", [224, 224], "image_size 224 in the config and 96 in the tensors"),
        ("num_channels", 1, "num_channels 1 in the config and 3 in the tensors"),
        ("id2label", {"0": "cat"}, "1 labels in the config and 5 rows in the classifier"),
        ("num_attention_heads", 7, "no multiple of the number of heads"),
        ("num_attention_heads", 0, "a num_attention_heads in its config.json that is not valid"),
        ("num_attention_heads", "four", "a num_attention_heads in its config.json that is not valid"),
        ("layer_norm_eps", -1, "a layer_norm_eps in its config.json that is not valid"),
        ("layer_norm_eps", True, "a layer_norm_eps in its config.json that is not valid"),
        ("image_size", [96, 64], "a image_size in its config.json that is not valid"),
        ("hidden_act", "mish", "an activation that is not supported"),
        ("hidden_act", ["gelu"], "an activation that is not supported"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_makes_no_sense(vit, name, value, hint):
    weights, config = vit
    assert hint in refusal(weights, config | {name: value})


def test_registers_that_a_config_counts_otherwise(tmp_path):
    weights, config = written(owned("DINOv2 with registers"), tmp_path)
    assert "num_register_tokens 4 in the config and 3 in the tensors" in refusal(
        weights, config | {"num_register_tokens": 4}
    )


def test_without_a_config_what_is_assumed_is_said(vit):
    weights, _ = vit
    identity = identified(weights)
    assert identity.model_args["norm_eps"] == 1e-12
    notes = " ".join(identity.notes)
    assert "eps 1e-12 and GELU are assumed" in notes
    assert "1 are assumed, 64 wide" in notes  # heads


def test_the_heads_are_the_configs(vit):
    weights, config = vit
    for heads in (2, 4, 6):
        args = identified(weights, config | {"num_attention_heads": heads}).model_args
        assert args.get("num_heads", 3) == heads


def test_a_config_inside_the_one_of_a_larger_model(vit):
    weights, config = vit
    larger = {"model_type": "vision-encoder-decoder", "encoder": config, "decoder": {"model_type": "bert"}}
    inner = {name.replace("vit.", "encoder."): value for name, value in weights.items() if name.startswith("vit.")}
    identity = identified(inner | {"decoder.a.weight": torch.ones(2), "decoder.b.weight": torch.ones(2)}, larger)
    assert identity.model_args["num_heads"] == 4
    assert "2 tensors of decoder" in " ".join(identity.notes)


def test_a_config_of_another_architecture_and_the_way_out(vit):
    weights, config = vit
    for kind, hint in (("bert", "not describe a known vision transformer"), ("dinov2", "a different architecture")):
        message = refusal(weights, config | {"model_type": kind})
        assert hint in message
        assert repr(kind) in message
        assert "--model" in message
    identity = identified(weights, config | {"model_type": "bert"}, model="vit_base_patch16_224")
    assert identity.model == "vit_base_patch16_224"
    assert identity.model_args["embed_dim"] == 48


def test_model_decides_the_name(vit):
    weights, config = vit
    identity = identified(weights, config, model="deit_small_patch16_224")
    assert identity.model == "deit_small_patch16_224"
    assert identity.model_args["num_heads"] == 4
    assert "the weights are not those of levit_128" in refusal(weights, config, model="levit_128")


def test_a_config_beside_tensors_of_another_project(vit):
    _, config = vit
    weights = dict(owned("torchvision").state_dict())
    assert "torchvision's ViT, but its config.json describes a different layout" in refusal(weights, config)


@pytest.mark.parametrize("name", ["vit.encoder.layer.2.attention.attention.query.weight", "vit.layernorm.weight",
                                  "classifier.bias", "vit.embeddings.position_embeddings"])  # fmt: skip
def test_a_tensor_that_is_missing(vit, name):
    weights, config = vit
    message = refusal({key: value for key, value in weights.items() if key != name}, config)
    assert "missing" in message or "not a whole" in message or "does not have" in message


def test_a_tensor_too_many(vit):
    weights, config = vit
    more = {"vit.encoder.layer.0.adapter.weight": torch.ones(2)}
    message = refusal(weights | more, config)
    assert "tensors that Hugging Face's ViT does not have" in message
    assert "encoder.layer.0.adapter.weight" in message


def test_positions_of_no_square_image(vit):
    weights, config = vit
    more = {"vit.embeddings.position_embeddings": torch.ones(1, 32, 48)}
    assert "do not form a square" in refusal(weights | more, config)


def test_the_classifier_of_dinov2_is_refused_with_the_way_out(tmp_path, dinov2):
    import transformers

    config = transformers.Dinov2Config.from_dict(dinov2[1] | {"num_labels": 5})
    message = refusal(*written(transformers.Dinov2ForImageClassification(config), tmp_path))
    assert "the mean of all patches" in message
    assert "Save the backbone" in message
