#!/usr/bin/env python3
"""intentbus: say "do this" here, have it done there. One file, no dependencies.

    python intentbus.py serve                                            # the bus: HTTP + SQLite
    python intentbus.py work --goal send_notification -- ./handler.sh    # a worker: polls outbound, runs a program
    python intentbus.py publish send_notification '{"message": "hi"}'    # from cron, a shell, a script

A publisher posts an intent: a goal, which says what to do, and a payload, which says with what.
Workers claim the intents of their goals, one worker each, under a lease that they keep up while
they work. A worker that falls silent loses its lease, and the intent goes to the next one.

    publish            claim                 fulfill
    --------> open --------------> claimed ----------> fulfilled
               ^                    |    |
               |  fail (backoff),   |    | fail or lost lease on the last attempt,
               |  lost lease,       |    | fail with retry=false, cancel, expiry
               |  release           |    v
               '--------------------'   dead ---- retry ---> open

The parts, top to bottom; each uses only those above it:

     1. Settings   every number one may want to change
     2. Errors     what can go wrong, with its HTTP status, on both sides of the wire
     3. Intent     the record, and its life as pure functions of the time
     4. Store      all the SQL; group commit; knows no clock and no HTTP
     5. Bus        the rules: who may see what, waiting, waking; knows no SQL and no HTTP
     6. Keys       who is asking
     7. Fields     what a body or a query may hold, as data
     8. Page       what a person sees who opens the bus in a browser
     9. API        the endpoints, as a table; handle(request) -> response
    10. Server     sockets and strict HTTP/1.1 around handle
    11. Local state  the files of this machine: the bus that it has joined, and the spool of unsent requests
    12. Client     IntentClient: the Bus's verbs over HTTP
    13. Worker     claim, run, keep the lease, report; a program as the handler
    14. Doctor     what goes wrong in practice, and the cure
    15. Commands   the command line
"""

import argparse
import base64
import collections
import contextlib
import errno
import functools
import hashlib
import hmac
import itertools
import json
import operator
import os
import queue
import random
import re
import signal
import socket
import sys
import threading
import time
import urllib.parse
import warnings

__version__ = "1.0.0"
__all__ = ["API", "Bus", "Error", "Intent", "IntentClient", "Keys", "Record", "Reject", "Store", "Worker", "listen", "main"]


# ---- 1. Settings ----
# A number has its unit in its name and its reason beside it.

LEASE_SECONDS = 60                  # a worker unheard of for this long has lost its intent
LEASE_RANGE_SECONDS = (10, 3600)    # shorter cannot be kept up on a phone, longer hides a dead worker
CLAIM_COMBINATIONS = 64             # goals times capabilities of one claim: each is a look into the index
WAIT_MAX_SECONDS = 60               # a held request outlives no proxy's idle limit
TTL_SECONDS = 7 * 86400             # nobody wants a notification of last week
YEAR_SECONDS = 366 * 86400          # the longest delay, and the longest life of an intent
RETENTION_SECONDS = 7 * 86400       # how long what has ended can still be asked for
SIGNATURE_SECONDS = 300             # how far clocks may differ; a nonce is remembered for as long
NONCE_CHARACTERS = 128              # of which more is not kept: that one was used, its hash tells as well
RATE_PER_MINUTE = 600               # of an issued key; a worker that polls twice a second uses a fifth
UNFINISHED = 2000                   # of an issued key; more means that nobody does the work
FAILURES_PER_MINUTE = 30            # wrong keys from one address, before they are slowed
FAILURE_SECONDS = 1                 # how long such an answer is held: guessing stays slow, a typing error cheap
INVITATION_SECONDS = 600            # time to read a code to somebody, and to type it
INVITATION_TRIES = 5                # wrong ones, of the 32 ** 4 for one invitation
BULK_INTENTS = 1000                 # published at once: a commit that others wait for
VALUE_TTL_SECONDS = 600             # of the key-value store, as in the 1.x protocol
VALUE_KEY_CHARACTERS = 512          # what fits an index of any database
USAGE_SECONDS = 10                  # between writes of how often the keys were used
IDEMPOTENCY_SECONDS = 86400         # a publisher that retries does so within a day
HISTORY_MINUTES = 1440              # of the plot of what happened; a table of three rows for each
WAITING_LANES = 200                 # looked at for the oldest that waits: 20 us each
EVENTS = 1000                       # kept in memory for those who watch
WORKERS = 10_000                    # remembered; a worker is a name and its goals
WORKER_SECONDS = 300                # unheard of for this long, a worker is not expected back
GOAL_SECONDS = 366 * 86400          # how long it is known that a goal had a worker
BACKOFF_MAX_SECONDS = 3600          # an intent that keeps failing is tried at least once an hour
BACKOFF_JITTER_SECONDS = 2          # so that what failed together is not tried again together
ERROR_CHARACTERS = 2000             # enough for a stack trace's end, little enough to list
FOREVER = 2.0 ** 60                 # Unix seconds beyond every clock
CLOCK_JUMP_SECONDS = 2              # NTP slews below this; more is somebody setting the clock
CLOCK_RECORD_SECONDS = 60           # how often the time is put on record while something waits: what a crash forgets

BUSY_TIMEOUT_MS = 30000             # another program may hold the file for a backup
LIST_ROWS = 10_000                  # looked at for one page of a list: some 20 ms
READERS = 16                        # connections to the file that read: two descriptors each, out of SPARE_FILES
SETTLE_ROWS = 500                   # one pass over what time has brought, so that nobody waits long behind it
WAL_BYTES = 8 * 2 ** 20             # a longer log is waited for until it can be cut: half of what is promised
WAL_PATIENCE_SECONDS = 1            # for a reader that is in the way of that; then again once the log has grown by half
RECHECK_SECONDS = 1                 # rows written by another program are noticed this soon

BODY_BYTES = 256 * 1024             # an intent says what to do; the data itself can live elsewhere
JSON_DEPTH = 64                     # deeper is an attack on the parser's stack
HEAD_LINE_BYTES = 8192              # RFC 9112, section 3: recommended at least 8000
HEAD_BYTES = 65536                  # all of them; what one connection may make us hold
HEAD_LINES = 100                    # browsers behind proxies send about 30
HEAD_SECONDS = 10                   # slower is a slowloris
BODY_SECONDS = 30                   # 256 KiB over a poor mobile link
IDLE_SECONDS = 75                   # longer than the 60 s that proxies keep a connection
SEND_SECONDS = 30                   # a client that reads no answer is not waited for longer
LINGER_SECONDS = 1                  # time for a refused client to read why
SHUTDOWN_SECONDS = 4                # with the rest, within the 5 s of service managers
EXIT_SECONDS = 4.8                  # a database that does not answer is not waited for longer than that
CONNECTIONS = 8192                  # parked workers are cheap, but not free
SPARE_FILES = 64                    # descriptors left to the database and the rest
BACKLOG = 1024                      # 5, the default, stalls at 40 clients
IDLE_THREADS = 64                   # kept for the next connections after a rush
STACK_BYTES = 256 * 1024            # the default, 8 MiB, exhausts a 32-bit phone at 400 threads

URL = "http://127.0.0.1:8787"
KEY_FILE = "~/.apikey"
FOLDER = "~/.intentbus"             # what a machine keeps for itself
CONFIG_FILE = f"{FOLDER}/config.json"
SPOOL_FILE = f"{FOLDER}/spool.db"
SPOOL_CHECK_SECONDS = 0.02          # while another process sends what is in it
POSIX = os.name == "posix"          # or Windows
CLIENT_SECONDS = 30                 # a request unanswered for this long is lost
RETRIES = 4                         # about 10 s in all: a bus that restarts is back by then
RETRY_SECONDS = 0.5                 # doubled each time, with full jitter
RETRY_MAX_SECONDS = 8
CLAIM_WAIT_SECONDS = 20             # below the idle limit of mobile carriers' NAT
LEASE_CHECK_SECONDS = 1             # a worker whose phone slept finds out this soon that its lease is over
POLL_SECONDS = 5                    # between claims at a server that does not hold them
PUBLISH_WAIT_SECONDS = 300          # publish --wait, if nothing else is said
JOBS = 256                          # of one worker; each is a thread and a program
DOCTOR_SECONDS = 10                 # for the bus to answer a doctor
FREE_BYTES = 50 * 2 ** 20           # on the disk of the database; less is soon none
TERMUX_SECONDS = 10                 # for Termux:API to answer; without its app it never does
HANDLER_SECONDS = 300               # a handler that takes longer hangs
KILL_AFTER_SECONDS = 5              # between TERM and KILL
SLICE_SECONDS = 0.1                 # how soon a lost lease or a timeout ends a handler
PIPE_SECONDS = 1                    # how long output is waited for after the handler has ended
OUTPUT_BYTES = 127 * 1024           # of stdout, as the result; twice that, when escaped, fits the body limit
STDERR_BYTES = 2000                 # the last ones tell why
ENVIRONMENT_BYTES = 64 * 1024       # half of what Linux allows one variable


# ---- 2. Errors ----
# A class is a status and a code; str(error) is one sentence that helps. The client raises what the server raised.

class Error(Exception):
    """What the bus refuses or cannot do; the base of all below.

    `status` is the HTTP status, `code` the machine's word for it; `headers` and `details` are what else it answers.
    """

    status, code = 500, "internal_error"

    def __init__(self, message="Something went wrong inside the bus; its log says what.", code=None, headers=(),
                 **details):
        super().__init__(message)
        self.code = code or self.code
        self.headers, self.details = headers, details


class Invalid(Error):             status, code = 400, "invalid_request"          # it says something it may not
class Unauthorized(Error):        status, code = 401, "unauthorized"             # no key, or an unknown one
class Forbidden(Error):           status, code = 403, "forbidden"                # a known key that may not do this
class NotFound(Error):            status, code = 404, "not_found"                # none for this caller; a lease that is lost
class MethodNotAllowed(Error):    status, code = 405, "method_not_allowed"       # the path takes other methods
class RequestTimeout(Error):      status, code = 408, "timeout"                  # the request did not arrive in time
class Conflict(Error):            status, code = 409, "conflict"                 # not in a state that allows this
class LengthRequired(Error):      status, code = 411, "length_required"          # a body without its length
class PayloadTooLarge(Error):     status, code = 413, "payload_too_large"        # the body is over the limit
class IdempotencyConflict(Error): status, code = 422, "idempotency_conflict"     # one key for two requests
class RateLimited(Error):         status, code = 429, "rate_limited"             # too much, too fast
class HeadersTooLarge(Error):     status, code = 431, "headers_too_large"        # a header line, or their number
class Unavailable(Error):         status, code = 503, "database_busy"            # the same request may succeed later
class StorageFull(Error):         status, code = 507, "storage_full"             # the disk under the database
class Unreachable(Error):         status, code = 0, "unreachable"                # the client's: no bus answered
class SetupError(Error):          status, code = 0, "setup"                      # this machine's: the sentence has the cure


TRANSIENT = (RequestTimeout, RateLimited, Unavailable, StorageFull, Unreachable)     # the same request may succeed later
ERRORS = {kind.status: kind for kind in Error.__subclasses__() if kind.status}


# ---- 3. Intent ----
# The record, and its life. A method named for what happened returns the columns that it changes; the Store writes them.

COLUMNS = (
    "id", "namespace", "goal", "payload", "owner", "publisher", "visibility", "priority", "ttl", "max_attempts",
    "backoff_base", "target_worker", "required_capability", "created_at", "status", "run_at", "expires_at",
    "completed_at", "last_error", "result", "result_type", "claim_attempts", "claim_token_hash", "claim_expires_at",
    "claim_owner", "claim_outcome", "worker_id", "lane", "ready", "wake_at",
)
PUBLISH_DEFAULTS = dict(
    namespace="default", visibility="private", priority=100, delay=0, run_at=None, ttl=TTL_SECONDS, max_attempts=3,
    backoff_base=5, target_worker=None, required_capability=None,
)
STATUS_FIELDS = (
    "id", "namespace", "goal", "status", "priority", "visibility", "claim_attempts", "max_attempts", "run_at",
    "claim_expires_at", "target_worker", "required_capability", "created_at", "completed_at", "last_error",
)
CLAIM_FIELDS = (
    "id", "namespace", "goal", "payload", "claim_attempts", "max_attempts", "priority", "target_worker",
    "required_capability", "claim_token", "claim_timeout", "claim_expires_at", "created_at",
)


def new_id(now):
    """Return 32 hex digits that sort by time: 48 bits of milliseconds, 16 of their fraction, 64 random ones.

    As UUIDv7 in RFC 9562, section 6.2, method 3, without its version bits.
    """
    return f"{int(now * 1000 * 65536) & 0xFFFFFFFFFFFFFFFF:016x}{os.urandom(8).hex()}"


def no_such(intent_id):
    """Return the error for an id that does not exist, or that the caller may not see."""
    return NotFound(f"There is no intent {intent_id}.")


to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode     # compact text


def lane(namespace, audience, target_worker, required_capability, goal, publisher):
    """Return the lane of all intents that the same workers may take, and which wait in one order.

    The audience is an owner's name, or empty for everyone. An empty goal or publisher stands for any: that is a
    pattern of lanes. No part can hold a tab.
    """
    return "\t".join((namespace, audience, target_worker or "", required_capability or "", goal, publisher))


def patterns(name):
    """Return a lane and all the patterns that cover it."""
    place, goal, publisher = name.rsplit("\t", 2)
    return (name, f"{place}\t{goal}\t", f"{place}\t\t{publisher}", f"{place}\t\t")


def past(name):
    """Return what sorts after a lane, and before every other lane that does."""
    return name + "\1"


def span(pattern):
    """Return (start, stop, publisher): a pattern covers the lanes from start to before stop, of that publisher if any."""
    place, goal, publisher = pattern.rsplit("\t", 2)
    if goal and publisher:
        return pattern, past(pattern), ""
    prefix = f"{place}\t{goal}" if goal else place
    return prefix + "\t", prefix + "\n", publisher     # a newline follows a tab: past all that start so


class Record(dict):
    """A dict whose keys read as attributes too: record["id"] is record.id."""

    __slots__ = ()

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name} in this {type(self).__name__}") from None

    def pick(self, fields):
        """Return a record of these fields only."""
        return Record((name, self[name]) for name in fields)


class Intent(Record):
    """One unit of work, as it is stored.

    Times are Unix seconds. `wake_at` is when time itself will change it next: a delay that is over, a lease that
    has run out, its expiry; None once it has ended. `ready` is 1 while it can be claimed.
    """

    __slots__ = ()

    @classmethod
    def new(cls, now, owner, publisher, fields):
        """Return an intent as published now by a key of an owner, with these fields and PUBLISH_DEFAULTS."""
        fields = Record(PUBLISH_DEFAULTS, **fields)
        delay, run_at = fields.pop("delay"), fields.pop("run_at")
        start = now + delay if run_at is None else run_at
        audience = owner if fields.visibility == "private" else ""
        intent = cls.fromkeys(COLUMNS)
        intent.update(
            fields, id=new_id(now), payload=to_json(fields.payload), owner=owner, publisher=publisher, claim_attempts=0,
            created_at=now, expires_at=max(start, now) + fields.ttl,
            lane=lane(fields.namespace, audience, fields.target_worker, fields.required_capability, fields.goal, owner))
        intent.update(intent.opened(now, start))
        return intent

    @property
    def ended(self):
        """Whether it is fulfilled or dead."""
        return self.status in ("fulfilled", "dead")

    def opened(self, now, run_at, **changes):
        """It waits to be claimed, from run_at on."""
        expires_at = changes.get("expires_at", self.expires_at)
        if expires_at <= now:
            return self.buried(now, "expired", **changes)
        ready = run_at <= now
        return dict(changes, status="open", ready=int(ready), run_at=run_at, claim_expires_at=None,
                    wake_at=expires_at if ready else min(run_at, expires_at))

    def claimed(self, now, token_hash, lease, owner, worker_id):
        """A worker of an owner has it, until the lease runs out; if it had it already, that is no new attempt."""
        attempts = self.claim_attempts + (self.status != "claimed")
        return dict(self.extended(now, lease), status="claimed", ready=0, claim_attempts=attempts,
                    claim_token_hash=token_hash, claim_owner=owner, worker_id=worker_id, claim_outcome=None)

    def extended(self, now, seconds):
        """Its lease ends that many seconds from now."""
        return dict(claim_expires_at=now + seconds, wake_at=min(now + seconds, self.expires_at))

    def fulfilled(self, now, result, result_type):
        """The work is done."""
        return dict(status="fulfilled", ready=0, completed_at=now, claim_expires_at=None, wake_at=None,
                    claim_outcome="fulfilled", result=result if result_type == "text" else to_json(result),
                    result_type=result_type)

    def failed(self, now, error, retry, jitter):
        """The work was tried in vain: again after a backoff, if an attempt is left."""
        if not retry or self.status == "dead" or self.claim_attempts >= self.max_attempts:
            return self.buried(now, error, claim_outcome="failed")
        backoff = min(self.backoff_base * 2 ** self.claim_attempts + jitter, BACKOFF_MAX_SECONDS)
        return self.opened(now, now + backoff, claim_outcome="failed", last_error=error)

    def released(self, now, delay):
        """A worker hands it back; that attempt does not count."""
        return self.opened(now, now + delay if delay else self.run_at, claim_outcome="released",
                           claim_attempts=max(self.claim_attempts - 1, 0), completed_at=None)

    def buried(self, now, reason, **changes):
        """It is a dead letter."""
        return dict(changes, status="dead", ready=0, completed_at=now, last_error=reason, claim_expires_at=None,
                    wake_at=None)

    def cancelled(self, now):
        """Nobody wants it any more; a worker that has it finds its lease lost."""
        return self.buried(now, "Cancelled", claim_token_hash=None)

    def retried(self, now):
        """A dead letter gets a new life."""
        return self.opened(now, now, claim_attempts=0, last_error=None, result=None, result_type=None,
                           completed_at=None, claim_token_hash=None, expires_at=now + self.ttl)

    def woken(self, now):
        """Its wake_at has come: it expires, or its lease is lost, or its delay is over."""
        if self.expires_at <= now:
            return self.buried(now, "expired")
        if self.status == "claimed" and self.claim_attempts >= self.max_attempts:
            return self.buried(now, f"The lease was lost on attempt {self.claim_attempts} of {self.max_attempts}.")
        return self.opened(now, self.run_at)


for column in COLUMNS:     # attributes as a Record has them, ten times faster: each request reads dozens
    setattr(Intent, column, property(operator.itemgetter(column)))


# ---- 4. Store ----
# All the SQL. One connection writes, and commits what queued up meanwhile as one transaction (group commit); others read.
# One method is one operation; a rule passed in decides, inside the transaction, how an intent changes. What a database
# that several buses share needs besides is empty here: see examples/postgres_bus.py.

SCHEMA = """
    CREATE TABLE intents (
        -- as published
        id TEXT PRIMARY KEY, namespace TEXT NOT NULL, goal TEXT NOT NULL, payload TEXT NOT NULL, owner TEXT NOT NULL,
        publisher TEXT NOT NULL, visibility TEXT NOT NULL, priority INTEGER NOT NULL, ttl DOUBLE PRECISION NOT NULL,
        max_attempts INTEGER NOT NULL, backoff_base DOUBLE PRECISION NOT NULL, target_worker TEXT,
        required_capability TEXT, created_at DOUBLE PRECISION NOT NULL,
        -- where it stands
        status TEXT NOT NULL, run_at DOUBLE PRECISION NOT NULL, expires_at DOUBLE PRECISION NOT NULL,
        completed_at DOUBLE PRECISION, last_error TEXT, result TEXT, result_type TEXT,
        -- the latest claim
        claim_attempts INTEGER NOT NULL, claim_token_hash TEXT, claim_expires_at DOUBLE PRECISION, claim_owner TEXT,
        claim_outcome TEXT, worker_id TEXT,
        -- what the indexes need
        lane TEXT NOT NULL, ready INTEGER NOT NULL, wake_at DOUBLE PRECISION
    );
    CREATE INDEX intents_ready ON intents (lane, priority DESC, run_at, claim_attempts, created_at, id) WHERE ready = 1;
    CREATE INDEX intents_wake ON intents (wake_at) WHERE wake_at IS NOT NULL;
    CREATE INDEX intents_completed ON intents (completed_at) WHERE completed_at IS NOT NULL;
    CREATE TABLE tallies (     -- how many intents there are of each kind
        namespace TEXT, publisher TEXT, status TEXT, intents INTEGER NOT NULL,
        PRIMARY KEY (namespace, publisher, status)
    );
    CREATE TABLE keys (
        key_id TEXT PRIMARY KEY, name TEXT NOT NULL, owner TEXT NOT NULL, role TEXT NOT NULL,
        created_at DOUBLE PRECISION NOT NULL, last_used_at DOUBLE PRECISION, total_requests INTEGER NOT NULL,
        revoked_at DOUBLE PRECISION
    );
    CREATE TABLE memos (     -- what is remembered for a while: values of owners, answers to idempotency keys, nonces
        kind TEXT, owner TEXT, key TEXT, value TEXT NOT NULL, expires_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (kind, owner, key)
    );
    CREATE INDEX memos_expires ON memos (expires_at)
"""
APPLICATION_ID = 0x1B05     # in the file's header: the database is ours
MORE_INDEXES = """
    CREATE INDEX intents_token ON intents (claim_token_hash) WHERE status = 'claimed';
    CREATE INDEX intents_dead ON intents (id) WHERE status = 'dead'
"""
HISTORY = """
    CREATE TABLE history (     -- how often what happened, by minutes of Unix time
        minute INTEGER, event TEXT, times INTEGER NOT NULL,
        PRIMARY KEY (minute, event)
    )
"""
MIGRATIONS = (SCHEMA, MORE_INDEXES, HISTORY)     # the n-th leads to schema version n; what is released is never edited

FIRST = operator.itemgetter(0)     # of what describes a column: its name
ALL = ", ".join(COLUMNS)           # named, since a newer bus on the same database may have added one
INSERT = f"INSERT INTO intents ({ALL}) VALUES (:{', :'.join(COLUMNS)})"
UPDATE = """
    UPDATE intents
    SET    status = :status, ready = :ready, wake_at = :wake_at, run_at = :run_at, expires_at = :expires_at,
           claim_attempts = :claim_attempts, claim_token_hash = :claim_token_hash, claim_owner = :claim_owner,
           claim_expires_at = :claim_expires_at, claim_outcome = :claim_outcome, worker_id = :worker_id,
           result = :result, result_type = :result_type, last_error = :last_error, completed_at = :completed_at
    WHERE  id = :id
"""
ONE = f"SELECT {ALL} FROM intents WHERE id = :id"
DUE = f"""
    SELECT   {ALL}
    FROM     intents
    WHERE    wake_at <= :now
    ORDER BY wake_at
    LIMIT    :rows
"""
CLAIMED_WITH = f"""
    SELECT {ALL}
    FROM   intents
    WHERE  claim_token_hash = :token_hash
    AND    claim_owner = :owner
    AND    status = 'claimed'
"""
REMEMBER = """
    INSERT INTO memos (kind, owner, key, value, expires_at)
    VALUES      (:kind, :owner, :key, :value, :expires_at)
    ON CONFLICT (kind, owner, key) DO UPDATE
    SET         value = excluded.value,
                expires_at = excluded.expires_at
"""
REMEMBER_FIRST = REMEMBER + """
    WHERE       memos.expires_at <= :now
    RETURNING   key
"""
HEAD_OF_NEXT_LANE = f"""
    SELECT   {ALL}
    FROM     intents
    WHERE    ready = 1
    AND      lane >= :start
    AND      lane < :stop
    ORDER BY lane, priority DESC, run_at, claim_attempts, created_at, id
    LIMIT    1
"""
HEAD_OF_NEXT_PRIORITY = f"""
    SELECT   {ALL}
    FROM     intents
    WHERE    ready = 1
    AND      lane = :lane
    AND      priority < :priority
    ORDER BY priority DESC, run_at, claim_attempts, created_at, id
    LIMIT    1
"""
PAGE = f"""
    SELECT   {ALL}
    FROM     intents
    WHERE    id < :before
    AND      id >= :floor
    AND      {{kind}}
    AND      (CAST(:status AS TEXT) IS NULL OR status = :status)
    AND      (CAST(:ready AS INTEGER) IS NULL OR ready = :ready)
    AND      (CAST(:owner AS TEXT) IS NULL OR owner = :owner)
    AND      (CAST(:goal AS TEXT) IS NULL OR goal = :goal)
    AND      (CAST(:namespace AS TEXT) IS NULL OR namespace = :namespace)
    ORDER BY id DESC
    LIMIT    :limit
"""
PAGE_FLOOR = """
    SELECT   id
    FROM     intents
    WHERE    id < :before
    AND      {kind}
    ORDER BY id DESC
    LIMIT    1
    OFFSET   :rows
"""
THE_DEAD = """
    SELECT   {what}
    FROM     intents
    WHERE    status = 'dead'
    AND      id > ''     -- for the index of the dead, not that of all that has ended
    AND      +completed_at <= :until
    AND      (CAST(:owner AS TEXT) IS NULL OR owner = :owner)
    AND      (CAST(:goal AS TEXT) IS NULL OR goal = :goal)
    AND      (CAST(:namespace AS TEXT) IS NULL OR namespace = :namespace)
    AND      (CAST(:ids AS TEXT) IS NULL OR :ids LIKE '%' || id || '%')
    ORDER BY +completed_at
    LIMIT    :limit
"""
KEYS = """
    SELECT key_id, name, owner, role, created_at, last_used_at, total_requests
    FROM   keys
    WHERE  revoked_at IS NULL
"""
ANY, DEAD = "TRUE", "status = 'dead'"     # the kind: a literal, since the index of the dead serves no parameter


def statements(version):
    """Return what brings a database from a schema version to this one's."""
    return [statement for script in MIGRATIONS[version:] for statement in script.split(";")]


def lock(file):
    """Take the lock of an open file, which ends with this process; raises OSError while another process has it."""
    if POSIX:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def dead_values(limit, owner=None, goal=None, namespace=None, ids=None, until=FOREVER):
    """Return the values of THE_DEAD: whose, of what goal and namespace, which ids, and dead by when."""
    return dict(limit=limit, owner=owner, goal=goal, namespace=namespace, until=until,
                ids=None if ids is None else " ".join(id for id in ids if len(id) == 32))


def operation(method, synced=True):
    """Make a Store method one operation of the next commit: it returns once that is on disk."""
    @functools.wraps(method)
    def committed(self, *args, **kwargs):
        return self._commit(functools.partial(method, self, *args, **kwargs), synced)
    return committed


def unsynced(method):
    """Make a Store method an operation that a power cut may undo, but never once something after it is on disk."""
    return operation(method, synced=False)


class Job:
    """An operation that waits for its commit."""

    __slots__ = ("operation", "synced", "result", "error", "ended", "called")

    def __init__(self, operation, synced):
        self.operation, self.synced, self.result, self.error, self.ended = operation, synced, None, None, False
        self.called = queue.SimpleQueue()     # an item once it has ended, or is the one to commit what is queued


class Allowance:
    """So many a minute for each name, and as many at once (a token bucket)."""

    def __init__(self, per_minute):
        self._per_second, self._most = per_minute / 60, per_minute
        self._left = {}     # name: (how many, as of when)
        self._lock = threading.Lock()

    def take(self, name, number=1):
        """Use it up by a number, less than 0 to give back; return how many seconds to wait if there is not enough."""
        now = time.monotonic()
        with self._lock:
            if len(self._left) > 10000:     # addresses are many; forgetting them favours nobody for long
                self._left.clear()
            left, since = self._left.get(name, (self._most, now))
            left = min(self._most, left + (now - since) * self._per_second)
            if left < number:
                return (number - left) / self._per_second
            self._left[name] = min(self._most, left - number), now
            return 0


