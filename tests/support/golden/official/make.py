"""Runs the official code of Evo-ViT, DynamicViT or LeViT on drawn weights and writes what it answers as golden files.

    python -m tests.support.golden.official.make evo-vit FOLDER
    python -m tests.support.golden.official.make dynamicvit FOLDER
    python -m tests.support.golden.official.make levit FOLDER

FOLDER is a checkout of the repository at the commit below. Everything runs in float64 on the CPU.
"""

import contextlib
import json
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tests.support.method_oracles import synthetic

HERE = Path(__file__).parent
EVO_VIT = {"source": "github.com/YifanXu74/Evo-ViT", "commit": "4c5d9b30b0a3c9b1e7b8687a9490555bd9d714ca"}
DYNAMICVIT = {"source": "github.com/raoyongming/DynamicViT", "commit": "1322e626d1e9eca18cc150569908fb4af29e15f7"}
LEVIT = {"source": "github.com/facebookresearch/LeViT", "commit": "3772b8e7517b900330ee1f46e11b0ae917dae323"}
WEIGHTS, IMAGES, TEACHER, NOISE = 0, 1, 2, 3  # seeds
CLASSES = 100


def load(model: torch.nn.Module, seed: int) -> dict[str, list[int]]:
    """Draws a model's weights; gives the shapes they were drawn for.

    A tensor of two names is drawn for the first; what is no number to learn (LeViT's indices) stays as it is.
    """
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("attention_bias_idxs")}
    same = second_names(state)
    shapes = {name: list(value.shape) for name, value in state.items() if name not in same}
    drawn = synthetic.draw(shapes, seed)
    values = {name: torch.from_numpy(drawn[same.get(name, name)]) for name in state}
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert all(name.endswith("attention_bias_idxs") for name in missing)
    return shapes


def second_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of tensors that come under an earlier name too, and that name."""
    first: dict[int, str] = {}
    names = {name: first.setdefault(value.data_ptr(), name) for name, value in state.items()}
    return {name: earlier for name, earlier in names.items() if earlier != name}


def inputs() -> torch.Tensor:
    """The images."""
    return torch.from_numpy(synthetic.images(2, 224, IMAGES)).double()


def check_float32(model: torch.nn.Module, logits: torch.Tensor) -> None:
    """That the same model in float32 answers alike, so that no choice hangs on rounding."""
    with torch.no_grad():
        difference = (model.float()(inputs().float()) - logits).abs().max().item()
    model.double()
    print(f"float32 is off by {difference:.1e}")
    assert difference < 5e-5


def write(name: str, recipe: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """One golden file and its recipe."""
    values = {key: value.detach().numpy() if torch.is_tensor(value) else value for key, value in arrays.items()}
    np.savez_compressed(HERE / f"{name}.npz", **values)  # pyright: ignore[reportArgumentType]
    head = {**recipe, "seed": WEIGHTS, "images": {"count": 2, "size": 224, "seed": IMAGES}}
    text = json.dumps(head, indent=1)
    for name_of, shape in recipe["shapes"].items():  # a line each
        text = text.replace(f"{json.dumps(name_of)}: {json.dumps(shape, indent=1)}".replace("\n", "\n  "),
                            f"{json.dumps(name_of)}: {json.dumps(shape)}")  # fmt: skip
    (HERE / f"{name}.json").write_text(text + "\n")
    print(name, {key: (value.shape, str(value.dtype)) for key, value in values.items()})


@contextlib.contextmanager
def recorded(module: Any, name: str, keep: Callable[..., Any]) -> Iterator[list[Any]]:
    """What ``keep`` says of each call of a module's function."""
    calls, function = [], getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        calls.append(keep(*args, **options))
        return function(*args, **options)

    setattr(module, name, call)
    try:
        yield calls
    finally:
        setattr(module, name, function)


def numbers(indices: list[torch.Tensor]) -> list[np.ndarray]:
    """Original patch numbers of choices that each index what the one before left."""
    found = [indices[0]]
    for index in indices[1:]:
        found.append(found[-1].gather(1, index))
    return [value.numpy().astype(np.int16) for value in found]


def targets() -> torch.Tensor:
    """Soft labels ``[2, classes]`` as mixup makes them."""
    labels = torch.zeros(2, CLASSES, dtype=torch.float64)
    labels[0, 3], labels[0, 7], labels[1, 7], labels[1, 3] = 0.8, 0.2, 0.6, 0.4
    return labels


