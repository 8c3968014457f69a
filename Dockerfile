# The image that Kubernetes, pyxis and apptainer run: packages at the versions of requirements.lock, nobody is root.
#   docker build -t registry.example.com/tessera:0.1.0 .
# torch comes from the index that pip is configured with: its usual build brings CUDA, one with CPU wheels a small image.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
WORKDIR /src
RUN python -m venv /opt/tessera
ENV PATH=/opt/tessera/bin:$PATH
# The lock alone first: these layers stay while only the program changes. torch comes first and alone, as in the
# Makefile: packages that are built from source after it find it, and nothing replaces it.
COPY requirements.lock deploy/ray-jobs.lock ./
RUN pip install "$(grep -m1 '^torch==' requirements.lock)" \
    && pip install -r requirements.lock -r ray-jobs.lock
COPY pyproject.toml README.md LICENSE ./
COPY data_pipeline data_pipeline
COPY pretrain pretrain
COPY launchers launchers
RUN pip install --no-deps .

FROM ${BASE}
# bash and wget are what KubeRay starts and probes its pods with; Debian's own versions follow the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 tessera \
    && useradd --uid 1000 --gid 1000 --create-home tessera \
    && install -d -o tessera -g tessera /work
COPY --from=packages /opt/tessera /opt/tessera
ENV PATH=/opt/tessera/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /work
COPY configs configs
USER 1000:1000
# Exec form: the program itself gets the signals.
ENTRYPOINT ["tessera"]
CMD ["--help"]