class Store:
    """The intents, in one SQLite file.

    `on_commit(moves)` is called after each commit, outside of the transaction, with (intent, status before) of each that
    it stored or changed; `on_news(moves)` with those of other buses. `on_death(intent)` is called inside, and may return
    an intent to store with that death.

    A subclass for a database that several buses share says how to reach it (`_open`, `close`, `_commit`, `_reader`, `bytes`),
    which connection an operation uses and what it has moved (`_db`, `_moves`), what errors there are (`_translated`), what
    comes of the others (`on_news`, `changed_elsewhere`), what keeps them apart (`TALLY`, `HELD`, `FREE`, `_claimable`,
    `_exclusively`), and what they have in common: `clock`, which returns Unix seconds, and `allowance`.
    """

    TALLY = """
        INSERT INTO tallies (namespace, publisher, status, intents)
        VALUES      (:namespace, :publisher, :status, :intents)
        ON CONFLICT (namespace, publisher, status) DO UPDATE
        SET         intents = tallies.intents + excluded.intents
    """
    HELD = FREE = ""     # after a SELECT: rows that are to be changed, and only those that nobody else is changing
    clock = None         # the machine's own
    allowance = Allowance

    def __init__(self, where):
        """Open or create the database; raises SetupError, in words, if that cannot be."""
        self.on_commit = self.on_news = lambda moves: None
        self.on_death = lambda intent: None
        self.warning = None
        self._open(where)

    def _open(self, path):
        import sqlite3
        self.path = os.path.realpath(path)     # a link to a file has no lock of its own
        self._jobs = collections.deque()
        self._moves = []     # of the transaction that runs: (intent, status before, status after), None where there is none
        self._writing, self._synced = threading.Lock(), True
        self._readers, self._reading = [], threading.Semaphore(READERS)
        if sqlite3.sqlite_version_info < (3, 35):
            raise SetupError(f"intentbus needs SQLite 3.35 or newer; this Python has {sqlite3.sqlite_version}.")
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._file, self._cut_at = os.stat(self.path), WAL_BYTES
            self._guard = self._lock_file()
            shared_memory = self._shared_memory()
            self._db = self._connect(alone=not shared_memory)
            self._prepare("WAL" if shared_memory else "DELETE")
        except OSError as error:
            raise SetupError(f"The database {self.path} cannot be opened: {error.strerror}.") from error
        except sqlite3.Error as error:
            raise SetupError(f"The database {self.path} cannot be used: {error}.") from error

    def close(self):
        """Write everything into the one file, and let go of it."""
        with self._alone():
            while self._readers:
                self._readers.pop().close()
            self._db.close()
            self._guard.close()

    # -- Reading --

    def get(self, intent_id):
        """Return the intent; raises NotFound."""
        with self._reader() as db:
            return self._found(db.execute(ONE, dict(id=intent_id)), intent_id)

    def list(self, limit, owner=None, status=None, goal=None, namespace=None, before=None):
        """Return up to limit intents, newest first, from before an id on, and the id that it looked down to, or None.

        It looks at LIST_ROWS at most, so that a filter that fits few costs little; of the dead, at as many dead ones. The
        status "delayed" is for those open ones that cannot be claimed yet.
        """
        delayed = status == "delayed"
        values = dict(owner=owner, status="open" if delayed else status, ready=0 if delayed else None, goal=goal,
                      namespace=namespace, before=before or "g", limit=limit, rows=LIST_ROWS)     # "g" is after every id
        kind = DEAD if status == "dead" else ANY
        with self._reader() as db:
            floor = db.execute(PAGE_FLOOR.format(kind=kind), values).fetchone()
            page = db.execute(PAGE.format(kind=kind), dict(values, floor=floor.id if floor else ""))
            return page.fetchall(), floor and floor.id

    def count_dead(self, **which):
        """Return how many intents are dead, of those that THE_DEAD describes."""
        with self._reader() as db:
            return db.execute(f"SELECT COUNT(*) AS number FROM ({THE_DEAD.format(what='id')}) AS dead",
                              dead_values(sys.maxsize, **which)).fetchone().number

    def tallies(self):
        """Return {"namespace", "publisher", "status", "intents"} for each that there is: how many are stored."""
        with self._reader() as db:
            return db.execute("""
                SELECT   namespace, publisher, status, SUM(intents) AS intents
                FROM     tallies
                GROUP BY namespace, publisher, status
                HAVING   SUM(intents) > 0
                ORDER BY namespace, publisher, status
            """).fetchall()

    def keys(self):
        """Return the issued keys that are not revoked."""
        with self._reader() as db:
            return db.execute(KEYS + "ORDER BY created_at, key_id").fetchall()

    def key(self, key_id):
        """Return an issued key that is not revoked, or None."""
        with self._reader() as db:
            return db.execute(KEYS + "AND key_id = :key_id", dict(key_id=key_id)).fetchone()

    def recall(self, kind, owner, key, now):
        """Return the memo of that kind, owner and key, or None."""
        with self._reader() as db:
            return self._recall(db, kind, owner, key, now)

    def bytes(self):
        """Return the sizes of the database and of its write-ahead log."""
        return [os.path.getsize(path) if os.path.exists(path) else 0 for path in (self.path, self.path + "-wal")]

    def next_wake(self):
        """Return when time will next change an intent, or None."""
        with self._reader() as db:
            return db.execute("SELECT MIN(wake_at) AS wake_at FROM intents WHERE wake_at IS NOT NULL").fetchone().wake_at

    def history(self, since):
        """Return {"minute", "event", "times"} from a minute on."""
        with self._reader() as db:
            return db.execute("SELECT minute, event, times FROM history WHERE minute >= :since ORDER BY minute, event",
                              dict(since=since)).fetchall()

    def waiting(self, most):
        """Return the intent that has been ready for longest in each lane and priority, of so many of these at most."""
        found, lanes = [], dict(start="", stop="\x7f")     # past every namespace
        with self._reader() as db:
            while len(found) < most and (head := found and db.execute(HEAD_OF_NEXT_PRIORITY, found[-1]).fetchone()
                                         or db.execute(HEAD_OF_NEXT_LANE, lanes).fetchone()):
                found.append(head)
                lanes["start"] = past(head.lane)
        return found

    def latest(self):
        """Return the latest time on record, 0 in a new file; and [offset, boot] as they were last noted, if they were."""
        with self._reader() as db:
            newest = db.execute("SELECT MAX(id) AS id FROM intents").fetchone().id
            completed = db.execute("""
                SELECT MAX(completed_at) AS at
                FROM   intents
                WHERE  completed_at IS NOT NULL
            """).fetchone().at
            known, noted_at, *noted = json.loads(self._recall(db, "clock", "", "", 0) or "[null, 0]")
        created = int(newest[:12], 16) / 1000 if newest and newest > (known or "") else 0
        return max(noted_at, created, completed or 0), noted

    def changed_elsewhere(self):
        """Return whether another program has written to the file since the last call."""
        with self._alone(), self._translated():
            version = self._db.execute("PRAGMA data_version").fetchone().data_version
        changed, self._version = version != self._version, version
        return changed

    # -- Writing --

    @operation
    def add(self, intents, answer, now, idempotency=None, most=None):
        """Store intents of one publisher and return the answer to it.

        idempotency is (caller, key, digest): when that key is known with the same digest, the first answer is returned
        and nothing stored; with another, IdempotencyConflict is raised. most is how many unfinished intents the
        publisher may have; with more, RateLimited is raised.
        """
        caller, key, digest = idempotency or (None, None, None)
        if key:
            self._exclusively("idempotency", caller, key)
        if key and (known := self._recall(self._db, "idempotency", caller, key, now)):
            if not known.startswith(digest):
                raise IdempotencyConflict("Key reused with different payload: an Idempotency-Key stands for one request.")
            return Record(json.loads(known[len(digest):]))
        if most is not None and intents:
            self._require_room(intents[0].publisher, len(intents), most)
        self._insert(intents)
        if key:
            self._remember("idempotency", caller, key, digest + to_json(answer), now + IDEMPOTENCY_SECONDS)
        return answer

    @unsynced     # a claim that a power cut undoes is made again
    def claim(self, lanes, now, rule, token_hash=None, owner=None):
        """Change the first intent that is ready in these lanes by the rule and return it, or None.

        lanes may be patterns, too. What the owner has claimed with that token comes first: its answer was lost.
        """
        if token_hash:
            self._exclusively("claim", owner, token_hash)
        while intent := self._claimable(lanes, now, dict(token_hash=token_hash, owner=owner)):
            if intent.expires_at > now:
                return self._change(intent, rule(intent))
            self._change(intent, intent.woken(now))

    @operation
    def change(self, intent_id, rule):
        """Change an intent by rule(intent), which returns changed columns or raises, and return it; raises NotFound."""
        intent = self._found(self._db.execute(ONE + self.HELD, dict(id=intent_id)), intent_id)
        return self._change(intent, rule(intent))

    @operation
    def change_dead(self, limit, rule, **which):
        """Change up to limit dead intents, oldest first, by rule(intent), and return their number; see THE_DEAD."""
        dead = self._db.execute(THE_DEAD.format(what=ALL) + self.HELD, dead_values(limit, **which)).fetchall()
        for intent in dead:
            self._change(intent, rule(intent))
        return len(dead)

    @operation
    def delete_dead(self, limit, **which):
        """Delete up to limit dead intents, and return their number."""
        return len(self._delete(f"""
            DELETE FROM intents
            WHERE       id IN ({THE_DEAD.format(what="id") + self.HELD})
            RETURNING   namespace, publisher, status
        """, dead_values(limit, **which)))

    @operation
    def settle(self, now):
        """Carry out what time has brought, up to SETTLE_ROWS at a time; return how many died of it, and how."""
        return self._wake(self._due(now), now)

    @operation
    def note_clock(self, now, offset, boot):
        """Put on record what time it is, and how far that is from the steady clock of this boot of the machine."""
        self._note_clock(now, offset, boot)

    @operation
    def shift(self, seconds, now, offset, boot):
        """Move all that is to happen, and the age of what has, by so many seconds, as the clock was moved to now."""
        self._db.execute("""
            UPDATE intents
            SET    run_at = run_at + :seconds,
                   expires_at = expires_at + :seconds,
                   claim_expires_at = claim_expires_at + :seconds,
                   completed_at = completed_at + :seconds,
                   wake_at = wake_at + :seconds
        """, dict(seconds=seconds))
        self._db.execute("""
            UPDATE memos
            SET    expires_at = expires_at + :seconds
            WHERE  kind <> 'nonces'
            OR     CAST(:seconds AS DOUBLE PRECISION) > 0
        """, dict(seconds=seconds))     # set back, the clock will come to a nonce's time once more
        self._note_clock(now, offset, boot)

    @operation
    def clean(self, now, retention):
        """Delete what is over, up to SETTLE_ROWS intents at a time; return how many of each kind."""
        ended = self._delete(f"""
            DELETE FROM intents
            WHERE       id IN (SELECT   id
                               FROM     intents
                               WHERE    completed_at <= :until
                               ORDER BY completed_at
                               LIMIT    :rows
                               {self.FREE})
            RETURNING   namespace, publisher, status
        """, dict(until=now - retention, rows=SETTLE_ROWS))
        forgotten = self._db.execute("DELETE FROM memos WHERE expires_at <= :now RETURNING kind", dict(now=now)).fetchall()
        if ended:     # a publisher may use a new namespace each time
            self._db.execute("DELETE FROM tallies WHERE intents = 0")
        kinds = collections.Counter([row.status for row in ended] + [row.kind for row in forgotten])
        return Record({f"{kind}_deleted": kinds[kind] for kind in ("fulfilled", "dead", "store", "idempotency", "nonces")})

    @operation
    def purge(self, namespace):
        """Delete up to SETTLE_ROWS intents of a namespace, or of all, whatever their state; return how many."""
        return len(self._delete(f"""
            DELETE FROM intents
            WHERE       id IN (SELECT id
                               FROM   intents
                               WHERE  (CAST(:namespace AS TEXT) IS NULL OR namespace = :namespace)
                               LIMIT  :rows
                               {self.HELD})
            RETURNING   namespace, publisher, status
        """, dict(namespace=namespace, rows=SETTLE_ROWS)))

    @operation
    def add_key(self, key_id, name, owner, role, now):
        """Store an issued key."""
        self._db.execute("""
            INSERT INTO keys (key_id, name, owner, role, created_at, total_requests)
            VALUES      (:key_id, :name, :owner, :role, :now, 0)
        """, dict(key_id=key_id, name=name, owner=owner, role=role, now=now))

    @operation
    def revoke_key(self, key_id, now):
        """Mark an issued key as revoked; return whether there was one."""
        return self._db.execute("""
            UPDATE    keys
            SET       revoked_at = :now
            WHERE     key_id = :key_id
            AND       revoked_at IS NULL
            RETURNING key_id
        """, dict(key_id=key_id, now=now)).fetchone() is not None

    @operation
    def count_usage(self, usage):
        """Add to how often and when keys were used: {"key_id", "requests", "last"} of each."""
        self._db.executemany("""
            UPDATE keys
            SET    total_requests = total_requests + :requests,
                   last_used_at = CASE WHEN last_used_at > :last THEN last_used_at ELSE :last END
            WHERE  key_id = :key_id
        """, usage)

    @operation
    def count_events(self, events):
        """Add to the history: {"minute", "event", "times"} of each; what is older than HISTORY_MINUTES is deleted."""
        self._db.executemany("""
            INSERT INTO history (minute, event, times)
            VALUES      (:minute, :event, :times)
            ON CONFLICT (minute, event) DO UPDATE
            SET         times = history.times + excluded.times
        """, events)
        self._db.execute("DELETE FROM history WHERE minute < :oldest",
                         dict(oldest=max(event["minute"] for event in events) - HISTORY_MINUTES))

    @operation
    def remember(self, kind, owner, key, value, expires_at):
        """Remember a text, in place of an older one."""
        self._remember(kind, owner, key, value, expires_at)

    @operation
    def remember_first(self, kind, owner, key, value, expires_at, now):
        """Remember a text unless there is one; return whether it was."""
        return self._remember_first(kind, owner, key, value, expires_at, now)

    @unsynced     # what the request itself writes is synced after it
    def use_nonce(self, key_id, nonce, expires_at, now):
        """Remember a nonce; return whether it was new."""
        return self._remember_first("nonces", key_id, nonce, "", expires_at, now)

    @operation
    def change_memo(self, kind, owner, key, rule, now):
        """Replace a memo by rule(value): a text, or None to forget it; return what it was, None if there is none."""
        self._exclusively(kind, owner, key)
        value = self._recall(self._db, kind, owner, key, now)
        if value is not None:
            self._db.execute("""
                UPDATE memos
                SET    value = COALESCE(CAST(:value AS TEXT), value),
                       expires_at = CASE WHEN CAST(:value AS TEXT) IS NULL THEN 0 ELSE expires_at END
                WHERE  kind = :kind
                AND    owner = :owner
                AND    key = :key
            """, dict(kind=kind, owner=owner, key=key, value=rule(value)))
        return value

    @operation
    def forget(self, kind, owner, key, now):
        """Forget a memo; return whether there was one."""
        known = self._db.execute("""
            DELETE FROM memos
            WHERE       kind = :kind
            AND         owner = :owner
            AND         key = :key
            RETURNING   expires_at
        """, dict(kind=kind, owner=owner, key=key)).fetchone()
        return bool(known) and known.expires_at > now

    # -- Inside the transaction --

    def _exclusively(self, *what):
        """Let no other bus do the same, with the same names, before this transaction has ended: a file has one bus."""

    def _claimable(self, lanes, now, again):
        """Return what was claimed before with the same token, else the first that is ready in these lanes by now."""
        self._wake(self._due(now), now)
        return again["token_hash"] and self._db.execute(CLAIMED_WITH, again).fetchone() or min(
            (head for pattern in lanes for head in self._heads(pattern)), default=None, key=lambda head: (
                -head.priority, head.run_at, head.claim_attempts, head.created_at, head.id))

    def _heads(self, pattern):
        """Yield the first ready intent of each lane that a pattern covers: one index entry is looked at for each."""
        start, stop, publisher = span(pattern)
        while start < stop and (head := self._db.execute(HEAD_OF_NEXT_LANE, dict(start=start, stop=stop)).fetchone()):
            if not publisher or head.lane.endswith("\t" + publisher):
                yield head
            start = past(head.lane)

    def _found(self, rows, intent_id):
        intent = rows.fetchone()
        if intent is None:
            raise no_such(intent_id)
        return intent

    def _insert(self, intents):
        self._db.executemany(INSERT, intents)
        self._moves += [(intent, None, intent.status) for intent in intents]

    def _change(self, intent, changes):
        if not changes:
            return intent
        before = intent.status
        intent.update(changes)
        self._db.execute(UPDATE, intent)
        self._moves.append((intent, before, intent.status))
        if intent.status == "dead" != before and (announcement := self.on_death(intent)):
            self._insert([announcement])
        return intent

    def _delete(self, statement, values):
        rows = self._db.execute(statement, values).fetchall()
        self._moves += [(row, row.status, None) for row in rows]
        return rows

    def _require_room(self, publisher, number, most):
        """Raise RateLimited if a publisher would have more than so many unfinished intents, with that many new ones."""
        self._exclusively("publisher", publisher)
        stored = self._db.execute("""
            SELECT COALESCE(SUM(intents), 0) AS intents
            FROM   tallies
            WHERE  publisher = :publisher
            AND    status IN ('open', 'claimed')
        """, dict(publisher=publisher)).fetchone().intents
        moved = sum((after in ("open", "claimed")) - (before in ("open", "claimed"))
                    for intent, before, after in self._moves if intent.publisher == publisher)
        if stored + moved + number > most:
            raise RateLimited(f"This key may have {most} unfinished intents; wait until some are done.", "limit_exceeded")

    def _tally(self):
        """Bring the tallies up to date with what this transaction has moved from one status to another."""
        moved = collections.Counter()
        for intent, before, after in self._moves:
            if before != after:
                moved[intent.namespace, intent.publisher, before] -= 1
                moved[intent.namespace, intent.publisher, after] += 1
        self._db.executemany(self.TALLY, [dict(namespace=namespace, publisher=publisher, status=status, intents=number)
                                          for (namespace, publisher, status), number in moved.items() if number and status])

    def _due(self, now):
        return self._db.execute(DUE + self.FREE, dict(now=now, rows=SETTLE_ROWS)).fetchall()

    def _wake(self, due, now):
        counts = Record(expired_open_dead=0, expired_claims_dead=0)
        for intent in due:
            claimed = intent.status == "claimed"
            if self._change(intent, intent.woken(now)).ended:
                counts["expired_claims_dead" if claimed else "expired_open_dead"] += 1
        return counts

    def _note_clock(self, now, offset, boot):
        newest = self._db.execute("SELECT MAX(id) AS id FROM intents").fetchone().id     # ids keep the time of their making
        self._remember("clock", "", "", to_json([newest, now, offset, boot]), FOREVER)

    def _recall(self, db, kind, owner, key, now):
        found = db.execute("""
            SELECT value
            FROM   memos
            WHERE  kind = :kind
            AND    owner = :owner
            AND    key = :key
            AND    expires_at > :now
        """, dict(kind=kind, owner=owner, key=key, now=now)).fetchone()
        return found and found.value

    def _remember_first(self, kind, owner, key, value, expires_at, now):
        return self._db.execute(REMEMBER_FIRST, dict(kind=kind, owner=owner, key=key, value=value, expires_at=expires_at,
                                                     now=now)).fetchone() is not None

    def _remember(self, kind, owner, key, value, expires_at):
        self._db.execute(REMEMBER, dict(kind=kind, owner=owner, key=key, value=value, expires_at=expires_at))

    # -- Group commit --

    def _commit(self, run, synced):
        """Queue an operation and return its result; whoever finds the writing lock free commits all that are queued."""
        job = Job(run, synced)
        self._jobs.append(job)
        while not job.ended:
            if self._writing.acquire(blocking=False):
                self._lead()
            else:
                job.called.get()
        if job.error:
            raise job.error
        return job.result

    def _lead(self):
        """Commit what is queued, with the writing lock in hand, and pass that on."""
        moves = ()
        try:
            moves = self._commit_queue()
            self._cut_log()
        finally:
            self._pass_on()
        if moves:
            self.on_commit(moves)

    def _pass_on(self):
        """Let go of the writing lock, and call who waits first; those whose operation has ended are called already."""
        self._writing.release()
        with contextlib.suppress(IndexError):     # nobody waits
            self._jobs[0].called.put(None)

    @contextlib.contextmanager
    def _alone(self):
        """Hold the writing lock for something else than a commit."""
        self._writing.acquire()
        try:
            yield
        finally:
            self._pass_on()

    def _commit_queue(self):
        """Run every queued operation in one transaction and return what it stored or changed, as on_commit takes it."""
        jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
        self._moves = []
        try:
            with self._translated():
                self._require_file()
                self._sync(any(job.synced for job in jobs))
                self._db.execute("BEGIN IMMEDIATE")
                for job in jobs:
                    self._attempt(job)
                self._tally()
                self._db.execute("COMMIT")
        except BaseException as error:     # the whole commit is lost: one job's fault, or everybody's
            self._moves = []
            at_fault = [job for job in jobs if job.error]
            self._jobs.extendleft(job for job in reversed(jobs) if at_fault and not job.error)     # once more, without it
            jobs = at_fault or jobs
            for job in jobs:
                job.error = job.error or (
                    error if isinstance(error, Exception) else Unavailable("The bus was interrupted; try again."))
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if not isinstance(error, Exception):
                raise
        finally:
            for job in jobs:
                job.ended = True
                job.called.put(None)
        return [(intent, before) for intent, before, after in self._moves if after]

    def _attempt(self, job):
        """Run one operation. What it refuses hurts no neighbour; raises what fails after it has written something."""
        before = self._db.total_changes
        try:
            with self._translated():
                job.result = job.operation()
        except Exception as error:
            job.error = error
            if self._db.total_changes != before or not self._db.in_transaction:     # SQLite ends it when the disk is full
                raise

    def _sync(self, wanted):
        """Have the next commits on disk before they return, or later: a write-ahead log stays whole either way."""
        if wanted != self._synced and self.warning is None:
            self._db.execute(f"PRAGMA synchronous = {'FULL' if wanted else 'NORMAL'}")
            self._synced = wanted

    def _cut_log(self):
        """Cut the write-ahead log if it has grown long, as it does while there is always somebody reading."""
        import sqlite3
        with contextlib.suppress(OSError, sqlite3.Error):     # what was committed is; the next commit meets the trouble
            if (length := os.path.getsize(self.path + "-wal")) <= self._cut_at:
                return
            deadline = time.monotonic() + WAL_PATIENCE_SECONDS
            self._db.execute("PRAGMA busy_timeout = 0")     # SQLite would wait for all readers to be away at one moment
            while blocked := self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone().busy:
                if time.monotonic() >= deadline:
                    break
                time.sleep(0.005)
            self._db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
            self._cut_at = length + WAL_BYTES // 2 if blocked else WAL_BYTES

    def _require_file(self):
        """Raise Unavailable if the path leads elsewhere by now: what is written would be gone with the process."""
        try:
            there = os.stat(self.path)
        except OSError:
            there = None
        if not there or not os.path.samestat(there, self._file):
            raise Unavailable(f"The database {self.path} was deleted or replaced while the bus was using it; put the "
                              "right file there and restart the bus.")

    # -- Connections --

    def _connect(self, readonly=False, alone=False):
        import sqlite3
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None, check_same_thread=False)
        db.row_factory = lambda cursor, row: Intent(zip(map(FIRST, cursor.description), row))
        if alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")     # reads a write-ahead log without shared memory
        db.execute(f"PRAGMA query_only = {int(readonly)}")
        db.execute("PRAGMA synchronous = FULL")     # an answered publish survives a power cut
        db.execute("PRAGMA fullfsync = 1")     # on macOS too, where fsync leaves it in the disk's cache
        return db

    @contextlib.contextmanager
    def _reader(self):
        """Lend a connection that cannot write, as soon as one is free."""
        with self._reading, self._translated():
            try:
                db = self._readers.pop()
            except IndexError:
                db = self._connect(readonly=True)
            try:
                yield db
            finally:
                self._readers.append(db)

    @contextlib.contextmanager
    def _translated(self):
        """Turn what SQLite raises about the file into errors of ours."""
        import sqlite3
        try:
            yield
        except sqlite3.IntegrityError:     # a fault of ours, not of the file
            raise
        except sqlite3.DatabaseError as error:
            if "full" in str(error) or getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_WRITE":     # over a quota
                raise StorageFull("The disk under the database is full; nothing of this request was stored.") from error
            raise Unavailable(f"The database cannot be used just now: {error}.") from error

    def _lock_file(self):
        """Hold a lock that ends with this process, so that no second bus serves the same file."""
        guard = open(self.path + ".lock", "a+")
        try:
            lock(guard)
        except (BlockingIOError, PermissionError) as error:
            guard.close()
            raise SetupError(f"Another bus is serving {self.path}; stop it, or give this one another --db.") from error
        return guard

    def _shared_memory(self):
        """Return whether a file here can be mapped, as a write-ahead log needs; SQLite itself would say "disk I/O error"."""
        import mmap
        self._guard.truncate(1)     # an empty file cannot be mapped anywhere
        try:
            mmap.mmap(self._guard.fileno(), 1).close()
        except OSError:
            return False
        return True

    def _prepare(self, journal):
        """Bring the file to the journal mode, which may have to be another, and the schema of this version."""
        version = self._db.execute("PRAGMA user_version").fetchone().user_version
        owner = self._db.execute("PRAGMA application_id").fetchone().application_id
        if owner != APPLICATION_ID and self._db.execute("SELECT name FROM sqlite_master LIMIT 1").fetchone():
            raise SetupError(f"The database {self.path} belongs to another program; give the bus another --db.")
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        mode = self._db.execute(f"PRAGMA journal_mode = {journal}").fetchone().journal_mode
        if mode != "wal":
            self._db.execute("PRAGMA locking_mode = NORMAL")
            self._db.execute("PRAGMA journal_mode = TRUNCATE")     # a deleted one may be back after a power cut
            self.warning = f"{self.path} is on a file system without shared memory: the bus works, but slower."
        self._db.execute("BEGIN IMMEDIATE")
        for statement in statements(version):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self._db.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._db.execute("COMMIT")
        self._version = self._db.execute("PRAGMA data_version").fetchone().data_version


# ---- 5. Bus ----
# The rules. Every verb of IntentClient is one here, with the same arguments and errors, and `caller`: who asks.

Caller = collections.namedtuple("Caller", "key_id owner role admin most")     # most: of unfinished intents, or None
OWNER = Caller(key_id="owner", owner="owner", role="both", admin=True, most=None)


def hash_token(token):
    """Return what is stored of a claim token, so that a copy of the file gives no lease away."""
    return hashlib.sha256(token.encode()).hexdigest()


def lease_lost(intent_id):
    """Return the error of a worker whose claim is not, or no longer, the latest one; the same for an unknown id."""
    return NotFound(f"The claim of intent {intent_id} is over, or is another's: drop the job.")


STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC if sys.platform == "darwin" else None)


def steady_clock():
    """Return seconds that run evenly, also while the machine sleeps.

    Linux has CLOCK_BOOTTIME for that; on macOS, CLOCK_MONOTONIC does so, and what time.monotonic() reads does not.
    """
    if STEADY is None:
        return time.monotonic()
    return time.clock_gettime(STEADY)


