"""Three models to be served by Triton, one per platform; their golden configurations are in ``golden/triton``.

python -m tests.support.served_models    writes those anew; look at what has changed
"""

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.data.preprocess import Preprocess
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.serving.repository import Serving, configurations
from tests.support.paths import GOLDEN

HALF = (0.5, 0.5, 0.5)


def image(side: int, channels: int = 3) -> TensorSpec:
    return TensorSpec("input", "float32", (None, channels, side, side))


def logits(classes: int) -> TensorSpec:
    return TensorSpec("logits", "float32", (None, classes))


MODELS = {
    "digits": Serving(
        name="digits",
        platform="onnxruntime",
        inputs=(image(32),),
        outputs=(logits(10),),
        max_batch=32,
        preprocess=Preprocess((32, 32), crop_pct=1.0, mean=HALF, std=HALF),
        labels=[str(digit) for digit in range(10)],
    ),
    # The same on a processor.
    "digits_cpu": Serving(
        name="digits_cpu",
        platform="onnxruntime",
        inputs=(image(32),),
        outputs=(logits(10),),
        max_batch=32,
        preprocess=Preprocess((32, 32), crop_pct=1.0, mean=HALF, std=HALF),
        labels=[str(digit) for digit in range(10)],
        on_gpu=False,
        cpus=6,
        instances=2,
    ),
    # Two GPUs, one profile for single images and one for batches.
    "deit_s-evit-k0.7": Serving(
        name="deit_s-evit-k0.7",
        platform="tensorrt",
        inputs=(image(224),),
        outputs=(logits(1000),),
        max_batch=128,
        preprocess=Preprocess((224, 224), crop_pct=0.9),
        profiles=(BatchProfile(1, 1, 1), BatchProfile(1, 32, 128)),
        plans={"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"},
        instances=2,
        queue_delay=500,
    ),
    # Inputs instead of photographs, with kept patches.
    "lvvit_s": Serving(
        name="lvvit_s",
        platform="openvino",
        on_gpu=False,
        inputs=(image(384, channels=1),),
        outputs=(logits(5), TensorSpec("kept_4", "int32", (None, 404)), TensorSpec("kept_8", "int32", (None, 284))),
        max_batch=4,
        labels=["a", "b", "c", "d", "e"],
    ),
}

if __name__ == "__main__":
    from google.protobuf import text_format

    for name, serving in MODELS.items():
        for path, config in configurations(serving).items():
            (GOLDEN / "triton" / name / path).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / "triton" / name / path).write_text(text_format.MessageToString(config), encoding="utf-8")
