# evit-deploy with ONNX Runtime and OpenVINO, for machines without a GPU. From the root of a checkout:
#
#   docker build -f docs/docker/cpu.Dockerfile -t evit-deploy:cpu \
#     --build-arg PYTORCH_INDEX=https://download.pytorch.org/whl/cpu .
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" evit-deploy:cpu convert deit_s.pth --keep-rate 0.7
ARG PYTHON_IMAGE=python:3.11-slim
FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
COPY . .
# hadolint ignore=DL3013
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels

FROM ${PYTHON_IMAGE}
# Where PyTorch's CPU build comes from; without it, pip takes the one with CUDA on x86-64.
ARG PYTORCH_INDEX=
# No warnings about running pip as root and about newer versions of pip.
ENV PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
# No pinned versions: the package's own bounds hold, as for everyone who installs it.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir ${PYTORCH_INDEX:+--index-url "$PYTORCH_INDEX"} torch torchvision && \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[openvino]"
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["evit-deploy"]
CMD ["--help"]
