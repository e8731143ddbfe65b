# syntax=docker/dockerfile:1
#
# The image of cluster runs: NVIDIA's PyTorch image, and in it this project with its tests.
#
#   docker build -t more .
#   docker run --rm --gpus all --ipc=host more python -m pytest -m gpu
#   docker run --rm -e MORE_PLATFORM=cpu more python -m pytest
#
# --build-arg BASE=...             another month's image, of Python 3.12 and PyTorch 2.11 or newer
# --build-arg BUILD_APEX=0         do without NVIDIA apex where the base lacks it; runs then need
#                                  --no-gradient-accumulation-fusion
# --build-arg APEX_REVISION=...    another revision of it
# --build-arg USER_ID=...          owner of the project's files in the image

# PyTorch 2.12.0a0 and CUDA 13.2, with Transformer Engine compiled against them. Dated: a tag that moves would change
# all of them at once.
ARG BASE=nvcr.io/nvidia/pytorch:26.04-py3
FROM ${BASE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# The base pins every package it holds, also those that we need newer. The constraints below take the place of its own.
ENV PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# What is compiled against each other stays as it is, whatever is installed, here or later in a container: no version
# but that of the base is allowed. NVIDIA apex calls itself 0.1. The apex of PyPI, another project of which Megatron
# would expect kernels that it does not have, never did: pip can take it from nowhere.
RUN python -c "from importlib.metadata import distributions; import re; \
    kept = r'torch|torchvision|triton|pytorch-triton|transformer-engine.*|flash-attn.*|apex|numpy|nvidia-.*'; \
    names = {re.sub('[-_.]+', '-', d.name).lower(): d.version for d in distributions() if d.name}; \
    pins = {'apex': '0.1'} | {n: v for n, v in names.items() if re.fullmatch(kept, n)}; \
    missing = {'torch', 'transformer-engine'} - pins.keys(); \
    assert not missing, f'the base image lacks {missing}'; \
    print(*(f'{n}=={v}' for n, v in sorted(pins.items())), sep='\n')" > /opt/more-constraints.txt
ENV PIP_CONSTRAINT=/opt/more-constraints.txt

# Only what says which packages are needed: these layers are built again when it changes, and not with every change.
WORKDIR /opt/more
COPY pyproject.toml README.md LICENSE ./
COPY more_megatron/__init__.py more_megatron/

# The version that pyproject.toml asks for, without its dependencies: PyTorch is one of them.
RUN grep -o 'megatron-core[~=<>!][^"]*' pyproject.toml > /tmp/megatron-core.txt \
    && pip install --no-deps -r /tmp/megatron-core.txt \
    && rm /tmp/megatron-core.txt

# The other dependencies, and the tools of the tests. Editable: the files that are copied below are the package.
RUN pip install --editable ".[dev]"

# From its source, at one revision, and only where the base lacks it. Compiled for Ampere, Hopper and Blackwell, against
# the PyTorch that is there (--no-build-isolation).
ARG BUILD_APEX=1
ARG APEX_REVISION=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN if [ "${BUILD_APEX}" = 1 ] && ! pip show --quiet apex; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0" MAX_JOBS=8 \
        pip install --no-deps --no-build-isolation "apex @ git+https://github.com/NVIDIA/apex@${APEX_REVISION}"; \
    fi

# Training needs no rights. Containers under pyxis run as whoever submits the job, whatever stands here.
ARG USER_ID=10001
RUN useradd --no-log-init --create-home --uid "${USER_ID}" more && chown --recursive more:more /opt/more
COPY --chown=more:more . .
USER ${USER_ID}

# An apex that is not NVIDIA's ends the build here, as it would end a run.
RUN python -c "from more_megatron.platform.packages import check_apex; check_apex()"
