"""HTTP over the step engine: OpenAI's images API, jobs, a gallery and a page."""

from koala.serving.run import serve

__all__ = ["serve"]
