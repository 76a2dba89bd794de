# evit-deploy on NVIDIA's TensorRT image: builds and runs engines. From the root of a checkout, on a machine with
# NVIDIA's container toolkit:
#
#   docker build -f docs/docker/tensorrt.Dockerfile -t evit-deploy:tensorrt .
#   docker run --rm --gpus all -u "$(id -u):$(id -g)" -v "$PWD:/work" evit-deploy:tensorrt \
#     convert deit_s.pth --keep-rate 0.7 --target tensorrt --precision fp16
#
# A release whose TensorRT is the one that will run the engine: 10.15 or newer.
ARG TENSORRT_IMAGE=nvcr.io/nvidia/tensorrt:26.07-py3
FROM ${TENSORRT_IMAGE}
# The image's Python has its own TensorRT, which the environment sees. Debian's and Ubuntu's archives keep only one version.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/* && \
    python3 -m venv --system-site-packages /opt/evit-deploy
ENV PATH=/opt/evit-deploy/bin:$PATH
WORKDIR /source
COPY . .
# Not the extra [tensorrt], which would put a second TensorRT beside the image's.
RUN pip install --no-cache-dir . "nvidia-ml-py>=12" "polygraphy>=0.53"
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["evit-deploy"]
CMD ["--help"]