def this_boot():
    """Return what names the time since this machine was started, in which its steady clock runs on; None if unknown."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() if hasattr(time, "CLOCK_BOOTTIME") else None


class Waiter:
    """A request that is held until there is news of one of its keys."""

    __slots__ = ("keys", "news", "about", "deadline", "dismissed")

    def __init__(self, keys, seconds):
        self.keys, self.news, self.deadline = keys, threading.Event(), time.monotonic() + seconds
        self.about, self.dismissed = (), False     # the keys of the news, which another can use in our place

    def wait(self, most):
        """Return whether there was news before the deadline, and before so many seconds were over."""
        return self.news.wait(max(0, min(most, self.deadline - time.monotonic())))


class Waiting:
    """The held requests, by what each waits for: a lane, or the end of an intent."""

    def __init__(self):
        self._lock = threading.Lock()
        self._held = {}     # key: {waiter: None}, the longest held first
        self._closed = False

    def hold(self, waiter):
        """Put a waiter where news finds it, and return what its news so far was about; none is missed from now on."""
        with self._lock:
            waiter.news.clear()
            about, waiter.about = waiter.about, ()
            for key in waiter.keys:
                self._held.setdefault(key, {})[waiter] = None
            if self._closed:
                self._dismiss(waiter)
        return about

    def leave(self, waiter):
        """Take a waiter away; news that it had and did not use goes to the next one."""
        with self._lock:
            self._drop(waiter)
        self.wake_one(waiter.about)

    def number(self):
        """Return how many there are."""
        with self._lock:
            return len(set().union(*self._held.values()))

    def wake_one(self, keys):
        """Wake the one that has waited longest for any of these keys."""
        with self._lock:
            for key in keys:
                if key in self._held:
                    return self._wake(next(iter(self._held[key])), keys)

    def wake_all(self, keys=None):
        """Wake everyone that waits for one of these keys, or for anything."""
        with self._lock:
            for key in list(self._held if keys is None else keys):
                for waiter in list(self._held.get(key, ())):
                    self._wake(waiter)

    def close(self):
        """Send everyone home, now and from now on."""
        with self._lock:
            self._closed = True
            for waiter in set().union(*self._held.values()):
                self._dismiss(waiter)

    def _dismiss(self, waiter):
        waiter.dismissed = True
        self._wake(waiter)

    def _wake(self, waiter, about=()):
        self._drop(waiter)
        waiter.about = about
        waiter.news.set()

    def _drop(self, waiter):
        for key in waiter.keys:
            waiters = self._held.get(key, {})
            waiters.pop(waiter, None)
            if not waiters:
                self._held.pop(key, None)


class Roster:
    """The workers that were seen lately, in memory: a hint to people, which no rule depends on."""

    def __init__(self):
        self._lock = threading.Lock()
        self._workers = collections.OrderedDict()     # (owner, id): record, the one seen last at the end
        self._counted = {}     # (namespace, goal, owner): (number, until when it may be said again)

    def see(self, now, owner, worker, namespace, goals, version):
        """Note that a worker asks for work, of these goals or of any."""
        with self._lock:
            self._workers[owner, worker] = Record(id=worker, owner=owner, namespace=namespace, goals=list(goals),
                                                  last_seen=now, version=version, intent=None)
            self._workers.move_to_end((owner, worker))
            if len(self._workers) > WORKERS:
                self._workers.popitem(last=False)

    def busy(self, owner, worker, intent_id):
        """Note which intent a worker has got."""
        with self._lock, contextlib.suppress(KeyError):
            self._workers[owner, worker]["intent"] = intent_id

    def seen(self, now):
        """Return the workers of the last WORKER_SECONDS, the latest first."""
        with self._lock:
            return [Record(worker) for worker in itertools.takewhile(
                lambda worker: abs(now - worker.last_seen) < WORKER_SECONDS, reversed(self._workers.values()))]

    def listening(self, now, namespace, goal, owner=None):
        """Return how many workers of an owner, or of anyone, are there for a goal; more than none is said for a second."""
        number, until = self._counted.get((namespace, goal, owner), (0, 0))
        if not number or not 0 <= until - now <= RECHECK_SECONDS:
            number = sum(worker.namespace == namespace and owner in (None, worker.owner)
                         and (goal in worker.goals or not worker.goals) for worker in self.seen(now))
            if len(self._counted) >= WORKERS:
                self._counted.clear()
            self._counted[namespace, goal, owner] = number, now + RECHECK_SECONDS
        return number


NEWS = "events"     # the key of those who watch; no lane and no id
DEATHS = "intent.dead"     # the goal of the intents that announce deaths
COUNTED = {"published": "published", "fulfilled": "fulfilled", "failed": "failed", "lost": "failed", "dead": "failed"}
EVENT_FIELDS = ("id", "namespace", "goal", "status", "claim_attempts", "worker_id", "last_error", "owner", "claim_owner")
EVENTS_BY_OUTCOME = {"failed": "failed", "released": "released", None: "lost"}     # of a claimed intent that is open again


def event(intent, before):
    """Return the word for what has happened to an intent that was in a state before; None for nothing to speak of."""
    if intent.status == before or intent.status == "open" and before == "open":
        return None
    if intent.status == "open":
        return {None: "published", "dead": "retried"}.get(before) or EVENTS_BY_OUTCOME[intent.claim_outcome]
    return intent.status


class Bus:
    """Publish, claim, fulfill, fail: what may happen to an intent, and who may ask for it.

    `clock` and `steady` return seconds; the second one runs evenly from wherever it started, `boot` names that start.
    A store that several buses share has a clock of its own, which takes the place of both, and is never corrected.
    """

    def __init__(self, store, require_claim_token=False, retention=RETENTION_SECONDS, announce_dead=False,
                 clock=None, steady=None, jitter=random.random, boot=this_boot):
        self.store, self.require_claim_token, self.retention = store, require_claim_token, retention
        self._clock, self._steady = clock or store.clock or time.time, steady or steady_clock
        self._jitter = jitter
        self._setting_clock = threading.Lock()
        self._waiting = Waiting()
        self._stopped = threading.Event()
        self._tender = threading.Thread(target=self._tend, daemon=True)
        self._alarm = threading.Condition()
        self._alarm_at = self._next_round = self._next_probe = self._next_count = 0
        self._problem = None
        self._roster, self._goals = Roster(), set()     # (namespace, goal) of those that are known to have had a worker
        self._recording = threading.Lock()
        self._events, self._event = collections.deque(maxlen=EVENTS), int(self._clock() * 1000)     # goes on after a restart
        self._history = collections.Counter()     # (minute, event): times, that are not stored yet
        self._boot, self._note_at = boot(), 0
        self._offset = None if store.clock and not clock else self._offset_on_record()
        store.on_commit, store.on_news = self._announce, self._tell
        if announce_dead:
            store.on_death = self._announcement

    # -- Publishing --

    def publish(self, goal, payload, *, idempotency_key=None, caller=OWNER, **fields):
        """Store an intent and return {"id", "status", "namespace", "listening"}; it is on disk by then.

        fields are those of PUBLISH_DEFAULTS; delay, ttl and backoff_base are seconds, run_at is Unix seconds. With an
        idempotency_key that was used for the same intent, return the first answer; for another one, raise
        IdempotencyConflict. listening is how many workers were there for the goal lately; if it is 0 and nobody ever
        claimed one, never_claimed is true.
        """
        wanted = Record(PUBLISH_DEFAULTS, **fields, goal=goal, payload=payload)
        answer = self._publish([dict(fields, goal=goal, payload=payload)], idempotency_key, caller, lambda ids: Record(
            id=ids[0], status="published", namespace=wanted.namespace))
        return Record(answer, **self._audience(wanted, caller))

    def publish_many(self, intents, *, idempotency_key=None, caller=OWNER):
        """Store intents, each a dict of what publish takes, all or none, and return {"ids"}."""
        return self._publish(intents, idempotency_key, caller, lambda ids: Record(ids=ids))

    def _publish(self, wanted, idempotency_key, caller, answer_with):
        now = self.now()
        intents = [Intent.new(now, caller.owner, caller.key_id, fields) for fields in wanted]
        answer = answer_with([intent.id for intent in intents])
        idempotency = None
        if idempotency_key:
            asked = json.dumps([list(answer), wanted], sort_keys=True)     # one key for both endpoints is a conflict too
            idempotency = caller.key_id, idempotency_key, hashlib.sha256(asked.encode()).hexdigest()
        return self.store.add(intents, answer, now, idempotency, caller.most)

    def _audience(self, wanted, caller):
        """Return who is there for an intent, as publish says it."""
        owner = caller.owner if wanted.visibility == "private" else None
        listening = self._roster.listening(self.now(), wanted.namespace, wanted.goal, owner)
        if listening or (wanted.namespace, wanted.goal) in self._goals or self.store.recall(
                "goal", wanted.namespace, wanted.goal, self.now()) is not None:
            return dict(listening=listening)
        return dict(listening=0, never_claimed=True)

    def cancel(self, intent_id, *, caller=OWNER):
        """End an unfinished intent; raises Conflict if it has ended."""
        now = self.now()     # before the rule, here and below: inside a commit, now() could wait for another commit
        def rule(intent):
            self._require_publisher(intent, caller)
            if intent.ended:
                raise Conflict(f"This intent is {intent.status}; only an unfinished one can be cancelled.")
            return intent.cancelled(now)
        return self._outcome(self._change(intent_id, rule))

    def retry(self, intent_id=None, *, goal=None, namespace=None, limit=1000, caller=OWNER):
        """Open a dead intent anew, or up to limit of them by goal and namespace (then return {"retried": N})."""
        now = self.now()
        def rule(intent):
            self._require_publisher(intent, caller)
            if intent.status != "dead":
                raise Conflict(f"This intent is {intent.status}; only a dead one can be retried.")
            return intent.retried(now)
        if intent_id is not None:
            return self._outcome(self._change(intent_id, rule))
        owner = None if caller.admin else caller.owner
        return Record(retried=self.store.change_dead(limit, rule, owner=owner, goal=goal, namespace=namespace))

    # -- Working --

    def claim(self, goal=None, *, namespace="default", publisher=None, worker_id=None, capabilities=(), wait=0,
              lease=LEASE_SECONDS, claim_token=None, caller=OWNER, seen_as=None, still_there=lambda: True):
        """Take the first intent of a goal (a string, several, or None for any), or None if there is none.

        wait and lease are seconds. A claim repeated with a claim_token of one's own takes the same intent again, as one
        attempt. seen_as is the (name, version) of the worker, for people to read. still_there() tells whether the
        caller can still be answered.
        """
        if publisher not in (None, caller.owner) and not caller.admin:
            raise Forbidden("A claim by publisher may name the caller only; the owner key may name anyone.")
        goals = [goal] if isinstance(goal, str) else goal or [""]
        if len(goals) * (1 + len(capabilities)) > CLAIM_COMBINATIONS:
            raise Invalid(f"A claim may name at most {CLAIM_COMBINATIONS} goals times capabilities.")
        lanes = [lane(namespace, audience, target, capability, goal, publisher or audience)
                 for goal in goals
                 for audience in (publisher or caller.owner, "")
                 for target in dict.fromkeys((None, worker_id))
                 for capability in (None, *capabilities)]
        token = claim_token or os.urandom(16).hex()
        token_hash = hash_token(token)
        worker, version = seen_as or (worker_id or caller.key_id, __version__)
        self._roster.see(self.now(), caller.owner, worker, namespace, filter(None, goals), version)

        def attempt():
            now = self.now()
            return self.store.claim(lanes, now, lambda intent: intent.claimed(
                now, token_hash, lease, caller.owner, worker_id), claim_token and token_hash, caller.owner)

        intent = self._held(lanes, attempt, wait, still_there)
        if intent:
            self._roster.busy(caller.owner, worker, intent.id)
            self._know(intent.namespace, intent.goal)
        return intent and Record(intent, payload=json.loads(intent.payload), claim_token=token,
                                 claim_timeout=int(lease)).pick(CLAIM_FIELDS)

    def _know(self, namespace, goal):
        """Keep on record that a goal has a worker."""
        if (namespace, goal) in self._goals:
            return
        with contextlib.suppress(Unavailable, StorageFull):     # a claim is no less good for it
            self.store.remember("goal", namespace, goal, "", self.now() + GOAL_SECONDS)
            if len(self._goals) >= WORKERS:
                self._goals.clear()
            self._goals.add((namespace, goal))

    def extend_claim(self, intent_id, claim_token=None, seconds=LEASE_SECONDS, *, caller=OWNER):
        """Let the lease end that many seconds from now; raises NotFound once it is over."""
        now = self.now()
        def rule(intent):
            if self._claim_outcome(intent, claim_token, caller) or intent.status != "claimed":
                raise lease_lost(intent.id)
            return intent.extended(now, seconds)
        intent = self._change_claim(intent_id, claim_token, rule)
        return Record(ok=True, id=intent.id, extended_by=seconds, claim_expires_at=intent.claim_expires_at)

    def fulfill(self, intent_id, claim_token=None, result=None, result_type="json", *, caller=OWNER):
        """Report the work done, with its result: any JSON value, or a string with result_type "text"."""
        if result_type == "text" and not isinstance(result, str):
            raise Invalid('result must be a string when result_type is "text".', code="invalid_result")
        self._report("fulfilled", intent_id, claim_token, caller,
                     lambda intent, now: intent.fulfilled(now, result, result_type))
        return Record(ok=True, id=intent_id)

    def fail(self, intent_id, claim_token=None, error=None, retry=True, *, caller=OWNER):
        """Report the work failed: it is tried again after a backoff, or dead if no attempt is left or retry is false."""
        reason = (error or "The worker gave no reason.")[:ERROR_CHARACTERS]
        jitter = self._jitter() * BACKOFF_JITTER_SECONDS
        return self._outcome(self._report("failed", intent_id, claim_token, caller,
                                          lambda intent, now: intent.failed(now, reason, retry, jitter)))

    def release(self, intent_id, claim_token=None, delay=0, *, caller=OWNER):
        """Hand an intent back as if it had not been claimed, to be claimed again after a delay in seconds."""
        return self._outcome(self._report("released", intent_id, claim_token, caller,
                                          lambda intent, now: intent.released(now, delay)))

    # -- Looking --

    def get_status(self, intent_id, *, caller=OWNER):
        """Return the state of an intent, without payload and result."""
        return self._visible(intent_id, caller).pick(STATUS_FIELDS)

    def get_result(self, intent_id, wait=0, *, caller=OWNER, still_there=lambda: True):
        """Return the state of an intent with its result, once it has ended or wait seconds are over."""
        def attempt():
            intent = self._visible(intent_id, caller)
            return intent if intent.ended else None
        intent = self._held((intent_id,), attempt, wait, still_there) or self._visible(intent_id, caller)
        found = Record(intent.pick(STATUS_FIELDS), result=self._result(intent), result_type=intent.result_type or "json")
        if intent.last_error:
            found["error"] = intent.last_error
        return found

    def list(self, *, status=None, goal=None, namespace=None, limit=50, before=None, payload=False, caller=OWNER):
        """Return {"intents": newest first, "next": what to pass as before for the next page, or None}.

        A page may be short, and still have a next one: of many intents it looks at some only.
        """
        self.settle()
        owner = None if caller.admin else caller.owner
        rows, floor = self.store.list(limit + 1, owner, status, goal, namespace, before)
        intents = [row.pick(STATUS_FIELDS) for row in rows[:limit]]
        if payload:
            for intent, row in zip(intents, rows):
                intent["payload"] = json.loads(row.payload)
        return Record(intents=intents, next=intents[-1].id if len(rows) > limit else floor)

    def workers(self, *, caller=OWNER):
        """Return {"workers"}: who has asked for work lately, the latest first."""
        return Record(workers=[worker for worker in self._roster.seen(self.now())
                               if caller.admin or worker.owner == caller.owner])

    def events(self, after=None, wait=0, *, caller=OWNER, still_there=lambda: True):
        """Return {"events": what has happened after a number, "next": the number to go on from, "missed"}.

        Without a number, from now on. Held for up to wait seconds if nothing has happened; the last EVENTS are kept, and
        missed says how many more there were.
        """
        after = self._event if after is None or after > self._event else after
        def attempt():
            with self._recording:
                return [Record(event) for event in self._events if event.number > after and (
                    caller.admin or caller.owner in (event.owner, event.claim_owner))]
        found = self._held((NEWS,), attempt, wait, still_there) or []
        with self._recording:
            oldest = self._events[0].number if self._events else self._event + 1
        last = found[-1].number if found else max(after, oldest - 1)
        return Record(events=found, next=last, missed=max(0, oldest - 1 - after))

    # -- Keys and values --

    def set(self, key, value, ttl=VALUE_TTL_SECONDS, if_absent=False, *, caller=OWNER):
        """Keep a JSON value for ttl seconds; with if_absent, raises Conflict if the key is taken: a lock."""
        now = self.now()
        memo = ("store", caller.owner, key, to_json(value), now + ttl)
        if not if_absent:
            self.store.remember(*memo)
        elif not self.store.remember_first(*memo, now):
            raise Conflict(f"The key {key} is taken.")
        return Record(ok=True)

    def get(self, key, *, caller=OWNER):
        """Return the value of a key; raises NotFound."""
        value = self.store.recall("store", caller.owner, key, self.now())
        if value is None:
            raise NotFound(f"There is no value for {key}.")
        return json.loads(value)

    def delete(self, key, *, caller=OWNER):
        """Forget a key; return whether there was a value."""
        return Record(ok=True, deleted=self.store.forget("store", caller.owner, key, self.now()))

    # -- Administration: the caller is known to be an admin --

    def purge(self, confirm=False, namespace=None, *, caller=OWNER):
        """Delete all intents of a namespace, or of every one, if confirm says so."""
        if not confirm:
            raise Invalid('This deletes for good: say {"confirm": true}.', code="confirmation_required")
        total = 0
        while deleted := self.store.purge(namespace):
            total += deleted
        return Record(ok=True, deleted=total)

    def cleanup(self, *, caller=OWNER):
        """Carry out all that time has brought, and delete all that is over; return how many of what kind."""
        counts, step = collections.Counter(), None
        while step is None or any(step.values()):
            step = Record(self.store.settle(self.now()), **self.store.clean(self.now(), self.retention))
            counts.update(step)
        return Record(counts)

    def inspect(self, intent_id, *, caller=OWNER):
        """Return everything about an intent but its claim token."""
        intent = self._fresh(intent_id)
        hidden = ("claim_token_hash", "lane", "ready", "wake_at", "claim_outcome")
        return Record({name: value for name, value in intent.items() if name not in hidden},
                      payload=json.loads(intent.payload), result=self._result(intent))

    def dead_letter(self, intent_id, *, caller=OWNER):
        """Return everything about a dead intent."""
        intent = self.inspect(intent_id)
        if intent.status != "dead":
            raise NotFound(f"There is no dead intent {intent_id}.")
        return Record(intent, intent_id=intent.id, attempts=intent.claim_attempts, reason=intent.last_error)

    def sweep_dead(self, action, *, goal=None, namespace=None, ids=None, until=None, caller=OWNER):
        """Count, retry or delete the dead intents of a goal, a namespace, these ids; return {"number", "until"}.

        Only those that were dead by until, in Unix seconds, now if it is not given: what was counted is what is touched.
        """
        now = self.now()
        which = dict(goal=goal, namespace=namespace, ids=ids, until=now if until is None else min(until, now))
        if action == "count":
            return Record(number=self.store.count_dead(**which), until=which["until"])
        verb = self.store.delete_dead if action == "delete" else functools.partial(
            self.store.change_dead, rule=lambda intent: intent.retried(now))
        total = 0
        while number := verb(BULK_INTENTS, **which):
            total += number
        return Record(number=total, until=which["until"])

    def dead(self, limit=100, *, caller=OWNER):
        """Return the newest dead letters."""
        return [Record(intent_id=intent.id, namespace=intent.namespace, goal=intent.goal, attempts=intent.claim_attempts,
                       reason=intent.last_error, created_at=intent.created_at)
                for intent in self.store.list(limit, status="dead")[0]]

    def summary(self, minutes=60, *, caller=OWNER):
        """Return how the bus is, at a glance, and what has happened in so many minutes, by ten if they are more than 60.

        Intents by namespace and status; for each goal that waits, since when (run_at) and how many workers are there;
        workers; what happened: [[minute of Unix time, event, times]]; sizes in bytes, requests held.
        """
        self.settle()
        now, intents = self.now(), {}
        for row in self.store.tallies():
            states = intents.setdefault(row.namespace, {})
            states[row.status] = states.get(row.status, 0) + row.intents
        database, log = self.store.bytes()
        return Record(version=__version__, now=now, intents=intents, keys=len(self.store.keys()),
                      held_requests=self._waiting.number(), database_bytes=database, wal_bytes=log,
                      waiting=self._longest_waiting(now), workers=self._roster.seen(now)[:WAITING_LANES],
                      history=self._past(int(now // 60) - minutes + 1, 1 if minutes <= 60 else 10))

    def _longest_waiting(self, now):
        """Return {"namespace", "goal", "run_at", "listening"} of each goal that waits, the longest first."""
        waiting = {}
        for head in sorted(self.store.waiting(WAITING_LANES), key=operator.attrgetter("run_at")):
            waiting.setdefault((head.namespace, head.goal), head)
        return [Record(namespace=namespace, goal=goal, run_at=head.run_at,
                       listening=self._roster.listening(now, namespace, goal))
                for (namespace, goal), head in waiting.items()]

    def _past(self, since, step):
        """Return [[minute, event, times]] of the minutes of Unix time from one on, taken together by so many."""
        with self._recording:
            found = [(minute, event, times) for (minute, event), times in self._history.items() if minute >= since]
        past = collections.Counter()
        for minute, event, times in [*found, *(row.values() for row in self.store.history(since))]:
            past[minute - minute % step, event] += times
        return [[minute, event, times] for (minute, event), times in sorted(past.items())]

    def problem(self):
        """Return, in a sentence, why the database cannot be written, or None if all is well; tried once a second at most."""
        if time.monotonic() >= self._next_probe:
            self._next_probe = time.monotonic() + RECHECK_SECONDS
            try:
                self.store.remember("probe", "", "", "", self.now() + RECHECK_SECONDS)
                self._problem = None
            except Error as error:
                self._problem = str(error)
        return self._problem

    # -- Time --

    def now(self):
        """Return Unix seconds. If the clock has been set meanwhile, all that waits is first moved along with it."""
        if self._offset is None:
            return self._clock()
        with self._setting_clock:
            wall = self._clock()
            offset = wall - self._steady()
            if abs(offset - self._offset) > CLOCK_JUMP_SECONDS:
                self.store.shift(offset - self._offset, wall, offset, self._boot)
            self._offset = offset
            return wall

    def _offset_on_record(self):
        """Return how far the clock was from the steady one before this bus was started: it may have been set since."""
        latest, noted = self.store.latest()
        if self._boot and self._boot in noted:
            return noted[0]
        wall = self._clock()
        slept = latest and wall - latest > YEAR_SECONDS     # rather a wrong clock than a bus that was off for a year
        return (latest if slept else max(latest, wall)) - self._steady()

    def settle(self):
        """Carry out what time has brought. A claim does so by itself; this is for those who look or wait."""
        now, wake_at = self.now(), self.store.next_wake()
        if wake_at and wake_at <= now:
            self.store.settle(now)

    def start(self):
        """Settle whenever something is due, until stop(): for a bus that holds requests."""
        self._tender.start()

    def stop(self):
        """Answer every held request now, and hold none any more."""
        self._stopped.set()
        self._waiting.close()
        with self._alarm:
            self._alarm.notify()
        if self._tender.is_alive():
            self._tender.join(SHUTDOWN_SECONDS)     # it may wait for the database

    def tend_sometimes(self):
        """Do what start() does in a thread, once in RECHECK_SECONDS at most: for a bus without a thread of its own."""
        if time.monotonic() >= self._next_round:
            self._next_round = time.monotonic() + RECHECK_SECONDS
            self._tidy()

    def _tidy(self):
        """Settle, delete what is over, and put on record what has happened and what time it is."""
        self.settle()
        self.store.clean(self.now(), self.retention)
        if self._history and time.monotonic() >= self._next_count:
            self._next_count = time.monotonic() + USAGE_SECONDS
            counted = collections.Counter(self._history)
            self.store.count_events([dict(minute=minute, event=event, times=times)
                                     for (minute, event), times in sorted(counted.items())])
            with self._recording:
                self._history -= counted
        if self._offset is not None and self._steady() >= self._note_at and self.store.next_wake():
            self._note_at = self._steady() + CLOCK_RECORD_SECONDS
            self.store.note_clock(self.now(), self._offset, self._boot)

    def _tend(self):
        while not self._stopped.is_set():
            try:
                self._tend_once()
            except Error:     # the next round may find it well again
                self._stopped.wait(RECHECK_SECONDS)
        with contextlib.suppress(Error):
            self._note_at = self._next_count = 0
            self._tidy()

    def _tend_once(self):
        self._alarm_at = self.now() + RECHECK_SECONDS     # what is announced from here on can only bring it forward
        self._tidy()
        if self.store.changed_elsewhere():
            self._waiting.wake_all()
        self._sleep_until(self.store.next_wake())

    def _sleep_until(self, wake_at):
        with self._alarm:
            self._alarm_at = min(self._alarm_at, wake_at or self._alarm_at)
        while not self._stopped.is_set():
            now = self.now()     # not under the lock of the alarm: it may commit, and a commit announces
            with self._alarm:
                seconds = min(self._alarm_at - now, RECHECK_SECONDS)     # not until alarm_at: the clock may be set
                if seconds <= 0 or self._stopped.is_set() or not self._alarm.wait(seconds):
                    return

    def _announce(self, moves):
        """Count what a commit has done, and tell everyone."""
        minute = int(self._clock() // 60)
        with self._recording:
            self._history.update((minute, COUNTED[word]) for move in moves if (word := event(*move)) in COUNTED)
        self._tell(moves)

    def _tell(self, moves):
        """Remember what a commit has done, here or at another bus, and wake whom it is news to."""
        self._record([(word, intent) for intent, before in moves if (word := event(intent, before))])
        for intent, _ in moves:
            if intent.ready:
                self._waiting.wake_one(patterns(intent.lane))
            elif intent.ended:
                self._waiting.wake_all((intent.id,))
            elif intent.wake_at < self._alarm_at:
                with self._alarm:
                    self._alarm_at = intent.wake_at
                    self._alarm.notify()

    def _record(self, events):
        """Remember what has happened, for those who watch."""
        if not events:
            return
        now = self._clock()
        with self._recording:
            for word, intent in events:
                self._event += 1
                self._events.append(Record(intent.pick(EVENT_FIELDS), number=self._event, time=now, event=word))
        self._waiting.wake_all((NEWS,))

    def _announcement(self, intent):
        """Return the intent that tells of a death; such intents die unannounced."""
        if intent.goal == DEATHS:
            return None
        told = Record(id=intent.id, goal=intent.goal, namespace=intent.namespace, reason=intent.last_error,
                      attempts=intent.claim_attempts, worker_id=intent.worker_id, created_at=intent.created_at)
        return Intent.new(intent.completed_at, intent.owner, OWNER.key_id,
                          dict(goal=DEATHS, namespace=intent.namespace, payload=told))

    # -- Rules shared by several verbs --

    def _held(self, keys, attempt, wait, still_there):
        """Return what attempt() finds, tried again whenever there is news of these keys, for up to wait seconds."""
        if not wait:
            return attempt()
        waiter, tended = Waiter(keys, wait), self._tender.is_alive()
        try:
            while True:
                about = self._waiting.hold(waiter)
                found = attempt()
                if found and about and found.lane != about[0]:     # it came for one intent, and took another
                    self._waiting.wake_one(about)
                if found or time.monotonic() >= waiter.deadline:
                    return found
                news = waiter.wait(wait if tended else RECHECK_SECONDS)     # untended, it looks for itself
                if waiter.dismissed or tended and not news or not still_there():
                    return None
        finally:
            self._waiting.leave(waiter)

    def _change(self, intent_id, rule):
        """Change an intent by a rule, after what time has brought it meanwhile."""
        now = self.now()
        def after_time(intent):
            woken = intent.woken(now) if intent.wake_at and intent.wake_at <= now else {}
            return dict(woken, **rule(Intent(intent, **woken)))
        return self.store.change(intent_id, after_time)

    def _report(self, outcome, intent_id, claim_token, caller, rule):
        """End a claim with an outcome, by rule(intent, now); once more with the same outcome changes nothing."""
        now = self.now()
        def once(intent):
            if self._claim_outcome(intent, claim_token, caller) == outcome:
                return {}
            if intent.claim_outcome:
                raise lease_lost(intent.id)
            return rule(intent, now)
        return self._change_claim(intent_id, claim_token, once)

    def _change_claim(self, intent_id, claim_token, rule):
        """Change an intent for its worker, who is not told whether others' intents exist."""
        if claim_token is None and self.require_claim_token:
            raise Invalid("claim_token is required on this bus.", code="invalid_claim_token")
        try:
            return self._change(intent_id, rule)
        except NotFound:
            raise lease_lost(intent_id) from None

    def _claim_outcome(self, intent, claim_token, caller):
        """Return how the latest claim was ended by its worker, None if it was not; raise NotFound if it is another's.

        A token proves the claim, even after its lease. Without one, it is enough to be the claim's owner while it runs.
        """
        if claim_token is None:
            if intent.status != "claimed" or intent.claim_owner != caller.owner:
                raise lease_lost(intent.id)
        elif not hmac.compare_digest(hash_token(claim_token), intent.claim_token_hash or ""):
            raise lease_lost(intent.id)
        return intent.claim_outcome

    def _fresh(self, intent_id):
        """Return an intent as it is now: time may have changed it, and nobody may have noticed yet."""
        intent = self.store.get(intent_id)
        return self._change(intent_id, lambda intent: {}) if intent.wake_at and intent.wake_at <= self.now() else intent

    def _visible(self, intent_id, caller):
        intent = self._fresh(intent_id)
        if not caller.admin and caller.owner not in (intent.owner, intent.claim_owner):
            raise no_such(intent_id)
        return intent

    def _require_publisher(self, intent, caller):
        if not caller.admin and caller.owner != intent.owner:
            raise no_such(intent.id)

    def _result(self, intent):
        return json.loads(intent.result) if intent.result_type == "json" else intent.result

    def _outcome(self, intent):
        return Record(ok=True, id=intent.id, status=intent.status, run_at=intent.run_at)


# ---- 6. Keys ----
# Who is asking: what a request presents becomes a Caller, or an error. And where this machine keeps its key.

ISSUED = re.compile(r"tk_([0-9a-f]{16})[0-9a-f]{40}")
CODE_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"     # those of Crockford's Base32, which are not mistaken for each other
CODE_MISREADINGS = str.maketrans("OIL", "011")


def presented_key(headers):
    """Return the key in a request's headers (names in lower case), or None: X-API-KEY, Bearer or Basic, in this order."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if "x-api-key" in headers:
        return headers["x-api-key"]
    if scheme.lower() == "bearer":
        return credentials.strip()
    return basic_credentials(headers)[1]


def basic_credentials(headers):
    """Return (user, password) as HTTP Basic has them (RFC 7617), or (None, None)."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        user, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        return "", ""
    return user, password


def sign(key, method, path, pairs, timestamp, nonce, body):
    """Return the signature of a request: HMAC-SHA256 over its canonical form, as PROTOCOL 2.0 says.

    path is decoded, pairs are the decoded names and values of the query, body is bytes.
    """
    quote = functools.partial(urllib.parse.quote, safe="")
    query = "&".join(f"{quote(name)}={quote(value)}" for name, value in sorted(pairs))
    head = "\n".join((method.upper(), f"{path}?{query}" if query else path, timestamp, nonce, ""))
    return hmac.new(key.encode(), head.encode() + body, hashlib.sha256).hexdigest()


def same(given, secret):
    """Return whether two strings are equal, in a time that does not tell where they differ."""
    return hmac.compare_digest((given or "").encode(), secret.encode())


