"""Our own checkpoints: what is saved is read again, and damaged metadata is refused."""

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch

from evit_deploy.errors import CheckpointError
from evit_deploy.models.checkpoint import METADATA_KEY, Checkpoint, build_model, read_checkpoint, save_checkpoint
from evit_deploy.registry import METHODS
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reducer import TokenReducer
from tests.support.checkpoints import refusal
from tests.support.models import KEEP, KINDS, of_kind, preprocess_for


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [None, KEEP], ids=["dense", "reduced"])
def test_saving_and_reading_again(tmp_path, kind, tokens):
    name, model_args = KINDS[kind]
    model = of_kind(kind)
    labels = [f"class {i}" for i in range(10)] if tokens is not None and model_args.get("num_classes") else None
    about = Checkpoint("x", None, {}, name, model_args, tokens, preprocess_for(model), labels)
    save_checkpoint(tmp_path / "own.safetensors", model, about)
    again = read_checkpoint(tmp_path / "own.safetensors")
    assert (again.model, again.model_args, again.tokens) == (name, model_args, tokens)
    assert (again.preprocess, again.labels, again.notes) == (preprocess_for(model), labels, [])
    rebuilt = build_model(again)
    for key, value in rebuilt.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]


def test_own_metadata_that_is_damaged(tmp_path, checkpoint_file):
    with safetensors.safe_open(checkpoint_file, framework="pt") as file:
        text = file.metadata()[METADATA_KEY]
    tensors = safetensors.torch.load_file(checkpoint_file)
    for damaged in ("", "{", "[]", "null", text.replace('"model_args"', '"arguments"'), text.replace("96", '"x"')):
        path = tmp_path / "own.safetensors"
        safetensors.torch.save_file(tensors, path, metadata={METADATA_KEY: damaged})
        with pytest.raises(CheckpointError, match=r"own\.safetensors"):
            build_model(read_checkpoint(path))


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("model", "no_such_model", "no_such_model"),
        ("model", "resnet18", "resnet18"),
        ("model_args", {"depth": 3}, "weights do not fit"),
        ("model_args", {"no_such_argument": 1}, "no_such_argument"),
        ("model_args", {"pretrained": True}, "pretrained"),
    ],
)
def test_own_metadata_that_does_not_fit(tmp_path, checkpoint_file, field, value, hint):
    with safetensors.safe_open(checkpoint_file, framework="pt") as file:
        own = msgspec.json.decode(file.metadata()[METADATA_KEY])
    own[field] = own[field] | value if isinstance(value, dict) else value
    path = tmp_path / "own.safetensors"
    metadata = {METADATA_KEY: msgspec.json.encode(own).decode()}
    safetensors.torch.save_file(safetensors.torch.load_file(checkpoint_file), path, metadata=metadata)
    with pytest.raises(CheckpointError, match=hint):
        build_model(read_checkpoint(path))


def test_a_model_name_of_the_user_wins_over_the_metadata(checkpoint_file):
    assert "deit_tiny_patch16_224" in refusal(checkpoint_file, model="deit_tiny_patch16_224")


class Foreign(TokenReducer):
    """A method of another package, with a layer of its own."""

    own_parameters = ("their_layer.",)


def test_the_layers_of_another_package_s_method_are_set_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS, "_targets", dict(METHODS._targets))
    METHODS.register("foreign", f"{__name__}:Foreign")
    model = of_kind("plain")
    model.their_layer = torch.nn.Linear(3, 2)
    name, model_args = KINDS["plain"]
    tokens = TokenSpec(keep_rate=0.6, method="foreign")
    about = Checkpoint("x", None, {}, name, model_args, tokens, preprocess_for(model))
    save_checkpoint(tmp_path / "own.safetensors", model, about)
    again = read_checkpoint(tmp_path / "own.safetensors")
    assert again.method_weights.keys() == {"their_layer.weight", "their_layer.bias"}
    assert torch.equal(build_model(again).method_weights["their_layer.weight"], model.their_layer.weight)
