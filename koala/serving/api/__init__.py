"""HTTP routes: OpenAI's images API, AUTOMATIC1111's API, jobs and the page."""
