#!/usr/bin/env python3
"""The bus on PostgreSQL: any number of buses, on any number of machines, behind one load balancer, over one database.

    pip install "psycopg[binary]>=3.3"
    python3 examples/postgres_bus.py postgresql://bus@db.example/bus --port 8787      and all other flags of intentbus.py serve

All buses need the same owner key: BUS_SECRET, or the same ~/.apikey. The database must be in UTF-8; the first start creates
its tables. BUS_DB_PATH can name it too; a password belongs in ~/.pgpass. A URL with several hosts and
target_session_attrs=read-write follows a failover. This was run on PostgreSQL 15.

    PostgresTransaction   the statements that differ on PostgreSQL
    Connection            takes statements as the Store writes them, and sends several at once
    PostgresDatabase      takes the place of Database: transactions, notices to the other buses, the clock that all share
    Threads               takes the place of Rounds: a transaction for each request, on a few standing threads
"""

import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import queue
import re
import sys
import threading

try:
    import psycopg
except ImportError as missing:
    print(f'postgres_bus: {missing}. Run: pip install "psycopg[binary]>=3.3"', file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

import intentbus
from intentbus import (ALL, CLAIMED_BY_KEY, CLAIMED_WITH, COLUMNS, DELETE, DUE, DUE_SCHEDULES, EXPIRED, FORGET_THESE, IN_RANGE, KINDS,
                       MIGRATIONS, OLD, OLD_VALUE, ONE, ONE_SCHEDULE, ORDER, RECHECK_SECONDS, TALLY, TWIN, Held, Intent, Move, SetupError)

THREADS = 10                # of one bus, each with a connection; PostgreSQL allows 100 connections by default
CONNECT_SECONDS = 5         # how long to wait for a server to answer
SILENT_SECONDS = 8          # how long to wait for a server that has vanished
CANDIDATES = 16             # of a claim; other claims may hold the first ones
LOOKS = 4                   # of a claim that finds all candidates locked; each sees what was published meanwhile
ERROR_CHARACTERS = 500      # of an error in a notice; PostgreSQL takes 7,999 bytes
NOTICE_FIELDS = (*intentbus.EVENT_FIELDS, "lane", "ready", "due_at", "limited")
LOOK_AGAIN = "[]"           # the notice to buses that may have missed others
CLOCK_SLACK_SECONDS = 0.05  # smaller differences come from the network


# ---- SQL ----

SETTINGS = """
    SET lock_timeout = '3s'; SET idle_in_transaction_session_timeout = '5s';
    SET default_transaction_isolation = 'read committed'; SET plan_cache_mode = force_generic_plan; SET jit = off;
    -- each statement has its index, whatever the statistics say of a table that has just grown
    SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off;
    SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'
"""
TUNE = """
    ALTER TABLE tallies DROP CONSTRAINT tallies_pkey;     -- rows of one kind are added up: no transaction waits for another
    ALTER TABLE intents SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 20000,
                             autovacuum_vacuum_cost_delay = 0)
"""
SELECTIONS = [IN_RANGE.format(columns=ALL, kind=kind) for kind in KINDS]
ID_SELECTIONS = [IN_RANGE.format(columns="id", kind=kind) for kind in KINDS]
INSTEAD = {     # of a statement of the Store, because other buses change rows at the same time
    **{found: found + " FOR UPDATE" for found in (ONE, ONE_SCHEDULE, CLAIMED_WITH, CLAIMED_BY_KEY, TWIN["open"], OLD_VALUE, *SELECTIONS)},
    **{due: due + " FOR UPDATE SKIP LOCKED" for due in (DUE, DUE_SCHEDULES)},
    **{DELETE.format(which=ids): DELETE.format(which=ids + " FOR UPDATE") for ids in ID_SELECTIONS},
    DELETE.format(which=OLD): DELETE.format(which=OLD + " FOR UPDATE SKIP LOCKED"),
    FORGET_THESE.format(which=EXPIRED): FORGET_THESE.format(which=EXPIRED + " FOR UPDATE SKIP LOCKED"),
    TALLY: "INSERT INTO tallies VALUES (:namespace, :publisher, :status, :intents, :bytes)",
}
FOLD_TALLIES = """
    WITH folded AS (DELETE FROM tallies RETURNING namespace, publisher, status, intents, bytes)
    INSERT INTO tallies
    SELECT   namespace, publisher, status, SUM(intents), SUM(bytes)
    FROM     folded
    GROUP BY namespace, publisher, status
    HAVING   SUM(intents) <> 0 OR SUM(bytes) <> 0
"""
READY = f"""
    SELECT   id, lane, priority, run_at, claim_attempts, created_at
    FROM     intents
    WHERE    ready = 1
    AND      {{column}} = wanted.{{column}}{{more}}
    ORDER BY {ORDER}
    LIMIT    {CANDIDATES}
"""
CLAIMED = """
    SELECT COUNT(*)
    FROM   intents
    WHERE  limited = 1
    AND    status = 'claimed'
    AND    namespace = limits.namespace
    AND    goal = limits.goal
"""
FIRST_FREE = f"""
    WITH RECURSIVE limited (goal, is_full) AS MATERIALIZED (
        SELECT goal, paused = 1 OR running <= ({CLAIMED}) OR goal = ANY (:without::TEXT[])
        FROM   limits
        WHERE  namespace = :namespace
    ), {{candidates}}
        ORDER BY   {ORDER}
        LIMIT      {CANDIDATES}
    )
    SELECT    seen.best, seen.any_full, free.goal = ANY (ARRAY(SELECT goal FROM limited)), free.*
    FROM      (SELECT (SELECT lane FROM candidates LIMIT 1), EXISTS (SELECT FROM limited WHERE is_full)) AS seen (best, any_full)
    LEFT JOIN (     -- the first candidate that no other transaction holds
        SELECT     free.*
        FROM       candidates
        CROSS JOIN LATERAL (     -- the plus sign keeps PostgreSQL to the primary key
            SELECT {ALL} FROM intents WHERE id = candidates.id AND +ready = 1 FOR UPDATE SKIP LOCKED
        ) AS free
        LIMIT      1
    ) AS free ON TRUE
    WHERE     seen.best IS NOT NULL
    OR        seen.any_full
"""
FIRST_FREE_BY_LANE = FIRST_FREE.format(candidates=f"""
    wanted (lane, stop) AS (     -- one step in the index for each lane
        SELECT start COLLATE "C", stop
        FROM   unnest(:starts::TEXT[], :stops::TEXT[]) AS ranges (start, stop)
        UNION ALL
        SELECT (SELECT MIN(lane) FROM intents WHERE ready = 1 AND lane > wanted.lane AND lane < stop), stop
        FROM   wanted
        WHERE  lane IS NOT NULL
    ), candidates AS (
        SELECT     ready.*
        FROM       wanted
        CROSS JOIN LATERAL ({READY.format(column="lane", more="")}) AS ready
        WHERE      :publisher IN ('', split_part(wanted.lane, chr(9), 6))
        AND        split_part(wanted.lane, chr(9), 5) <> ALL (ARRAY(SELECT goal FROM limited WHERE is_full))
""")
FIRST_FREE_BY_PLACE = FIRST_FREE.format(candidates=f"""
    candidates AS (     -- none if a goal is full, whose intents could be the first ones of a place
        SELECT     ready.*
        FROM       unnest(:places::TEXT[]) AS wanted (place)
        CROSS JOIN LATERAL ({READY.format(column="place", more="")}) AS ready
        WHERE      NOT EXISTS (SELECT FROM limited WHERE is_full)
        UNION ALL
        SELECT     ready.*
        FROM       unnest(:public_places::TEXT[]) AS wanted (place)
        CROSS JOIN LATERAL ({READY.format(column="place", more=" AND visibility = 'public' AND owner = :publisher")}) AS ready
        WHERE      NOT EXISTS (SELECT FROM limited WHERE is_full)
""")
ROOM = f"""
    SELECT goal
    FROM   limits
    WHERE  namespace = :namespace
    AND    goal = :goal
    AND    paused = 0
    AND    COALESCE(running, 1001) > ({CLAIMED})
"""
TAKE = """
    INSERT INTO memos (kind, owner, key, value, expires_at)
    VALUES      ('rate', '', :name, '', :now + :cost::FLOAT)
    ON CONFLICT (kind, owner, key) DO UPDATE
    SET         expires_at = GREATEST(memos.expires_at, :now) + :cost
    WHERE       :force OR GREATEST(memos.expires_at, :now) + :cost <= :now + 60::FLOAT     -- a minute's rate fills it
    RETURNING   expires_at
"""
TIME_AND_BUSES = """
    SELECT EXTRACT(EPOCH FROM clock_timestamp()), ARRAY(
        SELECT pid
        FROM   pg_stat_activity
        WHERE  datname = current_database()
        AND    application_name = :channel
        AND    pid <> pg_backend_pid()
    )
"""
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"     # until the transaction has ended
TRY_LOCK = LOCK.replace("pg_", "pg_try_")
KNOW_LIMITS = "LOCK TABLE limits IN ROW SHARE MODE"     # of a claim: no limit changes before its transaction has ended
CHANGE_LIMITS = "LOCK TABLE limits IN EXCLUSIVE MODE"     # waits for all claims
NOTIFY = "SELECT pg_notify(:channel, notice) FROM unnest(:notices::TEXT[]) AS notice"


@functools.lru_cache(maxsize=256)
def first_free(lanes, by_lane):
    """Return the statement that finds the first free intent for the lanes of a claim, and its values.

    Lanes without a goal are looked through by place, or by lane: beside goals that are full.
    """
    namespace, *_, publisher = lanes[-1].split("\t")     # the last lane is public; its publisher is that of the claim, if any
    if by_lane:
        starts, stops = zip(*map(intentbus.lane_range, lanes))
        return FIRST_FREE_BY_LANE, dict(namespace=namespace, publisher=publisher, starts=starts, stops=stops)
    places, public_places = ([lane.rsplit("\t", 2)[0] for lane in lanes if lane.endswith("\t") is any_publisher]
                             for any_publisher in (True, False))
    return FIRST_FREE_BY_PLACE, dict(namespace=namespace, publisher=publisher, places=places, public_places=public_places)


class PostgresTransaction(intentbus.Transaction):
    """A block on PostgreSQL, which is a transaction of its own."""

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if error is None:
            self._store.database.tell(self.moves)

    def claimable(self, lanes, key_id, token_hash=None):
        """Do as in Transaction, in one round trip. Intents that other transactions hold are passed over, and offered later.

        An intent of a limited goal takes two: other buses may have claimed others meanwhile, and one counts at a time.
        """
        database, asked, without = self._store.database, [], []     # without: goals
        if token_hash:
            self._db.keep(LOCK, dict(name=token_hash))     # the same claim may be under way at another bus
            asked.append((CLAIMED_WITH, dict(token_hash=token_hash, key_id=key_id)))
        self._db.keep(KNOW_LIMITS)
        best, by_lane = None, database.goals_full or bool(lanes[0].split("\t")[4])     # if it names a goal
        for _ in range(LOOKS):
            statement, values = first_free(lanes, by_lane)
            *claimed, found = self._db.each(*asked, (statement, dict(values, without=without)))
            if claimed and claimed[0]:
                return Intent(zip(COLUMNS, claimed[0][0]))
            seen, full, limited, *columns = found[0] if found else (None, False, False)
            best, database.goals_full = seen or best, full
            if not seen and (by_lane or not full):
                return None
            intent = Intent(zip(COLUMNS, columns), **{"limited": 1} if limited else {})
            if intent.id and (not limited or self._is_within(intent, wait=not without)):
                return intent
            by_lane = by_lane or full or limited
            without += [intent.goal] if limited else []
        database.passed_over.add(best)

    def twin(self, intent, statuses=tuple(TWIN)):
        """Do as in Transaction; a publish waits for others of unique values.

        A report does not, since it holds the row of its intent, for which a publish may wait; the index keeps it from opening a
        second one.
        """
        if "claimed" in statuses:
            self._db.keep(LOCK, dict(name=f"{self._store.database.channel} unique"))
        return super().twin(intent, statuses)

    def _has_room(self, of):
        return True     # claimable() finds out

    def _is_within(self, intent, wait):
        """Return whether an intent of a limited goal may be claimed; no other block counts before this one has ended.

        Only the first such lock of a block may be waited for: two blocks could wait for each other.
        """
        name = "\t".join((self._store.database.channel, "limits", intent.namespace, intent.goal))
        (locked,), room = self._db.each((LOCK if wait else TRY_LOCK, dict(name=name)),
                                        (ROOM, dict(namespace=intent.namespace, goal=intent.goal)))
        if locked[0] is False:
            self._store.database.passed_over.add(intent.lane)
        return locked[0] is not False and bool(room)

    def limit(self, namespace, goal):
        """Do as in Transaction, once all claims have ended that do not know of the change."""
        self._db.keep(CHANGE_LIMITS)
        return super().limit(namespace, goal)

    def next_due(self):
        """Return when to look for due intents next: soon, since other transactions may be adding some."""
        return min(super().next_due(), self.now + RECHECK_SECONDS)

    def tally_of(self, publisher):
        """Do as in Transaction; no other bus adds to the tally before this block has ended."""
        self._db.keep(LOCK, dict(name=f"{self._store.database.channel} {publisher}"))
        return super().tally_of(publisher)

    def set_value(self, owner, key, *value):
        """Do as in Transaction; no other block sets this value before this one has ended, so each counts what it replaces."""
        self._db.keep(LOCK, dict(name=f"{self._store.database.channel} value {owner} {key}"))
        return super().set_value(owner, key, *value)

    def revoke_key(self, key_id):
        """Do as in Transaction, and tell the other buses."""
        self.after_commit(self._store.database.tell_revoked, key_id)
        return super().revoke_key(key_id)

    def forget_expired(self, rows):
        """Do as in Transaction, and fold the tallies."""
        self._db.keep(FOLD_TALLIES)
        return super().forget_expired(rows)


# ---- A connection ----

PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)")
numbers = itertools.count()


