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
import re
import sys
import threading

try:
    import psycopg
    import psycopg_pool
except ImportError as error:
    print(f'postgres_bus: {error}. Run: pip install "psycopg[binary,pool]"', file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

import intentbus
from intentbus import APPLICATION_ID, CLAIMED_WITH, DUE, MIGRATIONS, ONE, RECHECK_SECONDS, Intent, SetupError, Store

CONNECTIONS = 8             # of one bus, more than it can keep busy; PostgreSQL allows 100 to all, unless told otherwise
CONNECT_SECONDS = 5         # for a server to answer
POOL_SECONDS = 5            # for a connection to get free, or the database to come back, before a 503
LOCK_SECONDS = 10           # for a row that another bus holds, though its machine may be gone
ATTEMPTS = 5                # of a transaction that failed with one of PASSING
NOTICE_BYTES = 7999         # PostgreSQL's limit of one notification
NOTICE_CHARACTERS = 500     # of an error in it
NOTICE_FIELDS = (*intentbus.EVENT_FIELDS, "lane", "ready", "wake_at", "claim_outcome")
LOOK_AGAIN = "[]"           # a notice of what is too long for one, or was done before the bus that hears it was known
CLOCK_SLACK_SECONDS = 0.05  # of the way to the database; time that jitters back and forth is worse
KEPT_STATEMENTS = 200       # sent at a time
IDLE = psycopg.pq.TransactionStatus.IDLE
PASSING = (psycopg.errors.TransactionRollback, psycopg.errors.FeatureNotSupported)     # a deadlock; a column that is new


# ---- SQL ----

SETTINGS = f"""
    SELECT set_config('lock_timeout', '{LOCK_SECONDS}s', false),
           set_config('idle_in_transaction_session_timeout', '{2 * LOCK_SECONDS}s', false),
           set_config('default_transaction_isolation', 'read committed', false),
           set_config('jit', 'off', false),
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
HEAD = """
            SELECT   lane, priority, run_at, claim_attempts, created_at, id
            FROM     intents
            WHERE    ready = 1
            AND      lane {past}
            AND      lane < {stop}
            ORDER BY lane, priority DESC, run_at, claim_attempts, created_at, id
            LIMIT    1
"""
FIRST = f"""
    WITH RECURSIVE heads AS (     -- the first of each lane in use, as the Store finds them one by one
        SELECT     spans.stop, spans.publisher, head.*
        FROM       (VALUES {{spans}}) AS spans (start, stop, publisher)
        CROSS JOIN LATERAL ({HEAD.format(past=">= spans.start", stop="spans.stop")}) AS head
        UNION ALL
        SELECT     heads.stop, heads.publisher, head.*
        FROM       heads
        CROSS JOIN LATERAL ({HEAD.format(past="> heads.lane", stop="heads.stop")}) AS head
    ), best AS (
        SELECT   id, lane
        FROM     heads
        WHERE    publisher = ''
        OR       RIGHT(lane, LENGTH(publisher) + 1) = CHR(9) || publisher
        ORDER BY priority DESC, run_at, claim_attempts, created_at, id
        LIMIT    1
    )
    SELECT    best.id AS head, free.*
    FROM      best
    LEFT JOIN LATERAL (     -- the first of its lane that no other transaction is at
        SELECT   *
        FROM     intents
        WHERE    ready = 1
        AND      lane = best.lane
        ORDER BY priority DESC, run_at, claim_attempts, created_at, id
        LIMIT    1
        FOR UPDATE SKIP LOCKED
    ) AS free ON TRUE
"""
TAKE = """
    INSERT INTO memos (kind, owner, key, value, expires_at)
    VALUES      ('rate', '', :name, '', :now + CAST(:cost AS DOUBLE PRECISION))
    ON CONFLICT (kind, owner, key) DO UPDATE
    SET         expires_at = GREATEST(memos.expires_at, :now) + :cost
    WHERE       GREATEST(memos.expires_at, :now) + :cost <= CAST(:now AS DOUBLE PRECISION) + :full
    RETURNING   expires_at
"""
OTHERS = """
    SELECT application_name AS name
    FROM   pg_stat_activity
    WHERE  datname = current_database()
    AND    application_name LIKE :buses
    AND    application_name <> :this
"""
TELL = """
    SELECT     pg_notify(bus, notice)
    FROM       unnest(CAST(:buses AS TEXT[])) AS bus
    CROSS JOIN unnest(CAST(:notices AS TEXT[])) AS notice
"""


# ---- A connection ----

PARAMETER = re.compile(r"(?<![:\w]):([a-z_0-9]+)")
RETURNS_NOTHING = re.compile(r"\s*(INSERT|UPDATE|DELETE)\b(?!.*\bRETURNING\b)", re.DOTALL)


@functools.lru_cache(maxsize=None)
def translated(statement):
    """Return a statement of the Store as PREPARE takes it, with $1 for its first :name, and the names in that order."""
    names = list(dict.fromkeys(PARAMETER.findall(statement)))
    return PARAMETER.sub(lambda parameter: f"${names.index(parameter[1]) + 1}", statement), names


def storable(value):
    """Return a value without the character NUL, which PostgreSQL's TEXT cannot hold; the picture of it takes its place."""
    return value.replace("\0", "\u2400") if isinstance(value, str) else value


def as_intents(cursor):
    """Return what makes a row of a result, as in the Store."""
    result = cursor.pgresult
    names = [result.fname(number).decode() for number in range(result.nfields)]
    return lambda values: Intent(zip(names, values))


class Rows(list):
    """The rows of a result."""

    def fetchone(self):
        """Return the first one, or None."""
        return self[0] if self else None

    def fetchall(self):
        """Return all of them."""
        return self


class Connection(psycopg.Connection):
    """A connection that takes statements as the Store writes them.

    Each is planned once. In a transaction, what returns no rows is sent together with the next statement that does, or
    with COMMIT: one way over the network instead of many.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cursor_factory = psycopg.ClientCursor     # sends text, which may be of several statements
        self._kept, self._at_once, self._planned, self._plans = [], False, {}, 0     # statement: its name here

    def begin(self, synced=True, at_once=False):
        """Begin a transaction; if it is not synced, a power cut may undo it; if it is at_once, its first result ends it."""
        self.keep("BEGIN")
        if not synced:
            self.keep("SET LOCAL synchronous_commit = off")
        self._at_once = at_once

    def rollback(self):
        """Undo what was sent, and forget what was kept."""
        self._kept, self._at_once = [], False
        super().rollback()

    def keep(self, statement, values=None):
        """Send a statement with the next one, or with many of its kind."""
        self._kept.append((statement, values))
        if len(self._kept) >= KEPT_STATEMENTS:
            self._send()

    def executemany(self, statement, rows):
        """Run a statement for each row."""
        for row in rows:
            self.keep(statement, row)

    def execute(self, statement, values=None):
        """Run a statement, after those that are kept, and return its rows, if it has any."""
        if RETURNS_NOTHING.match(statement) and (self._kept or self.info.transaction_status != IDLE):
            return self.keep(statement, values)
        return self.each((statement, values))[0]

    def each(self, *asked):
        """Run several (statement, values), over the network once, and return the rows of each that has any."""
        for statement, values in asked:
            self.keep(statement, values)
        if self._at_once:
            self.keep("COMMIT")
            self._at_once = False
        return self._send()[-len(asked):] or [Rows()]

    def _send(self):
        """Send what is kept, and return the rows of each result that has any."""
        kept, self._kept = self._kept, []
        try:
            result = super().execute(";".join([text for statement, values in kept for text in self._texts(statement, values)]))
        except psycopg.Error as error:
            self._planned = {}     # it may not have come so far, or the tables are others by now
            if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):     # after a failover, the primary is elsewhere
                self.close()
            raise
        rows, more = [], True
        while more:
            if result.pgresult.nfields:
                rows.append(Rows(result.fetchall()))
            more = result.nextset()
        return rows

    def _texts(self, statement, values):
        """Yield what carries out a statement: as it is, or its plan with values, made before if there is none yet."""
        if not values:
            yield statement
            return
        text, names = translated(statement)
        if statement not in self._planned:
            self._plans += 1
            self._planned[statement] = f"s{self._plans}"
            yield f"PREPARE s{self._plans} AS {text}"
        words = self.cursor().mogrify(f"({', '.join(['%s'] * len(names))})", [storable(values[name]) for name in names])
        yield f"EXECUTE {self._planned[statement]} {words}"


def brief(error):
    """Return the first line of what psycopg says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# ---- The store ----

def at_once(method):
    """Make a Store method an operation of one statement that need not be on disk: it goes over the network once, with COMMIT."""
    @functools.wraps(method)
    def committed(self, *args):
        with self._translated(), self._pool.connection() as db:
            self._own.db = db
            db.begin(synced=False, at_once=True)
            return method(self, *args)
    return committed


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
        self._dsn, self._own, self._ahead = where, threading.local(), 0
        self._closed, self._missed, self._to_fold, self._others = threading.Event(), False, True, []
        try:
            with self._connect() as db:
                self.path = f"{db.info.dbname} of PostgreSQL at {db.info.host or 'this machine'}"
                if db.info.parameter_status("server_encoding") != "UTF8":
                    raise SetupError(f"The database {self.path} is not in UTF-8; make one with ENCODING 'UTF8'.")
                schema = db.execute("SELECT current_schema() AS name").fetchone().name
                if not schema:
                    raise SetupError(f"The database {self.path} has no schema of its search_path; create one.")
                self._kin = f"intentbus {hashlib.sha256(schema.encode()).hexdigest()[:16]} "
                self._name = self._kin + os.urandom(8).hex()     # of this bus: for the others to see, and its channel
                self._prepare(db)
                self._set_clock(db)
        except psycopg.Error as error:
            raise SetupError(f"PostgreSQL cannot be used: {brief(error)}.") from error
        self._pool = psycopg_pool.ConnectionPool(
            self._dsn, connection_class=Connection, min_size=1, max_size=CONNECTIONS, timeout=POOL_SECONDS, open=True,
            kwargs=self._options(), configure=lambda db: db.execute(SETTINGS), reconnect_timeout=CONNECT_SECONDS,
            check=lambda db: db.pgconn.consume_input())     # raises, without asking it, if the server has hung up
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self):
        """Let go of the database."""
        self._closed.set()
        with contextlib.suppress(intentbus.Unavailable), self._reader() as db:
            db.execute(TELL, dict(buses=[self._name], notices=[LOOK_AGAIN]))     # the listener waits for one
        self._listener.join(RECHECK_SECONDS)
        self._pool.close()

    # -- What all buses have in common --

    def clock(self):
        """Return Unix seconds by the clock of the database, which is that of all buses."""
        return intentbus.steady_clock() + self._ahead

    def allowance(self, per_minute):
        """Return an Allowance of all buses together."""
        return SharedAllowance(self, per_minute)

    use_nonce = at_once(Store.use_nonce.__wrapped__)

    @at_once
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
        """Return the size of the database; its log is the server's business."""
        with self._reader() as db:
            return [db.execute("SELECT pg_database_size(current_database()) AS bytes").fetchone().bytes, 0]

    # -- Inside the transaction --

    def _claimable(self, lanes, now, again):
        """Return what the Store does, with one look at all of it; if others are at all of the best lane, wait and look again."""
        spans = [part for pattern in lanes for part in intentbus.span(pattern)]
        values = {f"span{number}": part for number, part in enumerate(spans)}
        places = [f"CAST(:{name} AS TEXT)" for name in values]
        first = FIRST.format(spans=", ".join(f"({', '.join(places[at:at + 3])})" for at in range(0, len(places), 3)))
        rows = intentbus.SETTLE_ROWS
        while True:
            due, known, heads = self._db.each(
                (DUE + self.FREE, dict(now=now, rows=rows)), (CLAIMED_WITH + self.HELD, again),
                (first, values))
            if due:
                self._wake(due, now)
                rows = 0
            elif known or not heads or heads[0].id:
                return (known or heads or [None])[0]
            else:
                self._db.execute(ONE + self.HELD, dict(id=heads[0].head))

    def _exclusively(self, *what):
        digest = hashlib.sha256(intentbus.to_json([self._kin, *what]).encode()).digest()
        self._db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=int.from_bytes(digest[:8], "big", signed=True)))

    def _commit(self, run, synced):
        """Run an operation as a transaction, anew if that may help: PostgreSQL commits many at a time by itself."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with self._translated():
                    result, moves = self._transact(run, synced)
                break
            except intentbus.Unavailable as error:
                self._missed, self._others = True, []     # if it was committed all the same, everyone is to look
                if not left or not isinstance(error.__cause__, PASSING):
                    raise
        if moves:
            self.on_commit(moves)
        return result

    def _transact(self, run, synced):
        with self._pool.connection() as db:     # which is rolled back by the pool after an error
            self._own.db, self._moves = db, []
            db.begin(synced)
            result = run()
            self._tally()
            self._to_fold = self._to_fold or bool(self._moves)
            moves = [(intent, before) for intent, before, after in self._moves if after]
            if notices := self._notices(moves):     # in a transaction of its own: PostgreSQL lets one at a time send any
                db.keep("COMMIT")
                db.begin(synced=False)
                db.keep(TELL, dict(buses=self._others, notices=notices))
            db.execute("COMMIT")
            return result, moves

    # -- The other buses --

    def others(self):
        """Return the names of the other buses that use these tables just now."""
        with self._reader() as db:
            return self._look_for_others(db)

    def _look_for_others(self, db):
        return [row.name for row in db.execute(OTHERS, dict(buses=self._kin + "%", this=self._name)).fetchall()]

    def changed_elsewhere(self):
        """Return whether there may have been news of other buses that did not reach this one."""
        missed, self._missed = self._missed, False
        return missed

    def _notices(self, moves):
        """Return what the other buses are to hear, if there are any."""
        return [self._notice(intent, before) for intent, before in moves
                if self._others and (intent.ready or intentbus.event(intent, before))]

    def _notice(self, intent, before):
        told = intent.pick(NOTICE_FIELDS)
        told["last_error"] = told.last_error and told.last_error[:NOTICE_CHARACTERS]
        notice = intentbus.to_json([before, told])
        return notice if len(notice.encode()) <= NOTICE_BYTES else LOOK_AGAIN

    def _listen(self):
        """Hear what other buses have done, and keep to the clock of the database."""
        while not self._closed.is_set():
            with contextlib.suppress(psycopg.Error), self._connect(application_name=self._name) as db:
                db.execute(f'LISTEN "{self._name}"')
                self._missed = True
                while not self._closed.is_set():
                    self._set_clock(db)
                    self._meet(db)
                    for notice in db.notifies(timeout=RECHECK_SECONDS):
                        if self._closed.is_set():
                            break
                        self._hear(notice.payload)
            self._closed.wait(RECHECK_SECONDS)

    def _meet(self, db):
        """Find out which other buses there are; whoever is new has not been told of anything so far."""
        known, self._others = self._others, self._look_for_others(db)
        if new := set(self._others) - set(known):
            db.execute(TELL, dict(buses=list(new), notices=[LOOK_AGAIN]))

    def _hear(self, notice):
        with contextlib.suppress(TypeError, ValueError):     # one that is not of this version
            before, told = json.loads(notice)
            if set(told) == set(NOTICE_FIELDS):
                return self.on_news([(Intent(told), before)])
        self._missed = True
        with contextlib.suppress(intentbus.Unavailable), self._reader() as db:
            self._meet(db)

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
        except psycopg.errors.ProgramLimitExceeded as error:     # a key of some kilobytes is too long for an index
            raise intentbus.Invalid(f"PostgreSQL cannot keep this: {brief(error)}.") from error
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


logging.getLogger("psycopg").setLevel(logging.ERROR)     # what the pool tries again is no news, and requests say the rest
intentbus.STORES.update(postgresql=PostgresStore, postgres=PostgresStore)
application = intentbus.application     # under WSGI, with such a URL in BUS_DB_PATH

if __name__ == "__main__":
    intentbus.STORES["file"] = PostgresStore     # "host=db.example dbname=bus" is a DSN too
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--db")
    elif "--db" not in arguments and not os.environ.get("BUS_DB_PATH"):
        print("postgres_bus: which PostgreSQL? Give its URL first, or set BUS_DB_PATH.", file=sys.stderr)
        sys.exit(2)
    sys.exit(intentbus.main(["serve", *arguments]))