class Keys:
    """The keys of a bus, and what may be done without one.

    The owner key may do everything. An issued key is its id and a MAC of that under the owner key, so the store knows
    ids only. An admin presents admin_secret or dashboard_password; where neither is set, the owner key.
    """

    def __init__(self, owner_key, store, admin_secret=None, dashboard_password=None, metrics_token=None,
                 require_signatures=False, rate=RATE_PER_MINUTE, most=None, clock=None):
        self._owner_key, self._store, self._clock = owner_key, store, clock or store.clock or time.time
        self._admin_secret, self._dashboard_password = admin_secret, dashboard_password
        self._metrics_token, self._require_signatures = metrics_token, require_signatures
        self._rate, self._failures = store.allowance(rate), Allowance(FAILURES_PER_MINUTE)
        self._most = UNFINISHED if most is None else most
        self._usage, self._written = {}, time.monotonic()     # key id: (requests, last time)
        self._lock = threading.Lock()

    def caller(self, request):
        """Return the Caller of a request; raises Unauthorized, Forbidden for its signature, RateLimited."""
        headers = request.headers
        presented = presented_key(headers)
        signed = "x-signature" in headers
        if presented is None and not (signed and "x-key-id" in headers):
            raise Unauthorized("Missing API key.")
        issued = ISSUED.fullmatch(presented or "")
        key_id = headers["x-key-id"] if presented is None else issued[1] if issued else "owner"
        key, caller = self._key(key_id), self._known(key_id)     # the same work for keys that are, were and never were
        if not same(key if presented is None else presented, key) or not caller:
            raise self._failed(request, Unauthorized("Invalid API key."))
        if signed or self._require_signatures:
            self._check_signature(request, key_id, key)
        if caller.most is not None:
            self._count(caller)
        return caller

    def require_admin(self, request):
        """Raise Unauthorized unless a request has the admin's credentials."""
        user, password = basic_credentials(request.headers)
        sound = False
        if self._admin_secret:
            sound = same(request.headers.get("x-admin-token"), self._admin_secret)
        if self._dashboard_password:
            sound = sound or user == "admin" and same(password, self._dashboard_password)
        if not self._admin_secret and not self._dashboard_password:
            with contextlib.suppress(Unauthorized):     # a browser, which signs nothing, or any of the ways of a key
                sound = user == "admin" and same(password, self._owner_key) or self.caller(request).admin
        if not sound:
            raise self._failed(request, Unauthorized("Authentication required.",
                                                     headers=[("WWW-Authenticate", 'Basic realm="Intent Bus"')]))

    def presents_admin(self, request):
        """Return whether a request comes with an admin's credentials, right or wrong, rather than with a key."""
        return "x-admin-token" in request.headers or bool(
            self._dashboard_password) and basic_credentials(request.headers)[0] == "admin"

    def require_metrics(self, request):
        """Raise Unauthorized unless a request may read the metrics."""
        if not self._metrics_token or not same(presented_key(request.headers), self._metrics_token):
            self.require_admin(request)

    def owner_of(self, publisher, request):
        """Return the owner that a request means by a publisher: a name, a key id, or the caller's own key."""
        if publisher is None or same(publisher, presented_key(request.headers) or ""):
            return publisher and request.caller.owner
        row = self._store.key(publisher)
        return row.owner if row else publisher

    def not_counted(self, caller):
        """Take a request off the caller's rate: a claim that found nothing."""
        if caller.most is not None:
            self._rate.take(caller.key_id, -1)

    def generate(self, owner, name, role, now):
        """Issue a key; return it, this once, with all about it."""
        key_id = os.urandom(8).hex()
        self._store.add_key(key_id, name, owner, role, now)
        return Record(api_key=self._key(key_id), key_id=key_id, name=name, owner=owner, role=role)

    def invite(self, owner, name, role, now):
        """Return a code that join changes for a key like this, once, within INVITATION_SECONDS.

        Its first half names the invitation, the other is the secret, of which the store has a MAC.
        """
        made = False
        while not made:     # codes are short
            handle, secret = ("".join(random.SystemRandom().choices(CODE_LETTERS, k=4)) for _ in range(2))
            told = Record(mac=self._mac("invited", handle + secret), tries=0, owner=owner, name=name, role=role)
            made = self._store.remember_first("invitation", "", handle, to_json(told), now + INVITATION_SECONDS, now)
        return Record(code=f"{handle}-{secret}", expires_at=now + INVITATION_SECONDS, name=name, owner=owner, role=role)

    def join(self, request, code, now):
        """Return the key that an invitation is for; raises Unauthorized. INVITATION_TRIES wrong tries end it."""
        letters = re.sub("[- ]", "", code).upper().translate(CODE_MISREADINGS)
        mac, right = self._mac("invited", letters), []
        def rule(value):
            told = Record(json.loads(value))
            if same(told.mac, mac):
                right.append(told)
                return None
            told["tries"] += 1
            return to_json(told) if told.tries < INVITATION_TRIES else None
        self._store.change_memo("invitation", "", letters[:4], rule, now)
        if not right:
            raise self._failed(request, Unauthorized("This code is wrong, used, or too old; ask for a new one."))
        return self.generate(right[0].owner, right[0].name, right[0].role, now)

    def revoke(self, api_key=None, key_id=None):
        """End an issued key, given itself or its id; raises NotFound."""
        issued = ISSUED.fullmatch(api_key or "")
        if not self._store.revoke_key(issued[1] if issued else key_id or "", self._clock()):
            raise NotFound("There is no such key.")
        return Record(ok=True)

    def list(self):
        """Return what is known of each issued key."""
        self.write_usage()
        return [row.pick(("key_id", "name", "owner", "role", "created_at", "last_used_at", "total_requests"))
                for row in self._store.keys()]

    def _key(self, key_id):
        if key_id == "owner":
            return self._owner_key
        return f"tk_{key_id}{self._mac('issued', key_id)[:40]}"

    def _mac(self, purpose, words):
        return hmac.new(self._owner_key.encode(), f"{purpose} {words}".encode(), hashlib.sha256).hexdigest()

    def _known(self, key_id):
        if key_id == "owner":
            return OWNER
        row = self._store.key(key_id)
        return row and Caller(row.key_id, row.owner, row.role, False, self._most)

    def _check_signature(self, request, key_id, key):
        timestamp, nonce, signature = (request.headers.get(f"x-{name}") for name in ("timestamp", "nonce", "signature"))
        refused = functools.partial(Forbidden, code="invalid_signature")
        now = self._clock()
        if not (timestamp and nonce and signature):
            raise refused("Missing required signature headers.")
        if not re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,9})?", timestamp, re.ASCII):
            raise refused("Invalid timestamp")
        if abs(float(timestamp) - now) > SIGNATURE_SECONDS:
            raise refused("Stale timestamp", server_time=now)
        signatures = [sign(key, request.method, path, request.pairs, timestamp, nonce, request.body)
                      for path in (request.path, request.raw_path)]
        if not any([same(signature, expected) for expected in signatures]):
            raise self._failed(request, refused("Bad signature"))
        short = nonce if len(nonce) <= NONCE_CHARACTERS else hashlib.sha256(nonce.encode()).hexdigest()
        if not self._store.use_nonce(key_id, short, now + 2 * SIGNATURE_SECONDS + 1, now):
            raise refused("Replay detected")

    def _failed(self, request, error):
        """Return an error about credentials, later than that if this address has had many."""
        if self._failures.take(request.peer):
            time.sleep(FAILURE_SECONDS)
        return error

    def _count(self, caller):
        """Count a request of an issued key; raises RateLimited if there were too many."""
        if wait := self._rate.take(caller.key_id):
            raise RateLimited("This key sends too many requests; slow down.",
                              headers=[("Retry-After", str(int(wait) + 1))])
        with self._lock:
            requests, _ = self._usage.get(caller.key_id, (0, 0))
            self._usage[caller.key_id] = requests + 1, self._clock()
        if time.monotonic() - self._written > USAGE_SECONDS:
            self.write_usage()

    def write_usage(self):
        """Store how often the keys were used since the last time."""
        with self._lock:
            usage, self._usage, self._written = self._usage, {}, time.monotonic()
        if usage:
            self._store.count_usage([dict(key_id=key_id, requests=requests, last=last)
                                     for key_id, (requests, last) in sorted(usage.items())])     # as every bus does


def usable_key(key, where):
    """Return a key that a header can carry; raises SetupError for what is none."""
    if not re.fullmatch("[!-~]+", key):
        raise SetupError(f"{where} holds no key: that is one word of printable ASCII characters.")
    return key


def read_private(path, kind="key"):
    """Return the text of a file that others should not read, or None if there is no such file.

    Raises SetupError if the file is a link or another user's: somebody may have put it there.
    """
    path = os.path.expanduser(path)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if os.path.islink(path) or hasattr(os, "getuid") and status.st_uid != os.getuid():
        raise SetupError(f"The {kind} file {path} is a link or belongs to somebody else; make it a file of your own.")
    if POSIX and status.st_mode & 0o077:
        warnings.warn(f"Others can read the {kind} file {path}; run: chmod 600 {path}")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:     # what is not UTF-8 is no usable key either
            return file.read()
    except OSError as error:
        raise SetupError(f"The {kind} file {path} cannot be read: {error.strerror}.") from error


def read_key(path=KEY_FILE):
    """Return the key in a file, or None if there is no such file; raises SetupError, as read_private does."""
    text = read_private(path)
    return None if text is None else usable_key(text.strip(), f"The key file {os.path.expanduser(path)}")


def make_key(path=KEY_FILE):
    """Write a new random key into a file that only its owner can read, and return the key."""
    key = os.urandom(24).hex()
    try:
        descriptor = os.open(os.path.expanduser(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())     # a power cut that took it would take every issued key along
    except OSError as error:
        raise SetupError(f"The key file {path} cannot be made: {error.strerror}.") from error
    return key


# ---- 7. Fields ----
# What a body or a query may hold, as data: name, rule, default. A rule returns the value, or raises ValueError with
# the rest of the sentence that starts with the field's name.

REQUIRED = object()
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
JSON_MARKS = re.compile(rb'"(?:[^"\\]+|\\.)*"?|[\[{]|[\]}]', re.DOTALL)     # matches a string to its end, closed or not


def must_be(words, accepts):
    """Return the rule that accepts what a predicate does, and says in words what that is."""
    def rule(value):
        if not accepts(value):
            raise ValueError(f"must be {words}")
        return value
    return rule


def number(low, high, kinds=(int, float), words="a number"):
    """Accept a number from low to high."""
    return must_be(f"{words} from {low} to {high}", lambda value: isinstance(value, kinds) and not isinstance(value, bool)
                   and low <= value <= high)


def integer(low, high):
    """Accept a whole number from low to high."""
    return number(low, high, int, "a whole number")


def choice(*words):
    """Accept one of these words."""
    return must_be(" or ".join(f'"{word}"' for word in words), lambda value: isinstance(value, str) and value in words)


def text(low, high):
    """Accept a string of that many characters, once trimmed, with no control characters."""
    accept = must_be(f"a string of {low} to {high} characters, with no control characters",
                     lambda value: isinstance(value, str) and low <= len(value.strip()) <= high
                     and not CONTROL.search(value.strip()))
    return lambda value: accept(value).strip()


def name(characters):
    """Accept a string of 1 to 64 of these characters."""
    return must_be(f"1 to 64 characters of {characters}", lambda value: isinstance(value, str) and re.fullmatch(
        f"[{characters.replace(' ', '')}]{{1,64}}", value, re.ASCII))


anything = must_be("any JSON value", lambda value: True)
boolean = must_be("true or false", lambda value: isinstance(value, bool))
string = must_be("a string", lambda value: isinstance(value, str))
namespace = name("A-Z a-z 0-9 . _ -")
token = name("A-Z a-z 0-9 . _ : -")


def tokens(value):
    """Accept names separated by commas."""
    return tuple(token(part.strip()) for part in value.split(",") if part.strip())


def each(rule):
    """Accept a list of what a rule accepts, or a single one."""
    return lambda value: [rule(item) for item in (value if isinstance(value, list) else [value])]


def written(rule):
    """Accept, in a query, the decimal digits of a number that a rule accepts."""
    def read(value):
        if not re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,20})?", value, re.ASCII):
            return rule(value)
        return rule(float(value) if "." in value else int(value))
    return read


RULES = {
    "namespace": namespace,
    "visibility": choice("private", "public"),
    "priority": integer(0, 1000),
    "delay": number(0, YEAR_SECONDS),
    "run_at": number(0, 2 ** 40),
    "ttl": number(1, YEAR_SECONDS),
    "max_attempts": integer(1, 20),
    "backoff_base": number(1, 3600),
    "target_worker": token,
    "required_capability": token,
}
PUBLISH = {
    "goal": (text(1, 256), REQUIRED),
    "payload": (anything, REQUIRED),
    **{name: (RULES[name], default) for name, default in PUBLISH_DEFAULTS.items()},
    "reward": (anything, None),     # of the 1.x protocol, without effect
}
CLAIM = {
    "goal": (each(text(1, 256)), None),
    "namespace": (namespace, "default"),
    "publisher": (text(1, 256), None),
    "worker_id": (token, None),
    "capabilities": (tokens, ()),
    "wait": (written(number(0, WAIT_MAX_SECONDS)), 0),
    "lease": (written(number(*LEASE_RANGE_SECONDS)), LEASE_SECONDS),
}
EXTEND = {"claim_token": (string, None), "seconds": (number(*LEASE_RANGE_SECONDS), LEASE_SECONDS)}
FULFILL = {"claim_token": (string, None), "result": (anything, None), "result_type": (choice("json", "text"), "json")}
FAIL = {"claim_token": (string, None), "error": (string, None), "retry": (boolean, True)}
RELEASE = {"claim_token": (string, None), "delay": (number(0, YEAR_SECONDS), 0)}
RESULT = {"wait": (written(number(0, WAIT_MAX_SECONDS)), 0)}
EVENTS_QUERY = {"after": (written(integer(0, 2 ** 49)), None), "wait": (written(number(0, WAIT_MAX_SECONDS)), 0)}
LIST = {
    "status": (choice("open", "delayed", "claimed", "fulfilled", "dead"), None),
    "goal": (text(1, 256), None),
    "namespace": (namespace, None),
    "limit": (written(integer(1, 500)), 50),
    "before": (string, None),
    "payload": (written(integer(0, 1)), 0),
}
RETRY = {"goal": (text(1, 256), None), "namespace": (namespace, None), "limit": (integer(1, 1000), 1000)}
SWEEP = {
    "action": (choice("count", "retry", "delete"), REQUIRED),
    "goal": (text(1, 256), None),
    "namespace": (namespace, None),
    "ids": (each(string), None),
    "until": (number(0, 2 ** 40), None),
}
SUMMARY = {"minutes": (written(integer(1, HISTORY_MINUTES)), 60)}
SET = {"value": (anything, REQUIRED), "ttl": (number(1, 86400), VALUE_TTL_SECONDS), "if_absent": (boolean, False)}
SET_QUERY = {
    "value": (string, REQUIRED),
    "ttl": (written(number(1, 86400)), VALUE_TTL_SECONDS),
    "if_absent": (lambda value: choice("true", "false")(value) == "true", False),
}
VALUE_KEY = {
    "key": (must_be(f"at most {VALUE_KEY_CHARACTERS} characters", lambda key: len(key) <= VALUE_KEY_CHARACTERS), REQUIRED),
}
GENERATE_KEY = {
    "owner": (text(1, 64), REQUIRED),
    "name": (text(1, 64), ""),
    "role": (choice("publish", "work", "both"), "both"),
}
JOIN = {"code": (string, REQUIRED)}
REVOKE_KEY = {"api_key": (string, None), "key_id": (string, None)}
PURGE = {"confirm": (boolean, False), "namespace": (namespace, None)}
HEADERS = {"idempotency_key": (text(1, 255), None)}
CLAIM_HEADERS = {"worker_id": (token, None), "capabilities": (tokens, ()), "claim_token": (text(32, 64), None)}


def checked(values, fields, strict=False):
    """Return the values of all fields, those that are absent or null by default; raises Invalid, naming the field.

    strict refuses what is not in fields, so that a mistyped name does not vanish.
    """
    if not isinstance(values, dict):
        raise Invalid('The body must be a JSON object, such as {"goal": "send_notification", "payload": "hi"}.')
    if strict and (unknown := sorted(set(values) - set(fields))):
        raise Invalid(f"Unknown field {unknown[0][:64]!r}; there are: {', '.join(fields)}.")
    found = {}
    for name, (rule, default) in fields.items():
        value = values.get(name)
        if value is None and default is REQUIRED:
            raise Invalid(f"{name} is required.", code=f"invalid_{name}")
        try:
            found[name] = default if value is None else rule(value)
        except ValueError as error:
            raise Invalid(f"{name} {error}.", code=f"invalid_{name}") from error
    return found


def from_json(body):
    """Return the value of a JSON text in bytes; raises Invalid for what cannot be stored as it is."""
    if nesting(body) > JSON_DEPTH:
        raise Invalid(f"The JSON is nested deeper than {JSON_DEPTH} levels.", code="invalid_json")
    try:
        value = json.loads(body.decode(), parse_constant=refuse_number, parse_float=finite)
        if b"\\u" in body:
            to_json(value).encode()     # half of a surrogate pair cannot be written as UTF-8
    except UnicodeError as error:
        raise Invalid("The JSON is not valid Unicode: UTF-8, with no lone surrogates.", code="invalid_json") from error
    except ValueError as error:
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise Invalid(f"This is not valid JSON: {reason}.", code="invalid_json") from error
    return value


def nesting(body):
    """Return how deep the brackets of a JSON text go; looked at before parsing, which takes stack for each level."""
    if body.count(b"[") + body.count(b"{") <= JSON_DEPTH:
        return 0
    depth = deepest = 0
    for mark in JSON_MARKS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(mark.group(), 0)
        deepest = max(deepest, depth)
    return deepest


def refuse_number(name):
    """Refuse NaN and Infinity, which JSON does not have (RFC 8259, section 6)."""
    raise ValueError(f"{name} is not a JSON number")


def finite(digits):
    """Return the float of these digits; refuse one that is beyond its range."""
    value = float(digits)
    return value if abs(value) != float("inf") else refuse_number(digits[:32])


# ---- 8. Page ----
# What a person sees who opens the bus in a browser. The page holds no data; its script asks the API for them, and writes
# them as text only. Nothing else may run or load: the policy names the script and the style by their hashes.

HOME = f"intentbus {__version__}: a job published here is done by a worker elsewhere.\n"


class Html(str):
    """A page, rather than plain text."""


@functools.lru_cache(maxsize=None)
def content_policy(page):
    """Return the Content-Security-Policy of a page: its own script and style, and its own bus (W3C CSP, level 3)."""
    script, style = (re.search(f"<{tag}>(.*)</{tag}>", page, re.DOTALL)[1] for tag in ("script", "style"))
    script, style = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style))
    return (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


DASHBOARD = Html(r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>intentbus</title>
<link rel="icon" href="data:,">
<style>
:root { --ground: #f6f7f9; --card: #fff; --ink: #1a2130; --soft: #566074; --line: #dde1e8; --main: #1f5fd0; --bad: #b3261e;
        --good: #176b39; --wait: #8a5200; --on: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #12151b; --card: #1b2029; --ink: #e7eaf0; --soft: #a2acbd; --line: #323a48; --main: #8ab4ff; --bad: #ff9c93;
          --good: #7fd6a0; --wait: #f2bd6b; --on: #0d1526; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
header { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 16px; padding-top: 8px; }
header b { font-size: 18px; }
nav { display: flex; flex-wrap: wrap; gap: 4px; }
nav a, .tabs a { padding: 10px 12px; min-height: 44px; border-radius: 8px; color: var(--soft); text-decoration: none; }
nav a[aria-current], .tabs a[aria-current] { color: var(--ink); font-weight: 600; box-shadow: inset 0 -3px var(--main); border-radius: 8px 8px 0 0; }
#said { min-height: 24px; color: var(--soft); font-size: 14px; margin: 4px 0; }
#said.bad { color: var(--bad); font-weight: 600; }
h1 { font-size: 20px; margin: 12px 0 8px; } h2 { font-size: 16px; margin: 0 0 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px; margin: 0 0 16px; }
.counts { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 8px; padding: 0; border: 0; background: none; }
.counts a { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px; text-decoration: none; color: var(--soft); }
.counts strong { display: block; font-size: 26px; line-height: 1.2; color: var(--ink); font-variant-numeric: tabular-nums; }
.cols { display: grid; gap: 0 16px; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); align-items: start; }
.row { display: grid; gap: 2px 12px; grid-template-columns: 2fr 1fr 1fr 2fr 3fr; padding: 12px 4px; min-height: 44px; border-top: 1px solid var(--line);
       color: inherit; text-decoration: none; align-items: center; }
.row.two { grid-template-columns: 1fr auto; } .row.pick { grid-template-columns: 44px 1fr; padding: 0; } .row.pick .row { border: 0; }
.row:first-of-type { border-top: 0; } a.row:hover { background: var(--ground); }
.row b { font-weight: 600; } small, .soft { color: var(--soft); font-size: 14px; }
.bad { color: var(--bad); } .good { color: var(--good); } .wait { color: var(--wait); }
a { color: var(--main); }
button, input, select, textarea { font: inherit; min-height: 44px; border-radius: 8px; border: 1px solid var(--line); padding: 8px 12px;
        background: var(--card); color: inherit; max-width: 100%; }
button { cursor: pointer; color: var(--main); border-color: currentColor; } button.main { background: var(--main); color: var(--on); }
button.bad { color: var(--bad); } button:disabled { opacity: .5; cursor: default; }
input[type=checkbox] { width: 22px; height: 22px; min-height: 0; margin: 11px; accent-color: var(--main); }
textarea { width: 100%; min-height: 110px; font-family: ui-monospace, monospace; font-size: 14px; }
form, .bar { display: flex; flex-wrap: wrap; gap: 8px; align-items: end; margin: 8px 0; }
label { display: grid; gap: 2px; font-size: 14px; color: var(--soft); flex: 1 1 150px; } label.wide { flex-basis: 100%; }
label input, label select, label textarea { width: 100%; color: var(--ink); font-size: 16px; }
pre { background: var(--ground); border-radius: 8px; padding: 12px; margin: 4px 0 12px; white-space: pre-wrap; font-size: 14px; max-height: 420px; overflow: auto; }
dl { display: grid; grid-template-columns: minmax(96px, auto) 1fr; gap: 6px 16px; margin: 0; } dt { color: var(--soft); } dd { margin: 0; }
svg { width: 100%; height: 160px; display: block; } .axis { display: flex; justify-content: space-between; margin: 0; } svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke; stroke: var(--main); } .fulfilled { stroke: var(--good); stroke-dasharray: 7 3; } .failed { stroke: var(--bad); stroke-dasharray: 2 3; }
.legend span { margin-right: 16px; display: inline-block; } .legend svg { display: inline-block; width: 28px; height: 8px; }
:focus-visible { outline: 3px solid var(--main); outline-offset: 2px; }
@media (max-width: 600px) { nav, .tabs { gap: 0; } nav a, .tabs a { padding: 10px 7px; font-size: 15px; } .row { grid-template-columns: 1fr auto; } .row > :nth-child(n+4) { grid-column: 1 / -1; } header, main { padding: 0 12px; } }
</style>
</head>
<body>
<header><b>intentbus</b><nav aria-label="Pages"></nav></header>
<main><p id="said" role="status"></p><div id="view"></div></main>
<script>
"use strict";
const $ = selector => document.querySelector(selector);
const put = (node, ...kids) => (node.replaceChildren(...kids.flat(9).filter(kid => kid !== null && kid !== undefined && kid !== "")), node);
function make(name, about, ...kids) {
  const [tag, ...classes] = name.split("."), svg = /^(svg|polyline|line)$/.test(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(about || {}))
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false && value !== undefined) node.setAttribute(key, value === true ? "" : value);
  return put(node, kids);
}
const pages = [["", "Home"], ["intents", "Intents"], ["dead", "Dead"], ["keys", "Keys"], ["publish", "Publish"]];
const units = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]], LATE = 300, PAGE = 50;
let skew = 0, drawn = 0;
const now = () => Date.now() / 1000 + skew;
function span(seconds) {
  const [size, unit] = units.find(([size]) => Math.abs(seconds) >= size) || units[3];
  return Math.floor(Math.abs(seconds) / size) + unit;
}
const exact = at => new Date(at * 1000).toLocaleString();
const when = at => at === null || at === undefined ? "never" :
  make("time", { datetime: new Date(at * 1000).toISOString(), title: exact(at) }, at > now() + 1 ? "in " + span(at - now()) : span(now() - at) + " ago");
const size = bytes => bytes < 1e6 ? Math.ceil(bytes / 1e3) + " kB" : (bytes / 1e6).toFixed(1) + " MB";
const short = text => text.length > 60 ? text.slice(0, 60) + "…" : text;
const firstLine = text => (text || "").split("\n")[0].slice(0, 200);
const plural = (number, word) => number.toLocaleString("en") + " " + word + (number === 1 ? "" : "s");
const place = (path, query) => "#" + path + "?" + new URLSearchParams(Object.entries(query).filter(([, value]) => value));
function say(words, bad) { $("#said").textContent = words; $("#said").className = bad ? "bad" : ""; }

