"""The HTTP routes: OpenAI's images API, A1111's, jobs, the page."""
