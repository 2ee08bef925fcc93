"""Paths as programs write them: with a slash too many, without /v1, or with another's prefix."""

import re

# What other servers call the same.
OTHERS = {
    "/health": ("/healthz", "/health/live", "/livez", "/live", "/ping", "/v1/health", "/v1/ping",
                "/internal/ping"),
    "/ready": ("/readyz", "/health/ready", "/v1/ready"),
    "/openapi.json": ("/docs", "/redoc", "/swagger", "/v1/openapi.json", "/api-docs"),
}  # fmt: skip
_OWN = {other: own for own, others in OTHERS.items() for other in others}
_PREFIX = re.compile(r"/(?:openai/deployments/[^/]+|openai(?:/v1)?|(?:api|v1)/v1)(?=/)")
_WITHOUT = ("/images/", "/models", "/responses", "/chat/", "/completions", "/embeddings")


def own_path(path: str, root: str = "") -> str:
    """Our path of a request's. root: what a proxy puts before every path, if it leaves it there."""
    path = re.sub(r"^https?://[^/]*", "", path, flags=re.IGNORECASE)  # as proxies are asked
    path = re.sub(r"/{2,}", "/", path).rstrip("/") or "/"
    if root and f"{path}/".startswith(f"{root}/"):
        path = path[len(root) :] or "/"
    path = _PREFIX.sub("/v1", path, count=1)
    if path.startswith(_WITHOUT):
        path = f"/v1{path}"
    return _OWN.get(path, path)
