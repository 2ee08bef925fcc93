"""A gallery and a job table on a disk of 16 MiB that fills up: run by test_database.py.

Run as `unshare -rm python full_disk.py FOLDER`, which may mount a disk of its own there.
"""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from koala.errors import Failure
from koala.generation.requests import Settings
from koala.serving.jobs.database import RESERVE, Database
from koala.serving.jobs.gallery import Gallery
from koala.serving.jobs.table import JobTable

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], check=True)
database = Database(folder)
gallery, table = Gallery(database, 2**30, 1e9), JobTable(database)
settings = Settings("a", "", 1, 1.0, 1, 64, 64, "toy", "0")
noise = Image.frombytes("RGB", (64, 64), os.urandom(64 * 64 * 3))
images = [gallery.add(noise, settings, "me").id for _ in range(20)]
jobs = [table.accept("me", {"prompt": "a" * 1000}, {}, 1, 1).id for _ in range(20)]

filler = open(folder / "filler", "wb", buffering=0)  # noqa: SIM115  # of another program
try:
    while filler.write(bytes(4096)) == 4096:
        pass
except OSError:
    pass
try:
    while True:
        images.append(gallery.add(noise, settings, "me").id)
except Failure:
    pass
assert not database.has_room()
assert all(gallery.remove(id) for id in images)
assert all(table.cancel(id) for id in jobs)
assert gallery.page(10) == [] and not table.open()

filler.truncate(0)
assert database.has_room() and (folder / "reserve").stat().st_size == RESERVE
gallery.add(noise, settings, "me")
print("held")