@functools.lru_cache(maxsize=None)
def plan_of(statement):
    """Return the PREPARE of a statement of the Store, or None; its EXECUTE; the names of its values; whether it has rows."""
    statement = INSTEAD.get(statement, statement)
    names = PARAMETER.findall(statement)
    has_rows = "RETURNING" in statement or statement.lstrip().startswith(("SELECT", "WITH"))
    if not names or "IS NULL OR" in statement:     # PostgreSQL knows the type of such a parameter from its value only
        return None, PARAMETER.sub("%s", statement).encode(), names, has_rows
    names, name = list(dict.fromkeys(names)), f"plan_{next(numbers)}"
    text = PARAMETER.sub(lambda parameter: f"${names.index(parameter[1]) + 1}", statement)
    execute = f"EXECUTE {name} ({', '.join(['%s'] * len(names))})"
    return f"PREPARE {name} AS {text}".encode(), execute.encode(), names, has_rows


def storable(value):
    """Return a value without NUL, which TEXT cannot hold: U+2400, the picture of it, takes its place."""
    return value.replace("\0", "\u2400") if isinstance(value, str) else value


class Connection(psycopg.Connection):
    """A connection that takes statements as the Store writes them.

    Each is planned once. A change that returns no rows is sent with the next statement that does, or with COMMIT.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._texts, self._planned = [], set()     # to be sent; PREPAREs that were sent
        self._quoted, self._sender = psycopg.pq.Escaping(self.pgconn).escape_literal, self.cursor()

    def keep(self, statement, values=None):
        """Send a statement with the next one; return its place among them, or None if it has no rows."""
        prepare, execute, names, has_rows = plan_of(statement)
        if prepare and prepare not in self._planned:
            self._planned.add(prepare)
            self._texts.append(prepare)
        self._texts.append(execute % tuple([self._literal(values[name]) for name in names]))
        return len(self._texts) - 1 if has_rows else None

    def _literal(self, value):
        """Return a value as it is written in SQL."""
        if isinstance(value, str):
            return self._quoted(storable(value).encode())
        if isinstance(value, (list, tuple)):
            return b"ARRAY[" + b", ".join(map(self._literal, value)) + b"]::TEXT[]"
        return b"NULL" if value is None else repr(value).encode()

    def executemany(self, statement, rows):
        """Run a statement that returns nothing for each row of values."""
        for row in rows:
            self.keep(statement, row)

    def execute(self, statement, values=None):
        """Run a statement; return its rows, if it has any."""
        place = self.keep(statement, values)
        return [] if place is None else self._send(place)[0]

    def each(self, *asked):
        """Run several (statement, values), all with rows, in one round trip; return the rows of each."""
        return self._send(*[self.keep(statement, values) for statement, values in asked])

    def commit(self):
        """Send what is kept, and COMMIT."""
        self.keep("COMMIT")
        self._send()

    def rollback(self):
        """Undo what was sent, and forget what was kept."""
        self._planned.difference_update(self._texts)
        self._texts = [b"ROLLBACK"]
        self._send()

    def _send(self, *places):
        """Send what is kept; return the rows of the statements at these places."""
        texts, self._texts = self._texts, []
        self._sender.execute(b";".join(texts))
        found = []
        for place in places:
            self._sender.set_result(place)
            found.append(self._sender.fetchall())
        return found


def brief(error):
    """Return the first line of what psycopg says, without a password that a URL may hold."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return re.sub(r":[^:@/\s\"]*@", ":***@", line)


