#!/usr/bin/env python3
"""Move a bus from its SQLite file to PostgreSQL, or back.

    python3 examples/migrate_to_postgres.py bus.db postgresql://bus@db.example/bus
    python3 examples/migrate_to_postgres.py --back bus.db postgresql://bus@db.example/bus

Stop the bus before, of several all; start the other kind after, with the same owner key. Everything is copied and counted
in one transaction: what is interrupted leaves nothing behind. The source stays as it was, and a target that has intents
or keys already is refused.
"""

import argparse
import os
import pathlib
import sys

sys.path[:0] = map(str, pathlib.Path(__file__).resolve().parents[:2])     # where postgres_bus.py and intentbus.py are

import intentbus
import psycopg
from intentbus import SetupError, Store
from postgres_bus import Connection, PostgresStore, storable
from psycopg.rows import tuple_row

BATCH_ROWS = 1000
TABLES = {     # the columns that the rows are in the order of, and the others
    "intents": (("id",), intentbus.COLUMNS[1:]),
    "keys": (("key_id",), ("name", "owner", "role", "created_at", "last_used_at", "total_requests", "revoked_at")),
    "memos": (("kind", "owner", "key"), ("value", "expires_at")),
    "history": (("minute", "event"), ("times",)),
    "tallies": (("namespace", "publisher", "status"), ("intents",)),
}
OF_ONE_BUS = ("clock", "probe", "rate")     # memos that mean nothing to the other kind


def batches(db, table):
    """Yield the rows of a table, so many at a time, each looked for from the last one on."""
    order, others = TABLES[table]
    start = f"SELECT {', '.join(order + others)} FROM {table} "
    end = f" ORDER BY {', '.join(order)} LIMIT {BATCH_ROWS}"
    rows = db.execute(start + end).fetchall()
    while rows:
        yield rows
        after = f"WHERE ({', '.join(order)}) > (:{', :'.join(order)})"
        rows = db.execute(start + after + end, rows[-1]).fetchall()


def insert(db, table, columns, rows):
    """Store rows of a table; in PostgreSQL by COPY, which is several times faster."""
    if not isinstance(db, Connection):
        db.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES (:{', :'.join(columns)})", rows)
        return
    with db.cursor(row_factory=tuple_row).copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row([storable(row[column]) for column in columns])


def counts(db):
    """Return how many intents there are of each status, and how many rows of each other table that is copied as it is."""
    found = {row.status: row.number for row in db.execute("SELECT status, COUNT(*) AS number FROM intents GROUP BY status")}
    kinds = ", ".join(f"'{kind}'" for kind in OF_ONE_BUS)
    for table, which in (("keys", "TRUE"), ("memos", f"kind NOT IN ({kinds})"), ("history", "TRUE")):
        found[table] = db.execute(f"SELECT COUNT(*) AS number FROM {table} WHERE {which}").fetchone().number
    return found


@intentbus.operation
def take_over(target, source):
    """Copy all tables of another store into an empty one, and return what counts finds in both."""
    there = target._db
    for table, which in (("intents", "TRUE"), ("keys", "TRUE"), ("memos", "kind IN ('store', 'idempotency', 'invitation')")):
        if there.execute(f"SELECT 1 AS found FROM {table} WHERE {which} LIMIT 1").fetchone():
            raise SetupError(f"{target.path} has intents, keys or values already; give this an empty database.")
    there.execute("DELETE FROM memos RETURNING kind").fetchall()     # of a bus that was started there and did nothing
    there.execute("DELETE FROM history RETURNING minute").fetchall()
    with source._reader() as here:
        for table, (order, others) in TABLES.items():
            columns, copied = order + others, 0
            for rows in [source.tallies()] if table == "tallies" else batches(here, table):
                rows = [row for row in rows if table != "memos" or row.kind not in OF_ONE_BUS]
                insert(there, table, columns, rows)
                copied += len(rows)
                if sys.stderr.isatty():
                    sys.stderr.write(f"\r{table}: {copied} ")
            print(f"\r{table}: {copied} ", file=sys.stderr, flush=True)
        expected = counts(here)
    there.execute("ANALYZE")     # PostgreSQL would plan for empty tables until it has found out by itself
    if counts(there) != expected:
        raise SetupError(f"{target.path} would hold {counts(there)}, and not {expected}: is a bus still running there?")
    return expected


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
    stores = []
    try:
        stores.append(PostgresStore(options.dsn))
        if stores[0].others():
            raise SetupError("A bus is running on this PostgreSQL database; stop it, and all others there.")
        stores.append(Store(options.file))
        postgres, file = stores
        moved = take_over(*((file, postgres) if options.back else (postgres, file)))
    except (intentbus.Error, psycopg.Error) as error:
        print(f"migrate_to_postgres: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("migrate_to_postgres: interrupted; nothing was moved.", file=sys.stderr)
        return 130
    finally:
        for store in stores:
            store.close()
    print("everything is there: " + ", ".join(f"{number} {what}" for what, number in moved.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
