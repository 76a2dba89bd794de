"""CLIP towers of transformers and OpenCLIP: their owners' code against ours and the exported file; what is refused."""

import json
import warnings
from typing import Any

import msgspec
import numpy as np
import open_clip
import pytest
import torch
import transformers
from open_clip.coca_model import CoCa, MultimodalCfg
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from evit_deploy.errors import CheckpointError
from evit_deploy.export.portable import export_onnx
from evit_deploy.models.checkpoint import Checkpoint, build_model
from evit_deploy.models.files.prefixes import inside, without_common
from evit_deploy.models.identify import Identity, identify
from evit_deploy.models.layouts import openclip
from evit_deploy.models.layouts.hugging_face import clip
from evit_deploy.models.layouts.known import SIGNS
from evit_deploy.pipeline.convert import Job, convert_checkpoint
from evit_deploy.pipeline.lowering import lowering
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from tests.support.exports import answers
from tests.support.models import KEEP, images, preprocess_for

VISION: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 96,
    "patch_size": 16, "projection_dim": 20,
}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
TOWER: dict[str, Any] = {
    "image_size": 96, "layers": 4, "width": 48, "head_width": 16, "patch_size": 16, "mlp_ratio": 2.0,
}  # fmt: skip
SMALL_TEXT = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
MEASURE = ProfileOptions(batch_sizes=(1,), duration=0.01, threads=1)


def seed_(model: Any) -> Any:
    """Draws every parameter anew, so that each one matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() > 1 and "position" not in name:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def hugging_face(kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers and the config beside it."""
    vision = VISION | changes
    if kind == "CLIPModel":
        config: Any = transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=20)
    else:
        config = transformers.CLIPVisionConfig(**vision)
    model = getattr(transformers, kind)(config)
    return seed_(model), json.loads(model.config.to_json_string(use_diff=False))


def by_hugging_face(model: Any, x: torch.Tensor) -> torch.Tensor:
    if isinstance(model, transformers.CLIPModel):
        return model.visual_projection(model.vision_model(x).pooler_output)
    found = model(x)
    return found.image_embeds if hasattr(found, "image_embeds") else found.pooler_output


def of_openclip(quick_gelu: bool = False, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of OpenCLIP and the config beside it."""
    vision = TOWER | changes
    model = CLIP(20, CLIPVisionCfg(**vision), CLIPTextCfg(**SMALL_TEXT), quick_gelu=quick_gelu)
    config = {"model_cfg": {"embed_dim": 20, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": SMALL_TEXT},
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}  # fmt: skip
    return seed_(model), config


def identified(tmp_path, weights, config=None, model=None) -> Identity:
    held = inside(tmp_path, without_common(weights), SIGNS)
    return identify(tmp_path, held, model, (), config)


def built(identity: Identity) -> Any:
    return build_model(Checkpoint("clip", "0", identity.weights, identity.model, identity.model_args))


def worst(found: np.ndarray, wanted: torch.Tensor) -> float:
    return float(np.abs(found - wanted.numpy()).max() / wanted.abs().max())


@torch.inference_mode()
def held_against(identity: Identity, owner: Any) -> None:
    """The owner's code, ours and the exported file give the same."""
    model = built(identity)
    x = images(model, 2)
    wanted = owner(torch.from_numpy(x))
    assert worst(model(torch.from_numpy(x)).numpy(), wanted) <= 1e-5
    proto = export_onnx(model, name=identity.model, preprocess=preprocess_for(model))
    assert worst(answers(proto, x)["embedding"], wanted) <= 1e-5


# Hugging Face.


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_transformers_and_the_file_agree(tmp_path, kind):
    owner, config = hugging_face(kind)
    weights = owner.state_dict()
    identity = identified(tmp_path, weights, config)
    assert identity.output == "embedding"
    assert identity.model_args["act_layer"] == "quick_gelu"
    assert identity.model_args.get("projection") == (None if kind == "CLIPVisionModel" else 20)
    left = [note for note in identity.notes if "left out" in note]
    assert bool(left) == (kind == "CLIPModel")
    assert all("text_model" in note and "vision_model" in note for note in left)
    held_against(identity, lambda x: by_hugging_face(owner, x))


@pytest.mark.parametrize("changes", [{"hidden_act": "gelu"}, {"layer_norm_eps": 1e-3}, {"num_attention_heads": 6}])
def test_what_the_config_of_transformers_says_is_honored(tmp_path, changes):
    owner, config = hugging_face("CLIPVisionModelWithProjection", **changes)
    identity = identified(tmp_path, owner.state_dict(), config)
    with torch.inference_mode():
        model = built(identity)
        x = torch.from_numpy(images(model, 2))
        wanted = owner(x).image_embeds
        assert worst(model(x).numpy(), wanted) <= 1e-5
        plain = built(identified(tmp_path, owner.state_dict(), hugging_face("CLIPVisionModelWithProjection")[1]))
        assert worst(plain(x).numpy(), wanted) > 1e-4


def test_a_config_of_the_defaults_alone(tmp_path):
    """transformers leaves out of a config what it takes by default."""
    owner, config = hugging_face("CLIPVisionModelWithProjection", num_attention_heads=12, hidden_size=96)
    for name in ("hidden_act", "layer_norm_eps", "num_attention_heads"):
        del config[name]
    identity = identified(tmp_path, owner.state_dict(), config)
    model = built(identity)
    x = torch.from_numpy(images(model, 2))
    with torch.inference_mode():
        assert worst(model(x).numpy(), owner(x).image_embeds) <= 1e-5


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_the_way_back_to_transformers(tmp_path, kind):
    owner, config = hugging_face(kind)
    weights = owner.state_dict()
    identity = identified(tmp_path, weights, config)
    back = clip.TABLES[0].to_released(identity.weights)
    tower = {name.removeprefix("vision_model."): value for name, value in weights.items() if "vision_model." in name}
    tower |= {name: value for name, value in weights.items() if kind == "CLIPVisionModel"}
    if kind == "CLIPModel":
        tower["../visual_projection.weight"] = weights["visual_projection.weight"]
    tower.pop("embeddings.position_ids", None)
    assert back.keys() == tower.keys()
    assert all(torch.equal(back[name], tower[name]) for name in tower)


def test_without_a_config_what_is_assumed_is_said(tmp_path):
    owner, _ = hugging_face("CLIPVisionModelWithProjection")
    identity = identified(tmp_path, owner.state_dict())
    assert any("quick GELU" in note for note in identity.notes)
    assert any("heads" in note for note in identity.notes)
    plain = identified(tmp_path, owner.state_dict(), model="vit_base_patch16_clip_224")
    assert "act_layer" not in plain.model_args


def test_a_classifier_on_the_mean_of_patches_is_refused(tmp_path):
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=20, num_labels=3)
    weights = transformers.CLIPForImageClassification(config).state_dict()
    with pytest.raises(CheckpointError, match="classifier, which reads the mean of all patches"):
        identified(tmp_path, weights, json.loads(config.to_json_string(use_diff=False)))


