"""The server's data folder: one SQLite file, which survives crashes.

What a client is told has been committed first: SQLite writes ahead to a log and syncs it at every
commit. One process owns the file, with one connection and one transaction at a time. The image
files lie beside it (`koala.serving.jobs.gallery`).
"""

import contextlib
import itertools
import os
import re
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from koala.errors import Failure, UserError

T = TypeVar("T")
FILE = "koala.sqlite3"
APPLICATION = 0x6B6F616C  # SQLite application_id: "koal"
VERSION = 1  # of the schema below
RESERVE_FILE = "reserve"
RESERVE = 4 * 1024 * 1024  # bytes kept free on the disk, for deleting and cancelling
WAIT = 5.0  # seconds to wait for a server that is shutting down
ID = re.compile(r"[0-9a-f]{32}", re.ASCII)

# Ids sort by creation. `pictures` are in the gallery; `parts` records which images of a job have
# ended, even after the gallery deletes them.
TABLES = """
CREATE TABLE pictures (
    id TEXT PRIMARY KEY,
    client TEXT NOT NULL,
    created REAL NOT NULL,
    bytes INTEGER NOT NULL,
    settings TEXT NOT NULL,
    thumbnail BLOB NOT NULL
);
CREATE INDEX pictures_of_client ON pictures (client, id);
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER picture_added AFTER INSERT ON pictures
    BEGIN UPDATE total SET bytes = bytes + new.bytes; END;
CREATE TRIGGER picture_removed AFTER DELETE ON pictures
    BEGIN UPDATE total SET bytes = bytes - old.bytes; END;
CREATE TABLE jobs (
    id TEXT PRIMARY KEY,
    client TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('open', 'done', 'failed', 'cancelled')),
    request TEXT NOT NULL,
    uploads BLOB NOT NULL,
    number INTEGER NOT NULL,
    steps INTEGER NOT NULL,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    message TEXT,
    code TEXT
);
CREATE INDEX jobs_of_client ON jobs (client, id);
CREATE INDEX jobs_open ON jobs (id) WHERE status = 'open';
CREATE INDEX jobs_ended ON jobs (finished) WHERE status != 'open';
CREATE TABLE parts (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    place INTEGER NOT NULL,
    picture TEXT,
    PRIMARY KEY (job, place)
) WITHOUT ROWID;
"""


class Database:
    """An open data folder. Thread-safe."""

    def __init__(self, folder: str | Path) -> None:
        """Opens or creates a folder.

        UserError if it is not writable, in use by another server, or holds a file that is not
        ours or of another version.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = _connect(self.folder / FILE)
        except OSError as error:
            raise UserError(
                f"cannot write to {folder} ({error.strerror or error}): name a folder that you may "
                "write to"
            ) from None
        self._lock = threading.RLock()
        last = max(
            self.rows(f"SELECT ifnull(max(id), '0') AS id FROM {table}")[0]["id"]
            for table in ("pictures", "jobs")
        )
        self._numbers = itertools.count(int(last[:12], 16) + 1)
        self._keep_reserve()

    def new_id(self) -> str:
        """32 hexadecimal digits that sort after all earlier ids; the last 20 are random."""
        return f"{next(self._numbers):012x}{secrets.token_hex(10)}"

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction: on disk when the block ends, rolled back if it raises.

        Failure if the disk cannot take it.
        """
        with self._lock, _explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def make_room(self, change: Callable[[sqlite3.Connection], T]) -> T:
        """Runs a transaction that deletes or ends something: on a full disk too.

        To delete a row SQLite first writes to its log; there is space kept for that.
        """
        try:
            with self.transaction() as db:
                return change(db)
        except Failure:
            (self.folder / RESERVE_FILE).unlink(missing_ok=True)
        with self.transaction() as db:
            return change(db)

    def has_room(self) -> bool:
        """Whether the disk has space for images again, beside what is kept for deleting."""
        try:
            disk = os.statvfs(self.folder)
        except OSError:
            return False
        return self._keep_reserve() and disk.f_bavail * disk.f_frsize > RESERVE

    def _keep_reserve(self) -> bool:
        """Takes the space for `make_room`, if it is free. Whether it is taken."""
        path = self.folder / RESERVE_FILE
        try:
            with open(path, "ab") as file:
                if missing := RESERVE - file.tell():
                    file.write(bytes(max(0, missing)))  # zeros take space, a longer file may not
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        return True

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        """All rows of a read-only query."""
        with self._lock, _explained():
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        """Closes the file; another server may then open the folder."""
        with self._lock:
            self._db.close()


def is_id(text: str) -> bool:
    """Whether a text has the form of an id."""
    return ID.fullmatch(text) is not None


def _connect(file: Path) -> sqlite3.Connection:
    db = None
    try:
        db = sqlite3.connect(file, timeout=WAIT, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the first access: no other process
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("BEGIN EXCLUSIVE")
        _check_or_make(db, file)
        db.execute("COMMIT")
    except BaseException as error:
        if db is not None:
            db.close()
        if not isinstance(error, sqlite3.Error):
            raise
        if "locked" in str(error):
            raise UserError(
                f"{file} is in use by another server: stop it or name another folder"
            ) from None
        if isinstance(error, sqlite3.OperationalError):
            raise UserError(f"cannot open {file}: {error}") from None
        raise UserError(f"{file} is not a gallery ({error}): name another folder") from None
    return db


def _check_or_make(db: sqlite3.Connection, file: Path) -> None:
    """Creates the tables of a new file. UserError for a file that is not ours."""
    application, version, tables = (
        db.execute(query).fetchone()[0]
        for query in (
            "PRAGMA application_id",
            "PRAGMA user_version",
            "SELECT count(*) FROM sqlite_master",
        )
    )
    if tables == 0:
        for statement in _statements(TABLES):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")
    elif application != APPLICATION:
        raise UserError(f"{file} is not a koala gallery: name another folder")
    elif version != VERSION:
        raise UserError(
            f"{file} has version {version}, this koala writes version {VERSION}: name another "
            "folder, or use the koala that wrote it"
        )


def _statements(script: str) -> Iterator[str]:
    """Splits a script into statements; sqlite3's `executescript` would commit first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns SQLite errors into a one-line Failure that names no path."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise Failure(f"cannot access the job database: {error}") from error
