"""``README.md`` of a package for Triton: its contents, and how to start, call, monitor and verify the server."""

from evit_deploy.serving.deployment import CLOSED_SCRIPT, GRPC, HTTP, METRIC_NAMES, METRICS, Launch
from evit_deploy.serving.kubernetes import DRAIN
from evit_deploy.serving.repository import Serving
from evit_deploy.serving.sbom import SBOM

_PHOTOGRAPHS = """## Send a request

`{name}` accepts JPEG or PNG files unchanged (`pip install "tritonclient[http]"`):

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:{http}")
image = triton.InferInput("IMAGE", [1, 1], "BYTES")
image.set_data_from_numpy(np.array([[open("photograph.jpg", "rb").read()]], dtype=object))
{answer} = client.infer("{name}", [image]).as_numpy("{answer}")  # float32 [1, {classes}]
```

A request may have up to {batch} images, as `[n, 1]`. An invalid or truncated image, or one with more pixels than the
parameter `preprocess` in `model_repository/{name}_preprocess/config.pbtxt` allows, fails only its own request, with the
reason. EXIF orientation is ignored, as in training. `{name}_model` accepts preprocessed inputs: `input`, {input}.
"""

_DALI = """## Send a request

`{name}` accepts the bytes of JPEG or PNG files; several files in one request are padded with zeros to the longest
(`pip install "tritonclient[http]"`):

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:{http}")
file = np.fromfile("photograph.jpg", np.uint8)[None]  # up to {batch} of them, [n, longest]
image = triton.InferInput("IMAGE", file.shape, "UINT8")
image.set_data_from_numpy(file)
{answer} = client.infer("{name}", [image]).as_numpy("{answer}")  # float32 [1, {classes}]
```

DALI decodes and resizes on the GPU with different arithmetic: the model's inputs are close to, but not exactly, those
that it was verified with. The size of an image is limited only by the GPU's memory: accept requests from trusted
clients only, or package with `--preprocess python`. `{name}_model` accepts preprocessed inputs: `input`, {input}.
"""

_INPUTS = """## Send a request

`{name}_model` accepts preprocessed images: `input`, {input}, up to {batch} in one request
(`pip install "tritonclient[http]"`):

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:{http}")
image = triton.InferInput("input", {shape}, "FP32")
image.set_data_from_numpy(np.load("golden.npz")["inputs"][:1])
{answer} = client.infer("{name}_model", [image]).as_numpy("{answer}")  # float32 [1, {classes}]
```
"""

_DECODERS = {
    "python": "preprocessing of image files, in Python, on the CPU",
    "dali": "preprocessing of image files, with DALI, on the GPU",
}


def triton_readme(serving: Serving, launch: Launch, notes: list[str]) -> str:
    """Returns the page as Markdown."""
    tensor, answer = serving.inputs[0], serving.outputs[0]
    fields = {
        "name": serving.name,
        "http": HTTP,
        "batch": serving.max_batch,
        "answer": answer.name,
        "classes": answer.shape[-1],
        "shape": [1, *tensor.shape[1:]],
        "input": f"{tensor.dtype} [n, {', '.join(map(str, tensor.shape[1:]))}], normalized as `manifest.json` says",
    }
    parts = [f"# {serving.name} on Triton Inference Server\n", _contents(serving)]
    if notes:
        parts.append("".join(f"**{note}**\n\n" for note in notes).rstrip("\n") + "\n")
    parts.append(_start(serving, launch))
    page = _INPUTS if serving.preprocess is None else _DALI if serving.decoder == "dali" else _PHOTOGRAPHS
    parts.append(page.format(**fields))
    parts.append(_watch())
    return "\n".join(parts)


