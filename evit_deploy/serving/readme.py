"""``README.md`` of a package for Triton: what is in it, how it is started, asked, watched and checked."""

from evit_deploy.serving.deployment import CLOSED_SCRIPT, GRPC, HTTP, METRIC_NAMES, METRICS, Launch
from evit_deploy.serving.kubernetes import DRAIN
from evit_deploy.serving.repository import Serving
from evit_deploy.serving.sbom import SBOM

_PHOTOGRAPHS = """## Ask it

`{name}` takes image files, JPEG or PNG, as they are (`pip install "tritonclient[http]"`):

```python
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient("localhost:{http}")
image = triton.InferInput("IMAGE", [1, 1], "BYTES")
image.set_data_from_numpy(np.array([[open("photograph.jpg", "rb").read()]], dtype=object))
{answer} = client.infer("{name}", [image]).as_numpy("{answer}")  # float32 [1, {classes}]
```

Up to {batch} images a request: `[n, 1]` of them. An image that is none, is cut short or has more pixels than the
parameter `preprocess` in `model_repository/{name}_preprocess/config.pbtxt` allows fails its own request, with a message
that says so; others go on. EXIF orientation is not applied, as it was not in training. `{name}_model` takes inputs that
are preprocessed already: `input`, {input}.
"""

_DALI = """## Ask it

`{name}` takes image files, JPEG or PNG, as bytes; several of one request are filled up with zeros to the longest
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

DALI decodes and resizes on the GPU, by arithmetic of its own: the model sees nearly, and not exactly, the pixels that
it was verified with. There is no limit to the size of an image but the GPU's memory: let only clients in that you
trust, or package with `--preprocess python`. `{name}_model` takes inputs that are preprocessed already: `input`,
{input}.
"""

_INPUTS = """## Ask it

`{name}_model` takes preprocessed images: `input`, {input}, up to {batch} of them a request
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
    "python": "image files to inputs, in Python, on the CPU",
    "dali": "image files to inputs, in DALI, on the GPU",
}


def triton_readme(serving: Serving, launch: Launch, notes: list[str]) -> str:
    """The whole page."""
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
        (CLOSED_SCRIPT, "starts the server with the interfaces closed that change it"),
        ("compose.yaml, kubernetes.yaml", "the same image with ports, probes, limits and a GPU where it is used"),
        ("manifest.json, golden.npz", "what the model is, and the answers that it has to give"),
        ("package.json", "what this was made of, with hashes"),
        (SBOM, "software bill of materials, CycloneDX"),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| `{name}` | {what} |\n" for name, what in rows)


def _start(serving: Serving, launch: Launch) -> str:
    lines = [
        "## Start it\n",
        f"```bash\ndocker build -t {launch.tag} .\n" + " \\\n  ".join(launch.command()) + "\n```\n",
        "Or `docker compose up`; or push the image, write its name into `kubernetes.yaml` and `kubectl apply -f` that. "
        f"HTTP is on port {HTTP}, gRPC on {GRPC}, metrics on {METRICS}.\n",
    ]
    lines.append(_reach(launch))
    if serving.platform == "openvino":
        lines.append(
            "Triton's OpenVINO backend fills every batch up to `max_batch_size` and computes the whole of it, which is "
            "why that is 1 unless `--max-batch` said otherwise. OpenVINO computes in BF16 on "
            "processors that can, whatever the file says, and the backend has no parameter against it.\n"
        )
    if launch.plugin is not None:
        lines.append(
            f"The plan needs the plugin library `plugins/{launch.plugin}`, which the server loads when it starts. "
            "Triton goes on where a library cannot be loaded: look for `evit::TokenReorg was not registered` in its "
            "log.\n"
        )
    name = serving.name if serving.preprocess is not None else serving.model
    lines.append(
        "After every roll-out, hold its answers against the golden ones, from where evit-deploy is installed:\n\n"
        f"```bash\nevit-deploy verify . --url http://localhost:{HTTP} --model-name {name}\n```\n"
    )
    return "\n".join(lines)


def _reach(launch: Launch) -> str:
    """Who reaches the server, and what of it."""
    if launch.publish == "network":
        ports = (
            "HTTP and gRPC are open to whoever reaches this machine, in Kubernetes through a load balancer: the server "
            "does not ask who they are: put a gateway with TLS and a login before it. Metrics stay local."
        )
    else:
        ports = (
            "The ports are this machine's alone (127.0.0.1), in Kubernetes its namespace's; metrics go to Prometheus. "
            "`package --publish network` opens them."
        )
    shared = (
        "Clients of this machine may pass tensors through shared memory, as user 1000; all that do can read each "
        "other's."
        if launch.shared_memory
        else "Shared memory is among them: `package --shared-memory` leaves it open."
    )
    return (
        f"{ports}\n\nThe server runs as user 1000 on files that it cannot write, with {launch.cpus} processors and "
        f"{launch.memory} GiB at most. These interfaces are closed, with a key that `{CLOSED_SCRIPT}` makes at every "
        f"start and writes nowhere (`EVIT_KEY` from a secret is an operator's own): "
        f"{', '.join(launch.closed)}. {shared}\n\n"
        f"A pod that is to end leaves the Service first and serves for {DRAIN} s more. The PodDisruptionBudget keeps "
        "all replicas but one; there is one until you raise `replicas`.\n"
    )


def _watch() -> str:
    rows = "".join(f"| `{name}` | {what} |\n" for name, what in METRIC_NAMES.items())
    return (
        "## Watch it\n\n"
        "Ready: `/v2/health/ready` (all models are loaded). Alive: `/v2/health/live`. "
        f"Prometheus metrics: port {METRICS}, `/metrics`:\n\n"
        f"| | |\n|---|---|\n{rows}"
    )