# ---- The database ----

class PostgresClock(intentbus.Clock):
    """The clock of the database, which all buses use. Stored times are never moved."""

    _ahead = 0     # of the steady clock of this machine, in seconds

    def now(self):
        """Return the time in Unix seconds."""
        return intentbus.steady_clock() + self._ahead

    def step(self):
        """Return 0: a step is taken over as it is."""
        return 0

    def resume(self, record):
        """Do nothing: the database has gone on."""

    def set(self, asked, answer):
        """Take over the time of the database, asked for at a time of the steady clock; a slow answer is an inexact one."""
        took = intentbus.steady_clock() - asked
        ahead = answer - asked - took / 2
        if abs(ahead - self._ahead) > CLOCK_SLACK_SECONDS + took / 2:
            self._ahead = ahead


class SharedTokenBucket:
    """A token bucket per name, of all buses together: a memo ends when the bucket is full again (GCRA)."""

    def __init__(self, database, per_minute):
        self._database, self._cost_seconds = database, 60 / per_minute

    def take(self, name, number=1, force=False):
        """Do as TokenBucket does."""
        cost = number * self._cost_seconds
        taken = self._database.run_unsynced(TAKE, dict(name=name, cost=cost, force=force, now=self._database.clock.now()))
        return 0 if taken else cost

    def delay(self, name):
        """Return 0, without a round trip: take() tells."""
        return 0


