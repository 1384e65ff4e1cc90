#!/usr/bin/env python3
"""The bus on PostgreSQL: any number of them, on any number of machines, behind one load balancer, over one database.

    pip install "psycopg[binary,pool]>=3.2"
    python3 examples/postgres_bus.py postgresql://bus@db.example/bus --port 8787      and all other flags of intentbus.py serve

All buses need the same owner key: BUS_SECRET, or the same ~/.apikey. The database must be in UTF-8; the first start creates
its tables. BUS_DB_PATH can name it too; a password belongs in ~/.pgpass. A URL with several hosts and
target_session_attrs=read-write follows a failover. This was run on PostgreSQL 15.

    PostgresDatabase      takes the place of Database: connections, transactions, notices to the other buses
    PostgresTransaction   the two statements that are other ones here
    PostgresClock         the clock of the database, which is that of all buses
    Threads               takes the place of Rounds: each request in a transaction of its own, on a few standing threads
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
import traceback

try:
    import psycopg
    import psycopg_pool
except ImportError as error:
    print(f'postgres_bus: {error}. Run: pip install "psycopg[binary,pool]>=3.2"', file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

import intentbus
from intentbus import (ALL, APPLICATION_ID, CLAIMED_WITH, COLUMNS, DEAD_RANGE, DELETE, DUE, MIGRATIONS, OF_NAMESPACE, OLD, ONE,
                       ORDER, RECHECK_SECONDS, TALLY, Held, Intent, Move, SetupError, covering_lanes, lane_range)

THREADS = 8                 # of one bus, each with a connection; PostgreSQL allows 100 connections by default
CONNECT_SECONDS = 5         # for a server to answer
SILENT_SECONDS = 8          # before a server that has vanished is given up
POOL_SECONDS = 2            # for a connection to become free, or the database to come back, before a 503
LOCK_SECONDS = 3            # for a row that another bus holds
STOPPED_SECONDS = 5         # before the server ends the transaction of a bus that has stopped in the middle
ATTEMPTS = 5                # for a request that meets a deadlock
CANDIDATES = 16             # for a claim: other buses may hold the first ones
LOOKS = 4                   # for a claim that finds all candidates held: an intent published meanwhile is in the next look
NOTICE_CHARACTERS = 500     # of an error in a notice; PostgreSQL takes 7,999 bytes
NOTICE_FIELDS = (*intentbus.EVENT_FIELDS, "lane", "ready", "due_at")
LOOK_AGAIN = "[]"           # the notice to a bus that may have missed others
CLOCK_SLACK_SECONDS = 0.05  # smaller differences are the network's
IDLE = psycopg.pq.TransactionStatus.IDLE
SETTINGS = {     # of each connection
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{STOPPED_SECONDS}s",
    "default_transaction_isolation": "read committed",
    **dict.fromkeys(("jit", "enable_seqscan", "enable_bitmapscan", "enable_hashjoin", "enable_mergejoin"), "off"),
}     # every statement has its index, whatever the statistics say of a table that has just grown


# ---- SQL ----

TUNED = """
    ALTER TABLE tallies DROP CONSTRAINT tallies_pkey;     -- rows of one kind are added up: no transaction waits for another
    ALTER TABLE intents SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
                             autovacuum_vacuum_cost_delay = 0)
"""
INSTEAD = {     # of a statement of the Store: other buses change rows, too
    ONE: ONE + " FOR UPDATE",
    DUE: DUE + " FOR UPDATE SKIP LOCKED",
    CLAIMED_WITH: CLAIMED_WITH + " FOR UPDATE",
    DEAD_RANGE.format(columns=ALL): DEAD_RANGE.format(columns=ALL) + " FOR UPDATE",
    DELETE.format(which=DEAD_RANGE.format(columns="id")): DELETE.format(which=DEAD_RANGE.format(columns="id") + " FOR UPDATE"),
    DELETE.format(which=OF_NAMESPACE): DELETE.format(which=OF_NAMESPACE + " FOR UPDATE"),
    DELETE.format(which=OLD): DELETE.format(which=OLD + " FOR UPDATE SKIP LOCKED"),
    TALLY: """
        INSERT INTO tallies (namespace, publisher, status, intents)
        VALUES      (:namespace, :publisher, :status, :intents)
    """,
}
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
READY = f"""
    SELECT   id, lane, priority, run_at, claim_attempts, created_at
    FROM     intents
    WHERE    ready = 1
    AND      {{where}}
    ORDER BY {ORDER}
    LIMIT    {CANDIDATES}
