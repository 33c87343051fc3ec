# A server with its default model inside: docker build -t tinyserve . (docs/serving.md)
FROM python:3.12-slim
COPY . /src
RUN pip install --no-cache-dir '/src[serve,structured]'
RUN useradd --create-home tinyserve && install -d -o tinyserve /cache
USER tinyserve
ENV TINYSERVE_CACHE=/cache HF_HOME=/cache/huggingface
RUN tinyserve warmup smollm2-135m
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=5m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["tinyserve", "serve", "--host", "0.0.0.0"]
CMD ["smollm2-135m"]