async function ask(path, body) {
  let answer, found;
  try {
    answer = await fetch(location.origin + path, body === undefined ? {} : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
    found = await answer.json();
  } catch (error) { throw new Error("The bus does not answer; what is shown is old."); }
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}
async function act(words, path, body, then) {
  try { const found = await ask(path, body); say(words); await (then || draw)(found); } catch (error) { say(error.message, true); }
}
const button = (words, press, kind = "") => make("button" + kind, { type: "button", onclick: press }, words);
const empty = words => make("p.soft", {}, words);
const box = (title, ...kids) => make("section", { "aria-label": title }, make("h2", {}, title), kids);
const badge = status => make("span." + ({ dead: "bad", fulfilled: "good", open: "wait" }[status] || "soft"), {}, status);

function plot(history, hours) {
  const wide = 600, tall = 140, step = hours === 1 ? 1 : 10, points = hours * 60 / step;
  const last = Math.floor(now() / 60 / step), series = { published: [], fulfilled: [], failed: [] };
  for (const name in series) series[name] = Array(points).fill(0);
  for (const [minute, name, times] of history) {
    const at = points - 1 - (last - Math.floor(minute / step));
    if (at >= 0 && at < points && series[name]) series[name][at] += times;
  }
  const top = Math.max(1, ...Object.values(series).flat()), total = list => list.reduce((sum, more) => sum + more, 0);
  const line = (name, list) => make("polyline." + name, { points: list.map((times, at) =>
    (at * wide / (points - 1)).toFixed(1) + "," + (tall - 4 - times * (tall - 8) / top).toFixed(1)).join(" ") });
  const words = Object.entries(series).map(([name, list]) => total(list) + " " + name).join(", ");
  return [make("p.soft.axis", {}, make("span", {}, top.toLocaleString("en") + " per " + (step === 1 ? "minute" : "10 minutes"))),
    make("svg", { viewBox: "0 0 600 140", preserveAspectRatio: "none", role: "img", "aria-label": words },
    [0, .5, 1].map(part => make("line.grid", { x1: 0, x2: wide, y1: tall - 4 - part * (tall - 8), y2: tall - 4 - part * (tall - 8) })),
    Object.entries(series).map(([name, list]) => line(name, list))),
    make("p.soft.axis", {}, make("span", {}, hours + " h ago"), make("span", {}, "now")),
    make("p.legend.soft", {}, Object.entries(series).map(([name, list]) => make("span", {},
      make("svg", { viewBox: "0 0 28 8", "aria-hidden": true }, make("polyline." + name, { points: "0,4 28,4" })), " " + total(list).toLocaleString("en") + " " + name)))];
}

const views = {
  async ""(query) {
    const hours = query.get("hours") === "24" ? 24 : 1, late = at => now() - at > LATE;
    const sum = await ask("/admin/summary?minutes=" + hours * 60), counts = { open: 0, claimed: 0, fulfilled: 0, dead: 0 };
    skew = sum.now - Date.now() / 1000;
    for (const states of Object.values(sum.intents)) for (const status in states) counts[status] += states[status];
    const unattended = sum.waiting.filter(goal => !goal.listening);
    return [
      make("section.counts", { "aria-label": "Intents by state" }, Object.entries(counts).map(([status, number]) =>
        make("a", { href: status === "dead" ? "#dead" : place("intents", { status }) },
          make("strong" + (status === "dead" && number ? ".bad" : ""), { id: "count-" + status }, number.toLocaleString("en")), status))),
      unattended.length ? make("section", { "aria-label": "No worker" }, make("b.bad", {}, "⚠ No worker for "),
        unattended.slice(0, 5).map((goal, at) => [at ? ", " : "", make("a", { href: place("intents", { status: "open", goal: goal.goal }) }, short(goal.goal))]),
        unattended.length > 5 ? " and " + plural(unattended.length - 5, "more goal") : "", ".",
        make("br"), make("small", {}, "Start one: python3 intentbus.py work --goal GOAL -- ./handler.sh")) : null,
      box("What happened", make("div.tabs.bar", {}, [[1, "last hour"], [24, "last day"]].map(([number, words]) =>
        make("a", { href: place("", { hours: number }), "aria-current": hours === number && "true" }, words))), plot(sum.history, hours)),
      make("div.cols", {},
        box("Waiting longest", sum.waiting.length ? sum.waiting.slice(0, 12).map(goal => make("a.row.two", { href: place("intents", { status: "open", goal: goal.goal, namespace: goal.namespace }) },
          make("span", {}, make("b", { title: goal.goal }, short(goal.goal)), make("br"), make("small", {}, goal.namespace + ", " + (goal.listening ? plural(goal.listening, "worker") : "no worker"))),
          make("span" + (late(goal.run_at) ? ".bad" : ""), {}, late(goal.run_at) ? "late: " : "", when(goal.run_at)))) : empty("Nothing waits. Publish something on the page Publish.")),
        box("Workers", sum.workers.length ? sum.workers.slice(0, 12).map(worker => make(worker.intent ? "a.row.two" : "div.row.two", { href: worker.intent && "#intent/" + worker.intent },
          make("span", {}, make("b", {}, worker.id), make("br"), make("small", {}, (worker.goals.join(", ") || "any goal") + (worker.intent ? ", at " + worker.intent.slice(0, 12) + "…" : ""))),
          make("span", {}, when(worker.last_seen)))) : empty("No worker in the last five minutes. Start one: python3 intentbus.py work --goal GOAL -- ./handler.sh"),
          sum.workers.length > 12 ? empty("and " + (sum.workers.length - 12) + " more") : null),
        box("The bus", make("dl", {}, [["version", sum.version], ["database", size(sum.database_bytes) + ", log " + size(sum.wal_bytes)],
          ["held requests", sum.held_requests], ["issued keys", sum.keys],
          ["clock", exact(sum.now) + (Math.abs(skew) > 2 ? ", " + span(skew) + (skew > 0 ? " ahead of" : " behind") + " this browser" : "")]].map(
          ([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]))))];
  },
  async intents(query) { return list(query, query.get("status") || "open"); },
  async dead(query) { return list(query, "dead"); },
  async intent(query, id) {
    const intent = await ask("/admin/intents/" + encodeURIComponent(id)), quote = text => "'" + text.replaceAll("'", "'\\''") + "'";
    const flags = [["namespace", "default"], ["priority", 100], ["max_attempts", 3], ["target_worker", null], ["required_capability", null]].filter(
      ([name, usual]) => intent[name] !== usual).map(([name]) => " --" + ({ target_worker: "worker", required_capability: "capability" }[name] || name.replace("_", "-")) + " " + quote(String(intent[name])));
    const line = "python3 intentbus.py publish" + flags.join("") + (intent.visibility === "public" ? " --public" : "") + " -- " + quote(intent.goal) + " " + quote(JSON.stringify(intent.payload));
    return [make("section", {}, make("h1", {}, intent.goal), make("p", {}, badge(intent.status), make("small", {}, " " + intent.id)),
      make("div.bar", {},
        intent.status === "dead" ? button("Retry", () => act("It is open again.", "/admin/intents/" + id + "/retry", {}), ".main") : null,
        /open|claimed/.test(intent.status) ? button("Cancel", () => confirm("Cancel this intent?") && act("It is cancelled.", "/admin/intents/" + id + "/cancel", {}), ".bad") : null,
        button("Copy as command", () => navigator.clipboard ? navigator.clipboard.writeText(line).then(() => say("Copied.")) : say("Copy it from below.")))),
      intent.last_error ? box("Last error", make("pre.bad", {}, intent.last_error)) : null,
      box("Payload", make("pre", { id: "payload" }, JSON.stringify(intent.payload, null, 2)),
        intent.status === "fulfilled" ? [make("h2", {}, "Result"), make("pre", { id: "result" }, intent.result_type === "text" ? intent.result : JSON.stringify(intent.result, null, 2))] : null,
        make("h2", {}, "Command"), make("pre", { id: "command" }, line)),
      box("Details", make("dl", {}, [["namespace", intent.namespace], ["owner", intent.owner + ", " + intent.visibility], ["priority", intent.priority],
        ["attempts", intent.claim_attempts + " of " + intent.max_attempts], ["worker", intent.worker_id || "none named"], ["created", when(intent.created_at)],
        ["due", when(intent.run_at)], ["lease ends", intent.claim_expires_at ? when(intent.claim_expires_at) : "no lease"], ["expires", when(intent.expires_at)],
        ["ended", when(intent.completed_at)]].map(([name, value]) => [make("dt", {}, name), make("dd", {}, value instanceof Node ? value : String(value))])))];
  },
  async keys() {
    const keys = await ask("/admin/keys"), name = make("input", { name: "name", required: true, maxlength: 64 }), owner = make("input", { name: "owner", value: "owner", required: true, maxlength: 64 });
    const role = make("select", { name: "role" }, ["both", "publish", "work"].map(word => make("option", {}, word)));
    const add = event => { event.preventDefault(); act("The key is made. Copy it now: it is shown only here.", "/admin/generate_key", { name: name.value, owner: owner.value, role: role.value },
      async made => { await draw(); $("#view").prepend(box("New key for " + made.name, make("pre", { id: "made" }, made.api_key))); }); };
    return [box("Add a key", make("form", { onsubmit: add }, make("label", {}, "Name", name), make("label", {}, "Owner", owner), make("label", {}, "Role", role), make("button.main", {}, "Add key"))),
      box("Issued keys", keys.length ? keys.map(key => make("div.row.two", {}, make("span", {}, make("b", {}, key.name || "unnamed"), make("br"),
        make("small", {}, key.role + ", owner " + key.owner + ", " + plural(key.total_requests, "request") + ", last used ", when(key.last_used_at), ", " + key.key_id)),
        button("Revoke", () => confirm("Revoke the key " + key.name + "? What uses it stops working.") && act("It is revoked.", "/admin/revoke_key", { key_id: key.key_id }), ".bad"))) :
        empty("No key is issued. Add one above for each machine, or run: python3 intentbus.py keys invite NAME"))];
  },
  async publish(query) {
    const goal = make("input", { required: true, maxlength: 256, value: query.get("goal") || "hello" }), payload = make("textarea", { required: true, spellcheck: "false" }, '{"name": "world"}');
    const send = event => { event.preventDefault(); let value;
      try { value = JSON.parse(payload.value); } catch (error) { return say("The payload is not JSON: " + error.message, true); }
      act("Published.", "/admin/intents", { goal: goal.value, payload: value }, made => { location.hash = "intent/" + made.id; }); };
    return [box("Publish a test intent", make("form", { onsubmit: send }, make("label.wide", {}, "Goal", goal), make("label.wide", {}, "Payload, as JSON", payload), make("button.main", {}, "Publish")))];
  },
};

async function list(query, status) {
  const which = { status, goal: query.get("goal") || "", namespace: query.get("namespace") || "" }, dead = status === "dead";
  const page = await ask("/admin/intents?" + new URLSearchParams(Object.entries({ ...which, before: query.get("before"), limit: PAGE }).filter(([, value]) => value)));
  const field = (name, words) => make("label", {}, words, make("input", { name, value: which[name] || "" })), picked = new Set();
  const find = event => { event.preventDefault(); const form = new FormData(event.target), id = form.get("id").trim();
    location.hash = id ? "intent/" + id : place(dead ? "dead" : "intents", { status: dead ? "" : status, goal: form.get("goal"), namespace: form.get("namespace") }); };
  const filter = { goal: which.goal || null, namespace: which.namespace || null };
  const sweep = (action, which, done) => async () => { try {
    const counted = await ask("/admin/dead", { action: "count", ...which });
    if (!counted.number) return say("There are none.");
    if (confirm(action[0].toUpperCase() + action.slice(1) + " " + plural(counted.number, "dead intent") + "?"))
      await act("", "/admin/dead", { action, ...which, until: counted.until }, async found => { await draw(); say(plural(found.number, "intent") + " " + done + "."); });
  } catch (error) { say(error.message, true); } };
  const some = (action, done) => () => picked.size ? sweep(action, { ids: [...picked] }, done)() : say("Tick some first.");
  const row = intent => make("a.row", { href: "#intent/" + intent.id }, make("span", {}, make("b", { title: intent.goal }, short(intent.goal)), make("br"), make("small", {}, intent.id.slice(0, 12) + "… " + intent.namespace)),
    make("small", {}, when(status === "delayed" ? intent.run_at : intent.created_at)), make("small", {}, intent.claim_attempts + "/" + intent.max_attempts + " attempts"),
    make("small", {}, intent.worker_id || ""), make("small" + (intent.last_error ? ".bad" : ""), {}, firstLine(intent.last_error)));
  const tick = id => make("input", { type: "checkbox", "aria-label": "select " + id, onchange: event => event.target.checked ? picked.add(id) : picked.delete(id) });
  return [dead ? null : make("div.tabs.bar", { role: "navigation", "aria-label": "States" }, ["open", "delayed", "claimed", "fulfilled"].map(word =>
      make("a", { href: place("intents", { ...which, status: word }), "aria-current": word === status && "true" }, word)), make("a", { href: place("dead", filter.goal ? which : {}) }, "dead")),
    make("section", { "aria-label": "Filter" }, make("form", { onsubmit: find }, field("goal", "Goal"), field("namespace", "Namespace"), field("id", "Id"), make("button.main", {}, "Show"))),
    dead ? make("div.bar", {}, button("Retry selected", some("retry", "retried")), button("Delete selected", some("delete", "deleted"), ".bad"),
      button("Retry all" + (filter.goal || filter.namespace ? " that match" : ""), sweep("retry", filter, "retried")),
      button("Delete all" + (filter.goal || filter.namespace ? " that match" : ""), sweep("delete", filter, "deleted"), ".bad")) : null,
    make("section", { "aria-label": "Intents" }, page.intents.length ? page.intents.map(intent => dead ? make("div.row.pick", {}, tick(intent.id), row(intent)) : row(intent)) :
      empty(dead ? "Nothing is dead here. What fails for good, or too often, is listed on this page." : "No intent is " + status + (page.next ? " among the newest 10,000." : ". The page Publish makes one."))),
    make("div.bar", {}, query.get("before") ? make("a", { href: place(dead ? "dead" : "intents", which) }, "Newest") : null,
      page.next ? make("a.next", { href: place(dead ? "dead" : "intents", { ...which, before: page.next }) }, "Older") : null)];
}

async function draw(quietly) {
  const [path, search] = location.hash.slice(1).split("?"), [name, id] = path.split("/"), turn = ++drawn;
  put($("nav"), pages.map(([page, words]) => make("a", { href: "#" + page, "aria-current": (page === name || page === "intents" && name === "intent") && "page" }, words)));
  try {
    const found = await (views[name] || views[""])(new URLSearchParams(search), id && decodeURIComponent(id));
    if (turn !== drawn) return;
    put($("#view"), found);
    if (quietly && $("#said").className) say("");
  } catch (error) { say(error.message + " (" + new Date().toLocaleTimeString() + ")", true); }
}
const idle = () => !document.hidden && !location.hash.match(/keys|publish/) && !$("#view input:checked") && !$("#view").contains(document.activeElement?.closest("input, textarea, select"));
addEventListener("hashchange", () => { say(""); draw(); scrollTo(0, 0); });
document.addEventListener("visibilitychange", () => idle() && draw(true));
setInterval(() => idle() && draw(true), 4000);
draw();
</script>
</body>
</html>
""")


# ---- 9. API ----
# The endpoints, and below them the table that says all: method, path, who may, endpoint.

Response = collections.namedtuple("Response", "status headers body")
REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
COMMON_HEADERS = (
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("X-Intent-Version", "7.61"),     # clients of the 2.x line compare its major number
)


def request_id(headers):
    """Return the X-Request-ID of these headers, or a new one if it is missing or odd."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else f"{random.getrandbits(64):016x}"


class Request:
    """What was asked: method, target as sent, headers by lower-case name, body bytes, the client's address.

    secure tells whether it came encrypted; still_there() whether the client can still be answered. Raises Invalid if
    the target cannot be decoded.
    """

    def __init__(self, method, target, headers=None, body=b"", peer="", secure=False, still_there=lambda: True):
        self.method, self.headers, self.body, self.peer, self.secure = method, headers or {}, body, peer, secure
        self.still_there = still_there
        self.id = request_id(self.headers)
        self.caller, self.may_wait = None, True
        self.raw_path, _, query = target.partition("?")
        try:
            if re.search("%(?![0-9A-Fa-f]{2})", target):
                raise ValueError("a percent sign that starts no pair of hex digits")
            self.path = urllib.parse.unquote(self.raw_path, errors="strict")
            self.pairs = urllib.parse.parse_qsl(query, True, errors="strict", max_num_fields=100)
        except ValueError as error:
            raise Invalid("The path and query must be percent-encoded UTF-8, of at most 100 parameters.") from error

    def json(self):
        """Return the value of the body; an empty one counts as {}."""
        return from_json(self.body) if self.body.strip() else {}

    def fields(self, fields):
        """Return the checked fields of the body."""
        return checked(self.json(), fields)

    def parameters(self, fields):
        """Return the checked parameters of the query; only goal may be given more than once."""
        found = dict(self.pairs)
        for name in found:
            values = [value for other, value in self.pairs if other == name]
            if len(values) > 1 and name != "goal":
                raise Invalid(f"{name} was given twice.", code=f"invalid_{name}" if name in fields else None)
            found[name] = values if len(values) > 1 else values[0]
        return checked(found, fields)

    @property
    def idempotency_key(self):
        """The checked Idempotency-Key, or None."""
        return checked({"idempotency_key": self.headers.get("idempotency-key")}, HEADERS)["idempotency_key"]


def home(api, request):
    return 200, HOME


def dashboard(api, request):
    return 200, DASHBOARD


def health(api, request):
    problem = api.bus.problem()
    found = dict(ok=not problem, ts=int(time.time()), version=__version__)
    return (503, dict(found, error=problem)) if problem else (200, found)


def publishable(api, body):
    """Return the checked fields of one intent to publish."""
    fields = checked(body, PUBLISH, strict=True)
    del fields["reward"]
    if fields["run_at"] is not None and (fields["delay"] or fields["run_at"] > api.bus.now() + YEAR_SECONDS):
        raise Invalid("run_at must be Unix seconds within 366 days, and without a delay.", code="invalid_run_at")
    return fields


def publish(api, request):
    fields = publishable(api, request.json())
    return 201, api.bus.publish(**fields, idempotency_key=request.idempotency_key, caller=request.caller)


def publish_many(api, request):
    lines = request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/x-ndjson"
    bodies = [line for line in request.body.splitlines() if line.strip()] if lines else request.json()
    if not isinstance(bodies, list) or len(bodies) > BULK_INTENTS:
        raise Invalid(f"The body must be a JSON array of at most {BULK_INTENTS} intents, or as many lines of NDJSON.")
    intents = []
    for index, body in enumerate(bodies):
        try:
            intents.append(publishable(api, from_json(body) if lines else body))
        except Invalid as error:
            raise Invalid(f"Intent {index}: {error}", error.code) from error
    return 201, api.bus.publish_many(intents, idempotency_key=request.idempotency_key, caller=request.caller)


def claim(api, request):
    headers = request.headers
    fields = request.parameters(dict(CLAIM, capability=(tokens, ())))
    capabilities = headers.get("x-worker-capabilities", headers.get("x-worker-capability"))
    said = checked({"worker_id": headers.get("x-worker-id"), "capabilities": capabilities,
                    "claim_token": headers.get("x-claim-token")}, CLAIM_HEADERS)
    fields["capabilities"] = fields["capabilities"] or fields["capability"] or said["capabilities"]
    fields["worker_id"] = fields["worker_id"] or said["worker_id"]
    del fields["capability"]
    fields["wait"] *= request.may_wait
    fields["publisher"] = api.keys.owner_of(fields["publisher"], request)
    seen_as = fields["worker_id"] or f"{request.caller.key_id}@{request.peer}", headers.get("user-agent", "")[:64]
    intent = api.bus.claim(**fields, claim_token=said["claim_token"], caller=request.caller, seen_as=seen_as,
                           still_there=request.still_there)
    if not intent:
        api.keys.not_counted(request.caller)
    return (200, intent) if intent else (204, None)


def result(api, request, intent_id):
    wait = request.parameters(RESULT)["wait"] * request.may_wait
    return 200, api.bus.get_result(intent_id, wait, caller=request.caller, still_there=request.still_there)


def events(api, request):
    fields = request.parameters(EVENTS_QUERY)
    fields["wait"] *= request.may_wait
    return 200, api.bus.events(**fields, caller=request.caller, still_there=request.still_there)


def who_am_i(api, request):
    caller = request.caller
    return 200, dict(key_id=caller.key_id, owner=caller.owner, role=caller.role, admin=caller.admin, now=api.bus.now())


def set_value(api, request, key):
    checked({"key": key}, VALUE_KEY)
    fields = request.parameters(SET_QUERY) if request.pairs and not request.body.strip() else request.fields(SET)
    return 200, api.bus.set(key, **fields, caller=request.caller)


def get_value(api, request, key):
    return 200, {"value": api.bus.get(key, caller=request.caller)}


def generate_key(api, request):
    return 201, api.keys.generate(**request.fields(GENERATE_KEY), now=api.bus.now())


def invite(api, request):
    return 201, api.keys.invite(**request.fields(GENERATE_KEY), now=api.bus.now())


def join(api, request):
    return 201, api.keys.join(request, request.fields(JOIN)["code"], api.bus.now())


def revoke_key(api, request):
    return 200, api.keys.revoke(**request.fields(REVOKE_KEY))


def list_keys(api, request):
    return 200, api.keys.list()


def metrics(api, request):
    found = api.bus.summary()
    return 200, exposition(
        ("intent_bus_intents_total", "gauge", "Intents stored, by status and namespace.",
         [(dict(status=status, namespace=name), number) for name, states in found.intents.items()
          for status, number in states.items()]),
        ("intent_bus_dead_letters_total", "gauge", "Dead intents.",
         [({}, sum(states.get("dead", 0) for states in found.intents.values()))]),
        ("intent_bus_tester_keys_total", "gauge", "Issued keys.", [({}, found["keys"])]),
        ("intentbus_held_requests", "gauge", "Requests that wait for news.", [({}, found.held_requests)]),
        ("intentbus_database_bytes", "gauge", "Size of the database file.", [({}, found.database_bytes)]),
        ("intentbus_wal_bytes", "gauge", "Size of the write-ahead log.", [({}, found.wal_bytes)]),
        ("intentbus_build_info", "gauge", "The version that runs.", [(dict(version=__version__), 1)]))


def exposition(*families):
    """Return (name, type, help, [(labels, value)]) families in the text format of Prometheus, version 0.0.4."""
    lines = []
    for name, kind, words, samples in families:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            inside = ",".join(f"{label}={to_json(text)}" for label, text in labels.items())
            lines.append(f"{name}{{{inside}}} {value}" if inside else f"{name} {value}")
    return "\n".join(lines) + "\n"


def calling(read, verb, fields=None):
    """Return the endpoint that calls a verb of the Bus with the fields that read(request, fields) finds."""
    def endpoint(api, request, *parameters):
        return 200, getattr(api.bus, verb)(*parameters, **read(request, fields or {}), caller=request.caller)
    return endpoint


body = functools.partial(calling, Request.fields)
query = functools.partial(calling, Request.parameters)


ROUTES = (
    # method, path                      who may     endpoint
    ("GET",  "/",                       None,      home),
    ("GET",  "/health",                 None,      health),
    ("POST", "/intent",                 "publish", publish),
    ("POST", "/intents",                "publish", publish_many),
    ("POST", "/claim",                  "work",    claim),
    ("POST", "/extend_claim/*",         "work",    body("extend_claim", EXTEND)),
    ("POST", "/fulfill/*",              "work",    body("fulfill", FULFILL)),
    ("POST", "/fail/*",                 "work",    body("fail", FAIL)),
    ("POST", "/release/*",              "work",    body("release", RELEASE)),
    ("GET",  "/status/*",               "look",    query("get_status")),
    ("GET",  "/result/*",               "look",    result),
    ("GET",  "/intents",                "look",    query("list", LIST)),
    ("GET",  "/workers",                "look",    query("workers")),
    ("GET",  "/events",                 "look",    events),
    ("GET",  "/whoami",                 "look",    who_am_i),
    ("POST", "/cancel/*",               "manage",  body("cancel")),
    ("POST", "/retry/*",                "manage",  body("retry")),
    ("POST", "/retry",                  "manage",  body("retry", RETRY)),
    ("POST", "/set/*",                  "keep",    set_value),
    ("GET",  "/get/*",                  "keep",    get_value),
    ("POST", "/delete/*",               "keep",    body("delete")),
    ("POST", "/admin/generate_key",     "admin",   generate_key),
    ("POST", "/admin/invite",           "admin",   invite),
    ("POST", "/join",                   None,      join),
    ("POST", "/admin/revoke_key",       "admin",   revoke_key),
    ("GET",  "/admin/keys",             "admin",   list_keys),
    ("POST", "/admin/purge",            "admin",   body("purge", PURGE)),
    ("POST", "/admin/cleanup",          "admin",   body("cleanup")),
    ("GET",  "/admin/dashboard",        "admin",   dashboard),
    ("GET",  "/admin/intents",          "admin",   query("list", LIST)),
    ("POST", "/admin/intents",          "admin",   publish),
    ("GET",  "/admin/intents/*",        "admin",   query("inspect")),
    ("POST", "/admin/intents/*/cancel", "admin",   body("cancel")),
    ("POST", "/admin/intents/*/retry",  "admin",   body("retry")),
    ("GET",  "/admin/dead",             "admin",   query("dead")),
    ("POST", "/admin/dead",             "admin",   body("sweep_dead", SWEEP)),
    ("GET",  "/admin/dead/*",           "admin",   query("dead_letter")),
    ("GET",  "/admin/summary",          "admin",   query("summary", SUMMARY)),
    ("GET",  "/metrics",                "metrics", metrics),
)
ROLES = {
    "publish": ("publish", "look", "manage", "keep"),
    "work": ("work", "look", "keep"),
    "both": ("publish", "work", "look", "manage", "keep"),
}


def from_another_site(headers):
    """Return whether a browser says that a page of another site sent this: it adds the admin's password by itself.

    Sec-Fetch-Site (W3C Fetch Metadata) tells, or, in an older browser, Origin.
    """
    site = headers.get("sec-fetch-site")
    if site:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def respond(status, value, request_id, headers=()):
    """Return the response with a value: text, what JSON can say, or None for no body."""
    body = b"" if value is None else (value if isinstance(value, str) else to_json(value)).encode()
    kind = [("Content-Type", "application/json")] if body else []
    if isinstance(value, str):
        kind = [("Content-Type", "text/plain; charset=utf-8")]
    if isinstance(value, Html):
        kind = [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", content_policy(value))]
    return Response(status, [*COMMON_HEADERS, ("X-Request-ID", request_id), *kind, *headers], body)


def refusal(error, request_id):
    """Return the response for an error."""
    later = error.status in (429, 503) and "Retry-After" not in dict(error.headers)
    return respond(error.status, {"error": dict(error.details, code=error.code, message=str(error))}, request_id,
                   [*error.headers, *([("Retry-After", "1")] if later else [])])


class API:
    """What answers requests: API(bus, keys).handle(request) -> Response.

    enforce_https refuses what did not come encrypted; maintenance answers 503 to all but / and /health.
    """

    def __init__(self, bus, keys, max_body=BODY_BYTES, enforce_https=False, maintenance=False):
        self.bus, self.keys, self.max_body = bus, keys, max_body
        self._enforce_https, self._maintenance = enforce_https, maintenance
        self._routes = {}     # path: {method: (who may, endpoint)}
        for method, path, who, endpoint in ROUTES:
            self._routes.setdefault(path, {})[method] = who, endpoint
        self._patterns = [(path, re.compile(re.escape(path).replace(r"\*", "(.+)"), re.DOTALL))
                          for path in sorted(self._routes, key=len, reverse=True) if "*" in path]

    def handle(self, request):
        """Answer a request. What it may not do is answered as an error; nothing is raised."""
        try:
            status, value = self._answer(request)
        except Error as error:
            return refusal(error, request.id)
        except Exception:
            import traceback
            print(f"intentbus: request {request.id} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return refusal(Error(), request.id)
        return respond(status, value, request.id, [("Retry-After", "1")] if status == 204 else [])

    def _answer(self, request):
        path, *parameters = self._place(request.path)
        methods = self._routes.get(path)
        if methods is None:
            raise NotFound("There is no such path on this bus; the README lists those that are.")
        method = "GET" if request.method == "HEAD" else request.method
        if method not in methods:
            allowed = ", ".join(sorted({*methods, *(["HEAD"] if "GET" in methods else [])}))
            raise MethodNotAllowed(f"{path} takes {allowed} only.", headers=[("Allow", allowed)])
        who, endpoint = methods[method]
        if who:
            self._authorize(who, request)
        return endpoint(self, request, *parameters)

    def _authorize(self, who, request):
        """Find out who is asking, or raise why that may not be."""
        if self._maintenance:
            raise Unavailable("The bus is under maintenance; try again later.", "maintenance")
        if request.method == "POST" and from_another_site(request.headers):
            raise Forbidden("This was sent by a page of another site.", "cross_site")
        if self._enforce_https and not request.secure:
            raise Forbidden("This bus takes https only.", "https_required")
        if who == "metrics":
            self.keys.require_metrics(request)
        elif who == "admin" or who in ("look", "manage") and self.keys.presents_admin(request):
            self.keys.require_admin(request)
            request.caller = OWNER
        else:
            request.caller = self.keys.caller(request)
            if who not in ROLES[request.caller.role]:
                raise Forbidden(f"This key may {request.caller.role} only.")

    def _place(self, path):
        """Return the path of a route, and what stands in the place of its star."""
        if path in self._routes and "*" not in path:
            return (path,)
        return next(((route, match[1]) for route, pattern in self._patterns if (match := pattern.fullmatch(path))), (path,))


# ---- 10. Server ----
# Sockets around handle. Framing is strict (RFC 9112): what two programs could read in two ways is refused, and the
# connection closed, so that nothing behind it is taken for a request.

REASONS = {200: "OK", 201: "Created", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
           413: "Content Too Large", 422: "Unprocessable Content", 429: "Too Many Requests",
           431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
           507: "Insufficient Storage"}
TOKEN = r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)"     # RFC 9110, section 5.6.2
REQUEST_LINE = re.compile(TOKEN + r" (?:(?i:https?)://[^/?#\x00-\x20]+([/?]?[!-~]*)|([/*][!-~]*)) HTTP/1\.([01])")
HEADER_LINE = re.compile(TOKEN + r":[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
BARE_LF = re.compile(rb"(?<!\r)\n")


def parse_head(head):
    """Return (method, target, HTTP minor version, headers by lower-case name) of the lines before a body, in bytes."""
    first, *lines = head.decode("latin-1").split("\r\n")
    if max(map(len, (first, *lines))) > HEAD_LINE_BYTES or len(lines) > HEAD_LINES:
        raise HeadersTooLarge(f"A request has at most {HEAD_LINES} header lines of {HEAD_LINE_BYTES} bytes.")
    start = REQUEST_LINE.fullmatch(first)
    if not start:
        raise Invalid("The request line must be METHOD /path HTTP/1.1.")
    headers = {}
    for line in lines:
        field = HEADER_LINE.fullmatch(line)
        if not field:
            raise Invalid("A header line must be Name: value, with no space before the colon and no control character.")
        name, value = field[1].lower(), field[2].rstrip(" \t")
        if name in headers and name in ("host", "content-length", "transfer-encoding"):
            raise Invalid(f"{field[1]} was sent twice.")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    if start[4] == "1" and "host" not in headers:
        raise Invalid("An HTTP/1.1 request needs a Host header.")
    target = start[3] or (start[2] if start[2].startswith("/") else "/" + start[2])     # the URL in full, as to a proxy
    return start[1], target, start[4], headers


def rendered(response, connection, bodiless=False):
    """Return the bytes of a response: written at once, since in two pieces Nagle's algorithm can cost 40 ms."""
    lines = [f"HTTP/1.1 {response.status} {REASONS[response.status]}",
             time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT", time.gmtime())]
    lines += [f"{name}: {value}" for name, value in response.headers]
    if response.status != 204:
        lines.append(f"Content-Length: {len(response.body)}")
    if connection:
        lines.append(f"Connection: {connection}")
    return "\r\n".join(lines + ["", ""]).encode("latin-1") + (b"" if bodiless else response.body)


def body_length(headers, limit):
    """Return the length of the body that these headers announce; raises what is wrong with it."""
    length = headers.get("content-length", "0")
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise Invalid("Content-Length and Transfer-Encoding exclude each other.")
        raise LengthRequired("Send the body with a Content-Length; chunked bodies are not taken.")
    if not re.fullmatch("[0-9]+", length, re.ASCII):
        raise Invalid("Content-Length must be decimal digits.")
    if len(length) > 15 or int(length) > limit:
        raise PayloadTooLarge(f"The body is over the limit of {limit} bytes.")
    return int(length)


class Connection:
    """One client's connection: read a request, answer it, and again; it ends with its constructor, as in socketserver."""

    def __init__(self, sock, address, server):
        self.sock, self.peer, self.server = sock, address[0], server
        self._received, self._request_id, self._head_only = bytearray(), "", False
        with contextlib.suppress(OSError):     # the client is gone, and nobody is left to tell
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._serve_one():
                pass

    def _serve_one(self):
        """Answer one request; return whether the connection can take another."""
        started, self.server.reading[self.sock] = time.monotonic(), None
        try:
            request, version = self._read_request()
        except Error as error:
            self._send(refusal(error, self._request_id or request_id({})), "close", self._head_only)
            self._linger()
            return False
        if request is None or self.server.reading.pop(self.sock, "hung up") == "hung up":
            return False
        response = self.server.api.handle(request)
        wanted = request.headers.get("connection", "").lower()
        keep = not self.server.stopping and ("keep-alive" in wanted if version == "0" else "close" not in wanted)
        self._send(response, "close" if not keep else "keep-alive" if version == "0" else "", self._head_only)
        self.server.log(request, response, time.monotonic() - started)
        return keep

    def _read_request(self):
        """Return the next request and its HTTP minor version, or (None, None) if the client has left."""
        if not self._wait_for_request():
            return None, None
        deadline, self._request_id, self._head_only = time.monotonic() + HEAD_SECONDS, "", False
        seen = 0     # what has been looked at: a head that comes in single bytes is not searched anew for each
        while (end := self._received.find(b"\r\n\r\n", max(0, seen - 3))) < 0 or end > HEAD_BYTES:
            if BARE_LF.search(self._received, seen):
                raise Invalid("Each line of the head must end with CR LF.")
            if len(self._received) > HEAD_BYTES:
                raise HeadersTooLarge(f"The head of a request has at most {HEAD_BYTES} bytes.")
            seen = len(self._received)
            if not self._receive(deadline):
                return None, None
        method, target, version, headers = parse_head(bytes(self._received[:end]))
        del self._received[:end + 4]
        self._request_id, self._head_only = request_id(headers), method == "HEAD"
        length = body_length(headers, self.server.api.max_body)
        if length and version == "1" and headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_SECONDS
        while len(self._received) < length:
            if not self._receive(deadline):
                return None, None
        body = bytes(self._received[:length])
        del self._received[:length]
        return Request(method, target, headers, body, *self.server.origin(headers, self.peer), self._still_there), version

    def _wait_for_request(self):
        """Return whether a request has begun; RFC 9112, section 2.2: empty lines before it are skipped."""
        deadline = time.monotonic() + IDLE_SECONDS
        while True:
            while self._received.startswith(b"\r\n"):
                del self._received[:2]
            if self._received and self._received != b"\r":
                return True
            if not self._receive(deadline, idle=True):
                return False

    def _receive(self, deadline, idle=False):
        """Take in what has arrived; return False if the client has left, or was idle; raises RequestTimeout."""
        try:
            self.sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.sock.recv(65536)
        except TimeoutError if sys.version_info >= (3, 10) else socket.timeout:
            if idle:
                return False
            raise RequestTimeout("The request did not arrive in time.") from None
        self._received += data
        return bool(data)

    def _still_there(self):
        """Return whether the client has not hung up; what it has sent meanwhile is taken in."""
        try:
            self.sock.settimeout(0)
            while len(self._received) < HEAD_BYTES:
                data = self.sock.recv(65536)
                if not data:
                    return False
                self._received += data
        except OSError as error:     # nothing more has come, in words of TCP or of TLS; or it is gone
            return isinstance(error, BlockingIOError) or type(error).__name__ == "SSLWantReadError"
        return True

    def _send(self, response, connection, bodiless=False):
        self.sock.settimeout(SEND_SECONDS)
        self.sock.sendall(rendered(response, connection, bodiless))

    def _linger(self):
        """Let a refused client read the answer: closing with its bytes unread would reset the connection at once."""
        self.sock.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(Error):
            while time.monotonic() < deadline and self._receive(deadline):
                self._received.clear()


class Threads:
    """What ThreadingHTTPServer lacks: threads that serve one connection after the other, a limit, and a quiet end."""

    request_queue_size = BACKLOG
    daemon_threads = True
    allow_reuse_address = POSIX     # elsewhere it would let a second server take the port

    def serve_in(self, api, log, trust_proxy, tls):
        """Take the API to serve, and the options of http_server."""
        self.api, self._logging, self._trust_proxy, self._tls = api, log, trust_proxy, tls
        self.stopping = False
        self._limit = connection_limit()
        self._open, self._idle = set(), 0
        self.reading = collections.OrderedDict()     # socket: None, of those that owe us a request, the longest first
        self._lock = threading.Lock()
        self._work = queue.SimpleQueue()

    def server_bind(self):
        """Bind without looking up the name of this machine, which takes 30 s where there is no DNS."""
        import socketserver
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self):
        """Accept a connection; its TLS handshake is made by the thread that reads it first."""
        sock, address = super().get_request()
        if self._tls:
            sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, address

    def origin(self, headers, peer):
        """Return the client's address, and whether it sent the request encrypted; a trusted proxy knows better."""
        if not self._trust_proxy:
            return peer, bool(self._tls)
        return forwarded(headers, peer, bool(self._tls))

    def process_request(self, sock, address):
        """Give a connection to an idle thread, or to a new one."""
        with self._lock:
            if len(self._open) >= self._limit and not self._make_room():
                return self._turn_away(sock)
            self._open.add(sock)
            new = not self._idle
            self._idle -= not new
        if not new:
            return self._work.put((sock, address))
        try:
            threading.Thread(target=self._serve, args=(sock, address), daemon=True).start()
        except RuntimeError:     # this machine gives us no more threads
            with self._lock:
                self._open.discard(sock)
            self._turn_away(sock)

    def _serve(self, sock, address):
        while True:
            self.process_request_thread(sock, address)
            with self._lock:
                self._open.discard(sock)
                self.reading.pop(sock, None)
                if self._idle >= IDLE_THREADS:
                    return
                self._idle += 1
            sock, address = self._work.get()

    def _make_room(self):
        """Hang up on the connection that has owed us a request for longest, so that idle and slow ones lock out nobody."""
        if not self.reading or len(self._open) > self._limit + SPARE_FILES // 2:     # these have not gone yet
            return False
        with contextlib.suppress(OSError, KeyError):     # it is just leaving
            socket.socket.shutdown(self.reading.popitem(last=False)[0], socket.SHUT_RDWR)
        return True

    def _turn_away(self, sock):
        error = Unavailable("The bus has too many connections; try again.", "too_many_connections")
        with contextlib.suppress(OSError):
            sock.settimeout(0)
            sock.sendall(rendered(refusal(error, request_id({})), "close"))
        self.shutdown_request(sock)

    def handle_error(self, request, client_address):
        """Say what went wrong with a connection, on stderr; the others go on."""
        import traceback
        print(f"intentbus: a connection failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)

    def log(self, request, response, seconds):
        """Write a line of JSON about a request, if that is wanted."""
        if self._logging:
            print(json.dumps(dict(time=round(time.time(), 3), peer=request.peer, method=request.method, path=request.path,
                                  status=response.status, ms=round(seconds * 1000, 1), request_id=request.id)),
                  file=sys.stderr, flush=True)     # in ASCII, since a log is read on a terminal

    def close(self):
        """Take no more requests, answer those that run, and return once they are, or after SHUTDOWN_SECONDS."""
        self.stopping = True
        self.shutdown()
        self.server_close()
        self.api.bus.stop()
        deadline = time.monotonic() + SHUTDOWN_SECONDS
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):     # an idle thread reads the end, a busy one can still answer
                    socket.socket.shutdown(sock, socket.SHUT_RD)     # not that of TLS, which would end the encryption
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        self.api.keys.write_usage()


def forwarded(headers, peer, secure):
    """Return what a proxy says of the client: its address (the last one, which the proxy itself has seen), and if https."""
    peer = headers.get("x-forwarded-for", peer).rpartition(",")[2].strip()
    return peer, headers.get("x-forwarded-proto", "https" if secure else "").rpartition(",")[2].strip() == "https"


def connection_limit():
    """Return how many connections this process may have, after raising its limit of open files as far as it goes."""
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS + SPARE_FILES if hard == resource.RLIM_INFINITY else min(CONNECTIONS + SPARE_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    except (ImportError, ValueError, OSError):
        return CONNECTIONS
    return CONNECTIONS if soft == resource.RLIM_INFINITY else min(CONNECTIONS, soft - SPARE_FILES)


def http_server(api, host="127.0.0.1", port=8787, log=False, trust_proxy=False, tls=None):
    """Return a server that is bound to host and port; port 0 picks a free one, see its server_port.

    log writes a line for each request, trust_proxy believes X-Forwarded-*, tls is (certificate file, key file). Call
    serve_forever() in one thread and close() in another. Raises SetupError if the address cannot be had.
    """
    from http.server import ThreadingHTTPServer
    kind = type("Server", (Threads, ThreadingHTTPServer),
                {"address_family": socket.AF_INET6 if ":" in host else socket.AF_INET})
    threading.stack_size(STACK_BYTES)
    context = tls and tls_context(*tls)
    try:
        server = kind((host, port), Connection)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"The bus cannot listen on {host} port {port}: {reason}; choose another --port.") from error
    server.serve_in(api, log, trust_proxy, context)
    api.bus.start()
    return server


def tls_context(certificate, key):
    """Return the TLS settings of a server; raises SetupError if the files are not what they should be."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        raise SetupError(f"The TLS certificate {certificate} and key {key} cannot be used: "
                         f"{error.strerror or error}.") from error
    return context


def owner_key(path=KEY_FILE):
    """Return the owner key and where it is from: BUS_SECRET, or a file, which is made if there is none."""
    if key := os.environ.get("BUS_SECRET"):
        return usable_key(key, "BUS_SECRET"), "in BUS_SECRET"
    if key := read_key(path):
        return key, f"in {path}"
    return make_key(path), f"new, in {path}"


def switched_on(name):
    """Return whether an environment variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def api_of(store, key, require_claim_token=False, retention=RETENTION_SECONDS, rate=RATE_PER_MINUTE, most=UNFINISHED,
           max_body=BODY_BYTES, require_signatures=False, announce_dead=False):
    """Return the API of a store, with what the environment says: secrets, and BUS_* switches that are set to 1."""
    keys = Keys(key, store, os.environ.get("BUS_ADMIN_SECRET"), os.environ.get("DASHBOARD_PASSWORD"),
                os.environ.get("BUS_METRICS_TOKEN"), require_signatures or switched_on("BUS_REQUIRE_SIGNATURES"), rate, most)
    return API(Bus(store, require_claim_token, retention, announce_dead), keys, max_body, switched_on("BUS_ENFORCE_HTTPS"),
               switched_on("BUS_MAINTENANCE_MODE"))


STORES = {"file": Store}     # by the scheme of a URL, or else "file", what opens the database; see examples/postgres_bus.py


def open_store(where=None):
    """Return the store of a file, or of a URL of a scheme in STORES; by default that of BUS_DB_PATH, else of intentbus.db."""
    where = where or os.environ.get("BUS_DB_PATH") or "intentbus.db"
    scheme = re.match("([a-z]+)://", where)
    kind = scheme[1] if scheme else "file"
    try:
        store = STORES[kind]
    except KeyError:
        raise SetupError(f"intentbus.py itself opens SQLite files, and no {kind}://; for PostgreSQL there is "
                         "examples/postgres_bus.py.") from None
    return store(where)


WSGI_STARTING = threading.Lock()     # of the first requests, one opens the database


@functools.lru_cache(maxsize=None)
def wsgi_api(process):
    """Return the API of this process: a forked worker opens the database anew."""
    return api_of(open_store(), owner_key()[0])


def application(environ, start_response):
    """Serve the bus under WSGI (PEP 3333), with the settings of the environment; needs no thread of its own.

    A request is held only where others can be answered meanwhile. One process at a time may serve a database.
    """
    headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_")}
    headers["content-type"] = environ.get("CONTENT_TYPE", "")
    if environ.get("CONTENT_LENGTH"):
        headers["content-length"] = environ["CONTENT_LENGTH"]
    try:
        with WSGI_STARTING:
            api = wsgi_api(os.getpid())
        api.bus.tend_sometimes()
        response = api.handle(wsgi_request(environ, headers, api.max_body))
    except SetupError as error:
        response = refusal(Unavailable(str(error), "maintenance"), request_id(headers))
    except Error as error:
        response = refusal(error, request_id(headers))
    length = [] if response.status == 204 else [("Content-Length", str(len(response.body)))]
    start_response(f"{response.status} {REASONS[response.status]}", [*response.headers, *length])
    return [b"" if environ["REQUEST_METHOD"] == "HEAD" else response.body]


def wsgi_request(environ, headers, max_body):
    """Return the request that a WSGI environment describes."""
    length = body_length(headers, max_body)
    body = environ["wsgi.input"].read(length)
    if len(body) < length:
        raise Invalid("The body ended before its Content-Length.")
    origin = environ.get("REMOTE_ADDR", ""), environ.get("wsgi.url_scheme") == "https"
    if switched_on("BUS_TRUST_PROXY"):
        origin = forwarded(headers, *origin)
    path = urllib.parse.quote(environ.get("PATH_INFO", "").encode("latin-1")) or "/"
    request = Request(environ["REQUEST_METHOD"], f"{path}?{environ.get('QUERY_STRING', '')}", headers, body, *origin)
    request.may_wait = bool(environ.get("wsgi.multithread"))
    return request


# ---- 11. Local state ----
# The files of this machine in ~/.intentbus: the bus that it has joined, and the spool of requests that no bus has answered.

SPOOL_SCHEMA = """
    CREATE TABLE IF NOT EXISTS requests (     -- sent in the order of their numbers
        number INTEGER PRIMARY KEY AUTOINCREMENT, bus TEXT NOT NULL, path TEXT NOT NULL, body TEXT NOT NULL,
        idempotency_key TEXT,     -- only of a publish
        intent_id TEXT,           -- only of an outcome, which replaces an earlier outcome of the intent
        created_at DOUBLE PRECISION NOT NULL,
        refusal TEXT,             -- the error with which the bus refused a publish for good
        UNIQUE (bus, intent_id)
    )
"""


def make_parent_folder(path):
    """Create the folder of a file, readable by its owner only, unless it exists; raises SetupError."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(f"The folder {folder} cannot be created: {error.strerror}.") from error


def read_settings():
    """Return {"url", "key", "ca"} of the bus that this machine has joined, or an empty Record; raises SetupError."""
    content = read_private(CONFIG_FILE, "settings")
    if content is None:
        return Record()
    try:
        settings = Record(from_json(content.encode()))
        usable_key(settings.key, "The settings")
        return settings if isinstance(settings.url, str) else Record()
    except (Invalid, AttributeError, TypeError, ValueError) as error:
        raise SetupError(f"The settings file {CONFIG_FILE} is damaged; join the bus again, or delete it.") from error


def write_settings(url, key, ca):
    """Save the bus that this machine has joined; after a crash, the file has either the old settings or the new ones."""
    path = os.path.expanduser(CONFIG_FILE)
    make_parent_folder(path)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(to_json(dict(url=url, key=key, ca=ca and os.path.abspath(ca))) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SetupError(f"The settings file {path} cannot be written: {error.strerror}.") from error


class Spool:
    """Requests that no bus has answered yet, in an SQLite file that the processes of this machine share."""

    def __init__(self, path=SPOOL_FILE):
        """Open the file, or create it, readable by its owner only; raises SetupError."""
        import sqlite3
        self._path = os.path.expanduser(path)
        self._lock = threading.Lock()     # all threads share one connection
        make_parent_folder(self._path)
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._db = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None,
                                       check_same_thread=False)
            self._db.row_factory = lambda cursor, values: Record(zip((column[0] for column in cursor.description), values))
            self._db.execute("PRAGMA synchronous = FULL")     # a spooled request survives a power cut
            self._db.execute("PRAGMA fullfsync = 1")
            self._db.execute(SPOOL_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise SetupError(f"The spool {self._path} cannot be used: {reason}.") from error

    def add(self, bus, path, body, idempotency_key=None, intent_id=None):
        """Store a request, whose body is text, and return its number; an outcome replaces an earlier one of its intent."""
        return self._run("""
            INSERT INTO requests (bus, path, body, idempotency_key, intent_id, created_at)
            VALUES      (:bus, :path, :body, :idempotency_key, :intent_id, :now)
            ON CONFLICT (bus, intent_id) DO UPDATE
            SET         path = excluded.path,
                        body = excluded.body,
                        created_at = excluded.created_at
            RETURNING   number
        """, bus=bus, path=path, body=body, idempotency_key=idempotency_key, intent_id=intent_id, now=time.time())[0].number

    def remove(self, number):
        """Delete a request."""
        self._run("DELETE FROM requests WHERE number = :number", number=number)

    def mark_refused(self, number, reason):
        """Record why the bus has refused a request; it is not sent again."""
        self._run("UPDATE requests SET refusal = :reason WHERE number = :number", number=number, reason=reason)

    def pending(self, bus):
        """Return the requests to send to a bus: outcomes first, then publishes in the order in which they were made."""
        return self._run("""
            SELECT   *
            FROM     requests
            WHERE    bus = :bus
            AND      refusal IS NULL
            ORDER BY intent_id IS NULL, number
        """, bus=bus)

    def refused(self, bus):
        """Return the publishes that a bus has refused for good."""
        return self._run("SELECT * FROM requests WHERE bus = :bus AND refusal IS NOT NULL ORDER BY number", bus=bus)

    def counts(self):
        """Return the number of pending requests and of refused ones, for all buses together."""
        return self._run("SELECT COUNT(*) - COUNT(refusal) AS pending, COUNT(refusal) AS refused FROM requests")[0].values()

    def outcome_of(self, bus, intent_id):
        """Return the spooled outcome of an intent, or None."""
        found = self._run("SELECT * FROM requests WHERE bus = :bus AND intent_id = :intent_id", bus=bus, intent_id=intent_id)
        return found[0] if found else None

    @contextlib.contextmanager
    def send_lock(self, seconds):
        """Let one process send at a time, which keeps the order; raises Unavailable if another still sends after seconds."""
        deadline = time.monotonic() + seconds
        with open(self._path + ".lock", "a+") as guard:
            while True:
                try:
                    lock(guard)
                    break
                except OSError:
                    if time.monotonic() >= deadline:
                        raise Unavailable("Another program is sending the spooled requests.") from None
                    time.sleep(SPOOL_CHECK_SECONDS)
            yield

    def _run(self, statement, **values):
        import sqlite3
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise StorageFull(f"The spool {self._path} cannot be written: {error}.") from error


# ---- 12. Client ----
# The verbs of the Bus over HTTP, with the same errors. A request that is safe to repeat is repeated when the network fails.

LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]{1,3}){3}")


def parse_bus_url(url):
    """Return the parts of a bus's URL, as urlsplit does; raises SetupError unless it is http or https, without a user."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc and parts.port != 0:
            return parts
    shown = url.rpartition("@")[2]     # the part before the @ may hold a password
    raise SetupError(f"The URL of a bus is http://HOST:PORT or https://HOST, without a user name; {shown!r} is not.")


def client_tls_context(ca):
    """Return an SSL context that trusts the certificates in a file besides the system's; raises SetupError."""
    import ssl
    try:
        context = ssl.create_default_context()
        context.load_verify_locations(cafile=ca)
        return context
    except OSError as error:
        raise SetupError(f"The certificates in {ca} cannot be used: {error.strerror or error}.") from error


def encode_body(body):
    """Return a body as JSON in UTF-8; raises Invalid if it cannot be encoded."""
    try:
        return to_json(body).encode()
    except (TypeError, ValueError) as error:
        raise Invalid(f"This cannot be sent as JSON in UTF-8: {error}.") from error


class Spooler:
    """Sends a client's publishes and outcomes by way of a spool, which keeps each until the bus has answered it."""

    def __init__(self, client, spool):
        self._client = client
        self._spool = spool
        self.reporting = set()     # numbers of the outcomes that other threads are sending right now

    def publish(self, path, body, idempotency_key):
        """Send all earlier publishes, then this one; return its answer, or a Record with the status "spooled"."""
        number = self._spool.add(self._client.base_url, path, encode_body(body).decode(), idempotency_key)
        try:
            with self._removing(number), self._spool.send_lock(self._client.timeout):
                self._flush(before=number)
                return self._client.request("POST", path, body, headers={"Idempotency-Key": idempotency_key}, retries=0)
        except TRANSIENT as error:
            return Record(id=None, ids=[], status="spooled", namespace=self._client.namespace, reason=str(error))

    def report(self, path, body, intent_id):
        """Send an outcome; a transient error leaves it in the spool and is raised."""
        try:
            number = self._spool.add(self._client.base_url, path, encode_body(body).decode(), intent_id=intent_id)
        except StorageFull:     # an outcome that cannot be stored can still be sent
            return self._client.request("POST", path, body)
        self.reporting.add(number)
        try:
            with self._removing(number):
                return self._client.request("POST", path, body)
        finally:
            self.reporting.discard(number)

    def claim(self, claim_next):
        """Return the first intent of claim_next() without an outcome in the spool; report the outcomes of the others."""
        if self._due():
            with contextlib.suppress(Error):     # a refused publish must not keep this machine from working
                self.flush()
        while intent := claim_next():
            outcome = self._spool.outcome_of(self._client.base_url, intent.id)
            if not outcome:
                return intent
            self._send_outcome(outcome, claim_token=intent.claim_token)
        return None

    def flush(self):
        """Send all requests in the spool; return how many the bus accepted."""
        with self._spool.send_lock(self._client.timeout):
            return self._flush()

    def _flush(self, before=float("inf")):
        return sum(self._send_outcome(request) if request.intent_id else self._send_publish(request)
                   for request in self._due(before))

    def _due(self, before=float("inf")):
        """Return the outcomes that no thread is sending, and the publishes with numbers below before."""
        return [request for request in self._spool.pending(self._client.base_url)
                if (request.number not in self.reporting if request.intent_id else request.number < before)]

    def _send_publish(self, request):
        try:
            self._client.request("POST", request.path, json.loads(request.body), retries=0,
                                 headers={"Idempotency-Key": request.idempotency_key})
        except (Invalid, PayloadTooLarge, IdempotencyConflict) as error:
            self._spool.mark_refused(request.number, str(error))
            return 0
        self._spool.remove(request.number)
        return 1

    def _send_outcome(self, request, **changes):
        """Report an outcome; if the bus refuses it, fail the intent for good; if the lease is lost, drop the outcome."""
        body = dict(json.loads(request.body), **changes)
        with contextlib.suppress(NotFound):
            try:
                self._client.request("POST", request.path, body, retries=0)
            except (Invalid, PayloadTooLarge) as error:
                self._client.request("POST", f"/fail/{request.intent_id}", retries=0, body=dict(
                    claim_token=body["claim_token"], error=f"The result was refused: {error}", retry=False))
        self._spool.remove(request.number)
        return 1

    @contextlib.contextmanager
    def _removing(self, number):
        """Remove a request from the spool unless a transient error leaves it unanswered."""
        try:
            yield
        except Error as error:
            if not isinstance(error, TRANSIENT):
                self._spool.remove(number)
            raise
        self._spool.remove(number)


class IntentClient:
    """A client of a bus: the verbs of Bus, over HTTP.

    base_url, api_key and namespace default to INTENT_BUS_URL, INTENT_API_KEY and INTENT_BUS_NAMESPACE, then to the bus
    that this machine has joined, then to http://127.0.0.1:8787 and the key in ~/.apikey. timeout is the seconds that each
    attempt at a request may take; ca is a file of certificates to trust. Every request is signed; the key itself is sent
    only over https or to this machine. A verb returns a Record, or raises Unreachable or the Error that the bus answered.

    With spool, the path of a file, no request is lost while the bus is away. publish stores a request that cannot be sent
    and returns {"id": None, "status": "spooled"}; the next publish, claim or flush() sends it, once and in order. fulfill
    and fail store an outcome until the bus has answered; an intent with a stored outcome is reported, not claimed again.
    """

    def __init__(self, base_url=None, api_key=None, timeout=CLIENT_SECONDS, namespace=None, ca=None, spool=None):
        import urllib.request     # 14 ms with the modules that it loads, which only a client needs
        joined = read_settings()
        self.base_url = (base_url or os.environ.get("INTENT_BUS_URL") or joined.get("url") or URL).rstrip("/")
        self.namespace = namespace or os.environ.get("INTENT_BUS_NAMESPACE") or "default"
        self.timeout = timeout
        parts = parse_bus_url(self.base_url)
        if self.base_url != joined.get("url"):
            joined = {}     # its key is for that bus only
        key = api_key or os.environ.get("INTENT_API_KEY") or joined.get("key") or read_key()
        if not key:
            raise SetupError(f"No key: join the bus with a code from keys invite, or put a key into {KEY_FILE} or "
                             f"INTENT_API_KEY (on the machine of the bus, serve creates {KEY_FILE}).")
        self._key = usable_key(key, "INTENT_API_KEY")
        ca = ca or joined.get("ca")
        self.spool = spool and Spool(spool)
        self._spooler = spool and Spooler(self, self.spool)
        local = LOOPBACK.fullmatch(parts.hostname)
        issued = ISSUED.fullmatch(self._key)
        self.secure = bool(local) or parts.scheme == "https"
        self._identity = {"X-API-KEY": self._key} if self.secure else {"X-Key-ID": issued[1] if issued else "owner"}
        self._clock_offset = 0     # seconds
        self._opener = urllib.request.OpenerDirector()     # follows no redirects, which would pass the key on
        for handler in (urllib.request.ProxyHandler({} if local else None), urllib.request.HTTPHandler(),
                        urllib.request.HTTPSHandler(context=ca and client_tls_context(ca))):
            self._opener.add_handler(handler)

    def publish(self, goal, payload, *, idempotency_key=None, **fields):
        """Publish an intent with the fields of Bus.publish; it is stored once, however often the request is repeated."""
        body = dict(dict(goal=goal, payload=payload, namespace=self.namespace), **fields)
        return self._publish("/intent", body, idempotency_key)

    def publish_many(self, intents, *, idempotency_key=None):
        """Publish up to 1,000 intents, each a dict of the arguments of publish, all or none; return {"ids"}."""
        bodies = [dict({"namespace": self.namespace}, **intent) for intent in intents]
        return self._publish("/intents", bodies, idempotency_key)

    def _publish(self, path, body, idempotency_key):
        key = os.urandom(16).hex() if idempotency_key is None else idempotency_key
        if not re.fullmatch("[ -~]{1,255}", key):
            raise Invalid("An idempotency key is 1 to 255 printable ASCII characters.", code="invalid_idempotency_key")
        if self._spooler:
            return self._spooler.publish(path, body, key)
        return self.request("POST", path, body, headers={"Idempotency-Key": key})

    def flush(self):
        """Send the spooled requests and return how many the bus accepted; a request that it refuses is not sent again."""
        return self._spooler.flush() if self._spooler else 0

    def claim(self, goal=None, *, namespace=None, publisher=None, worker_id=None, capabilities=(), wait=0, lease=None,
              claim_token=None):
        """Claim an intent; return None if there is none within wait seconds.

        A claim whose answer is lost is repeated; with a claim_token, 32 to 64 random characters, by the caller only.
        """
        query = dict(goal=goal, namespace=namespace or self.namespace, publisher=publisher, worker_id=worker_id,
                     capabilities=",".join(capabilities) or None, lease=lease)
        def send():
            token = claim_token or os.urandom(16).hex()
            return self.request("POST", "/claim", query=query, wait=wait, headers={"X-Claim-Token": token},
                                retries=0 if claim_token else RETRIES)
        return self._spooler.claim(send) if self._spooler else send()

    def extend_claim(self, intent_id, claim_token=None, seconds=LEASE_SECONDS):
        """Extend a lease, so that it ends seconds from now; raises NotFound if it is lost."""
        return self.request("POST", f"/extend_claim/{intent_id}", dict(claim_token=claim_token, seconds=seconds), retries=0)

    def fulfill(self, intent_id, claim_token=None, result=None, result_type="json"):
        """Report that the work is done."""
        return self._report("fulfill", intent_id, claim_token=claim_token, result=result, result_type=result_type)

    def fail(self, intent_id, claim_token=None, error=None, retry=True):
        """Report that the work has failed; with retry=False the intent is dead at once."""
        return self._report("fail", intent_id, claim_token=claim_token, error=error, retry=retry)

    def _report(self, verb, intent_id, **body):
        if self._spooler:
            return self._spooler.report(f"/{verb}/{intent_id}", body, intent_id)
        return self.request("POST", f"/{verb}/{intent_id}", body)

    def release(self, intent_id, claim_token=None, delay=0):
        """Hand an intent back without counting the attempt; it can be claimed again after delay seconds."""
        return self.request("POST", f"/release/{intent_id}", dict(claim_token=claim_token, delay=delay))

    def get_status(self, intent_id):
        """Return the state of an intent."""
        return self.request("GET", f"/status/{intent_id}")

    def get_result(self, intent_id, wait=0):
        """Return the state of an intent with its result, as soon as it has ended or after wait seconds."""
        return self.request("GET", f"/result/{intent_id}", wait=wait)

    def list(self, *, status=None, goal=None, namespace=None, limit=50, before=None, payload=False):
        """Return {"intents", "next"}, newest first; next is the value of before for the next page, or None."""
        page = self.request("GET", "/intents", query=dict(status=status, goal=goal, namespace=namespace, limit=limit,
                                                          before=before, payload="1" if payload else None))
        return Record(page, intents=[Record(intent) for intent in page.intents])

    def workers(self):
        """Return {"workers"}: the workers that lately asked for work, the latest first."""
        return self.request("GET", "/workers")

    def events(self, after=None, wait=0):
        """Return {"events", "next", "missed"}: the events after a number, or from now on; next is the next value of after."""
        return self.request("GET", "/events", query=dict(after=after), wait=wait)

    def who_am_i(self):
        """Return {"key_id", "owner", "role", "admin", "now"} of the key of this client."""
        return self.request("GET", "/whoami", retries=0)

    def join(self, code):
        """Exchange the code of an invitation for a key; return {"api_key", "key_id", "name", "owner", "role"}."""
        return self.request("POST", "/join", dict(code=code), retries=0)

    def cancel(self, intent_id):
        """Cancel an unfinished intent; raises Conflict if it has ended."""
        return self.request("POST", f"/cancel/{intent_id}", retries=0)

    def retry(self, intent_id=None, *, goal=None, namespace=None, limit=1000):
        """Reopen a dead intent, or up to limit dead intents of a goal or namespace."""
        if intent_id is not None:
            return self.request("POST", f"/retry/{intent_id}", retries=0)
        return self.request("POST", "/retry", dict(goal=goal, namespace=namespace, limit=limit), retries=0)

    def set(self, key, value, ttl=VALUE_TTL_SECONDS, if_absent=False):
        """Store a JSON value for ttl seconds; with if_absent, raises Conflict if the key is taken, so it serves as a lock."""
        body = dict(value=value, ttl=ttl, if_absent=if_absent)
        return self.request("POST", f"/set/{key}", body, retries=0 if if_absent else RETRIES)

    def get(self, key):
        """Return the value of a key; raises NotFound."""
        return self.request("GET", f"/get/{key}").value

    def delete(self, key):
        """Delete a key; return {"deleted"}, whether it had a value."""
        return self.request("POST", f"/delete/{key}", retries=0)

    def admin(self, verb, **body):
        """Call /admin/VERB with BUS_ADMIN_SECRET or DASHBOARD_PASSWORD, if set; by GET if there is no body."""
        secret = {}
        if token := os.environ.get("BUS_ADMIN_SECRET"):
            secret = {"X-Admin-Token": token}
        elif password := os.environ.get("DASHBOARD_PASSWORD"):
            secret = {"Authorization": "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()}
        if secret and not self.secure:
            raise SetupError("The admin secret is sent only over https or to this machine.")
        return self.request("POST" if body else "GET", f"/admin/{verb}", body or None, headers=secret, retries=0,
                            answer_type=list if verb == "keys" else dict)

    def request(self, method, path, body=None, *, query=None, headers=None, wait=0, retries=RETRIES, answer_type=dict):
        """Send a request, again after a transient error; return the answer, or None for 204.

        The bus may hold the request for wait seconds. With answer_type=list, the answer is a list of Records.
        """
        query = dict(query or {}, wait=round(wait, 3) or None)
        try:
            encoded = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None}, True)
            target = urllib.parse.quote(path) + ("?" + encoded if encoded else "")
        except ValueError as error:
            raise Invalid(f"This cannot be sent in UTF-8: {error}.") from error
        data = None if method == "GET" else b"" if body is None else encode_body(body)
        corrected = False
        for attempt in itertools.count():
            try:
                return self._send(method, target, data, headers or {}, self.timeout + wait, answer_type)
            except Forbidden as error:     # if the clock of this machine is wrong, the bus answers its own
                if corrected or "server_time" not in error.details:
                    raise
                self._clock_offset = error.details["server_time"] - time.time()
                corrected = True
            except TRANSIENT as error:
                if attempt >= retries:
                    raise
                pause = random.uniform(0, min(RETRY_SECONDS * 2 ** attempt, RETRY_MAX_SECONDS))
                time.sleep(max(pause, error.details.get("retry_after", 0)))

    def _send(self, method, target, data, headers, timeout, answer_type):
        """Sign a request and send it once; return the value of the answer."""
        import http.client
        path, _, query = target.partition("?")
        timestamp = f"{time.time() + self._clock_offset:.3f}"
        nonce = os.urandom(16).hex()
        signature = sign(self._key, method, urllib.parse.unquote(path), urllib.parse.parse_qsl(query, True), timestamp, nonce,
                         data or b"")
        headers = {**headers, **self._identity, "X-Timestamp": timestamp, "X-Nonce": nonce, "X-Signature": signature,
                   "User-Agent": f"intentbus/{__version__}", "Content-Type": "application/json"}
        try:
            request = urllib.request.Request(self.base_url + target, data, headers, method=method)
            with self._opener.open(request, timeout=timeout) as response:
                return self._read(response.status, response.headers, response.read(), answer_type)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if distrust := getattr(reason, "verify_message", None):
                reason = f"its certificate is not trusted ({distrust}); see --ca"
            reason = getattr(reason, "strerror", None) or reason or type(reason).__name__
            raise Unreachable(f"The bus at {self.base_url} cannot be reached: {reason}.") from error

    def _read(self, status, headers, content, answer_type):
        """Return the value of an answer, or raise the error in it."""
        if status == 204:
            return None
        if 300 <= status < 400:
            raise Unreachable(f"{self.base_url} redirects to {headers.get('Location')}; use that as the URL of the bus.")
        try:
            value = json.loads(content)
            if status < 300 and isinstance(value, answer_type):
                return Record(value) if answer_type is dict else [Record(item) for item in value]
            error = dict(value["error"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Unreachable(f"{self.base_url} answered {status} without JSON: a proxy page answered, not a bus.") from None
        error_class = ERRORS.get(status, Unavailable if status in (502, 504) else Error)     # a proxy sends 502 and 504
        raised = error_class(error.get("message", ""), error.get("code"))
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            raised.details["retry_after"] = min(float(headers.get("Retry-After", "")), RETRY_MAX_SECONDS)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            raised.details["server_time"] = float(error.get("server_time"))
        raise raised


# ---- 13. Worker ----
# Claim, run, extend the lease, report. A handler is called with (intent, lease) and returns (result, result_type).

PAST_TENSES = {"fulfill": "fulfilled", "fail": "failed", "release": "released"}


class Reject(Exception):
    """A handler raises this when no retry can help; the intent is dead at once."""


class HandlerFailed(Exception):
    """The handler ran and failed; the intent is retried."""


class Lease:
    """The lease of an intent; inside `with`, a thread extends it after each third of its seconds.

    `broken` is None, or the reason why the handler must end: the lease is "lost", or the worker is "stopped".
    """

    def __init__(self, bus, intent, seconds):
        self._extend = functools.partial(bus.extend_claim, intent.id, intent.claim_token, seconds)
        self._interval = seconds / 3
        self._done = threading.Event()
        self.broken = None

    def __enter__(self):
        threading.Thread(target=self._extend_until_done, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._done.set()

    def _extend_until_done(self):
        due = steady_clock() + self._interval
        while not self._done.wait(LEASE_CHECK_SECONDS):     # short waits, since a wait stops counting while a phone sleeps
            if steady_clock() < due:
                continue
            try:
                self._extend()
                due = steady_clock() + self._interval
            except NotFound:
                self.broken = "lost"
                return
            except Error:     # tried again after the next wait
                pass


class Worker:
    """Claims intents of a goal, or a list of goals, from a Bus or an IntentClient, and runs a handler for each.

    Up to concurrency handlers run at a time. The worker ends after max_jobs intents or max_time seconds, or with drain once
    there is nothing to claim. lease and poll are seconds. on_message(sentence) tells of outcomes and errors.
    """

    def __init__(self, bus, goal, handler, *, concurrency=1, lease=LEASE_SECONDS, max_jobs=None, max_time=None,
                 drain=False, poll=POLL_SECONDS, on_message=lambda sentence: None, **claim):
        self._bus = bus
        self._handler = handler
        self._claim = functools.partial(bus.claim, goal, lease=lease, **claim)
        self._lease_seconds = lease
        self._drain = drain
        self._poll = poll
        self._log = on_message
        self._jobs = threading.Semaphore(max_jobs or sys.maxsize)     # one permit for each intent that may still be claimed
        self._deadline = time.monotonic() + (max_time or float("inf"))
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(concurrency)]
        self._running = {}     # lease: intent
        self._ended = queue.SimpleQueue()     # gets an item when a handler or a thread ends, to wake run()
        self._stopping = threading.Event()
        self._failure = None
        self.signals = []     # numbers of the signals that interrupted the worker

    def run(self):
        """Work until an option, interrupt() or Ctrl-C ends the worker; raises the error that stops it."""
        for thread in self._threads:
            thread.start()
        self._wait_while(lambda: not self.signals and any(thread.is_alive() for thread in self._threads))
        if self.signals:
            self._wind_down()
        if self._failure:
            raise self._failure

    def interrupt(self, signal_number=signal.SIGINT, frame=None):
        """Claim nothing more and let handlers finish; when called again, end them and release their intents."""
        self.signals.append(signal_number)
        self._ended.put(None)     # unlike Event.set(), safe in a signal handler

    def _wind_down(self):
        self._stopping.set()
        if self._running:
            self._log(f"finishing {len(self._running)} more; interrupt again to release them")
        self._wait_while(lambda: self._running and len(self.signals) < 2)
        for lease in list(self._running):
            lease.broken = lease.broken or "stopped"
        grace = getattr(self._handler, "kill_after", KILL_AFTER_SECONDS)
        self._wait_while(lambda: self._running, grace + 2 * PIPE_SECONDS + 2 * SLICE_SECONDS)
        for intent in list(self._running.values()):     # their handlers are Python functions, which cannot be killed
            self._report(intent, "release")

    def _wait_while(self, condition, seconds=float("inf")):
        deadline = time.monotonic() + seconds
        while condition() and time.monotonic() < deadline:
            try:
                self._ended.get(timeout=1)
            except queue.Empty:
                pass
            except KeyboardInterrupt:
                self.interrupt()

    def _work(self):
        """Run in each thread: claim intents and process them until the worker ends."""
        try:
            while not self._is_over() and self._jobs.acquire(blocking=False):
                intent = self._claim_next()
                if intent:
                    self._process(intent)
                elif self._drain:
                    return
                else:
                    self._jobs.release()
        except Exception as error:
            self._failure = error
            self._stopping.set()
        finally:
            self._ended.put(None)

    def _is_over(self):
        return self._stopping.is_set() or time.monotonic() >= self._deadline

    def _claim_next(self):
        """Return a claimed intent, or None if a wait brought none."""
        if self._drain:
            return self._claim()
        started = time.monotonic()
        wait = max(0, min(CLAIM_WAIT_SECONDS, self._deadline - started))
        token = os.urandom(16).hex()
        while True:     # always with the same token, in case a lost answer had claimed an intent
            try:
                intent = self._claim(wait=wait, claim_token=token)
                break
            except TRANSIENT as error:
                self._log(f"{error} Trying again.")
            self._stopping.wait(random.uniform(1, 2 * self._poll))
            if self._is_over():
                return None
        if not intent and time.monotonic() - started < wait / 2:     # this bus does not hold claims
            self._stopping.wait(self._poll)
        return intent

    def _process(self, intent):
        """Run the handler for an intent and report the outcome."""
        lease = Lease(self._bus, intent, self._lease_seconds)
        self._running[lease] = intent
        try:
            if self._stopping.is_set():
                return self._report(intent, "release")
            with lease:
                verb, details = self._run_handler(intent, lease)
            if lease.broken == "lost":
                self._log(f"{intent.id} lost: it was cancelled, or its lease ran out before the handler ended")
            elif lease.broken and verb != "fulfill":     # finished work is reported even then
                self._report(intent, "release")
            else:
                self._report(intent, verb, **details)
        finally:
            del self._running[lease]
            self._ended.put(None)

    def _run_handler(self, intent, lease):
        """Run the handler; return the verb of the bus that reports the outcome, and its arguments."""
        try:
            result, result_type = self._handler(intent, lease)
            return "fulfill", dict(result=result, result_type=result_type)
        except Reject as error:
            return "fail", dict(error=str(error), retry=False)
        except HandlerFailed as error:
            return "fail", dict(error=str(error))
        except SetupError as error:     # the fault of this machine, not of the intent
            self._failure = error
            self._stopping.set()
            return "release", {}
        except Exception as error:
            return "fail", dict(error=f"{type(error).__name__}: {error}")

    def _report(self, intent, verb, **details):
        try:
            getattr(self._bus, verb)(intent.id, intent.claim_token, **details)
            self._log(f"{intent.id} {PAST_TENSES[verb]}" + (f": {details['error']}" if verb == "fail" else ""))
        except NotFound:
            self._log(f"{intent.id} lost: it was cancelled, or its lease ran out before the report")
        except (Invalid, PayloadTooLarge) as error:
            self._report(intent, "fail", error=f"The result was refused: {error}", retry=False)
        except Error as error:
            kept = verb != "release" and isinstance(error, TRANSIENT) and getattr(self._bus, "spool", None)
            consequence = "the spool keeps it and reports it later" if kept else "the intent will be done again"
            self._log(f"{intent.id} {verb} could not be reported; {consequence}: {error}")


def listen(bus, goal, handler, *, full_envelope=False, **options):
    """Call handler(payload) for each intent of a goal, until Ctrl-C; with full_envelope, handler(intent).

    It returns the result, any JSON value. False or an exception fails the intent, Reject fails it for good. options are
    those of Worker and of claim.
    """
    def run(intent, lease):
        result = handler(intent if full_envelope else intent.payload)
        if result is False:
            raise HandlerFailed("The handler returned False.")
        to_json(result).encode()     # raises here, so that a result that is not JSON fails the intent
        return result, "json"
    Worker(bus, goal, run, **options).run()


IntentClient.listen = listen     # added here, since it needs the Worker

SECRET_VARIABLES = ("INTENT_API_KEY", "BUS_SECRET", "BUS_ADMIN_SECRET", "DASHBOARD_PASSWORD", "BUS_METRICS_TOKEN")
CTRL_BREAK_EVENT = 1     # the SIGTERM of Windows; the module signal has it only there
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}", re.ASCII)


def as_text(value):
    """Return a JSON value as text: a string as it is, null as an empty text, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else to_json(value)


def fill_placeholders(argument, intent):
    """Return an argument with {id}, {goal}, {payload} and the payload's fields filled in; {{name}} becomes {name}."""
    fields = intent.payload if isinstance(intent.payload, dict) else {}
    values = dict(fields, id=intent.id, goal=intent.goal, payload=intent.payload)
    def value_of(match):
        escaped, field = match.groups()
        if escaped:
            return f"{{{escaped}}}"
        if field not in values:
            raise Reject(f"The payload has no field {field!r}, which an argument of the handler needs.")
        return as_text(values[field])
    return PLACEHOLDER.sub(value_of, argument)


def handler_environment(intent):
    """Return the environment of a handler: the worker's without its secrets, and the variables of the intent."""
    values = dict(ID=intent.id, GOAL=intent.goal, NAMESPACE=intent.namespace, ATTEMPT=intent.claim_attempts,
                  MAX_ATTEMPTS=intent.max_attempts, PAYLOAD=to_json(intent.payload))
    if isinstance(intent.payload, dict):
        values.update((f"PAYLOAD_{field}", value) for field, value in intent.payload.items()
                      if re.fullmatch(r"\w+", field, re.ASCII) and not isinstance(value, (dict, list)))
    variables = {variable: value for variable, value in os.environ.items()
                 if variable not in SECRET_VARIABLES and not variable.startswith("INTENT_PAYLOAD")}
    for field, value in values.items():
        if "\0" not in as_text(value) and len(as_text(value).encode()) <= ENVIRONMENT_BYTES:
            variables[f"INTENT_{field}"] = as_text(value)
    return variables


def run_quietly(*arguments, timeout=None):
    """Run a program without input or output; return whether it ends with exit code 0 within timeout seconds."""
    import subprocess
    try:
        return subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=timeout).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def process_group_options():
    """Return the options of Popen that make a process group, so that a program can be ended with its children."""
    return {"start_new_session": True} if POSIX else {"creationflags": 0x200}     # CREATE_NEW_PROCESS_GROUP


class PipeReader:
    """Reads a pipe in a thread, so that the writer never blocks; excess is the slice of the collected bytes to drop."""

    def __init__(self, pipe, excess):
        self._kept = bytearray()
        self.ended = threading.Event()
        threading.Thread(target=self._drain, args=(pipe, excess), daemon=True).start()

    def read(self):
        """Return the bytes; waits PIPE_SECONDS for the end, since another process may hold the pipe open."""
        self.ended.wait(PIPE_SECONDS)
        return bytes(self._kept)

    def _drain(self, pipe, excess):
        with pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._kept += data
                del self._kept[excess]
        self.ended.set()


class Program:
    """A handler that runs a program: payload on stdin, result on stdout. The README has the contract.

    timeout and kill_after are seconds, max_output bytes; result says how to read stdout: auto, json, text or none.
    Raises SetupError if there is no such program.
    """

    def __init__(self, arguments, timeout=HANDLER_SECONDS, kill_after=KILL_AFTER_SECONDS, max_output=OUTPUT_BYTES,
                 result="auto"):
        import shutil
        self._program = shutil.which(arguments[0])
        if not self._program:
            raise SetupError(f"There is no program {arguments[0]!r} that can be run; check its path, and run chmod +x on it.")
        self._arguments = arguments[1:]
        self._timeout = timeout
        self.kill_after = kill_after
        self._max_output = max_output
        self._result = result

    def __call__(self, intent, lease):
        process = self._start(intent)
        stdout = PipeReader(process.stdout, excess=slice(self._max_output, None))
        stderr = PipeReader(process.stderr, excess=slice(None, -STDERR_BYTES))
        try:
            reason = self._wait(process, stdout, lease)
        finally:
            self._signal(process, "SIGKILL")     # ends the children that the program left behind
            output = stdout.read()
            errors = stderr.read().decode(errors="replace").strip()
        if reason or process.returncode:
            raise self._failure(reason, process.returncode, errors)
        return self._parse(output)

    def _start(self, intent):
        import subprocess
        import tempfile
        arguments = [self._program, *(fill_placeholders(argument, intent) for argument in self._arguments)]
        with tempfile.TemporaryFile() as stdin:     # a pipe would block if the program does not read
            stdin.write(to_json(intent.payload).encode() + b"\n")
            stdin.seek(0)
            try:
                return subprocess.Popen(arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=handler_environment(intent), **process_group_options())
            except ValueError as error:     # an argument has a NUL
                raise Reject(f"The payload cannot be an argument: {error}.") from error
            except OSError as error:
                if error.errno == errno.E2BIG:
                    raise Reject("The payload is too long for an argument.") from error
                raise SetupError(f"The handler {self._program} cannot be run: {error.strerror}; check that it starts with #! "
                                 "and is executable.") from error

    def _wait(self, process, stdout, lease):
        """Wait for the process; end it after the timeout or when its lease is broken; return the reason, or None."""
        import subprocess
        reason = None
        deadline = time.monotonic() + self._timeout
        while process.poll() is None:
            overdue = time.monotonic() >= deadline
            if not reason and (lease.broken or overdue):
                reason = lease.broken or f"timed out after {self._timeout:g} s"
                self._signal(process, "SIGTERM")
                deadline = time.monotonic() + self.kill_after
            elif overdue:
                self._signal(process, "SIGKILL")
            if stdout.ended.wait(SLICE_SECONDS):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(SLICE_SECONDS)
        return reason

    def _signal(self, process, signal_name):
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if POSIX:
                os.killpg(process.pid, getattr(signal, signal_name))
            elif signal_name == "SIGTERM":
                process.send_signal(CTRL_BREAK_EVENT)
            else:
                run_quietly("taskkill", "/F", "/T", "/PID", str(process.pid))

    def _failure(self, reason, code, errors):
        """Return the exception for a program that was ended, or that ended with another exit code than 0."""
        said = f": {errors}" if errors else ""
        if reason:
            return HandlerFailed(reason + said)
        if code == 100:
            return Reject(errors or "The handler rejected it with exit code 100.")
        if code in (126, 127):
            return SetupError(f"The handler ended with exit code {code}, which means it cannot run here{said}")
        return HandlerFailed((f"exit code {code}" if code > 0 else f"killed by signal {-code}") + said)

    def _parse(self, output):
        """Return the result in the output of the program, and its type."""
        if self._result == "none" or self._result == "auto" and not output.strip():
            return None, "json"
        if self._result in ("auto", "json"):
            try:
                return from_json(output), "json"
            except Invalid as error:
                if self._result == "json":
                    raise HandlerFailed(f"The handler's output is not JSON: {error}") from error
        decoded = output.decode(errors="replace").replace("\0", "").rstrip("\n")
        while len(to_json(decoded).encode()) > 2 * self._max_output:     # an invalid byte becomes three bytes, ESC six
            decoded = decoded[:len(decoded) * 3 // 4]
        return decoded, "text"


# ---- 14. Doctor ----
# What goes wrong in practice, and its cure. Each check yields findings.

Finding = collections.namedtuple("Finding", "level about words")     # level: ok, note or bad; words: one or two sentences
ok, note, bad = (functools.partial(Finding, level) for level in ("ok", "note", "bad"))
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "sdcardfs", "fuse", "vfat", "exfat")
UNREACHABLE_CURES = {
    "ConnectionRefusedError": "Nothing listens there: start the bus with serve, or the tunnel that leads to it.",
    "gaierror": "That name is not known: check its spelling, and whether this machine is online.",
    "SSLCertVerificationError": "Pass the certificate with --ca; if it is not valid yet, check the clock of this machine.",
    "SSLError": "That port does not speak https: check http:// or https://, and the port.",
    "TimeoutError": "Nothing answers: a firewall is in the way, or that machine is off.",
}


def open_client(options, timeout=CLIENT_SECONDS, spool=None):
    """Return a client for the flags of a command; raises SetupError."""
    key = options.key_file and read_key(options.key_file)
    if options.key_file and key is None:
        raise SetupError(f"There is no key file {options.key_file}.")
    return IntentClient(options.url, key, timeout, options.namespace, options.ca, spool)


def database_location(options):
    """Return the path or URL of the database for the flags of a command."""
    return options.db or os.environ.get("BUS_DB_PATH") or "intentbus.db"


def file_system(path):
    """Return the type of the file system that holds a path, such as ext4; None if it is unknown."""
    with contextlib.suppress(OSError):
        with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
            mounts = [line.split()[1:3] for line in file]
        return max((len(folder), kind) for folder, kind in mounts if (path + "/").startswith(folder.rstrip("/") + "/"))[1]


def in_termux():
    """Return whether this program runs in Termux, on a phone."""
    return "TERMUX_VERSION" in os.environ or "com.termux" in os.environ.get("PREFIX", "")


def check_versions(options):
    """Check the versions of Python and SQLite."""
    import sqlite3
    versions = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
    if sys.version_info < (3, 9) or sqlite3.sqlite_version_info < (3, 35):
        yield bad("python", f"This is {versions}; install Python 3.9 and SQLite 3.35, or newer.")
    else:
        yield ok("python", f"{versions}.")


def check_clock(offset):
    """Check how many seconds the clock of the bus is ahead."""
    difference = f"The clock of the bus is {offset:+.0f} s off this machine's"
    if abs(offset) > SIGNATURE_SECONDS:
        yield bad("clock", f"{difference}; set the wrong one, or the bus refuses requests that a shell script signs.")
    elif abs(offset) > CLOCK_JUMP_SECONDS:
        yield note("clock", f"{difference}.")
    else:
        yield ok("clock", "This machine and the bus agree on the time.")


def check_bus(options):
    """Check the key, the connection to the bus, the role of the key, and the clock."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            bus = open_client(options, DOCTOR_SECONDS)
        except SetupError as error:
            yield bad("key", str(error))
            return
    yield from (bad("key", f"{warning.message}.") for warning in caught)
    try:
        me = bus.who_am_i()
    except Unreachable as error:
        reason = getattr(error.__cause__, "reason", error.__cause__)
        cure = UNREACHABLE_CURES.get(type(reason).__name__, "Check the URL, and any proxy or tunnel on the way.")
        yield bad("bus", f"{error} {cure}")
    except (Unauthorized, Forbidden) as error:
        yield ok("bus", f"{bus.base_url} answers.")
        yield bad("key", f"The bus refuses this key: {error} Join it again with a new code from keys invite.")
    except NotFound:
        yield note("bus", f"{bus.base_url} is an older or another bus, which has no answer about keys.")
    except Error as error:
        yield bad("bus", f"{bus.base_url} is in trouble: {error}")
    else:
        yield ok("bus", f"{bus.base_url} answers.")
        may = {"both": "publish and work"}.get(me.role, me.role)
        yield ok("key", f"It is {me.key_id}, of the owner {me.owner}, and may {may}.")
        yield from check_clock(me.now - time.time())


def check_database(options):
    """Check the place and the mode of the database file, if it is on this machine."""
    import shutil
    location = database_location(options)
    path = os.path.realpath(location)
    if "://" in location:
        yield note("database", "It is on a database server; check it with the tools of that server.")
    if not os.path.exists(path):
        return
    kind = file_system(path)
    free = shutil.disk_usage(os.path.dirname(path)).free
    if kind in SHARED_FILE_SYSTEMS or re.match("/(sdcard|storage|mnt/media_rw)(/|$)", path):
        yield bad("database", f"{path} is on {kind or 'shared storage'}, where SQLite can lose data; move it to a local disk "
                              "(on a phone, to the home of Termux).")
    elif free < FREE_BYTES:
        yield bad("database", f"The disk of {path} has only {free // 2 ** 20} MB free; make room.")
    elif POSIX and os.stat(path).st_mode & 0o077:
        yield bad("database", f"Others can read {path}; run: chmod 600 {path}")
    else:
        yield ok("database", f"{path}, {os.path.getsize(path) // 2 ** 20} MB, {free // 2 ** 20} MB free.")


def check_spool(options):
    """Check the spool for requests that were not sent."""
    if not os.path.exists(os.path.expanduser(SPOOL_FILE)):
        return
    pending, refused = Spool().counts()
    if refused:
        yield bad("spool", f"A bus refused {refused} requests for good; flush shows them, flush --discard deletes them.")
    elif pending:
        yield note("spool", f"{pending} requests wait to be sent; flush sends them.")
    else:
        yield ok("spool", "No request waits to be sent.")


def check_termux(options):
    """Check the programs and settings that a worker needs on Android."""
    import shutil
    if not in_termux():
        return
    if not shutil.which("termux-battery-status"):
        yield bad("termux", "There is no termux-api; run pkg install termux-api, and install the app Termux:API.")
    elif run_quietly("termux-battery-status", timeout=TERMUX_SECONDS):
        yield ok("termux", "Termux:API answers.")
    else:
        yield bad("termux", "Termux:API does not answer; install its app from the same store as Termux, and open it once.")
    if not shutil.which("termux-wake-lock"):
        yield bad("termux", "There is no termux-wake-lock, so workers sleep with the phone; run pkg install termux-tools.")
    boot_folder = os.path.expanduser("~/.termux/boot")
    if not os.path.isdir(boot_folder) or not os.listdir(boot_folder):
        yield note("termux", "No worker starts after a reboot: install the app Termux:Boot, open it once, and copy "
                             "examples/termux_boot.sh into ~/.termux/boot/.")
    yield note("termux", "In Android's settings, set the battery use of Termux to unrestricted.")
    yield note("termux", "Android 12 and newer kill a 33rd program; disable child process restrictions in developer options.")


CHECKS = (check_versions, check_bus, check_database, check_spool, check_termux)


# ---- 15. Commands ----
# The command line. Examples and flags stand on a command's function, its docstring is the help; messages go to stderr.

INTRODUCTION = """intentbus: say "do this" here, have it done there.

  {0} serve                                 # the bus: HTTP in front of a SQLite file
  {0} work --goal notify -- ./handler.sh    # a worker, anywhere: runs a program for each job
  {0} publish notify message="hi"           # from cron, a shell, a script
"""
EPILOG = """
COMMAND --help shows examples and flags, --version shows the version. Data goes to stdout, messages go to stderr.

exit codes: 0 success; 1 the intent is dead; 2 wrong usage or setup; 3 not found; 4 refused; 5 bus unreachable;
6 over a limit; 124 timed out; 130, 143 stopped by a signal"""
GROUPS = (
    ("run", ("serve", "publish", "work", "flush")),
    ("inspect", ("status", "result", "list", "workers", "watch", "stats")),
    ("repair", ("cancel", "retry", "purge", "doctor", "backup")),
    ("keys and machines", ("keys add", "keys invite", "keys list", "keys revoke", "join")),
    ("store values", ("set", "get", "del")),
)
EXIT_CODES = {400: 2, 401: 4, 403: 4, 404: 3, 409: 1, 413: 6, 422: 6, 429: 6}     # by the HTTP status of the error
INVOCATION = f"{os.path.basename(sys.executable or 'python')} {os.path.basename(__file__)}"     # how a person starts it
UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
UNPRINTABLE = r"[^\n\t\x20-\x7e\xa0-\U0010ffff]"     # characters that can control a terminal; compiled late, which takes 3 ms
COMMANDS = {}     # name: (function, examples, flags)


def escape(text, characters=CONTROL):
    r"""Replace the characters of a text that can control a terminal by escape sequences such as \x1b."""
    return re.sub(characters, lambda match: f"\\x{ord(match[0]):02x}", text)


def log(message):
    """Write a message to stderr, on one line."""
    sys.stderr.write(escape(f"intentbus: {message}".replace("\n", " | ")) + "\n")


def print_result(value):
    """Write a value to stdout as it is, but on a terminal without control characters."""
    line = escape(str(value), UNPRINTABLE) if sys.stdout.isatty() else str(value)
    sys.stdout.write(line + "\n")     # one write, so that the lines of threads do not mix
    sys.stdout.flush()


def print_rows(options, records, cells):
    """Print a line for each record: with --json its JSON, else the cells that cells(record) returns."""
    for record in records:
        line = to_json(record) if options.json else "  ".join(str(cell) for cell in cells(record) if cell not in (None, ""))
        print_result(line if options.json else escape(line.replace("\n", " | ")))


def print_answer(options, answer, field):
    """Print a field of an answer; with --json, print the whole answer."""
    print_result(to_json(answer) if options.json else answer[field])


def duration(text):
    """Parse a duration such as 90, 90s, 5m, 2h or 7d; return its seconds."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text, re.ASCII)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90, 90s, 5m, 2h or 7d")
    return float(match[1]) * UNIT_SECONDS[match[2]]


def format_duration(seconds):
    """Format seconds in their largest unit, such as 5m."""
    unit = next((unit for unit in "dhm" if seconds >= UNIT_SECONDS[unit]), "s")
    return f"{max(0, seconds) // UNIT_SECONDS[unit]:.0f}{unit}"


def positive_int(text):
    """Parse a whole number from 1 up."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def flag(*names, **settings):
    """Return an argument of a command, as (names, settings) of add_argument; a default is added to the help."""
    if default := settings.get("default"):
        settings["help"] += f" (default {format_duration(default) if settings.get('type') is duration else default})"
    return names, settings


def command(name, examples, *flags):
    """Register a function as a command: it takes the parsed options and returns the exit code, or None for 0."""
    def register(function):
        COMMANDS[name] = function, examples, flags
        return function
    return register


CA = flag("--ca", metavar="FILE", help="trust the certificates in this file, besides the system's")
CONNECTION = (
    flag("--url", help=f"the URL of the bus (INTENT_BUS_URL; default the bus joined, else {URL})"),
    flag("--key-file", help=f"the file with the key (or the key in INTENT_API_KEY; default the bus joined, else {KEY_FILE})"),
    flag("--namespace", help="the namespace on the bus (INTENT_BUS_NAMESPACE; default default)"),
    CA,
)
DB = flag("--db", help="the database file (BUS_DB_PATH; default intentbus.db)")
ID = flag("id", help="the id that publish printed")
JSON = flag("--json", action="store_true", help="print JSON")
STORED_KEY = flag("key", help="the key of the value")
PUBLISH_FIELDS = ("priority", "delay", "ttl", "max_attempts", "backoff_base", "target_worker", "required_capability",
                  "visibility", "idempotency_key")
NEW_KEY = (
    flag("name", help="a name for the key, such as that of its machine"),
    flag("--owner", default="owner", help="the owner whose intents it shares"),
    flag("--role", choices=("publish", "work", "both"), default="both", help="what the key may do"),
)
WAIT = flag("--wait", type=lambda text: duration(text) if text else PUBLISH_WAIT_SECONDS, metavar="=DURATION",
            help="wait until it has ended (5m if no DURATION is given) and print its result; exit 1 if it is dead")


def bus_command(name, examples, *flags):
    """Register a command that talks to a bus: its function gets a client first, and it has the CONNECTION flags too."""
    def register(function):
        with_client = functools.wraps(function)(lambda options: function(open_client(options), options))
        return command(name, examples, *CONNECTION, *flags)(with_client)
    return register


@command("serve", ["serve", "serve --db ~/bus.db --port 9000 --log",
                   "serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem"],
         flag("--host", default="127.0.0.1", help="the address to listen on"),
         flag("--port", type=int, default=8787, help="the port; 0 picks a free one"),
         DB,
         flag("--key-file", default=KEY_FILE, help="the file with the owner key, unless BUS_SECRET has it"),
         flag("--max-body", type=positive_int, default=BODY_BYTES, metavar="BYTES", help="the longest request body"),
         flag("--retention", type=duration, default=RETENTION_SECONDS, help="how long to keep intents that have ended"),
         flag("--rate-limit", type=positive_int, default=RATE_PER_MINUTE, help="requests a minute for each issued key"),
         flag("--max-unfinished", type=positive_int, default=UNFINISHED, help="unfinished intents for each issued key"),
         flag("--require-claim-token", action="store_true", help="refuse reports without one, as 1.x workers send"),
         flag("--require-signatures", action="store_true", help="refuse unsigned requests (BUS_REQUIRE_SIGNATURES)"),
         flag("--tls-cert", metavar="FILE", help="serve https with this certificate (PEM)"),
         flag("--tls-key", metavar="FILE", help="the file with its key (default the same file)"),
         flag("--trust-proxy", action="store_true", help="trust X-Forwarded-For and X-Forwarded-Proto (BUS_TRUST_PROXY)"),
         flag("--announce-dead", action="store_true", help=f"publish an intent with the goal {DEATHS} for each that dies"),
         flag("--log", action="store_true", help="log each request to stderr, as a line of JSON"))
def serve_command(options):
    """Run the bus: HTTP in front of a SQLite file. Prints its URL once it listens; Ctrl-C or SIGTERM shuts it down.

    The first start creates the owner key. Put a TLS proxy or a tunnel in front before other machines use the bus.
    """
    if options.tls_key and not options.tls_cert:
        raise Invalid("--tls-key needs --tls-cert.")
    key, key_source = owner_key(options.key_file)
    store = open_store(options.db)
    try:
        api = api_of(store, key, options.require_claim_token, options.retention, options.rate_limit, options.max_unfinished,
                     options.max_body, options.require_signatures, options.announce_dead)
        server = http_server(api, options.host, options.port, options.log,
                             options.trust_proxy or switched_on("BUS_TRUST_PROXY"),
                             options.tls_cert and (options.tls_cert, options.tls_key or options.tls_cert))
    except Error:
        store.close()
        raise
    stop = threading.Event()
    for signal_name in ("SIGTERM", "SIGINT", "SIGBREAK"):     # only Windows has SIGBREAK
        if hasattr(signal, signal_name):
            signal.signal(getattr(signal, signal_name), lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http{'s' if options.tls_cert else ''}://{host}:{server.server_port}"
    print(url, flush=True)
    log_startup(options, url, store, key_source)
    while not stop.wait(1):     # a short wait, since signals do not interrupt waits on Windows
        pass
    deadline = threading.Timer(EXIT_SECONDS, os._exit, [0])
    deadline.daemon = True
    deadline.start()
    server.close()
    store.close()


def log_startup(options, url, store, key_source):
    """Log the state of a bus that has just started, and the next commands to try."""
    log(f"{__version__}, database {store.path}, the key is {key_source}")
    if store.warning:
        log(store.warning)
    if not options.tls_cert and options.host not in ("127.0.0.1", "::1", "localhost"):
        log("other machines can reach this bus over plain HTTP; put a TLS proxy or a tunnel in front of it")
    log("next, in two other terminals:")
    where = "" if url == URL else f" --url {url}"
    print(f"  {INVOCATION} work{where} --goal hello\n  {INVOCATION} publish{where} hello name=world", file=sys.stderr)


@command("publish", ['publish send_notification title=nas message="the backup is done"',
                     """publish resize '{"file": "a.jpg"}' --wait""",
                     "publish backup host=nas full:=true --delay 1h --spool",
                     "publish resize --lines < files.txt"],
         *CONNECTION,
         flag("goal", help="the name of the work, which workers ask for"),
         flag("payload", nargs="*", help="JSON, name=text and name:=json pairs, @FILE, or - or nothing for stdin"),
         WAIT, JSON,
         flag("--priority", type=int, help="0 to 1000, larger first (default 100)"),
         flag("--delay", type=duration, help="the time until it can be claimed"),
         flag("--ttl", type=duration, help="how long it may stay unfinished after the delay (default 7d)"),
         flag("--max-attempts", type=int, help="1 to 20 (default 3)"),
         flag("--backoff", dest="backoff_base", type=duration, help="half the first pause; pauses double (default 5s)"),
         flag("--worker", dest="target_worker", help="the id of the only worker that may claim it"),
         flag("--capability", dest="required_capability", help="a capability that its worker must have"),
         flag("--public", dest="visibility", action="store_const", const="public", help="let workers of any owner claim it"),
         flag("--idempotency-key", help="within a day, publishing again with this key stores nothing new"),
         flag("--spool", action="store_const", const=SPOOL_FILE, help="if the bus cannot be reached, store it for later"),
         flag("--lines", action="store_true", help="publish an intent for each line of stdin, with its text as payload"),
         flag("--jsonl", action="store_true", help="publish an intent for each line of stdin, with its JSON as payload"))
def publish_command(options):
    """Publish an intent and print its id. With --lines or --jsonl, up to 1,000 intents are sent in one request."""
    fields = {name: value for name, value in vars(options).items() if name in PUBLISH_FIELDS and value is not None}
    if options.spool and options.wait is not None:
        raise Invalid("--spool and --wait exclude each other: a stored intent may be sent much later.")
    bus = open_client(options, spool=options.spool)
    if options.lines or options.jsonl:
        return publish_lines(bus, options, fields)
    answer = bus.publish(options.goal, read_payload(options.payload), **fields)
    if answer.get("status") == "spooled":
        log(f"{answer.reason} The intent is stored; the next publish --spool, flush or work sends it.")
    elif answer.get("never_claimed"):
        log(f"no worker has ever claimed {options.goal!r}; check the spelling (workers lists who is there)")
    if options.wait is not None:
        return wait_for_result(bus, answer.id, options)
    if options.json or answer.id:
        print_answer(options, answer, "id")


def publish_lines(bus, options, fields):
    """Publish an intent for each line of stdin and print the ids; on a terminal, show the progress."""
    if options.payload or options.wait is not None:
        raise Invalid("--lines and --jsonl read payloads from stdin only, and exclude --wait.")
    key = fields.pop("idempotency_key", None)
    parse = parse_json if options.jsonl else decode_line
    intents = (dict(fields, goal=options.goal, payload=parse(line)) for line in sys.stdin.buffer if line.strip())
    published = 0
    for number, batch in enumerate(batches(intents)):
        answer = bus.publish_many(batch, idempotency_key=key and f"{key} {number}")
        if answer.get("status") == "spooled":
            log(f"{answer.reason} {len(batch)} intents are stored; the next publish --spool, flush or work sends them.")
            continue
        print_result("\n".join(to_json({"id": intent_id}) if options.json else intent_id for intent_id in answer.ids))
        published += len(answer.ids)
        if sys.stderr.isatty():
            sys.stderr.write(f"\rintentbus: {published} published")
    if sys.stderr.isatty():
        sys.stderr.write("\n")


def batches(intents):
    """Yield lists of intents, each of at most BULK_INTENTS and no larger than a request may be."""
    batch = []
    size = 0
    for intent in intents:
        weight = len(to_json(intent).encode()) + 100     # room for the namespace, which the client adds
        if batch and (len(batch) == BULK_INTENTS or size + weight > BODY_BYTES):
            yield batch
            batch = []
            size = 0
        batch.append(intent)
        size += weight
    if batch:
        yield batch


def decode_line(line):
    """Decode a line of stdin, without its line break; raises Invalid."""
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise Invalid("A line of stdin is not UTF-8.") from error


def parse_json(source):
    """Return the value of JSON that a person wrote, as text or bytes; raises Invalid."""
    try:
        return from_json(source if isinstance(source, bytes) else source.encode())
    except (Invalid, UnicodeError) as error:
        shown = source[:60] if isinstance(source, str) else source[:60].decode(errors="replace")
        raise Invalid(f"{error} The input was {shown!r}; plain text needs quotes: '\"text\"'.") from error


def read_payload(words):
    """Return the payload for words of a command line: pairs, JSON, @FILE, or - or nothing for stdin."""
    pairs = [re.fullmatch(r"(\w+)(:?=)(.*)", word, re.ASCII | re.DOTALL) for word in words]
    if words and all(pairs):
        return {name: parse_json(value) if equals == ":=" else value for name, equals, value in map(re.Match.groups, pairs)}
    if len(words) > 1:
        raise Invalid("The payload is one JSON value (quote it for the shell), or name=text pairs.")
    word = words[0] if words else "-"
    if word.startswith("@"):
        try:
            with open(word[1:], "rb") as file:
                return parse_json(file.read())
        except OSError as error:
            raise SetupError(f"The payload file {word[1:]} cannot be read: {error.strerror}.") from error
    if word != "-":
        return parse_json(word)
    if not words and (sys.stdin is None or sys.stdin.isatty()):
        raise Invalid("There is no payload: give JSON, name=text pairs, @FILE, or redirect stdin.")
    return parse_json(sys.stdin.buffer.read())


def wait_for_result(bus, intent_id, options):
    """Print the result of an intent as soon as it has ended; return the exit code."""
    deadline = time.monotonic() + options.wait
    while True:
        until = min(deadline, time.monotonic() + CLAIM_WAIT_SECONDS)
        intent = bus.get_result(intent_id, wait=max(0, until - time.monotonic()))
        if intent.status in ("fulfilled", "dead"):
            return print_outcome(options, intent)
        if time.monotonic() >= deadline:
            log(f"{intent_id} is still {intent.status}; ask again with: result {intent_id}")
            return 124
        time.sleep(max(0, min(1, until - time.monotonic())))     # this bus may not hold requests


def print_outcome(options, intent):
    """Print the result of an intent, or log why it is dead; return the exit code."""
    if options.json:
        print_result(to_json(intent))
    elif intent.status == "fulfilled" and intent.result is not None:
        print_result(as_text(intent.result))
    if intent.status == "dead":
        log(f"{intent.id} is dead: {intent.last_error}")
    return {"fulfilled": 0, "dead": 1}.get(intent.status, 3)


@command("flush", ["flush"], *CONNECTION,
         flag("--discard", action="store_true", help="delete the requests that the bus has refused for good"))
def flush_command(options):
    """Send the spooled requests and print how many the bus accepted; exit 1 if it refused some for good."""
    bus = open_client(options, spool=SPOOL_FILE)
    print_result(bus.flush())
    refused = bus.spool.refused(bus.base_url)
    for request in refused:
        log(f"refused for good: {request.refusal} {request.body}")
        if options.discard:
            bus.spool.remove(request.number)
    return 1 if refused and not options.discard else 0


@command("work", ["work --goal send_notification -- ./handler.sh",
                  "work --goal resize -j 4 -- convert {file} -resize 50% {out}",
                  "work --goal backup --drain --timeout 1h -- ./backup.sh"],
         *CONNECTION,
         flag("--goal", action="append", help="a goal to work on; may be repeated (default any goal)"),
         flag("-j", "--jobs", type=positive_int, default=1, metavar="N", help="how many handlers run at the same time"),
         flag("--once", dest="max_jobs", action="store_const", const=1, help="stop after one intent"),
         flag("--max-jobs", type=positive_int, metavar="N", help="stop after N intents"),
         flag("--drain", action="store_true", help="stop when there is nothing to claim"),
         flag("--max-time", type=duration, help="claim nothing more after that time"),
         flag("--timeout", type=duration, default=HANDLER_SECONDS, help="how long a handler may run"),
         flag("--kill-after", type=duration, default=KILL_AFTER_SECONDS, help="the time from TERM to KILL, to end a handler"),
         flag("--lease", type=duration, default=LEASE_SECONDS, help="how long a silent worker keeps an intent, 10s to 1h"),
         flag("--poll", type=duration, default=POLL_SECONDS, help="the pause between claims if the bus does not hold them"),
         flag("--result", choices=("auto", "json", "text", "none"), default="auto", help="how to read stdout"),
         flag("--max-output", type=positive_int, default=OUTPUT_BYTES, metavar="BYTES", help="how much of stdout to keep"),
         flag("--worker-id", help="the id of this worker, for publish --worker and for the list of workers"),
         flag("--no-wake-lock", action="store_true", help="in Termux, let the phone sleep"),
         flag("--capability", dest="capabilities", action="append", default=[], help="a capability it has; may be repeated"),
         flag("program", nargs="*", help="the handler and its arguments, after --"))
def work_command(options):
    """Claim intents and run a program for each: stdin is its payload, stdout becomes its result.

    {name} in an argument becomes that field of the payload; {id}, {goal} and {payload} are filled in too. Exit code 0
    fulfils the intent, 100 rejects it for good, 126 and 127 stop the worker, any other fails it for a retry. Without a
    program, work prints each payload.
    """
    handler = print_payload
    if options.program:
        handler = Program(options.program, options.timeout, options.kill_after, options.max_output, options.result)
    if options.jobs > JOBS:
        raise Invalid(f"-j must be at most {JOBS}.")
    if not LEASE_RANGE_SECONDS[0] <= options.lease <= LEASE_RANGE_SECONDS[1]:
        raise Invalid("--lease must be from 10s to 1h.")
    may_sleep = options.max_jobs or options.drain or options.max_time or options.no_wake_lock
    if not may_sleep and in_termux() and run_quietly("termux-wake-lock", timeout=TERMUX_SECONDS):
        log("the phone stays awake until you run termux-wake-unlock (or start with --no-wake-lock)")
    spool = SPOOL_FILE
    try:
        Spool()
    except SetupError as error:
        spool = None
        log(f"{error} An outcome that cannot be reported will be lost.")
    worker = Worker(open_client(options, spool=spool), options.goal, handler, on_message=log,
                    concurrency=options.jobs, lease=options.lease, max_jobs=options.max_jobs, max_time=options.max_time,
                    drain=options.drain, poll=options.poll, worker_id=options.worker_id, capabilities=options.capabilities)
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, worker.interrupt)
    worker.run()
    return 128 + worker.signals[0] if worker.signals else 0


def print_payload(intent, lease):
    """Print the payload of an intent as a line of JSON: the handler of work without a program."""
    print_result(to_json(intent.payload))
    return None, "json"


@bus_command("status", ["status 01a20a3bf4423c55cce77efa455c0ada"], ID, JSON)
def status_command(bus, options):
    """Print the status of an intent: open, claimed, fulfilled or dead."""
    intent = bus.get_status(options.id)
    print_answer(options, intent, "status")
    if intent.last_error and not options.json:
        log(intent.last_error)


@bus_command("result", ["result 01a20a3bf4423c55cce77efa455c0ada --wait=10m"], ID, WAIT, JSON)
def result_command(bus, options):
    """Print the result of an intent; exit 1 if it is dead, 3 if it has not ended."""
    if options.wait is not None:
        return wait_for_result(bus, options.id, options)
    intent = bus.get_result(options.id)
    if intent.status in ("open", "claimed"):
        log(f"{options.id} is still {intent.status}")
    return print_outcome(options, intent)


@bus_command("list", ["list --status dead", "list --goal resize --limit 500 --json"],
             flag("--status", choices=("open", "claimed", "fulfilled", "dead"), help="only intents with this status"),
             flag("--goal", help="only intents with this goal"),
             flag("--limit", type=positive_int, default=50, metavar="N", help="at most N intents"), JSON)
def list_command(bus, options):
    """List intents, newest first: id, status, attempts, age, goal, last error."""
    left = options.limit
    before = None
    while left > 0:
        page = bus.list(status=options.status, goal=options.goal, namespace=options.namespace, limit=min(left, 500),
                        before=before)
        print_rows(options, page.intents, lambda intent: (
            intent.id, f"{intent.status:9}", f"{intent.claim_attempts}/{intent.max_attempts}",
            f"{format_duration(time.time() - intent.created_at):>4}", intent.goal, intent.last_error))
        before = page.next
        left = left - len(page.intents) if before else 0


@bus_command("workers", ["workers"], JSON)
def workers_command(bus, options):
    """List the workers of the last five minutes: last seen, owner, id, version, goals, intent."""
    print_rows(options, map(Record, bus.workers().workers), lambda worker: (
        f"{format_duration(time.time() - worker.last_seen):>4}", worker.owner, worker.id, worker.version or "-",
        ", ".join(worker.goals) or "any goal", worker.intent))


@bus_command("watch", ["watch", """watch --json | jq -c 'select(.event == "dead")'"""], JSON)
def watch_command(bus, options):
    """Print the events on the bus as they happen, until Ctrl-C: time, event, intent, goal, worker, error."""
    after = None
    while True:
        asked = time.monotonic()
        try:
            page = bus.events(after, wait=CLAIM_WAIT_SECONDS if after else 0)
        except TRANSIENT as error:
            log(f"{error} Trying again.")
            time.sleep(POLL_SECONDS)
            continue
        if page.missed:
            log(f"{page.missed} events were missed")
        print_rows(options, map(Record, page.events), lambda entry: (
            time.strftime("%H:%M:%S", time.localtime(entry.time)), f"{entry.event:9}", entry.id, entry.goal, entry.worker_id,
            entry.last_error if entry.event in ("failed", "dead", "lost") else None))
        if after and not page.events and time.monotonic() - asked < RECHECK_SECONDS:     # this bus does not hold requests
            time.sleep(RECHECK_SECONDS)
        after = page.next


@bus_command("cancel", ["cancel 01a20a3bf4423c55cce77efa455c0ada"], ID, JSON)
def cancel_command(bus, options):
    """Cancel an unfinished intent; a worker that has claimed it stops."""
    print_answer(options, bus.cancel(options.id), "status")


@bus_command("retry", ["retry 01a20a3bf4423c55cce77efa455c0ada", "retry --goal resize"],
             flag("id", nargs="?", help="the id that publish printed"),
             flag("--goal", help="all dead intents with this goal, up to --limit"),
             flag("--all", action="store_true", help="all dead intents, up to --limit"),
             flag("--limit", type=positive_int, default=1000, metavar="N", help="at most N intents"), JSON)
def retry_command(bus, options):
    """Reopen a dead intent, or many; prints the new status, or the number of intents."""
    if bool(options.id) + bool(options.goal) + options.all != 1:
        raise Invalid("retry needs one of these: an id, --goal GOAL, --all.")
    answer = bus.retry(options.id, goal=options.goal, namespace=options.namespace, limit=options.limit)
    print_answer(options, answer, "status" if options.id else "retried")


@bus_command("set", ["""set thermostat '{"celsius": 19.5}' --ttl 1h""", 'set "nightly backup" mine --ttl 1h --if-absent'],
             STORED_KEY, flag("value", help="JSON; anything else is stored as text"),
             flag("--ttl", type=duration, default=VALUE_TTL_SECONDS, help="how long to keep it, up to 1d"),
             flag("--if-absent", action="store_true", help="exit 1 if the key has a value, so that it serves as a lock"))
def set_command(bus, options):
    """Store a value under a key, for some time."""
    try:
        value = from_json(options.value.encode())
    except (Invalid, UnicodeError):
        value = options.value
    bus.set(options.key, value, options.ttl, options.if_absent)


@bus_command("get", ["get thermostat"], STORED_KEY)
def get_command(bus, options):
    """Print a stored value: text as it is, anything else as JSON; exit 3 if there is none."""
    print_result(as_text(bus.get(options.key)))


@bus_command("del", ["del thermostat"], STORED_KEY)
def delete_command(bus, options):
    """Delete a stored value; exit 3 if there was none."""
    return 0 if bus.delete(options.key).deleted else 3


@bus_command("keys add", ["keys add phone --role work"], *NEW_KEY)
def keys_add_command(bus, options):
    """Issue a key and print it; it cannot be shown again."""
    made = bus.admin("generate_key", name=options.name, owner=options.owner, role=options.role)
    log(f"id {made.key_id}, owner {made.owner}, role {made.role}; the key is not shown again")
    print_result(made.api_key)


@bus_command("keys invite", ["keys invite phone --role work"], *NEW_KEY)
def keys_invite_command(bus, options):
    """Print a code with which another machine can join the bus: once, within ten minutes."""
    made = bus.admin("invite", name=options.name, owner=options.owner, role=options.role)
    expiry = time.strftime("%H:%M", time.localtime(made.expires_at))
    log(f"for {made.name}, role {made.role}: valid until {expiry}, once. On the other machine: join URL CODE")
    print_result(made.code)


@bus_command("keys list", ["keys list"], JSON)
def keys_list_command(bus, options):
    """List the issued keys: id, role, owner, requests, last use, name."""
    print_rows(options, bus.admin("keys"), lambda key: (
        key.key_id, f"{key.role:7}", key.owner, key.total_requests,
        format_duration(time.time() - key.last_used_at) if key.last_used_at else "never", key.name))


@bus_command("keys revoke", ["keys revoke 267ecfd48ae038ad"], flag("key_id", help="the id that keys list prints"))
def keys_revoke_command(bus, options):
    """Revoke an issued key."""
    bus.admin("revoke_key", key_id=options.key_id)


@command("join", ["join https://bus.example.com K7Q2-9MXW", "join http://100.101.102.103:8787 K7Q2-9MXW --plain"],
         flag("url", help="the URL of the bus, as seen from this machine"), flag("code", help="a code of keys invite"), CA,
         flag("--plain", action="store_true", help="allow plain http, because a VPN encrypts the connection"))
def join_command(options):
    """Join a bus: exchange a code for a key and save both the URL and the key, so that commands need no flags."""
    bus = IntentClient(options.url, "none", ca=options.ca)
    if not (bus.secure or options.plain):
        raise SetupError("The key would cross the network unencrypted. Join over https, or through a tunnel that ends on "
                         "this machine; pass --plain if a VPN encrypts the connection.")
    made = bus.join(options.code)
    write_settings(bus.base_url, made.api_key, options.ca)
    log(f"joined {bus.base_url} as {made.name}, role {made.role}; the key is in {CONFIG_FILE}")


@bus_command("stats", ["stats"])
def stats_command(bus, options):
    """Print the state of the bus as JSON: intents by namespace and status, sizes, held requests."""
    summary = bus.admin("summary")
    summary.pop("history", None)     # the data of a chart
    print_result(json.dumps(summary, indent=2))


@bus_command("purge", ["purge --namespace test --yes"], flag("--yes", action="store_true", help="confirm"))
def purge_command(bus, options):
    """Delete all intents, or the intents of a --namespace, for good; prints their number."""
    if not options.yes:
        raise Invalid("This deletes intents of every status, for good; confirm it with --yes.")
    print_result(bus.admin("purge", confirm=True, namespace=options.namespace).deleted)


@command("doctor", ["doctor"], *CONNECTION, DB, JSON)
def doctor_command(options):
    """Look for common problems and print their cures; exit 1 if one is bad."""
    findings = [Record(finding._asdict()) for check in CHECKS for finding in check(options)]
    print_rows(options, findings, lambda finding: (f"{finding.level:4}", f"{finding.about:8}", finding.words))
    return int(any(finding.level == "bad" for finding in findings))


@command("backup", ["backup bus-monday.db"], flag("file", help="the file to create; it must not exist"), DB)
def backup_command(options):
    """Copy the database of a bus, running or not, into a file that serve --db can use."""
    import sqlite3
    source = database_location(options)
    if "://" in source:
        raise SetupError("backup copies SQLite files; use pg_dump for a PostgreSQL database.")
    source = os.path.realpath(source)
    try:
        with contextlib.ExitStack() as undo:
            if not os.path.isfile(source):
                raise FileNotFoundError(errno.ENOENT, "there is no such database")
            os.close(os.open(options.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            undo.callback(os.unlink, options.file)
            uri = f"file:{urllib.parse.quote(source)}?mode=ro"
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as here, \
                    contextlib.closing(sqlite3.connect(options.file)) as there:
                here.backup(there)
            undo.pop_all()
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{source} cannot be copied to {options.file}: {reason}.") from error


class Parser(argparse.ArgumentParser):
    """The argument parser of one command; its help starts with examples."""

    def __init__(self, name):
        function, self._examples, flags = COMMANDS[name]
        super().__init__(f"intentbus.py {name}", description=function.__doc__)
        for names, settings in flags:
            self.add_argument(*names, **settings)

    def parse(self, words):
        """Return the options in a command line; flags may stand anywhere before "--"."""
        return self.parse_args(words) if "--" in words else self.parse_intermixed_args(words)

    def error(self, message):
        """Raise Invalid, where argparse would print the usage and exit."""
        raise Invalid(f"{message}; see {self.prog} --help.")

    def format_help(self):
        """Return the examples, then the usual help."""
        examples = "".join(f"  {INVOCATION} {example}\n" for example in self._examples)
        return f"examples:\n{examples}\n{super().format_help()}"


def overview():
    """Return the help of the program: the introduction, and the commands in groups."""
    lines = [INTRODUCTION.format(INVOCATION)]
    for title, names in GROUPS:
        clauses = (re.split(r"[:;.](?:\s|$)", COMMANDS[name][0].__doc__)[0] for name in names)
        lines += [f"{title}:", *map("  {:12} {}".format, names, clauses), ""]
    return "\n".join(lines) + EPILOG


def find_command(words):
    """Return the command at the start of a command line, and the remaining words; raises Invalid if there is none."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in COMMANDS:
            return name, words[length:]
    import difflib
    near = [name for name in COMMANDS if name.startswith(words[0] + " ")] or difflib.get_close_matches(words[0], COMMANDS)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists the commands."
    raise Invalid(f"There is no command {words[0]!r}{hint}")


def run_command(words):
    """Run the command in a command line; return its exit code."""
    if not words:
        print(overview(), file=sys.stderr)
        raise Invalid("A COMMAND is missing.")
    if words[0] in ("-h", "--help", "help", "--version"):
        print(f"intentbus {__version__}" if words[0] == "--version" else overview())
        return 0
    end = words.index("--") if "--" in words else len(words)
    words = ["--wait=" if word == "--wait" else word for word in words[:end]] + words[end:]     # --wait may have no value
    name, words = find_command(words)
    options = Parser(name).parse(words)
    if getattr(options, "namespace", "") is None:
        options.namespace = os.environ.get("INTENT_BUS_NAMESPACE") or None
    code = COMMANDS[name][0](options) or 0
    sys.stdout.flush()
    return code


def main(arguments=None):
    """Run a command line, of sys.argv by default; return the exit code, and log an error as one sentence."""
    warnings.showwarning = lambda message, *_: log(message)
    if hasattr(sys.stdout, "reconfigure"):     # for characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except Error as error:
        log(error)
        return 2 if isinstance(error, SetupError) else EXIT_CODES.get(error.status, 5)
    except KeyboardInterrupt:
        return 130
    except OSError as error:     # stdout cannot be written: its reader is gone, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        log(error.strerror)
        return 2


if __name__ == "__main__":
    sys.exit(main())