def gradients(model: torch.nn.Module, loss: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Of a loss, for small tensors."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, [parameters[name] for name in names])
    return {f"gradient:{name}": value for name, value in zip(names, found, strict=True)}


# ---- Evo-ViT


def evo_vit() -> None:
    """DeiT-T and LeViT-128S, both with the choices of each sort."""
    import deit.evo_deit as deit  # pyright: ignore[reportMissingImports]

    model = deit.evo_deit_tiny_patch16_224(num_classes=CLASSES)
    recipe = {**EVO_VIT, "model": "evo_deit_tiny_patch16_224", "shapes": load(model, WEIGHTS)}
    model.double().eval()
    arrays: dict[str, Any] = {}
    for kind in ("stage", "layer"):
        model.stage_wise_prune = kind == "stage"
        with recorded(deit, "easy_gather", lambda x, indices: indices) as calls, torch.no_grad():
            arrays[f"{kind}:logits"] = model.eval()(inputs())
        check_float32(model, arrays[f"{kind}:logits"])
        arrays[f"{kind}:chosen"] = np.stack(numbers(calls))
        logits, second = model.train()(inputs())
        arrays |= {f"{kind}:train:logits": logits, f"{kind}:train:class_logits": second}
        entropies = [-(targets() * value.log_softmax(-1)).sum(-1).mean() for value in (logits, second)]
        loss = 0.5 * entropies[0] + 0.5 * entropies[1]
        small = [
            "cls_token",
            "blocks.6.norm2.weight",
            "norms.9.bias",
            "qks.2.qk.bias",
            "norm.weight",
            "norm_cls.weight",
        ]
        arrays[f"{kind}:train:loss"] = loss
        arrays |= {f"{kind}:train:{key}": value for key, value in gradients(model, loss, small).items()}
    write("evo_deit_tiny", recipe, arrays)
    levit()


def last_channel(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Of what is gathered: there LeViT's code carries original patch numbers."""
    return x[:, :, -1].gather(1, indices)


def levit() -> None:
    """EvoLeViT-128S: evaluation in stages and in layers."""
    import levit.evo_levit as levit  # pyright: ignore[reportMissingImports]

    model = levit.EvoLeViT_128S(num_classes=CLASSES)
    recipe = {**EVO_VIT, "model": "EvoLeViT_128S", "shapes": load(model, WEIGHTS)}
    recipe["same"] = second_names(model.state_dict())
    model.double().eval()
    ends: list[torch.Tensor] = []
    for blocks in (model.stage_blocks, model.blocks):
        blocks.register_forward_hook(lambda module, inputs, output: ends.append(output[:, 0]))
    arrays: dict[str, Any] = {}
    for kind in ("stage", "layer"):
        model.stage_wise_prune = kind == "stage"
        model.set_learn_tradeoff(kind == "stage")
        with recorded(levit, "easy_gather", last_channel) as calls, torch.no_grad():
            arrays[f"{kind}:logits"] = model(inputs())
            arrays[f"{kind}:class_logits"] = (model.head_cls(ends[-1]) + model.head_cls_dist(ends[-1])) / 2
        check_float32(model, arrays[f"{kind}:logits"])
        for number, call in enumerate(calls):
            arrays[f"{kind}:order:{number}"] = call.numpy().astype(np.int16)
    write("evo_levit_128s", recipe, arrays)


# ---- LeViT


def plain_levit() -> None:
    """LeViT-128S."""
    import levit  # pyright: ignore[reportMissingImports]

    model = levit.LeViT_128S(num_classes=CLASSES)
    recipe = {**LEVIT, "model": "LeViT_128S", "shapes": load(model, WEIGHTS)}
    model.double().eval()  # which looks the biases up
    with torch.no_grad():
        arrays = {"logits": model(inputs())}
    model.float().eval()
    model.train().eval()
    check_float32(model, arrays["logits"])
    write("levit_128s", recipe, arrays)


# ---- DynamicViT


def given_noise(drawn: list[np.ndarray]) -> Callable[..., torch.Tensor]:
    """torch's ``gumbel_softmax`` at temperature 1, hard, with noise from NumPy's generator."""
    generator = np.random.default_rng(NOISE)

    def gumbel_softmax(scores: torch.Tensor, hard: bool) -> torch.Tensor:
        assert hard
        noise = generator.gumbel(size=tuple(scores.shape))
        soft = (scores + torch.from_numpy(noise)).softmax(-1)
        index = soft.max(-1, keepdim=True)[1]
        drawn.append(index[..., 0].numpy() == 0)
        return torch.zeros_like(scores).scatter_(-1, index, 1.0) - soft.detach() + soft

    return gumbel_softmax


def dynamicvit() -> None:
    """DeiT-T (not released in this size) and LV-ViT-S."""
    six: Any = types.ModuleType("torch._six")
    board: Any = types.ModuleType("tensorboardX")
    six.inf, board.SummaryWriter = float("inf"), None
    sys.modules |= {"torch._six": six, "tensorboardX": board}  # what its helpers import and these runs do not use
    import models.dylvvit as dylvvit  # pyright: ignore[reportMissingImports]
    import models.dyvit as dyvit  # pyright: ignore[reportMissingImports]

    options: dict[str, Any] = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "num_classes": CLASSES}
    options |= {"mlp_ratio": 4, "qkv_bias": True}
    reduced = {"pruning_loc": [3, 6, 9], "token_ratio": [0.7, 0.7**2, 0.7**3], "distill": True}
    student = dyvit.VisionTransformerDiffPruning(**options, **reduced)
    teacher = dyvit.VisionTransformerTeacher(**options)
    small = [
        "score_predictor.0.in_conv.0.weight",
        "score_predictor.1.out_conv.4.weight",
        "score_predictor.2.out_conv.2.bias",
    ]
    small += ["blocks.4.norm1.weight", "blocks.10.attn.qkv.bias", "norm.bias"]
    run(dyvit, "dynamicvit_deit_tiny", student, teacher, small, True)

    options = {"patch_size": 16, "embed_dim": 384, "depth": 16, "num_heads": 6, "num_classes": CLASSES}
    options |= {"mlp_ratio": 3.0, "p_emb": "4_2", "skip_lam": 2.0, "return_dense": True, "mix_token": True}
    student = dylvvit.LVViTDiffPruning(**options, **(reduced | {"pruning_loc": [4, 8, 12]}))
    teacher = dylvvit.LVViT_Teacher(**options)
    small = [
        "score_predictor.0.in_conv.0.weight",
        "score_predictor.1.out_conv.4.weight",
        "blocks.5.norm1.weight",
        "norm.bias",
    ]
    run(dylvvit, "dynamicvit_lvvit_s", student, teacher, small, False)


def run(module: Any, name: str, student: Any, teacher: Any, small: list[str], mse: bool) -> None:
    """One model's inference, and one training step's forward pass, losses and gradients."""
    from losses import DistillDiffPruningLoss_dynamic  # pyright: ignore[reportMissingImports]
    from timm.loss import SoftTargetCrossEntropy

    recipe: dict[str, Any] = {**DYNAMICVIT, "model": type(student).__name__}
    recipe |= {
        "locations": student.pruning_loc,
        "rate": 0.7,
        "noise": {"seed": NOISE, "order": "location after location"},
    }
    recipe |= {"teacher": {"seed": TEACHER, "without": "score_predictor."}, "shapes": load(student, WEIGHTS)}
    assert load(teacher, TEACHER) == {
        key: shape for key, shape in recipe["shapes"].items() if not key.startswith("score_predictor.")
    }
    for model in (student, teacher):
        model.double().eval()
    arrays: dict[str, Any] = {}
    with recorded(module, "batch_index_select", lambda x, index: index) as calls, torch.no_grad():
        arrays["logits"] = student(inputs())
    check_float32(student, arrays["logits"])
    for stage, kept in enumerate(numbers(calls[1::2])):  # every second call selects of the mask, class token left out
        arrays[f"chosen:{stage}"] = kept
    drawn: list[np.ndarray] = []
    student.train()  # of LV-ViT's batch norms too, as its training does
    if not mse:
        student.patch_embed.eval()  # whose statistics two images do not give
    soft, F.gumbel_softmax = F.gumbel_softmax, given_noise(drawn)
    outputs = student(inputs())
    F.gumbel_softmax = soft
    options = {"clf_weight": 1.0, "keep_ratio": student.token_ratio, "mse_token": mse, "ratio_weight": 2.0}
    criterion = DistillDiffPruningLoss_dynamic(teacher, SoftTargetCrossEntropy(), **options)
    loss, parts = criterion(inputs(), outputs, targets())
    arrays |= {"train:decisions": np.packbits(np.stack(drawn)), "train:logits": outputs[0], "train:loss": loss}
    arrays |= {"train:tokens": outputs[1][:, ::49], "train:mask": np.packbits(outputs[2].numpy() > 0.5)}
    arrays["train:parts"] = torch.stack(parts)  # cross entropy, ratio, logits, tokens, none weighted
    arrays |= {f"train:{key}": value for key, value in gradients(student, loss, small).items()}
    write(name, recipe, arrays)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)
    sys.path.insert(0, sys.argv[2])
    {"evo-vit": evo_vit, "dynamicvit": dynamicvit, "levit": plain_levit}[sys.argv[1]]()
