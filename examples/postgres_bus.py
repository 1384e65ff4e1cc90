#!/usr/bin/env python3
"""The bus on PostgreSQL: any number of them, on as many machines, behind one load balancer, over one database.

    pip install "psycopg[binary,pool]"
    python3 examples/postgres_bus.py postgresql://bus@db.example/bus --port 8787      and all other flags of intentbus.py serve

All buses need the same owner key: BUS_SECRET, or the same ~/.apikey. The database is a UTF-8 one; its tables are made at
the first start. BUS_DB_PATH can name it too; a password belongs into ~/.pgpass. Several hosts and
target_session_attrs=read-write in the URL follow a failover. It has been run on PostgreSQL 15.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import queue
import re
import sys
import threading

import psycopg
import psycopg_pool

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

import intentbus
from intentbus import APPLICATION_ID, HEAD_OF_LANE, MIGRATIONS, ONE, RECHECK_SECONDS, Intent, SetupError, Store

CONNECTIONS = 16            # of one bus; PostgreSQL allows 100 to all, unless told otherwise
CONNECT_SECONDS = 5         # for a server to answer
POOL_SECONDS = 5            # for a connection to get free, or the database to come back, before a 503
LOCK_SECONDS = 10           # for a row that another bus holds, though its machine may be gone
ATTEMPTS = 5                # of a transaction that got into a deadlock with another
NAME_CHARACTERS = 63        # PostgreSQL's limit
NOTICE_BYTES = 7999         # PostgreSQL's limit of one notification
NOTICE_CHARACTERS = 500     # of an error in it
LOOK_AGAIN = "[]"           # a notice of something too long for one
NOTICE_FIELDS = (*intentbus.EVENT_FIELDS, "lane", "ready", "wake_at", "claim_outcome")
CLOCK_SLACK_SECONDS = 0.05  # of the way to the database; time that jitters back and forth is worse
KEPT_STATEMENTS = 200       # sent at a time
IDLE = psycopg.pq.TransactionStatus.IDLE
SETTINGS = f"""
    SELECT set_config('lock_timeout', '{LOCK_SECONDS}s', false),
           set_config('idle_in_transaction_session_timeout', '{2 * LOCK_SECONDS}s', false),
           set_config('default_transaction_isolation', 'read committed', false),
           set_config('synchronous_commit', CASE current_setting('synchronous_commit')
                                            WHEN 'off' THEN 'on' ELSE current_setting('synchronous_commit') END, false)
"""
TUNED = """
    ALTER TABLE tallies DROP CONSTRAINT tallies_pkey;     -- rows of one kind are added up: no transaction waits for another
    ALTER TABLE intents SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
                             autovacuum_vacuum_cost_delay = 0)
"""
FOLD = """
    WITH gone AS (
        DELETE FROM tallies
        RETURNING   namespace, publisher, status, intents
    )
    INSERT INTO tallies (namespace, publisher, status, intents)
    SELECT      namespace, publisher, status, SUM(intents)
    FROM        gone
    GROUP BY    namespace, publisher, status
    HAVING      SUM(intents) <> 0
"""
TAKE = """
    INSERT INTO memos (kind, owner, key, value, expires_at)
    VALUES      ('rate', '', :name, '', :now + CAST(:cost AS DOUBLE PRECISION))
    ON CONFLICT (kind, owner, key) DO UPDATE
    SET         expires_at = GREATEST(memos.expires_at, :now) + :cost
    WHERE       GREATEST(memos.expires_at, :now) + :cost <= CAST(:now AS DOUBLE PRECISION) + :full
    RETURNING   expires_at
"""
BYTES = """
    SELECT COALESCE(SUM(pg_total_relation_size(oid)), 0) AS bytes
    FROM   pg_class
    WHERE  relkind = 'r'
    AND    relnamespace = CAST(current_schema() AS regnamespace)
"""
BUSES = """
    SELECT COALESCE(STRING_AGG(CAST(pid AS TEXT), ' ' ORDER BY pid), '') AS pids
    FROM   pg_stat_activity
    WHERE  application_name LIKE :buses
    AND    application_name <> :this
