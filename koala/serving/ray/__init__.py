"""One server over many GPUs or processes, with Ray Serve."""

import os

from koala.utils.extras import require

require("koala serve --replicas", "ray", "fastapi", "ray", "uvicorn")

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
os.environ.setdefault("RAY_worker_niceness", "0")  # do not lower the replicas' priority