class PostgresDatabase:
    """A PostgreSQL database that other buses use too, with the methods of Database that are called outside of rounds."""

    shared, in_round, new, warning = True, False, False, None

    def __init__(self, dsn):
        """Connect, and create the tables if there are none; raises SetupError."""
        self.clock, self.rounds, self.token_bucket = PostgresClock(), Threads, functools.partial(SharedTokenBucket, self)
        self.passed_over = set()     # lanes of intents that claims found locked
        self.goals_full = False      # whether the last claim found a goal that was; the next one expects the same
        self.others = set()          # backends through which other buses listen
        self.missed = False          # whether other buses may have done what this one was not told
        self.on_remote_moves, self.on_close = lambda moves: setattr(self, "missed", True), lambda: None     # in any thread
        self.on_remote_revoke = lambda key_id: None
        self._dsn, self._free, self._troubled = dsn, collections.deque(), False     # _free: connections
        self._id, self._outbox, self._closed = os.urandom(8).hex(), queue.SimpleQueue(), threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._listen, self._notify)]
        try:
            with self._connect() as db:
                self.path = f"{db.info.dbname} of PostgreSQL at {db.info.host or 'this machine'}"
                if db.info.parameter_status("server_encoding") != "UTF8":
                    raise SetupError(f"The database {self.path} is not in UTF-8; make one with ENCODING 'UTF8'.")
                self.channel = f"intentbus {self._prepare(db)}"
                self.meet(db)
        except (psycopg.Error, UnicodeError) as error:
            raise SetupError(f"PostgreSQL cannot be used: {brief(error)}.") from error

    def listen(self):
        """Begin to hear of other buses, and to tell them."""
        for thread in self._threads:
            thread.start()

    def close(self):
        """Let go of the database."""
        self._closed.set()
        self.on_close()
        self._outbox.put([LOOK_AGAIN])     # reaches the listener of this bus, too
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(RECHECK_SECONDS)
        self._close_free()

    # -- Transactions --

    def enter(self):
        """Begin a transaction, and return its connection."""
        db = self._take()
        db.keep("BEGIN")
        return db

    def leave(self, db):
        """Commit a transaction; return True."""
        db.commit()
        self._free.append(db)
        return True

    def undo(self, db, error):
        """Roll a transaction back. An error of psycopg ends its connection too, and becomes one of the bus."""
        if not isinstance(error, psycopg.Error):
            with contextlib.suppress(psycopg.Error):
                db.rollback()
                return self._free.append(db)
        if db.closed or isinstance(error, psycopg.errors.ReadOnlySqlTransaction):     # other connections are lost, too
            self._close_free()
            self.missed = True     # if it was committed all the same, every bus has to look
            self._outbox.put([LOOK_AGAIN])
        db.close()
        if isinstance(error, psycopg.Error):
            raise self._translated(error) from error

    def read(self, statement, values=()):
        """Return the rows of a statement, outside of any transaction."""
        with self._lent() as db:
            return db.execute(statement, values)

    def run_unsynced(self, statement, values):
        """Run one statement that need not be on disk, in one round trip; return its rows."""
        with self._lent() as db:
            db.keep("SET LOCAL synchronous_commit = off")     # statements that are sent at once are one transaction
            return db.execute(statement, values)

    def sizes(self):
        """Return the bytes of the database, and 0 for its log, which the server looks after."""
        return self.read("SELECT pg_database_size(current_database())")[0][0], 0

    def _take(self):
        with contextlib.suppress(IndexError):
            return self._free.pop()
        try:
            return self._connect()
        except psycopg.Error as error:
            raise self._translated(error) from error

    @contextlib.contextmanager
    def _lent(self):
        db = self._take()
        try:
            yield db
        except Exception as error:
            self.undo(db, error)
            raise
        self._free.append(db)

    def _connect(self, **options):
        """Return a new connection. It notices within SILENT_SECONDS that the server has vanished."""
        db = Connection.connect(self._dsn, autocommit=True, prepare_threshold=None, client_encoding="UTF8",
                                connect_timeout=CONNECT_SECONDS, keepalives_idle=SILENT_SECONDS, keepalives_interval=1,
                                keepalives_count=3, tcp_user_timeout=1000 * SILENT_SECONDS, **options)
        db.keep(SETTINGS)
        db.commit()
        self._log_trouble()
        return db

    def _close_free(self):
        with contextlib.suppress(IndexError):
            while True:
                self._free.pop().close()

    def _translated(self, error):
        """Return the error of the bus for an error of psycopg; a bug stays as it is."""
        if isinstance(error, psycopg.errors.UniqueViolation) and error.diag.constraint_name == "intents_unique":
            return intentbus.Unavailable("Another request has just opened an intent of the same unique value; try again.")
        if isinstance(error, (psycopg.IntegrityError, psycopg.ProgrammingError)):
            return error
        if isinstance(error, psycopg.errors.DiskFull):
            return intentbus.StorageFull("The disk under PostgreSQL is full; nothing of this request was stored.")
        self._log_trouble(error)
        return intentbus.Unavailable("PostgreSQL cannot be used just now; the bus says on its stderr why.")

    def _log_trouble(self, error=None):
        """Log an error, or that all is well, once; an answer does not say it, since it may name hosts and users."""
        if bool(error) != self._troubled:
            self._troubled = bool(error)
            intentbus.log(f"PostgreSQL cannot be used: {brief(error)}. Trying again." if error
                          else "PostgreSQL can be used again.")

    def _prepare(self, db):
        """Bring the tables to the schema of this version; return what names them. One bus does so at a time."""
        db.keep("BEGIN")
        db.keep(LOCK, dict(name="intentbus"))
        (ours, intents), = db.execute("SELECT to_regclass('intentbus'), to_regclass('intents')")
        if intents and not ours:
            raise SetupError(f"The database {self.path} has a table intents of another program; give the bus another one.")
        version = ours and db.execute("SELECT MAX(version) FROM intentbus")[0][0] or 0
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        if version < len(MIGRATIONS):     # a role that may not create anything can run a bus on tables that are there
            tune = () if version else TUNE.split(";")
            for statement in ("CREATE TABLE IF NOT EXISTS intentbus (version INTEGER NOT NULL)", "DELETE FROM intentbus",
                              *";".join(MIGRATIONS[version:]).split(";"), *tune):
                db.keep(statement.replace("TEXT", 'TEXT COLLATE "C"'))     # lanes and ids are compared as bytes
            db.keep("INSERT INTO intentbus VALUES (:version)", dict(version=len(MIGRATIONS)))
        (tables,), = db.execute("SELECT 'intents'::REGCLASS::OID")
        db.commit()
        return tables

    # -- Other buses --

    def meet(self, db):
        """Set the clock; return the backends of PostgreSQL through which other buses listen."""
        asked = intentbus.steady_clock()
        (now, backends), = db.execute(TIME_AND_BUSES, dict(channel=self.channel))
        self.clock.set(asked, float(now))
        return set(backends)

    def changed_elsewhere(self):
        """Return whether notices of other buses may have been missed since the last call."""
        missed, self.missed = self.missed, False
        return missed

    def tell(self, moves):
        """Tell the other buses what this one has done."""
        if moves and self.others:
            self._outbox.put([self._notice(move) for move in moves
                              if move.intent.ready or move.event or intentbus.makes_room(move)])

    def tell_revoked(self, key_id):
        """Tell the other buses that a key was revoked."""
        self._outbox.put([intentbus.to_json([self._id, "revoked", key_id])])

    def _notice(self, move):
        told = move.intent.pick(NOTICE_FIELDS)
        told["last_error"] = told.last_error and told.last_error[:ERROR_CHARACTERS]
        return intentbus.to_json([self._id, move.event, told])

    def _notify(self):
        """Send what there is to tell, in a thread: a transaction with a notice would hold up all others."""
        while not self._closed.is_set():
            notices = self._outbox.get()
            while not self._outbox.empty():
                notices += self._outbox.get()
            try:
                self.run_unsynced(NOTIFY, dict(channel=self.channel, notices=notices))
            except intentbus.Error:
                self.others = set()     # once they are found again, they are told to look

    def _listen(self):
        """Hear what other buses have done, in a thread, whatever happens to the connection."""
        while not self._closed.is_set():
            try:
                with self._connect(application_name=self.channel) as db:
                    self._listen_on(db)
            except psycopg.Error as error:
                self._log_trouble(error)
            except Exception as error:
                intentbus.log_traceback("a notice failed", error)
            self._closed.wait(RECHECK_SECONDS)

    def _listen_on(self, db):
        db.keep(f'LISTEN "{self.channel}"')
        db.commit()
        self.others, self.missed = set(), True
        self._close_free()     # what ended the last connection of this thread has ended others
        self._outbox.put([LOOK_AGAIN])     # introduces this bus
        while not self._closed.is_set():
            others, known = self.meet(db), self.others
            self.others = others
            if others - known:     # they have been told nothing so far
                self._outbox.put([LOOK_AGAIN])
            for notice in db.notifies(timeout=RECHECK_SECONDS):
                if self._closed.is_set() or not self._hear(notice.payload):
                    break

    def _hear(self, notice):
        """Take in what another bus has done; return False if it says no more than that something was missed."""
        try:
            bus, event, told = json.loads(notice)
            if bus != self._id and event == "revoked":
                self.on_remote_revoke(told)
            elif bus != self._id:
                self.on_remote_moves([Move(Intent(told), event)])
            return True
        except (KeyError, TypeError, ValueError):     # LOOK_AGAIN, or from a bus of another version
            self.missed = True
            return False


