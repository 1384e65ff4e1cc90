#!/usr/bin/env python3
"""The bus on PostgreSQL: any number of them, on as many machines, behind one load balancer, over one database.

    pip install "psycopg[binary,pool]>=3.2"
    python3 examples/postgres_bus.py postgresql://bus@db.example/bus --port 8787      and all other flags of intentbus.py serve

All buses need the same owner key: BUS_SECRET, or the same ~/.apikey. The database is a UTF-8 one; its tables are made at
the first start. BUS_DB_PATH can name it too; a password belongs into ~/.pgpass. Several hosts and
target_session_attrs=read-write in the URL follow a failover. It has been run on PostgreSQL 15.
"""

import collections
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
import traceback

try:
    import psycopg
    import psycopg_pool
except ImportError as error:
    print(f'postgres_bus: {error}. Run: pip install "psycopg[binary,pool]>=3.2"', file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

import intentbus
from intentbus import (APPLICATION_ID, CLAIMED_WITH, DUE, MIGRATIONS, ONE, RECHECK_SECONDS, REMEMBER_FIRST, Intent,
                       SetupError, Store)

CONNECTIONS = 8             # of one bus, more than it can keep busy; PostgreSQL allows 100 to all, unless told otherwise
CONNECT_SECONDS = 5         # for a server to answer
SILENT_SECONDS = 8          # until a server that has vanished without a word is taken for gone
POOL_SECONDS = 2            # for a connection to get free, or the database to come back, before a 503
LOCK_SECONDS = 3            # for a row that another bus holds
STOPPED_SECONDS = 5         # in mid-transaction, and the server ends it: that bus, or its machine, has come to a halt
ATTEMPTS = 5                # of a transaction that got into a deadlock with another
CANDIDATES = 16             # for a claim: others may be at the first ones
LOOKS = 4                   # of a claim that finds others at all there was: what came after a look began is for the next
NOTICE_CHARACTERS = 500     # of an error in what the others are told; PostgreSQL takes 7,999 bytes
NOTICE_FIELDS = (*intentbus.EVENT_FIELDS, "lane", "ready", "wake_at", "claim_outcome")
LOOK_AGAIN = "[]"           # a notice to a bus that was not known so far, and has been told nothing
CLOCK_SLACK_SECONDS = 0.05  # of the way to the database; time that jitters back and forth is worse
IDLE = psycopg.pq.TransactionStatus.IDLE
SETTINGS = {     # of each connection
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{STOPPED_SECONDS}s",
    "default_transaction_isolation": "read committed",
    **dict.fromkeys(("jit", "enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "off"),
}     # the last ones since every statement has its index, whatever the statistics say of a table that has just grown


# ---- SQL ----

TUNED = """
    ALTER TABLE tallies DROP CONSTRAINT tallies_pkey;     -- rows of one kind are added up: no transaction waits for another
    ALTER TABLE intents SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
                             autovacuum_vacuum_cost_delay = 0)
"""
FOLD = """
    WITH gone AS (
        DELETE FROM tallies
        WHERE       ctid = ANY (ARRAY(
            SELECT ctid
            FROM   (SELECT ctid, COUNT(*) OVER (PARTITION BY namespace, publisher, status) AS rows FROM tallies) AS kinds
            WHERE  rows > 1
        ))
        RETURNING   namespace, publisher, status, intents
    )
    INSERT INTO tallies (namespace, publisher, status, intents)
    SELECT      namespace, publisher, status, SUM(intents)
    FROM        gone
    GROUP BY    namespace, publisher, status
    HAVING      SUM(intents) <> 0
"""
RANKING = "priority DESC, run_at, claim_attempts, created_at, id"
RANKED = "lane, priority, run_at, claim_attempts, created_at, id"
HEAD_OF_NEXT_LANE = f"""
            SELECT   {RANKED}
            FROM     intents
            WHERE    ready = 1
            AND      lane {{past}}
            AND      lane < {{stop}}
            ORDER BY lane, {RANKING}
            LIMIT    1
"""
FIRST = f"""
    WITH RECURSIVE heads AS (     -- the first of each lane
        SELECT     spans.stop, spans.publisher, head.*
        FROM       (VALUES {{spans}}) AS spans (start, stop, publisher)
        CROSS JOIN LATERAL ({HEAD_OF_NEXT_LANE.format(past=">= spans.start", stop="spans.stop")}) AS head
        UNION ALL
        SELECT     heads.stop, heads.publisher, head.*
        FROM       heads
        CROSS JOIN LATERAL ({HEAD_OF_NEXT_LANE.format(past="> heads.lane", stop="heads.stop")}) AS head
    ), lanes AS (
        SELECT   lane, ROW_NUMBER() OVER (ORDER BY {RANKING}) AS rank
        FROM     heads
        WHERE    publisher = ''
        OR       RIGHT(lane, LENGTH(publisher) + 1) = CHR(9) || publisher
        ORDER BY rank
        LIMIT    {CANDIDATES}
    ), ranked AS (     -- the first of all lanes: before any of a lane come the heads of those with a lower rank
        SELECT     candidate.*
        FROM       lanes
        CROSS JOIN LATERAL (
            SELECT   {RANKED}
            FROM     intents
            WHERE    ready = 1
            AND      lane = lanes.lane
            ORDER BY {RANKING}
            LIMIT    {CANDIDATES + 1} - lanes.rank
        ) AS candidate
        ORDER BY   {RANKING}
        LIMIT      {CANDIDATES}
    )
    SELECT    best.lane AS best, free.*
    FROM      (SELECT lane FROM ranked LIMIT 1) AS best
    LEFT JOIN (     -- the first that no other transaction is at
        SELECT     free.*
        FROM       ranked
        CROSS JOIN LATERAL (
            SELECT {intentbus.ALL}
            FROM   intents
            WHERE  id = ranked.id
            AND    ready = 1
            FOR UPDATE SKIP LOCKED
        ) AS free
        LIMIT      1
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
        self._kept, self._planned = [], {}     # statement: its name here

    def begin(self, synced=True):
        """Begin a transaction; if it is not synced, a power cut may undo it."""
        self.keep("BEGIN")
        if not synced:
            self.keep("SET LOCAL synchronous_commit = off")

    def rollback(self):
        """Undo what was sent, and forget what was kept."""
        self._kept = []
        super().rollback()

    def keep(self, statement, values=None):
        """Send a statement with the next one."""
        self._kept.append((statement, values))

    def executemany(self, statement, rows):
        """Run a statement for each row."""
        self._kept += [(statement, row) for row in rows]

    def execute(self, statement, values=None):
        """Run a statement, after those that are kept, and return its rows, if it has any."""
        if RETURNS_NOTHING.match(statement) and (self._kept or self.info.transaction_status != IDLE):
            return self.keep(statement, values)
        return self.each((statement, values))[0]

    def each(self, *asked):
        """Run several (statement, values), over the network once, and return the last rows that came, of as many of them."""
        self._kept += asked
        return self._send()[-len(asked):] or [Rows()]

    def _send(self):
        """Send what is kept, and return the rows of each result that has any."""
        kept, self._kept = self._kept, []
        try:
            texts = [] if self._planned else ["DEALLOCATE ALL"]
            result = super().execute(";".join(texts + [text for asked in kept for text in self._texts(*asked)]))
        except Exception as error:
            self._planned = {}     # some may not have come so far
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
            self._planned[statement] = f"s{len(self._planned)}"
            yield f"PREPARE {self._planned[statement]} AS {text}"
        words = self.cursor().mogrify(f"({', '.join(['%s'] * len(names))})", [storable(values[name]) for name in names])
        yield f"EXECUTE {self._planned[statement]} {words}"


def set_up(db):
    """Make a new connection what a bus needs."""
    for name, value in SETTINGS.items():
        db.keep(f"SET {name} = '{value}'")
    db.keep("""
        SELECT set_config('synchronous_commit', 'on', false)
        WHERE  current_setting('synchronous_commit') = 'off'
    """)
    db.execute("SELECT 1")


def notice(intent, before):
    """Return what the other buses are told of an intent that was in a state before."""
    told = intent.pick(NOTICE_FIELDS)
    told["last_error"] = told.last_error and told.last_error[:NOTICE_CHARACTERS]
    return intentbus.to_json([before, told])


def brief(error):
    """Return the first line of what psycopg says, without a password that a URL may have had."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r":[^:@/\s\"]*@", ":***@", line)


# ---- The store ----

class SharedAllowance:
    """So many a minute for each name at all buses together: a memo ends when the bucket is full again (GCRA)."""

    def __init__(self, store, per_minute):
        self._store, self._cost_seconds = store, 60 / per_minute

    def take(self, name, number=1):
        """Use it up by a number, less than 0 to give back; return how many seconds to wait if there is not enough."""
        cost = number * self._cost_seconds
        taken = self._store.once(TAKE, dict(name=name, cost=cost, full=60, now=self._store.clock()))
        return 0 if taken else cost


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
        self._dsn, self._own, self._ahead, self._complaints = where, threading.local(), 0, {}
        self._closed, self._outbox, self._others = threading.Event(), queue.SimpleQueue(), []
        self._missed, self._passed_over = False, set()     # lanes whose best intents others were just at
        try:
            with self._connect() as db:
                self.path = f"{db.info.dbname} of PostgreSQL at {db.info.host or 'this machine'}"
                if db.info.parameter_status("server_encoding") != "UTF8":
                    raise SetupError(f"The database {self.path} is not in UTF-8; make one with ENCODING 'UTF8'.")
                self._kin = f"intentbus {self._prepare(db)} "
                self._name = self._kin + os.urandom(8).hex()     # of this bus: for the others to see, and its channel
                self._set_clock(db)
        except (psycopg.Error, UnicodeError) as error:
            raise SetupError(f"PostgreSQL cannot be used: {brief(error)}.") from error
        self._pool = psycopg_pool.ConnectionPool(
            self._dsn, connection_class=Connection, min_size=1, max_size=CONNECTIONS, timeout=POOL_SECONDS, open=True,
            kwargs=self._options(), configure=set_up, reconnect_timeout=CONNECT_SECONDS)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._tell_others)]
        for thread in self._threads:
            thread.start()

    def close(self):
        """Let go of the database."""
        self._closed.set()
        self._outbox.put([LOOK_AGAIN])     # reaches the listener of this bus, too
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

    def use_nonce(self, key_id, nonce, expires_at, now):
        """Remember a nonce, as in the Store; return whether it was new."""
        return bool(self.once(REMEMBER_FIRST, dict(kind="nonces", owner=key_id, key=nonce, value="", expires_at=expires_at,
                                                   now=now)))

    def once(self, statement, values):
        """Run one statement that need not be on disk, over the network once, and return its rows."""
        with self._translated(), self._pool.connection() as db:
            db.begin(synced=False)
            db.keep(statement, values)
            return db.execute("COMMIT")

    def clean(self, now, retention):
        """Delete what is over, as in the Store, and add up the tallies."""
        self.once(FOLD, {})
        return super().clean(now, retention)

    def bytes(self):
        """Return the size of the database; its log is the server's business."""
        with self._reader() as db:
            return [db.execute("SELECT pg_database_size(current_database()) AS bytes").fetchone().bytes, 0]

    # -- Inside the transaction --

    def _claimable(self, lanes, now, again):
        """Return what the Store does, with one look at all of it; what others are at is passed over, and looked at later."""
        spans = [part for pattern in lanes for part in intentbus.span(pattern)]
        values = {f"span{number}": part for number, part in enumerate(spans)}
        places = [f"CAST(:{name} AS TEXT)" for name in values]
        first = FIRST.format(spans=", ".join(f"({', '.join(places[at:at + 3])})" for at in range(0, len(places), 3)))
        look = (CLAIMED_WITH + self.HELD, again), (first, values)
        due, known, found = self._db.each((DUE + self.FREE, dict(now=now, rows=intentbus.SETTLE_ROWS)), *look)
        self._wake(due, now)
        for number in range(LOOKS):
            if due or number:
                known, found = self._db.each(*look)
            if known or not found:
                return known.fetchone()
            best = found[0].pop("best")
            if found[0].id:
                return found[0]
        self._passed_over.add(best)

    def _exclusively(self, *what):
        """Hold an advisory lock until this transaction has ended."""
        digest = hashlib.sha256(intentbus.to_json([self._kin, *what]).encode()).digest()
        self._db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=int.from_bytes(digest[:8], "big", signed=True)))

    def _commit(self, run, synced):
        """Run an operation as a transaction of its own: PostgreSQL commits many at a time by itself."""
        try:
            with self._translated():
                result, moves = self._transact(run, synced)
        except intentbus.Unavailable:
            self._missed, self._others = True, []     # if it was committed all the same, everyone is to look
            raise
        if moves:
            self.on_commit(moves)
            if self._others:
                self._outbox.put([notice(*move) for move in moves if move[0].ready or intentbus.event(*move)])
        return result

    def _transact(self, run, synced):
        """Return what an operation returns and what it has moved, once that is committed; done anew after a deadlock."""
        for left in reversed(range(ATTEMPTS)):
            try:
                with self._pool.connection() as db:     # which is rolled back by the pool after an error
                    self._own.db, self._moves = db, []
                    db.begin(synced)
                    result = run()
                    self._tally()
                    db.execute("COMMIT")
                    return result, [(intent, before) for intent, before, after in self._moves if after]
            except psycopg.errors.DeadlockDetected:
                if not left:
                    raise

    # -- The other buses --

    def others(self):
        """Return the names of the other buses that use these tables just now."""
        with self._reader() as db:
            return self._look_for_others(db)

    def _look_for_others(self, db):
        return [row.name for row in db.execute(OTHERS, dict(buses=self._kin + "%", this=self._name)).fetchall()]

    def changed_elsewhere(self):
        """Return whether there may have been news of other buses that did not reach this one.

        Who waits for what was passed over is woken: it may have been let go of.
        """
        while self._passed_over:
            self.on_news([(Intent(lane=self._passed_over.pop(), status="open", ready=1), "open")])
        if not self._missed:
            return False
        self._missed = False
        return True

    def _tell_others(self):
        """Tell the other buses what this one has done, as much at a time as there is."""
        while not self._closed.is_set():
            notices = self._outbox.get()
            while not self._outbox.empty():
                notices += self._outbox.get()
            try:
                self.once(TELL, dict(buses=self._others + [self._name] * self._closed.is_set(), notices=notices))
            except intentbus.Error:
                self._others = []     # so that they are found anew, and told to look

    def _listen(self):
        """Hear what other buses have done, and keep to the clock of the database, whatever happens to the connection."""
        while not self._closed.is_set():
            try:
                with self._connect(application_name=self._name) as db:
                    self._listen_at(db)
            except psycopg.Error as error:
                self._complain("This bus hears nothing of others", error)
            except Exception:
                traceback.print_exc()
            self._missed = True     # deaf, it looks by itself
            self._closed.wait(RECHECK_SECONDS)

    def _listen_at(self, db):
        db.execute(f'LISTEN "{self._name}"')
        self._complain("This bus hears nothing of others", None)
        self._others, self._missed = [], True
        self._pool.check()     # what ended the last connection of this thread has ended others
        while not self._closed.is_set():
            self._set_clock(db)
            self._meet(db)
            for heard in db.notifies(timeout=RECHECK_SECONDS):
                if self._closed.is_set() or not self._hear(heard.payload):
                    break

    def _meet(self, db):
        """Find out which other buses there are; whoever is new has not been told of anything so far."""
        found = self._look_for_others(db)
        known, self._others = self._others, found
        if new := set(found) - set(known):
            db.execute(TELL, dict(buses=list(new), notices=[LOOK_AGAIN]))

    def _hear(self, heard):
        """Take in what another bus says that it has done; return whether that was all it had to say."""
        try:
            before, told = json.loads(heard)
            self.on_news([(Intent(told), before)])
        except (KeyError, TypeError, ValueError):     # LOOK_AGAIN, or from a bus of another version
            self._missed = True
        return not self._missed

    def _set_clock(self, db):
        """Find out how far the clock of the database is from the steady one here, as exactly as the answer is quick."""
        asked = intentbus.steady_clock()
        there = db.execute("SELECT EXTRACT(EPOCH FROM clock_timestamp()) AS now").fetchone().now
        took = intentbus.steady_clock() - asked
        ahead = float(there) - asked - took / 2
        if abs(ahead - self._ahead) > CLOCK_SLACK_SECONDS + took / 2:
            self._ahead = ahead

    # -- Connections --

    def _options(self, **options):
        return dict(autocommit=True, row_factory=as_intents, client_encoding="UTF8", connect_timeout=CONNECT_SECONDS,
                    keepalives_idle=SILENT_SECONDS, keepalives_interval=1, keepalives_count=3,
                    tcp_user_timeout=1000 * SILENT_SECONDS, **options)

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
            self._complain("PostgreSQL cannot be used", None)
        except psycopg.errors.DiskFull as error:
            raise intentbus.StorageFull("The disk under PostgreSQL is full; nothing of this request was stored.") from error
        except psycopg.IntegrityError:     # a fault of ours, not of the database
            raise
        except psycopg.Error as error:
            self._complain("PostgreSQL cannot be used", error)
            raise intentbus.Unavailable("PostgreSQL cannot be used just now; the bus says on its stderr why.") from error

    def _complain(self, what, error):
        """Say on stderr what is wrong, once, and when it is over; not in answers, since it may name hosts and users."""
        if error and what not in self._complaints:
            self._complaints[what] = error
            intentbus.log(f"{what}: {brief(error)}. Trying again.")
        elif not error and self._complaints.pop(what, None):
            intentbus.log(f"No longer so: {what}.")

    def _prepare(self, db):
        """Bring the tables to the schema of this version and return what names them; of several buses at once, one does so."""
        db.begin()
        db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=APPLICATION_ID))
        there = db.execute("SELECT to_regclass('intentbus') AS ours, to_regclass('intents') AS intents").fetchone()
        if there.intents and not there.ours:
            raise SetupError(f"The database {self.path} has a table intents of another program; give the bus another one.")
        version = there.ours and db.execute("SELECT MAX(version) AS version FROM intentbus").fetchone().version or 0
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        if version < len(MIGRATIONS):     # a role that may not create anything can run a bus that is there
            db.keep("CREATE TABLE IF NOT EXISTS intentbus (version INTEGER NOT NULL)")
            for statement in [*intentbus.statements(version), *(TUNED.split(";") if not version else ())]:
                db.keep(statement.replace("TEXT", 'TEXT COLLATE "C"'))     # lanes and ids are compared as bytes
            db.keep("DELETE FROM intentbus")
            db.keep("INSERT INTO intentbus VALUES (:version)", dict(version=len(MIGRATIONS)))
        tables = db.execute("SELECT CAST(CAST('intents' AS regclass) AS oid) AS oid").fetchone().oid
        db.execute("COMMIT")
        return tables


logging.getLogger("psycopg").setLevel(logging.ERROR)     # what the pool tries again is no news, and requests say the rest
intentbus.STORES.update(postgresql=PostgresStore, postgres=PostgresStore)
application = intentbus.application     # under WSGI, with such a URL in BUS_DB_PATH

if __name__ == "__main__":
    intentbus.STORES = collections.defaultdict(lambda: PostgresStore)     # "host=db.example dbname=bus" is a DSN too
    arguments = sys.argv[1:]
    if arguments[:1] == ["serve"]:
        del arguments[0]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--db")
    elif not any(argument.startswith("--db") for argument in arguments) and not os.environ.get("BUS_DB_PATH"):
        print("postgres_bus: which PostgreSQL? Give its URL first, or set BUS_DB_PATH.", file=sys.stderr)
        sys.exit(2)
    sys.exit(intentbus.main(["serve", *arguments]))