def test_another_model_s_config_is_refused(tmp_path):
    owner, _ = hugging_face("CLIPVisionModelWithProjection")
    _, other = hugging_face("CLIPVisionModelWithProjection", hidden_size=96, patch_size=32)
    with pytest.raises(CheckpointError, match=r"contradicts the tensors.*hidden_size 96 in the config and 48"):
        identified(tmp_path, owner.state_dict(), other)


# OpenCLIP.


@pytest.mark.parametrize(
    ("quick_gelu", "changes"),
    [
        (False, {}),
        (True, {}),
        (False, {"ls_init_value": 0.5}),
        (False, {"norm_kwargs": {"eps": 1e-3}}),
        (False, {"act_kwargs": {"approximate": "tanh"}}),
        (False, {"head_width": 8}),
        (False, {"patch_dropout": 0.5}),  # drops in training alone
        (False, {"final_ln_after_pool": True}),  # of one token, the order of the two is no matter
    ],
    ids=str,
)
def test_openclip_and_the_model_agree(tmp_path, quick_gelu, changes):
    owner, config = of_openclip(quick_gelu, **changes)
    identity = identified(tmp_path, owner.state_dict(), config)
    assert (identity.output, identity.model_args["projection"]) == ("embedding", 20)
    assert any("'visual.'" in note and "token_embedding" in note for note in identity.notes)
    with torch.inference_mode():
        model = built(identity)
        x = torch.from_numpy(images(model, 2))
        assert worst(model(x).numpy(), owner.encode_image(x)) <= 1e-5


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
@pytest.mark.slow
def test_a_whole_openclip_model_and_the_file_agree(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        owner = open_clip.create_model(name, pretrained=None).eval()
    config = {"model_cfg": open_clip.get_model_config(name)}
    identity = identified(tmp_path, owner.state_dict(), config)
    quick = name.endswith("quickgelu")
    assert identity.model == f"vit_base_patch32_clip{'_quickgelu' if quick else ''}_224"
    held_against(identity, owner.encode_image)


def test_the_way_back_to_openclip(tmp_path):
    owner, config = of_openclip(ls_init_value=0.5)
    identity = identified(tmp_path, owner.state_dict(), config)
    back = openclip.TABLE.to_released(identity.weights)
    assert back.keys() == owner.visual.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in owner.visual.state_dict().items())