"""
READY_IN_LANES = f"""
    WITH RECURSIVE lanes (lane) AS (     -- one step in the index for each lane
        (SELECT lane FROM intents WHERE ready = 1 AND lane >= {{start}} AND lane < {{end}} ORDER BY lane LIMIT 1)
        UNION ALL
        SELECT (SELECT lane FROM intents WHERE ready = 1 AND lane > lanes.lane AND lane < {{end}} ORDER BY lane LIMIT 1)
        FROM   lanes
        WHERE  lane IS NOT NULL
    )
    SELECT     candidate.*
    FROM       lanes
    CROSS JOIN LATERAL ({READY.format(where="lane = lanes.lane")}) AS candidate
    WHERE      {{publisher}} = ''
    OR         RIGHT(lanes.lane, LENGTH({{publisher}}) + 1) = CHR(9) || {{publisher}}
"""
FIRST = f"""
    WITH ranked AS (
        SELECT   *
        FROM     ({{candidates}}) AS candidate
        ORDER BY {ORDER}
        LIMIT    {CANDIDATES}
    )
    SELECT    best.lane AS best, free.*
    FROM      (SELECT lane FROM ranked LIMIT 1) AS best
    LEFT JOIN (     -- the first one that no other transaction holds
        SELECT     free.*
        FROM       ranked
        CROSS JOIN LATERAL (
            SELECT {ALL}
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
    SELECT application_name
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


@functools.lru_cache(maxsize=256)
def first_of(lanes):
    """Return the statement that finds the first free intent of some lanes, and its values."""
    parts, values = [], {}
    for number, lane in enumerate(lanes):
        place, goal, publisher = lane.rsplit("\t", 2)
        if goal and publisher or not goal and not publisher:
            values[f"key{number}"] = lane if goal else place
            parts.append(READY.format(where=f"{'lane' if goal else 'place'} = :key{number}"))
        else:
            values.update(zip((f"start{number}", f"end{number}"), lane_range(lane)), **{f"by{number}": publisher})
            parts.append(READY_IN_LANES.format(start=f":start{number}", end=f":end{number}",
                                               publisher=f"CAST(:by{number} AS TEXT)"))
    return FIRST.format(candidates=" UNION ALL ".join(f"({part})" for part in parts)), values


class PostgresTransaction(intentbus.Transaction):
    """A block on PostgreSQL."""

    def claimable(self, lanes, owner, token_hash=None):
        """Do as in Transaction, over the network once. Intents that other buses hold are passed over, and looked at later."""
        asked = [(INSTEAD[CLAIMED_WITH], dict(token_hash=token_hash, owner=owner))] if token_hash else []
        for _ in range(LOOKS):
            *known, found = self._db.each(*asked, first_of(tuple(lanes)))
            if known and known[0]:
                return Intent(zip(COLUMNS, known[0][0]))
            if not found:
                return None
            best, *columns = found[0]
            if columns[0]:
                return Intent(zip(COLUMNS, columns))
        self._store.database.passed_over.add(best)

    def unfinished(self, publisher):
        """Return how many unfinished intents a publisher has; no other bus adds to them before this block has ended."""
        digest = hashlib.sha256(intentbus.to_json([self._store.database.kin, publisher]).encode()).digest()
        self._db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=int.from_bytes(digest[:8], "big", signed=True)))
        return super().unfinished(publisher)

    def forget_expired(self, rows):
        """Do as in Transaction, and add up the tallies."""
        self._db.keep(FOLD)
        return super().forget_expired(rows)


# ---- A connection ----

PARAMETER = re.compile(r"(?<![:\w]):([a-z_0-9]+)")
RETURNS_NOTHING = re.compile(r"\s*(INSERT|UPDATE|DELETE)\b(?!.*\bRETURNING\b)", re.DOTALL)


@functools.lru_cache(maxsize=1024)
def translated(statement):
    """Return a statement as PREPARE takes it, with $1 for its first :name, and the names in that order."""
    names = list(dict.fromkeys(PARAMETER.findall(statement)))
    return PARAMETER.sub(lambda parameter: f"${names.index(parameter[1]) + 1}", statement), names


