"""One server over many GPUs or processes, by Ray."""
