# `koala serve` in a container. CPU:  docker build -t koala .
# CUDA 13.0:                          docker build -t koala:cuda --build-arg TORCH_BACKEND=cu130 .
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# Which build of PyTorch uv takes: cpu, or CUDA's version as in cu130.
ARG TORCH_BACKEND=cpu

RUN pip install --no-cache-dir uv==0.13.9

WORKDIR /koala
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY koala koala
RUN uv pip install --system --no-cache --torch-backend=${TORCH_BACKEND} \
    --constraint constraints.txt --editable '.[serve]'

# Images, jobs and what is fetched from the Hub outlive the container in this volume.
ENV KOALA_DATA=/data/koala KOALA_CACHE=/data/cache HF_HOME=/data/huggingface
RUN useradd --create-home --uid 1000 koala && install --directory --owner=koala /data
USER koala
VOLUME /data
EXPOSE 8000

HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]

CMD ["koala", "serve", "--host", "0.0.0.0"]
