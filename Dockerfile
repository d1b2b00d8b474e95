# One recipe, two images:   docker build --target cpu -t adapter-bank .      (the default)
#                           docker build --target cuda -t adapter-bank:cuda .
# PyPI's torch wheels bring their own CUDA libraries, so both start from the same slim Python; the driver comes from the NVIDIA container
# runtime. torch, faiss and PyAV bundle what else they link (libgomp, FFmpeg): nothing comes from apt.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS recipe
WORKDIR /app
ENV VENV=/opt/venv EDITABLE=0 PYTHON=python3
COPY pyproject.toml constraints.txt LICENSE ./
COPY deploy/install.sh deploy/install.sh

# The dependencies first, without our sources: an edit of ours leaves this layer in the cache. The second run only copies the sources in.
FROM recipe AS build-cuda
ENV TORCH=cuda
RUN --mount=type=cache,target=/root/.cache/pip bash deploy/install.sh runtime
COPY adapters adapters
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip bash deploy/install.sh runtime

FROM recipe AS build-cpu
ENV TORCH=cpu
RUN --mount=type=cache,target=/root/.cache/pip bash deploy/install.sh runtime
COPY adapters adapters
COPY service service
RUN --mount=type=cache,target=/root/.cache/pip bash deploy/install.sh runtime

FROM ${PYTHON_IMAGE} AS runtime
RUN useradd --uid 10001 --create-home bank && install -d -o bank -g bank /data
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    BANK_LOG_FORMAT=json \
    BANK_HOME=/data
VOLUME /data
EXPOSE 8000
USER 10001
WORKDIR /data
# http.client and not urllib: a proxy in the environment must not answer for us. A slim image has no curl.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["adapter-bank"]
# All interfaces of the container. Without keys (BANK_API_KEYS_FILE) the server refuses this, unless BANK_ALLOW_PUBLIC=true says that a proxy or
# the port mapping protects it.
CMD ["serve", "--host", "0.0.0.0"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/venv /opt/venv

FROM runtime AS cpu
COPY --from=build-cpu /opt/venv /opt/venv
