#!/usr/bin/env python3
"""Move a bus from its SQLite file to PostgreSQL, or back.

    python3 examples/migrate_to_postgres.py bus.db postgresql://bus@db.example/bus
    python3 examples/migrate_to_postgres.py --back bus.db postgresql://bus@db.example/bus

Stop the bus before, and all others on the same database; start the other kind after, with the same owner key. Everything is
copied and counted in one transaction: if it is interrupted, nothing is stored. The source stays as it was, and a target that
already has intents or keys is refused.
"""

import argparse
import contextlib
import os
import pathlib
import sys

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])     # where postgres_bus.py and intentbus.py are

import intentbus
from intentbus import Database, SetupError, Store
from postgres_bus import Connection, PostgresDatabase, storable

BATCH_ROWS = 1000
TABLES = {     # the columns by which rows are ordered, and the others
    "intents": (("id",), intentbus.COLUMNS[1:]),
    "schedules": (("owner", "name"), intentbus.SCHEDULE_COLUMNS[2:]),
    "keys": (("key_id",), ("name", "owner", "role", "goals", "expires_at", "payloads", "created_at", "last_used_at", "total_requests",
                          "revoked_at")),
    "memos": (("kind", "owner", "key"), ("value", "expires_at", "size")),
    "history": (("minute", "event"), ("times",)),
    "goal_history": (("minute", "namespace", "goal", "event"), ("times",)),
    "limits": (("namespace", "goal"), ("running", "paused")),
    "tallies": (("namespace", "publisher", "status"), ("intents", "bytes")),
}
OF_ONE_BUS = ("clock", "probe", "rate")     # kinds of memos that are of no use to the other kind of bus


def batches(source, table):
    """Yield the rows of a table, BATCH_ROWS at a time, each batch searched from the last row on."""
    if table == "tallies":     # PostgreSQL has several rows of a kind
        yield list(Store(source).tallies())
        return
    order, others = TABLES[table]
    start = f"SELECT {', '.join(order + others)} FROM {table} "
    end = f" ORDER BY {', '.join(order)} LIMIT {BATCH_ROWS}"
    rows = list(source.read(start + end))
    while rows:
        yield [row for row in rows if table != "memos" or row[0] not in OF_ONE_BUS]
        after = f"WHERE ({', '.join(order)}) > (:{', :'.join(order)})"
        rows = list(source.read(start + after + end, dict(zip(order, rows[-1]))))


def insert(db, table, rows):
    """Store rows of a table; in PostgreSQL by COPY, which is several times faster."""
    columns = [*TABLES[table][0], *TABLES[table][1]]
    if not isinstance(db, Connection):
        db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})", rows)
        return
    with db.cursor().copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row([storable(value) for value in row])


def counts(run):
    """Return the number of intents of each status, and of rows in each other table that is copied as it is."""
    found, kinds = dict(run("SELECT status, COUNT(*) FROM intents GROUP BY status")), "', '".join(OF_ONE_BUS)
    for table, which in (("schedules", "1 = 1"), ("keys", "1 = 1"), ("memos", f"kind NOT IN ('{kinds}')"), ("history", "1 = 1"),
                         ("goal_history", "1 = 1"), ("limits", "1 = 1")):
        (found[table],), = run(f"SELECT COUNT(*) FROM {table} WHERE {which}")
    return found


def copy_all(source, target, db):
    """Copy all tables of a database into an empty one, in a transaction of it; return what counts() finds in both."""
    for table, which in (("intents", "1 = 1"), ("schedules", "1 = 1"), ("keys", "1 = 1"), ("limits", "1 = 1"),
                         ("memos", "kind IN ('store', 'idempotency', 'invitation')")):
        if list(db.execute(f"SELECT 1 FROM {table} WHERE {which} LIMIT 1")):
            raise SetupError(f"{target.path} has intents, keys or values already; give this an empty database.")
    for table, column in (("memos", "kind"), ("history", "minute"), ("goal_history", "minute")):     # of a bus that was started there and did nothing
        list(db.execute(f"DELETE FROM {table} RETURNING {column}"))
    for table in TABLES:
        copied = 0
        for rows in batches(source, table):
            insert(db, table, rows)
            copied += len(rows)
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{table}: {copied} ")
        print(f"\r{table}: {copied} ", file=sys.stderr, flush=True)
    db.execute("ANALYZE")     # PostgreSQL would plan for empty tables until it has found out by itself
    expected, stored = counts(source.read), counts(db.execute)
    if stored != expected:
        raise SetupError(f"{target.path} would hold {stored}, and not {expected}: is a bus still running there?")
    return expected


def move(path, dsn, back):
    """Copy a file into PostgreSQL, or back; return the counts."""
    with contextlib.closing(PostgresDatabase(dsn)) as postgres:
        db = postgres.enter()
        others = postgres.meet(db)
        postgres.leave(db)
        if others:
            raise SetupError("A bus is running on this PostgreSQL database; stop it, and all others there.")
        with contextlib.closing(Database(path)) as file:
            source, target = (postgres, file) if back else (file, postgres)
            db = target.enter()
            try:
                moved = copy_all(source, target, db)
                target.leave(db)
            except BaseException as error:
                target.undo(db, error)
                raise
    return moved


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the SQLite file")
    parser.add_argument("dsn", nargs="?", default=os.environ.get("BUS_DB_PATH"), help="the PostgreSQL database (BUS_DB_PATH)")
    parser.add_argument("--back", action="store_true", help="from PostgreSQL into the file")
    options = parser.parse_args()
    if not options.dsn:
        parser.error("which PostgreSQL? Give its URL, or set BUS_DB_PATH.")
    if "://" in options.file:
        parser.error("the file comes first, then the URL.")
    if not options.back and not os.path.isfile(options.file):
        parser.error(f"there is no file {options.file}.")
    try:
        moved = move(options.file, options.dsn, options.back)
    except intentbus.Error as error:
        print(f"migrate_to_postgres: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("migrate_to_postgres: interrupted; nothing was moved.", file=sys.stderr)
        return 130
    print("everything is there: " + ", ".join(f"{number} {what}" for what, number in moved.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
