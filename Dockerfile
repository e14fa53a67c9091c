# An image with the `mosaicbert` command, for GPUs and CPUs alike: torch's wheels bring CUDA.
#   docker build -t mosaicbert .
#   docker run --gpus all --shm-size 8g -v "$PWD":/workspace mosaicbert \
#     mosaicbert pretrain yamls/test/main.yaml
FROM python:3.12-slim

# torch.compile and Triton build small C modules when a run starts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home mosaicbert \
    && install -d -o mosaicbert /workspace

WORKDIR /opt/mosaicbert
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN pip install --no-cache-dir ".[s3,gcs,azure,wandb]"

# By number: Kubernetes checks `runAsNonRoot` by it.
USER 1000
WORKDIR /workspace
CMD ["mosaicbert", "--help"]