class Threads:
    """Does what Rounds does, with each job in one of a few standing threads, and its effects on memory in the loop.

    A job is (request, held, run): run() returns what to answer. held is the Held of that request, if it is held. Without a
    request, the job is housekeeping.
    """

    def __init__(self, loop):
        self._loop, self._api, store = loop, loop.api, loop.api.bus.store
        self._jobs, self._done, self._offer_at, self._database = queue.SimpleQueue(), threading.local(), 0, store.database
        self._busy = {}     # held request that has a job: [what to run after it, lanes with an intent that it was offered]
        self._take_in, store.on_commit = store.on_commit, self._committed
        self._database.on_remote_moves = functools.partial(loop.hand_over, self._learn_remote)
        self._database.on_remote_revoke = functools.partial(loop.hand_over, loop.end_held)
        self._database.on_close = lambda: [self._jobs.put(None) for _ in range(THREADS)]
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, request):
        """Take in a request."""
        self._jobs.put((request, None, functools.partial(self._api.handle, request)))

    def go_on(self, unfinished):
        """Take in the next slice of a long operation."""
        self._jobs.put((unfinished.request, None, functools.partial(self._api.go_on, unfinished)))

    def keep_house(self, housekeeping):
        """Take in a function that does what is due, and returns whether it could."""
        self._jobs.put((None, None, housekeeping))

    def expire(self, held):
        """Take in a held request whose time is over."""
        self._run(held, self._api.expire)

    def attempt_all(self, *keys):
        """Attempt the requests that are held for any of these keys."""
        for held in {held for key in keys for held in self._loop.waiting.all(key)}:
            self._run(held, self._api.attempt)

    def look_again(self):
        """Attempt all held requests, after notices were missed."""
        self.attempt_all(*self._loop.waiting.keys())

    def learn(self, moves):
        """Attempt the held requests that moves give something to, one for each intent that got ready."""
        for move in moves:
            if move.intent.ready:
                self._offer(move.intent.lane)
            elif move.intent.ended or move.event is None:     # it has ended, or its worker has told of its progress
                self.attempt_all(move.intent.id)
        if self._loop.waiting and (changed := {(move.intent.namespace, move.intent.goal): move.event == "limited"
                                               for move in moves if intentbus.makes_room(move)}):
            self._jobs.put((None, None, functools.partial(self._look_for_room, changed)))
        owners = {owner for move in moves if move.event for owner in (move.intent.owner, move.intent.claim_owner, None)}
        self.attempt_all(*map(intentbus.event_key, owners))

    def delay(self):
        """Return float("inf"): the threads work by themselves."""
        return float("inf")

    def work(self):
        """Offer the intents that claims found locked; once in RECHECK_SECONDS."""
        if self._loop.now >= self._offer_at:
            self._offer_at = self._loop.now + RECHECK_SECONDS
            passed_over, self._database.passed_over = self._database.passed_over, set()
            for lane in passed_over:
                self._offer(lane)

    def _offer(self, lane):
        """Attempt the claim that is held longest for a lane, if possible one that has no job."""
        lanes, waiting = intentbus.covering_lanes(lane), self._loop.waiting
        if held := waiting.first(lanes, self._busy) or waiting.first(lanes):
            self._run(held, self._api.attempt, lane)

    def _look_for_room(self, changed):
        """Have the loop offer the intents of goals that have room, in a thread: to one claim, or to all if a limit has changed."""
        with contextlib.suppress(intentbus.Error):     # as soon as PostgreSQL can be used, claims look again
            for goal, of_limit in changed.items():
                for lane in self._api.bus.ready_lanes(*goal):
                    self._loop.hand_over(self._offer_to_all if of_limit else self._offer, lane)

    def _offer_to_all(self, lane):
        """Attempt all claims that are held for a lane."""
        self.attempt_all(*intentbus.covering_lanes(lane))

    def _run(self, held, function, *lanes):
        """Call a function of the API for a held request, after the job that it may have, which may have looked too early."""
        if held in self._busy:
            self._busy[held][0] = function
        else:
            self._busy[held] = [None, []]
            self._jobs.put((held.request, held, functools.partial(function, held)))
        self._busy[held][1] += lanes

    def _committed(self, blocks):
        """Take in blocks that a thread has committed; those of a job reach the loop with its outcome."""
        if hasattr(self._done, "blocks"):
            self._done.blocks += blocks
        else:
            self._loop.hand_over(self._take_in, blocks)

    def _learn_remote(self, moves):
        self._api.bus.learn(moves, ours=False)
        self.learn(moves)

    def _work(self):
        """Run jobs, in a thread."""
        for request, held, run in iter(self._jobs.get, None):
            self._done.blocks = []
            try:
                outcome = run()
            except Exception as error:
                outcome = request and self._api.refuse(request, error)
            self._loop.hand_over(self._end, (request, held, outcome, self._done.blocks))

    def _end(self, ended):
        """Take in the effects of a job, and its outcome, in the loop."""
        request, held, outcome, blocks = ended
        function, lanes = self._busy.pop(held) if held else (None, [])
        self._take_in(blocks)
        if held and not held.settled and getattr(outcome, "status", None) == 503:     # it waits for PostgreSQL, too
            outcome, self._database.missed = None, True
        if held and outcome is None and function and self._loop.awaits_answer(request):
            return self._run(held, function, *lanes)
        self._loop.deliver(request, outcome)
        if isinstance(outcome, Held) and outcome.keys:     # it may have looked too early
            self._run(outcome, self._api.attempt)
        if outcome is not None or function:     # other claims may have the intents that it was offered and did not take
            claimed = [move.intent.lane for block in blocks for move in block.moves if move.event == "claimed"]
            for lane in (collections.Counter(lanes) - collections.Counter(claimed)).elements():
                self._offer(lane)


def open_store(dsn=None):
    """Return the Store of a PostgreSQL database; its default is BUS_DB_PATH."""
    dsn = dsn or os.environ.get("BUS_DB_PATH")
    if not dsn:
        raise SetupError("which PostgreSQL? Give its URL first, or set BUS_DB_PATH.")
    database = PostgresDatabase(dsn)
    database.listen()
    return intentbus.Store(database, transaction=PostgresTransaction)


def main(arguments):
    """Run intentbus.py serve on the database that the first argument, --db or BUS_DB_PATH names."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--db", *arguments]
    return intentbus.main(["serve", *arguments], open_store)


application = intentbus.WsgiApplication(open_store)     # under WSGI

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
