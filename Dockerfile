# syntax=docker/dockerfile:1
# One target a kind of machine; the entry point is run_train.sh, with the environment made already:
#
#   docker build --target cpu -t titanarch:cpu .
#   docker build --target cuda -t titanarch:cuda .
#   docker build --target rocm -t titanarch:rocm .
#   docker run --rm --gpus all --shm-size=8g -v "$PWD/outputs:/opt/titanarch/outputs" \
#     titanarch:cuda --config train_configs/small_alibi.toml
#
# --shm-size: data workers hand over batches in /dev/shm, of which Docker gives 64 MB unless told.
# The mounted folder must be writable for user 10001. For ROCm, --device /dev/kfd --device /dev/dri replace --gpus all.
#
# BASE             another base image for the target that is built
# TORCH_INDEX_URL  package index to take torch from in cpu and cuda (default: pip's own, whose torch runs on CPUs and NVIDIA GPUs)
ARG BASE

FROM ${BASE:-python:3.12-slim} AS cpu
ARG TORCH_INDEX_URL
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# g++ for torch.compile
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 titanarch && install --directory --owner=titanarch --group=titanarch /opt/titanarch
WORKDIR /opt/titanarch
COPY --chown=titanarch:titanarch . .
USER titanarch
# Compiled here, for a container starts without what an earlier one compiled; packages hold files that no Python compiles.
RUN export PIP_NO_CACHE_DIR=1 && source scripts/environment.sh && choose_python run && mkdir outputs && \
    { "$PYTHON_BIN" -m compileall -q -j 0 .venv/lib titanarch > /dev/null 2>&1 || true; }
ENV TITANARCH_PYTHON=/opt/titanarch/.venv/bin/python
ENTRYPOINT ["/opt/titanarch/run_train.sh"]

FROM ${BASE:-nvidia/cuda:13.0.2-devel-ubuntu24.04} AS cuda
ARG TORCH_INDEX_URL
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# g++ and Python's headers for torch.compile and Triton
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
    g++ python3 python3-dev python3-venv && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 titanarch && install --directory --owner=titanarch --group=titanarch /opt/titanarch
WORKDIR /opt/titanarch
COPY --chown=titanarch:titanarch . .
USER titanarch
# Compiled here, for a container starts without what an earlier one compiled; packages hold files that no Python compiles.
RUN export PIP_NO_CACHE_DIR=1 && source scripts/environment.sh && choose_python run && mkdir outputs && \
    { "$PYTHON_BIN" -m compileall -q -j 0 .venv/lib titanarch > /dev/null 2>&1 || true; }
ENV TITANARCH_PYTHON=/opt/titanarch/.venv/bin/python
ENTRYPOINT ["/opt/titanarch/run_train.sh"]

# The base image brings Python and a torch built for ROCm; both stay, and the other packages follow constraints.txt.
FROM ${BASE:-rocm/pytorch:latest} AS rocm
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN useradd --create-home --uid 10001 titanarch && install --directory --owner=titanarch --group=titanarch /opt/titanarch
WORKDIR /opt/titanarch
COPY --chown=titanarch:titanarch . .
RUN grep -v '^torch==' constraints.txt > /tmp/constraints.txt && \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt --editable . && \
    python3 -c 'import torch; assert torch.version.hip, "pip replaced the torch of BASE: choose one with torch 2.11 to 2.13"' && \
    install --directory --owner=titanarch --group=titanarch outputs
USER titanarch
ENV TITANARCH_PYTHON=python3
ENTRYPOINT ["/opt/titanarch/run_train.sh"]
