# Two images from one file: `service` (coordinator, migrations, client; no torch) and `worker` (service + torch and transformers).
#
# The torch wheel of the default package index brings its CUDA libraries. For a smaller CPU-only image, hand pip another index:
#   docker compose build --build-arg TORCH_PIP_ARGS="--index-url <an index with CPU wheels>"
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 10001 ollm && mkdir /data /models && chown ollm:ollm /data
WORKDIR /app
COPY constraints.txt ./

# The large layer comes before the code, so that a changed line does not fetch torch again.
FROM base AS metal
ARG TORCH_PIP_ARGS=""
RUN pip install -c constraints.txt ${TORCH_PIP_ARGS} torch==2.13.0 && pip install -c constraints.txt transformers safetensors

FROM metal AS worker
COPY pyproject.toml README.md LICENSE ./
COPY ollm_service ollm_service
COPY workers workers
COPY migrations migrations
RUN pip install -c constraints.txt '.[all]'
USER ollm
ENV OLLM_DATA_DIR=/data OLLM_MODELS_DIR=/models HF_HUB_OFFLINE=1
VOLUME /data
CMD ["ollm-service", "worker"]

FROM base AS service
COPY pyproject.toml README.md LICENSE ./
COPY ollm_service ollm_service
COPY workers workers
COPY migrations migrations
RUN pip install -c constraints.txt '.[postgres,redis,rabbitmq]'
USER ollm
ENV OLLM_DATA_DIR=/data
EXPOSE 8000
CMD ["ollm-service", "serve"]
