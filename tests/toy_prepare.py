"""Runs `prepare_latents` again and again in processes that a test may kill, at little cost each.

`python toy_prepare.py` reads lines of arguments (JSON) from its standard input. The first it does
itself, which imports everything, also what is imported at its first use. For every other it forks
a process in a group of its own, prints its number, and when that has ended, how.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    # Not above: the processes that read pictures import this file, and need none of it.
    from koala.data.latent_preparation import prepare_latents
    from koala.data.preprocess import Preparation
    from koala.data.sources import recognise

    def prepare(line: str) -> None:
        source, out, model, settings, workers = json.loads(line)
        preparation = Preparation(**settings)
        prepare_latents(recognise(source), Path(out), Path(model), preparation, workers)

    prepare(sys.stdin.readline())
    for line in sys.stdin:
        if child := os.fork():
            os.setpgid(child, child)  # before anybody may kill the group
            print(child, flush=True)
            print(os.waitpid(child, 0)[1], flush=True)
            continue
        prepare(line)
        os._exit(0)


if __name__ == "__main__":
    main()
