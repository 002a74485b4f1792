# pplr for a server, a client or an operator of a federation: docker build -t pplr .
# For torch's CPU build, which is much smaller: --build-arg TORCH_INDEX=URL, the index that pytorch.org names for it.

ARG PYTHON_VERSION=3.11.14

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ARG TORCH_INDEX=""
ARG EXTRAS="network,flower,privacy,plots"
WORKDIR /build
RUN python -m venv /opt/pplr
ENV PATH=/opt/pplr/bin:$PATH
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    grep '^torch==' constraints.txt > torch.txt \
    && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY src src
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir dist . \
    && pip install --constraint constraints.txt "$(echo dist/*.whl)[$EXTRAS]" \
    && pip check

FROM python:${PYTHON_VERSION}-slim-bookworm
# What implicit is linked with, and slim images lack. Not pinned: Debian keeps the newest of a release alone, and the base
# image's tag is not pinned to one day either.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 1000 pplr && useradd --uid 1000 --gid 1000 --home-dir /work --create-home pplr
COPY --from=build /opt/pplr /opt/pplr
# The root file system may be read-only: what is written besides the mounted folders goes below /tmp.
ENV PATH=/opt/pplr/bin:$PATH \
    HOME=/tmp \
    PPLR_CACHE=/tmp/pplr \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /work
EXPOSE 8000 8443
ENTRYPOINT ["pplr"]
CMD ["--help"]
