# syntax=docker/dockerfile:1
# Two images from one file: `services` (Prefect's server, MLflow) and `worker` (Bessemer itself).
#
#   docker build --target services -t bessemer-services .
#   docker build --target worker -t bessemer-worker-cpu --build-arg TORCH_INDEX=... .

FROM python:3.11.15-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /opt/bessemer
RUN useradd --uid 10001 --user-group --create-home bessemer
COPY constraints.txt ./
RUN pip install -c constraints.txt --upgrade pip setuptools wheel

FROM base AS services
# The same versions as in the worker, and neither torch nor Bessemer.
RUN pip install -c constraints.txt prefect prefect-redis fastapi mlflow "psycopg[binary]" Flask-WTF boto3
COPY deploy ./deploy
USER 10001:10001

FROM base AS worker
# g++ and its headers: DeepSpeed and torch.compile build kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# A package index of CPU builds of torch, or of builds for another CUDA, whose `+cpu` and the like go before
# the usual index's. Alone and first, for DeepSpeed's build imports it and an open range would pull others.
ARG TORCH_INDEX=""
RUN pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
# What Bessemer needs, before Bessemer: a change of the code leaves these layers as they are.
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; print(*p['dependencies'], *e['s3'], *e['unigram'], sep='\n')" > /tmp/needs.txt \
    && DS_BUILD_OPS=0 pip install -c constraints.txt --no-build-isolation -r /tmp/needs.txt \
    && rm /tmp/needs.txt
COPY conf ./conf
COPY storage ./storage
COPY model ./model
COPY tasks ./tasks
COPY flows ./flows
RUN pip install --no-deps --no-build-isolation . && rm -rf build
COPY prefect.yaml ./
COPY deploy ./deploy
USER 10001:10001
WORKDIR /project
CMD ["bessemer", "--help"]
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
