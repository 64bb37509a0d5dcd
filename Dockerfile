# The image of all nodes, as ray_jobs/rayjob.yaml names it. In the checkout: docker build --tag dpo4rec:0.1.0 .
FROM python:3.12-slim

# A C compiler for the kernels that Triton makes on a GPU; wget for the probes of KubeRay before 1.6.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dpo4rec
COPY pyproject.toml constraints.txt README.md ./
COPY dpo4rec ./dpo4rec
COPY ds_configs ./ds_configs
RUN python -m pip install --no-cache-dir --constraint constraints.txt .

RUN useradd --create-home --uid 1000 dpo4rec
USER 1000
WORKDIR /home/dpo4rec
ENV TOKENIZERS_PARALLELISM=false RAY_AUTH_MODE=token
ENTRYPOINT ["dpo4rec"]
CMD ["--help"]