def storable(value):
    """Return a value without the character NUL, which TEXT cannot hold; the picture of it takes its place."""
    return value.replace("\0", "\u2400") if isinstance(value, str) else value


class Connection(psycopg.Connection):
    """A connection that takes statements as the Store writes them.

    Each is planned once. A statement that returns no rows goes over the network with the next one that does, or with COMMIT.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.cursor_factory = psycopg.ClientCursor     # sends text, which may hold several statements
        self._kept, self._planned = [], {}     # statement: its name here

    def rollback(self):
        """Undo what was sent, and forget what was kept."""
        self._kept = []
        super().rollback()

    def keep(self, statement, values=None):
        """Send a statement with the next one."""
        self._kept.append((statement, values))

    def executemany(self, statement, rows):
        """Run a statement of the Store for each row."""
        self._kept += [(INSTEAD.get(statement, statement), row) for row in rows]

    def execute(self, statement, values=None):
        """Run a statement of the Store, after those that are kept, and return its rows, if it has any."""
        statement = INSTEAD.get(statement, statement)
        if RETURNS_NOTHING.match(statement) and (self._kept or self.info.transaction_status != IDLE):
            return self.keep(statement, values)
        return self.each((statement, values))[0]

    def each(self, *asked):
        """Run several (statement, values), over the network once, and return the last rows that came, for each of them."""
        self._kept += asked
        return self._send()[-len(asked):] or [[]]

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
                rows.append(result.fetchall())
            more = result.nextset()
        return rows

    def _texts(self, statement, values):
        """Yield what carries out a statement: its text, or its plan with values, made before if there is none yet."""
        text, names = translated(statement)
        if "IS NULL OR" in statement:     # the type of such a parameter is known from its value only
            text, names = PARAMETER.sub("%s", statement), PARAMETER.findall(statement)
        elif values:
            if statement not in self._planned:
                self._planned[statement] = f"s{len(self._planned)}"
                yield f"PREPARE {self._planned[statement]} AS {text}"
            text = f"EXECUTE {self._planned[statement]} ({', '.join(['%s'] * len(names))})"
        yield self.cursor().mogrify(text, [storable(values[name]) for name in names]) if values else statement


def set_up(db):
    """Make a new connection what a bus needs."""
    for name, value in SETTINGS.items():
        db.keep(f"SET {name} = '{value}'")
    db.keep("""
        SELECT set_config('synchronous_commit', 'on', false)
        WHERE  current_setting('synchronous_commit') = 'off'
    """)
    db.execute("SELECT 1")


def notice(move):
    """Return what the other buses are told of a move."""
    told = move.intent.pick(NOTICE_FIELDS)
    told["last_error"] = told.last_error and told.last_error[:NOTICE_CHARACTERS]
    return intentbus.to_json([move.before, move.event, told])


def brief(error):
    """Return the first line of what psycopg says, without a password that a URL may have had."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r":[^:@/\s\"]*@", ":***@", line)


# ---- The database ----

class PostgresClock:
    """The clock of the database, which is that of all buses: it is never corrected."""

    def __init__(self):
        self._ahead = 0     # of the steady clock of this machine, in seconds

    def now(self):
        """Return the time in Unix seconds."""
        return intentbus.steady_clock() + self._ahead

    def step(self):
        """Return 0: stored times are never moved."""
        return 0

    def note(self, step):
        """Return a record for resume(), which needs none."""
        return {}

    def resume(self, note):
        """Continue after a restart."""

    def set(self, db):
        """Find out how far the clock of the database is from the steady one, as exactly as the answer is quick."""
        asked = intentbus.steady_clock()
        (there,), = db.each(("SELECT EXTRACT(EPOCH FROM clock_timestamp())", None))[0]
        took = intentbus.steady_clock() - asked
        ahead = float(there) - asked - took / 2
        if abs(ahead - self._ahead) > CLOCK_SLACK_SECONDS + took / 2:
            self._ahead = ahead


class PostgresIds(intentbus.Ids):
    """Makes ids for several threads."""

    _one_at_a_time = threading.Lock()

    def new(self, now):
        """Return the next id."""
        with self._one_at_a_time:
            return super().new(now)


