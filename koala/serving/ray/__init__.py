"""One server over many GPUs or processes, with Ray Serve."""