def test_the_config_of_transformers_beside_openclip_s_weights(tmp_path):
    """As in the repositories that hold both."""
    owner, _ = of_openclip(True)
    _, config = hugging_face("CLIPModel")
    identity = identified(tmp_path, owner.state_dict(), config)
    with torch.inference_mode():
        model = built(identity)
        x = torch.from_numpy(images(model, 2))
        assert worst(model(x).numpy(), owner.encode_image(x)) <= 1e-5


def test_without_openclip_s_config_what_is_assumed_is_said(tmp_path):
    owner, _ = of_openclip(True)
    identity = identified(tmp_path, owner.state_dict())
    assert any("GELU is assumed" in note and "quickgelu" in note for note in identity.notes)
    named = identified(tmp_path, owner.state_dict(), model="vit_base_patch16_clip_quickgelu_224")
    assert "act_layer" not in named.model_args
    assert named.model == "vit_base_patch16_clip_quickgelu_224"


@pytest.mark.parametrize(
    ("vision", "match"),
    [
        ({"attentional_pool": True}, "pools all patch tokens by attention"),
        ({"pool_type": "avg"}, r"pools the patch tokens \(pool_type 'avg'\)"),
        ({"global_average_pool": True}, r"pools the patch tokens \(pool_type 'avg'\)"),
        ({"timm_model_name": "resnet50"}, "another network"),
        ({"width": 96}, "contradicts the tensors.*width 96 in the config and 48 in the tensors"),
        ({"patch_size": 8}, "patch_size 8 in the config and 16"),
        ({"act_kwargs": {"inplace": True}}, "options in its open_clip_config.json that are not supported.*inplace"),
    ],
    ids=str,
)
def test_a_config_of_another_tower_is_refused(tmp_path, vision, match):
    owner, config = of_openclip()
    config["model_cfg"]["vision_cfg"] = TOWER | vision
    with pytest.raises(CheckpointError, match=match):
        identified(tmp_path, owner.state_dict(), config)


def test_coca_is_refused(tmp_path):
    vision = CLIPVisionCfg(**TOWER, attentional_pool=True, attn_pooler_heads=2, output_tokens=True)  # type: ignore[arg-type]
    text = CLIPTextCfg(**SMALL_TEXT, embed_cls=True, output_tokens=True)  # type: ignore[arg-type]
    decoder = MultimodalCfg(width=32, heads=2, layers=1, context_length=8, vocab_size=99)
    weights = CoCa(20, decoder, text, vision).state_dict()
    with pytest.raises(CheckpointError, match=r"cannot be reduced exactly.*attention, as CoCa's does.*attn_pool"):
        identified(tmp_path, weights)


def test_changed_blocks_are_refused(tmp_path):
    owner, config = of_openclip(scale_fc=True)
    with pytest.raises(CheckpointError, match="tensors that OpenCLIP's ViT does not have"):
        identified(tmp_path, owner.state_dict(), config)


# Through the whole of convert.


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_reduced_tower_through_convert(tmp_path, normalize, precision):
    owner, config = hugging_face("CLIPModel")
    identity = identified(tmp_path, owner.state_dict(), config)
    checkpoint = Checkpoint(
        str(tmp_path / "clip.safetensors"), "0", identity.weights, identity.model, identity.model_args
    )
    options = ConvertOptions(targets=("onnx",), precision=precision, normalize=normalize)  # type: ignore[arg-type]
    spec = msgspec.structs.replace(KEEP, keep_rate=0.7)
    bundle, report = convert_checkpoint(checkpoint, spec, Job(lowering(options), measure=MEASURE))
    assert report.passed
    assert bundle.manifest.outputs[0].name == "embedding"
    assert bundle.manifest.outputs[0].shape == (None, 20)
    assert bundle.manifest.normalized is normalize
    assert bundle.manifest.preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert [row.keep for row in bundle.manifest.plan.locations] == [26, 19, 14]


@pytest.mark.tensorrt_rtx
@pytest.mark.slow
def test_an_engine_of_a_tower_with_quick_gelu_is_built_and_audited(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    owner, config = hugging_face("CLIPModel")
    identity = identified(tmp_path, owner.state_dict(), config)
    checkpoint = Checkpoint(
        str(tmp_path / "clip.safetensors"), "0", identity.weights, identity.model, identity.model_args
    )
    options = ConvertOptions(
        targets=("tensorrt-rtx",), gpus=("sm80",), batches=((1, 2, 4),), precision="fp16", normalize=True
    )
    bundle, report = convert_checkpoint(checkpoint, KEEP, Job(lowering(options), measure=MEASURE))
    assert report.passed
    assert bundle.manifest.engine is not None
    assert bundle.manifest.engine.gpus == ("sm80",)
    audited = {check.name for check in report.checks if "attention" in check.name or "fus" in check.name}
    assert audited