class SharedTokenBucket:
    """A token bucket per name, of all buses together: a memo ends when the bucket is full again (GCRA)."""

    def __init__(self, database, per_minute):
        self._database, self._cost_seconds = database, 60 / per_minute

    def take(self, name, number=1):
        """Take tokens, or give them back if number is negative; return how many seconds to wait if there are too few."""
        cost = number * self._cost_seconds
        taken = self._database.once(TAKE, dict(name=name, cost=cost, full=60, now=self._database.clock.now()))
        return 0 if taken else cost


class PostgresDatabase:
    """A PostgreSQL database that other buses use too, with the public methods of Database. A block is a transaction."""

    shared, in_round, commits_apart, warning = True, False, False, None

    def __init__(self, dsn):
        """Connect, and create the tables if there are none; raises SetupError."""
        self._dsn, self._complaints = dsn, {}
        self.clock, self.ids, self.passed_over = PostgresClock(), PostgresIds(), set()     # lanes whose intents others held
        self.token_bucket = functools.partial(SharedTokenBucket, self)
        self.rounds = Threads
        self.on_remote_change = lambda moves: None     # called, in a thread, with the moves of another bus
        self._closed, self._outbox, self._others, self._missed = threading.Event(), queue.SimpleQueue(), [], False
        try:
            with self._connect() as db:
                self.path = f"{db.info.dbname} of PostgreSQL at {db.info.host or 'this machine'}"
                if db.info.parameter_status("server_encoding") != "UTF8":
                    raise SetupError(f"The database {self.path} is not in UTF-8; make one with ENCODING 'UTF8'.")
                self.kin = f"intentbus {self._prepare(db)} "         # the start of the names of all buses on these tables
                self.name = self.kin + os.urandom(8).hex()           # of this bus: for the others to see, and its channel
                self.clock.set(db)
        except (psycopg.Error, UnicodeError) as error:
            raise SetupError(f"PostgreSQL cannot be used: {brief(error)}.") from error
        self._pool = psycopg_pool.ConnectionPool(
            self._dsn, connection_class=Connection, min_size=1, max_size=THREADS, timeout=POOL_SECONDS, open=True,
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

    # -- Blocks --

    def enter(self):
        """Begin a transaction, and return its connection."""
        with self._translating():
            db = self._pool.getconn()
            db.keep("BEGIN")
            return db

    def leave(self, db):
        """Commit a transaction."""
        with self._translating(lost=True):
            db.execute("COMMIT")
        self._pool.putconn(db)
        return True

    def undo(self, db, error):
        """Roll a transaction back, after an error; what psycopg raised becomes an error of the bus."""
        with contextlib.suppress(psycopg.Error):
            db.rollback()
        self._pool.putconn(db)
        with self._translating():
            if isinstance(error, psycopg.Error):
                raise error

    def read(self, statement, values=()):
        """Return the rows of a statement, outside of any transaction."""
        with self._translating(), self._pool.connection() as db:
            return db.each((statement, values))[0]

    def once(self, statement, values):
        """Run one statement that need not be on disk, over the network once, and return its rows."""
        with self._translating(), self._pool.connection() as db:
            db.keep("BEGIN")
            db.keep("SET LOCAL synchronous_commit = off")
            db.keep(statement, values)
            return db.execute("COMMIT")

    def sizes(self):
        """Return the bytes of the database, and 0: its log is the server's business."""
        return [self.read("SELECT pg_database_size(current_database())")[0][0], 0]

    def log_is_long(self):
        """Return False: the log is the server's business."""
        return False

    # -- The other buses --

    def others(self):
        """Return the names of the other buses that use these tables now."""
        return [name for name, in self.read(OTHERS, dict(buses=self.kin + "%", this=self.name))]

    def changed_elsewhere(self):
        """Return whether notices of other buses may have been missed. Lanes that were passed over are offered again."""
        passed_over, self.passed_over = self.passed_over, set()
        self.on_remote_change([Move(Intent(lane=lane, status="open", ready=1, due_at=None, publisher=None), "open", None)
                               for lane in passed_over])
        missed, self._missed = self._missed, False
        return missed

    def tell(self, moves):
        """Tell the other buses what this one has done."""
        if self._others:
            self._outbox.put([notice(move) for move in moves if move.intent.ready or move.event])

    def _tell_others(self):
        """Send what there is to tell, as much at a time as there is."""
        while not self._closed.is_set():
            notices = self._outbox.get()
            while not self._outbox.empty():
                notices += self._outbox.get()
            try:
                self.once(TELL, dict(buses=self._others + [self.name] * self._closed.is_set(), notices=notices))
            except intentbus.Error:
                self._others = []     # they are found again, and told to look

    def _listen(self):
        """Hear what other buses have done, and keep to the clock of the database, whatever happens to the connection."""
        while not self._closed.is_set():
            try:
                with self._connect(application_name=self.name) as db:
                    self._listen_at(db)
            except psycopg.Error as error:
                self._complain("This bus hears nothing of others", error)
            except Exception:
                traceback.print_exc()
            self._missed = True     # deaf, it looks by itself
            self._closed.wait(RECHECK_SECONDS)

    def _listen_at(self, db):
        db.execute(f'LISTEN "{self.name}"')
        self._complain("This bus hears nothing of others", None)
        self._others, self._missed = [], True
        self._pool.check()     # what ended the last connection of this thread has ended others
        while not self._closed.is_set():
            self.clock.set(db)
            self._meet(db)
            for heard in db.notifies(timeout=RECHECK_SECONDS):
                if self._closed.is_set() or not self._hear(heard.payload):
                    break

    def _meet(self, db):
        """Find out which other buses there are; a new one has been told nothing so far."""
        found = [name for name, in db.each((OTHERS, dict(buses=self.kin + "%", this=self.name)))[0]]
        new, self._others = set(found) - set(self._others), found
        if new:
            db.each((TELL, dict(buses=list(new), notices=[LOOK_AGAIN])))

    def _hear(self, heard):
        """Take in what another bus has done; return False if it says no more than that something was missed."""
        try:
            before, event, told = json.loads(heard)
            self.on_remote_change([Move(Intent(told, publisher=None), before, event)])
            return True
        except (KeyError, TypeError, ValueError):     # LOOK_AGAIN, or from a bus of another version
            self._missed = True
            return False

    # -- Connections --

    def _options(self, **options):
        return dict(autocommit=True, client_encoding="UTF8", connect_timeout=CONNECT_SECONDS,
                    keepalives_idle=SILENT_SECONDS, keepalives_interval=1, keepalives_count=3,
                    tcp_user_timeout=1000 * SILENT_SECONDS, **options)

    def _connect(self, **options):
        return Connection.connect(self._dsn, **self._options(**options))

    @contextlib.contextmanager
    def _translating(self, lost=False):
        """Turn what psycopg raises about the database into errors of the bus; lost: it may have been committed."""
        try:
            yield
            self._complain("PostgreSQL cannot be used", None)
        except psycopg.errors.DeadlockDetected as error:
            raise intentbus.RoundLost(error) from error
        except psycopg.errors.DiskFull as error:
            raise intentbus.StorageFull("The disk under PostgreSQL is full; nothing of this request was stored.") from error
        except (psycopg.IntegrityError, psycopg.ProgrammingError):     # a bug, not the database
            raise
        except psycopg.Error as error:
            self._missed = self._missed or lost     # if it was committed all the same, everyone is to look
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
        db.keep("BEGIN")
        db.keep("SELECT pg_advisory_xact_lock(:key)", dict(key=APPLICATION_ID))
        (ours, intents), = db.execute("SELECT to_regclass('intentbus'), to_regclass('intents')")
        if intents and not ours:
            raise SetupError(f"The database {self.path} has a table intents of another program; give the bus another one.")
        version = ours and db.execute("SELECT MAX(version) FROM intentbus")[0][0] or 0
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        if version < len(MIGRATIONS):     # a role that may not create anything can run a bus that is there
            db.keep("CREATE TABLE IF NOT EXISTS intentbus (version INTEGER NOT NULL)")
            for statement in [*intentbus.statements_since(version), *(TUNED.split(";") if not version else ())]:
                db.keep(statement.replace("TEXT", 'TEXT COLLATE "C"'))     # lanes and ids are compared as bytes
            db.keep("DELETE FROM intentbus")
            db.keep("INSERT INTO intentbus VALUES (:version)", dict(version=len(MIGRATIONS)))
        (tables,), = db.execute("SELECT CAST(CAST('intents' AS regclass) AS oid)")
        db.execute("COMMIT")
        return tables


class Threads:
    """Does what Rounds does, with each job in one of a few standing threads; what it brings back for memory goes to the loop."""

    def __init__(self, loop):
        self._loop, self._api, self._store = loop, loop.api, loop.api.bus.store
        self._jobs, self._attempting, self._again = queue.SimpleQueue(), set(), set()     # held requests
        committed, database = self._store.on_commit, self._store.database
        self._store.on_commit = lambda blocks: loop.hand_over(self._learn_own, (committed, blocks))
        database.on_remote_change = lambda moves: loop.hand_over(self._learn_remote, moves)
        for _ in range(THREADS):
            threading.Thread(target=self._run, daemon=True).start()

    def submit(self, connection):
        """Take in the request of a connection."""
        self._jobs.put((connection, functools.partial(self._api.handle, connection.request)))

    def ask(self, run, connection=None):
        """Take in another job."""
        self._jobs.put((connection, run))

    def expire(self, held):
        """Take in a held request whose time is over."""
        if held in self._attempting:     # it may be about to get something
            return self._loop.arm(held.connection, RECHECK_SECONDS)
        self._jobs.put((held.connection, functools.partial(self._api.expire, held)))

    def attempt_all(self, key=None):
        """Attempt the requests that are held for a key, or all of them."""
        for held in self._loop.waiting.all(key):
            self._attempt(held)

    def learn(self, moves):
        """Attempt the held requests that moves give something to, one for each intent that got ready."""
        for intent, _, event in moves:
            if intent.ready and (held := self._loop.waiting.first(covering_lanes(intent.lane), self._attempting)
                                 or self._loop.waiting.first(covering_lanes(intent.lane), ())):
                self._attempt(held)
            elif intent.ended:
                self.attempt_all(intent.id)
        if any(event for _, _, event in moves):
            self.attempt_all(intentbus.EVENT_KEY)

    def delay(self):
        """Return float("inf"): the threads work by themselves."""
        return float("inf")

    def work(self):
        """Do nothing: the threads work by themselves."""

    def _attempt(self, held):
        if held in self._attempting:
            self._again.add(held)     # it may have looked too early
        else:
            self._attempting.add(held)
            self._jobs.put((held, functools.partial(self._api.attempt, held)))

    def _learn_own(self, done):
        committed, blocks = done
        committed(blocks)
        self._store.database.tell([move for block in blocks for move in block.moves])

    def _learn_remote(self, moves):
        self._api.bus.learn(moves, ours=False)
        self.learn(moves)

    def _run(self):
        """Run jobs, in a thread."""
        while True:
            subject, run = self._jobs.get()
            outcome = None
            for _ in range(ATTEMPTS):
                try:
                    outcome = run()
                    break
                except intentbus.RoundLost as error:     # a deadlock: nothing of it is stored
                    outcome = subject and self._api.refuse(subject.request, error.cause)
            self._loop.hand_over(self._done, (subject, outcome))

    def _done(self, done):
        """Take in the outcome of a job, in the loop."""
        subject, outcome = done
        if isinstance(subject, Held):
            self._attempting.discard(subject)
            if subject.connection.held is not subject:
                return
            if outcome is None and subject in self._again:
                self._again.discard(subject)
                return self._attempt(subject)
            self._again.discard(subject)
            subject = subject.connection
        self._loop.deliver(subject, outcome)
        if isinstance(outcome, Held) and outcome.keys:     # what came between its look and now is in the next look
            self._attempt(outcome)


def open_store(dsn):
    """Return the store of a PostgreSQL database."""
    return intentbus.Store(PostgresDatabase(dsn), transaction=PostgresTransaction)


def main(arguments):
    """Run intentbus.py serve on the database that the first argument or BUS_DB_PATH names."""
    if arguments[:1] == ["serve"]:
        del arguments[0]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    dsn = arguments.pop(0) if arguments and not arguments[0].startswith("-") else os.environ.get("BUS_DB_PATH")
    if not dsn:
        intentbus.log("which PostgreSQL? Give its URL first, or set BUS_DB_PATH.")
        return 2
    try:
        return intentbus.main(["serve", *arguments], open_store(dsn))
    except SetupError as error:
        intentbus.log(error)
        return 2


application = intentbus.WsgiApplication(lambda: open_store(os.environ["BUS_DB_PATH"]))     # under WSGI
logging.getLogger("psycopg").setLevel(logging.ERROR)     # the pool tries again, and requests say the rest

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
