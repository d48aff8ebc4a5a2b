# Two images from one file:
#
#     docker build --target operator -t finetune-operator .
#     docker build --target trainer --build-arg ACCELERATOR=cuda -t finetune-trainer .
#
# BASE is any Debian or Ubuntu with Python 3.11 to 3.14, its venv module, bash and wget, which KubeRay's probes call;
# docs/images.md makes one where no registry can be reached. The lock file pins every package by hash. The packages are
# a layer of their own: another version of the sources changes a few hundred kilobytes.
ARG BASE=docker.io/library/python:3.11-bookworm

FROM ${BASE} AS build
COPY scripts/uv.txt /src/scripts/uv.txt
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --quiet --no-cache-dir --require-hashes -r /src/scripts/uv.txt
ENV UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1 UV_PROJECT_ENVIRONMENT=/opt/finetune
WORKDIR /src
COPY pyproject.toml uv.lock ./

FROM build AS wheel
COPY README.md LICENSE ./
COPY operator operator
COPY trainer trainer
RUN --mount=type=cache,target=/root/.cache/uv /opt/uv/bin/uv build --quiet --wheel --out-dir /dist

FROM build AS operator-packages
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --quiet --locked --no-install-project --extra operator
RUN --mount=type=cache,target=/root/.cache/uv \
    UV_PROJECT_ENVIRONMENT=/opt/sbom /opt/uv/bin/uv sync --quiet --locked --no-install-project --only-group sbom \
    && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
       -o /sbom.cdx.json /opt/finetune

FROM build AS trainer-packages
ARG ACCELERATOR=cuda
COPY scripts scripts
RUN --mount=type=cache,target=/root/.cache/uv \
    PATH=/opt/uv/bin:$PATH ACCELERATOR=${ACCELERATOR} python3 scripts/setup.py --extra image
RUN --mount=type=cache,target=/root/.cache/uv \
    UV_PROJECT_ENVIRONMENT=/opt/sbom /opt/uv/bin/uv sync --quiet --locked --no-install-project --only-group sbom \
    && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
       -o /sbom.cdx.json /opt/finetune

# The operator holds no torch, no Ray and no compiler.
FROM ${BASE} AS operator
COPY --from=operator-packages /opt/finetune /opt/finetune
COPY --from=operator-packages /sbom.cdx.json /opt/finetune/
COPY --from=wheel /dist /dist
ENV PATH=/opt/finetune/bin:$PATH PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=build,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --quiet --no-deps --no-cache --python /opt/finetune /dist/*.whl
USER 65532:65532
ENTRYPOINT ["finetune"]
CMD ["operator"]

FROM ${BASE} AS trainer
COPY --from=trainer-packages /opt/finetune /opt/finetune
COPY --from=trainer-packages /sbom.cdx.json /opt/finetune/
COPY --from=wheel /dist /dist
ENV PATH=/opt/finetune/bin:$PATH PYTHONDONTWRITEBYTECODE=1
RUN --mount=type=bind,from=build,source=/opt/uv,target=/opt/uv \
    /opt/uv/bin/uv pip install --quiet --no-deps --no-cache --python /opt/finetune /dist/*.whl
USER 65532:65532
CMD ["finetune"]