def _contents(serving: Serving) -> str:
    rows = []
    if serving.preprocess is not None:
        rows.append((f"model_repository/{serving.name}", "the ensemble that clients call"))
        rows.append((f"model_repository/{serving.preprocessing}", _DECODERS[serving.decoder]))
    rows += [
        (f"model_repository/{serving.model}", f"the model, on {serving.platform}"),
        ("Dockerfile", "the server's image with the models in it"),
        (CLOSED_SCRIPT, "starts the server with the interfaces that change it closed"),
        ("compose.yaml, kubernetes.yaml", "the same image with ports, probes, limits and, if used, a GPU"),
        ("manifest.json, golden.npz", "the model's description, and its golden answers"),
        ("package.json", "what this package was made from, with hashes"),
        (SBOM, "software bill of materials, CycloneDX"),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| `{name}` | {what} |\n" for name, what in rows)


def _start(serving: Serving, launch: Launch) -> str:
    lines = [
        "## Start it\n",
        f"```bash\ndocker build -t {launch.tag} .\n" + " \\\n  ".join(launch.command()) + "\n```\n",
        "Or run `docker compose up`. For Kubernetes, push the image, set its name in `kubernetes.yaml` and run "
        "`kubectl apply -f kubernetes.yaml`. "
        f"HTTP is on port {HTTP}, gRPC on {GRPC}, metrics on {METRICS}.\n",
    ]
    lines.append(_reach(launch))
    if serving.platform == "openvino":
        lines.append(
            "Triton's OpenVINO backend pads every batch to `max_batch_size`, which is therefore 1 unless `--max-batch` "
            "was given. OpenVINO computes in BF16 on processors that support it, whatever the file's precision, and "
            "the backend has no parameter to prevent this.\n"
        )
    if launch.plugin is not None:
        lines.append(
            f"The plan needs the plugin library `plugins/{launch.plugin}`, which the server loads when it starts. "
            "Triton continues if a library cannot be loaded: look for `evit::TokenReorg was not registered` in its "
            "log.\n"
        )
    name = serving.name if serving.preprocess is not None else serving.model
    lines.append(
        "After every rollout, compare its answers with the golden ones, from a machine with evit-deploy installed:\n\n"
        f"```bash\nevit-deploy verify . --url http://localhost:{HTTP} --model-name {name}\n```\n"
    )
    return "\n".join(lines)


def _reach(launch: Launch) -> str:
    """Describes who can reach the server and which of its interfaces."""
    if launch.publish == "network":
        ports = (
            "HTTP and gRPC are open to everyone who can reach this machine, in Kubernetes through a load balancer. The "
            "server does not authenticate clients: put a gateway with TLS and authentication in front of it. Metrics "
            "stay local."
        )
    else:
        ports = (
            "The ports can be reached only from this machine (127.0.0.1), in Kubernetes only from the same namespace; "
            "Prometheus can read the metrics. `package --publish network` opens the ports."
        )
    shared = (
        "Clients on this machine can pass tensors through shared memory, as user 1000, and can then read each other's."
        if launch.shared_memory
        else "`package --shared-memory` leaves shared memory open."
    )
    return (
        f"{ports}\n\nThe server runs as user 1000, on files that it cannot write, with at most {launch.cpus} "
        f"processors and {launch.memory} GiB. These interfaces are closed with a key that `{CLOSED_SCRIPT}` creates at "
        f"every start and does not store (set `EVIT_KEY` from a secret to use your own): {', '.join(launch.closed)}. "
        f"{shared}\n\n"
        f"A pod that is shut down leaves the Service first and continues to serve for {DRAIN} s. The "
        "PodDisruptionBudget keeps all replicas but one available; there is one replica until you raise `replicas`.\n"
    )


def _watch() -> str:
    rows = "".join(f"| `{name}` | {what} |\n" for name, what in METRIC_NAMES.items())
    return (
        "## Monitor it\n\n"
        "Ready: `/v2/health/ready` (all models are loaded). Alive: `/v2/health/live`. "
        f"Prometheus metrics: port {METRICS}, `/metrics`:\n\n"
        f"| | |\n|---|---|\n{rows}"
    )