"""


RETURNS_NOTHING = re.compile(r"\s*(INSERT|UPDATE|DELETE)\b(?!.*\bRETURNING\b)", re.DOTALL)


@functools.lru_cache(maxsize=None)
def translated(statement):
    """Return a statement of the Store as psycopg takes it: :name becomes %(name)s."""
    return re.sub(r"(?<![:\w]):([a-z_]+)", r"%(\1)s", statement.replace("%", "%%"))


def storable(values):
    """Return values without the character NUL, which PostgreSQL's TEXT cannot hold; the picture of it takes its place."""
    return {name: value.replace("\0", "\u2400") if isinstance(value, str) else value for name, value in values.items()}


class Connection(psycopg.Connection):
    """A connection that takes statements as the Store writes them.

    In a transaction, what returns nothing is sent together with the next statement that does, or with COMMIT: one way over
    the network instead of many.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cursor_factory = psycopg.ClientCursor     # puts values into the text, which may be of several statements
        self._kept = []

    def begin(self, *settings):
        """Begin a transaction, with SET statements."""
        self._kept = ["BEGIN", *settings]

    def rollback(self):
        """Undo what was sent, and forget what was kept."""
        self._kept = []
        super().rollback()

    def keep(self, statement, values=None):
        """Send a statement with the next one, or with many of its kind."""
        values = values and storable(values)
        self._kept.append(self.cursor().mogrify(translated(statement), values) if values else statement)
        if len(self._kept) >= KEPT_STATEMENTS:
            self._send()

    def execute(self, statement, values=None):
        """Run a statement, after those that are kept, and return its result."""
        self.keep(statement, values)
        if not RETURNS_NOTHING.match(statement) or self.info.transaction_status == IDLE and self._kept[0] != "BEGIN":
            return self._send()

    def executemany(self, statement, rows):
        """Run a statement for each row."""
        for row in rows:
            self.keep(statement, row)

    def _send(self):
        together, self._kept = ";".join(self._kept), []
        result = super().execute(together)
        while result.nextset():
            pass
        return result


def as_intents(cursor):
    """Return what makes a row of a result, as in the Store."""
    result = cursor.pgresult
    names = [result.fname(number).decode() for number in range(result.nfields)]
    return lambda values: Intent(zip(names, values))


class SharedAllowance:
    """So many a minute for each name at all buses together: a memo ends when the bucket is full again (GCRA)."""

    def __init__(self, store, per_minute):
        self._store, self._per_second, self._full_seconds = store, per_minute / 60, 60

    def take(self, name, number=1):
        """Use it up by a number, less than 0 to give back; return how many seconds to wait if there is not enough."""
        return self._store.take(name, number / self._per_second, self._full_seconds)


class PostgresStore(Store):
    """The intents, in a PostgreSQL database that other buses use too. An operation is a transaction of its own."""

    TALLY = """
        INSERT INTO tallies (namespace, publisher, status, intents)
        VALUES      (:namespace, :publisher, :status, :intents)
    """
    HELD, FREE = " FOR UPDATE", " FOR UPDATE SKIP LOCKED"

    _db = property(lambda self: self._own.db)     # of the thread, since operations run side by side
    _moves = property(lambda self: self._own.moves, lambda self, moves: setattr(self._own, "moves", moves))

    def _open(self, where):
        self._dsn, self._own, self._outbox = where, threading.local(), queue.SimpleQueue()
        self._closed, self._missed, self._to_fold = threading.Event(), False, True
        self._name, self._ahead = os.urandom(8).hex(), 0
        try:
            with self._connect() as db:
                self.path = f"{db.info.dbname} of PostgreSQL at {db.info.host or 'this machine'}"
                if db.info.parameter_status("server_encoding") != "UTF8":
                    raise SetupError(f"The database {self.path} is not in UTF-8; make one with ENCODING 'UTF8'.")
                schema = db.execute("SELECT current_schema() AS name").fetchone().name
                if not schema:
                    raise SetupError(f"The database {self.path} has no schema of its search_path; create one.")
                self._channel = f"intentbus.{schema}"
                self._title = f"{self._name} {self._channel}"[:NAME_CHARACTERS]
                self._prepare(db)
                self._set_clock(db)
        except psycopg.Error as error:
            raise SetupError(f"PostgreSQL cannot be used: {brief(error)}.") from error
        self._pool = psycopg_pool.ConnectionPool(
            self._dsn, connection_class=Connection, min_size=1, max_size=CONNECTIONS, timeout=POOL_SECONDS, open=True,
            kwargs=self._options(), configure=lambda db: db.execute(SETTINGS), reconnect_timeout=CONNECT_SECONDS,
            check=lambda db: db.pgconn.consume_input())     # raises, without asking it, if the server has hung up
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._tell_others)]
        for thread in self._threads:
            thread.start()

    def close(self):
        """Let go of the database."""
        self._closed.set()
        self._outbox.put([LOOK_AGAIN])     # wakes the listener of this bus, too
        for thread in self._threads:
            thread.join(RECHECK_SECONDS)
        self._pool.close()

    # -- What all buses have in common --

    def clock(self):
        """Return Unix seconds by the clock of the database, which is that of all buses."""
        return intentbus.steady_clock() + self._ahead

    def allowance(self, per_minute):
        """Return an Allowance of all buses together."""
        return SharedAllowance(self, per_minute)

    @intentbus.unsynced
    def take(self, name, cost_seconds, full_seconds):
        """Take so many seconds of a bucket that fills up in full_seconds; return how long to wait if they are not there."""
        now = self.clock()
        if self._db.execute(TAKE, dict(name=name, cost=cost_seconds, full=full_seconds, now=now)).fetchone():
            return 0
        full_at = self._db.execute("SELECT MAX(expires_at) AS time FROM memos WHERE kind = 'rate' AND key = :name",
                                   dict(name=name)).fetchone().time or now
        return max(cost_seconds, full_at + cost_seconds - full_seconds - now)

    def clean(self, now, retention):
        """Delete what is over, as in the Store, and add up the tallies."""
        if self._to_fold:
            self._fold()
        return super().clean(now, retention)

    @intentbus.unsynced
    def _fold(self):
        self._to_fold = False
        self._db.execute(FOLD)

    def bytes(self):
        """Return the size of the tables; the log is the server's business."""
        with self._reader() as db:
            return [int(db.execute(BYTES).fetchone().bytes), 0]

    # -- Inside the transaction --

    def _first(self, lanes):
        """Return the first intent of the best lane that nobody else is at; if all are taken, wait and look again."""
        while head := super()._first(lanes):
            taken = (self._db.execute(HEAD_OF_LANE + self.FREE, dict(lane=head.lane)).fetchone()
                     or self._db.execute(ONE + self.HELD, dict(id=head.id)).fetchone())
            if taken and taken.ready:
                return taken

    def _exclusively(self, *what):
        digest = hashlib.sha256(intentbus.to_json([self._channel, *what]).encode()).digest()
        self._db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=int.from_bytes(digest[:8], "big", signed=True)))

    def _commit(self, run, synced):
        """Run an operation as a transaction, anew if it was in a deadlock: PostgreSQL commits many at a time by itself."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with self._translated():
                    result, moves = self._transact(run, synced)
                break
            except intentbus.Unavailable as error:
                if not left or not isinstance(error.__cause__, psycopg.errors.TransactionRollback):
                    raise
        if moves:
            self.on_commit(moves)
            self._outbox.put([self._notice(intent, before) for intent, before in moves
                              if intent.ready or intentbus.event(intent, before)])
        return result

    def _transact(self, run, synced):
        with self._pool.connection() as db:     # which is rolled back by the pool after an error
            self._own.db, self._moves = db, []
            db.begin(*(() if synced else ("SET LOCAL synchronous_commit = off",)))
            result = run()
            self._tally()
            db.execute("COMMIT")
            self._to_fold = self._to_fold or bool(self._moves)
            return result, [(intent, before) for intent, before, after in self._moves if after]

    # -- The other buses --

    def others(self):
        """Return how many other buses use these tables just now."""
        with self._reader() as db:
            return len(self._others(db))

    def _others(self, db):
        return db.execute(BUSES, dict(buses="_" * len(self._name) + self._title[len(self._name):],
                                      this=self._title)).fetchone().pids.split()

    def changed_elsewhere(self):
        """Return whether there may have been news of other buses that did not reach this one."""
        missed, self._missed = self._missed, False
        return missed

    def _tell_others(self):
        """Tell the other buses what this one has done, as much at a time as there is, and at the end to look for themselves."""
        notices = []
        while not self._closed.is_set():
            notices += self._outbox.get()
            while not self._outbox.empty():
                notices += self._outbox.get()
            with contextlib.suppress(intentbus.Unavailable), self._reader() as db:
                db.execute("SELECT pg_notify(:channel, notice) FROM unnest(CAST(:notices AS TEXT[])) AS notice",
                           dict(channel=self._channel, notices=notices))
                notices = []

    def _notice(self, intent, before):
        told = intent.pick(NOTICE_FIELDS)
        told["last_error"] = told.last_error and told.last_error[:NOTICE_CHARACTERS]
        notice = intentbus.to_json([self._name, before, told])
        return notice if len(notice.encode()) <= NOTICE_BYTES else LOOK_AGAIN

    def _listen(self):
        """Hear what other buses have done, keep to the clock of the database, and notice who has come or gone."""
        while not self._closed.is_set():
            with contextlib.suppress(psycopg.Error), self._connect(application_name=self._title) as db:
                db.execute(f'LISTEN "{self._channel}"')
                known = None
                while not self._closed.is_set():
                    self._set_clock(db)
                    others = self._others(db)
                    if others != known:     # one that is gone may have taken news with it
                        known, self._missed = others, True
                    for notice in db.notifies(timeout=RECHECK_SECONDS):
                        self._hear(notice.payload)
                        if self._closed.is_set():
                            break
            self._closed.wait(RECHECK_SECONDS)

    def _hear(self, notice):
        try:
            name, before, told = json.loads(notice)
        except (TypeError, ValueError):     # LOOK_AGAIN, or somebody else's
            self._missed = True
            return
        if name != self._name:
            self.on_news([(Intent(told), before)])

    def _set_clock(self, db):
        """Find out how far the clock of the database is from the steady one here."""
        asked = intentbus.steady_clock()
        there = db.execute("SELECT EXTRACT(EPOCH FROM clock_timestamp()) AS now").fetchone().now
        ahead = float(there) - (asked + intentbus.steady_clock()) / 2
        if abs(ahead - self._ahead) > CLOCK_SLACK_SECONDS:
            self._ahead = ahead

    # -- Connections --

    def _options(self, **options):
        return dict(autocommit=True, row_factory=as_intents, connect_timeout=CONNECT_SECONDS, **options)

    def _connect(self, **options):
        return Connection.connect(self._dsn, **self._options(**options))

    @contextlib.contextmanager
    def _reader(self):
        """Lend a connection outside of any transaction."""
        with self._translated(), self._pool.connection() as db:
            yield db

    @contextlib.contextmanager
    def _translated(self):
        """Turn what psycopg raises about the database into errors of the bus."""
        try:
            yield
        except psycopg.errors.DiskFull as error:
            raise intentbus.StorageFull("The disk under PostgreSQL is full; nothing of this request was stored.") from error
        except psycopg.IntegrityError:     # a fault of ours, not of the database
            raise
        except psycopg.Error as error:
            raise intentbus.Unavailable(f"PostgreSQL cannot be used just now: {brief(error)}.") from error

    def _prepare(self, db):
        """Bring the tables to the schema of this version; of several buses that start at once, one does so."""
        db.begin()
        db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=APPLICATION_ID))
        there = db.execute("SELECT to_regclass('intentbus') AS ours, to_regclass('intents') AS intents").fetchone()
        if there.intents and not there.ours:
            raise SetupError(f"The database {self.path} has a table intents of another program; give the bus another one.")
        db.keep("CREATE TABLE IF NOT EXISTS intentbus (version INTEGER NOT NULL)")     # of the tables
        version = db.execute("SELECT COALESCE(MAX(version), 0) AS version FROM intentbus").fetchone().version
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        for statement in [*intentbus.statements(version), *(TUNED.split(";") if not version else ())]:
            db.keep(statement.replace("TEXT", 'TEXT COLLATE "C"'))     # lanes and ids are compared as bytes
        db.keep("DELETE FROM intentbus")
        db.keep("INSERT INTO intentbus VALUES (:version)", dict(version=len(MIGRATIONS)))
        db.execute("COMMIT")


def brief(error):
    """Return the first line of what psycopg says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


logging.getLogger("psycopg").setLevel(logging.ERROR)     # what the pool tries again is no news, and requests say the rest
intentbus.STORES.update(postgresql=PostgresStore, postgres=PostgresStore)
application = intentbus.application     # under WSGI, with such a URL in BUS_DB_PATH

if __name__ == "__main__":
    intentbus.STORES["file"] = PostgresStore     # "host=db.example dbname=bus" is a DSN too
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--db")
    sys.exit(intentbus.main(["serve", *arguments]))
