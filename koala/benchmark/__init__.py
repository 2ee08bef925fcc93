"""How fast and how large: the published comparison of latency and memory, made again here."""
