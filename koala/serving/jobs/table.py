"""The table of jobs: what was accepted, and which of its pictures have come to an end.

A job is open from the commit of its acceptance to that of its end. What is between, whether it
waits or is being drawn, is nobody's business after a crash: all open jobs are queued again, less
the pictures that have come to an end. A picture's end and its row in the gallery are one
transaction, and so is the last picture's and the job's. So no picture has two results.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from sqlite3 import Connection, Row
from typing import Any

from koala.serving.jobs.database import Store, is_id

MOST_ENDED = 10_000  # jobs that are remembered after their end
_COLUMNS = "id, client, status, request, number, steps, created, started, finished, message, code"


class Full(Exception):
    """The table takes no more of this client's jobs, or of anybody's."""

    def __init__(self, mine: bool) -> None:
        super().__init__()
        self.mine = mine  # whether it is this client's share that is full


class Ended(Exception):
    """The job is no longer open, or the picture has had its end: this one came too late."""


@dataclass(frozen=True)
class Job:
    """A job as the table has it."""

    id: str
    client: str
    status: str  # open, done, failed, cancelled
    request: dict[str, Any]  # what was asked for, without the bytes of pictures
    number: int  # of pictures
    steps: int  # of each
    created: float  # Unix seconds
    started: float | None  # when the first step of any picture was taken
    finished: float | None
    message: str | None  # what went wrong
    code: str | None
    ended: dict[int, str | None] = field(default_factory=dict)  # place: picture's id, None: failed


@dataclass(frozen=True)
class Bounds:
    """How much may wait."""

    jobs: int = 1_000
    jobs_of_client: int = 200
    uploads: int = 1 << 30  # bytes of given pictures, as text


class Table:
    """The jobs of a store. Every method may be called from any thread.

    Where `owner` is given, only that client's jobs are there. clock: Unix seconds.
    """

    def __init__(
        self,
        store: Store,
        bounds: Bounds | None = None,
        most_seconds: float = float("inf"),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.bounds, self.most_seconds = store, bounds or Bounds(), most_seconds
        self.clock = clock

    def accept(
        self,
        client: str,
        request: dict[str, Any],
        uploads: dict[str, str],
        number: int,
        steps: int,
    ) -> Job:
        """Takes a job; when this returns it is on disk. Full if too much waits."""
        id, created, given = self.store.new_id(), self.clock(), json.dumps(uploads).encode()
        with self.store.transaction() as db:
            waiting = db.execute(
                "SELECT count(*) AS jobs, ifnull(sum(length(uploads)), 0) AS bytes, "
                "ifnull(sum(client = ?), 0) AS mine FROM jobs WHERE status = 'open'",
                (client,),
            ).fetchone()
            if waiting["mine"] >= self.bounds.jobs_of_client:
                raise Full(mine=True)
            much = waiting["bytes"] + len(given) > self.bounds.uploads and uploads
            if waiting["jobs"] >= self.bounds.jobs or much:
                raise Full(mine=False)
            db.execute(
                "INSERT INTO jobs (id, client, status, request, uploads, number, steps, "
                "created) VALUES (?, ?, 'open', ?, ?, ?, ?, ?)",
                (id, client, json.dumps(request), given, number, steps, created),
            )
        return Job(id, client, "open", request, number, steps, created, None, None, None, None)

    def get(self, id: str, owner: str | None = None) -> Job | None:
        """The job of an id; None if there is none."""
        if not is_id(id):
            return None
        found = self._jobs("id = ? AND client = ifnull(?, client)", id, owner)
        return found[0] if found else None

    def page(self, limit: int, before: str | None = None, owner: str | None = None) -> list[Job]:
        """At most `limit` jobs, newest first; those older than `before` if it is given."""
        mine, values = ("", ()) if owner is None else ("AND client = ?", (owner,))
        where = f"id < ? {mine} ORDER BY id DESC LIMIT ?"
        return self._jobs(where, before or "g", *values, limit)

    def open(self) -> list[Job]:
        """All open jobs, oldest first: after a crash, what is to be queued again."""
        return self._jobs("status = 'open' ORDER BY id")

    def uploads(self, id: str) -> dict[str, str]:
        """The pictures given with an open job, as text; nothing once it has ended."""
        rows = self.store.rows("SELECT uploads FROM jobs WHERE id = ?", id)
        return json.loads(rows[0]["uploads"]) if rows else {}

    # --- what happens to a job --------------------------------------------------------------

    def drawn(self, db: Connection, id: str, place: int, picture: str, started: float) -> None:
        """Within the transaction that adds a picture: it is the one of this place.

        Ended if the job is not open or the place has had its end.
        """
        self._end_place(db, id, place, picture, started)
        self._end_if_complete(db, id)

    def failed(self, id: str, place: int, message: str, code: str, started: float | None) -> None:
        """The picture of this place failed. Ended as for `drawn`."""
        with self.store.transaction() as db:
            self._end_place(db, id, place, None, started)
            db.execute(
                "UPDATE jobs SET message = ?, code = ? WHERE id = ? AND message IS NULL",
                (message, code, id),
            )
            self._end_if_complete(db, id)

    def cancel(self, id: str) -> bool:
        """Ends an open job; False if it was not open."""
        with self.store.transaction() as db:
            return self._end(db, id, "cancelled")

    def tidy(self) -> None:
        """Forgets ended jobs that are too old or too many; the oldest go first."""
        with self.store.transaction() as db:
            db.execute(
                "DELETE FROM jobs WHERE status != 'open' AND (finished < ? OR id IN (SELECT id "
                "FROM jobs WHERE status != 'open' ORDER BY finished DESC LIMIT -1 OFFSET ?))",
                (self.clock() - self.most_seconds, MOST_ENDED),
            )

    def _end_place(
        self, db: Connection, id: str, place: int, picture: str | None, started: float | None
    ) -> None:
        found = db.execute(
            "UPDATE jobs SET started = ifnull(started, ?) WHERE id = ? AND status = 'open'",
            (started, id),
        ).rowcount
        new = "INSERT OR IGNORE INTO parts (job, place, picture) VALUES (?, ?, ?)"
        if not found or not db.execute(new, (id, place, picture)).rowcount:
            raise Ended

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
        rows = self.store.rows(f"SELECT {_COLUMNS} FROM jobs WHERE {where}", *values)
        ended: dict[str, dict[int, str | None]] = defaultdict(dict)
        marks = ", ".join("?" * len(rows))
        for part in self.store.rows(
            f"SELECT job, place, picture FROM parts WHERE job IN ({marks}) ORDER BY place",
            *(row["id"] for row in rows),
        ):
            ended[part["job"]][part["place"]] = part["picture"]
        return [_job(row, ended[row["id"]]) for row in rows]


def _job(row: Row, ended: dict[int, str | None]) -> Job:
    return Job(**{**dict(row), "request": json.loads(row["request"])}, ended=ended)
