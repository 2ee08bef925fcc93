"""The table of jobs: the accepted jobs, and which of their images have ended.

A job is open from its acceptance to its end. Whether it is queued or running is not stored: after
a crash all open jobs are queued again, without the images that have ended. An image's end and its
gallery row are one transaction, and so are the last image's end and the job's: no image is stored
twice.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from sqlite3 import Connection, Row
from typing import Any

from koala.serving.jobs.database import Database, is_id

MOST_ENDED = 10_000  # ended jobs that are kept
_COLUMNS = "id, client, status, request, number, steps, created, started, finished, message, code"


class TooManyJobs(Exception):
    """The limit of open jobs is reached, for this client or for all."""

    def __init__(self, mine: bool) -> None:
        super().__init__()
        self.mine = mine  # whether it is this client's limit


class AlreadyEnded(Exception):
    """The job or the image has already ended."""


@dataclass(frozen=True)
class Job:
    """A row of the table."""

    id: str
    client: str
    status: str  # open, done, failed, cancelled
    request: dict[str, Any]  # without images
    number: int  # of images
    steps: int  # of each
    created: float  # Unix seconds
    started: float | None  # Unix seconds of the first step
    finished: float | None
    message: str | None  # of the first error
    code: str | None
    ended: dict[int, str | None] = field(
        default_factory=dict
    )  # index: the image's id; None: failed


@dataclass(frozen=True)
class JobLimits:
    """Limits of the open jobs."""

    jobs: int = 1_000
    jobs_of_client: int = 200
    uploads: int = 1 << 30  # bytes of uploaded images, as base64


class JobTable:
    """The jobs in a database. Thread-safe.

    clock: Unix seconds. owner, in methods: only that client's jobs are visible.
    """

    def __init__(
        self,
        database: Database,
        limits: JobLimits | None = None,
        most_seconds: float = float("inf"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.database, self.limits = database, limits or JobLimits()
        self.most_seconds, self.clock = most_seconds, clock

    def accept(
        self,
        client: str,
        request: dict[str, Any],
        uploads: dict[str, str],
        number: int,
        steps: int,
    ) -> Job:
        """Stores a job; it is on disk when this returns. TooManyJobs if a limit is reached."""
        id, created, content = self.database.new_id(), self.clock(), json.dumps(uploads).encode()
        with self.database.transaction() as db:
            waiting = db.execute(
                "SELECT count(*) AS jobs, ifnull(sum(length(uploads)), 0) AS bytes, "
                "ifnull(sum(client = ?), 0) AS mine FROM jobs WHERE status = 'open'",
                (client,),
            ).fetchone()
            if waiting["mine"] >= self.limits.jobs_of_client:
                raise TooManyJobs(mine=True)
            too_large = waiting["bytes"] + len(content) > self.limits.uploads and uploads
            if waiting["jobs"] >= self.limits.jobs or too_large:
                raise TooManyJobs(mine=False)
            db.execute(
                "INSERT INTO jobs (id, client, status, request, uploads, number, steps, "
                "created) VALUES (?, ?, 'open', ?, ?, ?, ?, ?)",
                (id, client, json.dumps(request), content, number, steps, created),
            )
        return Job(id, client, "open", request, number, steps, created, None, None, None, None)

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job with an id, or None."""
        if not is_id(id):
            return None
        found = self._jobs("id = ? AND client = ifnull(?, client)", id, owner)
        return found[0] if found else None

    def page(self, limit: int, before: str | None = None, owner: str | None = None) -> list[Job]:
        """Up to `limit` jobs, newest first, older than `before`."""
        mine, values = ("", ()) if owner is None else ("AND client = ?", (owner,))
        where = f"id < ? {mine} ORDER BY id DESC LIMIT ?"
        return self._jobs(where, before or "g", *values, limit)

    def open(self) -> list[Job]:
        """All open jobs, oldest first."""
        return self._jobs("status = 'open' ORDER BY id")

    def uploads(self, id: str) -> dict[str, str]:
        """The images uploaded with an open job, as base64; empty once it has ended."""
        rows = self.database.rows("SELECT uploads FROM jobs WHERE id = ?", id)
        return json.loads(rows[0]["uploads"]) if rows else {}

    # --- changes ----------------------------------------------------------------------------

    def image_finished(
        self, db: Connection, id: str, index: int, image: str, started: float
    ) -> None:
        """Records a finished image, in the transaction that stores it. AlreadyEnded."""
        self._end_image(db, id, index, image, started)
        self._end_if_complete(db, id)

    def image_failed(
        self, id: str, index: int, message: str, code: str, started: float | None
    ) -> None:
        """Records a failed image. AlreadyEnded."""
        with self.database.transaction() as db:
            self._end_image(db, id, index, None, started)
            db.execute(
                "UPDATE jobs SET message = ?, code = ? WHERE id = ? AND message IS NULL",
                (message, code, id),
            )
            self._end_if_complete(db, id)

    def cancel(self, id: str, started: float | None = None) -> bool:
        """Cancels an open job, which has been drawn since `started`. False if it was not open."""

        def cancelled(db: Connection) -> bool:
            self._start(db, id, started)
            return self._end(db, id, "cancelled")

        return self.database.make_room(cancelled)

    def tidy(self) -> None:
        """Deletes ended jobs that are too old or too many."""
        with self.database.transaction() as db:
            db.execute(
                "DELETE FROM jobs WHERE status != 'open' AND (finished < ? OR id IN (SELECT id "
                "FROM jobs WHERE status != 'open' ORDER BY finished DESC LIMIT -1 OFFSET ?))",
                (self.clock() - self.most_seconds, MOST_ENDED),
            )

    def _end_image(
        self, db: Connection, id: str, index: int, image: str | None, started: float | None
    ) -> None:
        new = "INSERT OR IGNORE INTO parts (job, place, picture) VALUES (?, ?, ?)"
        if not self._start(db, id, started) or not db.execute(new, (id, index, image)).rowcount:
            raise AlreadyEnded

    def _start(self, db: Connection, id: str, started: float | None) -> bool:
        """Records when an open job began, once. False if it is not open."""
        return bool(
            db.execute(
                "UPDATE jobs SET started = ifnull(started, ?) WHERE id = ? AND status = 'open'",
                (started, id),
            ).rowcount
        )

    def _end_if_complete(self, db: Connection, id: str) -> None:
        row = db.execute(
            "SELECT message, number = (SELECT count(*) FROM parts WHERE job = jobs.id) AS complete "
            "FROM jobs WHERE id = ?",
            (id,),
        ).fetchone()
        if row["complete"]:
            self._end(db, id, "done" if row["message"] is None else "failed")

    def _end(self, db: Connection, id: str, status: str) -> bool:
        ended = (
            "UPDATE jobs SET status = ?, finished = ?, uploads = ? WHERE id = ? AND status = 'open'"
        )
        return bool(db.execute(ended, (status, self.clock(), b"{}", id)).rowcount)

    def _jobs(self, where: str, *values: object) -> list[Job]:
        rows = self.database.rows(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", *values)
        ended: dict[str, dict[int, str | None]] = defaultdict(dict)
        marks = ", ".join("?" * len(rows))
        for part in self.database.rows(
            f"SELECT job, place, picture FROM parts WHERE job IN ({marks}) ORDER BY place",
            *(row["id"] for row in rows),
        ):
            ended[part["job"]][part["place"]] = part["picture"]
        return [_job(row, ended[row["id"]]) for row in rows]


def _job(row: Row, ended: dict[int, str | None]) -> Job:
    return Job(**{**dict(row), "request": json.loads(row["request"])}, ended=ended)
