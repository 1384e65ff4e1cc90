#!/usr/bin/env python3
"""intentbus: say "do this" here, have it done there. One file, no dependencies.

    python intentbus.py serve                                            # the bus: HTTP + SQLite
    python intentbus.py work --goal send_notification -- ./handler.sh    # a worker: polls outbound, runs a program
    python intentbus.py publish send_notification '{"message": "hi"}'    # from cron, a shell, a script

A publisher posts an intent: a goal, which says what to do, and a payload, which says with what.
Workers claim intents of their goals. Each intent goes to one worker, under a lease that the worker
renews while it works. A worker that dies loses its lease, and the intent goes to the next worker.

    publish            claim                 fulfill
    --------> open --------------> claimed ----------> fulfilled
               ^                    |    |
               |  fail (backoff),   |    | fail or lost lease on the last attempt,
               |  lost lease,       |    | fail with retry=false, cancel, expiry
               |  release           |    v
               '--------------------'   dead ---- retry ---> open

One thread, the loop of Server, owns all state. It works in rounds:

    receive from all connections  ->  answer each whole request in one transaction  ->  commit  ->  send

The parts, top to bottom; each uses only the parts above it:

     1. Settings      every number one may want to change
     2. Errors        one class for each HTTP status, raised on both sides of the wire
     3. Intent        the record, and its transitions as pure functions of the time
     4. Schedule      when a schedule runs: a grid of seconds, or a cron expression in a time zone
     5. Database      the SQLite file: connections, the transaction of a round, migrations
     6. Store         all other SQL, on the open transaction
     7. Clock         Unix seconds that run evenly, even when the machine's clock is set
     8. Waiting       held requests, by what they wait for
     9. Activity      workers, events, history and live output: in memory, for display
    10. Bus           the rules: who may do what, leases, retries
    11. Keys          who is asking
    12. Fields        what a body or query may hold, as data
    13. Page          the dashboard
    14. API           the endpoints as a table; handle(request) -> Response, Held or Unfinished
    15. Server        the loop, sockets and strict HTTP/1.1; and the WSGI application
    16. Local state   what a machine keeps for itself: the bus joined, the spool
    17. Client        IntentClient: the verbs of Bus over HTTP
    18. Worker        claim, run, keep the lease, report; a program as the handler
    19. Doctor        what goes wrong in practice, and the cure
    20. Commands      the command line
"""

# The public names are typed, for users whose checkers are strict; the rest is not.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-any-generics, no-check-untyped-defs, no-warn-return-any
# pyright: basic, analyzeUnannotatedFunctions=false
from __future__ import annotations

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import errno
import functools
import hashlib
import heapq
import hmac
import io
import itertools
import json
import math
import operator
import os
import queue
import random
import re
import selectors
import signal
import socket
import sys
import threading
import time
import types
import urllib.parse
import warnings

__version__ = "1.0.0"
__all__ = ["API", "Bus", "Clock", "Database", "Error", "Intent", "IntentClient", "Keys", "Lease", "Record", "Reject", "Store",
           "Worker", "listen", "main"]

TYPE_CHECKING = False     # type checkers take it for true; importing typing would cost each start 4 ms
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import FrameType
    from typing import Any, Literal, Union


# ---- 1. Settings ----
# A number has its unit in its name and its reason beside it.

# Intents
LEASE_SECONDS = 60                  # a worker that is silent for this long has lost its intent
GRACE_SECONDS = 30                  # more, for a lease that ran out while the bus was away; at most the lease again
LEASE_RANGE_SECONDS = (10, 3600)    # a phone cannot renew a shorter one; a longer one hides a dead worker
CLAIM_COMBINATIONS = 64             # goals times capabilities of one claim: each costs one index lookup
WAIT_MAX_SECONDS = 60               # proxies cut connections that are idle for longer
TTL_SECONDS = 7 * 86400             # a notification of last week is of no use
YEAR_SECONDS = 366 * 86400          # the longest delay and the longest ttl
EVERY_RANGE_SECONDS = (10, YEAR_SECONDS)     # a job that runs more often should be one worker with a loop
CRON_DAYS = 41 * 366                # February 29th falls on each weekday at least once in 40 years
CLOCK_BACK_SECONDS = 3 * 3600       # a clock set back by less repeats no run of a schedule; cron(8) of Vixie has this limit
RETENTION_SECONDS = 7 * 86400       # how long ended intents are kept
BACKOFF_MAX_SECONDS = 3600          # a failing intent is retried at least once an hour
BACKOFF_JITTER_SECONDS = 2          # spreads out retries
ERROR_CHARACTERS = 2000             # the end of a stack trace, and short enough for a list
ATTEMPTS_KEPT = 20                  # of an intent, in its history: as many as max_attempts can be
SHORT_ID_DIGITS = 8                 # the fewest that stand for an id: all ids made within 65 s share them
SHOWN_ID_DIGITS = 16                # of an id in a list: the ids of one bus differ in these
BULK_INTENTS = 1000                 # of one request: other requests wait for its commit
IDEMPOTENCY_SECONDS = 86400         # publishers retry within a day
PROGRESS_SECONDS = 1                # between two reports of progress of an intent: people read no faster
PROGRESS_CHARACTERS = 200           # of the words for it: one line
LIVE_BYTES = 2 ** 16                # the end of a handler's live output, kept in memory
LIVE_CHARACTERS = 2 ** 15           # of it in one request: with six bytes each, as JSON, it is within BODY_BYTES
LIVE_TOTAL_BYTES = 2 ** 24          # of all intents; the key with most loses its oldest first
LIVE_SECONDS = 3600                 # how long that is kept after the attempt
LIVE_READERS = 10_000               # intents whose live output is being read
STEP_BYTES = 2 ** 16                # of the output of a durable step: a file's name, not its content
STEPS_BYTES = 2 ** 20               # of all steps of an intent
STEPS = 1000                        # of an intent
READER_SECONDS = 10                 # a reader that is silent for longer is gone; a worker without one reports this seldom
VALUE_TTL_SECONDS = 600             # default of the key-value store, as in the 1.x protocol
VALUE_KEY_CHARACTERS = 512          # fits an index of any database
FOREVER = 2.0 ** 60                 # Unix seconds beyond every clock

# Keys
SIGNATURE_SECONDS = 300             # maximum clock skew; nonces are kept that long
NONCE_CHARACTERS = 128              # a longer nonce is stored as its hash
TIMESTAMP_SECONDS = 0.001           # clients may round their timestamps to this
READ_NONCES = 10_000                # nonces of one key's signed GETs, kept in memory: at most 4 MB
RATE_PER_MINUTE = 600               # requests of an issued key; a worker that polls twice a second needs 120
UNFINISHED = 2000                   # intents of an issued key; a higher count means that workers are missing
STORED_BYTES = 256 * 2 ** 20        # of an issued key's intents and of its owner's values, ended ones included
ROW_BYTES = 1000                    # counted for each intent or value, besides payload, result or value
KEY_NAMESPACES = 100                # with intents of an issued key: the summary counts each
KEY_VALUES = 10_000                 # of an issued key's owner
KEY_SCHEDULES = 100                 # of an issued key, with a payload each
KEY_WORKERS = 100                   # names of an issued key's workers
KEY_LANES = 4000                    # that all these workers together ask for: four for a goal, or two without a worker id
KEY_HELD = 1000                     # held requests of an issued key, each with a connection
KEY_HELD_LANES = 8000               # of these together: 1 KB each
LANES_PER_TOKEN = 8                 # a claim of more lanes takes more tokens of the rate: 20 us for each lane
FREE_CLAIM_SECONDS = 1              # a worker's empty claim is free of charge this often
FAILURES_PER_MINUTE = 30            # wrong keys from one address before its answers are delayed
FAILURE_SECONDS = 1                 # the delay: slows down guessing, hardly hurts after a typing error
INVITATION_SECONDS = 600            # time to read a code aloud and type it
INVITATION_TRIES = 5                # wrong codes per invitation; there are 32 ** 4
USAGE_SECONDS = 10                  # between two writes of the keys' request counts
KEY_GOALS = 64                      # of a limited key: a claim without a goal asks for all of them

# Activity and housekeeping
EVENTS = 1000                       # events kept in memory for watchers
WORKERS = 10_000                    # workers kept in memory, each with its name and lanes
WORKER_SECONDS = 300                # a worker unseen for this long is no longer listed, unless it holds a lease
GONE_WORKERS = 100                  # silent workers that stay listed as gone, for GONE_SECONDS
GONE_SECONDS = 86400                # a worker that is not missed after a day was stopped on purpose
WORKER_LANES = 512                  # lanes of one worker: twice as many as the largest claim has
GOAL_SECONDS = 366 * 86400          # how long the bus remembers that a goal has had a worker
KNOWN_GOALS = 1000                  # such goals of an owner, the latest
EVENTS_PAGE = 250                   # events of one answer: at most 2 MB
HISTORY_MINUTES = 1440              # of the dashboard's chart: at most three rows a minute
WAITING_LANES = 200                 # lanes the summary looks at for the longest waiting intents: 20 us each
WAITING_ROWS = 20_000               # waiting intents that the summary counts by goal, about 1 ms
RUNNING_ROWS = 2000                 # claimed intents that it counts by goal, about 3 ms
FIGURE_MINUTES = 10                 # the step of the history by goal
FIGURE_GOALS = 200                  # goals in a summary, and in one step of it: an owner leaves half of the room to others
FIGURE_SECONDS = 10                 # how long the summary reuses the figures it has read: 5 ms for ten busy goals
STEPS_PER_DOUBLING = 4              # of durations in it: a percentile is right to 9 %
PREVIEW_CHARACTERS = 500            # of a payload in a list
RECHECK_SECONDS = 1                 # between two rounds of housekeeping; another program's writes show this soon
CLEAN_SECONDS = 10                  # between two searches for rows past their retention
CLOCK_JUMP_SECONDS = 2              # NTP slews smaller differences; a larger one means that the clock was set
CLOCK_RECORD_SECONDS = 60           # between two writes of the time: a crash loses this much of it

# Database
LOCK_CHECK_SECONDS = 0.02           # between two tries while another program holds the file
LOCK_SECONDS = 30                   # how long requests wait while another program holds the file, for a backup say
DUE_ROWS = 500                      # due transitions applied in one round, about 10 ms
SLICE_ROWS = 200                    # rows a long operation looks at in one step, about 5 ms
HEALTH_SECONDS = 0.5                # how long /health waits for its round; monitors wait for a second or more
STALL_SECONDS = 3                   # a bus that did nothing for so long was away: workers could not reach it
STALLED_SECONDS = 10                # a commit that takes longer means that the disk hangs: /health says so
LIST_ROWS = 10_000                  # rows looked at for one page of a list: about 20 ms
PAGE_BYTES = 4 * 2 ** 20            # payloads in one page of a list
SEARCH_ROWS = 10                    # intents that a search looks at in one step: payloads of 2.5 MB, in 5 ms
SEARCH_BYTES = 64 * 2 ** 20         # payloads that one search looks through, in 0.2 s
WAL_BYTES = 8 * 2 ** 20             # a longer log is truncated; README promises twice this
FREE_BYTES = 50 * 2 ** 20           # below this, the doctor says that the database's disk is nearly full

# Server
ROUND_REQUESTS = 64                 # of one round, so that one commit serves many requests
ROUND_SECONDS = 0.005               # longest round: the next requests wait that long
SLICE_SECONDS = 0.001               # of a long operation in Python; other requests are answered in between
SLOW_COMMIT_SECONDS = 0.002         # after a slower commit, the next ones run in a thread, while the loop answers reads
SLOW_COMMIT_TIMES = 100             # how long they do, in durations of the slow commit
GATHERING_TIMES = 0.05              # how long the next round waits, likewise: clients that got their answer can join it
BODY_BYTES = 256 * 1024             # an intent says what to do; large data belongs elsewhere
JSON_DEPTH = 64                     # the parser takes stack for each level
HEAD_LINE_BYTES = 8192              # RFC 9112, section 3: recommended at least 8000
HEAD_BYTES = 65536                  # of all header lines together
HEAD_LINES = 100                    # browsers behind proxies send about 30
QUERY_PARAMETERS = 100              # of one request: a claim may name 64 goals
CHUNKS = 10_000                     # of a chunked body: each takes a microsecond
CACHED_QUERIES = 256                # validated queries that are remembered, for each endpoint
CACHED_HEADS = 1000                 # parsed header blocks that are remembered, of at most CACHED_HEAD_BYTES each
CACHED_HEAD_BYTES = 1024            # clients of ours send 200
INPUT_BYTES = 65536                 # taken in ahead while a request of the connection is being answered
UNPROVEN_BYTES = 16 * 2 ** 20       # of heads and bodies whose key is not checked yet; the oldest connection is closed
BODIES_BYTES = 64 * 2 ** 20         # of heads and bodies whose key is checked; then 503
SMALL_BYTES = 4096                  # a whole body up to this does not count: 16,384 of them are 64 MiB
KEY_BODIES_BYTES = 16 * 2 ** 20     # of these, of one issued key
UNREAD_BYTES = 64 * 2 ** 20         # of answers that clients have not read; the slowest reader is closed
KEY_UNREAD_BYTES = 8 * 2 ** 20      # of these, of one key, or of one address without a key: a page of a list and more
HEAD_SECONDS = 10                   # time to send a head
BODY_SECONDS = 30                   # time to send a body: 256 KiB over a poor mobile link
IDLE_SECONDS = 75                   # longer than the 60 s that proxies keep an idle connection
SEND_SECONDS = 30                   # time to read an answer
LINGER_SECONDS = 1                  # time for a refused client to read why
HANDSHAKES = 4                      # TLS handshakes of one round: one with RSA-2048 takes 1.3 ms
SHUTDOWN_SECONDS = 4                # for running requests; service managers kill after 5 s or more
EXIT_SECONDS = 4.8                  # for all of the shutdown
CONNECTIONS = 16_384 if os.name == "posix" else 500     # a waiting worker takes 2 KB; Windows's select() takes 512 sockets
CONNECTIONS_MIN = 32                # a few workers, a publisher and a browser, which opens six; fewer would refuse most clients
SPARE_FILES = 64                    # descriptors left to the database and other files
ACCEPT_PAUSE_SECONDS = 0.1          # before accepting again when there are no descriptors left
BACKLOG = 1024                      # 5, the default, stalls at 40 clients
STACK_BYTES = 256 * 1024            # of a thread; the default of 8 MiB is too much for a 32-bit phone
CERTIFICATE_SECONDS = 10            # between two looks at the files of the certificate; a change is loaded at the look after it

# Client, worker and doctor
URL = "http://127.0.0.1:8787"
KEY_FILE = "~/.apikey"
FOLDER = "~/.intentbus"             # of the files of a machine
CONFIG_FILE = f"{FOLDER}/config.json"
SPOOL_FILE = f"{FOLDER}/spool.db"
LIBRARY_FILE = "~/.local/lib/intentbus/intentbus.py"     # the copy of this file that the launcher of install starts
SPOOL_CHECK_SECONDS = 0.02          # between two looks whether another process still sends the spool
SPOOL_LOCK_SECONDS = 30             # how long a process waits for another that writes to the spool
POSIX = os.name == "posix"          # or Windows
CLIENT_SECONDS = 30                 # a request without its whole answer by then has failed
ANSWER_BYTES = 64 * 2 ** 20         # of one answer; a page of 500 intents with the largest payloads would be 128 MiB
KEPT_SECONDS = 60                   # an idle connection is not used after that: a bus closes it after 75 s, mobile carriers before
RETRIES = 4                         # about 10 s in all: a bus that restarts is back by then
RETRY_SECONDS = 0.5                 # doubled each time, with full jitter
RETRY_MAX_SECONDS = 8               # longest pause between two tries
CLAIM_WAIT_SECONDS = 20             # below the idle limit of mobile carriers' NAT
LEASE_CHECK_SECONDS = 1             # a worker whose phone slept notices a lost lease this soon
POLL_SECONDS = 5                    # between two claims at a server that does not hold them
PUBLISH_WAIT_SECONDS = 300          # default of publish --wait
SWEEP_SECONDS = 3600                # for the bus to delete or cancel intents: a million take some minutes
STREAM_SECONDS = 1                  # how long publish --lines collects lines before it sends them
READ_AHEAD_LINES = 100              # of stdin, at most 25 MB
JOBS = 256                          # of one worker; each is a thread and a program
SHOWING_SECONDS = 1                 # how soon, and then how often, long work shows its progress on a terminal
COLUMN_WIDTH = 10                   # of a table's column that gives way; narrower ones are left out
DOCTOR_SECONDS = 10                 # for the bus to answer a doctor
COMPLETION_SECONDS = 1              # for the bus to answer a shell, whose user has pressed Tab
COMPLETION_INTENTS = 200            # the newest, whose goals and ids a shell completes
KEY_ENDS_SECONDS = 7 * 86400        # a doctor warns that long before a key ends: time to bring a new one to a machine
LIMIT_WAIT_SECONDS = 3600           # a doctor warns of intents that wait for longer because their goal is at its limit
TERMUX_SECONDS = 10                 # for Termux:API to answer; without its app it never does
HANDLER_SECONDS = 300               # a handler that runs for longer has hung
KILL_AFTER_SECONDS = 5              # between TERM and KILL
WATCH_SECONDS = 0.1                 # how soon a lost lease or a timeout ends a handler
PIPE_SECONDS = 1                    # how long to read output once the handler has ended
OUTPUT_BYTES = 127 * 1024           # of stdout, as the result; escaped at twice the size it fits the body limit
STDERR_BYTES = 2000                 # of stderr, as the error: its end
STDERR_WAITING_BYTES = 2 ** 20      # of stderr that waits for the reader of ours; more is left out
STDERR_LINE_BYTES = 8192            # with several handlers, a longer line is passed on before it ends
ENVIRONMENT_BYTES = 64 * 1024       # of one variable; Linux allows twice that


# ---- 2. Errors ----
# A class carries status and code; str(error) is one sentence. The client raises the class that the server raised.

class Error(Exception):
    """The base of all errors.

    `status` is the HTTP status, `code` a word for programs; `headers` and `details` go into the response, which is sent
    after delay_seconds.
    """

    status, code = 500, "internal_error"
    delay_seconds = 0

    def __init__(self, message: str = "Something went wrong inside the bus; its log has the details.", code: str | None = None,
                 headers: Iterable[tuple[str, str]] = (), **details: Any) -> None:
        super().__init__(message)
        self.code = code or self.code
        self.headers, self.details = headers, details


class Invalid(Error):             status, code = 400, "invalid_request"          # a value out of its limits
class Unauthorized(Error):        status, code = 401, "unauthorized"             # no key, or an unknown one
class Forbidden(Error):           status, code = 403, "forbidden"                # a known key that may not do this
class NotFound(Error):            status, code = 404, "not_found"                # unknown, or another owner's; a lost lease
class MethodNotAllowed(Error):    status, code = 405, "method_not_allowed"       # the path takes other methods
class RequestTimeout(Error):      status, code = 408, "timeout"                  # the request arrived too slowly
class Conflict(Error):            status, code = 409, "conflict"                 # the wrong state for this
class LengthRequired(Error):      status, code = 411, "length_required"          # an HTTP/1.0 body without a length
class PayloadTooLarge(Error):     status, code = 413, "payload_too_large"        # a body over the limit
class IdempotencyConflict(Error): status, code = 422, "idempotency_conflict"     # one key for two different requests
class RateLimited(Error):         status, code = 429, "rate_limited"             # too many requests or intents
class HeadersTooLarge(Error):     status, code = 431, "headers_too_large"        # a header line too long, or too many
class Unavailable(Error):         status, code = 503, "database_busy"            # the same request may succeed later
class StorageFull(Error):         status, code = 507, "storage_full"             # the disk of the database is full
class Unreachable(Error):         status, code = 0, "unreachable"                # raised by the client: no answer of a bus
class SetupError(Error):          status, code = 0, "setup"                      # this machine's setup; the sentence has the cure
class OlderBus(SetupError):       status, code = 0, "older_bus"                  # raised by the client: the bus is too old for this


TRANSIENT = (RequestTimeout, RateLimited, Unavailable, StorageFull, Unreachable)     # the same request may succeed later
ERRORS = {kind.status: kind for kind in Error.__subclasses__() if kind.status}


# ---- 3. Intent ----
# The record and its transitions. A transition is a pure function of the intent and the time; it returns a Change, which
# names the event and holds the columns to set.

COLUMNS = (
    "id", "namespace", "goal", "payload", "owner", "publisher", "visibility", "priority", "ttl", "max_attempts",
    "backoff_base", "target_worker", "required_capability", "created_at", "status", "run_at", "expires_at",
    "completed_at", "last_error", "result", "result_type", "claim_attempts", "claim_token_hash", "claim_expires_at", "lease",
    "claim_owner", "claim_key", "claim_outcome", "worker_id", "worker", "claimed_at", "idempotency_key", "size", "result_size",
    "place", "lane", "ready", "due_at", "history", "unique_value", "on_success", "on_failure", "caused_by", "schedule", "limited",
    "stream", "steps",
)
PUBLISH_DEFAULTS = dict(
    namespace="default", visibility="private", priority=100, delay=0, run_at=None, ttl=TTL_SECONDS, max_attempts=3,
    backoff_base=5, target_worker=None, required_capability=None, unique=None, replace=False,
    on_success=None, on_failure=None, stream=False,
)
LATER_FIELDS = ("unique", "replace", "on_success", "on_failure", "stream")     # no stored digest of an earlier version has these
STATUS_FIELDS = (
    "id", "namespace", "goal", "status", "priority", "visibility", "claim_attempts", "max_attempts", "run_at",
    "claim_expires_at", "target_worker", "required_capability", "created_at", "completed_at", "last_error", "claimed_at",
    "worker", "schedule",
)
NAMING_FIELDS = ("id", "namespace", "goal")
CLAIM_FIELDS = (
    "claim_attempts", "max_attempts", "priority", "target_worker", "required_capability", "claim_expires_at", "created_at",
)
UNCLAIMED = dict.fromkeys(("completed_at", "last_error", "result", "result_type", "claim_token_hash", "claim_expires_at",
                           "lease", "claim_owner", "claim_key", "claim_outcome", "worker_id", "worker", "claimed_at",
                           "idempotency_key", "history", "caused_by", "schedule", "limited", "steps"))
UNPUBLISHED = {**UNCLAIMED, **PUBLISH_DEFAULTS}

# event: a word for people, or None; callback: the field with the goal of the intent that this end publishes, or None;
# detail: more words for the event, or None
Change = collections.namedtuple("Change", "event columns callback detail", defaults=(None, None))

to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode     # compact text
SHORT_ID = f"[0-9a-f]{{{SHORT_ID_DIGITS},31}}"     # the first digits of an id


class Ids:
    """Makes the ids of a bus: 32 hex digits that always grow, and differ in the first 16.

    These are 48 bits of milliseconds and 16 bits of a counter, as one number that never goes back; 64 random bits follow.
    """

    def __init__(self, newest=None):
        """Continue after the newest id that is stored."""
        self._last = int(newest[:16], 16) if newest else 0
        self._lock = threading.Lock()     # threads of a shared database make ids at the same time

    def new(self, now):
        """Return the next id, at a time in Unix seconds."""
        with self._lock:
            self._last = number = max(self._last + 1, int(now * 1000) << 16)
        return f"{number:016x}{os.urandom(8).hex()}"


def no_such(intent_id):
    """Return the error for an id that does not exist, or that the caller may not see."""
    return NotFound(f"There is no intent {intent_id}.")


# A lane is the queue of intents that the same workers may claim, written as one key, such as "default\tann\t\t\tresize\tann":
# namespace, audience (the owner of private intents, else empty), target worker, capability, goal and publisher. The first
# four are its place. An empty goal or publisher stands for any: "default\tann\t\t\tresize\t" covers that lane, and
# all lanes it covers lie in the range from this key itself to before "default\tann\t\t\tresize\n". A lane without a goal
# covers its place, or the intents there of one publisher.

def place_of(namespace, audience, target_worker, required_capability):
    """Return the place of lanes; no part can hold a tab."""
    return f"{namespace}\t{audience}\t{target_worker or ''}\t{required_capability or ''}"


def covering_lanes(lane):
    """Return the lanes that cover a lane: itself, its goal by any publisher, any goal by its publisher, any."""
    place, goal, publisher = lane.rsplit("\t", 2)
    return lane, f"{place}\t{goal}\t", f"{place}\t\t{publisher}", f"{place}\t\t"


def lane_end(lane):
    """Return the end of a lane's key range: a key after it, and before every other lane that sorts after it."""
    return lane + "\1"


def lane_range(lane):
    """Return (start, end) of the keys among which are all lanes that a lane covers."""
    place, goal, publisher = lane.rsplit("\t", 2)
    if not goal:
        return range_under(place)
    return (lane, lane_end(lane)) if publisher else range_under(f"{place}\t{goal}")


def range_under(start):
    """Return (start, end) of the keys that go on, after a tab, where this one ends: of a namespace, a place or a goal in it."""
    return start + "\t", start + "\n"     # the character after "\t"


def bytes_of(text):
    """Return the length of a text in UTF-8; 0 for None."""
    return len(text.encode()) if text else 0


UTF_16 = rb"\xff\xfe|\xfe\xff|[^\0]\0(?:[^\0]\0|\Z)|\0[^\0](?:\0[^\0]|\Z)"


def without_mark(data):
    """Return text in bytes without a UTF-8 byte order mark; raises Invalid for UTF-16, with a mark or recognized by its NULs."""
    if re.match(UTF_16, data, re.DOTALL):
        raise Invalid("This text is UTF-16; save it as UTF-8 (in PowerShell: Out-File -Encoding utf8).", code="invalid_json")
    return data[3:] if data.startswith(codecs.BOM_UTF8) else data


class Record(dict[str, "Any"]):
    """A dict whose keys read as attributes too: record["id"] is record.id."""

    __slots__ = ()

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"there is no {key} in this {type(self).__name__}") from None

    def pick(self, keys: Iterable[str]) -> Record:
        """Return a record of these keys only."""
        return Record({key: self[key] for key in keys})


class Intent(Record):
    """One unit of work, as it is stored.

    Times are Unix seconds. `due_at` is when time itself changes it next, by advance(); None once it has ended. `ready` is
    1 while it can be claimed.
    """

    __slots__ = ()

    @classmethod
    def new(cls, intent_id, now, owner, publisher, fields):
        """Return an intent as published now, with goal, payload and any of PUBLISH_DEFAULTS in fields."""
        intent = cls(UNPUBLISHED, **fields)
        delay, run_at = intent.pop("delay"), intent.run_at
        intent["unique_value"] = intent.pop("unique")     # a column cannot have the name of a word of SQL
        intent["stream"] = 1 if intent.stream else None
        del intent["replace"]
        run_at = now + delay if run_at is None else run_at
        expires_at = max(run_at, now) + intent.ttl
        ready = run_at <= now
        audience = owner if intent.visibility == "private" else ""
        place = place_of(intent.namespace, audience, intent.target_worker, intent.required_capability)
        payload = to_json(intent.payload)
        intent.update(
            id=intent_id, payload=payload, size=ROW_BYTES + bytes_of(payload), result_size=0, owner=owner,
            publisher=publisher, created_at=now, status="open", run_at=run_at, expires_at=expires_at, claim_attempts=0, place=place,
            lane=f"{place}\t{intent.goal}\t{owner}", ready=int(ready), due_at=expires_at if ready else run_at)
        return intent

    @property
    def ended(self):
        """Whether it is fulfilled or dead."""
        return self.status in ("fulfilled", "dead")

    @property
    def attempts(self):
        """Its last ATTEMPTS_KEPT attempts that did not succeed, the oldest first: a list for JSON."""
        return json.loads(self.history or "[]")

    def at(self, now):
        """Return the intent as it is at a time, after the transition that is due by then, if any."""
        if self.due_at is None or now < self.due_at:
            return self
        return Intent(self, **self.advance(now).columns)

    def advance(self, now):
        """Its time has come: it expires, its lease is lost, or its delay is over."""
        if self.expires_at <= now:
            return self._dead(now, "expired", **self._attempt(now, "lost", "expired"))
        return self.lost(now) if self.status == "claimed" else self._open(None, now, self.run_at)

    def lost(self, now):
        """Its lease has ended without a report: open again, or dead if no attempt is left."""
        attempt = self._attempt(now, "lost")
        if self.claim_attempts >= self.max_attempts:
            return self._dead(now, f"The lease was lost on attempt {self.claim_attempts} of {self.max_attempts}.", **attempt)
        return self._open("lost", now, self.run_at, **attempt)

    def claimed(self, now, token_hash, lease, owner, key_id, worker_id, worker, until=FOREVER):
        """A worker, known by its id and a name, takes it for `lease` seconds, until its key ends; a repeated claim is no new attempt."""
        new, end = self.status != "claimed", min(now + lease, until)
        return Change("claimed" if new else None, dict(
            status="claimed", ready=0, claim_attempts=self.claim_attempts + new, claim_token_hash=token_hash, claim_owner=owner,
            claim_key=key_id, worker_id=worker_id, worker=worker, claimed_at=now if new else self.claimed_at, claim_outcome=None,
            claim_expires_at=end, lease=lease, due_at=min(end, self.expires_at), **{"limited": 1} if self.limited else {}))

    def extended(self, now, seconds, until=FOREVER):
        """Its lease ends that many seconds from now, or with the worker's key, at `until`."""
        end = min(now + seconds, until)
        return Change(None, dict(claim_expires_at=end, lease=seconds, due_at=min(end, self.expires_at)))

    def spared(self, now):
        """Its lease ran out while the bus was away: its worker may still extend it, or report."""
        end = now + min(self.lease or LEASE_SECONDS, GRACE_SECONDS)
        return Change(None, dict(claim_expires_at=end, due_at=min(end, self.expires_at)))

    def fulfilled(self, now, result, result_type, key_id):
        """The work is done; the result counts for the key that reports it."""
        text = result if result_type == "text" else to_json(result)
        late = self.status != "claimed" and self.history     # which has its attempt as lost
        return Change("fulfilled", dict(
            self._with_history(self.attempts[:-1]) if late else {}, status="fulfilled", ready=0, completed_at=now,
            claim_expires_at=None, due_at=None, claim_outcome="fulfilled", result=text, result_type=result_type,
            result_size=bytes_of(text), claim_key=key_id), "on_success")

    def failed(self, now, error, retry, jitter):
        """The attempt failed: open again after a backoff, or dead if no attempt is left or retry is false."""
        attempt = dict(self._attempt(now, "failed", error), claim_outcome="failed")
        if not retry or self.status == "dead" or self.claim_attempts >= self.max_attempts:
            return self._dead(now, error, **attempt)
        backoff = min(self.backoff_base * 2 ** self.claim_attempts + jitter, BACKOFF_MAX_SECONDS)
        return self._open("failed", now, now + backoff, last_error=error, **attempt)

    def released(self, now, delay):
        """Its worker hands it back; the attempt does not count."""
        return self._open("released", now, now + delay if delay else self.run_at, claim_outcome="released",
                          claim_attempts=max(self.claim_attempts - 1, 0), completed_at=None, **self._attempt(now, "released"))

    def cancelled(self, now):
        """It is no longer wanted; its worker, if any, loses the lease."""
        return self._dead(now, "Cancelled", None, claim_token_hash=None, **self._attempt(now, "lost", "Cancelled"))

    def retried(self, now, **columns):
        """A dead letter starts again, with all its attempts, and these columns."""
        return self._open("retried", now, now, claim_attempts=0, last_error=None, result=None, result_type=None,
                          result_size=0, completed_at=None, claim_token_hash=None, expires_at=now + self.ttl, **columns)

    def stepped(self, name, size, seconds):
        """A step of its handler is done, whose output takes that many bytes."""
        took = "" if seconds is None else f", {seconds:.1f} s"
        return Change("step", dict(status=self.status, steps=(self.steps or 0) + 1, size=self.size + size), detail=name + took)

    def replaced(self, by):
        """It waits, and a new intent takes its place: only the id stays."""
        return Change("replaced", {column: by[column] for column in COLUMNS if column != "id"})

    def superseded(self, now, by, **columns):
        """A newer intent of its unique value waits, so it ends where it would wait, with these columns."""
        return self._dead(now, f"Superseded by {by}", None, **columns)

    def _open(self, event, now, run_at, **columns):
        """It can be claimed from run_at on; or it is dead, if that is after its expiry."""
        expires_at = columns.get("expires_at", self.expires_at)
        if expires_at <= now:
            return self._dead(now, "expired", **columns)
        ready = run_at <= now
        return Change(event, dict(
            columns, status="open", ready=int(ready), run_at=run_at, claim_expires_at=None,
            due_at=expires_at if ready else min(run_at, expires_at)))

    def _dead(self, now, reason, callback="on_failure", **columns):
        """It is a dead letter, or stays one."""
        event, callback = ("dead", callback) if self.status != "dead" else (None, None)
        return Change(event, dict(columns, status="dead", ready=0, completed_at=now, last_error=reason, claim_expires_at=None,
                                  due_at=None), callback)

    def _attempt(self, now, outcome, error=None):
        """Return the columns to set once its attempt has not succeeded; a late report takes the place of a lost lease."""
        claimed = self.status == "claimed"
        if outcome == "lost" and not claimed:     # it had no lease
            return {}
        ended = dict(attempt=self.claim_attempts, worker=self.worker, claimed_at=self.claimed_at,
                     ended_at=min(now, self.due_at) if claimed else now, outcome=outcome, error=error)
        return self._with_history([*(self.attempts if claimed else self.attempts[:-1]), ended])

    def _with_history(self, attempts):
        """Return the columns to set for a history of these attempts, which counts in its size."""
        history = to_json(attempts[-ATTEMPTS_KEPT:]) if attempts else None
        return dict(history=history, size=self.size + bytes_of(history) - bytes_of(self.history))


for attribute in COLUMNS:     # attributes as a Record has them, but ten times as fast
    setattr(Intent, attribute, property(operator.itemgetter(attribute)))


# ---- 4. Schedule ----
# When a schedule runs: pure functions of its row and a time. Cron expressions are as in crontab(5) of Vixie cron.

CRON_FIELDS = (     # name, lowest and highest number, names of the numbers from the lowest on
    ("minute", 0, 59, ""), ("hour", 0, 23, ""), ("day of month", 1, 31, ""),
    ("month", 1, 12, "jan feb mar apr may jun jul aug sep oct nov dec"), ("day of week", 0, 7, "sun mon tue wed thu fri sat"),
)
CRON_NICKNAMES = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
                  "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}
MONTH_DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
Cron = collections.namedtuple("Cron", "minutes hours days months weekdays either follows")     # see read_cron()


def cron_numbers(text, name, low, high, words):
    """Return the numbers that a field of a cron expression means; raises ValueError."""
    names, numbers = {word: str(number) for number, word in enumerate(words.split(), low)}, set()
    for part in text.lower().split(","):
        found = re.fullmatch(r"(?:\*|(\w+)-(\w+))(?:/(\d{1,2}))?|(\w+)", part, re.ASCII)
        first, last, step, only = found.groups() if found else (None, None, None, "?")
        start, end = (names.get(word, word) for word in (only or first or str(low), only or last or str(high)))
        if not (start.isdigit() and end.isdigit() and low <= int(start) <= int(end) <= high and 1 <= int(step or 1) <= high + 1 - low):
            raise ValueError(f"has a wrong {name} {part[:32]!r}: it takes {', '.join([*names, ''])}numbers from {low} to {high}, "
                             f"ranges that go up (1-5), steps of all or of a range (*/5, 1-{high}/5), and lists of these (1,3)")
        numbers.update(range(int(start), int(end) + 1, int(step or 1)))
    return numbers


@functools.lru_cache(maxsize=CACHED_QUERIES)
def read_cron(expression):
    """Return the Cron that an expression means; raises ValueError with the rest of a sentence that begins with "cron".

    either tells whether one matching day field is enough, follows whether runs follow the clock when that changes.
    """
    texts = CRON_NICKNAMES.get(expression.strip().lower(), expression).split()
    if len(texts) != len(CRON_FIELDS) or len(expression) > 256:
        raise ValueError(f"must have five fields, {', '.join(name for name, *_ in CRON_FIELDS)}, or be @hourly, @daily, @weekly, "
                         f"@monthly or @yearly; not {expression[:64]!r}")
    minutes, hours, days, months, weekdays = (cron_numbers(text, *field) for text, field in zip(texts, CRON_FIELDS))
    either = not (texts[2].startswith("*") or texts[4].startswith("*"))
    if not either and min(days) > max(MONTH_DAYS[month - 1] for month in months):
        raise ValueError(f"has a wrong day of month {texts[2]!r}: it never comes in month {texts[3]}")
    return Cron(sorted(minutes), sorted(hours), days, months, {day % 7 for day in weekdays}, either,
                texts[0].startswith("*") or texts[1].startswith("*"))


@functools.lru_cache(maxsize=CACHED_QUERIES)
def clock_of(zone):
    """Return a function of a time: how far the clocks of a zone, or for None of the C library, are ahead of UTC; raises ValueError."""
    if zone in (None, "UTC"):
        return (lambda at: 0) if zone else lambda at: time.localtime(at).tm_gmtoff
    import datetime
    import zoneinfo
    try:
        known = zoneinfo.ZoneInfo(zone)
    except (KeyError, ValueError, OSError) as error:     # the last two for a path
        raise ValueError("must be UTC or a time zone that the machine of the bus knows, such as Europe/Berlin; if it knows none: "
                         "pip install tzdata") from error
    return lambda at: datetime.datetime.fromtimestamp(at, known).utcoffset().total_seconds()


def times_on(day, cron, ahead):
    """Return the times of the runs on a day of Unix time, in order; ahead is a function that clock_of() returns."""
    date = time.gmtime(day * 86400)
    by_month, by_week = date.tm_mday in cron.days, (date.tm_wday + 1) % 7 in cron.weekdays
    if date.tm_mon not in cron.months or not (by_month or by_week if cron.either else by_month and by_week):
        return ()
    shown = (day * 86400 + 3600 * hour + 60 * minute for hour in cron.hours for minute in cron.minutes)
    before, change = (day - 1) * 86400, (day + 2) * 86400
    offsets = ahead(before), ahead(change)
    if offsets[0] == offsets[1]:
        return (wall - offsets[0] for wall in shown)
    while change - before > 1:     # the second at which the clocks change, by bisection
        middle = (before + change) // 2
        before, change = (middle, change) if ahead(middle) == offsets[0] else (before, middle)
    found = set()
    for wall in shown:
        times = sorted(wall - offset for offset in offsets if ahead(wall - offset) == offset)     # none, one or two
        found.update(times if cron.follows else times[:1] or [change])
    return sorted(found)


def next_time(expression, zone, after):
    """Return the first time after another, in Unix seconds, at which a cron expression runs by the clocks of a zone.

    A run whose time clocks skip comes right after, one whose time they repeat comes once; unless minute or hour starts with *.
    """
    cron, ahead = read_cron(expression), clock_of(zone)
    today = int((after + ahead(after)) // 86400)
    return next(at for day in range(today, today + CRON_DAYS) for at in times_on(day, cron, ahead) if at > after)


def moment(at, zone=None):
    """Format Unix seconds as clocks of a time zone, or of this machine, show them; None as None."""
    return at and time.strftime("%a %Y-%m-%d %H:%M:%S", time.gmtime(at + clock_of(zone)(at)))


def next_run(schedule, after):
    """Return when a schedule runs next after a time; raises Invalid if it has not one of both ways to say so."""
    if (schedule.every is None) == (schedule.cron is None) or schedule.every and schedule.timezone:
        raise Invalid("A schedule needs either every, in seconds, or cron, which may have a timezone.", code="invalid_every")
    if schedule.cron:
        return next_time(schedule.cron, schedule.timezone, after)
    number = max(1, (after - schedule.made_at) // schedule.every)     # of the run, or one or two too low
    return next(at for at in (schedule.made_at + schedule.every * (number + more) for more in range(3)) if at > after)


# ---- 5. Database ----
# The SQLite file. One connection writes, and its transaction is that of a round; another one reads committed state.
# A database server takes the place of this class with the same public methods: see examples/postgres_bus.py.

# the n-th script leads to version n of the schema; a released one never changes
MIGRATIONS = ("""
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
        -- derived, for the indexes
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
    CREATE TABLE memos (     -- temporary rows: values of owners, answers to idempotency keys, nonces
        kind TEXT, owner TEXT, key TEXT, value TEXT NOT NULL, expires_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (kind, owner, key)
    );
    CREATE INDEX memos_expires ON memos (expires_at)
""", """
    CREATE INDEX intents_token ON intents (claim_token_hash) WHERE status = 'claimed';
    CREATE INDEX intents_dead ON intents (id) WHERE status = 'dead'
""", """
    CREATE TABLE history (     -- how often each event happened, by minutes of Unix time
        minute INTEGER, event TEXT, times INTEGER NOT NULL,
        PRIMARY KEY (minute, event)
    )
""", """
    ALTER TABLE intents RENAME COLUMN wake_at TO due_at;
    DROP INDEX intents_wake;
    CREATE INDEX intents_due ON intents (due_at) WHERE due_at IS NOT NULL;
    ALTER TABLE intents ADD COLUMN place TEXT NOT NULL DEFAULT '';     -- the lane without goal and publisher
    UPDATE intents
    SET    place = SUBSTR(lane, 1, LENGTH(lane) - LENGTH(goal) - LENGTH(owner) - 2);
    CREATE INDEX intents_place ON intents (place, priority DESC, run_at, claim_attempts, created_at, id) WHERE ready = 1;
    DELETE FROM memos WHERE kind = 'clock'     -- written in another form from now on
""", """
    ALTER TABLE intents ADD COLUMN claim_key TEXT;     -- the id of the key that claimed it, or fulfilled it
    ALTER TABLE intents ADD COLUMN size INTEGER NOT NULL DEFAULT 0;     -- counted bytes, 0 if it is older than this
    ALTER TABLE intents ADD COLUMN result_size INTEGER NOT NULL DEFAULT 0;     -- counted bytes, for claim_key
    ALTER TABLE intents ADD COLUMN lease DOUBLE PRECISION;     -- seconds, of the latest claim or extension
    ALTER TABLE intents ADD COLUMN worker TEXT;     -- the name of the worker that claimed it, for people to read
    ALTER TABLE intents ADD COLUMN claimed_at DOUBLE PRECISION;
    UPDATE intents SET worker = worker_id WHERE worker_id IS NOT NULL;
    ALTER TABLE intents ADD COLUMN idempotency_key TEXT;
    DROP INDEX intents_token;
    CREATE INDEX intents_token ON intents (claim_key, claim_token_hash) WHERE status = 'claimed';
    CREATE INDEX intents_public ON intents (place, owner, priority DESC, run_at, claim_attempts, created_at, id)
    WHERE ready = 1 AND visibility = 'public';
    ALTER TABLE tallies ADD COLUMN bytes INTEGER NOT NULL DEFAULT 0;
    CREATE INDEX tallies_publisher ON tallies (publisher);
    ALTER TABLE memos ADD COLUMN size INTEGER NOT NULL DEFAULT 0;     -- counted bytes of a value
    UPDATE memos SET size = LENGTH(value) + 1000 WHERE kind = 'store';
    INSERT INTO tallies (namespace, publisher, status, intents, bytes)
    SELECT   '', 'values of ' || owner, 'value', COUNT(*), SUM(size)
    FROM     memos
    WHERE    kind = 'store'
    GROUP BY owner;
    DELETE FROM memos WHERE kind = 'goal'     -- by owner from now on
""", """
    ALTER TABLE keys ADD COLUMN goals TEXT;     -- a JSON array of the only goals it may use
    ALTER TABLE keys ADD COLUMN payloads INTEGER NOT NULL DEFAULT 0;     -- whether a viewer sees payloads and results
    ALTER TABLE keys ADD COLUMN expires_at DOUBLE PRECISION;
    ALTER TABLE intents ADD COLUMN history TEXT;     -- JSON: the last attempts that did not succeed
    ALTER TABLE intents ADD COLUMN on_success TEXT;
    ALTER TABLE intents ADD COLUMN on_failure TEXT;
    ALTER TABLE intents ADD COLUMN caused_by TEXT;     -- the id of the intent whose end published it
    ALTER TABLE intents ADD COLUMN unique_value TEXT;
    CREATE UNIQUE INDEX intents_unique ON intents (owner, namespace, goal, unique_value)
    WHERE unique_value IS NOT NULL AND status = 'open';
    CREATE INDEX intents_unique_claimed ON intents (owner, namespace, goal, unique_value, created_at, id)
    WHERE unique_value IS NOT NULL AND status = 'claimed';
    ALTER TABLE intents ADD COLUMN schedule TEXT;     -- the name of the schedule that published it
    CREATE TABLE schedules (
        owner TEXT, name TEXT, publisher TEXT NOT NULL, goal TEXT NOT NULL,
        fields TEXT NOT NULL,     -- of its intents, besides goal and payload, as JSON
        every DOUBLE PRECISION, cron TEXT, timezone TEXT, overlap TEXT NOT NULL,
        made_at DOUBLE PRECISION NOT NULL, next_run_at DOUBLE PRECISION,     -- NULL while it is paused
        last_run_at DOUBLE PRECISION, last_id TEXT, payload TEXT NOT NULL,
        PRIMARY KEY (owner, name)
    );
    CREATE INDEX schedules_next ON schedules (next_run_at) WHERE next_run_at IS NOT NULL;
    CREATE TABLE limits (     -- how many intents of a goal may be claimed at once (NULL: any number), and whether it is paused
        namespace TEXT, goal TEXT, running INTEGER, paused INTEGER NOT NULL,
        PRIMARY KEY (namespace, goal)
    );
    ALTER TABLE intents ADD COLUMN limited INTEGER;     -- 1 once a limit of its goal counts its claims
    ALTER TABLE intents ADD COLUMN stream INTEGER;     -- 1 if the publisher wants the handler's output while it runs
    CREATE INDEX intents_limited ON intents (namespace, goal) WHERE limited = 1 AND status = 'claimed';
    CREATE TABLE goal_history (     -- events by goal, with durations as "waited" or "ran" and a step
        minute INTEGER, namespace TEXT, goal TEXT, event TEXT, times INTEGER NOT NULL,
        PRIMARY KEY (minute, namespace, goal, event)
    )
""", """
    ALTER TABLE intents ADD COLUMN steps INTEGER;     -- how many of its steps are done
    CREATE TABLE steps (
        intent TEXT, name TEXT, output TEXT NOT NULL, size INTEGER NOT NULL, attempt INTEGER NOT NULL,
        seconds DOUBLE PRECISION, done_at DOUBLE PRECISION NOT NULL,
        PRIMARY KEY (intent, name)
    )
""")
APPLICATION_ID = 0x1B05     # in the header of the file: it is a database of intentbus


def lock(file):
    """Lock an open file until this process ends; raises OSError while another process holds the lock."""
    if POSIX:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


def file_size(path):
    """Return the bytes of a file, 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


class Busy(Unavailable):
    """Another program is writing to the file."""


class RoundLost(Exception):
    """SQLite has ended the transaction of a round: nothing of it is stored, and nothing of it may be answered."""

    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Database:
    """The SQLite file of a bus.

    A block holds the statements of one verb of the Bus: enter(), statements, then leave() or undo(), which undoes only
    that block. In a round, from begin() to commit(), many blocks share one commit; a block outside a round is its own
    transaction. All errors of SQLite become Busy, Unavailable or StorageFull; an IntegrityError, a bug, stays as it is.
    """

    shared = False     # whether other buses use the database too
    clock = token_bucket = rounds = None     # a shared database has its own Clock, TokenBucket and Rounds

    def __init__(self, path="intentbus.db"):
        """Open or create the file; raises SetupError if it cannot be used."""
        import sqlite3
        self.path, self.warning = os.path.realpath(path), None     # a link to a file has no lock of its own
        self.in_round = self.new = False     # new: whether no bus has used this file before
        self._sqlite = sqlite3
        if sqlite3.sqlite_version_info < (3, 35):
            raise SetupError(f"intentbus needs SQLite 3.35 or newer; this Python has {sqlite3.sqlite_version}.")
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self._guard = self._lock_file()
            shared_memory = self._shared_memory()
            self._db = self._connect(exclusive=not shared_memory)
            self._prepare("WAL" if shared_memory else "DELETE")
            self._reader = self._connect(readonly=True)
            paths = [self.path + end for end in ("", "-shm", "-wal")]     # the last two exist only beside a write-ahead log
            self._files = [(path, os.stat(path)) for path in paths if os.path.exists(path)]
        except OSError as error:
            raise SetupError(f"The database {self.path} cannot be opened: {error.strerror}.") from error
        except sqlite3.Error as error:
            raise SetupError(f"The database {self.path} cannot be used: {error}.") from error
        self._truncate_above = WAL_BYTES
        self.commits_apart = shared_memory     # whether a commit in one thread does not block reads in another
        if shared_memory:     # from now on the loop waits, not SQLite
            self._db.execute("PRAGMA busy_timeout = 0")
            self._reader.execute("PRAGMA busy_timeout = 0")

    def close(self):
        """Write the log into the file, and unlock it."""
        self._reader.close()
        self._db.close()
        self._guard.close()

    def read(self, statement, values=()):
        """Yield the rows of a statement, from committed state only."""
        try:
            yield from self._reader.execute(statement, values)
        except self._sqlite.Error as error:
            raise self._translated(error) from error

    # -- Rounds and blocks --

    def begin(self, in_round=True):
        """Begin a round, or the transaction of a block outside one; raises Busy while another program writes."""
        self._require_files()
        self.execute("BEGIN IMMEDIATE")
        self.in_round = in_round

    def execute(self, statement, values=()):
        """Run a statement of the round."""
        try:
            return self._db.execute(statement, values)
        except self._sqlite.Error as error:
            raise self._translated(error) from error

    def commit(self):
        """Write a round, or a block outside one, to disk. If that fails, nothing of it is stored."""
        self.in_round = False
        try:
            self.execute("COMMIT")
        except Error:
            self.rollback()
            raise

    def rollback(self):
        """Undo a round, or a block outside one."""
        self.in_round = False
        if self._db.in_transaction:
            self.execute("ROLLBACK")

    def enter(self):
        """Begin a block, and return the connection for its statements."""
        if self.in_round:
            self.execute("SAVEPOINT block")
        else:
            self.begin(in_round=False)
        return self._db

    def leave(self, connection):
        """Keep the changes of a block; return whether they are committed, as they are outside a round."""
        if self.in_round:
            self.execute("RELEASE block")
            return False
        self.commit()
        return True

    def undo(self, connection, error):
        """Undo a block, and raise the error if it is one of SQLite.

        If SQLite has undone all of the round itself, as it does on a full disk, RoundLost is raised in its place.
        """
        translated = self._translated(error)
        if not self.in_round:
            self.rollback()
        elif connection.in_transaction:
            connection.execute("ROLLBACK TO block")
            connection.execute("RELEASE block")
        else:
            raise RoundLost(translated) from error
        if translated is not error:
            raise translated from error

    # -- The file --

    def sizes(self):
        """Return the bytes of the database and of its write-ahead log."""
        return file_size(self.path), file_size(self.path + "-wal")

    def changed_elsewhere(self):
        """Return whether another program has written to the file since the last call; raises Unavailable as begin() does."""
        self._require_files()
        version, = self.execute("PRAGMA data_version").fetchone()
        changed, self._version = version != self._version, version
        return changed

    def log_is_long(self):
        """Return whether the write-ahead log, as begin() found it, needs truncate_log(), since readers keep it from restarting."""
        return self._log_bytes > self._truncate_above

    def truncate_log(self):
        """Truncate the write-ahead log; waits up to a second for readers of the file."""
        until, blocked = time.monotonic() + RECHECK_SECONDS, True
        self._db.execute(f"PRAGMA busy_timeout = {1000 * LOCK_CHECK_SECONDS:.0f}")
        while blocked and time.monotonic() < until:     # many short tries: a long one waits for readers that came after it
            blocked, *_ = self.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._db.execute("PRAGMA busy_timeout = 0")
        self._truncate_above = self.sizes()[1] + WAL_BYTES // 2 if blocked else WAL_BYTES

    def _require_files(self):
        """Raise Unavailable if a path leads to another file by now: our writes would be lost with this process.

        SQLite still has a deleted log open, so its content is written into the database.
        """
        for path, ours in self._files:
            try:
                there = os.stat(path)
            except OSError:
                there = None
            if not there or not os.path.samestat(there, ours):
                if path.endswith("-wal"):
                    with contextlib.suppress(self._sqlite.Error):     # at the next try, or when the bus stops
                        self._db.execute("PRAGMA wal_checkpoint")
                cure = "put the right file there and restart the bus" if path == self.path else "restart the bus"
                raise Unavailable(f"The file {path} of the database was deleted or replaced while the bus was using it; "
                                  f"{cure}.")
        self._log_bytes = there.st_size if path != self.path else 0

    def _translated(self, error):
        """Translate an error of SQLite; return any other unchanged."""
        reason, code = str(error), getattr(error, "sqlite_errorname", "")     # the name since Python 3.11
        if isinstance(error, self._sqlite.IntegrityError) or not isinstance(error, self._sqlite.DatabaseError):
            return error
        if "full" in reason or code == "SQLITE_IOERR_WRITE":     # over a quota
            return StorageFull("The disk under the database is full; nothing of this request was stored.")
        if "locked" in reason:
            return Busy("Another program is writing to the database; try again.")
        return Unavailable(f"The database cannot be used just now: {reason}.")

    def _connect(self, readonly=False, exclusive=False):
        db = self._sqlite.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        if exclusive:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")     # reads a write-ahead log without shared memory
        db.execute(f"PRAGMA query_only = {int(readonly)}")
        db.execute("PRAGMA synchronous = FULL")     # an answered publish survives a power cut
        db.execute("PRAGMA fullfsync = 1")     # on macOS, plain fsync leaves data in the disk's cache
        return db

    def _lock_file(self):
        """Lock a file beside the database until this process ends, so that a second bus does not serve it."""
        guard = open(self.path + ".lock", "a+", opener=lambda path, flags: os.open(path, flags, 0o600))
        with contextlib.suppress(OSError):     # a file system without modes, as on a memory card
            os.chmod(guard.name, 0o600)     # another user who can open it can keep the bus from starting
        try:
            lock(guard)
        except (BlockingIOError, PermissionError) as error:
            guard.close()
            raise SetupError(f"Another bus is serving {self.path}; stop it, or give this one another --db.") from error
        return guard

    def _shared_memory(self):
        """Return whether files here can be mapped, as a write-ahead log needs; SQLite would say "disk I/O error"."""
        import mmap
        self._guard.truncate(1)     # an empty file cannot be mapped
        try:
            mmap.mmap(self._guard.fileno(), 1).close()
        except OSError:
            return False
        return True

    def _prepare(self, journal):
        """Bring the file to this journal mode, if the file system allows it, and to the schema of this version."""
        (version,), (application_id,) = (self._db.execute(f"PRAGMA {pragma}").fetchone()
                                      for pragma in ("user_version", "application_id"))
        if application_id != APPLICATION_ID and self._db.execute("SELECT name FROM sqlite_master LIMIT 1").fetchone():
            raise SetupError(f"The database {self.path} belongs to another program; give the bus another --db.")
        if version > len(MIGRATIONS):
            raise SetupError(f"The database {self.path} was written by a newer intentbus (schema {version}, "
                             f"this one knows {len(MIGRATIONS)}); use that version, or another --db.")
        mode, = self._db.execute(f"PRAGMA journal_mode = {journal}").fetchone()
        if mode != "wal":
            self._db.execute("PRAGMA locking_mode = NORMAL")
            self._db.execute("PRAGMA journal_mode = TRUNCATE")     # a deleted journal may be back after a power cut
            self.warning = f"{self.path} is on a file system without shared memory: the bus works, but slower."
        self.new = version == 0
        self._db.executescript(";".join(["BEGIN IMMEDIATE", *MIGRATIONS[version:], f"PRAGMA application_id = {APPLICATION_ID}",
                                         f"PRAGMA user_version = {len(MIGRATIONS)}", "COMMIT"]))
        self._version, = self._db.execute("PRAGMA data_version").fetchone()


# ---- 6. Store ----
# All other SQL: one method, one statement or few. Reads are shared by Store, which sees committed state, and Transaction,
# which sees its own block as well and makes the changes.

ALL = ", ".join(COLUMNS)     # by name: a newer bus on the same database may have added columns
ALL_INTENTS = f"SELECT {ALL} FROM intents"
ORDER = "priority DESC, run_at, claim_attempts, created_at, id"     # of claims, within a lane
INSERTED = [column for column in COLUMNS if column not in UNCLAIMED or column in ("idempotency_key", "caused_by", "schedule")]
INSERT = f"INSERT INTO intents ({', '.join(INSERTED)}) VALUES (:{', :'.join(INSERTED)})"     # the others are NULL
ONE = ALL_INTENTS + " WHERE id = :id"
DUE = ALL_INTENTS + " WHERE due_at <= :now ORDER BY due_at LIMIT :rows"
LOST = ALL_INTENTS + """
    WHERE claim_expires_at <= :now
    AND   due_at <= :now
    AND   expires_at > :now
    AND   status = 'claimed'
    LIMIT :rows
"""
OF_KEY = ALL_INTENTS + " WHERE claim_key = :key_id AND status = 'claimed'"
CLAIMED_WITH = OF_KEY + " AND claim_token_hash = :token_hash"
CLAIMED_BY_KEY = OF_KEY + " LIMIT :rows"
TWIN = {status: f"""
    {ALL_INTENTS}
    WHERE    owner = :owner
    AND      namespace = :namespace
    AND      goal = :goal
    AND      unique_value = :unique_value
    AND      status = '{status}'
    AND      id <> :id
    ORDER BY created_at DESC, id DESC
    LIMIT    1
""" for status in ("open", "claimed")}     # literals, as for ANY
HEAD = f"""
    {ALL_INTENTS}
    WHERE    ready = 1
    AND      {{where}}
    ORDER BY {{order}}
    LIMIT    1
"""
HEAD_OF_NEXT_LANE = HEAD.format(where="lane >= :start AND lane < :end", order=f"lane, {ORDER}")
HEAD_OF_PLACE = HEAD.format(where="place = :place", order=ORDER)
PUBLIC_HEAD_OF_PLACE = HEAD.format(where="place = :place AND visibility = 'public' AND owner = :publisher", order=ORDER)
HEAD_OF_NEXT_PRIORITY = HEAD.format(where="lane = :lane AND priority < :priority", order=ORDER)
HEAD_BESIDE_FULL_GOALS = f"""
    WITH RECURSIVE lanes (lane) AS (     -- one step in the index for each
        SELECT :start
        UNION ALL
        SELECT (SELECT MIN(lane) FROM intents WHERE ready = 1 AND lane > lanes.lane AND lane < :end)
        FROM   lanes
        WHERE  lane IS NOT NULL
    )
    {ALL_INTENTS}
    WHERE    id IN (SELECT (SELECT id FROM intents WHERE ready = 1 AND lane = lanes.lane ORDER BY {ORDER} LIMIT 1) FROM lanes)
    AND      REPLACE(:goals, '\t' || goal || '\t', '') = :goals
    AND      :publisher IN ('', owner)
    ORDER BY {ORDER}
    LIMIT    1
"""
MATCHING = """
    AND      (:status IS NULL OR status = :status)
    AND      (:owner IS NULL OR owner = :owner)
    AND      (:goals IS NULL OR REPLACE(:goals, '\t' || goal || '\t', '') <> :goals)     -- as among() returns them
    AND      (:namespace IS NULL OR namespace = :namespace)
"""
PAGE = f"""
    {ALL_INTENTS}
    WHERE    id < :before
    AND      id >= :floor
    AND      {{kind}}
    AND      (:ready IS NULL OR ready = :ready)
    {MATCHING}
    ORDER BY id DESC
    LIMIT    :limit
"""
# kinds of intents: literals, since a partial index serves no parameter
KINDS = ANY, DEAD, NOT_ENDED = "1 = 1", "status = 'dead'", "status IN ('open', 'claimed')"
IN_RANGE = f"""
    SELECT   {{columns}}
    FROM     intents
    WHERE    {{kind}}
    AND      id >= :start
    AND      id < :end
    AND      created_at <= :until
    AND      (completed_at IS NULL OR completed_at <= :until)
    {MATCHING}
"""
GONE = ("id", "namespace", "goal", "publisher", "status", "size", "claim_key", "result_size", "idempotency_key", "limited", "steps")
DELETE = f"""
    DELETE FROM intents
    WHERE       id IN ({{which}})
    RETURNING   {", ".join(GONE)}
"""
OLD = """
    SELECT   id
    FROM     intents
    WHERE    completed_at <= :until
    ORDER BY completed_at
    LIMIT    :rows
"""
TALLY = """
    INSERT INTO tallies (namespace, publisher, status, intents, bytes)
    VALUES      (:namespace, :publisher, :status, :intents, :bytes)
    ON CONFLICT (namespace, publisher, status) DO UPDATE
    SET         intents = tallies.intents + excluded.intents,
                bytes = tallies.bytes + excluded.bytes
"""
REMEMBER = """
    INSERT INTO memos (kind, owner, key, value, expires_at, size)
    VALUES      (:kind, :owner, :key, :value, :expires_at, :size)
    ON CONFLICT (kind, owner, key) DO UPDATE
    SET         value = excluded.value,
                expires_at = excluded.expires_at,
                size = excluded.size
"""
REMEMBER_FIRST = REMEMBER + """
    WHERE       memos.expires_at <= :now
    RETURNING   key
"""

OLD_VALUE = "SELECT size, expires_at FROM memos WHERE kind = 'store' AND owner = :owner AND key = :key"
FORGET = """
    DELETE FROM memos
    WHERE       kind = :kind
    AND         owner = :owner
    AND         key = :key
"""
EXPIRED = "SELECT kind, owner, key FROM memos WHERE expires_at <= :now LIMIT :rows"
FORGET_THESE = """
    DELETE FROM memos
    WHERE       (kind, owner, key) IN ({which})
    RETURNING   kind, owner, size
"""

SCHEDULE_COLUMNS = (
    "owner", "name", "publisher", "goal", "fields", "every", "cron", "timezone", "overlap", "made_at", "next_run_at", "last_run_at",
    "last_id", "payload",
)
ALL_SCHEDULES = f"SELECT {', '.join(SCHEDULE_COLUMNS)} FROM schedules"
ONE_SCHEDULE = ALL_SCHEDULES + " WHERE owner = :owner AND name = :name"
DUE_SCHEDULES = ALL_SCHEDULES + " WHERE next_run_at <= :now ORDER BY next_run_at LIMIT :rows"
SCHEDULES_OF = ALL_SCHEDULES + " WHERE :owner IS NULL OR owner = :owner ORDER BY owner, name"
SET_SCHEDULE = f"""
    INSERT INTO schedules ({", ".join(SCHEDULE_COLUMNS)})
    VALUES      (:{", :".join(SCHEDULE_COLUMNS)})
    ON CONFLICT (owner, name) DO UPDATE
    SET         {", ".join(f"{column} = excluded.{column}" for column in SCHEDULE_COLUMNS)}
"""

STEP_FIELDS = ("name", "attempt", "seconds", "done_at")
KEY_FIELDS = ("key_id", "name", "owner", "role", "goals", "expires_at", "payloads", "created_at", "last_used_at", "total_requests")
ALL_KEYS = f"SELECT {', '.join(KEY_FIELDS)} FROM keys WHERE revoked_at IS NULL"
Move = collections.namedtuple("Move", "intent event detail", defaults=(None,))     # an intent as a block left it
GoalLimit = collections.namedtuple("GoalLimit", "namespace goal running paused")     # running: how many may, None for any number


@functools.lru_cache(maxsize=None)
def update_of(columns):
    """Return the statement that sets these columns of an intent."""
    return f"UPDATE intents SET {', '.join(f'{column} = :{column}' for column in columns)} WHERE id = :id"


class Tally(dict):
    """Counts of one key, or of the values of an owner: (number, bytes) by (namespace, status); and `bytes` in all.

    Results have no namespace.
    """

    def __init__(self, *parts):
        """Begin with the sum of other tallies."""
        self.bytes = 0
        for part in parts:
            for (namespace, status), (number, size) in part.items():
                self.add(namespace, status, number, size)

    def add(self, namespace, status, number, size):
        """Add to the number and bytes of a kind."""
        had = self.get((namespace, status), (0, 0))
        self[namespace, status] = had[0] + number, had[1] + size
        self.bytes += size

    def unfinished(self):
        """Return the number of intents that are open or claimed."""
        return sum(number for (_, status), (number, _) in self.items() if status in ("open", "claimed"))

    def namespaces(self):
        """Return the namespaces in which there are intents."""
        return {namespace for (namespace, _), (number, _) in self.items() if namespace and number > 0}


def add_counted(tallies, counted):
    """Add the counts of a Transaction to tallies, a defaultdict of Tally by publisher."""
    for publisher, namespace, status, number, size in counted:
        tallies[publisher].add(namespace, status, number, size)


def tally_rows(tallies):
    """Return the rows that add tallies, by publisher, to the stored ones."""
    return [dict(namespace=namespace, publisher=publisher, status=status, intents=number, bytes=size)
            for publisher, tally in tallies.items() for (namespace, status), (number, size) in tally.items() if number or size]


NO_TALLY = Tally()


def makes_room(move):
    """Return whether, after a move, another intent of its goal may be claimed, which a limit or pause kept waiting."""
    return move.event == "limited" or bool(move.intent.get("limited")) and move.intent.status != "claimed"


def values_of(owner):
    """Return the publisher under which the values of an owner are tallied; no key has such an id."""
    return f"values of {owner}"


def among(goals):
    """Return goals, or None for any, as statements take them; no goal can hold a tab."""
    return goals and "\t".join(("", *goals, ""))


def key_of(row):
    """Return an issued key, given its row."""
    key = Record(zip(KEY_FIELDS, row))
    return Record(key, goals=key.goals and json.loads(key.goals), payloads=bool(key.payloads))


def claim_order(intent):
    """Return the sort key of claims: highest priority, then longest due, then fewest attempts, then oldest."""
    return -intent.priority, intent.run_at, intent.claim_attempts, intent.created_at, intent.id


class Reads:
    """The statements that change nothing; `_rows(statement, values)` returns an iterable of tuples.

    The first of these is what _first(), _value() (its first column) and _intent() return, or None.
    """

    def _first(self, statement, **values):
        return next(iter(self._rows(statement, values)), None)

    def _value(self, statement, **values):
        row = self._first(statement, **values)
        return row and row[0]

    def _intent(self, statement, **values):
        row = next(iter(self._rows(statement, values)), None)
        return row and Intent(zip(COLUMNS, row))

    def intents(self, statement, **values):
        """Return the intents that a statement finds: DUE, LOST, CLAIMED_BY_KEY, or one of a range."""
        return [Intent(zip(COLUMNS, row)) for row in self._rows(statement, values)]

    def get(self, intent_id):
        """Return an intent as it is stored; raises NotFound."""
        intent = self._intent(ONE, id=intent_id)
        if intent is None:
            raise no_such(intent_id)
        return intent

    def next_due(self):
        """Return when time changes an intent next, or a schedule runs, in Unix seconds; FOREVER if nothing is due."""
        found = self._first("""
            SELECT (SELECT MIN(due_at) FROM intents WHERE due_at IS NOT NULL),
                   (SELECT MIN(next_run_at) FROM schedules WHERE next_run_at IS NOT NULL)
        """)
        return min((at for at in found if at is not None), default=FOREVER)

    def schedules(self, statement=SCHEDULES_OF, **values):
        """Return the schedules that a statement finds: ONE_SCHEDULE, DUE_SCHEDULES, or SCHEDULES_OF an owner or, for None, all."""
        return [Record(zip(SCHEDULE_COLUMNS, row)) for row in self._rows(statement, values)]

    def number_of_schedules(self, key_id):
        """Return how many schedules a key has made."""
        return self._value("SELECT COUNT(*) FROM schedules WHERE publisher = :key_id", key_id=key_id)

    def id_ranges(self, rows, kind):
        """Yield ranges of ids, as (start, end before which it ends), that hold at most that many intents of a kind each."""
        start = ""
        while start is not None:
            end = self._value(f"""
                SELECT   id
                FROM     intents
                WHERE    {kind}
                AND      id >= :start
                ORDER BY id
                LIMIT    1
                OFFSET   :rows
            """, start=start, rows=rows)
            yield start, end or "g"     # "g" is after every id
            start = end

    def recall(self, kind, owner, key, now):
        """Return the text that is remembered under kind, owner and key, or None."""
        return self._value("""
            SELECT value
            FROM   memos
            WHERE  kind = :kind
            AND    owner = :owner
            AND    key = :key
            AND    expires_at > :now
        """, kind=kind, owner=owner, key=key, now=now)

    def steps(self, intent_id):
        """Return the STEP_FIELDS of the steps of an intent that are done, in this order."""
        return [Record(zip(STEP_FIELDS, row)) for row in self._rows(
            f"SELECT {', '.join(STEP_FIELDS)} FROM steps WHERE intent = :intent ORDER BY done_at, name", dict(intent=intent_id))]

    def goal_limits(self):
        """Return {(namespace, goal): GoalLimit} of all goals that are limited or paused."""
        return {tuple(row[:2]): GoalLimit(*row) for row in self._rows(
            "SELECT namespace, goal, running, paused FROM limits ORDER BY namespace, goal", {})}

    def claimed_of(self, namespace, goal):
        """Return how many intents of a limited goal are claimed."""
        return self._value("SELECT COUNT(*) FROM intents WHERE limited = 1 AND status = 'claimed' AND namespace = :namespace "
                           "AND goal = :goal", namespace=namespace, goal=goal)

    def key(self, key_id):
        """Return an issued key that is not revoked, or None."""
        row = self._first(ALL_KEYS + " AND key_id = :key_id", key_id=key_id)
        return row and key_of(row)

    def keys(self):
        """Return the issued keys that are not revoked, oldest first."""
        return [key_of(row) for row in self._rows(ALL_KEYS + " ORDER BY created_at, key_id", {})]


class Transaction(Reads):
    """The block of one verb of the Bus: `with store.transaction() as tx`.

    A failure undoes this block only. `now` is the time of the round. `moves`, the changes of intents, and functions given
    to after_commit() reach memory once they are on disk. `counted` is to be added to the tallies: (publisher, namespace,
    status, number, bytes). `deleted` are the ids of deleted intents that were claimed.
    """

    def __init__(self, store):
        self._store, self.moves, self.effects, self.counted, self.deleted = store, [], [], [], []

    def __enter__(self):
        self._db = self._store.database.enter()
        self.now = self._store.now()
        return self

    def __exit__(self, kind, error, trace):
        database = self._store.database
        if error is not None:
            return database.undo(self._db, error)
        try:
            if not database.in_round:
                self._db.executemany(TALLY, tally_rows(self.tallies()))
            committed = database.leave(self._db)
        except Exception as failure:
            database.undo(self._db, failure)
            raise
        self._store.ended(self, committed)

    def tallies(self):
        """Return the counts of this block, as a defaultdict of Tally by publisher."""
        tallies = collections.defaultdict(Tally)
        add_counted(tallies, self.counted)
        return tallies

    def after_commit(self, effect, *arguments):
        """Call a function once this block is committed."""
        self.effects.append((effect, arguments))

    def _rows(self, statement, values):
        return self._db.execute(statement, values)

    # -- Intents --

    def insert(self, intent, event="published"):
        """Store a new intent."""
        self._db.execute(INSERT, intent)
        self.count(intent, 1)
        self.moves.append(Move(intent, event))

    def update(self, intent, change):
        """Carry out a transition; return the intent as it is then."""
        after = Intent(intent, **change.columns)
        self._db.execute(update_of(tuple(change.columns)), after)
        if "status" in change.columns:
            self.count(intent, -1)
            self.count(after, 1)
        self.moves.append(Move(after, change.event, change.detail))
        return after

    def count(self, intent, sign):
        """Add an intent to the tally of its publisher, and its result to that of the key that reported it; or take them off."""
        self.counted.append((intent.publisher, intent.namespace, intent.status, sign, sign * intent.size))
        if intent.result_size:
            self.counted.append((intent.claim_key, "", "result", sign, sign * intent.result_size))

    def step_output(self, intent_id, name):
        """Return the output of a step that is done, or None."""
        return self._value("SELECT output FROM steps WHERE intent = :intent AND name = :name", intent=intent_id, name=name)

    def step_bytes(self, intent_id):
        """Return the bytes of all steps of an intent."""
        return self._value("SELECT SUM(size) FROM steps WHERE intent = :intent", intent=intent_id) or 0

    def add_step(self, intent, name, output, seconds):
        """Record a step of an intent, and return the intent as it is then."""
        size = ROW_BYTES + bytes_of(output)
        self._db.execute("""
            INSERT INTO steps (intent, name, output, size, attempt, seconds, done_at)
            VALUES      (:intent, :name, :output, :size, :attempt, :seconds, :done_at)
        """, dict(intent=intent.id, name=name, output=output, size=size, attempt=intent.claim_attempts, seconds=seconds,
                  done_at=self.now))
        return self.update(intent, intent.stepped(name, size, seconds))

    def forget_steps(self, intent_id):
        """Forget the steps of an intent."""
        self._db.execute("DELETE FROM steps WHERE intent = :intent", dict(intent=intent_id))

    def claimable(self, lanes, key_id, token_hash=None):
        """Return the first intent that is ready in these lanes, or in lanes that they cover, and whose goal has room; or None.

        An intent that the key holds under a claim token comes before all.
        """
        held = token_hash and self._intent(CLAIMED_WITH, token_hash=token_hash, key_id=key_id)
        first = held or min((head for lane in lanes for head in self._heads(lane)), default=None, key=claim_order)
        if first and (first.namespace, first.goal) in self._limits:
            first["limited"] = 1
        return first

    def _heads(self, lane):
        """Yield the first ready intent of each lane that a lane covers, or of its place; each is one index lookup.

        Goals without room are left out. If the first intent of a place is of such a goal, all lanes there are looked at.
        """
        place, goal, publisher = lane.rsplit("\t", 2)
        start, end = lane_range(lane)
        if not goal:
            head = self._intent(PUBLIC_HEAD_OF_PLACE if publisher else HEAD_OF_PLACE, place=place, publisher=publisher)
            if head and not self._has_room(head):
                full = [limit.goal for limit in self._limits.values() if limit.namespace == head.namespace and not self._has_room(limit)]
                head = self._intent(HEAD_BESIDE_FULL_GOALS, start=start, end=end, goals=among(full), publisher=publisher)
            if head:
                yield head
        while goal and start < end and (head := self._intent(HEAD_OF_NEXT_LANE, start=start, end=end)) and self._has_room(head):
            yield head
            start = lane_end(head.lane)

    @property
    def _limits(self):
        if self._store.limits is None:
            self._store.limits = self.goal_limits()
        return self._store.limits

    def _has_room(self, of):     # an intent or a GoalLimit
        limit = self._limits.get((of.namespace, of.goal))
        return not limit or not limit.paused and (limit.running is None or self.claimed_of(of.namespace, of.goal) < limit.running)

    def ready_lanes(self, namespace, goal):
        """Return the lanes of a goal in which intents are ready, in the order of these intents; none if its limit leaves no room."""
        found, (start, end) = [], range_under(namespace)
        while head := self._intent(HEAD_OF_NEXT_LANE, start=start, end=end):     # one lookup for each place
            found += self._heads(f"{head.place}\t{goal}\t")
            start = range_under(head.place)[1]
        return [head.lane for head in sorted(found, key=claim_order)]

    def limit(self, namespace, goal):
        """Return the GoalLimit of a goal, to be changed in this block."""
        return self.goal_limits().get((namespace, goal)) or GoalLimit(namespace, goal, None, 0)

    def set_limit(self, limit):
        """Store the GoalLimit of a goal; without a number and a pause, it has none."""
        self._store.limits = None
        self._db.execute("DELETE FROM limits WHERE namespace = :namespace AND goal = :goal", limit._asdict())
        if limit.running is not None or limit.paused:
            self._db.execute("INSERT INTO limits VALUES (:namespace, :goal, :running, :paused)", limit._asdict())
        status = "paused" if limit.paused else "free" if limit.running is None else f"limited to {limit.running}"
        shown = Intent(dict.fromkeys(COLUMNS), namespace=limit.namespace, goal=limit.goal, status=status)
        self.moves.append(Move(shown, "limited"))

    def count_claimed(self, namespace, goal):
        """Have the limit of a goal count the intents that were claimed before it was set; return how many are claimed."""
        self._db.execute("UPDATE intents SET limited = 1 WHERE status = 'claimed' AND namespace = :namespace AND goal = :goal",
                         dict(namespace=namespace, goal=goal))
        return self.claimed_of(namespace, goal)

    def twin(self, intent, statuses=tuple(TWIN)):
        """Return the newest other intent of a unique value, of the first of these statuses that there is; or None."""
        return next(filter(None, (self._intent(TWIN[status], **intent) for status in statuses)), None)

    def number_of(self, kind, **which):
        """Return how many intents of a kind are in a range of ids, as IN_RANGE describes them."""
        return self._value(IN_RANGE.format(columns="COUNT(*)", kind=kind), **which)

    def select(self, kind, **which):
        """Return these intents."""
        return self.intents(IN_RANGE.format(columns=ALL, kind=kind), **which)

    def delete(self, kind, **which):
        """Delete these intents, and the memory of their idempotency keys; return how many."""
        gone = self._delete(IN_RANGE.format(columns="id", kind=kind), **which)
        keys = {(intent.publisher, intent.idempotency_key) for intent in gone if intent.idempotency_key is not None}
        self._db.executemany(FORGET, [dict(kind="idempotency", owner=publisher, key=key) for publisher, key in keys])
        return len(gone)

    def delete_old(self, until, rows):
        """Delete intents that ended by a time, the oldest first, at most that many; return their statuses."""
        return [intent.status for intent in self._delete(OLD, until=until, rows=rows)]

    def _delete(self, which, **values):
        """Delete intents; return their columns in GONE."""
        gone = [Record(zip(GONE, row)) for row in self._rows(DELETE.format(which=which), values)]
        for intent in gone:
            self.count(intent, -1)
            if intent.steps:
                self.forget_steps(intent.id)
            if intent.status == "claimed":
                self.deleted.append(intent.id)
                if intent.limited:
                    self.moves.append(Move(Intent(dict.fromkeys(COLUMNS), namespace=intent.namespace, goal=intent.goal, limited=1), None))
        return gone

    def tally_of(self, publisher):
        """Return the Tally of a publisher before this round."""
        tally = Tally()
        for kind in self._rows("""
            SELECT   namespace, status, SUM(intents), SUM(bytes)
            FROM     tallies
            WHERE    publisher = :publisher
            GROUP BY namespace, status
        """, dict(publisher=publisher)):
            tally.add(*kind)
        return tally

    def stored_bytes(self, first, second):
        """Return the bytes in the stored tallies of two publishers."""
        return self._value("SELECT SUM(bytes) FROM tallies WHERE publisher IN (:first, :second)", first=first, second=second) or 0

    def shift(self, seconds):
        """Move the times of all that is unfinished or remembered, since the clock was set by that much."""
        self._db.execute("""
            UPDATE intents
            SET    run_at = run_at + :seconds,
                   expires_at = expires_at + :seconds,
                   claim_expires_at = claim_expires_at + :seconds,
                   due_at = due_at + :seconds
            WHERE  due_at IS NOT NULL
        """, dict(seconds=seconds))
        self._db.execute("""
            UPDATE memos
            SET    expires_at = expires_at + :seconds
            WHERE  kind <> 'nonces'
            OR     :seconds > 0
        """, dict(seconds=seconds))     # a clock set back must not shorten the life of a nonce

    def clamp_ended(self, now, rows):
        """Set completed_at to now where a wrong clock left it in the future."""
        self._db.execute("""
            UPDATE intents
            SET    completed_at = :now
            WHERE  id IN (SELECT id FROM intents WHERE completed_at > :now LIMIT :rows)
        """, dict(now=now, rows=rows))

    # -- Schedules --

    def set_schedule(self, schedule, **columns):
        """Store a schedule with some columns changed, in place of the owner's one of that name."""
        self._db.execute(SET_SCHEDULE, dict(schedule, **columns))

    def delete_schedule(self, schedule):
        """Delete a schedule."""
        self._db.execute("DELETE FROM schedules WHERE owner = :owner AND name = :name", schedule.pick(("owner", "name")))

    # -- Keys --

    def add_key(self, key):
        """Store an issued key."""
        self._db.execute("""
            INSERT INTO keys (key_id, name, owner, role, goals, expires_at, payloads, created_at, total_requests)
            VALUES      (:key_id, :name, :owner, :role, :goals, :expires_at, :payloads, :now, 0)
        """, dict(key, goals=key.goals and to_json(key.goals), payloads=int(key.payloads), now=self.now))

    def revoke_key(self, key_id):
        """Mark an issued key as revoked; return whether there was one."""
        return self._first("""
            UPDATE    keys
            SET       revoked_at = :now
            WHERE     key_id = :key_id
            AND       revoked_at IS NULL
            RETURNING key_id
        """, key_id=key_id, now=self.now) is not None

    def count_usage(self, usage):
        """Add to the use of keys: {"key_id", "requests", "last"} of each."""
        self._db.executemany("""
            UPDATE keys
            SET    total_requests = total_requests + :requests,
                   last_used_at = CASE WHEN last_used_at > :last THEN last_used_at ELSE :last END
            WHERE  key_id = :key_id
        """, usage)

    # -- Memos and history --

    def remember(self, kind, owner, key, value, expires_at, size=0):
        """Remember a text, in place of an earlier one; only that of a value has a size."""
        self._db.execute(REMEMBER, dict(kind=kind, owner=owner, key=key, value=value, expires_at=expires_at, size=size))

    def remember_first(self, kind, owner, key, value, expires_at, size=0):
        """Remember a text unless there is one; return whether it was remembered."""
        return self._first(REMEMBER_FIRST, kind=kind, owner=owner, key=key, value=value, expires_at=expires_at, size=size,
                           now=self.now) is not None

    def set_value(self, owner, key, value, expires_at, if_absent):
        """Store a value of an owner; return whether it was stored: if_absent, unless there is one."""
        old, until = self._first(OLD_VALUE, owner=owner, key=key) or (None, 0)
        size = ROW_BYTES + bytes_of(value)
        if not if_absent:
            self.remember("store", owner, key, value, expires_at, size)
        elif until > self.now or not self.remember_first("store", owner, key, value, expires_at, size):
            return False
        self.counted.append((values_of(owner), "", "value", int(old is None), size - (old or 0)))
        return True

    def take_memo(self, kind, owner, key):
        """Forget a text, and return it and its expires_at; (None, None) if there is none."""
        found = self._first(FORGET + "RETURNING value, expires_at, size", kind=kind, owner=owner, key=key)
        if found and kind == "store":
            self.counted.append((values_of(owner), "", "value", -1, -found[2]))
        return found[:2] if found and found[1] > self.now else (None, None)

    def forget_expired(self, rows):
        """Forget texts whose time is over, at most that many; return the kind of each."""
        expired = list(self._rows(FORGET_THESE.format(which=EXPIRED), dict(now=self.now, rows=rows)))
        self.counted += [(values_of(owner), "", "value", -1, -size) for kind, owner, size in expired if kind == "store"]
        return [kind for kind, _, _ in expired]

    def forget_oldest(self, kind, owner, most):
        """Forget the texts of an owner that expire first, as long as there are more than that many."""
        self._db.execute("""
            DELETE FROM memos
            WHERE       kind = :kind
            AND         owner = :owner
            AND         expires_at <= (
                SELECT   expires_at
                FROM     memos
                WHERE    kind = :kind
                AND      owner = :owner
                ORDER BY expires_at DESC
                LIMIT    1
                OFFSET   :most
            )
        """, dict(kind=kind, owner=owner, most=most))

    def drop_empty_tallies(self):
        """Delete tallies of 0: a publisher may use a new namespace each time."""
        self._db.execute("DELETE FROM tallies WHERE intents = 0 AND bytes = 0")

    def count_events(self, events):
        """Add to the history: {"minute", "event", "times"} of each; minutes older than HISTORY_MINUTES are deleted."""
        self._db.executemany("""
            INSERT INTO history (minute, event, times)
            VALUES      (:minute, :event, :times)
            ON CONFLICT (minute, event) DO UPDATE
            SET         times = history.times + excluded.times
        """, events)
        self._db.execute("DELETE FROM history WHERE minute < :oldest",
                         dict(oldest=max(event["minute"] for event in events) - HISTORY_MINUTES))

    def count_figures(self, figures, now):
        """Add to the history by goal: {"minute", "owner", "namespace", "goal", "event", "times"} of each; old ones are deleted.

        The owner stands behind the namespace, in its column, since no namespace holds a space; an earlier version stored none.
        """
        self._db.executemany("""
            INSERT INTO goal_history (minute, namespace, goal, event, times)
            VALUES      (:minute, :namespace || ' ' || :owner, :goal, :event, :times)
            ON CONFLICT (minute, namespace, goal, event) DO UPDATE
            SET         times = goal_history.times + excluded.times
        """, figures)
        self._db.execute("DELETE FROM goal_history WHERE minute < :oldest", dict(oldest=int(now // 60) - HISTORY_MINUTES))


class Store(Reads):
    """The intents, keys and memos of a bus, in committed state; transaction() begins a block that changes them.

    A round is one commit for many blocks: database.begin(), blocks, prepare(), database.commit(), finish(); only that commit
    may run in another thread. A block outside a round is its own transaction. What was committed goes to `on_commit`, a
    function of a list of Transactions. `now` returns Unix seconds.
    """

    def __init__(self, database, now=time.time, transaction=Transaction):
        self.database, self.now, self._transaction = database, now, transaction
        self.round, self.round_tallies = [], collections.defaultdict(Tally)     # the blocks of the round so far, and their counts
        self.failed = False       # whether the last round was lost
        self.obstacle = None      # the error with which the last round could not begin
        self.limits = None        # GoalLimit by (namespace, goal), as the round sees them; None: to be read
        self.busy_since = None    # by time.monotonic(), while a commit or a shift of the clock runs in another thread
        self.on_commit = lambda blocks: None

    def close(self):
        """Let go of the database."""
        self.database.close()

    def transaction(self):
        """Begin a block of the round, or a transaction of its own."""
        return self._transaction(self)

    def ended(self, block, committed):
        """Take in a block that has ended well."""
        if committed:
            self.on_commit([block])
        else:
            self.round.append(block)
            add_counted(self.round_tallies, block.counted)

    def prepare(self):
        """Write the tallies of the round, the last thing before its commit."""
        for row in tally_rows(self.round_tallies):
            self.database.execute(TALLY, row)

    def finish(self):
        """Hand over the blocks of the round, once it is committed."""
        blocks, self.round, self.round_tallies = self.round, [], collections.defaultdict(Tally)
        self.on_commit(blocks)

    def abandon(self):
        """Undo the round, after an error."""
        self.round, self.round_tallies, self.failed, self.limits = [], collections.defaultdict(Tally), True, None
        self.database.rollback()

    def _rows(self, statement, values):
        return self.database.read(statement, values)

    # -- Lists and counts --

    def page(self, limit, owner=None, status=None, goals=None, namespace=None, before=None, floor=None):
        """Return an iterable of up to limit intents, newest first, before an id; and the id it looked down to, or None.

        It looks at LIST_ROWS at most, or down to that floor: of all intents or, if the status is "dead", of the dead ones. The
        status "delayed" is for open ones that cannot be claimed yet.
        """
        delayed = status == "delayed"
        values = dict(owner=owner, status="open" if delayed else status, ready=0 if delayed else None, goals=goals,
                      namespace=namespace, before=before or "g", limit=limit, rows=LIST_ROWS)     # "g" is after every id
        kind = DEAD if status == "dead" else ANY
        if floor is None:
            floor = self._value(f"""
                SELECT   id
                FROM     intents
                WHERE    id < :before
                AND      {kind}
                ORDER BY id DESC
                LIMIT    1
                OFFSET   :rows
            """, **values) or ""
        rows = self._rows(PAGE.format(kind=kind), dict(values, floor=floor))
        return (Intent(zip(COLUMNS, row)) for row in rows), floor or None

    def beginning_with(self, digits, rows):
        """Return (id, goal, owner, claim_owner) of the intents whose ids begin with these digits, at most that many."""
        return list(self._rows("""
            SELECT id, goal, owner, claim_owner
            FROM   intents
            WHERE  id >= :digits
            AND    id < :end
            LIMIT  :rows
        """, dict(digits=digits, end=digits + "g", rows=rows)))     # "g" is after every digit

    def tallies(self, owner=None):
        """Yield (namespace, publisher, status, number, bytes) of each kind of intents or values; of an owner, of its intents only."""
        return self._rows("""
            SELECT   namespace, publisher, status, SUM(intents), SUM(bytes)
            FROM     tallies
            WHERE    (:owner IS NULL OR publisher = :owner AND publisher = 'owner'
                      OR publisher IN (SELECT key_id FROM keys WHERE owner = :owner))
            GROUP BY namespace, publisher, status
            HAVING   SUM(intents) > 0
            ORDER BY namespace, publisher, status
        """, dict(owner=owner))

    def history(self, since):
        """Yield (minute of Unix time, event, times) from a minute on."""
        return self._rows("SELECT minute, event, times FROM history WHERE minute >= :since ORDER BY minute, event",
                          dict(since=since))

    def figures(self, day, hour):
        """Return (owner, namespace, goal, event, times since a minute, times since a later one) of the history by goal."""
        rows = self._rows("""
            SELECT   namespace, goal, event, SUM(times), SUM(CASE WHEN minute >= :hour THEN times ELSE 0 END)
            FROM     goal_history
            WHERE    minute >= :day
            GROUP BY namespace, goal, event
        """, dict(day=day, hour=hour))
        return [(owner, namespace, *counted) for place, *counted in rows for namespace, _, owner in [place.partition(" ")]]

    def number_ready(self, lane, most):
        """Return how many intents are ready in a lane, at most that many."""
        return self._value("SELECT COUNT(*) FROM (SELECT 1 FROM intents WHERE ready = 1 AND lane = :lane LIMIT :most) AS waiting",
                           lane=lane, most=most)

    def running(self, most):
        """Yield (namespace, goal, owner, number) of the claimed intents; it counts `most` of them at most."""
        return self._rows("""
            SELECT   namespace, goal, owner, COUNT(*)
            FROM     (SELECT namespace, goal, owner FROM intents WHERE status = 'claimed' LIMIT :most) AS claimed
            GROUP BY namespace, goal, owner
        """, dict(most=most))

    def longest_ready(self, most):
        """Return the longest ready intent of each lane and priority, for at most that many of these."""
        found, lanes = [], dict(start="", end="\x7f")     # "\x7f" is after every namespace
        while len(found) < most and (head := found and self._intent(HEAD_OF_NEXT_PRIORITY, **found[-1])
                                     or self._intent(HEAD_OF_NEXT_LANE, **lanes)):
            found.append(head)
            lanes["start"] = lane_end(head.lane)
        return found

    def newest_id(self):
        """Return the greatest id, or None."""
        return self._value("SELECT MAX(id) FROM intents")


# ---- 7. Clock ----
# Unix seconds for all that is stored. They run evenly, even when the clock of the machine is set.

STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC if sys.platform == "darwin" else None)


def steady_clock():
    """Return seconds that run evenly, also while the machine sleeps.

    Linux has CLOCK_BOOTTIME for that. On macOS, CLOCK_MONOTONIC counts sleep, and the clock of time.monotonic() does not.
    """
    return time.monotonic() if STEADY is None else time.clock_gettime(STEADY)


def this_boot():
    """Return an id of the time since this machine was started, through which its steady clock runs; None if unknown."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() if hasattr(time, "CLOCK_BOOTTIME") else None


class Clock:
    """The time of a bus.

    When the wall clock is set, by more than CLOCK_JUMP_SECONDS, now() goes on as before: leases and delays keep their
    length. step() returns by how much it was set. Once all stored times are moved by that, adopt() brings now() in line.
    """

    def __init__(self, wall=time.time, steady=steady_clock, boot=this_boot):
        self._wall, self._steady, self._boot = wall, steady, boot()
        self._offset = wall() - steady()

    def now(self):
        """Return the time in Unix seconds."""
        wall, steady = self._wall(), self._steady()
        if abs(wall - steady - self._offset) > CLOCK_JUMP_SECONDS:
            return steady + self._offset
        self._offset = wall - steady
        return wall

    def step(self):
        """Return by how many seconds the wall clock was set, or 0."""
        step = self._wall() - self._steady() - self._offset
        return step if abs(step) > CLOCK_JUMP_SECONDS else 0

    def adopt(self, step):
        """Take over a step of the wall clock."""
        self._offset += step

    def note(self, step=0):
        """Return the record from which resume() continues after a restart, with a step added: a dict for JSON."""
        return dict(at=self.now() + step, offset=self._offset + step, boot=self._boot)

    def resume(self, record):
        """Continue from a record: the wall clock may have been set while the bus was not running.

        After a restart of the machine, only a clock that is behind the record, or more than a year ahead, is known to be
        wrong; time then goes on from the record.
        """
        if self._boot and self._boot == record["boot"]:
            self._offset = record["offset"]
            return
        wall, at = self._wall(), record["at"]
        self._offset = (at if wall - at > YEAR_SECONDS else max(at, wall)) - self._steady()


# ---- 8. Waiting ----
# Held requests, each under the keys that it waits for: a lane, the id of an intent, or the events of an owner.


def event_key(owner):
    """Return the key of the events of an owner, or of all if it is None; it is neither a lane nor an id."""
    return f"events of {owner or 'all'}"


class Held:
    """A request that is not answered yet.

    It waits for news of any of its keys, for at most that many seconds. attempt() returns the answer, or None to keep
    waiting; otherwise() returns the answer when the time is over. Without keys, it only delays the answer.
    """

    __slots__ = ("request", "keys", "seconds", "attempt", "otherwise", "number", "until", "queued", "settled")

    def __init__(self, request, keys, seconds, attempt, otherwise):
        self.request, self.keys, self.seconds, self.attempt, self.otherwise = request, keys, seconds, attempt, otherwise
        self.number = None         # its place among all held requests
        self.until = 0             # when its time is over, by time.monotonic()
        self.queued = False        # whether an attempt is queued
        self.settled = False       # whether its answer is on the way


# A long operation that has done a slice of its work: go_on() does the next one, and returns the answer, or an Unfinished again.
Unfinished = collections.namedtuple("Unfinished", "request go_on")


class Waiting:
    """The held requests by each key that they wait for, and by the key that sent them; the longest held is first."""

    def __init__(self):
        self._held = {}       # key: {held: None}, ordered; an OrderedDict, since a dict is slow to lose its front
        self._of_caller = {}  # id of a caller's key: the same
        self._keys_of = collections.Counter()     # id of a caller's key: number of keys that its requests wait for
        self._claims_of = collections.Counter()   # (id of a caller's key, name of a worker): number of its claims
        self._numbers, self._size = itertools.count(), 0

    def __len__(self):
        return self._size

    def hold(self, held):
        """Take in a held request."""
        held.number = next(self._numbers)
        self._size += 1
        self._keys_of[held.request.caller.key_id] += len(held.keys)
        self._claims_of[held.request.caller.key_id, held.request.worker] += 1
        for places, key in self._places(held):
            places.setdefault(key, collections.OrderedDict())[held] = None

    def release(self, held):
        """Let go of a held request, if it is there."""
        if held.number is None:
            return
        held.number = None
        self._size -= 1
        self._keys_of[held.request.caller.key_id] -= len(held.keys)
        worker = held.request.caller.key_id, held.request.worker
        self._claims_of[worker] -= 1
        if not self._claims_of[worker]:
            del self._claims_of[worker]
        for places, key in self._places(held):
            del places[key][held]
            if not places[key]:
                del places[key]

    def _places(self, held):
        return [(self._of_caller, held.request.caller.key_id), *((self._held, key) for key in held.keys)]

    def first(self, keys, passed_over=()):
        """Return the request that is held longest for any of these keys, but for those passed over; or None."""
        found = (next((held for held in self._held.get(key, ()) if held not in passed_over), None) for key in keys)
        return min(filter(None, found), default=None, key=operator.attrgetter("number"))

    def keys(self):
        """Return all keys that requests are held for."""
        return list(self._held)

    def all(self, key):
        """Return all requests that are held for a key."""
        return list(self._held.get(key, ()))

    def of_caller(self, key_id):
        """Return the requests that are held for the key of a caller."""
        return list(self._of_caller.get(key_id, ()))

    def counts_of(self, key_id):
        """Return how many requests are held for the key of a caller, and how many keys these wait for."""
        return len(self._of_caller.get(key_id, ())), self._keys_of[key_id]

    def claims_of(self, key_id, worker):
        """Return how many claims of a worker are held, given the id of its key and its name."""
        return self._claims_of[key_id, worker]

    def of_largest_caller(self):
        """Return the requests that are held for the key that has most of them."""
        return list(max(self._of_caller.values(), default=(), key=len))


# ---- 9. Activity ----
# Workers, events, history and live output: in memory, for display. No rule depends on it. The loop changes it; threads of a
# shared database read it too, so a reader copies a collection before it iterates over it.

EVENT_FIELDS = (
    "id", "namespace", "goal", "status", "claim_attempts", "worker_id", "worker", "last_error", "owner", "claim_owner", "schedule",
)
EVENT_VALUES = operator.itemgetter(*EVENT_FIELDS)
LOST_OR_FAILED = ("failed", "lost", "dead")
FIGURES = ("claimed", "fulfilled", *LOST_OR_FAILED)     # the events that are counted by goal
COUNTED = dict(published="published", chained="published", scheduled="published", fulfilled="fulfilled", failed="failed", lost="failed",
               dead="failed")
WITHIN_CHARACTER = bytes(range(0x80, 0xC0))     # the bytes after the first one of a character in UTF-8


class WorkerRegistry:
    """The workers that asked for work, or had to do with an intent, within the last WORKER_SECONDS, or that hold a lease.

    A worker is known by the id of its key and a name. While it is there, it counts for all lanes that its claims named.
    """

    def __init__(self):
        self._workers = collections.OrderedDict()     # (key id, name): worker, the latest seen last
        self._of_key = {}                             # key id: {name: worker}, ordered likewise
        self._free_at = {}                            # (key id, name): when an empty claim of it was free of charge last
        self._serving = collections.Counter()         # lane: number of workers that ask for it
        self._holders = {}                            # id of an intent: the worker that holds it
        self._gone = collections.OrderedDict()        # (key id, name): worker that fell silent, the latest last

    def see(self, now, caller, name, worker_id, namespace, goals, lanes, version):
        """Note that a worker asks for work of these goals, or of any."""
        key = caller.key_id, name
        worker = self._workers.get(key)
        if worker is None:
            worker = self._workers[key] = self._gone.pop(key, None) or types.SimpleNamespace(
                key=key, owner=caller.owner, goals={}, lanes={}, asked=None, running={}, since=now, fulfilled=0, failed=0)
            self._of_key.setdefault(caller.key_id, collections.OrderedDict())[name] = worker
        worker.id, worker.namespace, worker.version = worker_id, namespace, version
        self._touch(now, worker)
        if worker.asked is not lanes:     # claims with the same fields have the same tuple
            self._serve(worker, goals, lanes)
            self._make_room(caller)

    def hear(self, now, caller, intent):
        """Note that the worker of an intent is there, since it extends the lease or reports."""
        worker = self._workers.get((intent.claim_key, intent.worker))
        if worker:
            self._touch(now, worker)
        elif intent.worker and caller.key_id == intent.claim_key:     # it claimed before this bus was started
            self.see(now, caller, intent.worker, intent.worker_id, intent.namespace, (intent.goal,), (intent.lane,), None)

    def hold(self, intent):
        """Note that an intent is claimed by its worker."""
        worker = self._workers.get((intent.claim_key, intent.worker))
        if worker is not self._holders.get(intent.id):
            self.free(intent.id)
            if worker and len(worker.running) < JOBS:
                worker.running[intent.id] = intent.goal, intent.claimed_at
                self._holders[intent.id] = worker

    def free(self, intent_id, event=None):
        """Note that an intent is not claimed, or no longer; the event tells how its attempt ended."""
        worker = self._holders.pop(intent_id, None)
        if worker:
            del worker.running[intent_id]
            worker.fulfilled += event == "fulfilled"
            worker.failed += event in LOST_OR_FAILED

    def free_all(self):
        """Forget which worker holds which intent: an extension tells it again."""
        for intent_id in list(self._holders):
            self.free(intent_id)

    def next_is_free(self, now, key_id, name):
        """Return whether a worker's empty claim is free of charge: every FREE_CLAIM_SECONDS, for KEY_WORKERS of a key.

        For those that clients abandon, name is None: a key has one a FREE_CLAIM_SECONDS, whatever names it gives.
        """
        key = key_id, name
        if name is None or key in self._workers:
            free = abs(now - self._free_at.get(key, 0)) >= FREE_CLAIM_SECONDS
        else:
            free = len(self._of_key.get(key_id, ())) < KEY_WORKERS
        if free:
            self._free_at[key] = now
        return free

    def forget_silent(self, now):
        """Forget workers that are silent for longer than WORKER_SECONDS and hold no lease."""
        for worker in list(itertools.takewhile(lambda worker: abs(now - worker.last_seen) >= WORKER_SECONDS, self._workers.values())):
            self.leave(*worker.key)
        while self._gone and abs(now - next(iter(self._gone.values())).last_seen) >= GONE_SECONDS:
            self._gone.popitem(last=False)

    def leave(self, key_id, name):
        """Note that a worker is gone, unless it holds a lease; it may come back."""
        worker = self._workers.get((key_id, name))
        if worker and not worker.running:
            self._forget(worker)
            self._gone[worker.key] = worker
        if len(self._gone) > GONE_WORKERS:     # the key with most loses its oldest: no key displaces the workers of another
            largest, _ = collections.Counter(key_id for key_id, _ in self._gone).most_common(1)[0]
            del self._gone[next(key for key in self._gone if key[0] == largest)]

    def forget_key(self, key_id):
        """Forget the workers of a key that was revoked."""
        for worker in list(self._of_key.get(key_id, {}).values()):
            self._forget(worker)
        for key in [key for key in self._gone if key[0] == key_id]:
            del self._gone[key]

    def seen(self, owner=None, goals=None, most=None, gone=False):
        """Return the workers of an owner, or of all, the latest seen first; with goals, as far as they have to do with these.

        With gone, those that have fallen silent. running_since are the times of claim of the intents in running.
        """
        there = [worker for worker in reversed(list((self._gone if gone else self._workers).values())) if owner in (None, worker.owner)
                 and (goals is None or not worker.goals or not worker.goals.keys().isdisjoint(goals))]
        found = []
        for worker in there[:most]:
            running = {intent_id: since for intent_id, (goal, since) in list(worker.running.items()) if goals is None or goal in goals}
            found.append(Record(
                name=worker.key[1], id=worker.id, owner=worker.owner, namespace=worker.namespace,
                goals=[goal for goal in list(worker.goals) if goals is None or goal in goals],
                last_seen=worker.last_seen, version=worker.version, running=list(running), running_since=list(running.values()),
                since=worker.since, fulfilled=worker.fulfilled, failed=worker.failed))
        return found

    def listening(self, lane):
        """Return how many workers ask for the intents of a lane."""
        return sum(self._serving.get(covering, 0) for covering in covering_lanes(lane))

    def _touch(self, now, worker):
        worker.last_seen = now
        self._workers.move_to_end(worker.key)
        self._of_key[worker.key[0]].move_to_end(worker.key[1])

    def _serve(self, worker, goals, lanes):
        """Add lanes to a worker; beyond WORKER_LANES, they take the place of its earlier ones."""
        if len(worker.lanes) + len(lanes) > WORKER_LANES:
            self._stop_serving(worker)
            worker.goals = {}
        self._serving.update(lane for lane in lanes if lane not in worker.lanes)
        worker.asked = lanes
        worker.lanes.update(dict.fromkeys(lanes))
        worker.goals.update(dict.fromkeys(goals))

    def _stop_serving(self, worker):
        for lane in worker.lanes:
            self._serving[lane] -= 1
            if not self._serving[lane]:
                del self._serving[lane]
        worker.asked, worker.lanes = None, {}

    def _make_room(self, caller):
        """Forget the workers that are silent for longest, of a key that has more than it may have, or of all."""
        of_key = self._of_key[caller.key_id]
        while caller.limits and len(of_key) > 1 and (
                len(of_key) > KEY_WORKERS or sum(len(worker.lanes) for worker in of_key.values()) > KEY_LANES):
            self._forget(next(iter(of_key.values())))
        if len(self._workers) > WORKERS:
            self._forget(next(iter(self._workers.values())))

    def _forget(self, worker):
        self._stop_serving(worker)
        for intent_id in list(worker.running):
            self.free(intent_id)
        key_id, name = worker.key
        del self._workers[worker.key]
        self._free_at.pop(worker.key, None)
        del self._of_key[key_id][name]
        if not self._of_key[key_id]:
            del self._of_key[key_id]


def step_of(seconds):
    """Return the step of a duration: STEPS_PER_DOUBLING of them double it."""
    return round(STEPS_PER_DOUBLING * math.log2(max(seconds, 0.001)))


def percentiles(steps, *parts):
    """Return the seconds within which each part of the durations lies, given how often each step occurs."""
    ordered, number = sorted(steps.items()), sum(steps.values())
    counts = list(itertools.accumulate(times for _, times in ordered))
    return [float(f"{2 ** (ordered[bisect.bisect_left(counts, part * number)][0] / STEPS_PER_DOUBLING):.3g}")
            for part in parts]


class EventLog:
    """The last EVENTS events, each with a number; and how often each kind happened, by the minute, and by goal."""

    def __init__(self, now):
        self._events = collections.deque(maxlen=EVENTS)
        self.newest = int(now * 1000)            # number of the newest event; it grows over restarts
        self.minutes = collections.Counter()     # (minute of Unix time, kind): times, until they are stored
        self.figures = collections.Counter()     # (minute, owner, namespace, goal, kind): likewise, by FIGURE_MINUTES
        self._step = None                        # the minute in which the step of the figures begins
        self._goals = set()                      # the (owner, namespace, goal) that are counted in it
        self._owned = collections.Counter()      # owner: how many of these
        self._page = functools.lru_cache(maxsize=EVENTS)(self._page)     # many watchers ask for the same ones

    def record(self, now, moves, count=True):
        """Take in the events of moves; count them unless another bus does."""
        self._page.cache_clear()
        for intent, event, detail in moves:
            if event:
                self.newest += 1
                self._events.append((self.newest, now, event, detail, EVENT_VALUES(intent)))     # not its payload
                if count and event in COUNTED:
                    self.minutes[int(now // 60), COUNTED[event]] += 1
                if count and event in FIGURES:
                    self._count_figure(int(now // 60), intent, event)

    def _count_figure(self, minute, intent, event):
        """Count an event by goal, with how long the intent has waited or run.

        A step has room for FIGURE_GOALS goals. An owner gets room while it has less than is free, so that some is left to others.
        """
        minute, goal = minute - minute % FIGURE_MINUTES, (intent.owner, intent.namespace, intent.goal)
        if minute != self._step:
            self._step, self._goals, self._owned = minute, set(), collections.Counter()
        if goal not in self._goals:
            if self._owned[intent.owner] >= FIGURE_GOALS - len(self._goals):
                return
            self._goals.add(goal)
            self._owned[intent.owner] += 1
        if event == "claimed":
            self.figures[(minute, *goal, f"waited {step_of(intent.claimed_at - intent.run_at)}")] += 1
            return
        self.figures[(minute, *goal, COUNTED[event])] += 1
        if event == "fulfilled" and intent.claimed_at:
            self.figures[(minute, *goal, f"ran {step_of(intent.completed_at - intent.claimed_at)}")] += 1

    def stored(self, counted, figures):
        """Drop counts that are stored."""
        self.minutes -= counted
        self.figures -= figures

    def after(self, number, owner=None, goals=None):
        """Return up to EVENTS_PAGE events after a number, and how many are dropped since then.

        They are those of an owner's intents or of all, and of some goals or of any.
        """
        return self._page(self.newest, number, owner, goals)

    def _page(self, newest, number, owner, goals):
        oldest = self._events[0][0] if self._events else newest + 1
        newer = itertools.takewhile(lambda entry: entry[0] > number, reversed(list(self._events)))
        found = [Record(zip(EVENT_FIELDS, values), number=at, time=when, event=event, detail=detail)
                 for at, when, event, detail, values in newer]
        visible = [event for event in reversed(found) if (owner is None or owner in (event.owner, event.claim_owner))
                   and (goals is None or event.goal in goals)]
        return visible[:EVENTS_PAGE], max(0, oldest - 1 - number)


class LiveOutput:
    """News of attempts while they run: how far each is, and the end of its handler's output.

    It counts for the worker's key. Numbers of bytes go on over all attempts of an intent that are known.
    """

    def __init__(self):
        self._told = collections.OrderedDict()     # id of an intent: the news of its latest attempt, the newest last
        self._sizes = collections.Counter()        # id of a key: bytes
        self._next_at = {}                         # id of an intent: when its worker may tell more
        self._read_until = {}                      # id of an intent: how long somebody reads

    def require_pause(self, now, intent_id):
        """Raise RateLimited if the worker of an intent tells of it more often than each PROGRESS_SECONDS."""
        if 0 < self._next_at.get(intent_id, 0) - now <= PROGRESS_SECONDS:
            raise RateLimited(f"Progress of an intent may be reported once in {PROGRESS_SECONDS} s.", "progress_limited")
        self._next_at[intent_id] = now + PROGRESS_SECONDS

    def tell(self, key_id, intent, percent, message, output):
        """Take in what the worker of an intent tells; None leaves percent or message as it was."""
        before = self._forget(intent.id)
        if before and before.claimed_at == intent.claimed_at:
            told = before
        else:     # of another claim: a release or a retry gives the number of an attempt again
            told = types.SimpleNamespace(attempt=intent.claim_attempts, claimed_at=intent.claimed_at, percent=None, message=None,
                                         output=b"", start=before.start + len(before.output) if before else 0)
        told.key_id, told.ended_at = key_id, None
        told.percent = told.percent if percent is None else percent
        told.message = told.message if message is None else message[:PROGRESS_CHARACTERS]
        output = told.output + (output or "").encode()
        told.output = output if len(output) <= LIVE_BYTES else output[-LIVE_BYTES:].lstrip(WITHIN_CHARACTER)
        told.start += len(output) - len(told.output)
        self._told[intent.id] = told
        self._sizes[key_id] += ROW_BYTES + len(told.output)
        while sum(self._sizes.values()) > LIVE_TOTAL_BYTES:
            largest, _ = self._sizes.most_common(1)[0]
            self._forget(next(intent_id for intent_id, told in self._told.items() if told.key_id == largest))

    def after(self, intent_id, number):
        """Return the news of an intent, with its output after a number of bytes: the answer of Bus.output() without "ended"."""
        told = self._told.get(intent_id)
        if told is None:
            return Record(attempt=None, output="", next=0, missed=0, percent=None, message=None)
        end = told.start + len(told.output)
        first = max(told.start, number) if number <= end else told.start     # beyond the end: it is of another bus's numbers
        return Record(attempt=told.attempt, output=told.output[first - told.start:].decode(errors="replace"), next=end,
                      missed=max(0, first - number), percent=told.percent, message=told.message)

    def read(self, now, intent_id, seconds):
        """Note that somebody reads of an intent, for some seconds and until soon after."""
        self._read_until[intent_id] = now + seconds + READER_SECONDS
        for oldest in list(self._read_until)[:len(self._read_until) - LIVE_READERS]:
            del self._read_until[oldest]

    def has_reader(self, now, intent_id):
        """Return whether somebody reads of an intent."""
        return now < self._read_until.get(intent_id, 0) <= now + WAIT_MAX_SECONDS + READER_SECONDS

    def end(self, now, intent_id):
        """Note that an intent is not claimed, or no longer."""
        if intent_id in self._told:
            self._told[intent_id].ended_at = now

    def forget_old(self, now):
        """Forget attempts that ended LIVE_SECONDS ago, pauses that are over, and readers that are gone."""
        for intent_id in [intent_id for intent_id, told in self._told.items()
                          if told.ended_at is not None and abs(now - told.ended_at) >= LIVE_SECONDS]:
            self._forget(intent_id)
        self._next_at = {intent_id: at for intent_id, at in list(self._next_at.items()) if 0 < at - now <= PROGRESS_SECONDS}
        self._read_until = {intent_id: at for intent_id, at in list(self._read_until.items()) if self.has_reader(now, intent_id)}

    def _forget(self, intent_id):
        told = self._told.pop(intent_id, None)
        if told:
            self._sizes[told.key_id] -= ROW_BYTES + len(told.output)
            self._sizes += collections.Counter()     # drops the zeros
        return told


# ---- 10. Bus ----
# The rules. Each verb of IntentClient is one here, with the same arguments and errors, and `caller`: who asks. A verb that
# changes something is one block of the round; a verb that looks reads committed state, and changes nothing.

Limits = collections.namedtuple("Limits", "unfinished stored_bytes")
UNCHANGED: Any = object()     # the default of an argument that can be None
Claim = collections.namedtuple("Claim", "lanes namespace goals worker_id lease token repeatable worker_name version")
DEATHS = "intent.dead"     # the goal of the intents that announce deaths
EVERYONE = "*"             # the owner of a viewer's key that sees the intents of all owners


class Caller(collections.namedtuple("Caller", "key_id owner role admin limits goals expires_at payloads",
                                    defaults=(None, FOREVER, True))):
    """Who asks.

    limits are the Limits of an issued key, or None; goals are the only ones that the key may use, or None; it ends at
    expires_at; payloads tells whether it sees payloads and results.
    """

    __slots__ = ()

    @property
    def sees(self):
        """The owner whose intents it sees; None for everyone's."""
        return None if self.admin or self.role == "viewer" and self.owner == EVERYONE else self.owner

    def may_use(self, goal):
        """Return whether it may have to do with a goal."""
        return self.goals is None or goal in self.goals

    def may_see(self, goal, *owners):
        """Return whether it may look at an intent of a goal that belongs to these owners."""
        return self.sees in (None, *owners) and self.may_use(goal)

    def oversees(self, key):
        """Return whether it may look at an issued key, which is for nothing that it may not look at."""
        return self.sees in (None, key.owner) and (self.goals is None or set(key.goals or [None]) <= set(self.goals))

    def narrowed(self, goals, refusal=Forbidden):
        """Return the goals that a request for these means: if it names none, the key's own; raises refusal for others.

        Each verb that takes a goal asks this. None stands for any goal.
        """
        for goal in goals or ():
            if not self.may_use(goal):
                raise refusal(f"This key is not for the goal {goal}.")
        return goals or self.goals


OWNER = Caller(key_id="owner", owner="owner", role="both", admin=True, limits=None)


def hash_token(token):
    """Return the form of a claim token that is stored: a copy of the file gives no lease away."""
    return hashlib.sha256(token.encode()).hexdigest()


def lease_lost(intent_id):
    """Return the error of a worker that does not hold the lease; it is the same for an unknown id."""
    return NotFound(f"You no longer hold the lease of intent {intent_id}; stop working on it.")


@functools.lru_cache(maxsize=256)
def claimed_lanes(namespace, owner, goals, publisher, worker_id, capabilities):
    """Return the lanes of a claim by a worker of an owner: private and public ones, of these goals or of any."""
    lanes = []
    for goal in goals or ("",):
        for audience in (publisher or owner, ""):
            by = (audience if goal else "") if audience else publisher or ""     # private intents are by their audience
            lanes += [f"{place_of(namespace, audience, target, capability)}\t{goal}\t{by}"
                      for target in dict.fromkeys((None, worker_id)) for capability in (None, *capabilities)]
    return tuple(dict.fromkeys(lanes))     # a goal may be named twice


def require_at_most(most, number, words):
    """Raise RateLimited, with words for the thing counted and the cure, if an issued key has more than it may have."""
    if number > most:
        raise RateLimited(f"This key may have {most} {words}.", "limit_exceeded")


def told_of(intent, claim):
    """Return the fields of a claim that its worker gets besides naming fields and payload."""
    told = intent.pick(CLAIM_FIELDS)
    told.update(claim_token=claim.token, claim_timeout=int(claim.lease))
    if intent.stream:
        told["stream"] = True
    return told


def goals_of(fields):
    """Return the goals to which a publish with these fields leads: its own, and its callbacks'."""
    return [goal for goal in map(fields.get, ("goal", "on_success", "on_failure")) if goal]


def stored_result(intent):
    """Return the result of an intent as a value."""
    return json.loads(intent.result) if intent.result_type == "json" else intent.result


def found_in(intent, text):
    """Return whether a text is in goal, id or payload of an intent, in any case; in the payload also as JSON writes it."""
    text, payload = text.lower(), intent.payload.lower()
    return text in intent.goal.lower() or text in intent.id or text in payload or to_json(text)[1:-1] in payload


def sliced(steps):
    """Make a generator function a verb: it runs to its end. The loop advances verb.steps instead, a slice at a time."""
    @functools.wraps(steps)
    def verb(*arguments, **fields):
        running = steps(*arguments, **fields)
        while True:
            try:
                next(running)
            except StopIteration as end:
                return end.value
    verb.steps = steps
    return verb


class Bus:
    """Publish, claim, fulfill, fail: the transitions of an intent, and who may cause them.

    A server calls it in one thread at a time. retention is seconds; jitter returns 0 to 1. on_news is called with the
    moves of each commit.
    """

    def __init__(self, store, clock=None, require_claim_token=False, retention=RETENTION_SECONDS, announce_dead=False,
                 jitter=random.random):
        self.store, self.clock = store, clock or store.database.clock or Clock()
        self.require_claim_token = require_claim_token
        self._retention, self._announce_dead, self._jitter = retention, announce_dead, jitter
        self._ids = Ids(store.newest_id())
        self.registry, self.log, self.live = WorkerRegistry(), EventLog(self.clock.now()), LiveOutput()
        self.next_due = 0             # Unix seconds; no intent and no schedule is due earlier
        self.issued_limits = None     # the Limits of issued keys, which the API sets
        self._known_goals = set()     # (owner, namespace, goal) of goals that are on record as having had a worker
        self._tallies = {}            # publisher: Tally, of issued keys that have published
        self._kept = [0, 0]           # ended intents are kept that many seconds longer, until a time
        self._figures = []            # what the summary has read of the history by goal
        self._clean_at = self._history_at = self._note_at = self._figures_at = 0     # by time.monotonic(), as the next one
        self._written_at = -FOREVER     # when something was written last
        self.on_news = lambda moves: None
        store.now, store.on_commit = self.clock.now, self._committed
        if stored := store.recall("clock", "", "", 0):
            record = json.loads(stored)
            self.clock.resume(record)
            self._kept = record["kept"]
        self.spare_leases()
        with store.transaction() as tx:
            self._note_time(tx)

    # -- Publishing --

    def publish(self, goal, payload, *, idempotency_key=None, caller=OWNER, **fields):
        """Store an intent and return {"id", "status", "namespace", "listening"}.

        fields are those of PUBLISH_DEFAULTS: delay, ttl and backoff_base are seconds, run_at is Unix seconds. The same
        idempotency_key with the same intent returns the first answer; with another intent it raises IdempotencyConflict.
        listening is the number of workers seen lately that may claim it. If it is 0 and no worker has ever claimed an intent
        of the caller's owner with this goal, nor one of that owner's workers any, never_claimed is true.
        status is "kept" or, with replace, "replaced" if the id is that of an unfinished intent with the same unique value.
        """
        wanted = dict(fields, goal=goal, payload=payload)
        namespace = fields.get("namespace", "default")
        answer, (intent,) = self._publish([wanted], idempotency_key, caller, lambda stored: Record(
            id=stored[0][0], status=stored[0][1], namespace=namespace))
        return Record(answer, **self._audience(intent))

    def publish_many(self, intents, *, idempotency_key=None, caller=OWNER):
        """Store intents, each a dict of arguments of publish, all or none; return {"ids"}, and "statuses" if any is unique."""
        def answer_with(stored):
            statuses = dict(statuses=[status for _, status in stored]) if any(wanted.get("unique") for wanted in intents) else {}
            return Record(ids=[intent_id for intent_id, _ in stored], **statuses)
        return self._publish(intents, idempotency_key, caller, answer_with)[0]

    def _publish(self, wanted, idempotency_key, caller, answer_with):
        """Store intents; return the answer, and the intents as they were wanted."""
        caller.narrowed([goal for fields in wanted for goal in goals_of(fields)])
        with self.store.transaction() as tx:
            intents = [self._new(tx, caller.owner, caller.key_id, dict(fields, idempotency_key=idempotency_key)) for fields in wanted]
            expected = [(intent.id, "published") for intent in intents]
            answer, memo = answer_with(expected), ("idempotency", caller.key_id, idempotency_key)
            if idempotency_key:
                told = [{field: value for field, value in fields.items() if value or field not in LATER_FIELDS} for fields in wanted]
                asked = json.dumps([list(answer), told], sort_keys=True)     # a bulk of one is another request
                digest = hashlib.sha256(asked.encode()).hexdigest()
                if not tx.remember_first(*memo, digest + to_json(answer), tx.now + IDEMPOTENCY_SECONDS):
                    known = tx.recall(*memo, tx.now)
                    if not known.startswith(digest):
                        raise IdempotencyConflict("Key reused with different payload: an Idempotency-Key stands for one request.")
                    return Record(json.loads(known[len(digest):])), intents
            stored = [self._insert(tx, intent, fields.get("replace")) for intent, fields in zip(intents, wanted)]
            if stored != expected:
                answer = answer_with(stored)
                if idempotency_key:
                    tx.remember(*memo, digest + to_json(answer), tx.now + IDEMPOTENCY_SECONDS)
            if stored == expected or any(status != "kept" for _, status in stored):
                self._require_room(tx, caller)
        return answer, intents

    def _new(self, tx, owner, publisher, fields):
        """Return an intent as published now, with a new id."""
        return Intent.new(self._ids.new(tx.now), tx.now, owner, publisher, fields)

    def _insert(self, tx, intent, replace):
        """Store a new intent, unless the twin of its unique value is kept or, if it waits, replaced; return (id, status)."""
        twin = self._twin(tx, intent)
        if twin and not replace:
            return twin.id, "kept"
        if twin and twin.status == "open":
            if twin.steps:
                tx.forget_steps(twin.id)
            return self._change(tx, twin, twin.replaced(intent)).id, "replaced"
        tx.insert(intent)
        return intent.id, "published"

    def _twin(self, tx, intent, *statuses):
        """Return the twin of an intent that has a unique value, as it is now; or None."""
        while intent.unique_value is not None and (twin := tx.twin(intent, *statuses)):
            if twin.due_at > tx.now:
                return twin
            self._change(tx, twin, twin.advance(tx.now))

    def _require_room(self, tx, caller):
        """Raise RateLimited if an issued key has more now than it may have: unfinished intents, namespaces, values, bytes."""
        if caller.limits is not None:
            tally, values = self._tally(tx, caller.key_id), self._tally(tx, values_of(caller.owner))
            require_at_most(caller.limits.unfinished, tally.unfinished(), "unfinished intents; wait until some are done")
            require_at_most(KEY_NAMESPACES, len(tally.namespaces()), "namespaces with intents; publish to one of these")
            require_at_most(KEY_VALUES, values.get(("", "value"), (0,))[0],
                            "values of its owner; delete some, or wait until some have expired")
            self._require_bytes(tx, caller, stored=tally.bytes + values.bytes)

    def _require_bytes(self, tx, caller, of_a_report=False, stored=None):
        """Raise RateLimited if an issued key stores more bytes now than it may; for a report, whose work is done, twice that."""
        if caller.limits is not None:
            stored = self._stored_bytes(tx, caller.key_id, values_of(caller.owner)) if stored is None else stored
            require_at_most(caller.limits.stored_bytes * (1 + of_a_report), stored, "bytes stored; wait until old intents, results "
                            "and values are deleted, or have the bus started with a larger --max-stored")

    def _stored_bytes(self, tx, *publishers):
        """Return the bytes of a key and of its owner's values; on a shared database, without additions of other requests that run now."""
        if self.store.database.shared:
            return tx.stored_bytes(*publishers) + sum(size for publisher, *_, size in tx.counted if publisher in publishers)
        return sum(part.bytes for publisher in publishers for part in self._parts(tx, publisher))

    def _tally(self, tx, publisher):
        """Return the Tally of a publisher, with the changes of this round."""
        return Tally(*self._parts(tx, publisher))

    def _parts(self, tx, publisher):
        """Return the tallies of a publisher: the committed one, that of this round, and that of this block."""
        committed = self._tallies.get(publisher)
        if committed is None:
            committed = tx.tally_of(publisher)
            if not self.store.database.shared:
                self._tallies[publisher] = committed
        return committed, self.store.round_tallies.get(publisher, NO_TALLY), tx.tallies().get(publisher, NO_TALLY)

    def _audience(self, intent):
        """Return how many workers listen for an intent, and whether its goal has never had one."""
        listening, served = self.registry.listening(intent.lane), (intent.owner, intent.namespace, intent.goal)
        if listening or served in self._known_goals or self.store.recall(
                "goal", intent.owner, f"{intent.namespace}\t{intent.goal}", self.clock.now()) is not None:
            return dict(listening=listening)
        return dict(listening=0, never_claimed=True)

    def cancel(self, intent_id, *, caller=OWNER):
        """End an unfinished intent; raises Conflict if it has ended."""
        with self.store.transaction() as tx:
            intent = self._published_by(tx, intent_id, caller)
            if intent.ended:
                raise Conflict(f"This intent is {intent.status}; only an unfinished one can be cancelled.")
            return self._outcome(self._change(tx, intent, intent.cancelled(tx.now)))

    def retry(self, intent_id=None, *, goal=None, namespace=None, limit=1000, count=False, until=None, from_start=False,
              caller=OWNER):
        """Open a dead intent again, or as many as retry_many() does; from_start forgets its steps."""
        if intent_id is None:
            return self.retry_many(goal, namespace, limit, count, until, caller=caller)
        with self.store.transaction() as tx:
            intent = self._published_by(tx, intent_id, caller)
            if intent.status != "dead":
                raise Conflict(f"This intent is {intent.status}; only a dead one can be retried.")
            if twin := self._twin(tx, intent):
                raise Conflict(f"Its unique value is taken by {twin.id}, which is {twin.status}.")
            without_steps = dict(steps=None, size=intent.size - tx.step_bytes(intent.id)) if from_start else {}
            if without_steps:
                tx.forget_steps(intent.id)
            intent = self._change(tx, intent, intent.retried(tx.now, **without_steps))
            if self._room(tx, intent.publisher, caller) < 0:
                raise RateLimited("The key that published this intent has too many unfinished ones; wait until some are done.",
                                  "limit_exceeded")
            return self._outcome(intent)

    @sliced
    def retry_many(self, goal=None, namespace=None, limit=1000, count=False, until=None, *, caller=OWNER):
        """Open up to limit dead intents of a goal and namespace again, the oldest first, and return {"retried": N}.

        It leaves out those whose unique value is taken or, for an issued key, whose publisher would have too many unfinished.
        count and until are those of purge().
        """
        retry = None if count else functools.partial(self._retry_dead, caller)
        found = yield from self._sweep(retry, DEAD, until, limit, owner=caller.sees, namespace=namespace,
                                       goals=caller.narrowed(goal and (goal,)))
        return found if count else Record(retried=found.number)

    # -- Schedules --

    def schedule(self, name, goal, payload, *, every=None, cron=None, timezone=None, overlap="skip", paused=False, owner=None,
                 caller=OWNER, **fields):
        """Publish an intent each `every` seconds, or at the times of a cron expression; return {"name", "next_run_at", "status"}.

        The status is "replaced" if the owner had a schedule of that name. fields are those of publish, but delay, run_at and
        idempotency_key. With overlap "skip", a run is left out while the intent of the run before is unfinished.
        """
        owner = self._owner_for(owner, caller)
        caller.narrowed(goals_of(dict(fields, goal=goal)))
        with self.store.transaction() as tx:
            known = tx.schedules(ONE_SCHEDULE, owner=owner, name=name)
            made = Record(known[0] if known else dict(last_run_at=None, last_id=None), owner=owner, name=name, publisher=caller.key_id,
                          goal=goal, payload=to_json(payload), fields=to_json(fields), every=every, cron=cron, timezone=timezone,
                          overlap=overlap, made_at=tx.now)
            made["next_run_at"] = next_run(made, tx.now)
            if cron and timezone is None and self.store.database.shared:
                raise Invalid("timezone is required: buses on this database may have other local times.", code="invalid_timezone")
            if paused:
                made["next_run_at"] = None
            tx.set_schedule(made)
            tx.after_commit(setattr, self, "next_due", 0)
            if caller.limits is not None:
                require_at_most(KEY_SCHEDULES, tx.number_of_schedules(caller.key_id), "schedules; unschedule some")
        return Record(name=name, next_run_at=made.next_run_at, status="replaced" if known else "scheduled")

    def schedules(self, owner=None, *, caller=OWNER):
        """Return {"schedules"} of the caller's owner or, for who sees everyone's, of any or all; without payloads."""
        found = [schedule for schedule in self.store.schedules(owner=owner if caller.sees is None else self._owner_for(owner, caller))
                 if caller.may_use(schedule.goal)]
        for schedule in found:
            del schedule["payload"]
            schedule.update(json.loads(schedule.pop("fields")), paused=schedule.next_run_at is None)
        return Record(schedules=found)

    def pause_schedule(self, name, paused, owner=None, *, caller=OWNER):
        """Leave out the runs of a schedule, or end its pause; return as schedule() does; raises NotFound."""
        with self.store.transaction() as tx:
            schedule = self._scheduled(tx, name, owner, caller)
            schedule["next_run_at"] = None if paused else next_run(schedule, tx.now)
            tx.set_schedule(schedule)
            tx.after_commit(setattr, self, "next_due", 0)
        return Record(name=name, next_run_at=schedule.next_run_at, status="paused" if paused else "scheduled")

    def unschedule(self, name, owner=None, *, caller=OWNER):
        """Delete a schedule; raises NotFound. Its intents stay."""
        with self.store.transaction() as tx:
            tx.delete_schedule(self._scheduled(tx, name, owner, caller))
        return Record(ok=True, name=name)

    def run(self, name, owner=None, *, caller=OWNER):
        """Publish the intent of a schedule now, besides its runs, and return {"id", "status", "namespace"}; raises NotFound."""
        with self.store.transaction() as tx:
            schedule = self._scheduled(tx, name, owner, caller)
            intent = self._publish_run(tx, schedule, self._intent_of(tx, schedule))
            self._require_room(tx, self._publisher_of(schedule))
        return Record(id=intent.id, status="published", namespace=intent.namespace)

    def _scheduled(self, tx, name, owner, caller):
        """Return a schedule of an owner by its name; raises NotFound."""
        for schedule in tx.schedules(ONE_SCHEDULE, owner=self._owner_for(owner, caller), name=name):
            if caller.may_use(schedule.goal):
                return schedule
        raise NotFound(f"There is no schedule {name}.")

    def _owner_for(self, owner, caller):
        if owner not in (None, caller.owner) and not caller.admin:
            raise Forbidden("Only an admin may name another owner.")
        return owner or caller.owner

    def _publisher_of(self, made):
        """Return the key that made a schedule or an intent, with its limits; it may be revoked by now."""
        limits = None if made.publisher == OWNER.key_id else self.issued_limits
        return Caller(made.publisher, made.owner, "publish", False, limits)

    def _intent_of(self, tx, schedule):
        return self._new(tx, schedule.owner, schedule.publisher, dict(
            json.loads(schedule.fields), goal=schedule.goal, payload=json.loads(schedule.payload), schedule=schedule.name))

    def _publish_run(self, tx, schedule, intent):
        tx.insert(intent, "scheduled")
        tx.set_schedule(schedule, last_run_at=tx.now, last_id=intent.id)
        return intent

    def _run_due(self, tx, schedule):
        """Publish the intent of a run that is due, or leave it out, in the transaction that sets the next run."""
        intent = self._intent_of(tx, schedule)
        try:
            next_run_at, reason = next_run(schedule, tx.now), self._reason_to_skip(tx, schedule, intent)
        except ValueError as error:     # the database has come from a machine that knows more time zones
            next_run_at, reason = tx.now + BACKOFF_MAX_SECONDS, f"timezone {error}"
        schedule["next_run_at"] = next_run_at
        if reason is None:
            return self._publish_run(tx, schedule, intent)
        tx.set_schedule(schedule)
        tx.moves.append(Move(Intent(intent, id=None, status="skipped", ready=0, due_at=None, last_error=reason), "skipped"))

    def _reason_to_skip(self, tx, schedule, intent):
        """Return why a run that is due is left out, or None."""
        over = tx.now - intent.ttl     # the intent of a run that was due by then would be dead
        if schedule.next_run_at <= over and next_run(schedule, over) > tx.now:
            return "The bus was away at the time of the run, for longer than its ttl."
        with contextlib.suppress(NotFound):
            if schedule.overlap == "skip" and schedule.last_id and not self._current(tx, schedule.last_id).ended:
                return f"The run before is unfinished: {schedule.last_id}."
        tx.count(intent, 1)
        try:
            self._require_room(tx, self._publisher_of(schedule))
        except RateLimited as error:
            return str(error)
        finally:
            tx.count(intent, -1)

    # -- Working --

    def claim(self, goal=None, *, claim_token=None, caller=OWNER, **fields):
        """Claim the first intent of a goal (a string, several, or None for any); return None if there is none.

        fields are those of wanted(). A claim repeated with its own claim_token returns the same intent, as the same attempt.
        """
        claim = self.wanted(goal, claim_token=claim_token, caller=caller, **fields)
        intent = self.take(claim, caller)
        return intent and Record(intent.pick(NAMING_FIELDS), payload=json.loads(intent.payload), **told_of(intent, claim))

    def wanted(self, goal=None, *, namespace="default", publisher=None, worker_id=None, capabilities=(), lease=LEASE_SECONDS,
               claim_token=None, worker_name=None, version=__version__, caller=OWNER):
        """Return the Claim that these fields describe; lease is seconds, worker_name and version are for people to read."""
        if publisher not in (None, caller.owner) and not caller.admin:
            raise Forbidden("A claim by publisher may name the caller only; the owner key may name anyone.")
        goals = caller.narrowed((goal,) if isinstance(goal, str) else tuple(goal or ())) or ()
        if max(len(goals), 1) * (1 + len(capabilities)) > CLAIM_COMBINATIONS:
            raise Invalid(f"A claim may name at most {CLAIM_COMBINATIONS} goals times capabilities.")
        lanes = claimed_lanes(namespace, caller.owner, goals, publisher, worker_id, tuple(capabilities))
        return Claim(lanes, namespace, goals, worker_id, lease, claim_token or os.urandom(16).hex(), bool(claim_token),
                     worker_name or worker_id or caller.key_id, version)

    def take(self, claim, caller):
        """Claim the first intent that a Claim may have, and return it as it is stored; None if there is none."""
        with self.store.transaction() as tx:
            return self._take(tx, claim, caller)

    def _take(self, tx, claim, caller):
        token_hash = hash_token(claim.token)
        tx.after_commit(self.registry.see, tx.now, caller, claim.worker_name, claim.worker_id, claim.namespace, claim.goals,
                        claim.lanes, claim.version)
        intent = self._claimable(tx, claim.lanes, caller.key_id, token_hash if claim.repeatable else None)
        if intent is None:
            return None
        self._require_bytes(tx, caller)     # there would be no room for the result
        for owner in sorted({caller.owner, intent.owner}):
            self._note_goal(tx, owner, intent.namespace, intent.goal)
        return self._change(tx, intent, intent.claimed(
            tx.now, token_hash, claim.lease, caller.owner, caller.key_id, claim.worker_id, claim.worker_name, caller.expires_at))

    def _note_goal(self, tx, *served):
        """Put on record that an owner, or an intent of it, has had a worker for a goal: owner, namespace, goal."""
        if served not in self._known_goals:
            owner, namespace, goal = served
            tx.remember("goal", owner, f"{namespace}\t{goal}", "", tx.now + GOAL_SECONDS)
            tx.forget_oldest("goal", owner, KNOWN_GOALS)
            if len(self._known_goals) > 10 * KNOWN_GOALS:
                self._known_goals.clear()     # they are put on record again
            tx.after_commit(self._known_goals.add, served)

    def _claimable(self, tx, *wanted):
        """Apply due transitions, then return the first intent for a claim, or None."""
        while True:
            applied = self.apply_due(tx).applied if self.next_due <= tx.now else 0
            intent = tx.claimable(*wanted)
            if intent is not None and intent.due_at <= tx.now:     # it is expired, but beyond the DUE_ROWS of one pass
                self._change(tx, intent, intent.advance(tx.now))
            elif intent is not None or applied < DUE_ROWS:
                return intent

    def spare_leases(self):
        """Spare leases that ran out while this bus was away; on a shared database, other buses were there."""
        lost = not self.store.database.shared
        while lost:
            with self.store.transaction() as tx:
                lost = tx.intents(LOST, now=tx.now, rows=SLICE_ROWS)
                for intent in lost:
                    self._change(tx, intent, intent.spared(tx.now))

    @sliced
    def end_leases(self, key_id):
        """End the leases of a key that was revoked: its intents go to other workers."""
        held = True
        while held:
            with self.store.transaction() as tx:
                tx.after_commit(self.registry.forget_key, key_id)
                held = tx.intents(CLAIMED_BY_KEY, key_id=key_id, rows=SLICE_ROWS)
                for intent in held:
                    self._change(tx, intent, intent.lost(tx.now))
            yield

    def extend_claim(self, intent_id, claim_token=None, seconds=LEASE_SECONDS, *, caller=OWNER):
        """Let the lease end that many seconds from now, within LEASE_RANGE_SECONDS; raises NotFound once it is over."""
        seconds = min(max(seconds, LEASE_RANGE_SECONDS[0]), LEASE_RANGE_SECONDS[1])
        with self.store.transaction() as tx:
            intent = self._held_by(tx, intent_id, claim_token, caller)
            intent = self._change(tx, intent, intent.extended(tx.now, seconds, caller.expires_at))
        return Record(ok=True, id=intent_id, extended_by=seconds, claim_expires_at=intent.claim_expires_at)

    def progress(self, intent_id, claim_token=None, percent=None, message=None, output=None, *, caller=OWNER):
        """Tell how far the work is, and what its handler has written; the lease lasts as long again as it did.

        percent is 0 to 100; None leaves percent or message as it was, and output is added to what was told. It is for
        people to look at: kept in memory, by this bus alone. Return {"ok", "claim_expires_at", "followed": whether
        somebody reads it}; raises RateLimited if an intent is told of more often than each PROGRESS_SECONDS.
        """
        with self.store.transaction() as tx:
            intent = self._held_by(tx, intent_id, claim_token, caller)
            self.live.require_pause(tx.now, intent_id)
            intent = self._change(tx, intent, intent.extended(tx.now, intent.lease or LEASE_SECONDS, caller.expires_at))
            tx.after_commit(self.live.tell, caller.key_id, intent, percent, message, output)
            return Record(ok=True, claim_expires_at=intent.claim_expires_at, followed=self.live.has_reader(tx.now, intent_id))

    def step(self, intent_id, claim_token, name, output=None, seconds=None, *, caller=OWNER):
        """Return {"done"}: whether a step of an intent is, in this attempt or an earlier one; with its "output", a text, if it is.

        With an output, record the step as done, in so many seconds; a step that is done already stays as it is. It is
        accepted as long as a fulfil() with this token is. Raises Conflict beyond STEPS and STEPS_BYTES of an intent.
        """
        with self.store.transaction() as tx:
            intent = self._claimed_by(tx, intent_id, claim_token, caller, "fulfilled")
            known = tx.step_output(intent.id, name) if intent.steps else None
            if known is not None:
                return Record(done=True, output=known)
            if output is None:
                return Record(done=False)
            if (intent.steps or 0) >= STEPS or tx.step_bytes(intent.id) + ROW_BYTES + bytes_of(output) > STEPS_BYTES:
                raise Conflict(f"An intent may have {STEPS} steps, and {STEPS_BYTES} bytes of their output, with {ROW_BYTES} more for each; "
                               "write output to a file, and print its name.", "too_many_steps")
            tx.add_step(intent, name, output, seconds)
            self._require_bytes(tx, self._publisher_of(intent), of_a_report=True)
        return Record(done=True)

    # With next_claim, a Claim, a report claims the next intent in its transaction: the intent that take() returns is `next` of the answer.

    def fulfill(self, intent_id, claim_token=None, result=None, result_type="json", *, next_claim=None, caller=OWNER):
        """Report the work done, with its result: any JSON value, or a string with result_type "text"."""
        if result_type == "text" and not isinstance(result, str):
            raise Invalid('result must be a string when result_type is "text".', code="invalid_result")
        with self.store.transaction() as tx:
            intent = self._claimed_by(tx, intent_id, claim_token, caller, "fulfilled")
            new = intent.claim_outcome is None
            if new:
                self._change(tx, intent, intent.fulfilled(tx.now, result, result_type, caller.key_id))
            answer = self._with_next(tx, Record(ok=True, id=intent_id), next_claim, caller)
            if new and result is not None:     # after the claim, in whose order a shared database is locked
                self._require_bytes(tx, caller, of_a_report=True)
            return answer

    def fail(self, intent_id, claim_token=None, error=None, retry=True, *, next_claim=None, caller=OWNER):
        """Report the work failed: it is tried again after a backoff, or dead if no attempt is left or retry is false."""
        reason = error if isinstance(error, str) else to_json(error)
        reason = "The worker gave no reason." if error in (None, "") else reason[:ERROR_CHARACTERS]
        with self.store.transaction() as tx:
            intent = self._claimed_by(tx, intent_id, claim_token, caller, "failed")
            if intent.claim_outcome is None:
                jitter = self._jitter() * BACKOFF_JITTER_SECONDS
                intent = self._change(tx, intent, intent.failed(tx.now, reason, retry, jitter))
            return self._with_next(tx, self._outcome(intent), next_claim, caller)

    def release(self, intent_id, claim_token=None, delay=0, *, next_claim=None, caller=OWNER):
        """Hand an intent back as if it had not been claimed; it can be claimed again after a delay in seconds."""
        with self.store.transaction() as tx:
            intent = self._claimed_by(tx, intent_id, claim_token, caller, "released")
            if intent.claim_outcome is None:
                intent = self._change(tx, intent, intent.released(tx.now, delay))
            return self._with_next(tx, self._outcome(intent), next_claim, caller)

    def _with_next(self, tx, answer, next_claim, caller):
        if next_claim:
            answer["next"] = None
            with contextlib.suppress(RateLimited):     # which would refuse the report, too
                answer["next"] = self._take(tx, next_claim, caller)
        return answer

    # -- Looking --

    def whole_id(self, digits, *, caller=OWNER):
        """Return the id of the only intent that the caller sees whose id begins with these digits; raises Conflict.

        It looks at LIST_ROWS intents. Any other text, and digits of no such intent, are returned as they are.
        """
        if not re.fullmatch(SHORT_ID, digits):
            return digits
        rows = self.store.beginning_with(digits, LIST_ROWS + 1)
        seen = [intent_id for intent_id, goal, *owners in rows if caller.may_see(goal, *owners)]
        number = "too many" if len(rows) > LIST_ROWS else len(seen)
        if number not in (0, 1):
            raise Conflict(f"{digits} fits {number} intents; give more digits of the id.", "ambiguous")
        return seen[0] if seen else digits     # for which the verb raises NotFound

    def get_status(self, intent_id, *, caller=OWNER):
        """Return the state of an intent, without payload and result."""
        return self._visible(intent_id, caller).pick(STATUS_FIELDS)

    def get_result(self, intent_id, *, caller=OWNER):
        """Return the state of an intent with its result, and with its history: the attempts that did not succeed."""
        intent = self._visible(intent_id, caller)
        found = Record(intent.pick(STATUS_FIELDS), result_type=intent.result_type or "json", history=intent.attempts)
        if caller.payloads:
            found["result"] = stored_result(intent)
        if intent.last_error:
            found["error"] = intent.last_error
        found["steps"] = self.store.steps(intent_id) if intent.steps else []
        return found

    def output(self, intent_id, after=0, *, caller=OWNER):
        """Return what the worker of an intent has told of its latest attempt, with the output after a number of bytes.

        {"attempt", "output", "next": the number to go on from, "missed": bytes that are not kept, "percent", "message",
        "ended": whether the intent has}.
        """
        intent = self._visible(intent_id, caller)
        found = self.live.after(intent_id, after)
        if not caller.payloads:
            del found["output"]
        return Record(found, ended=intent.ended)

    @sliced
    def list(self, *, status=None, goal=None, namespace=None, limit=50, before=None, payload=False, preview=0, search=None,
             caller=OWNER):
        """Return {"intents": newest first, "next": the value of before for the next page, or None}.

        preview is how many characters of the payloads, as JSON, to add.

        A page may be short and still have a next one: it looks at LIST_ROWS intents, and holds PAGE_BYTES of payloads. Only
        intents with the text of search in goal, id or payload are in it; then it looks through SEARCH_BYTES of payloads.
        """
        if (payload or preview or search) and not caller.payloads:
            raise Forbidden("This key may not see payloads.")
        goals, now = caller.narrowed(goal and (goal,), NotFound), self.clock.now()
        which = caller.sees, status, among(goals), namespace
        rows, floor = self.store.page(SEARCH_ROWS if search else limit + 1, *which, before)
        intents, room, unread, looked = [], PAGE_BYTES, SEARCH_BYTES, before
        while True:
            for row in rows:
                if len(intents) == limit or room <= 0:
                    return Record(intents=intents, next=intents[-1].id)
                looked, unread = row.id, unread - len(row.payload)
                if search and not found_in(row, search):
                    continue
                intents.append(row.at(now).pick(STATUS_FIELDS))
                if payload:
                    intents[-1]["payload"] = json.loads(row.payload)
                    room -= len(row.payload)
                if preview:
                    intents[-1]["preview"] = row.payload[:preview]
            if not search or looked == before:
                return Record(intents=intents, next=floor)
            if unread <= 0:
                return Record(intents=intents, next=looked)
            yield
            before = looked
            rows, _ = self.store.page(SEARCH_ROWS, *which, before, floor or "")

    def workers(self, *, caller=OWNER):
        """Return {"workers"}: who has asked for work lately, or holds a lease, the latest seen first."""
        return Record(workers=self.registry.seen(caller.sees, caller.goals))

    def events(self, after=None, *, caller=OWNER):
        """Return {"events": those after a number, "next": the number to go on from, "missed"}.

        Without a number, from now on. The last EVENTS are kept; missed is how many more there were. One answer has up to
        EVENTS_PAGE.
        """
        after = self.log.newest if after is None or after > self.log.newest else after
        found, missed = self.log.after(after, caller.sees, caller.goals)
        return Record(events=found, next=found[-1].number if found else after + missed, missed=missed)

    # -- Keys and values --

    def set(self, key, value, ttl=VALUE_TTL_SECONDS, if_absent=False, *, caller=OWNER):
        """Keep a JSON value for ttl seconds; with if_absent, raises Conflict if the key is taken: a lock."""
        with self.store.transaction() as tx:
            if not tx.set_value(caller.owner, key, to_json(value), tx.now + ttl, if_absent):
                raise Conflict(f"The key {key} is taken.")
            self._require_room(tx, caller)
        return Record(ok=True)

    def get(self, key, *, caller=OWNER):
        """Return the value of a key; raises NotFound."""
        value = self.store.recall("store", caller.owner, key, self.clock.now())
        if value is None:
            raise NotFound(f"There is no value for {key}.")
        return json.loads(value)

    def delete(self, key, *, caller=OWNER):
        """Forget a key; return whether there was a value."""
        with self.store.transaction() as tx:
            value, _ = tx.take_memo("store", caller.owner, key)
        return Record(ok=True, deleted=value is not None)

    # -- Administration: the caller is known to be an admin or, where nothing changes, a viewer --

    def limit(self, goal, running=UNCHANGED, paused=None, namespace="default", *, caller=OWNER):
        """Let at most `running` intents of a goal be claimed at once, None for any number; or pause it, or end its pause.

        Each stays as it was if it is not given. Return the limit, and how many intents are claimed under it.
        """
        with self.store.transaction() as tx:
            before = tx.limit(namespace, goal)
            after = before._replace(running=before.running if running is UNCHANGED else running,
                                    paused=before.paused if paused is None else int(paused))
            if after != before:
                tx.set_limit(after)
        with self.store.transaction() as tx:     # of its own: on a shared database, all claims know of the limit from here on
            return self._shown(after, tx.count_claimed(namespace, goal))

    def limits(self, *, caller=OWNER):
        """Return {"limits"}: of each goal that is limited or paused, with the number of its claimed intents."""
        limits = self.store.goal_limits()
        return Record(limits=[self._shown(limit, self.store.claimed_of(*goal)) for goal, limit in limits.items()])

    def _shown(self, limit, claimed):
        return Record(limit._asdict(), paused=bool(limit.paused), claimed=claimed)

    def ready_lanes(self, namespace, goal):
        """Return the lanes in which intents of a goal are ready, if its limit leaves room for more."""
        with self.store.transaction() as tx:
            return tx.ready_lanes(namespace, goal)

    @sliced
    def purge(self, confirm=False, namespace=None, goal=None, status=None, count=False, until=None, ids=None, *, caller=OWNER):
        """Delete all intents of a namespace, goal and status, of every one, or of these ids, if confirm is true.

        With count, return {"number", "until"} instead. To delete no others than those that were counted, pass that until:
        later ones, and those that have ended since then, are left.
        """
        return (yield from self._confirmed("deleted", self._delete_all, confirm, count, until, DEAD if status == "dead" else ANY,
                                           ids=ids, namespace=namespace, goals=goal and (goal,), status=status))

    @sliced
    def cancel_many(self, goal=None, confirm=False, namespace=None, count=False, until=None, status=None, ids=None, *, caller=OWNER):
        """Cancel all unfinished intents of a goal, or of a status, or of these ids, as purge() deletes them."""
        if goal is None and status is None and ids is None:
            raise Invalid("goal is required, or status, or ids.", code="invalid_goal")
        return (yield from self._confirmed("cancelled", self._cancel_all, confirm, count, until, NOT_ENDED,
                                           ids=ids, namespace=namespace, goals=goal and (goal,), status=status))

    def _confirmed(self, done, change, confirm, count, until, kind, **which):
        if not (confirm or count):
            raise Invalid('This changes many intents for good: say {"confirm": true}.', code="confirmation_required")
        found = yield from self._sweep(None if count else change, kind, until, **which)
        return found if count else Record({"ok": True, done: found.number})

    @sliced
    def cleanup(self, *, caller=OWNER):
        """Apply all due transitions and delete all that is past its retention; return how many of each kind."""
        total, more = collections.Counter(), True
        while more:
            with self.store.transaction() as tx:
                step = dict(self.apply_due(tx), **self._clean(tx))
            more = any(step.values())
            total.update(step)
            yield
        del total["applied"]
        return Record(total)

    def inspect(self, intent_id, *, caller=OWNER):
        """Return everything about an intent but its claim token."""
        intent = self._visible(intent_id, caller)
        hidden = ("claim_token_hash", "claim_key", "claim_outcome", "idempotency_key", "lease", "size", "result_size", "place",
                  "lane", "ready", "due_at", "payload", "result", "unique_value", "limited")
        shown = dict(payload=json.loads(intent.payload), result=stored_result(intent)) if caller.payloads else {}
        return Record({column: value for column, value in intent.items() if column not in hidden}, **shown,
                      history=intent.attempts, unique=intent.unique_value, stream=bool(intent.stream),
                      steps=self.store.steps(intent_id) if intent.steps else [])

    def dead_letter(self, intent_id, *, caller=OWNER):
        """Return everything about a dead intent."""
        intent = self.inspect(intent_id, caller=caller)
        if intent.status != "dead":
            raise NotFound(f"There is no dead intent {intent_id}.")
        return Record(intent, intent_id=intent.id, attempts=intent.claim_attempts, reason=intent.last_error)

    @sliced
    def sweep_dead(self, action, *, goal=None, namespace=None, ids=None, until=None, caller=OWNER):
        """Count, retry or delete the dead intents of a goal, a namespace, or these ids; return {"number", "until"}.

        Only intents that were dead by until, in Unix seconds, are touched; its default is now. To touch those that were
        counted, pass the until of the count.
        """
        change = {"count": None, "retry": functools.partial(self._retry_dead, caller), "delete": self._delete_all}[action]
        return (yield from self._sweep(change, DEAD, until, ids=ids, goals=goal and (goal,), namespace=namespace))

    def _sweep(self, change, kind, until, most=sys.maxsize, *, ids=None, goals, namespace, owner=None, status=None):
        """Change up to `most` intents of a kind in slices, or count them if change is None; return {"number", "until"}.

        change takes a transaction, a number and values of IN_RANGE, and returns how many intents it has changed.
        """
        number, now = 0, self.clock.now()
        until = (FOREVER if change else now) if until is None else until
        which = dict(kind=kind, goals=among(goals), namespace=namespace, owner=owner, status=status, until=until)
        ranges = ((one, one + " ") for one in ids) if ids is not None else self.store.id_ranges(
            SLICE_ROWS, DEAD if kind is DEAD else ANY)
        for start, end in ranges:
            some = dict(which, start=start, end=end)
            with self.store.transaction() as tx:
                number += change(tx, most - number, **some) if change else tx.number_of(**some)
            if number >= most:
                break
            yield
        return Record(number=number, until=min(until, now))

    def _delete_all(self, tx, most, **which):
        return tx.delete(**which)

    def _cancel_all(self, tx, most, **which):
        return len([self._change(tx, intent, intent.cancelled(tx.now)) for intent in tx.select(**which)])

    def _retry_dead(self, caller, tx, most, **which):
        """Retry the dead intents of a range that have room, at most that many; return how many."""
        retried, room = 0, {}     # by publisher
        for intent in tx.select(**which):
            if intent.publisher not in room:
                room[intent.publisher] = self._room(tx, intent.publisher, caller)
            if retried < most and room[intent.publisher] > 0 and not self._twin(tx, intent):
                self._change(tx, intent, intent.retried(tx.now))
                retried += 1
                room[intent.publisher] -= 1
        return retried

    def _room(self, tx, publisher, caller):
        """Return how many more unfinished intents a publisher may have, if the caller is an issued key; below 0: too many."""
        if caller.limits is None or publisher == OWNER.key_id:
            return sys.maxsize
        return caller.limits.unfinished - self._tally(tx, publisher).unfinished()

    def dead(self, limit=100, *, caller=OWNER):
        """Return the newest dead letters."""
        return [Record(intent_id=intent.id, namespace=intent.namespace, goal=intent.goal, attempts=intent.claim_attempts,
                       reason=intent.last_error, created_at=intent.created_at)
                for intent in self.store.page(limit, caller.sees, "dead", among(caller.goals))[0]]

    def summary(self, minutes=60, *, caller=OWNER):
        """Return counts, workers, sizes, and the history of the last minutes, in steps of ten above 60.

        intents are numbers by namespace and status; waiting has, for each waiting goal, since when (run_at) and how many workers
        listen; goals are those of _by_goal(); workers are listed, and gone ones apart; history is [[minute of Unix time, event,
        times]]; sizes are in bytes; keys is the number of issued keys. A viewer gets only what it may see: no history, which is
        not kept by owner, and, if its key is for some goals, no intents, which are not counted by goal.
        """
        now, intents, whole = self.clock.now(), {}, caller.sees is None and caller.goals is None
        for namespace, _, status, number, _ in self.store.tallies(caller.sees):
            if namespace and caller.goals is None:     # else these are values or results
                states = intents.setdefault(namespace, {})
                states[status] = states.get(status, 0) + number
        database_bytes, wal_bytes = self.store.database.sizes()
        limits = self.limits().limits if whole else []
        ready = [intent for intent in self.store.longest_ready(WAITING_LANES) if caller.may_see(intent.goal, intent.owner)]
        longest = {}
        for intent in sorted(ready, key=operator.attrgetter("run_at")):
            longest.setdefault((intent.namespace, intent.goal), intent)
        waiting = [Record(intent.pick(("namespace", "goal", "run_at")), listening=self.registry.listening(intent.lane))
                   for intent in longest.values()]
        workers = functools.partial(self.registry.seen, caller.sees, caller.goals, WAITING_LANES)
        return Record(version=__version__, now=now, intents=intents, keys=sum(map(caller.oversees, self.store.keys())),
                      database_bytes=database_bytes, wal_bytes=wal_bytes, waiting=waiting,
                      goals=self._by_goal(ready, longest, limits, caller), workers=workers(), gone=workers(gone=True),
                      limits=limits, history=self._past(int(now // 60) - minutes + 1, 1 if minutes <= 60 else 10) if whole else [])

    def _by_goal(self, ready, longest, limits, caller):
        """Return the figures of up to FIGURE_GOALS goals, the busiest first.

        waiting and running are how many there are now, of the WAITING_ROWS and RUNNING_ROWS that are counted; run_at is of the
        longest waiting; then how many were fulfilled and how many attempts failed in the last hour and the last day; in how
        many seconds half of them, and 95 %, were claimed, and were done. All are of the intents that the caller sees.
        """
        goals = collections.defaultdict(lambda: dict(
            waiting=0, running=0, run_at=None, limit=None, paused=False, fulfilled=[0, 0], failed=[0, 0], waited=None, ran=None))
        for place, intent in longest.items():
            goals[place]["run_at"] = intent.run_at
        room = WAITING_ROWS
        for lane, intent in {intent.lane: intent for intent in ready}.items():
            number = self.store.number_ready(lane, room)
            goals[intent.namespace, intent.goal]["waiting"] += number
            room -= number
        for namespace, goal, owner, number in self.store.running(RUNNING_ROWS):
            if caller.may_see(goal, owner):
                goals[namespace, goal]["running"] += number
        for limit in limits:
            goals[limit.namespace, limit.goal].update(limit=limit.running, paused=limit.paused)
        self._add_history(goals, caller)
        found = [Record(figures, namespace=namespace, goal=goal) for (namespace, goal), figures in goals.items()]
        found.sort(key=lambda of: (-of.waiting - of.running, -sum(of.fulfilled + of.failed), of.goal, of.namespace))
        return found[:FIGURE_GOALS]

    def _add_history(self, goals, caller):
        """Add to goals what comes from events of the last day, of the intents that the caller sees."""
        minute = int(self.clock.now() // 60)
        day, hour = minute - HISTORY_MINUTES, minute - 60
        began = time.monotonic()
        if began >= self._figures_at:
            self._figures = self.store.figures(day, hour)
            took = time.monotonic() - began
            self._figures_at = began + max(FIGURE_SECONDS, 100 * took)     # it holds up the loop for 1 % of the time at most
        events = [(*figure, times, times if minute >= hour else 0)     # not stored yet
                  for (minute, *figure), times in list(self.log.figures.items()) if minute >= day]
        may_see, steps = functools.lru_cache(None)(caller.may_see), collections.defaultdict(collections.Counter)
        for owner, namespace, goal, event, in_day, in_hour in [*self._figures, *events]:
            kind, _, step = event.partition(" ")
            if not may_see(goal, owner):
                continue
            if step:
                steps[namespace, goal, kind][int(step)] += in_day
            else:
                times = goals[namespace, goal].setdefault(kind, [0, 0])
                times[:] = times[0] + in_hour, times[1] + in_day
        for (namespace, goal, kind), counted in steps.items():
            goals[namespace, goal][kind] = percentiles(counted, 0.5, 0.95)

    def _past(self, since, step):
        """Return [[minute, event, times]] of the minutes of Unix time from one on, added up by that many minutes."""
        past = collections.Counter()
        counted = ((minute, event, times) for (minute, event), times in list(self.log.minutes.items()) if minute >= since)
        for minute, event, times in itertools.chain(counted, self.store.history(since)):
            past[minute - minute % step, event] += times
        return [[minute, event, times] for (minute, event), times in sorted(past.items())]

    def probe(self):
        """Raise Unavailable or StorageFull if the database cannot be written; it is written once a second at most."""
        if self.store.failed or time.monotonic() >= self._written_at + RECHECK_SECONDS:
            with self.store.transaction() as tx:
                tx.remember("probe", "", "", "", tx.now + RECHECK_SECONDS)
                tx.after_commit(self._note_write)

    def require_progress(self):
        """Raise Unavailable if the database seems not to be written, after a probe that has not ended in HEALTH_SECONDS."""
        now, since = time.monotonic(), self.store.busy_since
        if since is not None and now - since > STALLED_SECONDS:
            raise Unavailable(f"The disk of the database has not answered for {now - since:.0f} s.")
        if since is None and now - self._written_at > HEALTH_SECONDS:
            raise self.store.obstacle or Unavailable(f"The database has not answered for {HEALTH_SECONDS} s.")

    def _note_write(self):
        self._written_at, self.store.failed = time.monotonic(), False

    # -- Rules shared by several verbs --

    def _change(self, tx, intent, change):
        """Carry out a transition, publish its callback and announcement, and return the intent as it is then."""
        if intent.unique_value is not None and intent.status != "open" and change.columns.get("status") == "open":
            change = self._only_one_open(tx, intent, change)
        after = tx.update(intent, change)
        if change.event == "dead" and self._announce_dead and intent.goal != DEATHS:
            payload = dict(id=after.id, goal=after.goal, namespace=after.namespace, reason=after.last_error,
                           attempts=after.claim_attempts, worker_id=after.worker_id, worker=after.worker, created_at=after.created_at)
            tx.insert(self._new(tx, after.owner, OWNER.key_id, dict(goal=DEATHS, payload=payload, namespace=after.namespace)))
        if change.callback and after[change.callback]:
            payload = dict(after.pick(("id", "goal", "status")), result=stored_result(after), result_type=after.result_type or "json",
                           error=after.last_error if after.status == "dead" else None, claim_attempts=after.claim_attempts)
            fields = dict(goal=after[change.callback], payload=payload, namespace=after.namespace, caused_by=after.id)
            tx.insert(self._new(tx, after.owner, after.publisher, fields), "chained")
        return after

    def _only_one_open(self, tx, intent, change):
        """Return the change that opens an intent, or that ends it if a newer twin is open; an older one ends."""
        twin = self._twin(tx, intent, ("open",))
        if twin and (twin.created_at, twin.id) > (intent.created_at, intent.id):
            return intent.superseded(tx.now, twin.id, **change.columns)
        if twin:
            self._change(tx, twin, twin.superseded(tx.now, intent.id))
        return change

    def _current(self, tx, intent_id):
        """Return an intent, after the transition that is due, if any."""
        intent = tx.get(intent_id)
        if intent.due_at is not None and intent.due_at <= tx.now:
            intent = self._change(tx, intent, intent.advance(tx.now))
        return intent

    def _published_by(self, tx, intent_id, caller):
        """Return an intent of the caller's owner, or of anyone for an admin; raises NotFound."""
        intent = self._current(tx, intent_id)
        if not caller.may_see(intent.goal, intent.owner):
            raise no_such(intent_id)
        return intent

    def _claimed_by(self, tx, intent_id, claim_token, caller, outcome=None):
        """Return an intent for a report of its latest worker; raises NotFound for anyone else.

        A token, or without one the claim's owner, proves the claim, even after its lease: until somebody claims the intent
        again, or it is cancelled. A claim that has ended takes no report but the one that ended it, again, and with its token.
        """
        if claim_token is None and self.require_claim_token:
            raise Invalid("claim_token is required on this bus.", code="invalid_claim_token")
        try:
            intent = self._current(tx, intent_id)
        except NotFound:
            raise lease_lost(intent_id) from None
        if claim_token is None:
            allowed = intent.claim_token_hash and intent.claim_outcome is None and intent.claim_owner == caller.owner
        else:
            allowed = hmac.compare_digest(hash_token(claim_token), intent.claim_token_hash or "")
        if not allowed or intent.claim_outcome not in (None, outcome) or not caller.may_use(intent.goal):
            raise lease_lost(intent_id)
        tx.after_commit(self.registry.hear, tx.now, caller, intent)
        return intent

    def _held_by(self, tx, intent_id, claim_token, caller):
        """Return an intent whose lease a worker holds now; raises NotFound."""
        intent = self._claimed_by(tx, intent_id, claim_token, caller)
        if intent.status != "claimed":
            raise lease_lost(intent_id)
        return intent

    def _visible(self, intent_id, caller):
        """Return an intent as it is now; raises NotFound unless the caller's owner published or claimed it."""
        intent = self.store.get(intent_id).at(self.clock.now())
        if not caller.may_see(intent.goal, intent.owner, intent.claim_owner):
            raise no_such(intent_id)
        return intent

    def _outcome(self, intent):
        return Record(ok=True, id=intent.id, status=intent.status, run_at=intent.run_at)

    # -- After a commit --

    def _committed(self, blocks):
        """Take in the moves and effects of blocks, now that they are on disk."""
        for block in blocks:
            for effect, arguments in block.effects:
                effect(*arguments)
            for publisher, *counted in block.counted:
                if publisher in self._tallies:
                    self._tallies[publisher].add(*counted)
            for intent_id in block.deleted:
                self.registry.free(intent_id)
        moves = [move for block in blocks for move in block.moves]
        self.learn(moves)
        if moves:
            self._note_write()
        self.on_news(moves)

    def learn(self, moves, ours=True):
        """Take in moves of intents that are on disk, made by this bus or by another on the same database."""
        now = self.clock.now()
        self.log.record(now, moves, count=ours)
        for intent, event, _ in moves:
            if intent.due_at is not None and intent.due_at < self.next_due:
                self.next_due = intent.due_at
            if intent.status != "claimed":
                cancelled = intent.get("claim_token_hash", "") is None     # another bus does not tell it
                self.registry.free(intent.id, None if cancelled else event)
                self.live.end(now, intent.id)
            elif ours:
                self.registry.hold(intent)

    def distrust_memory(self):
        """Drop the cached state of the database: another program has changed it."""
        self.next_due, self.store.limits = 0, None
        self._tallies.clear()
        self.registry.free_all()

    # -- Time --

    def apply_due(self, tx):
        """Apply due transitions, DUE_ROWS at most, and run due schedules; return counts of transitions, and of deaths by kind."""
        counts = Record(applied=0, expired_open_dead=0, expired_claims_dead=0)
        for intent in tx.intents(DUE, now=tx.now, rows=DUE_ROWS):
            after = self._change(tx, intent, intent.advance(tx.now))
            counts["applied"] += 1
            if after.ended:
                counts["expired_claims_dead" if intent.status == "claimed" else "expired_open_dead"] += 1
        due = tx.schedules(DUE_SCHEDULES, now=tx.now, rows=SLICE_ROWS)
        for schedule in due:
            self._run_due(tx, schedule)
        if counts.applied < DUE_ROWS and len(due) < SLICE_ROWS:
            tx.after_commit(setattr, self, "next_due", tx.next_due())
        return counts

    def shift_clock(self):
        """Move all stored times along if the wall clock was set. Reads may go on in another thread meanwhile."""
        step = self.clock.step()
        if step:
            with self.store.transaction() as tx:
                tx.shift(step)
                self._shift_schedules(tx, step)
                kept = [max(0, self._kept[0] + step), tx.now + step + self._retention]
                self._note_time(tx, step, kept)
            self._kept = kept     # once it is stored: a step that could not be is tried again
            self.clock.adopt(step)
            self.distrust_memory()

    def _shift_schedules(self, tx, step):
        """Move schedules along; of cron ones, a step ahead leaves no run out, and one back repeats none unless it is large."""
        for schedule in (schedule for schedule in tx.schedules(owner=None) if schedule.next_run_at is not None):
            with contextlib.suppress(ValueError):     # an unknown time zone, see _run_due()
                if schedule.cron is None:
                    tx.set_schedule(schedule, made_at=schedule.made_at + step, next_run_at=schedule.next_run_at + step)
                elif step <= -CLOCK_BACK_SECONDS:
                    tx.set_schedule(schedule, next_run_at=next_run(schedule, tx.now + step))
                else:
                    since_last = next_run(schedule, schedule.last_run_at or schedule.made_at)
                    tx.set_schedule(schedule, next_run_at=max(schedule.next_run_at, since_last))

    def housekeeping_delay(self):
        """Return in how many seconds housekeeping() has something to do; 0 or less: now."""
        now = time.monotonic()
        delay = min(self.next_due - self.clock.now(), self._clean_at - now)
        if self.next_due < FOREVER:
            delay = min(delay, self._note_at - now)
        if self.log.minutes or self.log.figures:
            delay = min(delay, self._history_at - now)
        return delay

    def housekeeping(self):
        """Apply due transitions, delete rows past their retention, store the history and the time."""
        now = time.monotonic()
        with self.store.transaction() as tx:
            tx.after_commit(self.registry.forget_silent, tx.now)
            tx.after_commit(self.live.forget_old, tx.now)
            if self.next_due <= tx.now:
                self.apply_due(tx)
            if self._clean_at <= now:
                full = max(self._clean(tx).values()) >= SLICE_ROWS
                self._clean_at = now + (0 if full else CLEAN_SECONDS)
            if self._history_at <= now and (self.log.minutes or self.log.figures):
                self._store_history(tx)
                self._history_at = now + USAGE_SECONDS
            if self._note_at <= now and self.next_due < FOREVER:
                self._note_time(tx)
                self._note_at = now + CLOCK_RECORD_SECONDS

    def close(self):
        """Store the history and the time, which are kept in memory."""
        with self.store.transaction() as tx:
            self._store_history(tx)
            self._note_time(tx)

    def _clean(self, tx):
        """Delete rows past their retention, SLICE_ROWS at most of each kind; return the number of each kind."""
        longer, until = self._kept
        ended = tx.delete_old(tx.now - self._retention - (longer if tx.now < until else 0), SLICE_ROWS)
        tx.clamp_ended(tx.now, SLICE_ROWS)
        if ended:
            tx.drop_empty_tallies()
        kinds = collections.Counter(ended + tx.forget_expired(SLICE_ROWS))
        return {f"{kind}_deleted": kinds[kind] for kind in ("fulfilled", "dead", "store", "idempotency", "nonces")}

    def _store_history(self, tx):
        counted, figures = collections.Counter(self.log.minutes), collections.Counter(self.log.figures)
        if counted:
            tx.count_events([dict(minute=minute, event=event, times=times) for (minute, event), times in sorted(counted.items())])
        if figures:
            tx.count_figures([dict(zip(("minute", "owner", "namespace", "goal", "event"), figure), times=times)
                              for figure, times in sorted(figures.items())], tx.now)
        tx.after_commit(self.log.stored, counted, figures)
        if time.monotonic() < self._figures_at:     # until the summary reads them again
            tx.after_commit(self._figures.extend, [(*figure[1:], times, times) for figure, times in figures.items()])

    def _note_time(self, tx, step=0, kept=None):
        """Store the time, with a step of the wall clock added."""
        tx.remember("clock", "", "", to_json(dict(self.clock.note(step), kept=kept or self._kept)), FOREVER)


# ---- 11. Keys ----
# Who is asking: the credentials of a request become a Caller, or an error. And where this machine keeps its key.

ISSUED = re.compile(r"tk_([0-9a-f]{16})[0-9a-f]{40}")
TIMESTAMP = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?", re.ASCII)
DELIMITER = r"[?#\x00-\x1f\x7f-\x9f]|%[0-9A-Fa-f]{2}"     # any other percent sign is none: no path is sent with it
CODE_LETTERS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"     # of Crockford's Base32: none is easily mistaken for another
CODE_MISREADINGS = str.maketrans("OIL", "011")


def presented_key(headers):
    """Return the key in a request's headers (names in lower case), or None: X-API-KEY, Bearer or Basic, in this order."""
    if "x-api-key" in headers:
        return headers["x-api-key"]
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return basic_credentials(headers)[1]


def basic_credentials(headers):
    """Return (user, password) of HTTP Basic (RFC 7617), or (None, None)."""
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None, None
    try:
        user, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        return "", ""
    return user, password


def badly_encoded():
    """Return the error for a target that cannot be decoded."""
    return Invalid(f"The path and query must be percent-encoded UTF-8, of at most {QUERY_PARAMETERS} parameters.")


def plain_address(text):
    """Return the IP address in a text, in its one spelling and without port, or the text; at most 64 characters."""
    import ipaddress     # not at the top: only the bus pays for it
    bare = text.strip(' "')
    host = bare[1:].partition("]")[0] if bare.startswith("[") else bare.partition(":")[0] if bare.count(":") == 1 else bare
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return text[:64]
    return str(getattr(address, "ipv4_mapped", None) or address)[:64]     # a scope may be long


def network_of(peer):
    """Return the network that an address belongs to: one host can have all addresses of an IPv6 /64."""
    import ipaddress
    with contextlib.suppress(ValueError):
        return ipaddress.IPv6Address(peer).packed[:8]
    return peer


def query_pairs(query):
    """Return the decoded (name, value) pairs of a query; raises Invalid."""
    try:
        return urllib.parse.parse_qsl(query, True, errors="strict", max_num_fields=QUERY_PARAMETERS)
    except ValueError as error:
        raise badly_encoded() from error


def hmac_of(key, text, body=b""):
    """Return the HMAC-SHA256 of a text and a body, in hex."""
    return hmac.digest(key.encode(), text.encode() + body, "sha256").hex()


def sign(key, method, target, timestamp, nonce, body):
    """Return the signature of a request, as the Intent Protocol 2.0 defines it; target is one of canonical_targets()."""
    return hmac_of(key, f"{method}\n{target}\n{timestamp}\n{nonce}\n", body)


def canonical_targets(path, raw_path, query):
    """Return the forms in which the target of a request may be signed; clients of ours sign the first.

    path is the decoded raw_path. Where it holds a delimiter, it is also that of another request, and only raw_path counts.
    """
    paths = (raw_path,) if path == raw_path or re.search(DELIMITER, path) else (path, raw_path)
    if not query:
        return paths
    return [f"{form}?{parameters}" if parameters else form for form in paths for parameters in canonical_queries(query)]


@functools.lru_cache(maxsize=CACHED_QUERIES)
def canonical_queries(query):
    """Return the canonical forms of a query: sorted by name and value; and by name, with repeats in the order sent."""
    quote = functools.partial(urllib.parse.quote, safe="")
    pairs = query_pairs(query)
    ordered = sorted(pairs), sorted(pairs, key=operator.itemgetter(0))
    return tuple(dict.fromkeys("&".join(f"{quote(name)}={quote(value)}" for name, value in pairs) for pairs in ordered))


def secrets_equal(given, secret):
    """Return whether two strings are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest((given or "").encode(), secret.encode())


def unsigned():
    """Return the error for a request without a signature where one is needed."""
    return Forbidden("Missing required signature headers.", "invalid_signature")


class TokenBucket:
    """A token bucket per name: it holds a minute's rate, and fills evenly."""

    def __init__(self, per_minute):
        self._per_second, self._size = per_minute / 60, per_minute
        self._left = {}     # name: (tokens, at which time)

    def take(self, name, number=1, force=False):
        """Take tokens, or give them back if number is negative; return how many seconds to wait if there are too few.

        With force, they are taken all the same: the next ones have to wait for longer.
        """
        now = time.monotonic()
        if len(self._left) > 10_000:     # addresses are many; a forgotten one gains a minute's rate
            self._left.clear()
        left = self._tokens(name, now)
        if left < number and not force:
            return (number - left) / self._per_second
        self._left[name] = min(self._size, left - number), now
        return 0

    def delay(self, name):
        """Return how many seconds to wait for a token, without taking one."""
        return max(0, 1 - self._tokens(name, time.monotonic())) / self._per_second

    def _tokens(self, name, now):
        left, since = self._left.get(name, (self._size, now))
        return min(self._size, left + (now - since) * self._per_second)


class RecentNonces:
    """The nonces of one key's signed GETs, in memory: at most READ_NONCES, those with the latest timestamps.

    A timestamp up to the floor is stale: an earlier bus may have accepted it, or its nonce may be forgotten.
    """

    def __init__(self, floor):
        self._floor = self._latest = floor         # Unix seconds
        self._known, self._kept = set(), []        # _kept: a heap of (timestamp, nonce, until when by time.monotonic())

    def is_stale(self, timestamp, now):
        """Return whether a timestamp is up to the floor, which follows a clock that is set back."""
        if now < self._latest:
            self._floor = min(self._floor, now - TIMESTAMP_SECONDS)
        self._latest = now
        return timestamp <= self._floor

    def know(self, nonce):
        """Return whether a nonce is remembered."""
        return nonce in self._known

    def add(self, timestamp, nonce, until):
        """Remember a nonce; if there are too many, forget that with the earliest timestamp."""
        self._known.add(nonce)
        heapq.heappush(self._kept, (timestamp, nonce, until))
        if len(self._kept) > READ_NONCES:
            self._floor = max(self._floor, self._kept[0][0])
            self._forget_first()

    def forget_until(self, steady):
        """Forget nonces that were to be kept until then: their timestamps are stale."""
        while self._kept and self._kept[0][2] <= steady:
            self._forget_first()

    def _forget_first(self):
        self._known.remove(heapq.heappop(self._kept)[1])


class Keys:
    """The keys of a bus.

    An issued key is its id and a MAC of the id under the owner key, so the database holds no key. An admin presents
    admin_secret or dashboard_password. Where neither is set, the owner key is the admin's; otherwise it is a key like others,
    without their limits.
    """

    def __init__(self, owner_key, store, admin_secret=None, dashboard_password=None, metrics_token=None,
                 require_signatures=False, rate=RATE_PER_MINUTE, limits=None):
        self._owner_key, self._store = owner_key, store
        self._admin_secret, self._dashboard_password = admin_secret, dashboard_password
        self._metrics_token, self._require_signatures = metrics_token, require_signatures
        self._rate = (store.database.token_bucket or TokenBucket)(rate)
        self._failures = TokenBucket(FAILURES_PER_MINUTE)
        self.limits = limits or Limits(UNFINISHED, STORED_BYTES)
        self._owner = OWNER._replace(admin=not (admin_secret or dashboard_password))
        lost = not (store.database.new or store.database.shared)     # the nonces of GETs that an earlier bus has known
        floor = store.now() - TIMESTAMP_SECONDS if lost else 0
        self._read_nonces = collections.defaultdict(lambda: RecentNonces(floor))     # by key id
        self._callers = {}    # key id: Caller, of issued keys; a shared database is asked each time
        self._used = collections.deque()    # (key id, Unix seconds) of requests, until they are stored
        self._usage_at = 0                  # when to store them, by time.monotonic()
        self.on_revoked = lambda key_id: None     # ends the requests that are held for it; a server that holds some sets it
        self.reload()

    def reload(self):
        """Read the issued keys, at the start and once another program has changed the file."""
        if not self._store.database.shared:
            before, self._callers = self._callers, {key.key_id: self._caller_of(key) for key in self._store.keys()}
            for key_id in before.keys() - self._callers.keys():
                self.on_revoked(key_id)

    # -- Requests --

    def identify(self, request):
        """Find the key that the head of a request presents; raises Unauthorized if the bus has not issued it.

        Sets key_id; signing_key, if confirm() has a signature to check; and proven, false for a mere X-Key-ID.
        """
        headers, presented = request.headers, presented_key(request.headers)
        signed = "x-signature" in headers
        if presented is None and not (signed and "x-key-id" in headers):
            raise Unauthorized("Missing API key.")
        issued = ISSUED.fullmatch(presented or "")
        request.key_id = headers["x-key-id"] if presented is None else issued[1] if issued else "owner"
        key = self._key(request.key_id)
        if presented is not None and not secrets_equal(presented, key):
            raise self._failed(request, Unauthorized("Invalid API key."))
        request.proven = presented is not None
        request.signing_key = key if signed or self._require_signatures else None

    def identify_holder(self, request):
        """Find the claim token in the head of a request for a step; raises Unauthorized. It is the only credential of a handler."""
        if "x-claim-token" not in request.headers:
            raise Unauthorized("A step needs the claim token of its intent, in X-Claim-Token.")
        self._require_safe_way(request)

    def identify_admin(self, request):
        """Check the admin's credentials in the head of a request; raises Unauthorized, Forbidden."""
        if self._has_admin_secret(request):
            return self._admit_unsigned(request)
        if self._owner.admin or request.who == "view":
            with contextlib.suppress(Unauthorized):
                self.identify(request)
                if request.key_id == "owner" or request.who == "view":     # confirm() refuses all but viewers
                    return
        raise self._no_admin(request)

    def _has_admin_secret(self, request):
        """Return whether a request presents an admin secret; as the password of a browser, the owner key may be one."""
        user, password = basic_credentials(request.headers)
        right = self._dashboard_password or (self._owner_key if self._owner.admin else "")
        if self._admin_secret and secrets_equal(request.headers.get("x-admin-token"), self._admin_secret):
            return True
        return user == "admin" and bool(right) and secrets_equal(password, right)

    def identify_scraper(self, request):
        """Check that a request may read the metrics; raises Unauthorized, Forbidden."""
        if self._metrics_token and secrets_equal(presented_key(request.headers), self._metrics_token):
            self._admit_unsigned(request)
        else:
            self.identify_admin(request)

    def _admit_unsigned(self, request):
        """Let an admin in without a signature."""
        self._require_safe_way(request)
        request.caller, request.proven = OWNER, True

    def _require_safe_way(self, request):
        """Raise Forbidden if signatures are required and a request without one came neither over https nor from this machine."""
        if self._require_signatures and not (request.secure or request.local):
            raise unsigned()

    def presents_admin(self, request):
        """Return whether a request has an admin's credentials, right or wrong, rather than a key."""
        return "x-admin-token" in request.headers or basic_credentials(request.headers)[0] == "admin" and (
            bool(self._dashboard_password) or self._has_admin_secret(request))

    def presents_right_admin(self, request):
        """Return whether the head of a request has an admin's credentials; raises Unauthorized for wrong ones.

        A signature by the owner key counts as right until confirm() checks it.
        """
        headers = request.headers
        if self.presents_admin(request) or self._owner.admin and basic_credentials(headers)[0] == "admin":
            self.identify_admin(request)
            request.caller = None     # the endpoint asks for its own credentials
            return True
        if not self._owner.admin or presented_key(headers) is None and "x-key-id" not in headers:
            return False
        self.identify(request)
        return request.key_id == "owner"

    def confirm(self, request):
        """Find the Caller of a whole request, check its signature, count it; raises Unauthorized, Forbidden, RateLimited.

        A request counts once its signature is right, and its nonce is stored last: a refusal writes nothing.
        """
        caller = request.caller or (self._holder(request) if request.who == "step" else self._caller(request.key_id))
        if request.who == "view" and not (caller and (caller.admin or caller.role == "viewer")):
            raise self._no_admin(request)
        if caller is None:
            raise self._failed(request, Unauthorized("Invalid API key."))
        if request.signing_key:
            self._require_rate(caller, self._rate.delay)
            self._check_signature(request)
        self._require_rate(caller, self._rate.take)
        if request.signing_key and not self._spend_nonce(request):
            self.charge(caller, -1)
            raise Forbidden("Replay detected", "invalid_signature")
        if caller.limits:
            self._used.append((caller.key_id, self._store.now()))
        request.caller, request.proven = caller, True

    def _holder(self, request):
        """Return the Caller that has claimed the intent of a request with its claim token; raises NotFound as a report does."""
        intent_id, = request.place
        try:
            intent = self._store.get(intent_id)
        except NotFound:
            intent = None
        token_hash = hash_token(request.headers["x-claim-token"])
        caller = intent and secrets_equal(intent.claim_token_hash, token_hash) and self._caller(intent.claim_key)
        if not caller:
            raise self._failed(request, lease_lost(intent_id))
        return caller

    def current(self, caller):
        """Return the Caller that the key of an earlier request stands for now, or None if it has ended."""
        return self._caller(caller.key_id) if caller.limits else caller

    def owner_of(self, publisher):
        """Return the owner that a publisher stands for: an owner's name, a key, or the id of a key; None for None."""
        if publisher is None:
            return None
        issued = ISSUED.fullmatch(publisher)
        key_id = issued[1] if issued else "owner"
        if secrets_equal(publisher, self._key(key_id)):
            publisher = key_id
        caller = self._caller(publisher)
        return caller.owner if caller else publisher

    def charge(self, caller, number):
        """Take more tokens for the last request of an issued key, or give them back if number is negative."""
        if number and caller.limits:
            self._rate.take(caller.key_id, number, force=True)

    # -- Issuing --

    # A grant describes a new key: the fields of GENERATE_KEY.

    def generate(self, **grant):
        """Issue a key; return it, this once, with its description."""
        with self._store.transaction() as tx:
            return self._add(tx, grant)

    def invite(self, **grant):
        """Return a code that join() exchanges for a key like this, once, within INVITATION_SECONDS.

        The first half of the code names the invitation; the second is secret, and the database has a MAC of it.
        """
        with self._store.transaction() as tx:
            expires_at, made = min(tx.now + INVITATION_SECONDS, grant["expires_at"] or FOREVER), False
            while not made:     # the first half may be taken
                handle, secret = ("".join(random.SystemRandom().choices(CODE_LETTERS, k=4)) for _ in range(2))
                invitation = dict(grant, mac=hmac_of(self._owner_key, f"invited {handle}{secret}"), tries=0)
                made = tx.remember_first("invitation", "", handle, to_json(invitation), expires_at)
        return Record(code=f"{handle}-{secret}", expires_at=expires_at, **Record(grant).pick(("name", "owner", "role")))

    def join(self, request, code):
        """Return the key that an invitation is for; raises Unauthorized. INVITATION_TRIES wrong codes end it."""
        letters = re.sub(r"[-\s]", "", code).upper().translate(CODE_MISREADINGS)
        handle, mac = letters[:4], hmac_of(self._owner_key, f"invited {letters}")
        with self._store.transaction() as tx:
            found, expires_at = tx.take_memo("invitation", "", handle)
            invitation = found and Record(json.loads(found))
            if invitation and secrets_equal(invitation.mac, mac):
                return self._add(tx, invitation)
            if invitation and invitation.tries + 1 < INVITATION_TRIES:
                tx.remember("invitation", "", handle, to_json(dict(invitation, tries=invitation.tries + 1)), expires_at)
        raise self._failed(request, Unauthorized("This code is wrong, used, or too old; ask for a new one."))

    def revoke(self, api_key=None, key_id=None):
        """End an issued key, given itself or its id; return its id; raises NotFound."""
        issued = ISSUED.fullmatch(api_key or "")
        key_id = issued[1] if issued else key_id or ""
        with self._store.transaction() as tx:
            if not tx.revoke_key(key_id):
                raise NotFound("There is no key with this id; keys list shows the ids.")
            tx.after_commit(self._callers.pop, key_id, None)
            tx.after_commit(self.on_revoked, key_id)
        return key_id

    def list(self, caller=OWNER):
        """Return the description of each issued key that a caller may look at, with its use up to now."""
        requests, last = self._usage()
        return [Record(key, total_requests=key.total_requests + requests[key.key_id],
                       last_used_at=last.get(key.key_id, key.last_used_at)) for key in self._store.keys() if caller.oversees(key)]

    def write_usage(self, at_once=False):
        """Store how often keys were used, every USAGE_SECONDS or at once."""
        if not self._used or not at_once and time.monotonic() < self._usage_at:
            return
        requests, last = self._usage()
        self._used, self._usage_at = collections.deque(), time.monotonic() + USAGE_SECONDS     # lost with its round
        with self._store.transaction() as tx:
            tx.count_usage([dict(key_id=key_id, requests=requests[key_id], last=last[key_id]) for key_id in sorted(last)])

    def forget_nonces(self):
        """Forget the nonces of GETs whose timestamps are stale."""
        steady = time.monotonic()
        for nonces in list(self._read_nonces.values()):
            nonces.forget_until(steady)

    def _usage(self):
        """Return how often keys were used since this was stored, and when last: both by key id."""
        used = list(self._used)
        return collections.Counter(key_id for key_id, _ in used), dict(used)

    def _add(self, tx, grant):
        """Issue a key; return it with its description. An invitation of an earlier version limits nothing."""
        key = Record(dict(goals=None, expires_at=None, payloads=False), **grant, key_id=os.urandom(8).hex())
        tx.add_key(key)
        tx.after_commit(self._callers.__setitem__, key.key_id, self._caller_of(key))
        return Record(api_key=self._key(key.key_id), **key.pick(("key_id", "name", "owner", "role")))

    def _key(self, key_id):
        if key_id == "owner":
            return self._owner_key
        return f"tk_{key_id}{hmac_of(self._owner_key, f'issued {key_id}')[:40]}"

    def _caller(self, key_id):
        """Return the Caller of a key that has not ended, or None."""
        if key_id == "owner":
            return self._owner
        if self._store.database.shared:
            key = self._store.key(key_id)
            caller = key and self._caller_of(key)
        else:
            caller = self._callers.get(key_id)
        return caller if caller and self._store.now() < caller.expires_at else None

    def _caller_of(self, key):
        return Caller(key.key_id, key.owner, key.role, False, self.limits, key.goals and tuple(key.goals),
                      key.expires_at or FOREVER, key.payloads or key.role != "viewer")

    def _check_signature(self, request):
        timestamp, nonce, signature = (request.headers.get(f"x-{part}") for part in ("timestamp", "nonce", "signature"))
        if not (timestamp and nonce and signature):
            raise unsigned()
        if not TIMESTAMP.fullmatch(timestamp):
            raise Forbidden("Invalid timestamp", "invalid_signature")
        now = self._store.now()
        if abs(float(timestamp) - now) > SIGNATURE_SECONDS or (
                request.reads and self._read_nonces[request.key_id].is_stale(float(timestamp), now)):
            proof = hmac_of(request.signing_key, f"{to_json(now)}\n{timestamp}\n{nonce}")     # that this bus knows the key
            raise Forbidden("Stale timestamp", "invalid_signature", server_time=now, mac=proof)
        targets = canonical_targets(request.path, request.raw_path, request.query)
        if not any(secrets_equal(signature, sign(request.signing_key, request.method, target, timestamp, nonce, request.body))
                   for target in targets):
            raise self._failed(request, Forbidden("Bad signature", "invalid_signature"))

    def _spend_nonce(self, request):
        """Remember the nonce of a request; return whether it is new. That of a GET is stored only if other buses need it."""
        nonce, now = request.headers["x-nonce"], self._store.now()
        if len(nonce) > NONCE_CHARACTERS:
            nonce = hashlib.sha256(nonce.encode()).hexdigest()
        seconds = 2 * SIGNATURE_SECONDS + 1     # its timestamp may be ahead
        reads = self._read_nonces[request.key_id]
        if reads.know(nonce):
            return False
        if request.reads and not self._store.database.shared:
            if self._store.recall("nonces", request.key_id, nonce, now) is not None:
                return False
            reads.add(float(request.headers["x-timestamp"]), nonce, time.monotonic() + seconds)
            return True
        with self._store.transaction() as tx:
            return tx.remember_first("nonces", request.key_id, nonce, "", now + seconds)

    def _no_admin(self, request):
        """Return the error for credentials that are not an admin's."""
        needed = "the owner key, which is on the machine of the bus" if self._owner.admin else "the bus's BUS_ADMIN_SECRET or DASHBOARD_PASSWORD"
        return self._failed(request, Unauthorized(f"Authentication required: this needs {needed}.",
                                                  headers=[("WWW-Authenticate", 'Basic realm="Intent Bus"')]))

    def _failed(self, request, error):
        """Return the error, delayed after repeated failures from one network."""
        if self._failures.take(network_of(request.peer)):
            error.delay_seconds = FAILURE_SECONDS
        return error

    def _require_rate(self, caller, wait):
        """Raise RateLimited if an issued key has to wait for a token, as a method of its bucket tells."""
        if caller.limits and (seconds := wait(caller.key_id)):
            raise RateLimited("This key sends too many requests; slow down.", headers=[("Retry-After", str(int(seconds) + 1))])


# A key file is read by the bus and by its clients.

def usable_key(key, source):
    """Return a key that a header can carry; raises SetupError for any other text."""
    if not re.fullmatch("[!-~]+", key):
        raise SetupError(f"{source} holds no key: a key is one word of printable ASCII characters.")
    return key


def secret_in(variable):
    """Return the secret in an environment variable, or None if it is unset or empty; raises SetupError if it is unusable.

    A password crosses the wire in Base64, so it may hold spaces and letters of any script.
    """
    secret = os.environ.get(variable, "").rstrip("\r\n")     # of a file with CR LF, the shell leaves the CR
    if secret and variable == "DASHBOARD_PASSWORD":
        if not secret.isprintable() or secret != secret.strip():
            raise SetupError(f"{variable} holds no password: it is printable, with no space at its ends.")
        return secret
    return usable_key(secret, variable) if secret else None


def in_home(path):
    """Return a path with the home folder for a ~ at its start; raises SetupError if it is unknown."""
    found = os.path.expanduser(path)
    if found.startswith("~"):     # a folder of that name would be made
        raise SetupError(f"The home folder for {path} is unknown: set {'HOME' if POSIX else 'USERPROFILE'}. For a key, --key-file, "
                         "INTENT_API_KEY or BUS_SECRET will do.")
    return found


def read_private(path, kind="key"):
    """Return the text of a file that others should not read, or None if there is no such file.

    Raises SetupError if it, or the link to it, belongs to others than this user and root, or if others can write it: they
    may have put it there. A secret that a container is given is root's, often readable by all, behind links.
    """
    path = in_home(path)
    if not os.path.lexists(path):
        return None
    try:
        status = os.stat(path)
        if POSIX and not {os.lstat(path).st_uid, status.st_uid} <= {0, os.getuid()}:
            raise SetupError(f"The {kind} file {path} belongs to another user; make it a file of your own.")
        if POSIX and status.st_mode & 0o002:
            raise SetupError(f"Others can write the {kind} file {path}; check it, and run: chmod 600 {path}")
        if POSIX and status.st_mode & 0o077 and status.st_uid == os.getuid():
            warnings.warn(f"Others can read the {kind} file {path}; run: chmod 600 {path}")
        with open(path, "rb") as file:
            return without_mark(file.read()).decode(errors="replace")     # a key that is not UTF-8 is refused by its user
    except OSError as error:
        raise SetupError(f"The {kind} file {path} cannot be read: {error.strerror}.") from error
    except Invalid as error:
        raise SetupError(f"The {kind} file {path} cannot be used: {error}") from error


def read_key(path=KEY_FILE):
    """Return the key in a file, or None if there is no such file; raises SetupError, as read_private does."""
    text = read_private(path)
    return None if text is None else usable_key(text.strip(), f"The key file {path}")


def make_key(path=KEY_FILE):
    """Write a new random key into a file that only its owner can read, and return the key."""
    key = os.urandom(24).hex()
    try:
        descriptor = os.open(in_home(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(key + "\n")
            file.flush()
            os.fsync(file.fileno())     # a lost owner key would end all issued keys
    except OSError as error:
        raise SetupError(f"The key file {path} cannot be made: {error.strerror}.") from error
    return key


# ---- 12. Fields ----
# The fields of bodies and queries, as data: name, validator, default. A validator returns the value, or raises ValueError
# with the rest of the sentence that begins with the field's name.

REQUIRED = object()
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
BAD_ESCAPE = "%(?![0-9A-Fa-f]{2})"
DIGITS = r"[0-9]{1,15}(\.[0-9]{1,20})?"
JSON_STRINGS = re.compile(rb'"(?:[^"\\]+|\\.)*"?', re.DOTALL)     # to the end, closed or not
BRACKETS, NO_BRACKETS = bytes.maketrans(b"{}", b"[]"), bytes(set(range(256)) - set(b"[]{}"))


def must_be(words, accepts):
    """Return the validator of values that a predicate accepts; the words describe them."""
    def validator(value):
        if not accepts(value):
            raise ValueError(f"must be {words}")
        return value
    return validator


def number_from(low, high, kinds=(int, float), words="a number"):
    """Accept a number from low to high."""
    return must_be(f"{words} from {low} to {high}", lambda value: isinstance(value, kinds) and not isinstance(value, bool)
                   and low <= value <= high)


def integer_from(low, high):
    """Accept a whole number from low to high."""
    return number_from(low, high, int, "a whole number")


def choice(*words):
    """Accept one of these words."""
    return must_be(" or ".join(f'"{word}"' for word in words), lambda value: value in words)


def text_of(low, high):
    """Accept a string of that many characters after trimming, without control characters."""
    accept = must_be(f"a string of {low} to {high} characters, with no control characters",
                     lambda value: low <= len(value) <= high and not CONTROL.search(value))
    return lambda value: accept(value.strip() if isinstance(value, str) else "\0")


def word_of(characters):
    """Accept a string of 1 to 64 of these characters."""
    pattern = re.compile(f"[{characters.replace(' ', '')}]{{1,64}}", re.ASCII)
    return must_be(f"1 to 64 characters of {characters}",
                   lambda value: isinstance(value, str) and pattern.fullmatch(value))


anything = must_be("any JSON value", lambda value: True)
any_payload = must_be("any JSON value", lambda value: True)
running_limit = must_be("a whole number from 1 to 1000, or null",
                        lambda value: value is None or type(value) is int and 1 <= value <= 1000)
TAKE_NULL = (any_payload, running_limit)     # elsewhere, null counts as absent
boolean = must_be("true or false", lambda value: isinstance(value, bool))
string = must_be("a string", lambda value: isinstance(value, str))
namespace_word = word_of("A-Z a-z 0-9 . _ -")
token_word = word_of("A-Z a-z 0-9 . _ : -")
goal_word = text_of(1, 256)
unix_seconds = number_from(0, 2 ** 40)


def label(value):
    """Accept any string, to be shown; control characters in it are replaced, and it is cut at 64 characters."""
    return CONTROL.sub("?", string(value).strip())[:64]


def labels(value):
    """Accept strings to be shown, separated by commas."""
    return tuple(label(part) for part in string(value).split(",") if part.strip())


def is_blank(value):
    """Return whether a value is a string of white space."""
    return isinstance(value, str) and not value.strip()


def list_of(validator):
    """Accept a list of values that a validator accepts, or a single one."""
    return lambda value: [validator(item) for item in (value if isinstance(value, list) else [value])]


def goal_names(value):
    """Accept a list of 1 to KEY_GOALS goals; an empty one must not stand for any goal."""
    must_be(f"a list of 1 to {KEY_GOALS} goals", lambda value: isinstance(value, list) and 0 < len(value) <= KEY_GOALS)(value)
    return list(dict.fromkeys(map(goal_word, value)))


def from_query(validator):
    """Accept the text of a query for a value that a validator accepts: a string, a number in digits, or true, false, 1, 0."""
    if validator is boolean:
        return lambda value: choice("true", "false", "1", "0")(value) in ("true", "1")
    def read(value):
        with contextlib.suppress(ValueError):
            return validator(value)
        return validator(value if not re.fullmatch(DIGITS, value) else float(value) if "." in value else int(value))
    return read


def validate(fields, values, kind="field"):
    """Return the values of all fields, the default of an absent or null one; raises Invalid, naming the field."""
    if not isinstance(values, dict):
        raise Invalid('The body must be a JSON object, such as {"goal": "send_notification", "payload": "hi"}.')
    if fields.strict and (unknown := values.keys() - fields.keys()):
        raise Invalid(f"Unknown {kind} {min(unknown)[:64]!r}; there are: {', '.join(fields) or 'none'}.")
    found = fields.defaults.copy()
    for field, value in values.items():
        if field not in fields or value is None and fields[field] not in TAKE_NULL or is_blank(value) and field in fields.optional:
            continue
        try:
            found[field] = fields[field](value)
        except ValueError as error:
            raise Invalid(f"{field} {error}.", code=f"invalid_{field}") from error
    for field in fields.required:
        if field not in found:
            raise Invalid(f"{field} is required.", code=f"invalid_{field}")
    return found


def decoded_path(raw_path):
    """Return a path with its percent escapes decoded; raises Invalid."""
    try:
        return urllib.parse.unquote(raw_path, errors="strict")
    except ValueError as error:
        raise badly_encoded() from error


def validate_query(fields, query):
    """Return the validated parameters of a query; only goal may be given more than once."""
    values = {}
    for field, value in query_pairs(query):
        values.setdefault(field, []).append(value)
    for field, given in values.items():
        if len(given) > 1 and field != "goal":
            raise Invalid(f"{field} was given twice.", code=f"invalid_{field}" if field in fields else None)
    return validate(fields, {field: given if len(given) > 1 else given[0] for field, given in values.items()}, "parameter")


class Fields(dict):
    """Validators by name. It is made from {name: (validator, default)}; a REQUIRED field has no default.

    Unless it is strict, other fields are ignored; it is strict where a mistyped name could widen a request. A blank string in
    an optional field counts as absent; elsewhere it is refused, so that an unset shell variable widens nothing.
    """

    def __init__(self, table, strict=True, optional=()):
        self.strict, self.optional = strict, optional
        super().__init__((field, validator) for field, (validator, _) in table.items())
        self.defaults = {field: default for field, (_, default) in table.items() if default is not REQUIRED}
        self.required = [field for field, (_, default) in table.items() if default is REQUIRED]
        self.of_query = functools.lru_cache(maxsize=CACHED_QUERIES)(functools.partial(validate_query, self))


LIMITS = {     # of a publish
    "namespace": namespace_word,
    "visibility": choice("private", "public"),
    "priority": integer_from(0, 1000),
    "delay": number_from(0, YEAR_SECONDS),
    "run_at": unix_seconds,
    "ttl": number_from(1, YEAR_SECONDS),
    "max_attempts": integer_from(1, 20),
    "backoff_base": number_from(1, 3600),
    "target_worker": token_word,
    "required_capability": token_word,
    "unique": text_of(1, 128),
    "replace": boolean,
    "on_success": goal_word,
    "on_failure": goal_word,
    "stream": boolean,
}
GOAL = (goal_word, None)
TOKEN = (string, None)
WAIT_SECONDS = (from_query(number_from(0, WAIT_MAX_SECONDS)), 0)

INTENT = {
    "goal": (goal_word, REQUIRED),
    "payload": (any_payload, REQUIRED),
    **{field: (LIMITS[field], default) for field, default in PUBLISH_DEFAULTS.items()},
    "reward": (anything, None),     # of the 1.x protocol, without effect
}
OPTIONAL = ("target_worker", "required_capability", "idempotency_key")
IDEMPOTENCY = Fields({"idempotency_key": (text_of(1, 255), None)}, optional=OPTIONAL)
PUBLISH = Fields({**INTENT, "idempotency_key": (text_of(1, 255), None)}, optional=OPTIONAL)
PUBLISH_OF_MANY = Fields(INTENT, optional=OPTIONAL)     # one of several, which share an idempotency key
PUBLISH_QUERY = Fields({field: (from_query(PUBLISH[field]), PUBLISH.defaults.get(field))     # the path has the goal
                        for field in PUBLISH if field not in ("goal", "payload")}, optional=OPTIONAL)
OF_OWNER = Fields({"owner": (text_of(1, 64), None)})     # an admin may name another one
SCHEDULE = Fields({
    **{field: given for field, given in INTENT.items() if field not in ("delay", "run_at", "unique", "replace", "reward")},
    "every": (number_from(*EVERY_RANGE_SECONDS), None),
    "cron": (lambda value: read_cron(string(value)) and value, None),
    "timezone": (lambda value: clock_of(string(value)) and value, None),
    "overlap": (choice("skip", "allow"), "skip"),
    "paused": (boolean, False),
    "owner": (text_of(1, 64), None),
}, optional=OPTIONAL)
PAUSE_SCHEDULE = Fields({"paused": (boolean, REQUIRED), "owner": (text_of(1, 64), None)})     # alone: all else stays as it is
CLAIM_QUERY = {
    "goal": (list_of(goal_word), None),
    "namespace": (namespace_word, "default"),
    "publisher": GOAL,
    "worker_id": (label, None),
    "capabilities": (labels, ()),
    "capability": (labels, ()),     # another name of it in the 1.x protocol
    "lease": (from_query(number_from(*LEASE_RANGE_SECONDS)), LEASE_SECONDS),
}
BLANKS = ("namespace", "publisher", "worker_id", "capabilities", "capability")
CLAIM = Fields({**CLAIM_QUERY, "wait": WAIT_SECONDS}, optional=BLANKS)
NEXT_CLAIM = Fields({**CLAIM_QUERY, "next": (choice("1"), REQUIRED)}, optional=BLANKS)     # in a report
OWN_TOKEN = (text_of(32, 64), None)     # one of the client's own, for a claim that can be repeated
CLAIM_BODY = Fields({"claim_token": OWN_TOKEN})
CLAIM_HEADERS = Fields({"worker_id": (label, None), "capabilities": (labels, ()), "claim_token": OWN_TOKEN},
                       optional=("worker_id", "capabilities"))
REPORT = {"claim_token": TOKEN, "next_token": OWN_TOKEN}     # next_token: for the claim of the next intent
EXTEND = Fields({"claim_token": TOKEN, "seconds": (number_from(0, YEAR_SECONDS), LEASE_SECONDS)}, strict=False)
PROGRESS = Fields({"claim_token": TOKEN, "percent": (number_from(0, 100), None), "message": (string, None), "output": (string, None)},
                  strict=False)
STEP_REPORT = Fields({
    "name": (text_of(1, 128), REQUIRED),
    "output": (must_be(f"text of at most {STEP_BYTES} bytes; write more to a file, and keep its name",
                       lambda value: isinstance(value, str) and bytes_of(value) <= STEP_BYTES), None),
    "seconds": (number_from(0, YEAR_SECONDS), None),
})
FULFILL = Fields({**REPORT, "result": (anything, None), "result_type": (choice("json", "text"), "json")}, strict=False)
FAIL = Fields({**REPORT, "error": (anything, None), "retry": (boolean, True)}, strict=False)
RELEASE = Fields({**REPORT, "delay": (number_from(0, YEAR_SECONDS), 0)}, strict=False)
RESULT = Fields({"wait": WAIT_SECONDS}, strict=False)
OUTPUT = Fields({"after": (from_query(integer_from(0, 2 ** 49)), 0), "wait": WAIT_SECONDS}, strict=False)
EVENTS_QUERY = Fields({"after": (from_query(integer_from(0, 2 ** 49)), None), "wait": WAIT_SECONDS}, strict=False)
LIST = Fields({
    "status": (choice("open", "delayed", "claimed", "fulfilled", "dead"), None),
    "goal": GOAL,
    "namespace": (namespace_word, None),
    "limit": (from_query(integer_from(1, 500)), 50),
    "before": (must_be("the id of an intent", lambda value: re.fullmatch("[0-9a-f]{1,32}", value)), None),
    "payload": (from_query(integer_from(0, 1)), 0),
    "preview": (from_query(integer_from(0, PREVIEW_CHARACTERS)), 0),
    "search": (text_of(1, 256), None),
})
STATUSES = ("open", "claimed", "fulfilled", "dead")
WHICH = {"goal": GOAL, "namespace": (namespace_word, None), "until": (unix_seconds, None)}
RETRY_ONE = Fields({"from_start": (boolean, False)})
RETRY = Fields({**WHICH, "count": (boolean, False), "limit": (integer_from(1, 1000), 1000)})
IDS = {"ids": (list_of(string), None)}
SWEEP = Fields({**WHICH, **IDS, "action": (choice("count", "retry", "delete"), REQUIRED)})
CONFIRMED = {**WHICH, **IDS, "count": (boolean, False), "confirm": (boolean, False)}
PURGE = Fields({**CONFIRMED, "status": (choice(*STATUSES), None)})
CANCEL = Fields({**CONFIRMED, "status": (choice("open", "claimed"), None)})
SUMMARY = Fields({"minutes": (from_query(integer_from(1, HISTORY_MINUTES)), 60)})
SET = Fields({"value": (anything, REQUIRED), "ttl": (number_from(1, 86400), VALUE_TTL_SECONDS), "if_absent": (boolean, False)})
SET_QUERY = Fields({field: (from_query(SET[field]), SET.defaults.get(field, REQUIRED)) for field in SET})
SCHEDULE_NAME = Fields({"name": (must_be("1 to 128 characters, no control characters", lambda name: len(name) <= 128
                                         and not CONTROL.search(name)), REQUIRED)})
VALUE_KEY = Fields({"key": (must_be(f"at most {VALUE_KEY_CHARACTERS} characters",
                                    lambda key: len(key) <= VALUE_KEY_CHARACTERS), REQUIRED)})
GENERATE_KEY = Fields({
    "owner": (text_of(1, 64), "anonymous"),
    "name": (text_of(1, 64), ""),
    "role": (choice("publish", "work", "both", "viewer"), "both"),
    "goals": (goal_names, None),
    "expires_at": (unix_seconds, None),
    "payloads": (boolean, False),
}, optional=("owner",))
JOIN = Fields({"code": (string, REQUIRED)})
REVOKE_KEY = Fields({"api_key": (string, None), "key_id": (string, None)})
LIMITED_GOAL = Fields({"goal": (goal_word, REQUIRED)})
LIMIT = Fields({
    "running": (running_limit, UNCHANGED),
    "paused": (boolean, None),
    "namespace": (namespace_word, "default"),
})
NOTHING, ANYTHING = Fields({}), Fields({}, strict=False)


class NotJson(Invalid):
    """A text that is not JSON at all."""


def finite(digits):
    """Return the float of these digits; refuse NaN and Infinity, which JSON does not have (RFC 8259, section 6)."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:32]} is not a JSON number")
    return value


DECODER = json.JSONDecoder(parse_constant=finite, parse_float=finite)


def from_json(body, depth=JSON_DEPTH):
    """Return the value of a JSON text in bytes; raises Invalid for text that is no JSON, or cannot be stored as it is."""
    body = without_mark(body)
    require_shallow(body, depth)
    try:
        value = DECODER.decode(body.decode())
        if b"\\u" in body:
            to_json(value).encode()     # half of a surrogate pair cannot be written as UTF-8
    except UnicodeError as error:
        raise Invalid("The JSON is not valid Unicode: UTF-8, with no lone surrogates.", code="invalid_json") from error
    except ValueError as error:
        reason = "a number has too many digits" if "int_max_str_digits" in str(error) else error
        raise NotJson(f"This is not valid JSON: {reason}.", code="invalid_json") from error
    return value


def from_json_or_text(data):
    """Return the value of bytes that may be JSON; raises Invalid if they are plain text.

    A number counts as JSON only if writing it gives the same text: 1.10 may be a version, 12345e6 an id.
    """
    value = from_json(data)
    if type(value) in (int, float) and to_json(value).encode() != without_mark(data):     # a bool is an int to isinstance()
        raise Invalid("JSON would write this number in another way.", code="invalid_json")
    return value


def decoded_text(data):
    """Return text in bytes as a string, without a byte order mark; raises Invalid unless it is UTF-8."""
    try:
        return without_mark(data).decode()
    except UnicodeDecodeError as error:
        raise Invalid("This text is not UTF-8.", code="invalid_payload") from error


def as_text(value):
    """Return a JSON value as text: a string as it is, null as an empty text, anything else as JSON."""
    return value if isinstance(value, str) else "" if value is None else to_json(value)


def require_shallow(body, limit):
    """Raise Invalid if the brackets of a JSON text are nested deeper than limit."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    brackets = JSON_STRINGS.sub(b"", body).translate(BRACKETS, NO_BRACKETS)
    for _ in range(limit + 1):     # the innermost pairs go in each pass
        before, brackets = brackets, brackets.replace(b"[]", b"")
        if brackets == before:     # none is left, or it is no JSON; the parser takes stack for each until it finds out
            if brackets.count(b"[") > limit:
                raise NotJson(f"The JSON is nested deeper than {limit} levels, and not closed.", code="invalid_json")
            return
    raise Invalid(f"The JSON is nested deeper than {limit} levels.", code="invalid_json")


# ---- 13. Page ----
# The dashboard. The page holds no data: its script asks the API, and writes the answers as text only. The content policy
# lets nothing else run or load: it names script and style by their hashes.

HOME = f"intentbus {__version__}: a job published here is done by a worker elsewhere.\n"


class Redirect(str):
    """The path that a browser is sent to, relative to the one it asked for: the bus may be behind a proxy, below a path."""


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
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>intentbus</title><link rel="icon" href="data:,">
<style>
:root { --ground: #f6f7f9; --card: #fff; --ink: #1a2130; --soft: #566074; --line: #dde1e8; --main: #1f5fd0; --bad: #b3261e;
--good: #176b39; --wait: #8a5200; --on: #fff; }
@media (prefers-color-scheme: dark) { :root { --ground: #12151b; --card: #1b2029; --ink: #e7eaf0; --soft: #a2acbd; --line:
#323a48; --main: #8ab4ff; --bad: #ff9c93; --good: #7fd6a0; --wait: #f2bd6b; --on: #0d1526; } }
* { box-sizing: border-box; } body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.4 system-ui,
sans-serif; overflow-wrap: anywhere; } header, main { max-width: 1560px; margin: 0 auto; padding: 0 16px; } header { display:
flex; flex-wrap: wrap; align-items: center; padding-top: 6px; min-height: 50px; } header b { font-size: 18px; margin-right:
16px; } nav { display: flex; flex: 1; } #out button { border: 0; background: none; } nav a { padding: 11px 12px; min-height:
44px; white-space: nowrap; color: var(--soft); text-decoration: none; } nav a[aria-current] { color: var(--ink); font-weight:
600; box-shadow: inset 0 -3px var(--main); } h1 { font-size: 20px; margin: 0; } h2 { font-size: 16px; margin: 0 0 8px; } small {
display: block; } p { margin: 4px 0; } section, .counts a { background: var(--card); border: 1px solid var(--line);
border-radius: 10px; } section { padding: 14px 16px; margin: 0 0 14px; } .counts a { padding: 8px 14px; color: var(--soft);
text-decoration: none; } .counts { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; padding: 0; border: 0;
background: none; } .counts strong { display: block; font-size: 26px; line-height: 1.2; color: var(--ink); } .cols { display:
grid; gap: 0 14px; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); align-items: start; } small, code,
.soft, .bar label, form label { color: var(--soft); font-size: 13px; } code, pre, textarea { font-family: ui-monospace,
monospace; } .bad, .counts .bad { color: var(--bad); } .good { color: var(--good); } .wait { color: var(--wait); } #said {
min-height: 22px; } a { color: var(--main); } td, dd, pre, h1 { unicode-bidi: isolate; } time, dd a, td a, small a { padding:
13px 0; position: relative; z-index: 1; } time { cursor: pointer; } table { width: 100%; border-collapse: collapse; font-size:
14px; font-variant-numeric: tabular-nums; } th { color: var(--soft); font-size: 12px; font-weight: 500; text-align: left;
padding: 2px 12px 6px 0; white-space: nowrap; } td { border-top: 1px solid var(--line); padding: 2px 12px 2px 0; height: 44px; }
td:last-child { padding-right: 0; } tbody tr { position: relative; } tbody tr:hover { background: var(--ground); } .few, td.act,
td.head small { white-space: nowrap; } td.wide, td.cut { width: 45%; max-width: 0; } td.cut { width: 18%; } td.head { max-width:
260px; } td.act { text-align: right; } td.wide > *, td.cut > *, a.row b { display: block; overflow: hidden; text-overflow:
ellipsis; white-space: nowrap; } a.row { display: flex; flex-direction: column; justify-content: center; min-height: 44px;
padding: 0; color: inherit; text-decoration: none; position: static; } a.row::after { content: ""; position: absolute; inset: 0;
} button, input, select, textarea { font: inherit; min-height: 44px; border-radius: 8px; border: 1px solid var(--line); padding:
8px 12px; background: var(--card); color: inherit; max-width: 100%; } button { cursor: pointer; color: var(--main);
border-color: currentColor; } button.main { background: var(--main); color: var(--on); } button.bad { color: var(--bad); } td
button { border-color: var(--line); min-width: 84px; } td button, td input { position: relative; z-index: 1; margin-left: 6px; }
input[type=checkbox] { width: 22px; height: 22px; min-height: 0; margin: 11px; accent-color: var(--main); } form, .bar {
display: flex; flex-wrap: wrap; gap: 8px; align-items: end; } .bar { align-items: center; margin: 8px 0; } form label { display:
grid; gap: 2px; flex: 1 1 150px; } form label.whole { flex-basis: 100%; } textarea { min-height: 110px; } label input, label
select, label textarea { width: 100%; color: var(--ink); font-size: 16px; } label.tick { display: flex; align-items: center;
flex: none; min-height: 44px; } pre { background: var(--ground); border-radius: 8px; padding: 10px 12px; margin: 4px 0 12px;
white-space: pre-wrap; font-size: 13px; max-height: 420px; overflow: auto; } .code { font: 700 clamp(44px, 13vw, 170px)/1.2
ui-monospace, monospace; text-align: center; white-space: nowrap; } dl { display: grid; grid-template-columns: minmax(96px,
auto) 1fr; gap: 6px 16px; margin: 0; } dt { color: var(--soft); } dd { margin: 0; } ol { list-style: none; margin: 0; padding:
0; } li { border-left: 3px solid var(--line); padding: 0 0 14px 14px; } li:last-child { padding-bottom: 0; } li.bad, li.good {
border-color: currentColor; } li > small, li > time { color: var(--soft); } li pre { margin: 6px 0 0; } progress { width: 100%;
accent-color: var(--main); } svg { width: 100%; height: 170px; display: block; touch-action: pan-y; } svg text { fill:
var(--soft); font-size: 12px; } svg line { stroke: var(--line); } svg line.at { stroke: var(--soft); } .axis { display: flex;
justify-content: space-between; } polyline { fill: none; stroke-width: 2; stroke: var(--main); vector-effect:
non-scaling-stroke; } .fulfilled { stroke: var(--good); stroke-dasharray: 7 3; } .failed { stroke: var(--bad); stroke-dasharray:
2 3; } .legend span { margin-right: 16px; display: inline-block; } .legend svg { display: inline-block; width: 28px; height:
8px; } :focus-visible { outline: 3px solid var(--main); outline-offset: 2px; }
@media (max-width: 760px) { header, main { padding: 0 10px; } header b { flex: 1; } nav { order: 1; flex: 1 0 100%; flex-wrap:
wrap; font-size: 14px; } nav a { padding: 11px 5px; } .counts { grid-template-columns: repeat(2, 1fr); } section { padding:
12px; } thead { display: none; } table, tbody, td, td.wide, td.cut { display: block; border: 0; padding: 0; height: auto;
max-width: none; } tr { display: flex; flex-wrap: wrap; gap: 4px 14px; border-top: 1px solid var(--line); padding: 8px 0; } td {
flex: 1 1 40%; min-width: 0; } tbody tr:first-child { border-top: 0; } td:empty { display: none; } td.head { order: -2; flex: 1
1 75%; } td.pick { order: -1; } td.wide, td.cut, td.act { flex-basis: 100%; } td.wide, td.cut { order: 1; } td.cut > * {
display: inline; white-space: normal; } .few, td.pick { flex: none; } td.act { text-align: left; white-space: normal; } td.act
button { margin: 4px 6px 4px 0; } td:not(.head, .wide, .act)::before { content: attr(data-title) " "; display: block; font-size:
12px; color: var(--soft); } td.few:not(.tag)::before { content: none; } td.tag::before, td.cut::before { display: inline; } }
</style></head><body>
<header><b>intentbus</b><nav aria-label="Pages"></nav><div id="out"></div></header>
<main><p id="said" class="soft" role="status"></p><div id="view"></div></main>
<script>
"use strict";
const $ = selector => document.querySelector(selector), absent = kid => kid === "" || kid === false || kid == null;
const put = (node, ...kids) => (node.replaceChildren(...kids.flat(9).filter(kid => !absent(kid))), node);
function make(name, about, ...kids) {
  const [tag, ...classes] = name.split("."), svg = /^(svg|polyline|line|text)$/.test(tag) && "http://www.w3.org/2000/svg";
  const node = svg ? document.createElementNS(svg, tag) : document.createElement(tag);
  if (classes.length) node.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(about))
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (!absent(value)) node.setAttribute(key, value === true ? "" : value);
  return put(node, kids); }
const pages = { "": "Home", intents: "Intents", schedules: "Schedules", workers: "Workers", keys: "Keys", publish: "Publish" };
const units = [[86400, "d"], [3600, "h"], [60, "m"], [1, "s"]], LATE = 300, PAGE = 50, OUTPUT = 65536, COUNTED = 20000;
let skew = 0, drawn = 0, me = null, goals = [], inFull = false, live = {}, keepsWords = false;
const now = () => Date.now() / 1000 + skew, exact = at => new Date(at * 1000).toLocaleString();
const unit = seconds => units.find(([size]) => Math.abs(seconds) >= size) || units[3];
const span = seconds => Math.floor(Math.abs(seconds) / unit(seconds)[0]) + unit(seconds)[1];
function took(seconds) {
  if (seconds < 60) return seconds < 1 ? Math.round(seconds * 1000) + " ms" : +seconds.toFixed(seconds < 10 ? 1 : 0) + " s";
  const rest = Math.floor(seconds % unit(seconds)[0]);
  return span(seconds) + (rest ? " " + span(rest) : ""); }
const ago = at => at > now() + 1 ? "in " + span(at - now()) : span(now() - at) + " ago";
const when = at => at == null ? "never" : make("time", { title: exact(at), datetime: new Date(at * 1000).toISOString() },
    inFull ? exact(at) : ago(at));
const bytes = number => number < 1e6 ? Math.ceil(number / 1e3) + " kB" : (number / 1e6).toFixed(1) + " MB";
const short = (text, most = 60) => text.length > most ? text.slice(0, most) + "…" : text;
const figure = number => number.toLocaleString("en");
const plural = (number, word) => figure(number) + " " + word + (number === 1 ? "" : "s");
const given = query => Object.fromEntries(Object.entries(query).filter(([, value]) => value));
const place = (path, query) => "#" + path + "?" + new URLSearchParams(given(query));
function say(words, bad) { $("#said").textContent = words; $("#said").className = bad ? "bad" : "soft"; }

// Numbers stay as they are written, as marked text: JavaScript would round 9007199254740993, and write 3 for 3.0.
const mark = "number " + Math.random() + " ", marked = RegExp('"' + mark + '([^"]*)"', "g");
const tokens = /"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*/g, marking = part => part[0] === '"' ? part : '"' + mark + part + '"';
const exactly = text => (JSON.parse(text), JSON.parse(text.replace(tokens, marking)));
const write = (value, indent) => JSON.stringify(value, null, indent).replace(marked, "$1");
function payloadIn(text) {
  try { return exactly(text); } catch (error) { throw new Error("The payload is not JSON: " + error.message); } }

// The key stays in this tab, and the browser asks for none in a box of its own. The page may stand below a path, /bus/ say.
const base = location.origin + location.pathname.replace(/\/+admin\/+dashboard\/*$/, "");
const basic = words => ({ Authorization: "Basic " + btoa(String.fromCharCode(...new TextEncoder().encode(words))) });
const { username, password } = new URL(document.baseURI), inAddress = decodeURIComponent(username + ":" + password);
let key = password ? basic(inAddress) : JSON.parse(sessionStorage.getItem("key"));
function keep(headers, caller) { [key, me] = [headers, caller];
  if (key) sessionStorage.setItem("key", JSON.stringify(key)); else sessionStorage.removeItem("key"); }
async function ask(path, body, read = JSON.parse, headers = key) {
  const sent = body === undefined ? {} : { method: "POST", body: write(body) };
  if (sent.body) headers = { ...headers, "Content-Type": "application/json" }; let answer, text, found;
  try {
    answer = await fetch(base + path, { ...sent, credentials: "omit", headers }); text = await answer.text();
    found = read(text); } catch (error) { throw new Error("The bus does not answer; the page shows old data."); }
  if (!answer.ok) throw Object.assign(new Error(JSON.parse(text).error.message), { status: answer.status });
  return found; }
async function summary(minutes = 1, headers = key) {
  const found = await ask("/admin/summary?minutes=" + minutes, undefined, JSON.parse, headers);
  [skew, goals] = [found.now - Date.now() / 1000, found.goals];
  return found; }
const trying = action => async () => { try { await action(); } catch (error) { say(error.message, true); } };
const act = (words, path, body, then = draw) => trying(async () => {
  const found = await ask(path, typeof body === "function" ? body() : body); say(words); await then(found); })();
const button = (words, press, kind = "") => make("button" + kind, { type: "button", onclick: press }, words);
const sure = (question, ...rest) => () => confirm(question) && act(...rest);
const go = hash => { keepsWords = true; location.hash = hash; }, visit = made => go("intent/" + made.id);
const soft = words => make("p.soft", {}, words), show = id => make("a", { href: "#intent/" + id }, id.slice(0, 12) + "…");
const box = (title, ...kids) => make("section", { "aria-label": title }, make("h2", {}, title), kids);
const list = entries => make("dl", {}, entries.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
const state = status => make("span." + ({ dead: "bad", fulfilled: "good", open: "wait" }[status] || "soft"), {}, status);
const tabs = (words, shown, entries, link) => make("nav.tabs", { "aria-label": words }, entries.map(([value, word]) => make("a",
    { href: link(value), "aria-current": value === shown && "true" }, word)));
const field = (words, name, about, kind = "") => make("label" + kind, {}, words, make("input", { name, ...about }));
const area = text => make("label.whole", {}, "Payload, as JSON", make("textarea", { name: "payload" }, text));
const goalField = about => [field("Goal", "goal", { maxlength: 256, list: "goals", ...about }),
    make("datalist", { id: "goals" }, [...new Set(goals.map(of => of.goal))].map(value => make("option", { value })))];
const valuesOf = form => Object.fromEntries([...new FormData(form)].map(([name, value]) => [name, value.trim()]));
const form = (send, ...kids) => make("form", { onsubmit: event => { event.preventDefault();
  send(valuesOf(event.target), event.submitter); } }, kids);
// A table on a wide screen; on a narrow one each row is a card. A column: title, what a cell shows of a row, its classes.
function table(title, columns, rows, none) {
  const head = columns.map(([words]) => make("th", { scope: "col" }, words));
  const cells = row => columns.map(([words, shows, kind = ""]) => make("td" + kind, { "data-title": words }, shows(row)));
  return rows.length ? make("table", { "aria-label": title }, make("thead", {}, make("tr", {}, head)),
      make("tbody", {}, rows.map(row => make("tr", {}, cells(row))))) : soft(none); }
// A scale of 1, 10, 100: one spike does not flatten all else. The values of a moment show on hover and on tap.
function plot(history, hours) {
  const wide = $("main").clientWidth - 66, tall = 170, step = hours === 1 ? 1 : 10, points = hours * 60 / step;
  const first = Math.floor(now() / 60 / step) - points + 1, series = { published: [], fulfilled: [], failed: [] };
  for (const name in series) series[name].push(...Array(points).fill(0));
  for (const [minute, name, times] of history) { const at = Math.floor(minute / step) - first;
    if (series[name]?.[at] >= 0) series[name][at] += times; }
  const entries = Object.entries(series), top = Math.max(1, ...Object.values(series).flat());
  const x = at => (at * wide / (points - 1)).toFixed(1), sum = list => list.reduce((total, times) => total + times);
  const y = times => (tall - 4 - Math.log1p(times) * (tall - 22) / Math.log1p(top)).toFixed(1);
  const legend = make("p.legend.soft", {}), cursor = make("line.at", { y1: 0, y2: tall, visibility: "hidden" });
  const tell = at => put(legend, at >= 0 && make("span", {}, exact((first + at) * step * 60)), entries.map(([name,
      list]) => make("span", {}, make("svg", { viewBox: "0 0 28 8", "aria-hidden": true }, make("polyline." + name,
      { points: "0,4 28,4" })), " " + figure(at >= 0 ? list[at] : sum(list)) + " " + name)));
  const touch = event => {
    const { left, width } = event.currentTarget.getBoundingClientRect(), part = (event.clientX - left) / width;
    const at = Math.min(points - 1, Math.max(0, Math.round(part * (points - 1))));
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(at)); cursor.setAttribute("visibility", "visible"); tell(at);
  }; const leave = event => event.pointerType === "mouse" && (cursor.setAttribute("visibility", "hidden"), tell());
  return [make("svg.graph", { viewBox: `0 0 ${wide} ${tall}`, preserveAspectRatio: "none", role: "img",
      "aria-label": tell().textContent, onpointermove: touch, onpointerdown: touch, onpointerleave: leave },
      [1, 10, 100, 1e3, 1e4, 1e5].filter(tick => tick < top / 2).concat(top).map(tick => [ make("line",
      { x1: 0, x2: wide, y1: y(tick), y2: y(tick) }), make("text", { x: 0, y: y(tick) - 3 }, figure(tick))]),
      entries.map(([name, list]) => make("polyline." + name, { points: list.map((times, at) => x(at) + "," +
      y(times)).join(" ") })), cursor), make("p.soft.axis", {}, [hours + " h ago", "per " + (step === 1 ? "minute" :
      "10 minutes"), "now"].map( words => make("span", {}, words))), legend]; }
// What a handler prints while it runs; nothing if the bus refuses. If it does not answer, the next refresh tries again.
async function follow(id) {
  const output = make("pre", { id: "output" }), told = soft(), bar = make("progress", { max: 100 });
  const node = make("section", { "aria-label": "Output", hidden: true }, make("h2", {}, "Output"), told, bar, output);
  const mine = live = { id, node };
  for (let next = 0, attempt = null, ended = false; live === mine && !ended;) try {
    const found = await ask("/output/" + id + "?after=" + next + "&wait=20");
    if (attempt !== found.attempt) output.textContent = ""; ({ attempt, next, ended } = found);
    const missed = found.missed ? "[" + plural(found.missed, "byte") + " left out]\n" : "";
    output.textContent = (output.textContent + missed + (found.output || "")).slice(-OUTPUT);
    [output.hidden, bar.hidden, bar.value] = [!output.textContent, found.percent == null, found.percent || 0];
    put(told, found.percent != null && found.percent + " % ", found.message); node.hidden = output.hidden && !told.textContent;
    output.scrollTop = output.scrollHeight; await new Promise(go => setTimeout(go, 1000)); } catch (error) {
    if (!error.status && live === mine) live = {}; return; }
  if (live === mine) draw(true); }
function timeline(of) {
  const item = (kind, title, at, ...rest) => make("li" + kind, {}, make("b", {}, title), " ", when(at), rest);
  const by = (worker, from, to) => make("small", {}, worker, from && to ? ", for " + took(to - from) : null);
  const client = of.caused_by ? ["by the end of ", show(of.caused_by)] : "by key " + of.publisher;
  const origin = of.schedule ? "by schedule " + of.schedule : client;
  const told = of.history.some(attempt => attempt.error === of.last_error), pre = text => text && make("pre", {}, text);
  const attempts = of.history.map(attempt => [attempt.ended_at, item(attempt.outcome === "released" ? "" : ".bad", "Attempt " +
      attempt.attempt + " " + attempt.outcome, attempt.ended_at, by(attempt.worker, attempt.claimed_at, attempt.ended_at),
      pre(attempt.error))]);
  const steps = of.steps.map(step => [step.done_at, item("", "Step " + step.name, step.done_at, make("small", {}, "attempt " +
      step.attempt + (step.seconds == null ? "" : ", " + took(step.seconds))))]);
  return make("ol", {}, item("", "Published", of.created_at, make("small", {}, origin)),
      attempts.concat(steps).sort((one, other) => one[0] - other[0]).map(([, node]) => node), of.status ===
      "claimed" && item("", "Attempt " + of.claim_attempts + " runs, since", of.claimed_at, by(of.worker),
      make("small", {}, "lease ends ", when(of.claim_expires_at))), of.status === "open" && item("", of.run_at > now() ? "Due" :
      "Waits since", of.run_at), of.status === "fulfilled" && item(".good", "Fulfilled", of.completed_at,
      by(of.worker, of.claimed_at, of.completed_at)), of.status === "dead" && item(".bad", "Dead", of.completed_at, told ?
      null : pre(of.last_error))); }
const FIELDS = { namespace: "default", priority: 100, ttl: 604800, max_attempts: 3, backoff_base: 5, target_worker: null,
  required_capability: null, unique: null, on_success: null, on_failure: null };
function command(of, payload) {
  const quote = text => /^[\w.:-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\\''") + "'";
  const flag = name => "--" + name.replace(/^(target|required)_|_base$/, "").replace("_", "-") + "=" + quote(String(of[name]));
  const flags = Object.keys(FIELDS).filter(name => of[name] !== FIELDS[name]).map(flag);
  if (of.status === "open" && of.run_at > now()) flags.push("--delay=" + Math.ceil(of.run_at - now()));
  if (of.visibility === "public") flags.push("--public");
  return ["python3 intentbus.py publish", ...flags, "--", quote(of.goal), quote(write(payload))].join(" "); }
function byGoal(rows) {
  const several = new Set(rows.map(of => of.namespace)).size > 1, times = pair => pair && pair.map(took).join(" / ");
  const both = (pair, kind) => make("span" + (pair[1] ? kind : ".soft"), {}, pair.map(figure).join(" / "));
  const set = (of, words, about) => act(words, "/limit/" + encodeURIComponent(of.goal), { ...about, namespace: of.namespace });
  const pause = of => set(of, of.paused ? "It goes on." : "It is paused.", { paused: !of.paused }); const limit = of => {
    const number = prompt("How many intents of " + of.goal + " may run at once? Empty: any number.", of.limit || "");
    if (number !== null) set(of, "The limit is set.", { running: /^ *[0-9]+ *$/.test(number) ? +number :
      number.trim() || null }); };
  return table("Goals", [["Goal", of => make("a.row", { href: place("intents", { goal: of.goal, namespace: of.namespace }) },
      make("b", { title: of.goal }, short(of.goal)), several && make("small", {}, of.namespace)), ".head"],
      ["Waiting", of => [figure(of.waiting), of.waiting >= COUNTED && "+", of.run_at && make("small" +
      (now() - of.run_at > LATE ? ".bad" : ""), {}, "oldest ", when(of.run_at))]], ["Running", of => [figure(of.running),
      of.limit && " of " + of.limit, of.paused && make("small.wait", {}, "paused")]], ["Done, hour / day",
      of => both(of.fulfilled, ".good")], ["Failed, hour / day", of => both(of.failed, ".bad")], ["Waited, p50 / p95",
      of => times(of.waited)], ["Ran, p50 / p95", of => times(of.ran)], ["", of => me.admin && [button("Limit",
      () => limit(of)), button(of.paused ? "Resume" : "Pause", () => pause(of))], ".act"]], rows,
      "Nothing waits, and nothing was done in the last day. The page Publish makes an intent."); }
const views = {
  async ""(query) {
    const hours = query.get("hours") === "24" ? 24 : 1, sum = await summary(hours * 60),
        alone = sum.waiting.filter(of => !of.listening), busy = sum.workers.filter(worker => worker.running.length).length;
    const counts = { open: 0, claimed: 0, fulfilled: 0, dead: 0 }, known = me.admin || Object.keys(sum.intents).length;
    for (const states of Object.values(sum.intents)) for (const status in states) counts[status] += states[status];
    return [make("section.counts", { "aria-label": "Intents by state" }, Object.entries(counts).map(([status,
        number]) => make("a", { href: place("intents", { status }) }, make("strong" + (status === "dead" && number ? ".bad" :
        ""), { id: "count-" + status }, known ? figure(number) : "–"), status))), alone.length > 0 && make("section",
        { "aria-label": "No worker" }, make("b.bad", {}, "⚠ No worker for "), alone.slice(0,
        5).map(({ goal }, at) => [at > 0 && ", ", make("a", { href: place("intents", { goal }) }, short(goal))]),
        alone.length > 5 && " and " + plural(alone.length - 5, "more goal"), ".",
        make("small", {}, "Start one: python3 intentbus.py work --goal GOAL -- ./handler.sh")), box("Goals", byGoal(sum.goals)),
        box("What happened", me.admin || sum.history.length ? [tabs("Period", hours, [[1, "last hour"], [24, "last day"]],
        number => place("", { hours: number })), plot(sum.history, hours)] : soft("No events to show; the chart is for keys " +
        "that see all owners and goals.")), box("The bus", list([["version", sum.version], ["workers",
        make("a", { href: "#workers" }, sum.workers.length + ", " + busy + " at work")],
        ["database", bytes(sum.database_bytes) + ", log " + bytes(sum.wal_bytes)], ["issued keys", figure(sum.keys)],
        ["held requests", figure(sum.held_requests)], ["clock", exact(sum.now)]]))]; },
  async intent(query, id) {
    const both = text => [JSON.parse(text), exactly(text)], names = ["goal", "visibility", ...Object.keys(FIELDS)];
    const [of, { payload, result }] = await ask("/admin/intents/" + encodeURIComponent(id), undefined, both),
        seen = "payload" in of;
    const path = "/admin/intents/" + of.id, line = seen && command(of, payload), ended = /fulfilled|dead/.test(of.status);
    const copy = { payload, ...Object.fromEntries(names.map(name => [name, of[name]])) };
    const ours = of.status === "dead" || of.owner === me.owner || of.visibility === "public";
    const again = () => of.status === "dead" ? act("It is open again.", path + "/retry", {}) :
        act("Published.", "/admin/intents", copy, visit);
    const pasted = () => navigator.clipboard ? navigator.clipboard.writeText(line).then(() => say("Copied.")) :
        say("Copy it from below.");
    if (of.status === "claimed" && live.id !== of.id) follow(of.id);
    return [make("section", {}, make("h1", {}, of.goal), make("p", {}, state(of.status), make("small", {}, of.id)),
        me.admin && make("div.bar", {}, ended && ours && button("Run again", again, ".main"), !ended && button("Cancel",
        sure("Cancel this intent?", "It is cancelled.", path + "/cancel", {}), ".bad"),
        button("Delete", sure("Delete this intent for good?", "It is deleted.", "/admin/purge", { ids: [of.id], confirm: true },
        () => go("intents")), ".bad"), button("Copy as command", pasted))), live.id === of.id && live.node, make("div.cols", {},
        make("div", {}, box("What happened", timeline(of)), box("Details", list([["owner", of.owner + ", " + of.visibility],
        ["attempts", of.claim_attempts + " of " + of.max_attempts], ["expires", when(of.expires_at)],
        ...["namespace", "priority", "unique", "target_worker", "required_capability", "on_success",
        "on_failure"].filter(name => of[name] != null).map(name => [name.replace("_", " "), String(of[name])])]))),
        box("Payload", make("pre", { id: "payload" }, seen ? write(payload, 2) : "This key sees no payloads."),
        seen && [ of.status === "fulfilled" && [make("h2", {}, "Result"), make("pre", { id: "result" },
        of.result_type === "text" ? of.result : write(result, 2))], make("h2", {}, "Command"), make("pre", { id: "command" },
        line)]))]; },
  async schedules() {
    const { schedules } = await ask("/schedules"), whose = of => ({ owner: of.owner });
    const path = (verb, of) => "/" + verb + "/" + encodeURIComponent(of.name);
    const seconds = (number, letter) => number * (units.find(([, word]) => word === letter) || [1])[0];
    const add = of => act("It is scheduled.", path("schedule", of), () => {
      const every = of.when.match(/^(\d+) *([smhd]?)$/), timezone = of.timezone || null;
      return { goal: of.goal, payload: payloadIn(of.payload), ...(every ? { every: seconds(every[1], every[2]) } :
          { cron: of.when, timezone }) }; });
    const pause = of => act(of.paused ? "It goes on." : "It is paused.", path("schedule", of),
        { ...whose(of), paused: !of.paused });
    const runs = of => of.cron ? [make("code", {}, of.cron), make("small", {}, of.timezone)] : "every " + took(of.every);
    return [box("Schedules", table("Schedules", [["Name", of => [make("b", {}, short(of.name)), make("small", {}, of.owner)],
        ".head"], ["Goal", of => short(of.goal)], ["Runs", runs], ["Next", of => of.paused ? make("span.wait", {}, "paused") :
        when(of.next_run_at)], ["Last", of => [when(of.last_run_at), of.last_id && make("small", {}, show(of.last_id))]],
        ["", of => me.admin && [button("Run now", () => act("Published.", path("run", of), whose(of), visit)),
        button(of.paused ? "Resume" : "Pause", () => pause(of)), button("Delete", sure("Delete the schedule " + of.name + "?",
        "It is deleted.", path("unschedule", of), whose(of)), ".bad")], ".act"]], schedules, "Nothing is scheduled.")),
        me.admin && box("Add a schedule", form(add, field("Name", "name", { required: true, maxlength: 128 }),
        goalField({ required: true }), field("Each 10m, or @daily, or 0 7 * * 1-5", "when", { required: true }),
        field("Time zone, for cron", "timezone", { placeholder: "of the bus" }), area("{}"), make("button.main", {},
        "Add schedule")))]; },
  async workers() {
    const sum = await summary(), each = of => of.running.map((id, at) => make("div", {}, show(id), " ",
        when(of.running_since[at])));
    const runs = of => [each(of).slice(0, 3), of.running.length > 3 && "of " + of.running.length,
        !of.running.length && "nothing"];
    const columns = [["Worker", of => [make("b", {}, short(of.name)), make("small", {}, of.owner, of.version && ", " +
        of.version)], ".head"], ["Goals", of => short(of.goals.join(", ") || "any goal", 90)],
        ["Done", of => figure(of.fulfilled)], ["Failed", of => make("span" + (of.failed ? ".bad" : ""), {}, figure(of.failed))],
        ["Came", of => when(of.since)], ["Last seen", of => when(of.last_seen)]];
    return [box("Workers", table("Workers", [...columns, ["Runs", runs]], sum.workers,
        "No worker in the last five minutes. Start one: python3 intentbus.py work --goal GOAL -- ./handler.sh")),
        sum.gone.length > 0 && box("Gone within a day", table("Gone", columns, sum.gone))]; },
  async keys() {
    const keys = await ask("/admin/keys"), tell = async (...parts) => { await draw(); $("#view").prepend(box(...parts)); };
    const grant = ({ name, owner, role, goals, days, payloads }) => ({ name, owner, role, payloads: payloads !== undefined,
        goals: goals ? goals.split(",").map(goal => goal.trim()) : null, expires_at: days ? now() + days * 86400 : null });
    const add = of => act("The key is made. Copy it now: it is shown only here.", "/admin/generate_key", grant(of),
        made => tell("New key for " + made.name, make("pre", { id: "made" }, made.api_key)));
    const invite = of => act("The invitation is made.", "/admin/invite", grant(of), made => tell("Invitation for " + made.name,
        make("p.code", { id: "code" }, made.code), make("p", {}, "It ends ", when(made.expires_at), ". On the other machine:"),
        make("pre", {}, "python3 intentbus.py join " + base + " " + made.code)));
    const needed = { required: true, maxlength: 64 }, roles = ["both", "publish", "work", "viewer"];
    return [me.admin && box("Add a key", form((of, pressed) => (pressed?.value === "key" ? add : invite)(of),
        field("Name", "name", needed), field("Owner", "owner", { value: "owner", ...needed }), make("label", {}, "Role",
        make("select", { name: "role" }, roles.map(role => make("option", {}, role)))), field("Goals, if not all: a, b",
        "goals"), field("Days, if it ends", "days", { type: "number", min: 1 }), field("viewer sees payloads", "payloads",
        { type: "checkbox" }, ".tick"), make("button.main", { value: "code" }, "Invite"), make("button", { value: "key" },
        "Add key"))), box("Issued keys", table("Issued keys", [["Name", of => [make("b", {}, of.name || "unnamed"),
        make("small", {}, of.key_id)], ".head"], ["Role", of => of.role + (of.payloads ? ", with payloads" : "")],
        ["Owner", of => of.owner], ["Goals", of => of.goals ? short(of.goals.join(", ")) : "all"],
        ["Ends", of => when(of.expires_at)], ["Requests", of => figure(of.total_requests)],
        ["Last used", of => when(of.last_used_at)], ["", of => me.admin && button("Revoke", sure("Revoke the key " + of.name +
        "? What uses it stops working.", "It is revoked.", "/admin/revoke_key", { key_id: of.key_id }), ".bad"), ".act"]], keys,
        "No key is issued. Invite each machine, here or with: python3 intentbus.py keys invite NAME"))]; },
  async publish(query) {
    const send = of => act("Published.", "/admin/intents", () => ({ goal: of.goal, payload: payloadIn(of.payload) }), visit);
    return [box("Publish an intent", form(send, goalField({ required: true, value: query.get("goal") || "hello" }),
        area('{"name": "world"}'), make("button.main", {}, "Publish")))]; },
  async intents(query) {
    const which = Object.fromEntries(["status", "goal", "namespace", "search"].map(name => [name, query.get(name) || ""]));
    const { search, ...filter } = which, { status } = which, before = query.get("before"), preview = me.payloads && 200;
    const get = about => ask("/admin/intents?" + new URLSearchParams(given({ limit: PAGE, preview, ...about })));
    const end = /^[0-9a-f]{4,32}$/.test(search) && !before && (BigInt("0x" + search) + 1n).toString(16).padStart(search.length,
        0);
    const byId = end ? (await get({ before: end })).intents.filter(of => of.id.startsWith(search)) : [];
    const page = me.payloads || !search ? await get({ ...which, before }) : { intents: [], next: null };
    const intents = [...byId, ...page.intents.filter(of => !byId.some(other => other.id === of.id))];
    return [tabs("States", status, ["", "open", "delayed", "claimed", "fulfilled", "dead"].map(word => [word, word || "all"]),
        value => place("intents", { ...which, status: value })), make("section", { "aria-label": "Filter" },
        form(of => { location.hash = place("intents", { status, ...of }); }, goalField({ value: which.goal }),
        field("Search: id, part of goal, payload", "search", { value: search, type: "search" }), field("Namespace", "namespace",
        { value: which.namespace }), make("button.main", {}, "Show"))), intentsTable(intents, status,
        status === "delayed" || search ? null : given(filter), page.next ? "None is among the newest 10,000." :
        "There is none."), make("div.bar", {}, before && make("a", { href: place("intents", which) }, "Newest"),
        page.next && make("a.next", { href: place("intents", { ...which, before: page.next }) }, "Older"))]; }, };
// Intents with the actions on those that are ticked, or on all that match a filter, on any page; counted first.
function intentsTable(intents, status, filter, none) {
  const box = about => make("input", { type: "checkbox", ...about }), every = box(), untick = () => { every.checked = false; };
  const ticks = intents.map(({ id }) => box({ "aria-label": "select " + id, value: id, onchange: untick }));
  const all = box({ onchange: () => { untick(); for (const tick of ticks) tick.checked = all.checked; } });
  const sweep = (verb, done, path, count = { count: true }, change = { confirm: true }) => trying(async () => {
    const ids = ticks.filter(tick => tick.checked).map(tick => tick.value);
    if (!every.checked && !ids.length) return say("Tick some first.");
    const { status, ...rest } = every.checked ? filter : { ids }, some = count.action ? rest : { status, ...rest };
    const { number, until } = await ask(path, { ...some, ...count });
    if (!number) say("There are none.");
    else if (confirm(verb + " " + plural(number, "intent") + "?")) await act("", path, { ...some, ...change, until },
        async found => {
      await draw(); say(plural(found.number ?? found.deleted ?? found.cancelled, "intent") + " " + done + "."); }); });
  const until = of => of.completed_at || of.status === "claimed" && now();
  const spent = of => of.claimed_at && until(of) && took(until(of) - of.claimed_at);
  const moment = of => of.completed_at ? when(of.completed_at) : of.status === "claimed" ? ["since ", when(of.claimed_at)] :
      [of.run_at > now() ? "due " : "waits since ", when(of.run_at)];
  const error = of => of.status !== "fulfilled" && of.last_error && make("small.bad", {}, of.last_error.split("\n")[0]);
  return [me.admin && intents.length > 0 && make("div.bar", {}, make("label.tick", {}, all, "Select all"),
      filter && make("label.tick", {}, every, "All that match, on every page"), /^$|dead/.test(status) && button("Retry",
      sweep("Retry", "retried", "/admin/dead", { action: "count" }, { action: "retry" })),
      /^$|open|delayed|claimed/.test(status) && button("Cancel", sweep("Cancel", "cancelled", "/admin/cancel"), ".bad"),
      button("Delete", sweep("Delete for good", "deleted", "/admin/purge"), ".bad")),
      make("section", { "aria-label": "Intents" }, table("Intents", [...(me.admin ? [["", of => ticks[intents.indexOf(of)],
      ".pick"]] : []), ["Goal", of => make("a.row", { href: "#intent/" + of.id }, make("b", { title: of.goal }, short(of.goal)),
      make("small", {}, of.id.slice(0, 12) + "…" + (of.namespace === "default" ? "" : " " + of.namespace))), ".head"],
      ["State", of => state(of.status), ".few"], ["Payload", of => [of.preview && make("code", {}, of.preview), error(of)],
      ".wide"], ["Worker", of => of.worker && make("span", {}, of.worker), ".cut"], ["Attempts", of => of.claim_attempts + "/" +
      of.max_attempts, ".few.tag"], ["Took", spent, ".few.tag"], ["When", moment, ".few"]], intents, none))]; }
function signIn(words = "With the owner key of this bus, from ~/.apikey on its machine, or with its DASHBOARD_PASSWORD.") {
  const send = async ({ key }) => {
    const plain = /^[!-~]+$/.test(key) ? [{ Authorization: "Bearer " + key }, { "X-Admin-Token": key }] : [];
    for (const headers of [...plain, basic("admin:" + key)])
      try { keep(headers, (await summary(1, headers)).caller); say(""); return draw(); } catch (error) {
        keep(null, null);
        say(error.status === 401 || error.status === 403 ? "This key does not open the dashboard." : error.message, true); } };
  for (const place of ["nav", "#out"]) put($(place));
  put($("#view"), box("Sign in", make("p", {}, words),
      soft("A viewer's key looks, and changes nothing: intentbus.py keys add NAME --role viewer"), form(send,
      make("input", { value: "admin", autocomplete: "username", hidden: true }), field("Key", "key", { type: "password",
      required: true, autocomplete: "current-password" }), make("button.main", {}, "Sign in")))); }
async function draw(quietly) {
  const [path, search] = location.hash.slice(1).split("?"), [name, id] = path.split("/"), turn = ++drawn;
  if (!key) return signIn();
  try {
    if (!me || !quietly) keep(key, (await summary()).caller);
    const found = await (views[name] || views[""])(new URLSearchParams(search), id && decodeURIComponent(id));
    if (turn !== drawn) return;
    if (name !== "intent") live = {};
    put($("nav"), Object.entries(pages).filter(([page]) => page !== "publish" || me.admin).map(([page, words]) => make("a",
        { href: "#" + page, "aria-current": (page === name || page === "intents" && name === "intent") && "page" }, words)));
    put($("#out"), button("Sign out", () => { keep(null, null); say(""); draw(); })); put($("#view"), found);
    if (quietly && $("#said").className === "bad") say(""); } catch (error) {
    if (error.status !== 401) return say(error.message + " (" + new Date().toLocaleTimeString() + ")", true); keep(null, null);
    signIn("This key does not open the dashboard, or no longer."); } }
const inUse = "#view input:checked, #view :focus-visible, #view svg:hover", onForm = /^#(keys|publish)/;
const idle = () => key && !document.hidden && !onForm.test(location.hash) && !$(inUse);
// A tap on a time shows this one and all others to the second.
document.addEventListener("click", event => {
  if (!event.target.closest("time")) return; inFull = !inFull;
  for (const node of document.querySelectorAll("time")) node.textContent = inFull ? node.title :
      ago(Date.parse(node.dateTime) / 1000); });
addEventListener("hashchange", () => { if (!keepsWords) say(""); keepsWords = false; draw(); scrollTo(0, 0); });
document.addEventListener("visibilitychange", () => idle() && draw(true)); setInterval(() => idle() && draw(true), 4000);
draw();
</script></body></html>
""")


# ---- 14. API ----
# The endpoints, then ROUTES, the table of all: method, path, who may, endpoint. An endpoint returns (status, value) or a
# Held. An endpoint that is a generator is a long operation: the loop advances it in slices.

Response = collections.namedtuple("Response", "status headers body request_id")
COMMON_HEADERS = (
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("X-Intent-Version", "7.61"),     # clients of the 2.x line compare its major number
)


class JsonText(str):
    """Encoded JSON."""


def request_id_of(headers):
    """Return the X-Request-ID of these headers, or a new one if it is missing or malformed."""
    given = headers.get("x-request-id", "")
    return given if re.fullmatch("[A-Za-z0-9_.:-]{1,128}", given) else f"{random.getrandbits(64):016x}"


def same_or_either(field, given, header, signed=False):
    """Return the value of a field that may stand in a header, too, which no signature covers.

    Raises Invalid if both are given and differ, or if only the header is and the request has all of its fields `signed`.
    """
    if header and given != header and (given or signed):
        raise Invalid(f"{field} differs from the header; send it once.", code=f"invalid_{field}")
    return given or header


class Request:
    """A request: method, target as sent, headers by lower-case name, body in bytes, the client's address.

    secure tells whether it came encrypted, local whether from this machine, may_wait whether it may be held. Raises Invalid
    if the target cannot be decoded.
    """

    __slots__ = ("method", "raw_path", "path", "query", "headers", "body", "peer", "secure", "local", "may_wait", "id",
                 "who", "endpoint", "place", "caller", "key_id", "signing_key", "proven", "connection", "worker")

    def __init__(self, method, target, headers=None, body=b"", peer="", secure=False, local=False, may_wait=True):
        self.method, self.headers, self.body = method, headers or {}, body
        self.peer, self.secure, self.local, self.may_wait = peer, secure, local, may_wait
        self.id = request_id_of(self.headers)
        self.who = self.endpoint = self.caller = self.key_id = self.signing_key = None     # until API.admit() and Keys know them
        self.proven = False         # whether its head, or its signature, has shown a right key
        self.connection = None      # where the answer goes, on a Server
        self.worker = None          # the name of the worker that sends a claim
        self.raw_path, _, self.query = target.partition("?")
        self.path = "/" + self.raw_path.lstrip("/") if self.raw_path.startswith("//") else self.raw_path
        if "%" in target:
            if re.search(BAD_ESCAPE, target):     # a percent sign without two hex digits
                raise badly_encoded()
            self.path = decoded_path(self.path)

    @property
    def account(self):
        """To whom memory is accounted: the id of a key, or the address of a client that has shown none."""
        return self.key_id or OWNER.key_id if self.proven else f"address {self.peer}"

    def trim(self):
        """Let go of the body and of all headers but the one that the answer needs."""
        self.body, self.headers = b"", {"connection": self.headers.get("connection", "")}

    @property
    def reads(self):
        """Whether it changes nothing."""
        return self.method in ("GET", "HEAD")

    @property
    def media_type(self):
        """The Content-Type, in lower case and without parameters; empty if there is none."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def wants_text(self):
        """Whether the client accepts text/plain, and not JSON by name."""
        accepted = self.headers.get("accept", "").lower()
        return "text/plain" in accepted and "application/json" not in accepted

    @property
    def abandoned(self):
        """Whether the client has closed the connection before the answer."""
        return self.connection is not None and self.connection.eof

    def json(self):
        """Return the value of the body; an empty one counts as {}."""
        return from_json(self.body) if self.body.strip() else {}

    def fields(self, fields):
        """Return the validated fields of the body. If other ones are refused, so is a query."""
        if fields.strict:
            self.parameters(NOTHING)
        return validate(fields, self.json())

    def parameters(self, fields):
        """Return the validated parameters of the query, as a dict that is not to be changed."""
        return fields.of_query(self.query)

    def idempotency_key(self, given):
        """Return the idempotency key, given in the body or query, or in the header; None if there is none."""
        header = self.headers.get("idempotency-key")
        if header is None:
            return given
        return same_or_either("idempotency_key", given, validate(IDEMPOTENCY, {"idempotency_key": header})["idempotency_key"])


def dashboard_redirect(api, request):
    return 302, Redirect("../" * (request.path.count("/") - 1) + "admin/dashboard")     # relative, for a proxy that adds a path


def home_endpoint(api, request):
    return dashboard_redirect(api, request) if "text/html" in request.headers.get("accept", "").lower() else (200, HOME)


def health_endpoint(api, request):
    api.bus.probe()
    return 200, health_of()


def health_of(**problem):
    return dict(ok=not problem, ts=int(time.time()), version=__version__, **problem)


def publishable(api, body, fields=PUBLISH):
    """Return the validated fields of one intent to publish."""
    fields = validate(fields, body)
    del fields["reward"]
    if fields["run_at"] is not None and (fields["delay"] or fields["run_at"] > api.bus.clock.now() + YEAR_SECONDS):
        raise Invalid("run_at must be Unix seconds within 366 days, and without a delay.", code="invalid_run_at")
    if fields["replace"] and fields["unique"] is None:
        raise Invalid("replace needs unique, which says what to replace.", code="invalid_replace")
    return fields


def publish_endpoint(api, request):
    request.parameters(NOTHING)
    return publish_one(api, request, request.json())


def publish_payload_endpoint(api, request, goal):
    """Publish the body as a payload; the path has the goal, the query the other fields."""
    fields = dict(request.parameters(PUBLISH_QUERY), payload=payload_in(request))
    return publish_one(api, request, dict(fields, goal=goal.removesuffix("/")))


def publish_one(api, request, body):
    fields = publishable(api, body)
    fields["idempotency_key"] = request.idempotency_key(fields["idempotency_key"])
    answer = api.bus.publish(**fields, caller=request.caller)
    return 201 if answer["status"] == "published" else 200, answer.id if request.wants_text else answer


def payload_in(request):
    """Return the payload that a body is: JSON if it is said to be, or is an object or array not said to be text; else text."""
    kind = request.media_type
    if kind.startswith("multipart/"):
        raise Invalid("A multipart body is no payload; send JSON or text.", code="invalid_payload")
    if kind == "application/json" or kind.endswith("+json"):
        return request.json()
    text = decoded_text(request.body)
    with contextlib.suppress(NotJson):
        if kind != "text/plain" and text.lstrip()[:1] in ("{", "["):
            return from_json(request.body)
    return text or {}


def publish_many_endpoint(api, request):
    key = request.idempotency_key(request.parameters(IDEMPOTENCY)["idempotency_key"])
    lines = request.media_type == "application/x-ndjson"
    bodies = [line for line in without_mark(request.body).splitlines() if line.strip()] if lines else request.json()
    if not isinstance(bodies, list) or len(bodies) > BULK_INTENTS:
        raise Invalid(f"The body must be a JSON array of at most {BULK_INTENTS} intents, or as many lines of NDJSON.")
    intents = []
    for index, body in enumerate(bodies):
        try:
            intents.append(publishable(api, from_json(body) if lines else body, PUBLISH_OF_MANY))
        except Invalid as error:
            raise Invalid(f"Intent {index}: {error}", error.code) from error
        yield
    return 201, api.bus.publish_many(intents, idempotency_key=key, caller=request.caller)


def claim_endpoint(api, request):
    fields = request.parameters(CLAIM)
    wanted = wanted_in(api, request, fields, request.body and validate(CLAIM_BODY, request.json())["claim_token"])
    request.worker = wanted.worker_name
    return api.hold(request, wanted.lanes, fields["wait"], functools.partial(take_intent, api, request, wanted),
                    functools.partial(nothing_to_claim, api, request, wanted))


def wanted_in(api, request, fields, token):
    """Return the Claim that a query describes, with a token of the client's own from the body."""
    return api.bus.wanted(
        fields["goal"], namespace=fields["namespace"], publisher=api.keys.owner_of(fields["publisher"]),
        lease=fields["lease"], caller=request.caller, **claiming_worker(request, fields, token or None))


CLAIM_FIELD_OF = {"x-worker-id": "worker_id", "x-claim-token": "claim_token", "x-worker-capability": "capabilities",
                  "x-worker-capabilities": "capabilities"}     # headers of older clients; of two for a field, the later counts


def claiming_worker(request, fields, token):
    """Return how the worker of a claim describes itself: in the query and the body or, as older clients do, in headers."""
    headers = request.headers
    told = dict(claim_token=token, worker_id=fields["worker_id"], capabilities=fields["capabilities"] or fields["capability"])
    in_headers = {field: headers[name] for name, field in CLAIM_FIELD_OF.items() if name in headers}
    if in_headers:
        for field, value in validate(CLAIM_HEADERS, in_headers).items():
            told[field] = same_or_either(field, told[field], value, signed=token)
    return dict(told, version=headers.get("user-agent", "")[:64], worker_name=label(headers.get("x-worker-name", ""))
                or told["worker_id"] or f"{request.caller.key_id}@{request.peer}")


def take_intent(api, request, wanted):
    """Answer a claim if there is an intent for it."""
    intent = api.bus.take(wanted, request.caller)
    return intent and (200, JsonText(claimed_text(intent, wanted)))


def claimed_text(intent, wanted):
    """Return the JSON text that hands an intent to its worker.

    The payload stands there as it is stored, neither parsed nor encoded, and before the token: a worker without a JSON
    parser takes the last token in the text.
    """
    return f'{to_json(intent.pick(NAMING_FIELDS))[:-1]},"payload":{intent.payload},{to_json(told_of(intent, wanted))[1:]}'


def reporting(verb, fields):
    """Return the endpoint of a report, which claims the next intent, too, if its query says next=1."""
    def endpoint(api, request, intent_id):
        body = request.fields(fields)
        token, wants_next = body.pop("next_token"), "next=1" in request.query.split("&")
        wanted = wanted_in(api, request, request.parameters(NEXT_CLAIM), token) if wants_next else None
        answer = getattr(api.bus, verb)(intent_id, **body, next_claim=wanted, caller=request.caller)
        if wanted is None:
            return 200, answer
        intent = answer.pop("next")
        return 200, JsonText(f'{to_json(answer)[:-1]},"next":{claimed_text(intent, wanted) if intent else "null"}}}')
    return endpoint


def progress_endpoint(api, request, intent_id):
    """Take in progress, once a second, free of charge: it must not use up the rate that reports need."""
    answer = api.bus.progress(intent_id, **request.fields(PROGRESS), caller=request.caller)
    api.keys.charge(request.caller, -1)
    return 200, answer


def step_endpoint(api, request, intent_id):
    return 200, api.bus.step(intent_id, request.headers["x-claim-token"], **request.fields(STEP_REPORT), caller=request.caller)


def nothing_to_claim(api, request, wanted):
    """Answer a claim that has found nothing: it is free of charge, or, if they are many, costs by the lanes it looks at.

    A worker that has closed the connection meanwhile is gone, unless another claim of it is held.
    """
    caller, registry = request.caller, api.bus.registry
    if request.abandoned and not api.waiting.claims_of(caller.key_id, wanted.worker_name):
        registry.leave(caller.key_id, wanted.worker_name)
    if caller.limits:
        free = registry.next_is_free(api.bus.clock.now(), caller.key_id, None if request.abandoned else wanted.worker_name)
        api.keys.charge(caller, -1 if free else len(wanted.lanes) // LANES_PER_TOKEN)
    return 204, None


def schedule_endpoint(api, request, name):
    validate(SCHEDULE_NAME, {"name": name})
    body = request.json()
    if isinstance(body, dict) and "paused" in body and not body.keys() - PAUSE_SCHEDULE.keys():
        return 200, api.bus.pause_schedule(name, **request.fields(PAUSE_SCHEDULE), caller=request.caller)
    answer = api.bus.schedule(name, **request.fields(SCHEDULE), caller=request.caller)
    return 200 if answer.status == "replaced" else 201, answer


def until_news(api, request, key, seconds, look):
    """Answer with the value of look() -> (whether it is news, value), once it is news or the time is over."""
    def attempt():
        is_news, value = look()
        return (200, value) if is_news else None
    return api.hold(request, (key,), seconds, attempt, lambda: (200, look()[1]))


def result_endpoint(api, request, intent_id):
    plain = request.wants_text     # while it is held, it has no headers
    def look():
        found = api.bus.get_result(intent_id, caller=request.caller)
        return found.status in ("fulfilled", "dead"), as_text(found.get("result")) if plain else found     # a viewer may not see it
    return until_news(api, request, intent_id, request.parameters(RESULT)["wait"], look)


def output_endpoint(api, request, intent_id):
    fields = request.parameters(OUTPUT)
    page = functools.partial(api.bus.output, intent_id, fields["after"], caller=request.caller)
    asked = page()
    api.bus.live.read(api.bus.clock.now(), intent_id, fields["wait"])
    def look():
        found = page()
        return found.next != fields["after"] or found != asked or found.ended, found
    return until_news(api, request, intent_id, fields["wait"], look)


def events_endpoint(api, request):
    fields = request.parameters(EVENTS_QUERY)
    after = api.bus.log.newest if fields["after"] is None else fields["after"]
    def look():
        found = api.bus.events(after, caller=request.caller)
        return found.events, found
    return until_news(api, request, event_key(request.caller.sees), fields["wait"], look)


def who_am_i_endpoint(api, request):
    caller = request.caller
    return 200, dict(key_id=caller.key_id, owner=caller.owner, role=caller.role, goals=caller.goals, payloads=caller.payloads,
                     expires_at=caller.expires_at if caller.expires_at < FOREVER else None, admin=caller.admin,
                     now=api.bus.clock.now())


def set_endpoint(api, request, key):
    validate(VALUE_KEY, {"key": key})
    in_query = request.query and not request.body.strip()     # as 1.0 clients send it
    fields = request.parameters(SET_QUERY) if in_query else request.fields(SET)
    return 200, api.bus.set(key, **fields, caller=request.caller)


def limit_endpoint(api, request, goal):
    return 200, api.bus.limit(**validate(LIMITED_GOAL, {"goal": goal}), **request.fields(LIMIT), caller=request.caller)


def revoke_endpoint(api, request):
    """End a key at once: its held requests and its leases end with it; its schedules go on, and are counted."""
    key_id = api.keys.revoke(**request.fields(REVOKE_KEY))
    yield
    yield from Bus.end_leases.steps(api.bus, key_id)
    return 200, {"ok": True, "schedules": api.bus.store.number_of_schedules(key_id)}


def metrics_endpoint(api, request):
    found = api.summary()
    return 200, exposition(
        ("intent_bus_intents_total", "gauge", "Intents stored, by status and namespace.",
         [(dict(status=status, namespace=where), number) for where, states in found.intents.items()
          for status, number in states.items()]),
        ("intent_bus_dead_letters_total", "gauge", "Dead intents.",
         [({}, sum(states.get("dead", 0) for states in found.intents.values()))]),
        ("intent_bus_tester_keys_total", "gauge", "Issued keys.", [({}, found["keys"])]),
        ("intentbus_held_requests", "gauge", "Requests that are held.", [({}, found.held_requests)]),
        ("intentbus_database_bytes", "gauge", "Size of the database file.", [({}, found.database_bytes)]),
        ("intentbus_wal_bytes", "gauge", "Size of the write-ahead log.", [({}, found.wal_bytes)]),
        ("intentbus_build_info", "gauge", "The version that runs.", [(dict(version=__version__), 1)]))


def exposition(*families):
    """Return (name, type, help, [(labels, value)]) families in the text format of Prometheus, version 0.0.4."""
    lines = []
    for family, kind, words, samples in families:
        lines += [f"# HELP {family} {words}", f"# TYPE {family} {kind}"]
        for labels, value in samples:
            inside = ",".join(f"{label}={to_json(value)}" for label, value in labels.items())
            lines.append(f"{family}{{{inside}}} {value}" if inside else f"{family} {value}")
    return "\n".join(lines) + "\n"


def calling(read, verb, fields=NOTHING, status=200):
    """Return the endpoint that calls a verb of the Bus, or advances a long one, with the fields that read(request, fields) finds."""
    def endpoint(api, request, *place):
        return status, getattr(api.bus, verb)(*place, **read(request, fields), caller=request.caller)
    def long_endpoint(api, request):
        return status, (yield from getattr(Bus, verb).steps(api.bus, **read(request, fields), caller=request.caller))
    return long_endpoint if hasattr(getattr(Bus, verb), "steps") else endpoint


def issuing(verb):
    """Return the endpoint that calls a method of Keys with the grant in the body."""
    def endpoint(api, request):
        grant = request.fields(GENERATE_KEY)
        if grant["expires_at"] is not None and grant["expires_at"] <= api.bus.clock.now():
            raise Invalid("expires_at must be Unix seconds to come.", code="invalid_expires_at")
        for field, widens in (("owner", EVERYONE), ("payloads", True)):
            if grant[field] == widens and grant["role"] != "viewer":
                raise Invalid(f"{field} may be {to_json(widens)} only for a viewer.", code=f"invalid_{field}")
        return 201, getattr(api.keys, verb)(**grant)
    return endpoint


with_body = functools.partial(calling, Request.fields)
with_query = functools.partial(calling, Request.parameters)


def of_intent(endpoint):
    """Return an endpoint that takes the first digits of an id for the id."""
    return lambda api, request, digits: endpoint(api, request, api.bus.whole_id(digits, caller=request.caller))


ROUTES = (
    # method, path                      who may     endpoint
    ("GET",  "/",                       None,      home_endpoint),
    *(("GET", path,                     None,      dashboard_redirect)
      for path in ("/dashboard", "/dashboard/", "/admin", "/admin/")),
    ("GET",  "/health",                 None,      health_endpoint),
    ("POST", "/intent",                 "publish", publish_endpoint),
    ("POST", "/publish/*",              "publish", publish_payload_endpoint),
    ("PUT",  "/publish/*",              "publish", publish_payload_endpoint),
    ("POST", "/intents",                "publish", publish_many_endpoint),
    ("POST", "/claim",                  "work",    claim_endpoint),
    ("POST", "/extend_claim/*",         "work",    with_body("extend_claim", EXTEND)),
    ("POST", "/progress/*",             "work",    progress_endpoint),
    ("POST", "/step/*",                 "step",    step_endpoint),
    ("POST", "/fulfill/*",              "work",    reporting("fulfill", FULFILL)),
    ("POST", "/fail/*",                 "work",    reporting("fail", FAIL)),
    ("POST", "/release/*",              "work",    reporting("release", RELEASE)),
    ("GET",  "/status/*",               "look",    of_intent(with_query("get_status", ANYTHING))),
    ("GET",  "/result/*",               "look",    of_intent(result_endpoint)),
    ("GET",  "/output/*",               "look",    of_intent(output_endpoint)),
    ("GET",  "/intents",                "look",    with_query("list", LIST)),
    ("GET",  "/workers",                "look",    with_query("workers", ANYTHING)),
    ("GET",  "/events",                 "look",    events_endpoint),
    ("GET",  "/whoami",                 "look",    who_am_i_endpoint),
    ("POST", "/cancel/*",               "manage",  with_body("cancel")),
    ("POST", "/retry/*",                "manage",  with_body("retry", RETRY_ONE)),
    ("POST", "/retry",                  "manage",  with_body("retry_many", RETRY)),
    ("POST", "/schedule/*",             "manage",  schedule_endpoint),
    ("GET",  "/schedules",              "look",    with_query("schedules", OF_OWNER)),
    ("POST", "/unschedule/*",           "manage",  with_body("unschedule", OF_OWNER)),
    ("POST", "/run/*",                  "manage",  with_body("run", OF_OWNER, 201)),
    ("POST", "/limit/*",                "admin",   limit_endpoint),
    ("GET",  "/limits",                 "admin",   with_query("limits")),
    ("POST", "/set/*",                  "keep",    set_endpoint),
    ("GET",  "/get/*",                  "keep",    lambda api, request, key: (200, {"value": api.bus.get(key, caller=request.caller)})),
    ("POST", "/delete/*",               "keep",    with_body("delete")),
    ("POST", "/admin/generate_key",     "admin",   issuing("generate")),
    ("POST", "/admin/invite",           "admin",   issuing("invite")),
    ("POST", "/join",                   None,      lambda api, request: (201, api.keys.join(request, request.fields(JOIN)["code"]))),
    ("POST", "/admin/revoke_key",       "admin",   revoke_endpoint),
    ("GET",  "/admin/keys",             "view",    lambda api, request: (200, api.keys.list(request.caller, **request.parameters(NOTHING)))),
    ("POST", "/admin/purge",            "admin",   with_body("purge", PURGE)),
    ("POST", "/admin/cancel",           "admin",   with_body("cancel_many", CANCEL)),
    ("POST", "/admin/cleanup",          "admin",   with_body("cleanup")),
    ("GET",  "/admin/dashboard",        None,      lambda api, request: (200, DASHBOARD)),
    ("GET",  "/admin/dashboard/",       None,      dashboard_redirect),
    ("GET",  "/admin/intents",          "view",    with_query("list", LIST)),
    ("POST", "/admin/intents",          "admin",   publish_endpoint),
    ("GET",  "/admin/intents/*",        "view",    of_intent(with_query("inspect"))),
    ("POST", "/admin/intents/*/cancel", "admin",   with_body("cancel")),
    ("POST", "/admin/intents/*/retry",  "admin",   with_body("retry", RETRY_ONE)),
    ("GET",  "/admin/dead",             "view",    with_query("dead")),
    ("POST", "/admin/dead",             "admin",   with_body("sweep_dead", SWEEP)),
    ("GET",  "/admin/dead/*",           "view",    of_intent(with_query("dead_letter"))),
    ("GET",  "/admin/summary",          "view",    lambda api, request: (200, api.summary(request.caller, **request.parameters(SUMMARY)))),
    ("GET",  "/metrics",                "metrics", metrics_endpoint),
)
ROLES = {
    "publish": ("publish", "look", "manage", "keep"),
    "work": ("work", "step", "look", "keep"),
    "both": ("publish", "work", "step", "look", "manage", "keep"),
    "viewer": ("look", "view"),
}
ROLE_WORDS = {"both": "publish and work", "viewer": "look"}     # for a role whose name does not say its rights
REPORTS = ("/extend_claim/", "/progress/", "/fulfill/", "/fail/", "/release/")     # answered before the claims of their round
OPEN_OVER_HTTP = ("/", "/health")                                    # where https is enforced
OPEN_IN_MAINTENANCE = (*OPEN_OVER_HTTP, "/metrics")                  # to everybody; admins are let in everywhere


def from_another_site(headers):
    """Return whether a browser says that a page of another site sent this: browsers add the admin's password by themselves.

    Sec-Fetch-Site (W3C Fetch Metadata) tells, or, in an older browser, Origin.
    """
    site = headers.get("sec-fetch-site")
    if site:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def respond(status, value, request_id, headers=()):
    """Return the response with a value: text, anything that JSON can say, or None for no body."""
    if value is None:
        return Response(status, headers, b"", request_id)
    if not isinstance(value, str):
        value = JsonText(to_json(value))
    kind, more = "text/plain; charset=utf-8", ()
    if isinstance(value, JsonText):
        kind, value = "application/json", value + "\n"     # a shell prompt comes after it
    elif isinstance(value, Redirect):
        more, value = [("Location", value)], value + "\n"
    elif isinstance(value, Html):
        kind, more = "text/html; charset=utf-8", [("Content-Security-Policy", content_policy(value))]
    return Response(status, (("Content-Type", kind), *more, *headers), value.encode(), request_id)


def refusal(error, request_id):
    """Return the response for an error."""
    later = error.status in (429, 503) and "Retry-After" not in dict(error.headers)
    return respond(error.status, {"error": dict(error.details, code=error.code, message=str(error))}, request_id,
                   [*error.headers, *([("Retry-After", "1")] if later else [])])


def log_traceback(what, error):
    """Log an exception that a bug has raised."""
    import traceback
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    print(f"intentbus: {what}:\n{''.join(lines)}", file=sys.stderr, flush=True)


class API:
    """Answers requests: API(bus, keys).handle(request) -> Response, Held or Unfinished.

    enforce_https refuses what came neither encrypted nor from this machine; maintenance answers 503 to all but admins.
    """

    def __init__(self, bus, keys, max_body=BODY_BYTES, enforce_https=False, maintenance=False):
        self.bus, self.keys, self.max_body = bus, keys, max_body
        self._enforce_https, self._maintenance = enforce_https, maintenance
        self.waiting = Waiting()     # the held requests, of a server that holds them
        bus.issued_limits = keys.limits
        self._routes = {}     # path: {method: (who may, endpoint)}
        for method, path, who, endpoint in ROUTES:
            for taken in ("GET", "HEAD") if method == "GET" else (method,):
                self._routes.setdefault(path, {})[taken] = who, endpoint
        self._starred = [(path, *path.split("*")) for path in sorted(self._routes, key=len, reverse=True) if "*" in path]

    def admit(self, request):
        """Find the endpoint of a request, and who sends it, from its head alone; raises the error to answer with."""
        self._require_open(request)
        place, *request.place = self._place(request.path)
        methods = self._routes.get(place)
        if methods is None:
            raise NotFound("There is no such path on this bus; see the README for all paths.")
        if request.method not in methods:
            allowed = ", ".join(sorted(methods))
            raise MethodNotAllowed(f"{place} takes {allowed} only.", headers=[("Allow", allowed)])
        request.who, endpoint = methods[request.method]
        if self._maintenance and request.path not in OPEN_IN_MAINTENANCE:
            request.who = request.who or "admin"     # a mere signature has passed the gate: confirm() is to check it
        if request.who:
            self._identify(request)
        request.endpoint = endpoint

    def _place(self, path):
        """Return the path of a route, and the part of this path in the place of its star, if it has one."""
        if path not in self._routes or "*" in path:
            for route, before, after in self._starred:
                if path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after):
                    return route, path[len(before):len(path) - len(after)]
        return (path,)

    def _require_open(self, request):
        """Raise the error of a gate that is closed to a request, whether or not there is such a path."""
        if request.method in ("POST", "PUT") and from_another_site(request.headers):
            raise Forbidden("This was sent by a page of another site.", "cross_site")
        if self._enforce_https and not (request.secure or request.local or request.path in OPEN_OVER_HTTP):
            raise Forbidden("This bus takes https only.", "https_required")
        if self._maintenance and request.path not in OPEN_IN_MAINTENANCE and not self.keys.presents_right_admin(request):
            raise Unavailable("The bus is under maintenance; try again later.", "maintenance")

    def _identify(self, request):
        if request.who == "metrics":
            self.keys.identify_scraper(request)
        elif request.who == "step":
            self.keys.identify_holder(request)
        elif request.who in ("admin", "view") or request.who in ("look", "manage") and self.keys.presents_admin(request):
            self.keys.identify_admin(request)
        else:
            self.keys.identify(request)

    def handle(self, request):
        """Answer a request; errors become answers, too. Raises RoundLost only."""
        return self._guarded(request, self._answer, request)

    def attempt(self, held):
        """Return the answer to a held request, or None if it has to keep waiting."""
        return self._guarded(held.request, self._ask_again, held, held.attempt)

    def expire(self, held):
        """Return the answer to a held request whose time is over."""
        return self._guarded(held.request, self._ask_again, held, held.otherwise)

    def go_on(self, unfinished):
        """Do the next slice of a long operation; return the answer, or an Unfinished again."""
        return self._guarded(unfinished.request, self._ask_again, unfinished, unfinished.go_on)

    def late_health(self, request):
        """Return the answer to a request for /health whose round has not ended in HEALTH_SECONDS."""
        def known():
            self.bus.require_progress()
            return 200, health_of()
        return self._guarded(request, known)

    def hold(self, request, keys, seconds, attempt, otherwise):
        """Return the answer of attempt() or, if that is None, a Held; that of otherwise() if the request may not wait."""
        found = attempt()
        if found is not None:
            return found
        if not seconds or not request.may_wait:
            return otherwise()
        if request.caller.limits:
            seconds = min(seconds, request.caller.expires_at - self.bus.clock.now())     # its key ends then
            held, lanes = self.waiting.counts_of(request.caller.key_id)
            if held >= KEY_HELD or lanes + len(keys) > KEY_HELD_LANES:
                raise RateLimited(f"This key may have {KEY_HELD} requests that wait; stop some.", "limit_exceeded")
        return Held(request, keys, seconds, attempt, otherwise)

    def refuse(self, request, error):
        """Return the answer for an error, held back for a while if it is about a wrong key; a bug is logged."""
        if not isinstance(error, Error):
            log_traceback(f"request {request.id} failed", error)
            return refusal(Error(), request.id)
        if request.endpoint is health_endpoint and isinstance(error, (Unavailable, StorageFull)):
            return respond(503, health_of(error=str(error)), request.id, [("Retry-After", "1")])
        answer = refusal(error, request.id)
        if error.delay_seconds and request.may_wait:
            return Held(request, (), error.delay_seconds, None, lambda: answer)     # slows down guessing
        return answer

    def summary(self, caller=OWNER, minutes=60):
        """Return the summary of the bus, with the number of held requests, and what the caller may do."""
        return Record(self.bus.summary(minutes, caller=caller), held_requests=len(self.waiting),
                      caller=Record(owner=caller.owner, role=caller.role, admin=caller.admin, payloads=caller.payloads))

    def housekeeping(self):
        """Do the work that is due besides requests; return True if it succeeded."""
        with contextlib.suppress(Error):
            if self.bus.housekeeping_delay() <= 0:
                self.bus.housekeeping()
            self.keys.forget_nonces()
            self.keys.write_usage()
            return True

    def close(self):
        """Store the history, the time and the use of keys, which are kept in memory, if that is possible."""
        with contextlib.suppress(Error):
            self.bus.close()
            self.keys.write_usage(at_once=True)

    def _answer(self, request):
        if request.endpoint is None:
            self.admit(request)
        if request.who:
            self.keys.confirm(request)
            caller = request.caller
            if not caller.admin and request.who not in ROLES[caller.role]:
                able = " or ".join(role for role in ROLES if request.who in ROLES[role])
                raise Forbidden(f"This key has the role {caller.role}; this needs a key with the role {able}.")
            if caller.goals and request.who == "keep":
                raise Forbidden("A key for some goals has no key-value store.")
        found = request.endpoint(self, request, *request.place)
        return self._advance(request, found) if isinstance(found, types.GeneratorType) else found

    def _ask_again(self, waiting, answer):
        caller = waiting.request.caller
        if caller and self.keys.current(caller) != caller:     # it has ended, or may do less
            raise Unauthorized("Invalid API key.")
        return answer()

    def _advance(self, request, running):
        """Advance a long operation for SLICE_SECONDS; return its result, or an Unfinished."""
        until = time.monotonic() + SLICE_SECONDS
        try:
            while True:
                next(running)
                if time.monotonic() >= until:
                    return Unfinished(request, functools.partial(self._advance, request, running))
        except StopIteration as end:
            return end.value

    def _guarded(self, request, function, *arguments):
        """Call a function that answers as an endpoint does; return the Response, what goes on later, or None for nothing yet."""
        try:
            found = function(*arguments)
            if found is None or isinstance(found, (Response, Held, Unfinished)):
                return found
            status, value = found
            return respond(status, value, request.id, [("Retry-After", "1")] if status == 204 else ())
        except RoundLost:
            raise
        except Exception as error:
            return self.refuse(request, error)


# ---- 15. Server ----
# The loop, and strict HTTP/1.1 (RFC 9112): bytes that two programs could read in two ways are refused and the connection
# closed, so that nothing behind them is taken for a request.

REASONS = {200: "OK", 201: "Created", 204: "No Content", 302: "Found", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden",
           404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 411: "Length Required",
           413: "Content Too Large", 422: "Unprocessable Content", 429: "Too Many Requests",
           431: "Request Header Fields Too Large", 500: "Internal Server Error", 503: "Service Unavailable",
           507: "Insufficient Storage"}
READ, WRITE = 1, 2     # as in selectors
LOOPBACK = re.compile(r"localhost|::1|(::ffff:)?127(\.[0-9]{1,3}){3}")     # names and addresses of this machine
TOKEN_PATTERN = r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)"     # RFC 9110, section 5.6.2
REQUEST_LINE = TOKEN_PATTERN + r" (?:(?i:https?)://[^/?#\x00-\x20]+([/?]?[!-~]*)|([/*][!-~]*)) HTTP/1\.([01])"
HEADER_LINE = TOKEN_PATTERN + r":[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)"
BARE_LF = re.compile(rb"(?<!\r)\n")     # patterns of each request are compiled here, others at first use: a start takes 0.7 ms less
CHUNK_SIZE = rb"([0-9A-Fa-f]{1,8})[ \t]*(;[^\x00-\x08\x0a-\x1f\x7f]*)?"     # with extensions, which are dropped
COMMON_LINES = "".join(f"{field}: {value}\r\n" for field, value in COMMON_HEADERS)


def head_too_large():
    """Return the error for a head with too many or too long lines."""
    return HeadersTooLarge(f"A request has at most {HEAD_LINES} header lines of {HEAD_LINE_BYTES} bytes.")


def body_too_large(limit):
    """Return the error for a body over the limit in bytes."""
    return PayloadTooLarge(f"The body is over the limit of {limit} bytes.")


def parse_request_line(line):
    """Return (method, target, HTTP minor version) of a request line in bytes."""
    if len(line) > HEAD_LINE_BYTES:
        raise head_too_large()
    found = re.fullmatch(REQUEST_LINE, line.decode("latin-1"))
    if not found:
        raise Invalid("The request line must be METHOD /path HTTP/1.1.")
    method, of_url, target, version = found.groups()     # of_url: from a URL in full, as to a proxy
    return method, target or (of_url if of_url.startswith("/") else "/" + of_url), version


def parse_headers(block):
    """Return the headers by lower-case name of header lines in bytes, as a dict that is not to be changed."""
    lines = block.decode("latin-1").split("\r\n") if block else ()
    if len(lines) > HEAD_LINES or len(block) > HEAD_LINE_BYTES and max(map(len, lines)) > HEAD_LINE_BYTES:
        raise head_too_large()
    headers = {}
    for line in lines:
        found = re.fullmatch(HEADER_LINE, line)
        if not found:
            raise Invalid("A header line must be Name: value, with no space before the colon and no control character.")
        field, value = found[1].lower(), found[2].rstrip(" \t")
        if field in headers and field in ("host", "content-length", "transfer-encoding"):
            raise Invalid(f"{found[1]} was sent twice.")
        headers[field] = f"{headers[field]}, {value}" if field in headers else value
    return headers


def body_length(headers, version, limit):
    """Return the length of the body that these headers announce, None if it is chunked; raises Error if they are wrong."""
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise Invalid("Content-Length and Transfer-Encoding exclude each other.")
        if version == "0" or headers["transfer-encoding"].lower() != "chunked":
            raise LengthRequired("Send the body with a Content-Length or, in HTTP/1.1, chunked.")
        return None
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise Invalid("Content-Length must be decimal digits.")
    if len(length) > 15 or int(length) > limit:
        raise body_too_large(limit)
    return int(length)


def origin(headers, peer, secure, trust_proxy):
    """Return where a request comes from, as arguments of Request, given the address of the peer and whether it used TLS.

    A trusted proxy tells: in the last address of X-Forwarded-For, the one that it has seen itself, and X-Forwarded-Proto.
    Behind it, nothing is known to be on this machine.
    """
    if not trust_proxy:
        return dict(peer=peer, secure=secure, local=bool(LOOPBACK.fullmatch(peer)))
    client, scheme = (headers.get(f"x-forwarded-{part}", "").rpartition(",")[2].strip() for part in ("for", "proto"))
    return dict(peer=plain_address(client) if client else peer, secure=scheme.lower() == "https")


class Chunks:
    """Reads a chunked body (RFC 9112, section 7.1) strictly; extensions and trailers are dropped."""

    def __init__(self, limit):
        self.body, self._limit = bytearray(), limit
        self._room = limit + HEAD_BYTES     # for the body and its framing
        self._size = None                   # of the chunk that comes; None: its size line comes, 0: trailers come
        self._chunks = self._trailers = 0

    def take(self, data):
        """Take from the front of a bytearray; return whether the body is whole."""
        while (end := self._size or data.find(b"\r\n", 0, HEAD_LINE_BYTES)) >= 0 and len(data) >= end + 2:
            part, after = bytes(data[:end]), data[end:end + 2]
            del data[:end + 2]
            self._room -= end + 2
            if self._size:
                if after != b"\r\n":
                    raise Invalid("A chunk must be as long as its size says, and end with CR LF.")
                self.body += part
                self._size = None
            elif self._size is None:
                found = re.fullmatch(CHUNK_SIZE, part)
                if not found:
                    raise Invalid("The size of a chunk must be hexadecimal digits.")
                self._size = int(found[1], 16)
                self._chunks += 1
            elif not part:
                return True
            elif not re.fullmatch(HEADER_LINE, part.decode("latin-1")):
                raise Invalid("A trailer of a chunked body must be Name: value.")
            else:
                self._trailers += 1
            if self._chunks > CHUNKS or self._trailers > HEAD_LINES:
                raise Invalid(f"A chunked body has at most {CHUNKS} chunks and {HEAD_LINES} trailers.")
            if self._room < 0 or len(self.body) + (self._size or 0) > self._limit:
                raise body_too_large(self._limit)
        if not self._size and len(data) >= HEAD_LINE_BYTES:
            raise Invalid(f"A line of a chunked body has at most {HEAD_LINE_BYTES} bytes.")
        return False


class Tls:
    """TLS as a filter of bytes: received ones go through decrypt(), sent ones through encrypt()."""

    def __init__(self, context):
        import ssl
        self._incomplete, self._received, self._outgoing = ssl.SSLWantReadError, ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._outgoing, server_side=True)
        self.ready = self.ended = False     # after the handshake; after the client's last byte

    def decrypt(self, data):
        """Return the plain text of bytes, which may be empty; the handshake comes first. Raises OSError if it is no TLS."""
        self._received.write(data)
        plain = bytearray()
        with contextlib.suppress(self._incomplete):
            if not self.ready:
                self._tls.do_handshake()
                self.ready = True
            while part := self._tls.read(INPUT_BYTES):
                plain += part
            self.ended = True
        return plain

    def encrypt(self, plain):
        """Return the bytes to send for a plain text."""
        self._tls.write(plain)
        return self.pending()

    def pending(self):
        """Return bytes that TLS itself has to send: of the handshake, or an alert."""
        return self._outgoing.read()


class Certificate:
    """The certificate of a TLS server, as `context` for its next connections."""

    def __init__(self, certificate, key):
        self._files, self._seen, self._loaded = (certificate, key), None, None
        self.renew(at_once=True)

    def renew(self, at_once):
        """Load the files if they have changed, or at once; return whether they were loaded. Raises SetupError if they cannot be used.

        A change is loaded once the files stay as they are from one call to the next: a renewal writes one after the other.
        """
        import ssl
        seen, self._seen = self._seen, []
        for path in self._files:
            with contextlib.suppress(OSError):
                status = os.stat(path)
                self._seen.append((status.st_ino, status.st_size, status.st_mtime_ns))
        if not at_once and (self._seen == self._loaded or self._seen != seen):
            return False
        self._loaded = self._seen
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)     # a new one: after a failure to load files, a context cannot be used again
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(*self._files)
        except OSError as error:
            bad_content = isinstance(error, ssl.SSLError) and "one of them is damaged, or they do not belong together"
            raise SetupError("The TLS certificate {} and key {} cannot be used: {}.".format(
                *self._files, bad_content or error.strerror)) from error
        self.context = context
        return True


def rendered(response, connection, bodiless=False):
    """Return the bytes of a response, to be sent at once: in two pieces, Nagle's algorithm can cost 40 ms."""
    lines = "".join([f"{field}: {value}\r\n" for field, value in response.headers])
    if response.status != 204:
        lines += f"Content-Length: {len(response.body)}\r\n"
    if connection:
        lines += f"Connection: {connection}\r\n"
    head = (f"HTTP/1.1 {response.status} {REASONS[response.status]}\r\n{date_line(int(time.time()))}{COMMON_LINES}"
            f"X-Request-ID: {response.request_id}\r\n{lines}\r\n")
    return head.encode("latin-1") + (b"" if bodiless else response.body)


@functools.lru_cache(maxsize=1)
def date_line(second):
    """Return the Date header of a second of Unix time."""
    return time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(second))


class RequestReader:
    """Makes whole requests of the bytes of one connection."""

    __slots__ = ("data", "request", "version", "bodiless", "_loop", "_peer", "_searched", "_body")

    def __init__(self, loop, peer):
        self.data = bytearray()      # received, and not parsed yet
        self.request = None          # whose body is being read
        self.version = "1"           # of HTTP/1.0 or HTTP/1.1, as the last request has it
        self.bodiless = False        # whether the answer to that is a head only
        self._loop, self._peer = loop, peer
        self._searched = 0           # bytes of data that hold no end of a head
        self._body = None            # the length of the body, or Chunks

    def next(self):
        """Return the next request, or None as long as it is not whole; raises the Error to refuse it with."""
        if self.request is None and not self._read_head() or not self._read_body():
            return None
        request, self.request = self.request, None
        return request

    def begun(self):
        """Return which part of the next request is incomplete: "head", "body", or "" if nothing of it has come."""
        return "body" if self.request else "head" if self.data and self.data != b"\r" else ""

    def kept_bytes(self):
        """Return how many bytes are kept of a request that is not whole."""
        return len(self.data) + (len(self._body.body) if self.request and isinstance(self._body, Chunks) else 0)

    def wants_continue(self):
        """Return whether the client waits for a word before it sends the body."""
        return bool(self._body) and self.version == "1" and self.request.headers.get("expect", "").lower() == "100-continue"

    def skip_body(self):
        """Drop the body of a refused request; return whether the next request can be found behind it."""
        found = self.request is not None and isinstance(self._body, int) and len(self.data) >= self._body
        if found:
            del self.data[:self._body]
        self.request = None
        return found

    def _read_head(self):
        data, self.bodiless = self.data, False
        if data.startswith(b"\r\n"):     # RFC 9112, section 2.2: empty lines before a request are skipped
            empty = re.match(rb"(?:\r\n)*", data).end()
            if empty > 2 * HEAD_LINES:
                raise Invalid("There are too many empty lines before the request.")
            del data[:empty]
        end = data.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0 or end > HEAD_BYTES:
            if BARE_LF.search(data, self._searched):
                raise Invalid("Each line of the head must end with CR LF.")
            if len(data) > HEAD_BYTES:
                raise HeadersTooLarge(f"The head of a request has at most {HEAD_BYTES} bytes.")
            self._searched = len(data)     # a head that comes in single bytes is not searched again for each
            return False
        line, _, block = bytes(data[:end]).partition(b"\r\n")
        del data[:end + 4]
        self._searched, self._body = 0, None
        headers = self._loop.heads.get(block) or parse_headers(block)
        method, target, self.version = parse_request_line(line)
        self.bodiless = method == "HEAD"
        if self.version == "1" and "host" not in headers:
            raise Invalid("An HTTP/1.1 request needs a Host header.")
        self.request = Request(method, target, headers,
                               **origin(headers, self._peer, bool(self._loop.certificate), self._loop.trust_proxy))
        length = body_length(headers, self.version, self._loop.api.max_body)
        self._body = Chunks(self._loop.api.max_body) if length is None else length
        self._loop.admit(self.request, block)
        return True

    def _read_body(self):
        data, body = self.data, self._body
        if isinstance(body, Chunks):
            if not body.take(data):
                return False
            self.request.body = bytes(body.body)
        elif len(data) < body:
            return False
        elif body:
            self.request.body = bytes(data[:body])
            del data[:body]
        return True


class Connection:
    """One client's connection: a small state machine that never waits.

    It hands whole requests to the loop, one at a time, and sends the answers. The client has until `deadline`, by
    time.monotonic(), for whatever it owes: a request, the rest of one, or taking an answer.
    """

    __slots__ = ("loop", "sock", "peer", "tls", "reader", "request", "held", "outgoing", "answering", "last", "lingering", "eof",
                 "closed", "events", "deadline", "alarm", "awaited", "began", "account")

    def __init__(self, loop, sock, peer, tls):
        self.loop, self.sock, self.peer, self.tls = loop, sock, peer, tls
        self.reader = RequestReader(loop, peer)
        self.request = self.held = None     # the request that the bus has, and the Held if it is held
        self.outgoing = b""                 # bytes that the socket has not taken yet
        self.account = ""                   # to whom that is accounted
        self.answering = False              # whether it ends with a whole answer
        self.last = False                   # whether the connection ends with this answer
        self.lingering = False              # whether it waits only for the client to close
        self.eof = self.closed = False      # eof: the client sends no more
        self.events = 0                     # READ and WRITE, as the selector watches for them
        self.deadline, self.alarm = float("inf"), None     # alarm: the loop's entry for the deadline
        self.awaited = None                 # "", or the part of a request that the deadline is for: "head" or "body"
        self.began = 0                      # when the bus got the request

    # -- Receiving --

    def on_event(self, events):
        """React to events of the selector."""
        if events & WRITE:
            self._flush()
        if events & READ and not self.closed:
            self._receive()

    def _receive(self):
        if self.tls and not self.tls.ready and not self.loop.may_shake_hands(self):
            return
        try:
            data = self.sock.recv(INPUT_BYTES)
            self.eof = not data
            if self.tls and data:
                data = self.tls.decrypt(data)
                self.eof = self.tls.ended
        except BlockingIOError:
            return
        except OSError:     # the client is gone, or speaks no TLS
            data = None
        if self.tls:
            self._push(self.tls.pending())
        if data is None or self.closed:
            return self.close()
        self.reader.data += data
        if self.eof:
            self.loop.watch(self, self.events & ~READ)
        if self.lingering:
            self._linger()
        elif self.request is None and not self.answering:
            self._parse()
        elif self.held and self.held.keys and self.eof:
            self.loop.expire(self.held)
        elif not self.loop.keep(self, self.request, len(self.reader.data)) or len(self.reader.data) > INPUT_BYTES:
            self.loop.watch(self, self.events & ~READ)

    def on_ready(self):
        """Parse bytes that are here already, then take in more, unless there is enough for the next requests."""
        if self.request is None and not self.closed:
            self._parse()
            if not self.closed and not self.eof and len(self.reader.data) <= INPUT_BYTES:
                self.loop.watch(self, self.events | READ)

    def _parse(self):
        """Hand the next request to the loop, if it is whole."""
        try:
            request = self.reader.next()
        except Error as error:
            return self._refuse(error)
        if request:
            self._begin(request)
            self.loop.submit(request)
        elif self.eof:
            self.close()
        elif self.loop.keep(self, self.reader.request, self.reader.kept_bytes()):
            self._await(self.reader.begun())
        else:
            self._refuse(Unavailable("The bus has too many bodies to take in at once; try again.", "too_many_bodies"))

    def _begin(self, request):
        self.request, request.connection, self.began = request, self, self.loop.now
        self.awaited, self.deadline = None, float("inf")
        self.loop.request_came(self, request)

    def _refuse(self, error):
        """Answer a request that is refused before it is whole."""
        self._begin(self.reader.request or Request("GET", "/", peer=self.peer))
        self.last = not self.reader.skip_body()
        self.loop.deliver(self.request, self.loop.api.refuse(self.request, error))

    def _await(self, awaited):
        """Give the client its time for the part that it owes now."""
        if awaited == self.awaited:
            return
        if awaited == "body" and self.reader.wants_continue():
            self._push(self._encrypted(b"HTTP/1.1 100 Continue\r\n\r\n"))
        self.awaited = awaited
        self.loop.arm(self, {"": IDLE_SECONDS, "head": HEAD_SECONDS, "body": BODY_SECONDS}[awaited])

    def on_alarm(self):
        """Look whether the client's time is over."""
        self.alarm = None
        if self.loop.now < self.deadline:
            if self.deadline < float("inf"):
                self.loop.arm(self, self.deadline - self.loop.now)
        elif self.held:
            self.loop.expire(self.held)
        elif self.awaited:
            self._refuse(RequestTimeout("The request did not arrive in time."))
        else:
            self.close()

    # -- Sending --

    def answer(self, response):
        """Send the answer to the request that the bus has had."""
        request, self.request = self.request, None
        wanted, old = request.headers.get("connection", "").lower(), self.reader.version == "0"
        failed = response.status in (401, 403) and not request.proven     # trying the next key takes a new connection
        self.last = self.last or failed or self.loop.stopping or ("keep-alive" not in wanted if old else "close" in wanted)
        self.account = request.account
        self.loop.keep(self, None, 0)
        self.loop.log(request, response, self.began)
        self.answering = True
        self._push(self._encrypted(rendered(response, "close" if self.last else "keep-alive" if old else "",
                                            self.reader.bodiless)))

    def _encrypted(self, data):
        return self.tls.encrypt(data) if self.tls else data

    def _push(self, data):
        """Send bytes, and keep the rest that the socket does not take."""
        self.outgoing = b"".join((self.outgoing, data)) if self.outgoing else data
        if self.outgoing and not self.closed:
            self._flush()

    def _flush(self):
        try:
            sent = self.sock.send(self.outgoing)
        except BlockingIOError:
            sent = 0
        except OSError:     # the client is gone
            return self.close()
        if sent < len(self.outgoing):
            self.outgoing = memoryview(self.outgoing)[sent:]
            self.loop.watch(self, self.events | WRITE)
            self.loop.arm(self, SEND_SECONDS)
            return self.loop.count_unread(self, len(self.outgoing))
        if isinstance(self.outgoing, memoryview):     # the end of an answer that was read slowly
            self.loop.count_unread(self, 0)
        self.outgoing = b""
        self.loop.watch(self, self.events & ~WRITE)
        if self.answering:
            self.answering = False
            self._go_on()

    def _go_on(self):
        """After an answer, read the next request, or end."""
        if self.last:
            return self._linger()
        self.loop.may_evict(self)
        if self.reader.data or self.eof:
            self.loop.ready[self] = None     # the selector does not tell of bytes that are here already
            self.loop.watch(self, self.events & ~READ)     # and these come first
        else:
            self.loop.watch(self, self.events | READ)
            self._await("")

    def _linger(self):
        """Wait for the client's end: to close with bytes unread would reset the connection, and lose the answer."""
        self.reader.data.clear()
        if self.eof or self.loop.stopping:
            return self.close()
        if not self.lingering:
            self.lingering = True
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.loop.watch(self, READ)
            self.loop.arm(self, LINGER_SECONDS)
            self.loop.may_evict(self, first=True)

    def close(self):
        """End the connection; the answer to a request that the bus still has is dropped."""
        if not self.closed:
            self.closed = True
            self.loop.forget(self)
            self.request = None
            self.sock.close()


class Budget:
    """The memory that connections take: total_bytes of all, and account_bytes of each account but the owner key's."""

    def __init__(self, total_bytes, account_bytes=None):
        self._total_bytes, self._account_bytes = total_bytes, account_bytes or total_bytes
        self._taken = collections.OrderedDict()     # connection: (account, bytes), which takes some for longest first
        self._of, self._all = collections.Counter(), 0     # account: bytes; and in all

    def take(self, connection, account, number):
        """Note that a connection takes that many bytes now."""
        if not number and connection not in self._taken:
            return
        before, taken = self._taken.get(connection, (account, 0))
        self._taken[connection] = account, number
        self._of[before] -= taken
        self._of[account] += number
        self._all += number - taken
        if not number:
            del self._taken[connection]
        if not self._of[before]:
            del self._of[before]

    def blamed(self, account):
        """Return the connection that has taken bytes for longest, of an account or of all, if these take too much; else None."""
        too_much = account != OWNER.key_id and self._of[account] > self._account_bytes
        if too_much or self._all > self._total_bytes:
            return next(connection for connection, (name, _) in self._taken.items() if name == account or not too_much)
        return None


# A job of a round: run() returns a Response, a Held, an Unfinished, or None for nothing yet. request is None for housekeeping;
# since is when the job was taken in; repeatable tells whether it may run again after its round is lost.
Job = collections.namedtuple("Job", "request run since repeatable", defaults=[None, False])


class FairQueue:
    """Items in the order in which they came, but of one account after the other: many of one delay no other."""

    def __init__(self, account_of=lambda job: job.request.account if job.request else ""):
        self._account_of = account_of
        self._of, self._size = collections.OrderedDict(), 0     # account: items, the next account first

    def __len__(self):
        return self._size

    def append(self, item):
        """Take in an item."""
        self._of.setdefault(self._account_of(item), collections.deque()).append(item)
        self._size += 1

    def popleft(self, take=collections.deque.popleft):
        """Return the next item: the oldest of the next account."""
        account, items = self._of.popitem(last=False)
        if len(items) > 1:
            self._of[account] = items
        self._size -= 1
        return take(items)

    def pop(self):
        """Return the newest item of the next account."""
        return self.popleft(collections.deque.pop)

    def since(self):
        """Return when the first job of any account was taken in."""
        return min(jobs[0].since for jobs in self._of.values())


class Rounds:
    """Answers requests in rounds: one transaction and one commit for all requests that have come.

    A held claim is attempted right after the request that made an intent ready for it, in the same round. If a round is lost,
    nothing of it is answered: its requests run again, each in a round of its own, a long operation ends with the error, and
    held claims keep waiting.
    """

    def __init__(self, loop):
        self._loop, self._api, self._store = loop, loop.api, loop.api.bus.store
        self._reads, self._reports, self._writes = (FairQueue() for _ in range(3))     # reports before writes
        self._alone = collections.deque()    # jobs of a lost round, each to run in a round of its own
        self._watchers = collections.deque() # jobs of held requests for events
        self._news_of = set()                # owners whose watchers have not been given a job since the last event
        self._ran = []                       # (job, outcome) of the round
        self._claimed = []                   # (held claim, answer) of the round
        self._lanes = collections.deque()    # (lane, whether unknown intents may be in it), to offer to held claims
        self._offered = []                   # (lane, the same) that the round has offered
        self._blocks_seen = 0                # blocks of the round whose moves are taken in
        self._apart_until = 0                # until when commits run in a thread, after a slow one
        self._gathering = 0                  # for how many seconds the next round waits, after a slow commit
        self._begin_at = 0                   # when the next round may begin
        self.stalled = False                 # whether the loop has stood still

    def submit(self, request):
        """Take in a request."""
        jobs = self._reads
        if not request.reads or request.endpoint is health_endpoint:     # it may write
            jobs = self._reports if request.path.startswith(REPORTS) else self._writes
        jobs.append(Job(request, functools.partial(self._api.handle, request), self._loop.now, repeatable=True))

    def go_on(self, unfinished):
        """Take in the next slice of a long operation."""
        jobs = self._reads if unfinished.request.reads else self._writes
        jobs.append(Job(unfinished.request, functools.partial(self._api.go_on, unfinished), self._loop.now))

    def keep_house(self, housekeeping):
        """Take in a function that does due work, and returns whether it succeeded."""
        self._writes.append(Job(None, housekeeping))

    def expire(self, held):
        """Take in a held request whose time is over."""
        self._reads.append(Job(held.request, functools.partial(self._api.expire, held)))

    def attempt_all(self, key, jobs=None):
        """Attempt the requests that are held for a key, which only read."""
        for held in self._loop.waiting.all(key):
            if not held.queued:
                held.queued = True
                (self._reads if jobs is None else jobs).append(Job(held.request, functools.partial(self._attempt, held)))

    def look_again(self):
        """Attempt held requests after another program has changed the database."""
        for key in self._loop.waiting.keys():
            if "\t" in key:
                self._lanes.append((key, True))
            else:
                self.attempt_all(key)

    def learn(self, moves):
        """Attempt the requests that are held for events, or for the end or the progress of an intent, now that it is on disk."""
        for move in moves:
            if move.intent.ended or move.event is None:
                self.attempt_all(move.intent.id)
            if move.event:
                self._news_of.update((move.intent.owner, move.intent.claim_owner, None))

    def apart(self, function, then=lambda result: None):
        """Run a function that writes in a thread; reads go on meanwhile, and the next round begins after it."""
        def end(result):
            self._store.busy_since = None
            then(result)
        self._store.busy_since = self._loop.now
        self._loop.in_thread(function, end)

    def delay(self):
        """Return in how many seconds work() has something to do; float("inf") if nothing, or if it waits for apart()."""
        if self._reads or self._watchers or self._news_of:
            return 0
        return max(0, self._begin_at - self._loop.now) if self._may_begin() else float("inf")

    def work(self):
        """Run a round of jobs that may write, then reads, which see committed state; watchers get short slices."""
        if self._may_begin() and self._loop.now >= self._begin_at:
            self._round()
        self._read(self._reads, ROUND_SECONDS)
        if not self._watchers:
            while self._news_of:
                self.attempt_all(event_key(self._news_of.pop()), self._watchers)
        self._read(self._watchers, SLICE_SECONDS)

    def _read(self, jobs, seconds):
        """Run jobs that only read: one at least, and more as long as there is time."""
        until = time.monotonic() + seconds
        while jobs:
            job = jobs.popleft()
            self._finish(job, job.run())
            if time.monotonic() >= until:
                return

    def _finish(self, job, outcome):
        """Deliver the outcome of a job; a held request keeps no more than it needs."""
        self._loop.deliver(job.request, outcome)
        if job.request and job.request.connection.held:
            job.request.trim()

    def _may_begin(self):
        return self._store.busy_since is None and bool(self._alone or self._reports or self._writes or self._lanes)

    def _round(self):
        self._store.obstacle = None
        try:
            self._store.database.begin()
        except Error as error:
            self._store.obstacle, self._begin_at = error, self._loop.now + LOCK_CHECK_SECONDS
            return self._refuse_waiting(error, LOCK_SECONDS if isinstance(error, Busy) else 0)
        try:
            if self.stalled or self._reports and self._loop.now - self._reports.since() > STALL_SECONDS:
                self.stalled = False
                self._api.bus.spare_leases()
            self._run_jobs()
            self._store.prepare()
        except Exception as error:
            return self._end(error)
        if self._loop.now < self._apart_until:
            self.apart(self._commit, self._end)
        else:
            self._end(self._commit())

    def _run_jobs(self):
        """Run one job alone; or reports and then others, each followed by the held claims that it gives an intent to."""
        if self._alone:
            return self._run(self._alone.popleft())
        until = time.monotonic() + ROUND_SECONDS
        while True:
            self._offer_lanes()
            jobs = self._reports or self._writes
            if not jobs or len(self._ran) >= ROUND_REQUESTS or time.monotonic() >= until:
                return
            self._run(jobs.popleft())

    def _run(self, job):
        self._ran.append((job, None))     # known before it runs, in case the round is lost
        outcome = job.run()
        if isinstance(outcome, Held):     # at once, so that the next job of this round finds it
            outcome = self._loop.deliver(job.request, outcome)
        self._ran[-1] = job, outcome
        self._take_in_moves()

    def _offer_lanes(self):
        """Attempt, for each intent that got ready, the claim that is held longest for it."""
        while self._lanes and len(self._offered) < ROUND_REQUESTS:
            lane, unknown = self._lanes.popleft()
            held = self._loop.waiting.first(covering_lanes(lane))
            if held is None:
                continue
            self._offered.append((lane, unknown))
            answer = self._api.attempt(held)
            claimed = self._take_in_moves()
            if answer is not None:
                held.settled = True
                self._loop.waiting.release(held)
                self._claimed.append((held, answer))
                if unknown or lane not in claimed:     # it was refused, or took another intent: the next one is attempted
                    self._lanes.appendleft((lane, unknown))

    def _take_in_moves(self):
        """Note the lanes in which intents got ready since the last call; return those in which one was claimed."""
        moves = [move for block in self._store.round[self._blocks_seen:] for move in block.moves]
        self._blocks_seen = len(self._store.round)
        if self._loop.waiting:
            self._lanes += [(move.intent.lane, False) for move in moves if move.intent.ready]
            for goal in {(move.intent.namespace, move.intent.goal) for move in moves if makes_room(move)}:
                self._lanes += [(lane, True) for lane in self._api.bus.ready_lanes(*goal)]
        return {move.intent.lane for move in moves if move.event == "claimed"}

    def _commit(self):
        """Commit the round, in whichever thread; return the error, or None."""
        began = time.monotonic()
        try:
            self._store.database.commit()
        except Error as error:
            return error
        finally:
            took = time.monotonic() - began
            slow = took > SLOW_COMMIT_SECONDS and self._store.database.commits_apart
            self._gathering = took * GATHERING_TIMES if slow else 0
            if slow:
                self._apart_until = began + took * SLOW_COMMIT_TIMES

    def _end(self, error):
        """Send the answers of a round that is on disk. After an error, have each of its requests meet its own error."""
        ran, claimed, offered = self._ran, self._claimed, self._offered
        self._ran, self._claimed, self._offered, self._blocks_seen = [], [], [], 0
        if error:
            self._store.abandon()
            return self._lose(getattr(error, "cause", error), ran, claimed, offered)
        self._store.finish()
        for job, outcome in ran:
            self._finish(job, outcome)
        for held, answer in claimed:
            self._loop.deliver(held.request, answer)
        self._begin_at = time.monotonic() + self._gathering
        if self._store.database.log_is_long():
            self.apart(self._store.database.truncate_log)

    def _lose(self, error, ran, claimed, offered):
        """Take back a lost round: its requests run again, one by one; a request that was alone gets the error."""
        for held, _ in claimed:
            self._loop.hold_again(held)
        self._lanes += offered
        jobs = [job for job, _ in ran if job.request and self._loop.awaits_answer(job.request)]     # housekeeping comes again
        for job in jobs:
            if job.repeatable and (offered or len(jobs) > 1):
                self._loop.release(job.request.connection)
                self._alone.append(job)
            else:
                self._loop.deliver(job.request, self._api.refuse(job.request, error))
        if not jobs:
            self._begin_at = self._loop.now + LOCK_CHECK_SECONDS

    def _refuse_waiting(self, error, seconds):
        """Refuse requests that have waited for that many seconds."""
        for jobs in (self._alone, self._reports, self._writes):
            for job in [jobs.popleft() for _ in range(len(jobs))]:
                if not job.request or not self._loop.awaits_answer(job.request):     # housekeeping comes again
                    continue
                if self._loop.now - job.since >= seconds:
                    self._loop.deliver(job.request, self._api.refuse(job.request, error))
                else:
                    jobs.append(job)

    def _attempt(self, held):
        """Return the answer to a held request, if there is one and it is still wanted."""
        held.queued = False
        return None if held.settled else self._api.attempt(held)


class Loop:
    """The selector loop of Server, which is made of this class and http.server.ThreadingHTTPServer.

    Server has the socket of that class, and how it is bound, activated and accepts; serve_forever() and shutdown() are the
    loop's. ThreadingMixIn's threads are for work that waits, such as a slow commit: process_request() takes it, as it takes
    a datagram in UDPServer, finish_request() does it in a thread, and the loop gets the result through a socket.
    """

    request_queue_size = BACKLOG
    daemon_threads = True
    allow_reuse_address = POSIX     # elsewhere a second server could take the port

    limit = certificate = None     # the number of connections, and the Certificate; bound_server() sets them

    def open(self, api, access_log, trust_proxy):
        """Take the API to serve, and the options of http_server, and listen; raises SetupError if another server does."""
        try:
            self.server_activate()
        except OSError as error:     # on Linux, both may be bound to a port that is to be used again
            raise no_place(*self.server_address[:2], error) from error
        self.api, self._access_log, self.trust_proxy = api, access_log, trust_proxy
        self._renewing, self._renew_now, self._renew_at = False, False, 0
        self.now, self._turned_at, self.stopping = time.monotonic(), steady_clock(), False
        self.waiting, self.heads = api.waiting, {}     # heads: parsed headers by their bytes, of known callers
        self.ready = {}                             # connections with bytes that are not parsed yet: None, in order
        self._connections = set()
        self._evictable = collections.OrderedDict() # connections whose client has to send, to read or to prove a key next
        self._unproven, self._bodies = Budget(UNPROVEN_BYTES), Budget(BODIES_BYTES, KEY_BODIES_BYTES)
        self._unread, self._keeping = Budget(UNREAD_BYTES, KEY_UNREAD_BYTES), set()     # connections in the first two
        self._shaking = FairQueue(lambda connection: network_of(connection.peer))     # TLS handshakes that wait for a turn
        self._handshakes = self._housekeeping_at = self._house_due_at = 0
        self._alarms, self._numbers = [], itertools.count()     # a heap of [when, number, function or None]
        self._call_at(0, self._tick)
        self._handed = collections.deque()          # (function, result of a thread) for the loop
        self._serving = threading.Lock()            # held while serve_forever() runs
        self._selector = selectors.DefaultSelector()
        self._woken, self.wakeup = socket.socketpair()     # a byte sent to wakeup ends the wait of the loop
        for sock in (self.socket, self._woken, self.wakeup):
            sock.setblocking(False)
        self._selector.register(self._woken, READ, self._on_wakeup)
        self._selector.register(self.socket, READ, self._accept)
        self.rounds = (api.bus.store.database.rounds or Rounds)(self)
        api.bus.on_news, api.keys.on_revoked = self.rounds.learn, self.end_held

    # -- The loop --

    def serve_forever(self, poll_interval=None):
        """Serve until stop() or shutdown() is called; then answer running requests, for SHUTDOWN_SECONDS at most."""
        with self._serving:
            while not self.stopping:
                self.turn()
            self._drain()

    def turn(self, longest=float("inf")):
        """Receive from all ready connections, ring due alarms, answer, commit and send; wait for `longest` seconds at most."""
        timeout = min(longest, self._timeout())
        happened = self._selector.select(timeout)
        self.now, self._handshakes = time.monotonic(), 0
        self._shake_hands()
        for key, events in happened:
            self._safely(key.data, events)
        turned_at, self._turned_at = self._turned_at, steady_clock()
        if self._turned_at - turned_at > timeout + STALL_SECONDS:     # the process was stopped, or the machine slept
            self.rounds.stalled = True
        self.now = time.monotonic()
        ready, self.ready = self.ready, {}
        for connection in ready:
            self._safely(connection.on_ready)
        while self._alarms[0][0] <= self.now:     # there always is one, for _tick
            _, _, alarm = heapq.heappop(self._alarms)
            if alarm:
                self._safely(alarm)
        self._safely(self._look_around)
        self._safely(self.rounds.work)

    def _timeout(self):
        """Return for how many seconds there is nothing to do, unless something arrives."""
        self._house_due_at = max(self._housekeeping_at, self.now + self.api.bus.housekeeping_delay())
        if self.ready or self._handed or self._shaking:
            return 0
        return max(0, min(min(self._alarms[0][0], self._house_due_at) - self.now, self.rounds.delay()))

    def _safely(self, function, *arguments):
        """Call a function; an exception is logged and, if it is a method of a connection, closes that one."""
        try:
            function(*arguments)
        except Exception as error:
            log_traceback("the bus goes on after a fault", error)
            owner = getattr(function, "__self__", None)
            if isinstance(owner, Connection):
                owner.close()

    def _look_around(self):
        """Queue housekeeping, and have the certificate loaded again, when it is due."""
        if self.now >= self._house_due_at:
            self._housekeeping_at = self.now + RECHECK_SECONDS     # earlier, if it succeeds
            self.rounds.keep_house(self.api.housekeeping)
        if self.certificate and not self._renewing and (self._renew_now or self.now >= self._renew_at):
            at_once, self._renew_now, self._renewing = self._renew_now, False, True
            self._renew_at = self.now + CERTIFICATE_SECONDS
            self.in_thread(functools.partial(self.certificate.renew, at_once), self._renewed)

    def _tick(self):
        """Look at the clock and at the file, every RECHECK_SECONDS."""
        self._call_at(self.now + RECHECK_SECONDS, self._tick)
        bus = self.api.bus
        bus.registry.forget_silent(bus.clock.now())
        if bus.store.busy_since is not None:
            return
        with contextlib.suppress(Error):     # requests meet it as well
            if bus.store.database.changed_elsewhere():
                bus.distrust_memory()
                self.api.keys.reload()
                self.rounds.look_again()
            if bus.clock.step():
                self.rounds.apart(bus.shift_clock)

    def _renewed(self, result):
        """Log that the certificate was loaded again, or the error: then the one before stays in use."""
        self._renewing = False
        if isinstance(result, Exception):
            print(f"intentbus: {str(result).rstrip('.')}; the one before stays in use", file=sys.stderr, flush=True)
        elif result:
            print("intentbus: the TLS certificate was loaded again", file=sys.stderr, flush=True)

    def _drain(self):
        """Accept nothing more; answer held requests now, and running ones once they are done."""
        self._pause_accepting(None)
        self.socket.close()
        for connection in list(self._connections):
            if connection.held:
                self.expire(connection.held)
            elif connection.request is None and not connection.answering:
                connection.close()
        until = time.monotonic() + SHUTDOWN_SECONDS
        while self._connections and time.monotonic() < until or self.api.bus.store.busy_since is not None:
            self.turn(max(0, until - time.monotonic()))     # a commit that runs in a thread needs the database to its end

    def stop(self):
        """Let serve_forever() end; for signal handlers and other threads."""
        self.stopping = True
        self.wake()

    def renew_certificate(self):
        """Have the files of the certificate loaded again now; for signal handlers and other threads."""
        self._renew_now = True
        self.wake()

    def shutdown(self):
        """Stop, and wait until serve_forever() has ended."""
        self.stop()
        with self._serving:
            pass

    def close(self):
        """Stop, let go of all sockets, and store the counts that are kept in memory."""
        self.shutdown()
        for connection in list(self._connections):
            connection.close()
        self.server_close()
        self._selector.close()
        self._woken.close()
        self.wakeup.close()
        self.api.close()

    # -- Threads --

    def in_thread(self, function, then):
        """Run a function that waits in a thread, or here if none can be started; the loop then calls then(result or error)."""
        try:
            self.process_request((function, then), None)
        except RuntimeError:     # this machine gives us no more threads
            self.finish_request((function, then), None)

    def finish_request(self, request, client_address):
        """Run the function of in_thread(), in its thread."""
        function, then = request
        try:
            result = function()
        except Exception as error:
            result = error
        self.hand_over(then, result)

    def hand_over(self, function, result):
        """Have the loop call function(result); for threads."""
        self._handed.append((function, result))
        self.wake()

    def shutdown_request(self, request):
        """Do nothing: a request, as ThreadingMixIn calls it, is work of in_thread()."""

    def wake(self):
        """End the wait of the loop; for signal handlers and other threads."""
        with contextlib.suppress(OSError):     # its buffer is full, so the loop wakes anyway; or it is closed
            self.wakeup.send(b"\0")

    def _on_wakeup(self, events):
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(INPUT_BYTES)
        while self._handed:
            self._safely(*self._handed.popleft())

    # -- Connections --

    def server_bind(self):
        """Bind without looking up the name of this machine, which takes 30 s where there is no DNS."""
        import socketserver
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def _accept(self, events):
        for _ in range(ROUND_REQUESTS):
            try:
                sock, address = self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.ECONNABORTED:
                    continue
                return self._pause_accepting(ACCEPT_PAUSE_SECONDS)     # no descriptors are left, for one
            self._connect(sock, address)

    def _pause_accepting(self, seconds):
        with contextlib.suppress(KeyError):
            self._selector.unregister(self.socket)
            if seconds:
                self._call_at(self.now + seconds, self._resume_accepting)

    def _resume_accepting(self):
        if not self.stopping:
            self._selector.register(self.socket, READ, self._accept)

    def _connect(self, sock, address):
        sock.setblocking(False)
        with contextlib.suppress(OSError):     # the client is gone already
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self._connections) >= self.limit and not self._make_room():
            return self._turn_away(sock)
        connection = Connection(self, sock, plain_address(address[0]), self.certificate and Tls(self.certificate.context))
        self._connections.add(connection)
        self.may_evict(connection)
        self.watch(connection, READ)
        self.arm(connection, IDLE_SECONDS)
        self._safely(connection.on_event, READ)     # before another one takes its place: its request may be here already

    def may_evict(self, connection, first=False):
        """Note that it is a client's turn. It loses the connection, the longest waiting first, if there are too many."""
        self._evictable[connection] = None
        self._evictable.move_to_end(connection, last=not first)

    def _make_room(self):
        """Close a connection whose client is slow; return False if there is none, and end the wait of a held request."""
        if self._evictable:
            next(iter(self._evictable)).close()
            return True
        held = self.waiting.of_largest_caller()
        if len(held) > self.limit // 4:     # a key that has few is not to blame
            held[0].request.connection.last = True
            self.expire(held[0])
        return False

    def _turn_away(self, sock):
        error = Unavailable("The bus has too many connections; try again.", "too_many_connections")
        with sock, contextlib.suppress(OSError):
            sock.send(rendered(refusal(error, request_id_of({})), "close"))

    def request_came(self, connection, request):
        """Stop counting the time of a client: its request is whole. Its body counts until it is answered."""
        self._evictable.pop(connection, None)
        self.keep(connection, request, len(request.body) if request.proven and len(request.body) > SMALL_BYTES else 0)

    def keep(self, connection, request, number):
        """Account for the bytes that are kept of a request; return False if a known caller has too many.

        If clients that have shown no key have too many, the one that takes longest loses its connection.
        """
        if not number and connection not in self._keeping:
            return True
        (self._keeping.add if number else self._keeping.discard)(connection)
        known = request is not None and request.proven
        self._unproven.take(connection, "", 0 if known else number)
        self._bodies.take(connection, request.account if known else "", number if known else 0)
        while slowest := self._unproven.blamed(""):
            slowest.close()
        return not (known and self._bodies.blamed(request.account))

    def count_unread(self, connection, number):
        """Account for the bytes of an answer that the client has not read; the slowest reader loses its connection."""
        self._unread.take(connection, connection.account, number)
        if number:
            self._evictable.setdefault(connection)
            while slowest := self._unread.blamed(connection.account):
                slowest.close()

    def may_shake_hands(self, connection):
        """Count a TLS handshake; return whether there is time for it in this turn; else it is queued, by address, the newest first."""
        self._handshakes += 1
        if self._handshakes > HANDSHAKES:
            self._shaking.append(connection)
            self.watch(connection, 0)     # the selector would tell of all of them in each turn
        return self._handshakes <= HANDSHAKES

    def _shake_hands(self):
        """Go on with handshakes that waited for a turn."""
        for _ in range(min(HANDSHAKES, len(self._shaking))):
            connection = self._shaking.pop()
            if not connection.closed:
                self.watch(connection, READ)
                self._safely(connection.on_event, READ)

    def watch(self, connection, events):
        """Have the selector tell a connection of these events."""
        if events == connection.events:
            return
        if not connection.events:
            self._selector.register(connection.sock, events, connection.on_event)
        elif events:
            self._selector.modify(connection.sock, events, connection.on_event)
        else:
            self._selector.unregister(connection.sock)
        connection.events = events

    def arm(self, connection, seconds):
        """Give a client that many seconds from now. A later deadline costs nothing: the alarm is moved when it rings."""
        connection.deadline = self.now + seconds
        if connection.alarm is None or connection.deadline < connection.alarm[0]:
            self._disarm(connection)
            connection.alarm = self._call_at(connection.deadline, connection.on_alarm)

    def _disarm(self, connection):
        if connection.alarm:
            connection.alarm[2] = connection.alarm = None

    def _call_at(self, when, function):
        entry = [when, next(self._numbers), function]
        heapq.heappush(self._alarms, entry)
        return entry

    def forget(self, connection):
        """Let go of a connection that is closed."""
        self.watch(connection, 0)
        self._disarm(connection)
        self.release(connection)
        self._evictable.pop(connection, None)
        self.keep(connection, None, 0)
        self._unread.take(connection, "", 0)
        self._connections.discard(connection)

    # -- Requests --

    def admit(self, request, block):
        """Let the API look at a head; keep its headers for the next request, if its key is checked."""
        self.api.admit(request)
        if request.who and request.proven and not request.signing_key and len(block) <= CACHED_HEAD_BYTES:
            if len(self.heads) >= CACHED_HEADS:
                self.heads.clear()
            self.heads[block] = request.headers

    def submit(self, request):
        """Have a whole request answered; one for /health in time, whatever keeps its round waiting."""
        self.rounds.submit(request)
        if request.endpoint is health_endpoint:
            self._call_at(time.monotonic() + HEALTH_SECONDS, lambda: self.deliver(request, self.api.late_health(request)))

    def awaits_answer(self, request):
        """Return whether a request still has a client that waits for its answer."""
        return request.connection.request is request

    def deliver(self, request, outcome):
        """Send a Response, hold a Held, have an Unfinished go on; None changes nothing."""
        if request is None:     # of housekeeping, outcome tells whether it succeeded
            self._housekeeping_at = 0 if outcome else self._housekeeping_at
        elif not self.awaits_answer(request):
            return
        elif isinstance(outcome, Held):
            request.connection.held, outcome.until = outcome, time.monotonic() + outcome.seconds
            if not outcome.keys:     # the answer to a wrong key
                self.may_evict(request.connection, first=True)
            self._wait(outcome)
        elif isinstance(outcome, Unfinished):
            self.rounds.go_on(outcome)
        elif outcome:
            self.release(request.connection)
            self._safely(request.connection.answer, outcome)

    def _wait(self, held):
        """Wait for news of a held request, or for its time to be over."""
        connection = held.request.connection
        if held.keys:
            self.waiting.hold(held)
        if self.stopping or held.keys and connection.eof:
            self.expire(held)
        else:
            self.arm(connection, held.until - self.now)

    def hold_again(self, held):
        """Wait again for a held request whose answer was lost with its round."""
        held.settled = False
        if held.request.connection.held is held:
            self._wait(held)

    def expire(self, held):
        """Have a held request answered now, as if its time were over, unless its answer is on the way."""
        if not held.settled:
            held.settled = True
            self.waiting.release(held)
            self.rounds.expire(held)

    def end_held(self, key_id):
        """Answer the requests that are held for a key that has ended."""
        for held in self.waiting.of_caller(key_id):
            self.expire(held)

    def release(self, connection):
        """Stop holding the request of a connection."""
        if connection.held:
            self.waiting.release(connection.held)
        connection.held, connection.deadline = None, float("inf")

    def log(self, request, response, began):
        """Write a line of JSON about a request, if that is wanted."""
        if self._access_log:
            print(json.dumps(dict(time=round(time.time(), 3), peer=request.peer, method=request.method, path=request.path,
                                  status=response.status, ms=round((time.monotonic() - began) * 1000, 1),
                                  request_id=request.id)), file=sys.stderr, flush=True)     # ASCII, safe for a terminal


def connection_limit():
    """Return how many connections this process may have, after raising its limit of open files as far as possible.

    Raises SetupError if these are too few to be of use.
    """
    try:
        import resource
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft, hard = (math.inf if limit == resource.RLIM_INFINITY else limit for limit in limits)
        wanted = min(CONNECTIONS + SPARE_FILES, hard)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
            soft = wanted
    except (ImportError, ValueError, OSError):
        return CONNECTIONS
    if soft < SPARE_FILES + CONNECTIONS_MIN:
        raise SetupError(f"The bus needs {SPARE_FILES + CONNECTIONS_MIN} open files or more, and may have {soft} here; raise "
                         "the limit: ulimit -n, or LimitNOFILE of a systemd service.")
    return min(CONNECTIONS, soft - SPARE_FILES)


def bound_server(host, port, tls):
    """Return a Server that has a host and port, and is to be opened with an API; raises SetupError if it cannot serve there.

    Port 0 picks a free one, see its server_port; tls is (certificate file, key file), or None.
    """
    from http.server import ThreadingHTTPServer     # not at the top: it would slow down every publish
    if not host.strip():     # to the system, an empty one means all addresses
        raise SetupError("The --host is empty; leave it out for this machine only, or give 0.0.0.0 or :: for all addresses.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_class = type("Server", (Loop, ThreadingHTTPServer), {"address_family": family})
    threading.stack_size(STACK_BYTES)
    limit, certificate = connection_limit(), tls and Certificate(*tls)
    server = server_class((host, port), None, bind_and_activate=False)
    server.limit, server.certificate = limit, certificate
    try:
        server.server_bind()
    except (OSError, OverflowError) as error:
        server.server_close()
        raise no_place(host, port, error) from error
    return server


def no_place(host, port, error):
    """Return the error for a host and port at which a bus cannot listen."""
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        return SetupError(f"Port {port} of {host} is in use, perhaps by a bus that is running; a second bus needs another --port and "
                          "another --db.")
    reason = getattr(error, "strerror", None) or error
    return SetupError(f"The bus cannot listen on {host} port {port}: {reason}; choose another --host or --port.")


def http_server(api, host="127.0.0.1", port=8787, access_log=False, trust_proxy=False, tls=None):
    """Return a bound_server() that serves an API: call serve_forever() in one thread and close() in another.

    access_log writes a line for each request, trust_proxy believes X-Forwarded-*.
    """
    server = bound_server(host, port, tls)
    server.open(api, access_log, trust_proxy)
    return server


def find_owner_key(path=KEY_FILE):
    """Return the owner key and where it is from: BUS_SECRET, or a file, which is made if there is none."""
    if key := secret_in("BUS_SECRET"):
        return key, "in BUS_SECRET"
    if key := read_key(path):
        return key, f"in {path}"
    return make_key(path), f"new, in {path}"


def switched_on(variable):
    """Return whether an environment variable is set to 1, true, yes or on."""
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "on")


def api_of(store, key, require_claim_token=False, retention=RETENTION_SECONDS, rate=RATE_PER_MINUTE,
           limits=None, max_body=BODY_BYTES, require_signatures=False, announce_dead=False):
    """Return the API of a store, with the secrets and the BUS_* switches of the environment."""
    keys = Keys(key, store, secret_in("BUS_ADMIN_SECRET"), secret_in("DASHBOARD_PASSWORD"), secret_in("BUS_METRICS_TOKEN"),
                require_signatures or switched_on("BUS_REQUIRE_SIGNATURES"), rate, limits)
    bus = Bus(store, None, require_claim_token, retention, announce_dead)
    return API(bus, keys, max_body, switched_on("BUS_ENFORCE_HTTPS"), switched_on("BUS_MAINTENANCE_MODE"))


def database_path(given=None):
    """Return the path of the database: the one given, that of BUS_DB_PATH, or intentbus.db; raises SetupError for a URL."""
    path = given or os.environ.get("BUS_DB_PATH", "").rstrip("\r\n") or "intentbus.db"
    if "://" in path:
        raise SetupError(f"{path.partition('://')[0]}:// is no file; for PostgreSQL there is examples/postgres_bus.py.")
    return path


class WsgiApplication:
    """The bus under WSGI (PEP 3333), with the settings of the environment: the same handle(), called by one thread at a time.

    A request is held only where the server has threads, and each has a commit of its own. open_store returns the Store;
    only one process at a time may serve a file.
    """

    def __init__(self, open_store):
        self._open_store, self._turn = open_store, threading.Condition()     # whose lock is held while a request is handled
        self._api = self._process = None

    def __call__(self, environ, start_response):
        headers = {key[5:].replace("_", "-").lower(): value for key, value in environ.items() if key.startswith("HTTP_")}
        headers["content-type"] = environ.get("CONTENT_TYPE", "")
        if environ.get("CONTENT_LENGTH"):
            headers["content-length"] = environ["CONTENT_LENGTH"]
        try:
            with self._turn:
                response = self._answer(self._opened(), environ, headers)
        except SetupError as error:
            response = refusal(Unavailable(str(error), "maintenance"), request_id_of(headers))
        except Error as error:
            response = refusal(error, request_id_of(headers))
        length = [] if response.status == 204 else [("Content-Length", str(len(response.body)))]
        start_response(f"{response.status} {REASONS[response.status]}",
                       [*COMMON_HEADERS, ("X-Request-ID", response.request_id), *response.headers, *length])
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else response.body]

    def _opened(self):
        """Return the API of this process: a forked one opens the database again."""
        if self._process != os.getpid():
            self._api, self._process = api_of(self._open_store(), find_owner_key()[0]), os.getpid()
            self._api.bus.on_news = lambda moves: self._turn.notify_all()
        return self._api

    def _answer(self, api, environ, headers):
        request = wsgi_request(environ, headers, api.max_body)
        with contextlib.suppress(Error):
            if api.bus.store.database.changed_elsewhere():
                api.bus.distrust_memory()
                api.keys.reload()
            api.bus.shift_clock()
            api.housekeeping()
        answer = api.handle(request)
        while not isinstance(answer, Response):
            answer = api.go_on(answer) if isinstance(answer, Unfinished) else self._wait(api, answer)
        return answer

    def _wait(self, api, held):
        """Return the answer to a held request, while other threads have their turn."""
        until = time.monotonic() + held.seconds
        while (left := until - time.monotonic()) > 0:
            self._turn.wait(min(left, RECHECK_SECONDS))
            answer = held.attempt and api.attempt(held)
            if answer:
                return answer
        return api.expire(held)

    def close(self):
        """Store the history, the time and the use of keys, and close the database."""
        with self._turn:
            if self._api:
                self._api.close()
                self._api.bus.store.close()
            self._api = self._process = None


def wsgi_request(environ, headers, max_body):
    """Return the request that a WSGI environment describes."""
    length = body_length(headers, "1", max_body)
    if length is None:
        raise LengthRequired("Send the body with a Content-Length; chunked bodies are not taken here.")
    body = environ["wsgi.input"].read(length)
    if len(body) < length:
        raise Invalid("The body ended before its Content-Length.")
    path = urllib.parse.quote(environ.get("PATH_INFO", "").encode("latin-1")) or "/"
    return Request(environ["REQUEST_METHOD"], f"{path}?{environ.get('QUERY_STRING', '')}", headers, body,
                   may_wait=bool(environ.get("wsgi.multithread")),
                   **origin(headers, plain_address(environ.get("REMOTE_ADDR", "")), environ.get("wsgi.url_scheme") == "https",
                            switched_on("BUS_TRUST_PROXY")))


def sqlite_store(path=None):
    """Return the Store of a SQLite file; its default is database_path()."""
    return Store(Database(database_path(path)))


application = WsgiApplication(sqlite_store)


# ---- 16. Local state ----
# The files of this machine in ~/.intentbus: the bus that it has joined, and the spool of requests that no bus has answered.

SPOOL_SCHEMA = """
    CREATE TABLE IF NOT EXISTS requests (     -- sent in the order of their numbers
        number INTEGER PRIMARY KEY AUTOINCREMENT, bus TEXT NOT NULL, path TEXT NOT NULL, body TEXT NOT NULL,
        idempotency_key TEXT,     -- only of a publish
        intent_id TEXT,           -- only of an outcome, which replaces an earlier outcome of the intent
        created_at DOUBLE PRECISION NOT NULL,
        refusal TEXT,             -- the error with which the bus refused a publish for good
        key_name TEXT,            -- of the key that sends it, see key_name(); NULL for any key
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
    try:
        path = in_home(CONFIG_FILE)
    except SetupError:     # URL and key may be given
        return Record()
    content = read_private(path, "settings")
    if content is None:
        return Record()
    try:
        settings = Record(from_json(content.encode()))
        usable_key(settings.key, "The settings")
        return Record(settings, url=settings.url.strip())
    except (Invalid, AttributeError, TypeError, ValueError) as error:
        raise SetupError(f"The settings file {CONFIG_FILE} is damaged; join the bus again, or delete it.") from error


def write_settings(url, key, ca):
    """Save the bus that this machine has joined."""
    replace_file(in_home(CONFIG_FILE), to_json(dict(url=url, key=key, ca=ca and os.path.abspath(ca))) + "\n", 0o600)


def replace_file(path, text, mode):
    """Write a file; after a crash, it has either the old text or the new one. Raises SetupError."""
    make_parent_folder(path)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise SetupError(f"The file {path} cannot be written: {error.strerror}.") from error


def key_name(key):
    """Return the id of an issued key, or a short hash of another: the spool tells keys apart by it."""
    issued = ISSUED.fullmatch(key)
    return issued[1] if issued else hashlib.sha256(key.encode()).hexdigest()[:16]


class Spool:
    """Requests that no bus has answered yet, in an SQLite file that the processes of this machine share.

    Each is for one bus and one key. No key is in the file, only key_name(): a request waits for the next program that has
    its key. A damaged file is put aside with a warning, and a new one begins.
    """

    def __init__(self, path=SPOOL_FILE):
        """Open the file, or create it, readable by its owner only; raises SetupError."""
        self._path = in_home(path)
        self._lock = threading.Lock()     # all threads share one connection
        self._db = None
        make_parent_folder(self._path)
        self._run("SELECT 1")

    def _open(self):
        import sqlite3
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
        self._file = os.stat(self._path).st_ino
        self._db = sqlite3.connect(self._path, timeout=SPOOL_LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        self._db.row_factory = lambda cursor, values: Record(zip((column[0] for column in cursor.description), values))
        self._db.execute("PRAGMA synchronous = FULL")     # a spooled request survives a power cut
        self._db.execute("PRAGMA fullfsync = 1")
        self._db.execute(SPOOL_SCHEMA)
        if "key_name" not in {column.name for column in self._db.execute("PRAGMA table_info(requests)")}:
            self._db.execute("ALTER TABLE requests ADD COLUMN key_name TEXT")     # a spool of an earlier version

    def _put_aside(self, error):
        """Close the damaged file, and rename it unless another process has done so."""
        self._db.close()
        self._db = None
        aside = f"{self._path}.damaged-{time.time():.0f}"
        try:
            if os.stat(self._path).st_ino == self._file:
                os.replace(self._path, aside)
                warnings.warn(f"The spool {self._path} is damaged ({error}); it is now {aside}, and its requests are not sent. "
                              "A new spool begins")
        except OSError as failure:
            raise SetupError(f"The spool {self._path} is damaged and cannot be renamed: {failure.strerror}.") from error

    def add(self, bus, path, body, idempotency_key=None, intent_id=None, key_name=None):
        """Store a request, whose body is text, and return its number; an outcome replaces an earlier one of its intent."""
        return self._run("""
            INSERT INTO requests (bus, path, body, idempotency_key, intent_id, created_at, key_name)
            VALUES      (:bus, :path, :body, :idempotency_key, :intent_id, :now, :key_name)
            ON CONFLICT (bus, intent_id) DO UPDATE
            SET         path = excluded.path,
                        body = excluded.body,
                        created_at = excluded.created_at,
                        key_name = excluded.key_name
            RETURNING   number
        """, bus=bus, path=path, body=body, idempotency_key=idempotency_key, intent_id=intent_id, now=time.time(),
                         key_name=key_name)[0].number

    def remove(self, number):
        """Delete a request."""
        self._run("DELETE FROM requests WHERE number = :number", number=number)

    def mark_refused(self, number, reason):
        """Record why the bus has refused a request; it is not sent again."""
        self._run("UPDATE requests SET refusal = :reason WHERE number = :number", number=number, reason=reason)

    def pending(self, bus, key_name=None):
        """Return the requests to send to a bus, with a key or any: outcomes first, then publishes as they were made."""
        return self._run("""
            SELECT   *
            FROM     requests
            WHERE    bus = :bus
            AND      (:key_name IS NULL OR key_name IS NULL OR key_name = :key_name)
            AND      refusal IS NULL
            ORDER BY intent_id IS NULL, number
        """, bus=bus, key_name=key_name)

    def refused(self, bus):
        """Return the publishes that a bus has refused for good."""
        return self._run("SELECT * FROM requests WHERE bus = :bus AND refusal IS NOT NULL ORDER BY number", bus=bus)

    def others(self, bus, key_name):
        """Return (bus, key_name, number) of the requests that wait for another bus or another key."""
        return self._run("""
            SELECT   bus, key_name, COUNT(*) AS number
            FROM     requests
            WHERE    (bus <> :bus OR key_name <> :key_name)
            AND      refusal IS NULL
            GROUP BY bus, key_name
        """, bus=bus, key_name=key_name)

    def redirect(self, bus, key_name):
        """Let all waiting requests go to a bus, with a key."""
        self._run("UPDATE OR REPLACE requests SET bus = :bus, key_name = :key_name WHERE refusal IS NULL", bus=bus, key_name=key_name)

    def discard(self, bus, key_name):
        """Delete requests that a bus has refused for good, and requests for another bus or another key."""
        self._run("DELETE FROM requests WHERE refusal IS NOT NULL OR bus <> :bus OR key_name <> :key_name", bus=bus, key_name=key_name)

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
        try:
            guard = open(self._path + ".lock", "a+")
        except OSError as error:
            raise SetupError(f"The file {self._path}.lock cannot be written: {error.strerror}.") from error
        with guard:
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
        with self._lock:
            for attempt in range(2):
                try:
                    if not self._db:
                        self._open()
                    return self._db.execute(statement, values).fetchall()
                except (OSError, sqlite3.Error) as error:
                    damaged = isinstance(error, sqlite3.Error) and re.search("not a database|malformed|corrupt", str(error))
                    if attempt or not damaged:
                        reason = getattr(error, "strerror", None) or error
                        raise SetupError(f"The spool {self._path} cannot be used: {reason}.") from error
                    self._put_aside(error)


# ---- 17. Client ----
# The verbs of the Bus over HTTP, with the same errors. A request that is safe to repeat is repeated when the network fails.

def parse_bus_url(url):
    """Return the parts of a bus's URL, as urlsplit does; raises SetupError unless a client can connect to it.

    It is http or https, without a user name, query or fragment, in printable ASCII but for the host.
    """
    with contextlib.suppress(ValueError):     # UnicodeError is one
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
        host = host if host.isascii() else host.encode("idna").decode()
        labels = host.rstrip(".").split(".")
        if (parts.scheme in ("http", "https") and "@" not in parts.netloc and parts.port != 0
                and re.fullmatch("[^\x00-\x20\x7f-\xa0?#]+", url) and parts.path.isascii()
                and (":" in host or all(0 < len(label) < 64 for label in labels))):
            return parts
    shown = url.rpartition("@")[2]     # the part before the @ may hold a password
    cure = "" if "://" in url else f"; write http://{shown} or https://{shown}"
    raise SetupError(f"The URL of a bus is http://HOST:PORT or https://HOST, without a user name; {shown!r} is not{cure}.")


def client_tls_context(ca):
    """Return an SSL context that trusts the certificates in a file besides the system's; raises SetupError."""
    import ssl
    try:
        context = ssl.create_default_context()
        context.load_verify_locations(cafile=ca)
        return context
    except OSError as error:
        raise SetupError(f"The certificates in {ca} cannot be used: {error.strerror or error}.") from error


NO_HTTP = "If the bus serves https, its URL begins with https://; otherwise check the port, and any proxy or tunnel on the way."
CURES = {     # by the class of an error, and for a certificate by its code in OpenSSL
    "ConnectionRefusedError": "Nothing listens there: check host and port, and start the bus with serve, or the tunnel that leads to it.",
    "gaierror": "That name is not known: check its spelling, and whether this machine is online.",
    "SSLError": "That port does not speak https: check the port or, for a bus without https, write http:// in its URL.",
    "timeout": "Nothing answers in time: a firewall is in the way, or that machine is off or slow.",
    "ConnectionResetError": NO_HTTP,
    "RemoteDisconnected": NO_HTTP,
    "BadStatusLine": NO_HTTP,
    9: "The certificate is not valid yet: set the clock of this machine, if it is wrong.",
    10: "The certificate has expired: renew it, or set the clock of this machine, if it is wrong.",
    "SSLCertVerificationError": "Pass the certificate with --ca, or use the host name that is in it.",
}


def proxy_to(parts):
    """Return (host and port, headers with the credentials) of the proxy to a bus, or (None, None).

    Environment variables such as https_proxy or the system name it. Raises SetupError for one that is no HTTP proxy.
    """
    import urllib.request
    proxy = urllib.request.getproxies().get(parts.scheme, "")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None, None
    kind, _, address = proxy.strip().rpartition("://")
    credentials, _, place = address.rstrip("/").rpartition("@")
    if kind not in ("", "http", "https") or not re.fullmatch(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?", place, re.ASCII):
        raise SetupError(f"{parts.scheme}_proxy names no HTTP proxy (SOCKS and others are not supported): change or unset it, or add "
                         f"{parts.hostname} to no_proxy.")
    encoded = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
    return place, {"Proxy-Authorization": f"Basic {encoded}"} if credentials else {}


def reason_and_cure(error, proxy):
    """Return (reason, cure), two sentences, for an error of the network."""
    if code := getattr(error, "verify_code", 0):
        clock = time.strftime(" (the clock of this machine says %Y-%m-%d %H:%M)") if code in CURES else ""
        reason = f"its certificate is not trusted: {error.verify_message}{clock}"
    else:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    names = ["timeout" if isinstance(error, (TimeoutError, socket.timeout)) else "", *(kind.__name__ for kind in type(error).__mro__)]
    cure = CURES.get(code) or next((CURES[name] for name in names if name in CURES), None)
    if proxy and not code:
        cure = "Check that proxy, and the variables http_proxy, https_proxy and no_proxy."
    return reason.rstrip("."), cure or "Check the URL, and any proxy or tunnel on the way."


def encode_body(body):
    """Return a body as JSON in UTF-8; raises Invalid if it cannot be encoded."""
    try:
        return to_json(body).encode()
    except (TypeError, ValueError) as error:
        raise Invalid(f"This cannot be sent as JSON in UTF-8: {error}.") from error


def answer_of(**fields):
    """Accept a JSON object with these fields, each a validator or (validator, default), and with any others; return a Record."""
    fields = Fields({field: kind if isinstance(kind, tuple) else (kind, REQUIRED) for field, kind in fields.items()}, strict=False)

    def validator(value):
        try:
            return Record(value, **validate(fields, value))
        except Invalid as error:
            raise ValueError(f"lacks something: {error}") from error
    return validator


def array_of(validator):
    """Accept a list of values that a validator accepts."""
    def read(value):
        if not isinstance(value, list):
            raise ValueError("must be a list")
        return [validator(item) for item in value]
    return read


def counted_or(**fields):
    """Accept {"number", "until"}, the answer to a request to count, or an object with these fields."""
    counted, done = answer_of(number=COUNT, until=MOMENT), answer_of(**fields)
    return lambda value: (counted if isinstance(value, dict) and "number" in value else done)(value)


COUNT = integer_from(0, 2 ** 63)
MOMENT = number_from(0, 2 ** 40)     # Unix seconds, within the range of dates
PERHAPS_A_MOMENT = (MOMENT, None)
UNSURE = (anything, None)     # may be missing, as it is at older buses, and is None then
ANSWER_ID = must_be("an id", lambda value: isinstance(value, str) and re.fullmatch("[0-9A-Za-z_-]{1,128}", value))
DONE = must_be("true", lambda value: value is True)
CLAIMED = answer_of(**{**dict.fromkeys(NAMING_FIELDS + CLAIM_FIELDS, UNSURE), "id": ANSWER_ID, "goal": string}, payload=UNSURE,
                    claim_token=(string, None), claim_timeout=(number_from(1, 2 ** 40), None), stream=(boolean, False))
ENDED = answer_of(ok=DONE, id=ANSWER_ID, status=UNSURE, run_at=PERHAPS_A_MOMENT, next=(lambda value: value and CLAIMED(value), None))
CHANGED = answer_of(id=ANSWER_ID, status=string)
STATE = {**dict.fromkeys(STATUS_FIELDS, UNSURE), "id": ANSWER_ID, "status": string, "claimed_at": PERHAPS_A_MOMENT}
ATTEMPT = answer_of(attempt=COUNT, outcome=string, ended_at=MOMENT, claimed_at=PERHAPS_A_MOMENT, worker=UNSURE, error=UNSURE)
DONE_STEP = answer_of(name=string, attempt=COUNT, seconds=(number_from(0, 2 ** 40), None), done_at=MOMENT)
RESULT_STATE = dict(STATE, result=UNSURE, result_type=UNSURE, history=(array_of(ATTEMPT), ()),     # which older buses do not have
                    steps=(array_of(DONE_STEP), ()))
LISTED_INTENT = answer_of(id=ANSWER_ID, status=string, goal=string, claim_attempts=COUNT, max_attempts=COUNT, created_at=MOMENT,
                          last_error=UNSURE, worker=UNSURE, preview=UNSURE)
LISTED_WORKER = answer_of(owner=string, last_seen=MOMENT, goals=array_of(string), name=UNSURE, id=UNSURE, version=UNSURE,
                          running=(array_of(string), ()), running_since=(array_of(MOMENT), ()), since=PERHAPS_A_MOMENT,
                          fulfilled=UNSURE, failed=UNSURE)
LISTED_EVENT = answer_of(event=string, time=MOMENT, id=UNSURE, goal=UNSURE, status=UNSURE, worker_id=UNSURE, worker=UNSURE,
                         last_error=UNSURE)
GOAL_LIMIT = answer_of(namespace=string, goal=string, running=UNSURE, paused=boolean, claimed=COUNT)
GOAL_FIGURES = answer_of(namespace=string, goal=string, waiting=COUNT, running=COUNT, run_at=PERHAPS_A_MOMENT, limit=UNSURE,
                         paused=boolean, fulfilled=array_of(COUNT), failed=array_of(COUNT), waited=UNSURE, ran=UNSURE)
LISTED_SCHEDULE = answer_of(name=string, owner=string, goal=string, every=(number_from(1, 2 ** 40), None), cron=(string, None),
                            timezone=(string, None), made_at=MOMENT, next_run_at=PERHAPS_A_MOMENT, last_run_at=PERHAPS_A_MOMENT, last_id=UNSURE)
PERHAPS_GOALS = (array_of(string), None)
LISTED_KEY = answer_of(key_id=string, owner=string, role=string, total_requests=COUNT, name=UNSURE, goals=PERHAPS_GOALS,
                       expires_at=PERHAPS_A_MOMENT, last_used_at=PERHAPS_A_MOMENT)
API_KEY = must_be("a key", lambda value: isinstance(value, str) and re.fullmatch("[!-~]+", value))
ANSWERS = {     # of a bus, to a method and path: an answer without these fields comes from another server
    "POST /intent": answer_of(id=ANSWER_ID, status=UNSURE, namespace=UNSURE, listening=UNSURE, never_claimed=UNSURE),
    "POST /intents": answer_of(ids=array_of(ANSWER_ID), statuses=(array_of(string), ())),
    "POST /claim": CLAIMED,
    "POST /extend_claim/*": answer_of(ok=DONE, id=ANSWER_ID, extended_by=UNSURE, claim_expires_at=UNSURE),
    "POST /progress/*": answer_of(ok=DONE, claim_expires_at=MOMENT, followed=boolean),
    "POST /step/*": answer_of(done=boolean, output=(string, None)),
    "POST /fulfill/*": ENDED,
    "POST /fail/*": ENDED,
    "POST /release/*": ENDED,
    "GET /status/*": answer_of(**STATE),
    "GET /result/*": answer_of(**RESULT_STATE),
    "GET /output/*": answer_of(output=(string, ""), next=COUNT, missed=COUNT, ended=boolean, attempt=UNSURE, message=(string, None),
                               percent=(number_from(0, 100), None)),
    "GET /intents": answer_of(intents=array_of(LISTED_INTENT), next=(ANSWER_ID, None)),
    "GET /workers": answer_of(workers=array_of(LISTED_WORKER)),
    "GET /events": answer_of(events=array_of(LISTED_EVENT), next=COUNT, missed=(COUNT, 0)),
    "GET /whoami": answer_of(key_id=string, owner=string, role=string, goals=PERHAPS_GOALS, expires_at=PERHAPS_A_MOMENT, now=MOMENT),
    "POST /join": answer_of(api_key=API_KEY, name=string, role=string),
    "POST /cancel/*": CHANGED,
    "POST /retry/*": CHANGED,
    "POST /retry": counted_or(retried=COUNT),
    "POST /schedule/*": answer_of(name=string, next_run_at=PERHAPS_A_MOMENT, status=string),
    "GET /schedules": answer_of(schedules=array_of(LISTED_SCHEDULE)),
    "POST /unschedule/*": answer_of(ok=DONE, name=string),
    "POST /run/*": answer_of(id=ANSWER_ID, status=string, namespace=string),
    "POST /limit/*": GOAL_LIMIT,
    "GET /limits": answer_of(limits=array_of(GOAL_LIMIT)),
    "POST /set/*": answer_of(ok=DONE),
    "GET /get/*": answer_of(value=anything),
    "POST /delete/*": answer_of(deleted=boolean),
    "POST /admin/generate_key": answer_of(api_key=API_KEY, key_id=(string, None), owner=(string, None), role=(string, None)),
    "POST /admin/invite": answer_of(code=string, expires_at=MOMENT, name=string, role=string),
    "POST /admin/revoke_key": answer_of(ok=DONE, schedules=(COUNT, 0)),
    "GET /admin/keys": array_of(LISTED_KEY),
    "GET /admin/intents/*": answer_of(**RESULT_STATE, payload=any_payload, owner=string, publisher=string),
    "GET /admin/dead": array_of(answer_of(intent_id=string)),
    "POST /admin/purge": counted_or(deleted=COUNT),
    "POST /admin/cancel": counted_or(cancelled=COUNT),
    "GET /admin/summary": answer_of(
        intents=must_be("objects", lambda value: isinstance(value, dict) and all(isinstance(of, dict) for of in value.values())),
        goals=(array_of(GOAL_FIGURES), ()), waiting=(array_of(answer_of(namespace=string, goal=string, run_at=PERHAPS_A_MOMENT)), ()),
        workers=(array_of(LISTED_WORKER), ()), gone=(array_of(LISTED_WORKER), ())),
}
ANY_ANSWER = answer_of()     # to other requests
ERROR_ANSWER = answer_of(code=must_be("a word", lambda value: isinstance(value, str) and re.fullmatch("[a-z][a-z_]*", value)),
                         message=string)


def error_of_page(content):
    """Return the error in {"error": "text"} or in a page, which older buses answer; "page" tells whether it is a page."""
    try:
        return Record(code=None, message=string(from_json(content)["error"]), page=False)
    except (Invalid, ValueError, TypeError, KeyError):
        text = re.sub("<[^>]*>", " ", content.decode(errors="replace"))
        return Record(code=None, message=" ".join(text.split())[:200], page=True)


def endpoint_of(method, path):
    """Return the key in ANSWERS for a request."""
    places = f"{method} {path}", f"{method} {path.rpartition('/')[0]}/*"
    return next((place for place in places if place in ANSWERS), f"{method} /{path.split('/')[1]}/*")


class TimedReader(io.RawIOBase):
    """The incoming bytes of a socket, up to a time."""

    def __init__(self, sock, deadline):
        super().__init__()
        self._sock = sock
        self._deadline = deadline
        self._file = sock.makefile("rb", buffering=0)

    def readable(self):
        """Return True, for BufferedReader."""
        return True

    def readinto(self, buffer):
        """Read some bytes into a buffer; raises TimeoutError at the deadline."""
        self._sock.settimeout(time_left(self._deadline))
        return self._file.readinto(buffer)

    def close(self):
        """Close the reader, which lets the socket close."""
        self._file.close()
        super().close()


def time_left(deadline):
    """Return the seconds until a time of the steady clock; raises TimeoutError if it is over."""
    left = deadline - steady_clock()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class KeptConnection:
    """A handler of urllib's OpenerDirector that keeps a connection of each thread open; urllib's own close it each time.

    `open` of the opener returns (status, headers, content). Its timeout bounds all of the exchange.
    """

    handler_order = 500     # as that of urllib's own handlers

    def __init__(self, proxy, context):
        """Connect through a proxy, as (host and port, credentials), or directly; context is that of ssl."""
        self._proxy = proxy
        self._context = context
        self._kept = threading.local()

    def add_parent(self, opener):
        """Be added to an opener."""

    def http_open(self, request):
        """Send a request; return the status, headers and whole content of the answer.

        A connection that has gone stale is replaced, and the same bytes are sent again. The nonce in them keeps the bus from
        doing the work of a request twice.
        """
        import http.client
        deadline = steady_clock() + request.timeout
        place = (os.getpid(), request.type, request.host)     # a forked process has connections of its own
        kept = vars(self._kept).pop("connection", None)
        if kept and kept.place == place and steady_clock() - kept.used_at < KEPT_SECONDS:
            try:
                return self._exchange(kept, request, deadline)
            except (OSError, http.client.HTTPException):
                time_left(deadline)     # raises the error of a timeout again
        return self._exchange(OpenConnection(place, self._connection(request)), request, deadline)

    https_open = http_open

    def _connection(self, request):
        import http.client
        host, credentials = self._proxy or (request.host, None)
        if request.type == "http":
            return http.client.HTTPConnection(host)
        connection = http.client.HTTPSConnection(host, context=self._context)
        if self._proxy:
            connection.set_tunnel(request.host, headers=credentials)
        return connection

    def _exchange(self, kept, request, deadline):
        import http.client
        def timed_response(sock, *rest, **options):     # which calls makefile() of a socket
            reader = types.SimpleNamespace(makefile=lambda mode: io.BufferedReader(TimedReader(sock, deadline)))
            return http.client.HTTPResponse(reader, *rest, **options)
        link = kept.link
        headers = dict(request.header_items())
        target = request.selector
        if self._proxy and request.type == "http":
            target = request.full_url
            headers.update(self._proxy[1])
        link.response_class = timed_response
        link.timeout = time_left(deadline)
        if link.sock:
            link.sock.settimeout(link.timeout)
        elif request.type == "http" and link.host.isascii():     # as bytes: a text would load encodings.idna, 0.7 ms of each start
            link.sock = socket.create_connection((link.host.encode(), link.port), link.timeout)
        else:
            link.connect()
        parts = []
        link.send = parts.append     # http.client would send head and body apart, and the bus would receive twice
        link.request(request.get_method(), target, request.data, headers)
        del link.send
        link.send(b"".join(parts))
        with link.getresponse() as response:
            length = ANSWER_BYTES + 1 if response.length is None else min(response.length, ANSWER_BYTES + 1)
            content = response.read(length)
            if len(content) < length and response.length:
                raise http.client.IncompleteRead(content, response.length)
        if len(content) <= ANSWER_BYTES:
            kept.used_at = steady_clock()
            self._kept.connection = kept
        return response.status, response.headers, content


class OpenConnection:
    """A connection of http.client to a place, last used at a time; it closes when nothing refers to it any more."""

    def __init__(self, place, link):
        self.place = place
        self.link = link
        self.used_at = 0

    def __del__(self):
        self.link.close()


class Spooler:
    """Sends a client's publishes and outcomes, and keeps those without an answer in a spool.

    The spool is opened when it is needed first. Only requests of the client's bus and key are sent.
    """

    def __init__(self, client, path, key_name):
        self._client = client
        self._path = os.path.expanduser(path)     # without a home folder, Spool raises the error
        self._mine = dict(bus=client.base_url, key_name=key_name)
        self._opening = threading.Lock()
        self._spool = None
        self._reporting = set()     # numbers of the outcomes that other threads are sending right now

    @property
    def spool(self):
        """The spool; raises SetupError if it cannot be opened."""
        with self._opening:
            self._spool = self._spool or Spool(self._path)
        return self._spool

    def publish(self, path, body, idempotency_key):
        """Send all earlier publishes, then this one, and return its answer; if the bus cannot take it now, store it."""
        try:
            with contextlib.ExitStack() as turn:
                with contextlib.suppress(SetupError, StorageFull):     # a bad disk does not keep this one back
                    if os.path.exists(self._path):
                        turn.enter_context(self.spool.send_lock(self._client.timeout))
                        self._flush()
                return self._client.publish_once(path, body, idempotency_key, retries=0)
        except TRANSIENT as error:
            try:
                self.spool.add(**self._mine, path=path, body=encode_body(body).decode(), idempotency_key=idempotency_key)
            except SetupError as failure:
                raise type(error)(f"{error} It cannot be stored either: {failure}") from error
            return Record(id=None, ids=[], status="spooled", namespace=self._client.namespace, reason=str(error))

    def report(self, path, body, intent_id, send):
        """Have send() report an outcome; a transient error leaves it in the spool and is raised."""
        try:
            number = self.spool.add(**self._mine, path=path, body=encode_body(body).decode(), intent_id=intent_id)
        except SetupError:     # an outcome that cannot be stored can still be sent
            return send()
        self._reporting.add(number)
        try:
            answer = send()
        except TRANSIENT:
            raise
        except Error:
            self.spool.remove(number)
            raise
        else:
            self.spool.remove(number)
        finally:
            self._reporting.discard(number)
        if answer.next and self._is_done(answer.next):
            answer["next"] = None
        return answer

    def claim(self, claim_next):
        """Return the first intent of claim_next() without an outcome in the spool; report the outcomes of the others."""
        if self._due():
            with contextlib.suppress(Error):     # a refused publish must not keep this machine from working
                self.flush()
        while (intent := claim_next()) and self._is_done(intent):
            pass
        return intent

    def _is_done(self, intent):
        """Return whether the spool has the outcome of an intent that was just claimed; it is reported then."""
        try:
            outcome = self.spool.outcome_of(self._client.base_url, intent.id)
        except SetupError:
            self._client.release(intent.id, intent.claim_token)
            raise
        if outcome:
            self._send_outcome(outcome, claim_token=intent.claim_token)
        return bool(outcome)

    def flush(self):
        """Send the requests in the spool; return how many the bus accepted, or raise the first error that left one waiting."""
        with self.spool.send_lock(self._client.timeout):
            accepted, errors = self._flush()
        if errors:
            raise errors[0]
        return accepted

    def _flush(self):
        """Send due requests; return how many the bus accepted, and the errors of the others."""
        accepted = 0
        errors = []
        for request in self._due():
            try:
                accepted += self._send_outcome(request) if request.intent_id else self._send_publish(request)
            except TRANSIENT:
                raise
            except Error as error:
                errors.append(error)
                if isinstance(error, Unauthorized) or error.code == "invalid_signature":     # as all others would be
                    break
        return accepted, errors

    def _due(self):
        """Return the requests to send, but for the outcomes that a thread is sending."""
        return [request for request in self.spool.pending(**self._mine) if request.number not in self._reporting]

    def _send_publish(self, request):
        try:
            self._client.publish_once(request.path, json.loads(request.body), request.idempotency_key, retries=0)
        except (Invalid, PayloadTooLarge, IdempotencyConflict) as error:
            self.spool.mark_refused(request.number, str(error))
            return 0
        self.spool.remove(request.number)
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
        self.spool.remove(request.number)
        return 1


IGNORED = {     # fields that an Intent Bus 7 ignores, with the consequence
    "run_at": "ignore run_at; pass a delay",
    "unique": "store it beside others of its unique value",
    "on_success": "publish nothing at its end",
    "on_failure": "publish nothing at its end",
}


def process_name(program=None):
    """Return how people know this process: its host, program and number."""
    number = f" {os.getpid()}"
    words = f"{socket.gethostname().partition('.')[0]} {os.path.basename(program or sys.argv[0] or 'python')}"
    return label(words)[:64 - len(number)] + number


def worker_header(worker_name):
    """Return the header with the name of a worker, by default that of this process, in Latin-1."""
    name = str(worker_name or process_name())
    return {"X-Worker-Name": label(name.encode("latin-1", "replace").decode("latin-1"))}


def present(**fields: Any) -> dict[str, Any]:
    """Return the fields that are not None; the bus has defaults for the others."""
    return {field: value for field, value in fields.items() if value is not None}


if TYPE_CHECKING:     # the fields of answers; at run time each is a plain Record
    Goals = Union[str, Sequence[str], None]     # None: any goal
    Handler = Union[Callable[[Any], object], Callable[[Any, "Lease"], object]]     # the second with_lease
    Visibility = Literal["private", "public"]
    ResultType = Literal["json", "text"]
    Status = Literal["open", "claimed", "fulfilled", "dead"]
    ListedStatus = Literal[Status, "delayed"]

    class Published(Record):
        id: str     # None while it is in a spool, with the status "spooled" and the reason
        status: str
        namespace: str
        listening: int | None     # None at an older bus
        never_claimed: bool | None

    class SeenIntent(Record):
        id: str
        namespace: str
        goal: str
        priority: int
        claim_attempts: int
        max_attempts: int
        target_worker: str | None
        required_capability: str | None
        created_at: float
        claim_expires_at: float | None

    class Claimed(SeenIntent):
        payload: Any
        claim_token: str
        claim_timeout: float

    class Ended(Record):
        id: str
        status: str
        run_at: float | None
        next: Claimed | None     # with next_claim

    class Attempt(Record):
        attempt: int
        worker: str | None
        claimed_at: float | None
        ended_at: float
        outcome: Literal["failed", "lost", "released"]
        error: str | None

    class State(SeenIntent):
        status: Status
        visibility: Visibility
        run_at: float
        completed_at: float | None
        last_error: str | None
        claimed_at: float | None
        worker: str | None
        schedule: str | None

    class Result(State):
        result: Any
        result_type: ResultType | None
        history: list[Attempt]

    class Page(Record):
        intents: list[State]
        next: str | None


class IntentClient:
    """A client of a bus: the verbs of Bus, over HTTP.

    base_url, api_key and namespace default to INTENT_BUS_URL, INTENT_API_KEY and INTENT_BUS_NAMESPACE, then to the bus
    that this machine has joined, then to http://127.0.0.1:8787 and the key in ~/.apikey. timeout is the seconds that each
    attempt at a request may take; ca is a file of certificates to trust. Every request is signed; the key itself is sent
    only over https, or with send_key. A verb returns a Record, or raises Unreachable or the Error that the bus answered.
    At an Intent Bus 7, fields that it does not answer are None, and what it cannot do raises OlderBus.

    With spool, the path of a file, no request is lost while the bus is away. publish stores a request that cannot be sent
    and returns {"id": None, "status": "spooled"}; the next publish, claim or flush() with the same URL and key sends it,
    once and in order. fulfill and fail store an outcome until the bus has answered; an intent with a stored outcome is
    reported, not claimed again.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, timeout: float = CLIENT_SECONDS,
                 namespace: str | None = None, ca: str | None = None, spool: str | None = None, send_key: bool = False) -> None:
        import urllib.request     # 14 ms with the modules that it loads, which only a client needs
        joined = read_settings()
        given = (base_url or "").strip() or os.environ.get("INTENT_BUS_URL", "").strip()
        self.base_url = (given or joined.get("url") or URL).rstrip("/")
        self.namespace = namespace or os.environ.get("INTENT_BUS_NAMESPACE", "").strip() or "default"
        self.timeout = timeout
        parts = parse_bus_url(self.base_url)
        if self.base_url != joined.get("url"):
            joined = {}     # its key is for that bus only
        key = (usable_key(api_key, "The api_key") if api_key else secret_in("INTENT_API_KEY")) or joined.get("key") or read_key()
        if not key:
            raise SetupError(f"No key: join the bus with a code from keys invite, or put a key into {KEY_FILE} or "
                             f"INTENT_API_KEY (on the machine of the bus, serve creates {KEY_FILE}).")
        self._key = key
        self.ca = ca = ca or joined.get("ca")
        self.key_name = key_name(key)
        self._spooler = Spooler(self, spool, self.key_name) if spool else None
        local = LOOPBACK.fullmatch(parts.hostname)
        self._key_id = self.key_name if ISSUED.fullmatch(key) else "owner"
        self.secure = bool(local) or parts.scheme == "https"
        # over plain http, whichever program has the port would get the key
        self._identity = {"X-API-KEY": self._key} if send_key or parts.scheme == "https" else {"X-Key-ID": self._key_id}
        self._publisher = self._key if send_key else self._key_id     # older buses know no ids
        self._known_newer = False     # than an Intent Bus 7
        self._clock_offset = 0     # seconds
        self._proxy, credentials = (None, None) if local else proxy_to(parts)     # type: ignore
        self._opener = urllib.request.OpenerDirector()     # follows no redirects, which would pass the key on
        connection = KeptConnection(self._proxy and (self._proxy, credentials), client_tls_context(ca) if ca else None)
        self._opener.add_handler(connection)     # type: ignore   # a handler needs no base class, which would have to be imported first

    @property
    def spool(self) -> Any:
        """The Spool, or None; raises SetupError if it cannot be opened."""
        return self._spooler.spool if self._spooler else None

    def publish(self, goal: str, payload: Any, *, namespace: str | None = None, priority: int | None = None,
                delay: float | None = None, run_at: float | None = None, ttl: float | None = None, max_attempts: int | None = None,
                backoff_base: float | None = None, target_worker: str | None = None, required_capability: str | None = None,
                visibility: Visibility | None = None, unique: str | None = None, replace: bool | None = None,
                on_success: str | None = None, on_failure: str | None = None, stream: bool | None = None,
                idempotency_key: str | None = None) -> Published:
        """Publish an intent; it is stored once, however often the request is repeated.

        delay, ttl and backoff_base are seconds, run_at is Unix seconds; None is the default of the bus.
        """
        body = present(goal=goal, namespace=namespace or self.namespace, priority=priority, delay=delay, run_at=run_at, ttl=ttl,
                     max_attempts=max_attempts, backoff_base=backoff_base, target_worker=target_worker, unique=unique,
                     required_capability=required_capability, visibility=visibility, replace=replace, on_success=on_success,
                     on_failure=on_failure, stream=stream)
        body["payload"] = payload
        answer = self._publish("/intent", body, idempotency_key)
        if body.get("ttl") is not None and answer.id and answer.listening is None:
            warnings.warn(f"{self.base_url} is an older bus, which ignores a ttl: the intent is published without")
        return answer

    def publish_many(self, intents: Iterable[Mapping[str, Any]], *, idempotency_key: str | None = None) -> Record:
        """Publish up to 1,000 intents, each a dict of the arguments of publish, all or none; return {"ids"}."""
        bodies = [dict({"namespace": self.namespace}, **intent) for intent in intents]
        return self._publish("/intents", bodies, idempotency_key)

    def _publish(self, path, body, idempotency_key):
        key = os.urandom(16).hex() if idempotency_key is None else idempotency_key
        if not re.fullmatch("[ -~]{1,255}", key):
            raise Invalid("An idempotency key is 1 to 255 printable ASCII characters.", code="invalid_idempotency_key")
        return self._spooler.publish(path, body, key) if self._spooler else self.publish_once(path, body, key)

    def publish_once(self, path: str, body: Any, idempotency_key: str, retries: int = RETRIES) -> Any:
        """Send a publish, with its idempotency key where the signature covers it, and in the header that older buses read."""
        if path == "/intents":
            return self.request("POST", path, body, query=dict(idempotency_key=idempotency_key), retries=retries)
        for field, consequence in IGNORED.items():
            if body.get(field) is not None:
                self._require_newer(consequence)
        return self.request("POST", path, dict(body, idempotency_key=idempotency_key), retries=retries,
                            headers={"Idempotency-Key": idempotency_key})

    def flush(self) -> int:
        """Send the spooled requests and return how many the bus accepted; a request that it refuses is not sent again."""
        return self._spooler.flush() if self._spooler else 0

    def claim(self, goal: Goals = None, *, namespace: str | None = None, publisher: str | None = None, worker_id: str | None = None,
              capabilities: Iterable[str] = (), wait: float = 0, lease: float | None = None, claim_token: str | None = None,
              worker_name: str | None = None) -> Claimed | None:
        """Claim an intent; return None if there is none within wait seconds.

        A claim whose answer is lost is repeated; with a claim_token, 32 to 64 random characters, by the caller only.
        worker_name is shown to people; by default it is host, program and process id.
        """
        query = self._claim_query(goal, namespace, publisher, worker_id, capabilities, lease)
        def send():
            if not isinstance(goal, str) and len(goal or ()) > 1:
                self._require_newer("serve one of several goals only; start a worker for each")
            token = claim_token or os.urandom(16).hex()
            return self.request("POST", "/claim", dict(claim_token=token), query=query, wait=wait,
                                headers=worker_header(worker_name), retries=0 if claim_token else RETRIES)
        return self._spooler.claim(send) if self._spooler else send()

    def _claim_query(self, goal=None, namespace=None, publisher=None, worker_id=None, capabilities=(), lease=None):
        return dict(goal=goal, namespace=namespace or self.namespace, worker_id=worker_id, lease=lease,
                    publisher=self._publisher if publisher == self._key else publisher,
                    capabilities=",".join(capabilities) or None)

    def extend_claim(self, intent_id: str, claim_token: str | None = None, seconds: float = LEASE_SECONDS) -> Record:
        """Extend a lease, so that it ends seconds from now; raises NotFound if it is lost."""
        return self.request("POST", f"/extend_claim/{intent_id}", dict(claim_token=claim_token, seconds=seconds), retries=0)

    def progress(self, intent_id: str, claim_token: str | None = None, percent: float | None = None, message: str | None = None,
                 output: str | None = None) -> Record:
        """Tell the progress and the new output of the work, as Bus.progress does; this extends the lease, too."""
        body = dict(claim_token=claim_token, percent=percent, message=message, output=output)
        return self.request("POST", f"/progress/{intent_id}", body, retries=0)

    def step(self, intent_id: str, claim_token: str, name: str, output: str | None = None, seconds: float | None = None) -> Record:
        """Ask whether a step is done, or record it with its output, as Bus.step does; the claim token is the only credential."""
        body = dict(name=name, output=output, seconds=seconds)
        return self.request("POST", f"/step/{intent_id}", body, headers={"X-Claim-Token": claim_token}, retries=0)

    def fulfill(self, intent_id: str, claim_token: str | None = None, result: Any = None, result_type: ResultType = "json",
                next_claim: Mapping[str, Any] | None = None) -> Ended:
        """Report that the work is done.

        With next_claim, arguments of claim() but wait, the same request claims: next of the answer is an intent or None.
        """
        return self._report("fulfill", intent_id, next_claim, self._spooler, claim_token=claim_token, result=result,
                            result_type=result_type)

    def fail(self, intent_id: str, claim_token: str | None = None, error: str | None = None, retry: bool = True,
             next_claim: Mapping[str, Any] | None = None) -> Ended:
        """Report that the work has failed; with retry=False the intent is dead at once. next_claim is as in fulfill()."""
        return self._report("fail", intent_id, next_claim, self._spooler, claim_token=claim_token, error=error, retry=retry)

    def release(self, intent_id: str, claim_token: str | None = None, delay: float = 0,
                next_claim: Mapping[str, Any] | None = None) -> Ended:
        """Hand an intent back without counting the attempt; it can be claimed again after delay seconds.

        An older bus takes none back; there it is failed for a retry.
        """
        try:
            return self._report("release", intent_id, next_claim, None, claim_token=claim_token, delay=delay)
        except OlderBus:
            warnings.warn(f"{self.base_url} is an older bus, which takes no intent back: it is failed for a retry instead, and the "
                          "attempt counts")
            return self.fail(intent_id, claim_token, "The worker released it.", next_claim=next_claim)

    def _report(self, verb, intent_id, next_claim, spooler, **body):
        path, wanted = f"/{verb}/{intent_id}", dict(next_claim or ())
        token, worker_name = wanted.pop("claim_token", None) or os.urandom(16).hex(), wanted.pop("worker_name", None)

        def send():
            if next_claim is None:
                return self.request("POST", path, body)
            headers = dict(worker_header(worker_name), **{"X-Claim-Token": token})
            return self.request("POST", path, dict(body, next_token=token), headers=headers,
                                query=dict(self._claim_query(**wanted), next=1))
        return spooler.report(path, body, intent_id, send) if spooler else send()

    if TYPE_CHECKING:     # the function listen() of part 18
        def listen(self, goal: Goals, handler: Handler, *, full_envelope: bool = False, with_lease: bool = False,
                   concurrency: int = 1, lease: float = LEASE_SECONDS, max_jobs: int | None = None, max_time: float | None = None,
                   drain: bool = False, poll: float = POLL_SECONDS, on_message: Callable[[str], object] = lambda sentence: None,
                   namespace: str | None = None, publisher: str | None = None, worker_id: str | None = None,
                   capabilities: Iterable[str] | None = None, worker_name: str | None = None) -> None: ...

    def get_status(self, intent_id: str) -> State:
        """Return the state of an intent."""
        return self.request("GET", f"/status/{intent_id}")

    def get_result(self, intent_id: str, wait: float = 0) -> Result:
        """Return the state of an intent with its result, as soon as it has ended or after wait seconds."""
        return self.request("GET", f"/result/{intent_id}", wait=wait)

    def output(self, intent_id: str, after: int = 0, wait: float = 0) -> Record:
        """Return what the worker of an intent tells while it runs, as Bus.output does; held until there is news for wait seconds."""
        return self.request("GET", f"/output/{intent_id}", query=dict(after=after), wait=wait)

    def inspect(self, intent_id: str) -> Result:
        """Return all that this key may see of an intent: as an admin everything, otherwise the fields of get_result()."""
        with contextlib.suppress(NotFound, OlderBus):     # an older bus does not tell who is an admin
            if secret_in("BUS_ADMIN_SECRET") or secret_in("DASHBOARD_PASSWORD") or self.who_am_i().admin:
                return self.admin(f"intents/{intent_id}")
        return self.get_result(intent_id)

    def list(self, *, status: ListedStatus | None = None, goal: str | None = None, namespace: str | None = None, limit: int = 50,
             before: str | None = None, payload: bool = False, preview: int = 0, search: str | None = None) -> Page:
        """Return {"intents", "next"}, newest first; next is the value of before for the next page, or None."""
        return self.request("GET", "/intents", query=dict(status=status, goal=goal, namespace=namespace, limit=limit, search=search,
                                                          before=before, payload="1" if payload else None, preview=preview or None))

    def workers(self) -> Record:
        """Return {"workers"}: the workers that lately asked for work, the latest first."""
        return self.request("GET", "/workers")

    def events(self, after: int | None = None, wait: float = 0) -> Record:
        """Return {"events", "next", "missed"}: the events after a number, or from now on; next is the next value of after."""
        return self.request("GET", "/events", query=dict(after=after), wait=wait)

    def who_am_i(self) -> Record:
        """Return {"key_id", "owner", "role", "goals", "expires_at", "payloads", "admin", "now"} of the key of this client."""
        return self.request("GET", "/whoami", retries=0)

    def join(self, code: str) -> Record:
        """Exchange the code of an invitation for a key; return {"api_key", "key_id", "name", "owner", "role"}."""
        return self.request("POST", "/join", dict(code=code), retries=0)

    def cancel(self, intent_id: str) -> Ended:
        """Cancel an unfinished intent; raises Conflict if it has ended."""
        return self.request("POST", f"/cancel/{intent_id}", retries=0)

    def retry(self, intent_id: str | None = None, *, goal: str | None = None, namespace: str | None = None, limit: int = 1000,
              count: bool = False, until: float | None = None, from_start: bool = False) -> Record:
        """Reopen a dead intent; without an id, reopen up to limit dead ones of a goal or namespace, as Bus.retry_many does.

        Steps that are done stay done, unless from_start is true.
        """
        if intent_id is not None:
            return self.request("POST", f"/retry/{intent_id}", dict(from_start=True) if from_start else None, retries=0)
        more = {} if not count and until is None else dict(count=count, until=until)     # unknown to older buses
        return self.request("POST", "/retry", dict(more, goal=goal, namespace=namespace, limit=limit), retries=0)

    def schedule(self, name: str, goal: str, payload: Any, *, every: float | None = None, cron: str | None = None,
                 timezone: str | None = None, overlap: Literal["skip", "allow"] | None = None, paused: bool | None = None,
                 owner: str | None = None, namespace: str | None = None, priority: int | None = None, ttl: float | None = None,
                 max_attempts: int | None = None, backoff_base: float | None = None, target_worker: str | None = None,
                 required_capability: str | None = None, visibility: Visibility | None = None, on_success: str | None = None,
                 on_failure: str | None = None, stream: bool | None = None) -> Record:
        """Publish an intent each `every` seconds, or at the times of a cron expression; return {"name", "next_run_at", "status"}."""
        body = present(goal=goal, namespace=namespace or self.namespace, every=every, cron=cron, timezone=timezone, overlap=overlap,
                     paused=paused, owner=owner, priority=priority, ttl=ttl, max_attempts=max_attempts, backoff_base=backoff_base,
                     target_worker=target_worker, required_capability=required_capability, visibility=visibility,
                     on_success=on_success, on_failure=on_failure, stream=stream)
        body["payload"] = payload
        return self.request("POST", f"/schedule/{name}", body)

    def schedules(self, owner: str | None = None) -> Record:
        """Return {"schedules"}, each with next_run_at, last_run_at and the last_id that it published."""
        return self.request("GET", "/schedules", query=dict(owner=owner))

    def unschedule(self, name: str, owner: str | None = None) -> Record:
        """Delete a schedule; raises NotFound."""
        return self.request("POST", f"/unschedule/{name}", dict(owner=owner), retries=0)

    def run(self, name: str, owner: str | None = None) -> Published:
        """Publish the intent of a schedule now, besides its runs, and return {"id", "status", "namespace"}."""
        return self.request("POST", f"/run/{name}", dict(owner=owner), retries=0)

    def set(self, key: str, value: Any, ttl: float = VALUE_TTL_SECONDS, if_absent: bool = False) -> Record:
        """Store a JSON value for ttl seconds; with if_absent, raises Conflict if the key is taken, so it serves as a lock."""
        if if_absent:
            self._require_newer("store it though the key may be taken")
        body = dict(value=value, ttl=ttl, if_absent=if_absent)
        return self.request("POST", f"/set/{key}", body, retries=0 if if_absent else RETRIES)

    def get(self, key: str) -> Any:
        """Return the value of a key; raises NotFound."""
        return self.request("GET", f"/get/{key}").value

    def delete(self, key: str) -> Record:
        """Delete a key; return {"deleted"}, whether it had a value."""
        return self.request("POST", f"/delete/{key}", retries=0)

    def limit(self, goal: str, running: int | None = UNCHANGED, paused: bool | None = None, namespace: str | None = None) -> Record:
        """Let at most `running` intents of a goal be claimed at once, None for any number; or pause it, or end its pause."""
        changes = {} if running is UNCHANGED else dict(running=running)
        return self._as_admin("POST", f"/limit/{goal}", dict(changes, paused=paused, namespace=namespace or self.namespace))

    def limits(self) -> Record:
        """Return {"limits"}: of each goal that is limited or paused, in any namespace, with the number of claimed intents."""
        return self._as_admin("GET", "/limits")

    def admin(self, verb: str, **body: Any) -> Any:
        """Call /admin/VERB; by GET if there is no body."""
        body = present(**body)
        if verb == "purge" and body.keys() - {"confirm", "namespace"}:     # an older bus, which would ignore these, has no summary
            self.admin("summary")
        if body.get("role") == "viewer" or not body.keys().isdisjoint(("goals", "expires_at")):
            self._require_newer("make a key that may do everything, for ever")
        return self._as_admin("POST" if body else "GET", f"/admin/{verb}", body or None)

    def _as_admin(self, method, path, body=None):
        """Send a request with BUS_ADMIN_SECRET or DASHBOARD_PASSWORD, if set."""
        secret = {}
        if token := secret_in("BUS_ADMIN_SECRET"):
            secret = {"X-Admin-Token": token}
        elif password := secret_in("DASHBOARD_PASSWORD"):
            secret = {"Authorization": "Basic " + base64.b64encode(f"admin:{password}".encode()).decode()}
        if secret and not self.secure:
            raise SetupError("The admin secret is sent only over https or to this machine.")
        return self.request(method, path, body, headers=secret, retries=0)

    def _require_newer(self, consequence):
        """Raise OlderBus at a bus that would silently ignore part of a request, with this consequence."""
        try:
            self._known_newer = self._known_newer or bool(self.who_am_i())
        except (NotFound, OlderBus) as error:
            raise OlderBus(f"{self.base_url} is an older bus, which would {consequence}.") from error

    def request(self, method: str, path: str, body: Any = None, *, query: Mapping[str, Any] | None = None,
                headers: Mapping[str, str] | None = None, wait: float = 0, retries: int = RETRIES) -> Any:
        """Send a request, again after a transient error; return the answer, or None for 204.

        The bus may hold the request for wait seconds. The answer is a Record, or a list of Records.
        """
        query = dict(query or {}, wait=round(wait, 3) or None)
        try:
            encoded = urllib.parse.urlencode(present(**query), True)
            target = urllib.parse.quote(path) + ("?" + encoded if encoded else "")
        except ValueError as error:
            raise Invalid(f"This cannot be sent in UTF-8: {error}.") from error
        data = None if method == "GET" else b"" if body is None else encode_body(body)
        corrected = False
        for attempt in itertools.count():
            try:
                return self._send(method, target, data, headers or {}, self.timeout + wait, endpoint_of(method, path))
            except Forbidden as error:     # if the clock of this machine is wrong, the bus tells its own
                if corrected or "server_time" not in error.details:
                    raise
                self._clock_offset = error.details["server_time"] - time.time()
                corrected = True
            except TRANSIENT as error:
                if attempt >= retries:
                    raise
                pause = random.uniform(0, min(RETRY_SECONDS * 2 ** attempt, RETRY_MAX_SECONDS))
                time.sleep(max(pause, error.details.get("retry_after", 0)))

    def _send(self, method, target, data, headers, timeout, endpoint):
        """Sign a request and send it once; return the value of the answer."""
        import http.client
        path, _, query = target.partition("?")
        # whole seconds, since older buses take no other; rounded up, since right after its start a bus takes no earlier time
        timestamp = str(int(time.time() + self._clock_offset) + 1)
        nonce = os.urandom(16).hex()
        signed = canonical_targets(urllib.parse.unquote(path), path, query)[0]
        signature = sign(self._key, method, signed, timestamp, nonce, data or b"")
        headers = {**headers, **self._identity, "X-Timestamp": timestamp, "X-Nonce": nonce, "X-Signature": signature,
                   "User-Agent": f"intentbus/{__version__}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.base_url + target, data, headers, method=method)
        try:
            status, headers, content = self._opener.open(request, timeout=timeout)
        except (OSError, http.client.HTTPException) as error:
            way = f" through the proxy {self._proxy}" if self._proxy else ""
            reason, cure = reason_and_cure(error, self._proxy)
            raise Unreachable(f"The bus at {self.base_url} cannot be reached{way}: {reason}. {cure}") from error
        if 300 <= status < 400:
            location = str(headers.get("Location")).partition(target)[0].rstrip("/")
            raise Unreachable(f"{self.base_url} redirects to {location}. If that is the bus, use it as the URL; otherwise a portal "
                              "or a proxy is in the way.")
        if len(content) > ANSWER_BYTES:
            raise Unreachable(f"{self.base_url} answered more than {ANSWER_BYTES} bytes: this is not a bus, or ask it for less.")
        return self._read(status, headers, content, endpoint, f"{timestamp}\n{nonce}")

    def _is_of_a_bus(self, headers):
        """Return whether an answer without our JSON is of an older bus, by its header, or by the name and version at /."""
        import http.client
        if "X-Intent-Version" in headers:
            return True
        with contextlib.suppress(OSError, http.client.HTTPException):
            status, _, content = self._opener.open(urllib.request.Request(self.base_url + "/"), timeout=self.timeout)
            return status == 200 and re.fullmatch(rb"(?i)[^<\n]{,99}intent.?bus\b[^<\n]{,99}\d\.\d[^<\n]{,99}", content.strip())
        return False

    def _read(self, status, headers, content, endpoint, sent):
        """Return the value of an answer, or raise the error in it; sent are the timestamp and nonce of the request.

        An answer is not signed, so a time in it counts only with a MAC: a wrong one would have us sign for a later time.
        """
        if status == 204 and endpoint == "POST /claim":
            return None
        try:
            value = from_json(content, 2 * JSON_DEPTH)     # a payload stands some levels deep in it
            if status < 300:
                return ANSWERS.get(endpoint, ANY_ANSWER)(value)
            error = ERROR_ANSWER(value["error"])
        except (Invalid, ValueError, TypeError, KeyError) as failure:
            if not (400 <= status < 500 and content and self._is_of_a_bus(headers)):     # without content, its end was lost
                form = "with the JSON of another program" if content[:1] in (b"{", b"[") else "without JSON"
                raise Unreachable(f"{self.base_url} answered {status} {form}: a proxy page answered, not a bus. Check the URL, its "
                                  "http:// or https://, and any proxy or tunnel on the way.") from failure
            error = error_of_page(content)
            if error.page and status in (404, 405):
                raise OlderBus(f"{self.base_url} is an older bus, which has no {endpoint}: replace it by serve of this version, or "
                               "do without.") from failure
        if error.message == "Replay detected":     # a connection failed, and the request was sent again
            raise Unreachable(f"The answer of {self.base_url} was lost; the request may have been carried out.")
        error_class = ERRORS.get(status, Unavailable if status in (502, 504) else Error)     # a proxy sends 502 and 504
        raised = error_class(self._with_cure(error.message), error.code)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            raised.details["retry_after"] = max(0, min(float(headers.get("Retry-After", "")), RETRY_MAX_SECONDS))
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            server_time = json.loads(content, parse_float=str, parse_int=str)["error"].get("server_time")     # as it is written
            if secrets_equal(error.get("mac"), hmac_of(self._key, f"{server_time}\n{sent}")):
                raised.details["server_time"] = float(server_time)
        raise raised

    def _with_cure(self, message):
        """Return the message of a bus that refuses a key, with what this side knows of the cause and the cure."""
        if message == "Bad signature":
            message += f": the key in use is not the bus's key with the id {self._key_id}."
        if message == "Invalid API key." and self._key_id != "owner":
            message += (f" The bus does not know {self._key_id}: it was revoked or has expired, or another database is in use there. "
                        "Join the bus again with a new code from keys invite.")
        if message.startswith("Missing API key") and "X-Key-ID" in self._identity:
            message = ("Missing API key: over plain http only its id is sent, and this bus takes the key alone. Use https, or pass "
                       "--send-key if you trust the network and all users of its machine.")
        if "needs the owner key" in message and os.path.exists(os.path.expanduser(KEY_FILE)):
            message += f" If that is this machine, add --key-file {KEY_FILE}."
        return message


# ---- 18. Worker ----
# Claim, run, extend the lease, report. A handler is called with (intent, lease) and returns (result, result_type).

HANGUP = getattr(signal, "SIGHUP", None)     # Windows has none
PAST_TENSES = {"fulfill": "fulfilled", "fail": "failed", "release": "released"}
LEFT_OUT = "\n[Some output is left out here: there was too much at once.]\n"


class Reject(Exception):
    """A handler raises this when no retry can help; the intent is dead at once."""


class HandlerFailed(Exception):
    """The handler ran and failed; the intent is retried."""


class Postpone(Exception):
    """A handler raises this when it cannot work now; the intent is released, and the attempt does not count."""


def step_once(bus, intent_id, claim_token, lease_seconds, name, run):
    """Return the output of a step, and whether it was recorded before; otherwise it is that of run(), and recorded now.

    Raises NotFound if the lease is lost, Postpone if the bus is away for as long as a lease.
    """
    def ask(*news):
        deadline = time.monotonic() + lease_seconds
        while True:
            try:
                return bus.step(intent_id, claim_token, name, *news)
            except TRANSIENT as error:
                if time.monotonic() >= deadline:
                    raise Postpone(str(error)) from error
                time.sleep(random.uniform(0, RECHECK_SECONDS))
    known = ask()
    if known.done:
        return known.output, True
    started = time.monotonic()
    output = run()
    ask(output, round(time.monotonic() - started, 3))
    return output, False


def reason_of(error):
    """Return the words for an exception that is no Error, such as that of a full disk."""
    if not isinstance(error, OSError) or not error.strerror:
        return f"{type(error).__name__}: {error}"
    return error.strerror + (f": {error.filename}" if error.filename else "")


class Lease:
    """The lease of an intent; its worker calls keep() again and again, which extends it after each third of its seconds.

    keep() also tells the bus of the handler's progress: each READER_SECONDS, or each PROGRESS_SECONDS if somebody reads it.
    `broken` is None, or the reason why the handler must end: the lease is "lost", or the worker is "stopped".
    """

    def __init__(self, bus: Bus | IntentClient, intent: Claimed, seconds: float) -> None:
        self._bus, self._holder, self._seconds = bus, (intent.id, intent.claim_token), seconds
        self._due = steady_clock() + seconds / 3     # when it is to be extended
        self._news: dict[str, Any] = {}             # not told to the bus yet: percent, message, output
        self._news_lock = threading.Lock()
        self._pause, self._told_at = PROGRESS_SECONDS, -FOREVER
        self._calling = threading.Lock()     # held while the bus is called
        self._steps: set[str] = set()     # names of the steps in this run
        self._started = time.monotonic()
        self.broken: str | None = None

    def age(self) -> str:
        """Return the seconds since the intent was claimed, as words."""
        return f"{time.monotonic() - self._started:.1f} s"

    def progress(self, percent: float | None = None, message: str | None = None) -> None:
        """Tell people how far the work is, from 0 to 100 and as a message; it takes no time, and may be called often."""
        self._note(percent=percent, message=message)

    def write(self, text: str) -> None:
        """Add to the output that people see while the handler runs; of much at once, the end."""
        self._note(output=text)

    def step(self, name: str, function: Callable[[], Any]) -> Any:
        """Return the value of a step: of function(), called once an intent, however often this is tried; any JSON value.

        It is called again if this machine dies after it, and before the bus has recorded the value.
        """
        if name in self._steps:
            raise ValueError(f"The step {name} is there twice.")
        self._steps.add(name)
        try:
            value, _ = step_once(self._bus, *self._holder, self._seconds, name, lambda: to_json(function()))
            return json.loads(value)
        except NotFound as error:
            self.broken = "lost"
            raise HandlerFailed("lost") from error
        except (Invalid, Conflict) as error:
            raise Reject(f"The step {name} cannot be recorded: {error}") from error

    def keep(self) -> None:
        """Call the bus if that is due, in a thread: a slow bus must not hold up the other leases."""
        now = steady_clock()
        due = now >= self._due or self._news and now >= self._told_at + self._pause
        if due and self._calling.acquire(blocking=False):
            try:
                threading.Thread(target=self._call, daemon=True).start()
            except RuntimeError:     # there is no memory for one
                self._call()

    def tell_the_rest(self) -> None:
        """Tell the bus the rest of the news, before the outcome is reported; if the bus is away, the rest is dropped."""
        self._calling.acquire()     # once a call that has begun is over
        if not self._news or self.broken:
            return self._calling.release()
        time.sleep(max(0, min(PROGRESS_SECONDS, self._told_at + PROGRESS_SECONDS - steady_clock())))
        self._call()

    def _note(self, **news):
        with self._news_lock:
            if self._pause < FOREVER:
                self._add(news)

    def _add(self, news):
        output = self._news.get("output", "") + (news.get("output") or "")
        if len(output) > LIVE_CHARACTERS:
            output = LEFT_OUT + output[-LIVE_CHARACTERS:]
        self._news.update(present(**dict(news, output=output or None)))

    def _call(self):
        """Tell the bus the news, which extends the lease, too, or just extend it; then let others call."""
        with self._news_lock:
            news, self._news = self._news, {}
        try:
            if not (news and self._tell(news)):
                self._bus.extend_claim(*self._holder, self._seconds)
            self._due = steady_clock() + self._seconds / 3
        except NotFound:
            self.broken = "lost"
        except Exception:     # tried again at the next call
            self._due = 0
            with self._news_lock:
                later, self._news = self._news, news
                self._add(later)
        finally:
            self._calling.release()

    def _tell(self, news):
        """Tell the bus the news; return False if it is an older bus, which takes none."""
        try:
            answer = self._bus.progress(*self._holder, **news)
        except (NotFound, OlderBus):     # or the lease is lost, which the extension will show
            self._pause = FOREVER
            return False
        finally:
            self._told_at = steady_clock()     # the bus has counted from an earlier time
        self._pause = PROGRESS_SECONDS if answer.followed else READER_SECONDS
        return True


class Worker:
    """Claims intents of a goal, or a list of goals, from a Bus or an IntentClient, and runs a handler for each.

    Up to concurrency handlers run at a time. The worker ends after max_jobs intents or max_time seconds, or with drain once
    there is nothing to claim. lease and poll are seconds. on_message(sentence) tells of outcomes and errors.

    A handler is called with (intent, lease), and returns (result, result_type). It raises HandlerFailed or Reject to fail
    the intent. Any other exception is trouble of this machine: the worker releases the intent and stops.
    """

    def __init__(self, bus: Bus | IntentClient, goal: Goals, handler: Callable[[Claimed, Lease], tuple[Any, ResultType]], *,
                 concurrency: int = 1, lease: float = LEASE_SECONDS, max_jobs: int | None = None, max_time: float | None = None,
                 drain: bool = False, poll: float = POLL_SECONDS, on_message: Callable[[str], object] = lambda sentence: None,
                 namespace: str | None = None, publisher: str | None = None, worker_id: str | None = None,
                 capabilities: Iterable[str] | None = None, worker_name: str | None = None) -> None:
        self._bus = bus
        self._handler = handler
        self._wanted = present(goal=goal, lease=lease, namespace=namespace, publisher=publisher, worker_id=worker_id,
                             capabilities=capabilities and list(capabilities), worker_name=worker_name)
        self._lease_seconds = lease
        self._drain = drain
        self._poll = poll
        self._log = on_message
        self._jobs = threading.Semaphore(max_jobs or sys.maxsize)     # one permit for each intent that may still be claimed
        self._deadline = time.monotonic() + (float("inf") if max_time is None else max_time)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(concurrency)]
        self._running: dict[int, tuple[Lease, Claimed]] = {}     # by thread
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()     # gets an item when a handler or a thread ends, to wake run()
        self._over: list[None] = []     # an item for each thread that has ended, save its last steps
        self._stopping = threading.Event()
        self._failure = None
        self._trouble = None     # of the latest claim, as a sentence
        self.signals: list[int] = []     # numbers of the signals that interrupted the worker

    def run(self) -> None:
        """Work until an option, interrupt() or Ctrl-C ends the worker.

        Raises the Error that stops it, BrokenPipeError if the reader of its output is gone, or SetupError for other trouble.
        """
        for thread in self._threads:
            thread.start()
        self._wait_while(lambda: not self.signals and len(self._over) < len(self._threads))
        if self.signals:
            self._wind_down()
        if isinstance(self._failure, (Error, BrokenPipeError)):
            raise self._failure
        if self._failure:
            raise SetupError(f"The worker cannot go on: {reason_of(self._failure)}.") from self._failure

    def interrupt(self, signal_number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """Claim nothing more and let handlers finish; when called again, end them and release their intents.

        HUP never counts as a second time: a terminal that closes sends it, and then its shell once more.
        """
        if signal_number == HANGUP and self.signals:
            return
        self.signals.append(signal_number)
        self._ended.put(None)     # unlike Event.set(), safe in a signal handler

    def _wind_down(self):
        self._stopping.set()
        if self._running:
            self._log(f"finishing {len(self._running)} running; interrupt again to end and release them")
        self._wait_while(lambda: self._running and len(self.signals) < 2)
        for lease, _ in list(self._running.values()):
            lease.broken = lease.broken or "stopped"
        grace = getattr(self._handler, "kill_after", KILL_AFTER_SECONDS)
        self._wait_while(lambda: self._running, grace + PIPE_SECONDS + 3 * WATCH_SECONDS)
        for lease, intent in list(self._running.values()):     # their handlers are Python functions, which cannot be killed
            self._report(intent, lease, "release")

    def _wait_while(self, condition, seconds=float("inf")):
        deadline = time.monotonic() + seconds
        while condition() and time.monotonic() < deadline:
            try:
                self._ended.get(timeout=LEASE_CHECK_SECONDS)     # short, since a wait stops counting while a phone sleeps
            except queue.Empty:
                pass
            except KeyboardInterrupt:
                self.interrupt()
            for lease, _ in list(self._running.values()):
                lease.keep()

    def _work(self):
        """Run in each thread: claim intents and process them until the worker ends."""
        try:
            while not self._is_over() and self._jobs.acquire(blocking=False):
                intent = self._claim_next(os.urandom(16).hex())
                if intent:
                    self._process(intent)
                    continue
                self._jobs.release()
                if self._drain:
                    return
        except Exception as error:
            self._stop(error)
        finally:
            self._over.append(None)
            self._ended.put(None)

    def _stop(self, error):
        """Claim nothing more; the first error is the one that run() raises, since others may follow from it."""
        self._failure = self._failure or error
        self._stopping.set()

    def _is_over(self):
        return self._stopping.is_set() or time.monotonic() >= self._deadline

    def _claim_next(self, token):
        """Return an intent that is claimed with a token, or None if a wait brought none."""
        if self._drain:
            return self._bus.claim(**self._wanted, claim_token=token)
        started = time.monotonic()
        wait = max(0, min(CLAIM_WAIT_SECONDS, self._deadline - started))
        while True:     # always with the same token, in case a lost answer had claimed an intent
            try:
                intent = self._bus.claim(**self._wanted, wait=wait, claim_token=token)
                self._note_trouble(None)
                break
            except TRANSIENT as error:
                self._note_trouble(f"{error} Trying again.")
            self._stopping.wait(random.uniform(1, 2 * self._poll))
            if self._is_over():
                return None
        if not intent and time.monotonic() - started < wait / 2:     # this bus does not hold claims
            self._stopping.wait(self._poll)
        return intent

    def _note_trouble(self, trouble):
        """Tell of trouble with the bus, or with None of its end, unless that is known."""
        known, self._trouble = self._trouble, trouble
        if trouble != known:
            self._log(trouble or "The bus is back again.")

    def _process(self, intent):
        """Run the handler for an intent and report the outcome; then go on with the intent that the report has claimed."""
        thread, older = threading.get_ident(), min(int(self._lease_seconds), LEASE_SECONDS)     # a bus that does not tell its lease
        try:
            while intent:
                lease = Lease(self._bus, intent, intent.get("claim_timeout") or older)
                self._running[thread] = lease, intent     # in place of the last one: with no moment between, run() waits for it
                intent = self._process_one(intent, lease)
        finally:
            del self._running[thread]
            self._ended.put(None)

    def _process_one(self, intent, lease):
        verb, details = ("release", {}) if self._stopping.is_set() else self._run_handler(intent, lease)
        lease.tell_the_rest()
        if lease.broken == "lost":
            self._log_outcome(intent, "lost", lease, ": it was cancelled, or its lease ran out before the handler ended")
        elif verb == "release" or lease.broken and verb != "fulfill":     # finished work is reported even then
            self._report(intent, lease, "release", **(details if verb == "release" else {}))
        else:
            return self._report_and_claim(intent, lease, verb, details)
        return None

    def _run_handler(self, intent, lease):
        """Run the handler; return the verb of the bus that reports the outcome, and its arguments."""
        try:
            result, result_type = self._handler(intent, lease)
            return "fulfill", dict(result=result, result_type=result_type)
        except Reject as error:
            return "fail", dict(error=str(error), retry=False)
        except HandlerFailed as error:
            return "fail", dict(error=str(error))
        except Postpone as error:
            self._log(f"{intent.goal} {intent.id} is postponed: {error}")
            return "release", dict(delay=POLL_SECONDS)
        except Exception as error:     # the trouble of this machine, not of the intent
            self._stop(error)
            return "release", {}

    def _report_and_claim(self, intent, lease, verb, details):
        """Report an outcome and, if the worker goes on, claim the next intent with it; return that one, or None."""
        if self._is_over() or not self._jobs.acquire(blocking=False):
            self._report(intent, lease, verb, **details)
            return None
        token = os.urandom(16).hex()
        answer = self._report(intent, lease, verb, **details, next_claim=dict(self._wanted, claim_token=token))
        following = answer and answer.next
        if not answer and not self._stopping.is_set():     # an answer that was lost may have claimed an intent
            following = self._claim_next(token)
        if not following:
            self._jobs.release()
        return following

    def _report(self, intent, lease, verb, next_claim=None, **details):
        """Report an outcome; return the answer, or None after an error."""
        try:
            answer = getattr(self._bus, verb)(intent.id, intent.claim_token, **details, next_claim=next_claim)
            self._log_outcome(intent, PAST_TENSES[verb], lease, consequence_of(answer, **details) if verb == "fail" else "")
            if details.get("retry") is False and answer.get("status") == "open":
                self._log(f"{intent.goal} {intent.id} will be tried again: this is an older bus, where an intent cannot be failed for good")
            return answer
        except NotFound:
            self._log_outcome(intent, "lost", lease, ": it was cancelled, or its lease ran out before the report")
        except (Invalid, PayloadTooLarge) as error:
            self._report(intent, lease, "fail", error=f"The result was refused: {error}", retry=False)
        except SetupError as error:     # of the spool
            self._stop(error)
        except Error as error:
            kept = verb != "release" and isinstance(error, TRANSIENT) and getattr(self._bus, "spool", None)
            consequence = "the spool keeps it and reports it later" if kept else "the intent will be done again"
            self._log(f"{intent.goal} {intent.id} {verb} could not be reported; {consequence}: {error}")
        return None

    def _log_outcome(self, intent, outcome, lease, more):
        self._log(f"{intent.goal} {intent.id} {outcome} after {lease.age()}{more}")


def consequence_of(answer, error, retry=True):
    """Return the words for when a failed intent is tried again, and for its error; of several lines, the last one."""
    when, lines = "", error.strip().splitlines() or ["no reason"]
    if answer.get("status") == "dead":
        when = " and is dead"
    elif answer.get("run_at"):
        when = time.strftime(", next attempt at %H:%M:%S", time.localtime(answer.run_at))
    return f"{when}: {lines[0]}" if len(lines) == 1 else f"{when}: {lines[0].partition(': ')[0]}: {lines[-1]}"


def listen(bus: Bus | IntentClient, goal: Goals, handler: Handler, *, full_envelope: bool = False, with_lease: bool = False,
           concurrency: int = 1, lease: float = LEASE_SECONDS, max_jobs: int | None = None, max_time: float | None = None,
           drain: bool = False, poll: float = POLL_SECONDS, on_message: Callable[[str], object] = lambda sentence: None,
           namespace: str | None = None, publisher: str | None = None, worker_id: str | None = None,
           capabilities: Iterable[str] | None = None, worker_name: str | None = None) -> None:
    """Call handler(payload) for each intent of a goal, until Ctrl-C; with full_envelope, handler(intent).

    With with_lease, it gets the Lease as its second argument, to tell of its progress. It returns the result, any JSON
    value. False or an exception fails the intent, Reject fails it for good. The other arguments are those of Worker and of
    claim.
    """
    def run(intent, lease):
        try:
            result = handler(intent if full_envelope else intent.payload, *([lease] if with_lease else ()))
            to_json(result).encode()     # raises here, so that a result that is not JSON fails the intent
        except (Reject, HandlerFailed, Postpone):
            raise
        except (Exception, SystemExit) as error:
            raise HandlerFailed(f"{type(error).__name__}: {error}") from error
        if result is False:
            raise HandlerFailed("The handler returned False.")
        return result, "json"
    Worker(bus, goal, run, concurrency=concurrency, lease=lease, max_jobs=max_jobs, max_time=max_time, drain=drain, poll=poll,
           on_message=on_message, namespace=namespace, publisher=publisher, worker_id=worker_id, capabilities=capabilities,
           worker_name=worker_name).run()


IntentClient.listen = listen     # type: ignore   # added here, since it needs the Worker

SECRET_VARIABLES = ("INTENT_API_KEY", "BUS_SECRET", "BUS_ADMIN_SECRET", "DASHBOARD_PASSWORD", "BUS_METRICS_TOKEN")
CTRL_BREAK_EVENT = 1     # the SIGTERM of Windows; the module signal has it only there
POSTPONED = 75     # the exit code EX_TEMPFAIL of sysexits.h
NOT_EXECUTABLE = (errno.ENOENT, errno.EACCES, errno.ENOEXEC)
CUT_MARK = "\n[The output was longer: it is cut here.]"
PROGRESS_MARK = b"::progress "     # begins a line of stderr that tells how far the work is
PROGRESS_LINE = rb"::progress (\d{1,3}(?:\.\d+)?)%?(?:[ \t]+([^\r\n]*))?\r?\n?"
PLACEHOLDER = r"(?a)\{\{(\w+)\}\}|\{([A-Za-z_]\w*)\}"


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
    return re.sub(PLACEHOLDER, value_of, argument)


def handler_environment(intent, bus_variables):
    """Return the environment of a handler: the worker's without its secrets, and the variables of the intent and its bus."""
    values = dict(bus_variables, ID=intent.id, GOAL=intent.goal, NAMESPACE=intent.namespace, ATTEMPT=intent.claim_attempts,
                  MAX_ATTEMPTS=intent.max_attempts, PAYLOAD=to_json(intent.payload), CLAIM_TOKEN=intent.claim_token,
                  CLAIM_TIMEOUT=intent.get("claim_timeout") or LEASE_SECONDS)
    if isinstance(intent.payload, dict):
        values.update((f"PAYLOAD_{field}", value) for field, value in intent.payload.items()
                      if re.fullmatch(r"\w+", field, re.ASCII) and not isinstance(value, (dict, list)))
    variables = {variable: value for variable, value in os.environ.items()
                 if variable not in SECRET_VARIABLES and not variable.startswith("INTENT_PAYLOAD")}
    for field, value in values.items():
        if "\0" not in as_text(value) and len(as_text(value).encode()) <= ENVIRONMENT_BYTES:
            variables[f"INTENT_{field}"] = as_text(value)
    return variables


def run_name(claim_token):
    """Return a name for the run of a handler, which does not reveal the claim token."""
    return hash_token(claim_token)[:32]


def steps_folder(run):
    """Return the folder in which a run notes the names of its steps; its worker or the Guardian deletes it."""
    import tempfile
    return os.path.join(tempfile.gettempdir(), f"intentbus-steps-{run}")


def run_quietly(*arguments, timeout=None):
    """Run a program without input or output; return whether it ends with exit code 0 within timeout seconds."""
    import subprocess
    try:
        return subprocess.run(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              timeout=timeout).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


def payload_file(payload):
    """Return a temporary file with a payload as a line of JSON, at its start; raises SetupError."""
    import tempfile
    try:
        file = tempfile.TemporaryFile()
        file.write(to_json(payload).encode() + b"\n")
        file.seek(0)
        return file
    except OSError as error:
        raise SetupError(f"The payload cannot be written to a temporary file (TMPDIR says where): {error.strerror}.") from error


def socket_from(pipe):
    """Return a socket that gets the data of a pipe, by a thread."""
    ours, theirs = socket.socketpair()
    def copy():
        with pipe, theirs, contextlib.suppress(OSError):     # our end may be closed first
            while data := os.read(pipe.fileno(), 65536):
                theirs.sendall(data)
    threading.Thread(target=copy, daemon=True).start()
    return ours


def process_group_options():
    """Return the options of Popen that make a process group, so that a program can be ended with its children."""
    return {"start_new_session": True} if POSIX else {"creationflags": 0x200}     # CREATE_NEW_PROCESS_GROUP


class Guardian:
    """A shell that outlives a killed worker, then ends its programs and deletes the folders of their steps; not on Windows.

    The worker tells it of each program that starts or ends, as PID/RUN. Its input ends with the worker, however that ends.
    """

    SCRIPT = """trap '' HUP INT TERM
        running=' '
        while read -r verb program; do
            case $verb in
                started) running="$running$program " ;;
                ended) running="${running%%" $program "*} ${running#*" $program "}" ;;
            esac
        done
        end() { for program in $running; do kill -s "$1" -- "-${program%/*}"; done; }
        end TERM
        [ "$running" = ' ' ] || sleep "$1"
        end KILL
        for program in $running; do rm -rf "$2${program#*/}"; done
    """

    def __init__(self, kill_after):
        self._kill_after = kill_after
        self._process = None

    def __enter__(self):
        import subprocess
        with contextlib.suppress(OSError):     # without a guardian, too, a worker can work
            self._process = POSIX and subprocess.Popen(
                ["sh", "-c", self.SCRIPT, "guardian", f"{self._kill_after:.0f}", steps_folder("")], stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **process_group_options())

    def __exit__(self, *error):
        if self._process:
            self._process.stdin.close()
            self._process.wait()

    def tell(self, verb, program):
        """Tell that a program, as PID/RUN, has started or ended."""
        with contextlib.suppress(OSError):     # it was killed
            if self._process:
                os.write(self._process.stdin.fileno(), f"{verb} {program}\n".encode())


class OutputReader:
    """Reads the pipes of a program as their data comes, so that the program never blocks, and without waiting for their end."""

    def __init__(self):
        self._selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()     # needs no descriptor of its own

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def collect(self, pipe, excess, passed=lambda data: data):
        """Return a bytearray that collects what passed() returns for the data of a pipe; excess is the slice to drop."""
        kept = bytearray()
        source = pipe if POSIX else socket_from(pipe)     # Windows can wait for sockets only
        self._selector.register(source, selectors.EVENT_READ, (kept, excess, passed))
        return kept

    def read(self, seconds):
        """Collect the data that comes within some seconds; return whether there was any, or the end of a pipe."""
        ready = self.is_open() and self._selector.select(seconds)
        for key, _ in ready or ():
            kept, excess, passed = key.data
            data = os.read(key.fd, 65536) if POSIX else key.fileobj.recv(65536)
            kept += passed(data)
            del kept[excess]
            if not data:
                self._selector.unregister(key.fileobj)
                key.fileobj.close()
        return bool(ready)

    def is_open(self):
        """Return whether a pipe has not ended."""
        return bool(self._selector.get_map())


class StderrFilter:
    """Splits the stderr of a program as it comes: lines with progress go to the lease, all else to a function."""

    def __init__(self, lease, show, stream):
        """show(data) gets all but progress and, at the end, no data; stream tells whether the lease gets it, too."""
        self._lease, self._show, self._stream = lease, show, stream
        self._begun, self._at_start = b"", True     # the begin of a line that may tell progress
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, data):
        """Take data, or none at the end of the pipe; return it without progress."""
        *lines, last = (self._begun + data).split(b"\n")
        passed = []
        for line in lines:
            passed.append(self._without_progress(line + b"\n"))
            self._at_start = True
        may_tell = last.startswith(PROGRESS_MARK) and len(last) < STDERR_LINE_BYTES or PROGRESS_MARK.startswith(last)
        self._begun = last if data and self._at_start and may_tell else b""
        if not self._begun and last:
            passed.append(self._without_progress(last))
            self._at_start = False
        passed = b"".join(passed)
        if passed:
            self._show(passed)
            if self._stream:
                self._lease.write(self._decoder.decode(passed))
        return passed

    def end(self):
        """Pass the rest on."""
        self(b"")
        self._show(b"")

    def _without_progress(self, line):
        found = re.fullmatch(PROGRESS_LINE, line) if self._at_start else None
        percent = float(found[1]) if found else 101
        if percent > 100:
            return line
        self._lease.progress(int(percent) if percent.is_integer() else percent, (found[2] or b"").decode(errors="replace"))
        return b""


class Program:
    """A handler that runs a program: payload on stdin, result on stdout. The README has the contract.

    timeout and kill_after are seconds, max_output bytes; result says how to read stdout: auto, json, text or none.
    tell("started" or "ended", "PID/RUN") is called for each process, see run_name(); show(intent, data) for its stderr without
    progress, and with no data at the end, on_message(sentence) when output was cut. With stream, the bus is told the stderr
    of every intent, not only where the publisher wants it. variables, without INTENT_ in front, lead its steps to the bus.
    Raises SetupError if there is no such program, or if it is a batch file of Windows with placeholders: cmd.exe could take
    a field for commands.
    """

    def __init__(self, arguments, timeout=HANDLER_SECONDS, kill_after=KILL_AFTER_SECONDS, max_output=OUTPUT_BYTES,
                 result="auto", tell=lambda verb, program: None, show=lambda intent, data: None, on_message=lambda sentence: None,
                 stream=False, variables=()):
        import shutil
        self._program = shutil.which(arguments[0])
        if not self._program:
            cure = "run chmod +x on it" if os.path.exists(arguments[0]) else "check its path"
            raise SetupError(f"There is no program {arguments[0]!r} that can be run; {cure}.")
        self._arguments = arguments[1:]
        batch_file = not POSIX and self._program.rstrip(". ").lower().endswith((".bat", ".cmd"))
        if batch_file and any(field for argument in self._arguments for _, field in re.findall(PLACEHOLDER, argument)):
            raise SetupError(f"{self._program} is a batch file, where a field in an argument could run commands: read the "
                             "payload from stdin instead, or use another kind of program.")
        self._timeout = timeout
        self.kill_after = kill_after
        self._max_output = max_output
        self._result = result
        self._tell = tell
        self._show = show
        self._log = on_message
        self._stream = stream
        self._variables = variables

    def __call__(self, intent, lease):
        import shutil
        reader, run = OutputReader(), run_name(intent.claim_token)
        process = self._start(intent)
        stderr = StderrFilter(lease, functools.partial(self._show, intent), self._stream or intent.get("stream"))
        with reader:
            try:
                self._tell("started", f"{process.pid}/{run}")
                output = reader.collect(process.stdout, excess=slice(self._max_output + 1, None))     # one more shows a cut
                errors = reader.collect(process.stderr, slice(None, -STDERR_BYTES), stderr)
                reason = self._wait(process, reader, lease)
            finally:
                self._signal(process, "SIGKILL")     # ends the children that the program left behind
                process.wait()
                shutil.rmtree(steps_folder(run), ignore_errors=True)
                self._tell("ended", f"{process.pid}/{run}")
            deadline = time.monotonic() + PIPE_SECONDS     # a process in another session may hold the pipes, and write
            while time.monotonic() < deadline and reader.read(WATCH_SECONDS):
                pass
        stderr.end()
        if reason or process.returncode:
            raise self._failure(reason, process.returncode, errors.decode(errors="replace").strip())
        return self._parse(bytes(output), intent)

    def _start(self, intent):
        import subprocess
        try:
            arguments = [self._program, *(fill_placeholders(argument, intent) for argument in self._arguments)]
            with payload_file(intent.payload) as stdin:     # a pipe would block if the program does not read
                return subprocess.Popen(arguments, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        env=handler_environment(intent, self._variables), **process_group_options())
        except ValueError as error:     # an argument has a NUL
            raise Reject(f"The payload cannot be an argument: {error}.") from error
        except OSError as error:
            if error.errno == errno.E2BIG:
                raise Reject("The payload is too long for an argument.") from error
            cure = ("; check that it starts with #! and is executable, and that its lines end with LF, not CR LF"
                    if error.errno in NOT_EXECUTABLE else "")
            raise SetupError(f"The handler {self._program} cannot be run: {error.strerror}{cure}.") from error

    def _wait(self, process, reader, lease):
        """Wait for the process; end it after the timeout or when its lease is broken; return the reason, or None."""
        import subprocess
        reason = None
        deadline = time.monotonic() + self._timeout
        while process.poll() is None:
            overdue = time.monotonic() >= deadline
            if not reason and (lease.broken or overdue):
                reason = lease.broken or f"timed out after {self._timeout:g} s, the limit of --timeout"
                self._signal(process, "SIGTERM")
                deadline = time.monotonic() + self.kill_after
            elif overdue:
                self._signal(process, "SIGKILL")
            if reader.is_open():
                reader.read(WATCH_SECONDS)
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(WATCH_SECONDS)
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
        if code == POSTPONED:
            return Postpone(f"exit code {code}{said}")
        if code == 100:
            return Reject(errors or "The handler rejected it with exit code 100.")
        if code in (126, 127):
            return SetupError(f"The handler ended with exit code {code}, which means it cannot run here{said}")
        return HandlerFailed((f"exit code {code}" if code > 0 else f"killed by signal {-code}") + said)

    def _parse(self, output, intent):
        """Return the result in the output of the program, and its type; text that was cut ends with CUT_MARK."""
        is_cut = len(output) > self._max_output
        if self._result == "none" or self._result == "auto" and not is_cut and not output.strip():
            return None, "json"
        if is_cut and self._result == "json":
            raise Reject(f"The handler's output is longer than {self._max_output} bytes (--max-output), so its JSON is not whole.")
        if self._result in ("auto", "json") and not is_cut:
            read = from_json if self._result == "json" else from_json_or_text
            try:
                return read(output.rstrip(b"\r\n")), "json"
            except Invalid as error:
                if self._result == "json":
                    raise HandlerFailed(f"The handler's output is not JSON: {error}") from error
        decoder = codecs.getincrementaldecoder("utf-8")("replace")     # drops half a character at the cut
        decoded = decoder.decode(output[:self._max_output], final=not is_cut).replace("\0", "").rstrip("\r\n")
        while len(to_json(decoded).encode()) > 2 * self._max_output:     # an invalid byte becomes three bytes, ESC six
            decoded = decoded[:len(decoded) * 3 // 4]
            is_cut = True
        if is_cut:
            self._log(f"{intent.id}: the output is too long (--max-output is {self._max_output} bytes), so the result is cut")
        return decoded + CUT_MARK * is_cut, "text"


# ---- 19. Doctor ----
# What goes wrong in practice, and its cure. Each check yields findings.

Finding = collections.namedtuple("Finding", "level about words")     # level: ok, note or bad; words: one or two sentences
ok, note, bad = (functools.partial(Finding, level) for level in ("ok", "note", "bad"))
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "sdcardfs", "fuse", "vfat", "exfat")


def open_client(options, timeout=CLIENT_SECONDS, spool=None):
    """Return a client for the flags of a command; raises SetupError."""
    key = options.key_file and read_key(options.key_file)
    if options.key_file and key is None:
        raise SetupError(f"There is no key file {options.key_file}.")
    return IntentClient(options.url, key, timeout, options.namespace, options.ca, spool, options.send_key)


def database_location(options):
    """Return the path or URL of the database for the flags of a command."""
    return options.db or os.environ.get("BUS_DB_PATH", "").rstrip("\r\n") or "intentbus.db"


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
    if sqlite3.sqlite_version_info < (3, 35):     # an older Python cannot import this module
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
        try:
            bus = open_client(options, DOCTOR_SECONDS)
        except SetupError as error:
            yield bad("key", str(error))
            return
    yield from (bad("key", f"{warning.message}.") for warning in caught)
    try:
        me = bus.who_am_i()
    except Unreachable as error:
        yield bad("bus", str(error))
    except (Unauthorized, Forbidden) as error:
        yield ok("bus", f"{bus.base_url} answers.")
        cure = "" if "Join the bus again" in str(error) else " Join the bus again with a new code from keys invite."
        yield bad("key", f"The bus refuses this key: {error}{cure}")
    except (NotFound, OlderBus):
        yield note("bus", f"{bus.base_url} is an older bus, such as Intent Bus 7, where only publish, work, status, result, set and get "
                          "work. For the rest, run serve of this version in its place; it takes the clients of the older one, too.")
        try:
            bus.get_status("0" * 32)     # no intent has this id
        except NotFound:
            yield ok("key", "The bus takes this key.")
        except Error as error:
            yield bad("key", f"The bus refuses this key: {error}")
    except Error as error:
        yield bad("bus", f"{bus.base_url} is in trouble: {error}")
    else:
        yield ok("bus", f"{bus.base_url} answers.")
        only = f", for {', '.join(me.goals)} only" if me.goals else ""
        named = "The owner key" if me.key_id == OWNER.key_id else f"The key {me.key_id} (owner: {me.owner})"
        yield ok("key", f"{named} may {'do everything' if me.admin else ROLE_WORDS.get(me.role, me.role)}{only}.")
        if me.expires_at is not None and me.expires_at < me.now + KEY_ENDS_SECONDS:
            yield note("key", time.strftime("It ends at %Y-%m-%d %H:%M; join the bus again before, with a new code from keys invite.",
                                            time.localtime(me.expires_at)))
        yield from check_clock(me.now - time.time())


def check_work(options):
    """Check schedules and, for an admin, limits and the keys of others; check_bus tells why the bus cannot be asked."""
    with contextlib.suppress(Error), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bus = open_client(options, DOCTOR_SECONDS)
        me, workers = bus.who_am_i(), bus.workers().workers
        for schedule in bus.schedules().schedules:
            if schedule.next_run_at is not None:     # else it is paused
                yield from check_schedule(bus, schedule, workers, me.now)
        yield from check_waiting(bus.limits().limits, bus.admin("summary").waiting, me.now)
        for key in bus.admin("keys"):
            if key.key_id != me.key_id and me.now < (key.expires_at or 0) < me.now + KEY_ENDS_SECONDS:
                yield note("keys", f"The key {key.name or key.key_id} ends at {moment(key.expires_at)}; keys invite makes a new one.")


def check_schedule(bus, schedule, workers, now):
    """Check whether a schedule has a worker, a time zone, and runs that do well."""
    of_bus = LOOPBACK.fullmatch(urllib.parse.urlsplit(bus.base_url).hostname)     # this machine's local time is the bus's
    who, last = f"The schedule {schedule.name}", None
    if not any(worker.get("namespace") == schedule.get("namespace") and schedule.goal in (worker.goals or [schedule.goal])
               for worker in workers):
        yield note("schedule", f"{who} publishes {schedule.goal}, and no worker is there for it; start one, or check the spelling.")
    with contextlib.suppress(NotFound):     # it is deleted
        last = schedule.last_id and bus.get_status(schedule.last_id)
    if last and last.status == "dead":
        yield bad("schedule", f"{who} has failed: {last.last_error} (show {last.id}).")
    try:
        due = next_run(schedule, max(schedule.last_run_at or 0, schedule.made_at))
    except ValueError as error:
        yield (bad if of_bus else note)("schedule", f"{who} has a time zone that this machine does not know, and is left out if the bus's "
                                                    f"does not, either: timezone {error}.")
        return
    if (of_bus or schedule.every or schedule.timezone) and due < now - DOCTOR_SECONDS:
        why = f"the run before is {last.status}: {last.id}" if last and last.status in ("open", "claimed") else "watch tells why, each time"
        yield bad("schedule", f"{who} has left out each run since {moment(due)}; {why}.")


def check_waiting(limits, waiting, now):
    """Check for intents that wait because no worker is there, or because their goal is paused, or for long at its limit."""
    for goal in waiting:
        if not goal.get("listening"):
            yield note("goal", f"{goal.goal} has an intent that waits since {moment(goal.run_at)}, and no worker is there for it; "
                               "start one, or check the spelling.")
    since = {(goal.namespace, goal.goal): goal.run_at for goal in waiting}
    for limit in limits:
        at = since.get((limit.namespace, limit.goal))
        if at is not None and limit.paused:
            yield note("limit", f"{limit.goal} is paused, and has an intent that waits since {moment(at)}; resume {limit.goal} lets it start.")
        elif at is not None and at < now - LIMIT_WAIT_SECONDS and limit.claimed >= (limit.running or sys.maxsize):
            yield note("limit", f"{limit.goal} is at its limit of {limit.running}, and has an intent that waits since {moment(at)}.")


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
    try:
        spool = Spool()
        pending, refused = spool.counts()
        bus = open_client(options)
        others = spool.others(bus.base_url, bus.key_name)
    except SetupError as error:
        yield bad("spool", str(error))
        return
    for other in others:
        key = f" and the key {other.key_name}" if other.key_name else ""
        yield bad("spool", f"Requests that wait for {other.bus}{key}, not for the URL and key in use: {other.number}; "
                           "flush --to-this-bus sends them here, flush --discard deletes them.")
        pending -= other.number
    if refused:
        yield bad("spool", f"A bus refused {refused} requests for good; flush shows them, flush --discard deletes them.")
    elif pending:
        yield note("spool", f"Requests that wait to be sent: {pending}; flush sends them.")
    elif not others:
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


CHECKS = (check_versions, check_bus, check_work, check_database, check_spool, check_termux)


# ---- 20. Commands ----
# The command line. Examples and flags stand on a command's function, its docstring is the help; messages go to stderr.

INTRODUCTION = """intentbus: publish a job on one machine, and a worker on another one does it.

  {0} serve                                 # the bus: HTTP in front of a SQLite file
  {0} work --goal hello -- echo "{{name}}"    # a worker, anywhere: runs a program for each job
  {0} publish hello name=world              # from cron, a shell, a script
"""
EPILOG = """COMMAND --help shows examples and flags, --version shows the version.
Data goes to stdout, messages go to stderr.

exit codes: 0 success; 1 the intent is dead, or a conflict; 2 wrong usage or
setup; 3 not found, or no result yet; 4 refused; 5 bus unreachable; 6 over a
limit, or an idempotency key reused for another intent; 124 timed out; 129, 130,
143 stopped by a signal"""
GROUPS = (
    ("run", ("serve", "publish", "work", "progress", "step", "flush")),
    ("inspect", ("status", "result", "output", "show", "list", "workers", "watch", "stats")),
    ("schedule", ("schedule", "schedules", "unschedule", "run")),
    ("limit", ("limit", "pause", "resume", "limits")),
    ("repair", ("cancel", "retry", "purge", "doctor", "backup")),
    ("keys and machines", ("keys add", "keys invite", "keys list", "keys revoke", "join", "install", "uninstall")),
    ("store values", ("set", "get", "del")),
)
EXIT_CODES = {400: 2, 401: 4, 403: 4, 404: 3, 409: 1, 413: 6, 422: 6, 429: 6}     # by the HTTP status of the error
INVOCATION = ("intentbus" if sys.argv and os.path.basename(sys.argv[0]) == "intentbus" else     # how a person starts it
              f"{os.path.basename(sys.executable or 'python')} {os.path.basename(__file__)}")
UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
DURATION = r"\d{1,9}(\.\d{1,9})?|(\d{1,9}(\.\d{1,9})?[smhdw])+"
UNPRINTABLE = r"[^\n\t\x20-\x7e\xa0-\U0010ffff]"     # characters that can control a terminal; compiled late, which takes 3 ms
STATE_COLORS = {"claimed": 33, "fulfilled": 32, "dead": 31, "failed": 31, "lost": 31, "skipped": 33, "paused": 33, "has ended": 31}     # ANSI
COMMANDS: dict[str, tuple[Any, ...]] = {}     # name: (function, examples, flags)


def escape(text, characters=CONTROL):
    r"""Replace the characters of a text that can control a terminal by escape sequences such as \x1b."""
    return re.sub(characters, lambda match: f"\\x{ord(match[0]):02x}", text)


def log(message):
    """Write a message to stderr, on one line; work goes on if that cannot be written."""
    with contextlib.suppress(OSError):
        sys.stderr.write(escape(f"intentbus: {message}".replace("\n", " | ")) + "\n")


class StderrRelay:
    """Passes what handlers write to stderr on to ours, as show() of a Program.

    One handler's is passed on as it is. Of several at a time, each line gets the digits in front by which ids differ, and
    control characters are escaped, since they would change the lines of others. A thread writes, so that a slow reader
    delays no handler; beyond STDERR_WAITING_BYTES, data is left out, and its length is said.
    """

    def __init__(self, several):
        self._several = several
        self._begun = {}     # id of an intent: its line that has not ended; of a single handler, the last byte of it
        self._waiting = bytearray()
        self._left_out = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)

    def __call__(self, intent, data):
        """Pass data of an intent's handler on; no data means the end."""
        begun = self._begun.pop(intent.id, b"")
        if self._several:
            *lines, begun = (begun + data).split(b"\n")
            if begun and (not data or len(begun) > STDERR_LINE_BYTES):
                lines.append(begun)
                begun = b""
            label = intent.id[:SHOWN_ID_DIGITS]
            self._add("".join(f"{label}: {escape(line.decode(errors='replace'), UNPRINTABLE)}\n" for line in lines).encode())
        else:
            self._add(data or begun and b"\n")
            begun = data[-1:].strip(b"\n")
        if begun:
            self._begun[intent.id] = begun
        if not data and not self._left_out:
            self.flush()

    def flush(self):
        """Wait until all is written, for PIPE_SECONDS at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, PIPE_SECONDS)

    def _add(self, text):
        def fits():
            return len(self._waiting) + len(text) <= STDERR_WAITING_BYTES
        with self._changed:
            if text and not self._thread.ident:
                self._thread.start()
            if fits() or not self._left_out and self._changed.wait_for(fits, WATCH_SECONDS):
                self._waiting += text
                self._changed.notify_all()
            else:     # the reader is stuck: handlers do not wait for it again
                self._left_out += len(text)

    def _pass_on(self):
        """Run in the thread: write the waiting data."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                data = bytes(self._waiting)
            try:
                written = os.write(sys.stderr.fileno(), data)
            except OSError:     # as in log()
                written = len(data)
            with self._changed:
                del self._waiting[:written]
                if self._left_out and not self._waiting:
                    self._waiting += f"\nintentbus: {self._left_out} bytes that handlers wrote to stderr were left out\n".encode()
                    self._left_out = 0
                self._changed.notify_all()


def print_result(value):
    """Write a value to stdout as it is, but on a terminal without control characters; raises SetupError."""
    print_line(escape(str(value), UNPRINTABLE) if sys.stdout.isatty() else str(value))


def print_line(line):
    """Write a line to stdout; raises SetupError."""
    try:
        sys.stdout.write(line + "\n")     # one write, so that the lines of threads do not mix
        sys.stdout.flush()
    except BrokenPipeError:     # its reader has had enough
        raise
    except OSError as error:
        raise SetupError(f"The output cannot be written: {error.strerror}.") from error


class Column(collections.namedtuple("Column", "header cell spec shown yields state", defaults=(None, "", None, 0, False))):
    """A column of a Table: cell(record) is its text or None, by default the field of that name.

    shown(record) is its text on a terminal, if that differs; spec pads and aligns it, as format() does. In a narrow terminal, the
    column that yields most is cut and left out first; one that yields 0 stays whole. A state is coloured.
    """

    def text(self, record, on_terminal):
        """Return the text of its cell, on one line, without control characters."""
        read = on_terminal and self.shown or self.cell
        value = read(record) if read else record.get(self.header)
        return "" if value in (None, "") else escape(str(value).replace("\n", " | "))


class Table:
    """Prints records in columns: on a terminal as a table that fits its width, otherwise the filled cells of each on a line.

    With --json, it prints JSON. Another print() continues the table.
    """

    def __init__(self, options, columns):
        self._json, self._columns, self._widths, self._headers = options.json, columns, collections.Counter(), []
        self._terminal = sys.stdout.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not (POSIX or "WT_SESSION" in os.environ)
        self._colored = options.color == "always" or options.color == "auto" and self._terminal and not plain

    def print(self, records, none=None):
        """Print some records. If there are none, tell so on a terminal, in these words."""
        if none and not records and self._terminal:
            log(none)
        if self._json:
            for record in records:
                print_result(to_json(record))
            return
        rows = [[column.text(record, self._terminal) for column in self._columns] for record in records]
        if self._terminal:
            self._print_fitted(rows)
        else:
            for row in rows:
                print_line("  ".join(self._painted(column, text, format(text, column.spec)) for column, text in zip(self._columns, row) if text))

    def _print_fitted(self, rows):
        import shutil
        encoding = sys.stdout.encoding or "ascii"     # a character that it lacks is printed as an escape sequence
        rows = [[text.encode(encoding, "backslashreplace").decode(encoding) for text in row] for row in rows]
        for column, texts in zip(self._columns, zip(*rows)):
            if any(texts):
                least = int(column.spec.strip(">") or 0)
                self._widths[column] = max(self._widths[column], least, len(column.header), *map(text_width, texts))
        widths = fitted([self._widths[column] for column in self._columns], [column.yields for column in self._columns],
                        shutil.get_terminal_size().columns)
        shown = [(column, width) for column, width in zip(self._columns, widths) if width]
        headers = [column.header for column, _ in shown]
        if headers != self._headers:
            self._headers = headers
            print_line("  ".join(padded(column.header, width, column.spec) for column, width in shown).rstrip())
        for row in rows:
            print_line("  ".join(self._painted(column, text, padded(text, width, column.spec))
                                 for column, width, text in zip(self._columns, widths, row) if width).rstrip())

    def _painted(self, column, text, cell):
        """Return a cell, with its text, in the colour of its state."""
        color = column.state and self._colored and STATE_COLORS.get(text)
        return f"\x1b[{color}m{cell}\x1b[0m" if color else cell


def fitted(widths, yields, room):
    """Return the widths of columns, two apart, fitted into a room: cut to COLUMN_WIDTH, then 0, in the order in which they yield."""
    order = sorted(filter(yields.__getitem__, range(len(widths))), key=lambda place: -yields[place])
    for last in [None, *order]:
        if last is not None:
            widths[last] = 0
        found = list(widths)
        over = sum(width + 2 for width in widths if width) - 2 - room
        for place in order:
            less = min(max(over, 0), max(found[place] - COLUMN_WIDTH, 0))
            found[place] -= less
            over -= less
        if over <= 0:
            break
    return found


def text_width(text):
    """Return how many columns of a terminal a text takes (Unicode Standard Annex #11)."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(letter) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(letter) in "WF")
               for letter in text)


def padded(text, width, spec):
    """Return a text with spaces up to a width, at its start if the spec aligns it to the right; a longer text is cut."""
    if text_width(text) > width:
        fits = itertools.takewhile(lambda used: used < width, itertools.accumulate(map(text_width, text)))
        text = text[:sum(1 for _ in fits)] + ("\u2026" if (sys.stdout.encoding or "").lower().startswith("utf") else "~")
    space = " " * (width - text_width(text))     # of a cut text, half of a wide character may be left
    return space + text if spec.startswith(">") else text + space


@contextlib.contextmanager
def showing(words):
    """While long work is done, show words(seconds so far) on a terminal, on a line that is erased at the end."""
    done, begun = threading.Event(), time.monotonic()

    def show():
        line = ""
        while not done.wait(SHOWING_SECONDS):
            line = f"intentbus: {words(time.monotonic() - begun)}".ljust(len(line))
            print(line, end="\r", file=sys.stderr, flush=True)
        print(" " * len(line), end="\r" if line else "", file=sys.stderr, flush=True)
    thread = threading.Thread(target=show, daemon=True)
    if sys.stderr.isatty():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident:
            thread.join()


def print_answer(options, answer, field):
    """Print a field of an answer; with --json, print the whole answer."""
    print_result(to_json(answer) if options.json else answer[field])


def duration(text):
    """Parse a duration such as 90, 90s, 5m, 1h30m, 7d or 1w; return its seconds."""
    if not re.fullmatch(DURATION, text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 90, 90s, 5m, 1h30m, 7d or 1w")
    seconds = sum(float(number) * UNIT_SECONDS[unit] for number, unit in re.findall(r"([\d.]+)([smhdw]?)", text))
    return int(seconds) if seconds.is_integer() else seconds     # older buses take no 60.0


def format_duration(seconds):
    """Format seconds in their largest unit, such as 5m."""
    unit = next((unit for unit in "dhm" if seconds >= UNIT_SECONDS[unit]), "s")
    return f"{max(0, seconds) // UNIT_SECONDS[unit]:.0f}{unit}"


def relative_time(at):
    """Format Unix seconds as the time since or until then, such as 5m ago or in 2h; None as None."""
    seconds = at and time.time() - at
    return at and (f"in {format_duration(-seconds)}" if seconds < 0 else f"{format_duration(seconds)} ago")


def local_time(text):
    """Parse a local time such as 07:00, the next one, or 2026-12-24T18:00; return Unix seconds."""
    import datetime     # 2 ms, which other commands need not pay
    now = datetime.datetime.now()
    dates = [""] if "-" in text else [f"{now.date() + datetime.timedelta(days)} " for days in (0, 1)]
    try:
        times = [datetime.datetime.fromisoformat(date + text).timestamp() for date in dates]
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a local time such as 07:00 or 2026-12-24T18:00") from error
    if times[-1] <= now.timestamp():
        raise argparse.ArgumentTypeError(f"{text} is in the past")
    return next(moment for moment in times if moment > now.timestamp())


def percentage(text):
    """Parse a number from 0 to 100."""
    if not re.fullmatch(r"\d{1,3}(\.\d{1,9})?", text, re.ASCII) or float(text) > 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 100")
    return float(text)


def positive_int(text):
    """Parse a whole number from 1 up."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def running_number(text):
    """Parse the number of a limit, from 1 up; none as None."""
    if text == "0":
        raise argparse.ArgumentTypeError("0 is no limit; to let none start, use pause")
    return None if text == "none" else positive_int(text)


def takes_value(settings):
    """Return whether a flag with these settings of add_argument takes a value."""
    return settings.get("action", "append") == "append"


def flag(*names, **settings):
    """Return an argument of a command, as (names, settings) of add_argument; a default is added to the help."""
    if settings.get("type") is duration:
        settings.setdefault("metavar", "DURATION")
    elif "dest" in settings and takes_value(settings):     # argparse would show the name of the field
        settings.setdefault("metavar", names[0].lstrip("-").upper())
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
    flag("--namespace", help="the namespace on the bus (INTENT_BUS_NAMESPACE; default default, or all for list, cancel, retry and "
                             "purge)"),
    CA,
    flag("--send-key", action="store_true", help="send the key itself over plain http too, as an Intent Bus 7 needs it; who "
                                                 "listens on the way, or has the port, can read and use it"),
)
DB = flag("--db", help="the database file (BUS_DB_PATH; default intentbus.db)")
ID = flag("id", help=f"the id that publish printed, or its first {SHORT_ID_DIGITS} or more digits")
JSON = flag("--json", action="store_true", help="print JSON")
TABLE = (JSON, flag("--color", choices=("auto", "always", "never"), default="auto",
                    help="colour states: auto is on a terminal, unless NO_COLOR is set"))
YES = flag("--yes", action="store_true", help="do not ask")
STORED_KEY = flag("key", help="the key of the value")
GOAL_FLAG = flag("goal", help="the goal of the intents")
NAME_FLAG = flag("name", help="the name of the schedule")
STORED_OTHERWISE = {     # by the status of a publish
    "kept": "an unfinished intent has this unique value, and was kept; nothing new is stored",
    "replaced": "an intent with this unique value was waiting, and was replaced",
}
SHOWN_FIELDS = ("id", "goal", "namespace", "status", "progress", "schedule", "caused_by", "on_success", "on_failure", "owner", "publisher",
                "visibility", "priority", "max_attempts", "target_worker", "required_capability")
NEW_KEY = (
    flag("name", help="a name for the key, such as that of its machine"),
    flag("--owner", default="owner", help="the owner whose intents it shares"),
    flag("--role", choices=("publish", "work", "both", "viewer"), default="both", help="what the key may do; a viewer looks only"),
    flag("--goal", dest="goals", action="append", help="the only goal that the key may use; may be repeated"),
    flag("--expires", dest="expires_at", metavar="DURATION", type=lambda text: time.time() + duration(text),
         help="how long the key is valid"),
    flag("--payloads", action="store_const", const=True, help="let a viewer see payloads and results"),
)
PAYLOAD = flag("payload", nargs="*", default=[], help="JSON, text, @FILE, - or nothing for stdin, or pairs: name=text, name=@FILE, name:=json")
OF_OWNER_FLAG = flag("--owner", help="the owner of the schedule, if you are an admin (default the key's)")
INTENT_FLAGS = (
    flag("--priority", type=int, help="0 to 1000; higher is claimed first (default 100)"),
    flag("--ttl", type=duration, help="how long it may stay unfinished once it can be claimed (default 7d)"),
    flag("--max-attempts", type=int, help="attempts before it is dead, 1 to 20 (default 3)"),
    flag("--backoff", dest="backoff_base", type=duration, help="half the first pause; pauses double (default 5s)"),
    flag("--worker", dest="target_worker", help="the id of the only worker that may claim it"),
    flag("--capability", dest="required_capability", help="a capability that its worker must have"),
    flag("--public", dest="visibility", action="store_const", const="public", help="let workers of any owner claim it"),
    flag("--on-success", metavar="GOAL", help="when it is fulfilled, publish an intent of this goal with its result"),
    flag("--on-failure", metavar="GOAL", help="when it is dead, but not cancelled, publish an intent of this goal with its error"),
)
WAIT = flag("--wait", type=lambda text: duration(text) if text else PUBLISH_WAIT_SECONDS, metavar="[=DURATION]",
            help="wait until it has ended (5m if no DURATION is given) and print its result; exit 1 if it is dead")
FOLLOW = flag("-f", "--follow", action="store_true", help="print what its handler writes to stderr as it comes, until it has ended, "
                                                          "then the result; exit 1 if it is dead")

NO_WORKERS = "no workers are there; start one: {}"


def example_of(name):
    """Return the first example of a command, as a person types it."""
    return f"{INVOCATION} {COMMANDS[name][1][0]}"


def due_or_age(intent):
    """Return when an open intent is due, or for how long another has been there."""
    is_due_later = intent.status == "open" and (intent.get("run_at") or 0) > time.time()
    return f"due {relative_time(intent.run_at)}" if is_due_later else relative_time(intent.created_at)


def end_of_key(key):
    """Return when a key ends, such as "ends in 5d"; None for never."""
    return key.expires_at and ("has ended" if key.expires_at <= time.time() else f"ends {relative_time(key.expires_at)}")


INTENT_TABLE = (
    Column("id", lambda intent: intent.id[:SHOWN_ID_DIGITS]),
    Column("status", spec="9", state=True),
    Column("tries", lambda intent: f"{intent.claim_attempts}/{intent.max_attempts}", yields=5),
    Column("age", lambda intent: format_duration(time.time() - intent.created_at), ">4", due_or_age, yields=4),
    Column("goal", yields=2),
    Column("worker", yields=6),
    Column("error", lambda intent: intent.last_error, yields=3),
    Column("payload", lambda intent: to_json(intent.payload) if "payload" in intent else None, yields=1),
)
WORKER_TABLE = (
    Column("seen", lambda worker: format_duration(time.time() - worker.last_seen), ">4", lambda worker: relative_time(worker.last_seen)),
    Column("owner", yields=5),
    Column("worker", lambda worker: worker.name, yields=1),
    Column("id", lambda worker: None if worker.id == worker.name else worker.id, yields=4),
    Column("version", lambda worker: worker.version or "-", yields=6),
    Column("goals", lambda worker: ", ".join(worker.goals) or "any goal", yields=2),
    Column("runs", lambda worker: ", ".join(intent_id[:SHOWN_ID_DIGITS] for intent_id in worker.running), yields=3),
)
EVENT_TABLE = (
    Column("time", lambda entry: time.strftime("%H:%M:%S", time.localtime(entry.time))),
    Column("event", spec="9", state=True),
    Column("id", lambda entry: (entry.id or "")[:SHOWN_ID_DIGITS], yields=2),
    Column("goal", yields=1),
    Column("worker", lambda entry: entry.worker or entry.worker_id, yields=4),
    Column("error", lambda entry: entry.last_error if entry.event in ("failed", "dead", "lost", "skipped") else
           entry.status if entry.event == "limited" else entry.get("detail"), yields=3),
)
LIMIT_TABLE = (
    Column("namespace", yields=2),
    Column("goal", yields=1),
    Column("running", lambda limit: f"{limit.claimed} of {limit.running or 'any number'}"),
    Column("paused", lambda limit: "paused" if limit.paused else None, state=True),
)
SCHEDULE_TABLE = (
    Column("name", yields=2),
    Column("goal", yields=3),
    Column("times", lambda schedule: schedule.cron or f"every {format_duration(schedule.every or 0)}", yields=4),
    Column("zone", lambda schedule: schedule.timezone, yields=6),
    Column("next", lambda schedule: f"next {moment(schedule.next_run_at) or 'paused'}", "",
           lambda schedule: relative_time(schedule.next_run_at) or "paused", state=True),
    Column("last", lambda schedule: f"last {moment(schedule.last_run_at) or 'never'}", "",
           lambda schedule: relative_time(schedule.last_run_at) or "never", yields=1),
    Column("last id", lambda schedule: schedule.last_id, "", lambda schedule: (schedule.last_id or "")[:SHOWN_ID_DIGITS], yields=5),
)
KEY_TABLE = (
    Column("id", lambda key: key.key_id),
    Column("role", spec="7", yields=3),
    Column("owner", yields=5),
    Column("requests", lambda key: key.total_requests, ">", yields=7),
    Column("used", lambda key: format_duration(time.time() - key.last_used_at) if key.last_used_at else "never", "",
           lambda key: relative_time(key.last_used_at) or "never", yields=6),
    Column("name", yields=1),
    Column("goals", lambda key: key.goals and f"for {', '.join(key.goals)}", "", lambda key: key.goals and ", ".join(key.goals), yields=4),
    Column("ends", end_of_key, yields=2, state=True),
)
GOAL_TABLE = (     # of a summary
    Column("namespace", yields=5),
    Column("goal", yields=1),
    Column("waiting", spec=">"),
    Column("running", spec=">"),
    Column("limit", lambda goal: "paused" if goal.get("paused") else goal.get("limit"), ">", state=True),
    Column("done 1h/1d", lambda goal: "/".join(map(str, goal.get("fulfilled", ()))), ">", yields=3),
    Column("failed 1h/1d", lambda goal: "/".join(map(str, goal.get("failed", ()))), ">", yields=2),
    Column("oldest due", lambda goal: relative_time(goal.run_at), ">", yields=4),
)


def bus_command(name, examples, *flags):
    """Register a command that talks to a bus: its function gets a client first, and it has the CONNECTION flags too."""
    def register(function):
        @functools.wraps(function)
        def with_client(options):
            bus = open_client(options)
            if re.fullmatch(SHORT_ID, getattr(options, "id", None) or ""):
                with contextlib.suppress(NotFound):     # the request of the command raises it, unless an admin may see the intent
                    intent = bus.get_status(options.id)
                    log(f"{options.id} is {intent.id}, {intent.goal}")
                    options.id = intent.id
            return function(bus, options)
        return command(name, examples, *CONNECTION, *flags)(with_client)
    return register


@command("serve", ["serve", "serve --db ~/bus.db --port 9000 --log",
                   "serve --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem"],
         flag("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0 or :: for all addresses"),
         flag("--port", type=int, default=8787, help="the port; 0 picks a free one"),
         DB,
         flag("--key-file", default=KEY_FILE, help="the file with the owner key; BUS_SECRET is used instead if it is set"),
         flag("--max-body", type=positive_int, default=BODY_BYTES, metavar="BYTES", help="the longest request body"),
         flag("--retention", type=duration, default=RETENTION_SECONDS, help="how long to keep intents that have ended"),
         flag("--rate-limit", type=positive_int, default=RATE_PER_MINUTE, help="requests a minute for each issued key"),
         flag("--max-unfinished", type=positive_int, default=UNFINISHED, help="unfinished intents for each issued key"),
         flag("--max-stored", type=positive_int, default=STORED_BYTES, metavar="BYTES",
              help="bytes of intents, ended ones included, of results and of values for each issued key"),
         flag("--require-claim-token", action="store_true", help="refuse reports without one, as 1.x workers send"),
         flag("--require-signatures", action="store_true", help="refuse unsigned requests (BUS_REQUIRE_SIGNATURES)"),
         flag("--tls-cert", metavar="FILE", help="serve https with this certificate (PEM)"),
         flag("--tls-key", metavar="FILE", help="the file with its key (default the same file)"),
         flag("--trust-proxy", action="store_true", help="trust X-Forwarded-For and X-Forwarded-Proto (BUS_TRUST_PROXY)"),
         flag("--announce-dead", action="store_true", help=f"publish an intent with the goal {DEATHS} for each that dies"),
         flag("--log", action="store_true", help="log each request to stderr, as a line of JSON"))
def serve_command(options):
    """Run the bus: HTTP in front of a SQLite file. Prints its URL once it listens; Ctrl-C or SIGTERM shuts it down.

    The first start creates the owner key. Put a TLS proxy or a tunnel in front before other machines use the bus. With
    --tls-cert, a changed certificate is loaded within a minute, or at once on SIGHUP; without it, SIGHUP ends the bus.
    """
    if options.tls_key and not options.tls_cert:
        raise Invalid("--tls-key needs --tls-cert.")
    secret_in("BUS_SECRET") or read_key(options.key_file)     # raises before anything is made
    other = other_database(options)
    with contextlib.ExitStack() as undo:
        server = bound_server(options.host, options.port, options.tls_cert and (options.tls_cert, options.tls_key or options.tls_cert))
        undo.callback(server.server_close)
        store = options.open_store(options.db)     # later, so that a taken port leaves no new database
        undo.callback(store.close)
        key, key_source = find_owner_key(options.key_file)     # a new key, too, is made only for a bus that starts
        server.open(api_of(store, key, options.require_claim_token, options.retention, options.rate_limit,
                           Limits(options.max_unfinished, options.max_stored), options.max_body, options.require_signatures,
                           options.announce_dead), options.log, options.trust_proxy or switched_on("BUS_TRUST_PROXY"))
        undo.pop_all()
    deadline = threading.Timer(EXIT_SECONDS, os._exit, [0])     # for a database that no longer answers
    deadline.daemon = True

    def stop(*_):
        if not server.stopping:
            deadline.start()
        server.stop()
    for signal_number in filter(None, (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGBREAK", None))):     # Windows has BREAK
        signal.signal(signal_number, stop)
    if options.tls_cert and HANGUP:     # without a certificate, it ends the bus
        signal.signal(HANGUP, lambda *_: server.renew_certificate())
    signal.set_wakeup_fd(server.wakeup.fileno(), warn_on_full_buffer=False)     # on Windows, a signal ends no wait
    scheme, host = "https" if options.tls_cert else "http", f"[{options.host}]" if ":" in options.host else options.host
    print(f"{scheme}://{host}:{server.server_port}", flush=True)
    reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    log_startup(options, f"{scheme}://{reachable}:{server.server_port}", store.database, key_source, other)
    server.serve_forever()
    server.close()
    store.close()


def other_database(options):
    """Return the database that an earlier serve made elsewhere by default, if this one will make a new one here; or None."""
    if not (options.db or os.environ.get("BUS_DB_PATH") or os.path.exists("intentbus.db")):
        places = (os.path.join(folder, "intentbus.db") for folder in (os.path.dirname(os.path.realpath(__file__)), os.path.expanduser("~")))
        return next(filter(os.path.isfile, places), None)


def log_startup(options, url, database, key_source, other):
    """Log the state of a bus that has just started, and the next commands to try."""
    import shlex
    log(f"{__version__}, database {database.path}, the key is {key_source}")
    if not database.new and key_source.startswith("new"):
        log("warning: the owner key is new, so the keys that were issued before it are not valid; if that is a mistake, put the old one back")
    if other:
        log(f"warning: this database is new and empty; to go on with the one of an earlier start, use --db {shlex.quote(other)}")
    if database.warning:
        log(database.warning)
    if not options.tls_cert and options.host not in ("127.0.0.1", "::1", "localhost"):
        log("other machines can reach this bus over plain HTTP; put a TLS proxy or a tunnel in front of it")
    who = "with DASHBOARD_PASSWORD" if os.environ.get("DASHBOARD_PASSWORD") else \
        "with a viewer's key" if os.environ.get("BUS_ADMIN_SECRET") else "with the owner key"
    log(f"the dashboard is at {url}/admin/dashboard; sign in {who}")
    log("next, in two other terminals:")
    where = "" if url == URL and not os.path.exists(os.path.expanduser(CONFIG_FILE)) else f" --url {url}"
    if options.key_file != KEY_FILE and not os.environ.get("BUS_SECRET"):
        where += f" --key-file {shlex.quote(options.key_file)}"
    print(f"  {INVOCATION} work{where} --goal hello\n  {INVOCATION} publish{where} hello name=world", file=sys.stderr)


@command("publish", ['publish send_notification title=nas message="the backup is done"',
                     'publish say "good morning" --at 07:00',
                     """publish resize '{"file": "a.jpg"}' --wait""",
                     "publish backup host=nas full:=true --delay 1h --spool --on-failure send_notification",
                     "publish resize --lines < files.txt", "publish update host=nas --follow"],
         *CONNECTION,
         flag("goal", help="the name of the work, which workers ask for"),
         PAYLOAD,
         flag("--text", action="store_true", help="the payload is text, even if it could be JSON, a pair or @FILE"),
         WAIT, FOLLOW, JSON,
         *INTENT_FLAGS,
         flag("--delay", type=duration, help="the time until it can be claimed"),
         flag("--at", dest="run_at", metavar="TIME", type=local_time, help="when it can be claimed, in local time: 07:00, the next "
                                                                           "one, or 2026-12-24T18:00"),
         flag("--unique", metavar="VALUE", help="while an intent of this goal and VALUE is unfinished, store nothing and print its id"),
         flag("--replace", action="store_const", const=True, help="with --unique: take the place of one that waits"),
         flag("--idempotency-key", help="within a day, publishing again with this key stores nothing new"),
         flag("--spool", action="store_const", const=SPOOL_FILE, help="if the bus cannot take it now, store it for later"),
         flag("--lines", action="store_true", help="publish an intent for each line of stdin, with its text as payload"),
         flag("--jsonl", action="store_true", help="publish an intent for each line of stdin, with its JSON as payload"))
def publish_command(options):
    """Publish an intent and print its id. With --lines or --jsonl, up to 1,000 intents are sent in one request."""
    fields = given(options, PUBLISH)
    if options.follow:
        fields["stream"] = True
        options.wait = FOREVER if options.wait is None else options.wait
    waits = options.wait is not None
    if options.spool and waits:
        raise Invalid("--spool excludes --wait and --follow: a stored intent may be sent much later.")
    bus = open_client(options, spool=options.spool)
    if options.lines or options.jsonl:
        return publish_lines(bus, options, fields)
    answer = bus.publish(**dict(fields, payload=read_payload(options.payload, options.text)))
    if answer.get("status") == "spooled":
        log(f"{answer.reason} The intent is stored; the next publish --spool, flush or work sends it.")
    elif answer.get("status") in STORED_OTHERWISE:
        log(f"{STORED_OTHERWISE[answer.status]}: {answer.id}")
    elif answer.get("never_claimed"):
        log(f"no worker has ever claimed {options.goal!r}; check the spelling (workers lists who is there)")
    elif (options.target_worker or options.required_capability) and answer.get("listening") == 0:
        log("no worker that may claim it is there now; check its --worker and --capability (workers lists who is there)")
    elif answer.get("listening") == 0 and not (options.delay or options.run_at) and (waits or sys.stderr.isatty()):
        log(f"no worker for {options.goal!r} is there now; the intent waits for one")
    if options.run_at and sys.stderr.isatty():
        log(f"the intent can be claimed from {moment(options.run_at)} on")
    if waits:
        try:
            if options.follow:
                follow_output(bus, answer.id, time.monotonic() + options.wait, sys.stderr)
            return wait_for_result(bus, answer.id, options)
        except (KeyboardInterrupt, *TRANSIENT):
            log(f"{answer.id} goes on; ask for it with: {INVOCATION} result {answer.id}")
            raise
    if options.json or answer.id:
        print_answer(options, answer, "id")


def publish_lines(bus, options, fields):
    """Publish an intent for each line of stdin and print the ids."""
    if options.payload or options.wait is not None or options.text:
        raise Invalid("--lines and --jsonl read payloads from stdin only, and exclude --wait, --follow and --text.")
    key = fields.pop("idempotency_key", None)
    parse = parse_json if options.jsonl else plain_text
    intents = (dict(fields, payload=parse(line)) for line in binary_stdin() if line.strip())
    published = 0
    seconds = float("inf") if key else STREAM_SECONDS     # with a key, the same lines must make the same batches again
    with showing(lambda _: f"{published} published"):
        for number, batch in enumerate(batches(intents, seconds)):
            answer = bus.publish_many(batch, idempotency_key=key and f"{key} {number}")
            if answer.get("status") == "spooled":
                log(f"{answer.reason} {len(batch)} intents are stored; the next publish --spool, flush or work sends them.")
                continue
            print_result("\n".join(to_json({"id": intent_id}) if options.json else intent_id for intent_id in answer.ids))
            for status in STORED_OTHERWISE.keys() & set(answer.statuses):
                log(f"{answer.statuses.count(status)} times, {STORED_OTHERWISE[status]}")
            published += len(answer.ids)


def as_they_come(items):
    """Yield the items of an iterable, which a thread reads, and None whenever STREAM_SECONDS have passed without one."""
    ended = object()
    found = queue.Queue(READ_AHEAD_LINES)
    def read():
        try:
            for item in items:
                found.put(item)
            found.put(ended)
        except Exception as error:
            found.put(error)
    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            item = found.get(timeout=STREAM_SECONDS)     # Windows cannot wait for a pipe, nor end a longer wait by Ctrl-C
        except queue.Empty:
            item = None
        if item is ended:
            return
        if isinstance(item, Exception):
            raise item
        yield item


def batches(intents, seconds):
    """Yield lists of intents, each of at most BULK_INTENTS, no larger than a request may be, and collected for some seconds."""
    batch = []
    for intent in as_they_come(intents):
        weight = len(to_json(intent).encode()) + 100     # room for the namespace, which the client adds
        if batch and (time.monotonic() >= begun + seconds or len(batch) == BULK_INTENTS or size + weight > BODY_BYTES):
            yield batch
            batch = []
        if intent is not None:
            if not batch:
                begun = time.monotonic()
                size = 0
            batch.append(intent)
            size += weight
    if batch:
        yield batch


def given(options, fields):
    """Return the values that a command line gives to these fields, but for the namespace, which the client adds."""
    return {name: value for name, value in vars(options).items() if name in fields and name != "namespace" and value is not None}


def binary_stdin():
    """Return stdin as a file of bytes, which a thread may read until the program ends; raises Invalid if it is closed."""
    if sys.stdin is None:
        raise Invalid("There is no input, since stdin is closed: redirect it, or give the payload as JSON, text, pairs or @FILE.")
    return open(sys.stdin.fileno(), "rb", closefd=False)     # Python's own is locked by its reader at the exit


def parse_json(source):
    """Return the value of JSON that a person wrote, as text or bytes; raises Invalid."""
    if isinstance(source, bytes):
        source = without_mark(source)
    try:
        return from_json(source if isinstance(source, bytes) else source.encode())
    except (Invalid, UnicodeError) as error:
        shown = source[:60] if isinstance(source, str) else source[:60].decode(errors="replace")
        raise Invalid(f"{error} The input was {shown!r}; plain text needs quotes: '\"text\"'.") from error


def read_payload(words, is_text=False):
    """Return the payload for words of a command line: pairs, JSON, text, @FILE, or - or nothing for stdin.

    With is_text, the word or stdin is text. No payload at all is {}.
    """
    read = plain_text if is_text else json_or_text
    pairs = [re.fullmatch(r"([\w.-]+)(:?=)(.*)", word, re.ASCII | re.DOTALL) for word in words]
    if words and all(pairs) and not is_text:
        payload = {}
        for name, equals, value in map(re.Match.groups, pairs):
            if name in payload:
                raise Invalid(f"The payload has {name} twice.")
            value = read_file(value[1:]) if value.startswith("@") else value
            payload[name] = parse_json(value) if equals == ":=" else plain_text(value)
        return payload
    if len(words) > 1:
        raise Invalid("The payload is one JSON value, one text (quote them for the shell), or name=text pairs.")
    if words and (is_text or not re.match("-$|@", words[0])):
        return read(words[0])
    if words and words[0] != "-":
        return read(read_file(words[0][1:]))
    if not words and (sys.stdin is None or sys.stdin.isatty()):
        return {}
    content = binary_stdin().read()
    return read(content) if content or is_text else {}


def json_or_text(content):
    """Return the value of JSON that a person gave, or else the text that it is; raises Invalid."""
    data = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    try:
        return from_json(data)
    except NotJson as error:
        if data.lstrip()[:1] in (b"{", b"["):
            log(f"{error} It is published as text.")
        return plain_text(content)


def plain_text(content):
    """Return text that a person gave, as it is; that of a file or stdin, in bytes, without the line end at its end."""
    return content if isinstance(content, str) else decoded_text(content).rstrip("\r\n")


def read_file(path):
    """Return the bytes of a file with a payload; raises SetupError."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SetupError(f"The payload file {path} cannot be read: {error.strerror}. For a text that begins with @, use --text or "
                         f"name:='\"@text\"'.") from error


def wait_for_result(bus, intent_id, options):
    """Print the result of an intent as soon as it has ended; return the exit code."""
    deadline = time.monotonic() + options.wait
    while True:
        until = min(deadline, time.monotonic() + CLAIM_WAIT_SECONDS)
        intent = bus.get_result(intent_id, wait=max(0, until - time.monotonic()))
        if intent.status in ("fulfilled", "dead"):
            return print_outcome(options, intent)
        if time.monotonic() >= deadline:
            log(f"{intent_id} is still {intent.status}; ask for it with: {INVOCATION} result {intent_id}")
            return 124
        time.sleep(max(0, min(1, until - time.monotonic())))     # this bus may not hold requests


def follow_output(bus, intent_id, deadline, file):
    """Write what the handler of an intent writes to a file as it comes, and log its progress, until it has ended or a time.monotonic()."""
    after, told, end = 0, "", "\n"
    try:
        for page in pages(lambda: bus.output(intent_id, after, wait=max(0, min(CLAIM_WAIT_SECONDS, deadline - time.monotonic())))):
            ended = page.ended or time.monotonic() >= deadline
            progress = described_progress(page)
            words = [f"{page.missed} bytes are missing here"] if page.missed else []
            words += [progress] if progress not in ("", told) else []
            end = write_output(file, page.output)[-1:] or end
            if (words or ended) and end != "\n":
                end = write_output(file, "\n")
            for sentence in words:
                log(sentence)
            after, told = page.next, progress
            if ended:
                break
    except OlderBus as error:
        log(error)


def write_output(file, text):
    """Write the output of a handler to stdout or stderr, as it is, but on a terminal without control characters; return it."""
    file.write(escape(text, UNPRINTABLE) if file.isatty() else text)
    file.flush()
    return text


def described_progress(told):
    """Return the words for how far an intent is: percent, message or both."""
    return " ".join(filter(None, ("" if told.percent is None else f"{told.percent:g} %", told.message)))


def pages(ask):
    """Yield the answers of a bus to ask(), which may be held, again and again; while the bus is away, say so and try again."""
    away = False
    while True:
        asked = time.monotonic()
        try:
            page = ask()
        except TRANSIENT as error:
            away = True
            log(f"{error} Trying again.")
            time.sleep(POLL_SECONDS)
            continue
        if away:
            away = False
            log("The bus is back again.")
        yield page
        if not (page.get("events") or page.get("output")) and time.monotonic() - asked < RECHECK_SECONDS:
            time.sleep(RECHECK_SECONDS)     # this bus does not hold requests


def print_outcome(options, intent):
    """Print the result of an intent, or log why it is dead; return the exit code."""
    if options.json:
        print_result(to_json(intent))
    elif intent.status == "fulfilled" and intent.result is not None:
        print_result(as_text(intent.result))
    if intent.status == "dead":
        log(f"{intent.id} is dead: {intent.last_error or intent.get('error')}")
    return {"fulfilled": 0, "dead": 1}.get(intent.status, 3)


@command("flush", ["flush", "flush --to-this-bus"], *CONNECTION,
         flag("--to-this-bus", action="store_true", help="send also the requests for another URL or key, to this bus with this key"),
         flag("--discard", action="store_true", help="delete the requests refused for good, and those for another URL or key"))
def flush_command(options):
    """Send the spooled requests and print how many the bus accepted; exit 1 if it refused some for good.

    Requests for another URL or key wait for a program that uses these; they are named.
    """
    bus = open_client(options, spool=SPOOL_FILE)
    if options.to_this_bus:
        bus.spool.redirect(bus.base_url, bus.key_name)
    for other in bus.spool.others(bus.base_url, bus.key_name):
        key = f" with the key {other.key_name}" if other.key_name else ""
        log(f"{other.number} requests wait for {other.bus}{key}; flush there, or with --to-this-bus or --discard")
    print_result(bus.flush())
    refused = bus.spool.refused(bus.base_url)
    for request in refused:
        log(f"refused for good: {request.refusal} {request.body}")
    if options.discard:
        bus.spool.discard(bus.base_url, bus.key_name)
    return 1 if refused and not options.discard else 0


def usable_spool():
    """Return the path of the spool; if it cannot be used, log why, and return None."""
    try:
        Spool()
        return SPOOL_FILE
    except SetupError as error:
        log(f"{error} An outcome that cannot be reported will be lost.")
        return None


@command("work", ["work --goal send_notification -- ./examples/handler.sh",
                  "work --goal resize -j 4 -- convert {file} -resize 50% {out}",
                  "work --goal backup --drain --timeout 1h -- ./backup.sh"],
         *CONNECTION,
         flag("--goal", action="append", help="a goal to work on; may be repeated"),
         flag("--any", action="store_true", help="work on any goal (default if there is a program and no --goal)"),
         flag("-j", "--jobs", type=positive_int, default=1, metavar="N", help="how many handlers run at the same time"),
         flag("--once", dest="max_jobs", action="store_const", const=1, help="stop after one intent"),
         flag("--max-jobs", type=positive_int, metavar="N", help="stop after N intents"),
         flag("--drain", action="store_true", help="stop when there is nothing to claim"),
         flag("--max-time", type=duration, help="claim nothing more after that time"),
         flag("--timeout", type=duration, default=HANDLER_SECONDS, help="how long a handler may run"),
         flag("--kill-after", type=duration, default=KILL_AFTER_SECONDS, help="the time from TERM to KILL, to end a handler"),
         flag("--lease", type=duration, default=LEASE_SECONDS, help="how long a silent worker keeps an intent, 10s to 1h"),
         flag("--poll", type=duration, default=POLL_SECONDS, help="the pause between claims if the bus does not hold them"),
         flag("--result", choices=("auto", "json", "text", "none"), default="auto",
              help="what stdout is: auto is JSON if it parses, else text; 1.10 stays text"),
         flag("--max-output", type=positive_int, default=OUTPUT_BYTES, metavar="BYTES", help="how much of stdout to keep"),
         flag("--stream", action="store_true", help="tell the bus what handlers write to stderr, of every intent, for output -f; it is "
                                                    "done anyway for those that were published with --follow"),
         flag("--worker-id", help="the id of this worker, for publish --worker"),
         flag("--no-wake-lock", action="store_true", help="in Termux, let the phone sleep"),
         flag("--capability", dest="capabilities", action="append", default=[], help="a capability it has; may be repeated"),
         flag("program", nargs="*", help="the handler and its arguments, after --"))
def work_command(options):
    """Claim intents and run a program for each: stdin is its payload, stdout becomes its result.

    {name} in an argument becomes that field of the payload; {id}, {goal} and {payload} are filled in too. Exit code 0
    fulfils the intent, 75 releases it, 100 rejects it for good, 126 and 127 stop the worker, any other fails it for a retry.
    A line "::progress 40 copying" on stderr tells how far it is. Without a program, work prints each payload.
    """
    if not (options.goal or options.any or options.program) or options.goal and options.any:
        raise Invalid("work needs --goal GOAL, or --any for any goal, and the program to run after --; without a program, it prints each "
                      "payload and fulfils the intent.")
    guardian = Guardian(options.kill_after)
    relay = StderrRelay(options.jobs > 1)
    handler, variables = print_payload, dict(PYTHON=sys.executable, BUS_PROGRAM=os.path.abspath(__file__))
    if options.program:
        handler = Program(options.program, options.timeout, options.kill_after, options.max_output, options.result, guardian.tell,
                          relay, log, options.stream, variables)
    if options.jobs > JOBS:
        raise Invalid(f"-j must be at most {JOBS}.")
    if not LEASE_RANGE_SECONDS[0] <= options.lease <= LEASE_RANGE_SECONDS[1]:
        raise Invalid("--lease must be from 10s to 1h.")
    may_sleep = options.max_jobs or options.drain or options.max_time or options.no_wake_lock
    if not may_sleep and in_termux() and run_quietly("termux-wake-lock", timeout=TERMUX_SECONDS):
        log("the phone stays awake until you run termux-wake-unlock (or start with --no-wake-lock)")
    bus = open_client(options, spool=usable_spool())
    variables.update(BUS_URL=bus.base_url, BUS_CA=bus.ca or "")
    worker = Worker(bus, options.goal, handler,
                    on_message=lambda sentence: log(f"{time.strftime('%H:%M:%S')} {sentence}"),
                    concurrency=options.jobs, lease=options.lease, max_jobs=options.max_jobs, max_time=options.max_time,
                    drain=options.drain, poll=options.poll, worker_id=options.worker_id, capabilities=options.capabilities,
                    worker_name=process_name(*options.program[:1]))
    for signal_number in filter(None, (signal.SIGINT, signal.SIGTERM, HANGUP)):
        if signal.getsignal(signal_number) != signal.SIG_IGN:     # under nohup, HUP stays ignored
            signal.signal(signal_number, worker.interrupt)
    if sys.stderr.isatty():
        log(f"{' and '.join(options.goal or ['any goal'])}: waiting for intents at {bus.base_url}; Ctrl-C stops")
    with guardian if options.program else contextlib.nullcontext():
        worker.run()
    relay.flush()
    return 128 + worker.signals[0] if worker.signals else 0


def print_payload(intent, lease):
    """Print the payload of an intent as a line of JSON: the handler of work without a program."""
    print_result(to_json(intent.payload))
    return None, "json"


@bus_command("status", ["status 01a20a3bf4423c55cce77efa455c0ada"], ID, JSON)
def status_command(bus, options):
    """Print the status of an intent: open, claimed, fulfilled or dead; and, as a message, who has or had it."""
    intent = bus.get_status(options.id)
    print_answer(options, intent, "status")
    if options.json:
        return
    if intent.worker:
        at = time.strftime(" at %Y-%m-%d %H:%M:%S", time.localtime(intent.claimed_at)) if intent.claimed_at else ""
        log(f"{'' if intent.status == 'claimed' else 'last '}claimed by {intent.worker}{at}")
    if reason := intent.last_error or intent.get("error"):
        log(reason)


@bus_command("result", ["result 01a20a3bf4423c55cce77efa455c0ada --wait=10m"], ID, WAIT, JSON)
def result_command(bus, options):
    """Print the result of an intent; exit 1 if it is dead, 3 if it has not ended, with --wait 124."""
    if options.wait is not None:
        return wait_for_result(bus, options.id, options)
    intent = bus.get_result(options.id)
    if intent.status in ("open", "claimed"):
        log(f"{options.id} is still {intent.status}")
    return print_outcome(options, intent)


@bus_command("output", ["output 01a20a3bf4423c55cce77efa455c0ada -f"], ID,
             flag("-f", "--follow", action="store_true", help="go on until it has ended; exit 1 if it is dead"), JSON)
def output_command(bus, options):
    """Print the stderr of an intent's handler: of its latest attempt, the last 64 KiB, if the bus was told.

    The bus is told of intents published with --follow and by workers with --stream, and keeps it in memory for an hour.
    """
    if options.follow and options.json:
        raise Invalid("output takes either --follow or --json.")
    if options.follow:
        follow_output(bus, options.id, FOREVER, sys.stdout)
        return print_outcome(options, Record(bus.get_result(options.id), result=None))
    told = bus.output(options.id)
    if options.json:
        return print_result(to_json(told))
    if words := described_progress(told):
        log(words)
    if told.output:
        print_result(told.output.removesuffix("\n"))
    elif sys.stdout.isatty():
        log("no output is known; publish with --follow, or start the worker with --stream")


@command("progress", ["progress 40 copying"],
         flag("percent", type=percentage, help="how far the work is, from 0 to 100"),
         flag("message", nargs="*", help="what it is doing"))
def progress_command(options):
    """Tell from a handler how far it is: for publish --follow, output -f, show and the dashboard. It writes a line to stderr."""
    message = " ".join(" ".join(options.message).split())
    sys.stderr.buffer.write(PROGRESS_MARK + f"{options.percent:g} {message}".strip().encode(errors="replace") + b"\n")
    sys.stderr.flush()


def run_step(program):
    """Run the program of a step; return its stdout, which is printed as it comes; raises SystemExit with the exit code."""
    import subprocess
    try:
        process = subprocess.Popen(program, stdout=subprocess.PIPE)
    except OSError as error:
        log(f"{program[0]} cannot be run: {error.strerror}")
        raise SystemExit(127 if isinstance(error, FileNotFoundError) else 126) from error
    output = bytearray()
    with process:
        while data := process.stdout.read1():
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            output += data
            del output[STEP_BYTES + 1:]     # one more shows a cut
    if process.returncode:
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    with contextlib.suppress(UnicodeDecodeError):
        if len(output) <= STEP_BYTES:
            return output.decode()
    log(f"the step is not recorded: its output is no text of at most {STEP_BYTES} bytes; write it to a file, and print its "
        "name")
    raise SystemExit(1)


@command("step", ['step fetch -- curl -fsS -o data.zip "$url"', "step count -- wc -l data.csv"],
         flag("name", help="a name of your own, once in each run"),
         flag("program", nargs="+", help="the program of the step and its arguments, after --"))
def step_command(options):
    """Run a program in a handler once for all attempts of an intent: once it has ended with 0, later attempts skip it.

    Its stdout, text of at most 64 KiB, is recorded, and printed again then. Another exit code is passed on, and the step runs
    again in the next attempt. Exit code 75 means that the bus is away or the lease is lost: let the handler exit with 75, too, and
    the intent is released. The program may run twice if the machine dies after it and before the record; its files are on
    this machine only.
    """
    intent_id, token = os.environ.get("INTENT_ID"), os.environ.get("INTENT_CLAIM_TOKEN")
    if not (intent_id and token):
        raise SetupError("step works only in a handler that work has started, where INTENT_ID and INTENT_CLAIM_TOKEN are set.")
    folder = steps_folder(run_name(token))
    os.makedirs(folder, 0o700, exist_ok=True)
    try:
        os.close(os.open(os.path.join(folder, hash_token(options.name)), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        raise Invalid(f"This run has a step {options.name!r} already; give each a name of its own.") from None
    bus = IntentClient(os.environ.get("INTENT_BUS_URL"), "none", ca=os.environ.get("INTENT_BUS_CA"))
    lease_seconds = float(os.environ.get("INTENT_CLAIM_TIMEOUT") or LEASE_SECONDS)
    try:
        output, known = step_once(bus, intent_id, token, lease_seconds, options.name, functools.partial(run_step, options.program))
    except SystemExit as ended:
        return ended.code
    except PayloadTooLarge as error:
        log(f"the step is not recorded: {error} Write its output to a file, and print its name.")
        return 1
    except (NotFound, Postpone) as error:
        log(error)
        return POSTPONED
    if known:
        sys.stdout.buffer.write(output.encode())


@bus_command("show", ["show 01a20a3bf4423c55cce77efa455c0ada"], ID, JSON)
def show_command(bus, options):
    """Print all about an intent: its fields, times, attempts, error and result; for an admin, its payload and publisher too."""
    intent = bus.inspect(options.id)
    if options.json:
        return print_result(to_json(intent))
    if intent.status == "claimed":
        with contextlib.suppress(NotFound, OlderBus):
            intent["progress"] = described_progress(bus.output(options.id)) or None
    for label, text in described(intent, time.time()):
        print_result(f"{label.replace('_', ' '):20}" + escape(text, UNPRINTABLE).replace("\n", "\n" + " " * 20))


def described(intent, now):
    """Yield (label, text) of all that is known about an intent; an older bus does not tell everything."""
    yield from ((field, str(intent[field])) for field in SHOWN_FIELDS if intent.get(field) is not None)
    times = {"published": intent.created_at, "due": intent.run_at if intent.status == "open" else None, "ended": intent.completed_at}
    yield from ((label, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))) for label, moment in times.items() if moment)
    until, attempts = intent.completed_at or now, list(intent.history)
    if intent.claimed_at and intent.status in ("claimed", "fulfilled"):
        attempts.append(Record(intent, attempt=intent.claim_attempts, ended_at=until, outcome=intent.status, error=None))
    seconds = [max(0, attempt.ended_at - (attempt.claimed_at or attempt.ended_at)) for attempt in attempts]
    begun = attempts[0].claimed_at if attempts else until
    if begun and intent.created_at and len(attempts) <= ATTEMPTS_KEPT:     # its first attempt is known
        yield "waited", f"{max(0, begun - intent.created_at):.1f} s"
    if attempts:
        yield "ran", f"{sum(seconds):.1f} s"
    if "payload" in intent:
        yield "payload", to_json(intent.payload)
    for step in intent.get("steps") or ():
        yield f"step {step.name}", f"attempt {step.attempt}" + ("" if step.seconds is None else f", {step.seconds:.1f} s")
    for attempt, ran in zip(attempts, seconds):
        error = f": {attempt.error}" if attempt.error else ""
        yield f"attempt {attempt.attempt}", f"{attempt.outcome}, {ran:.1f} s, by {attempt.worker}{error}"
    if intent.status == "dead":
        yield "error", str(intent.last_error or intent.get("error"))
    if intent.get("result") is not None:
        yield "result", as_text(intent.result)


@bus_command("list", ["list --status dead", "list --search alice --payload", "list --goal resize --limit 500 --json"],
             flag("--status", choices=(*STATUSES, "delayed"), help="only intents with this status; delayed ones are open, too"),
             flag("--goal", help="only intents with this goal"),
             flag("--search", metavar="TEXT", help="only intents with this text in goal, id or payload"),
             flag("--payload", action="store_true", help="print payloads, too"),
             flag("--limit", type=positive_int, default=50, metavar="N", help="at most N intents"), *TABLE)
def list_command(bus, options):
    """List intents, newest first: id, status, attempts, age, goal, worker, last error, payload."""
    table = Table(options, INTENT_TABLE)
    narrowed = [f"--{name} {value}" for name in ("status", "goal", "search", "namespace") if (value := getattr(options, name))]
    none = f"no intents with {' '.join(narrowed)}" if narrowed else f"no intents; publish one: {example_of('publish')}"
    left = options.limit
    before = None
    while left > 0:
        page = bus.list(status=options.status, goal=options.goal, namespace=options.namespace, limit=min(left, 500),
                        before=before, payload=options.payload, search=options.search)
        table.print(page.intents, left == options.limit and not page.next and none)
        before = page.next
        left = left - len(page.intents) if before else 0


@bus_command("workers", ["workers"], *TABLE)
def workers_command(bus, options):
    """List the workers that hold a lease or were there in the last five minutes, one for each process.

    The columns: last seen, owner, name (host, program and process id), id, version, goals, intents that it runs.
    """
    Table(options, WORKER_TABLE).print(bus.workers().workers, NO_WORKERS.format(example_of("work")))


@bus_command("watch", ["watch", """watch --json | jq -c 'select(.event == "dead")'"""], *TABLE)
def watch_command(bus, options):
    """Print the events on the bus as they happen, until Ctrl-C: time, event, intent, goal, worker, error."""
    table = Table(options, EVENT_TABLE)
    table.print([], "waiting for events, until Ctrl-C")
    after = bus.events().next
    for page in pages(lambda: bus.events(after, wait=CLAIM_WAIT_SECONDS)):
        if page.missed:
            log(f"{page.missed} events were missed")
        if page.events:
            table.print(page.events)
        after = page.next


def agreed(options, question, counted):
    """Ask whether to do something to the intents that were counted, unless --yes was given; return until of the count."""
    if options.yes:
        return counted.until
    question = question.format(f"{counted.number} intent{'s' if counted.number != 1 else ''}")
    if not (sys.stdin and sys.stdin.isatty()):
        raise Invalid(f"{question} There is no terminal to ask at; confirm it with --yes.")
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Conflict("Nothing was changed.")
    return counted.until


def sweep(bus, options, verb, question, status=None):
    """Have a verb of an admin change many intents; without --yes, these are counted first."""
    bus.timeout = SWEEP_SECONDS
    which = dict(goal=options.goal, namespace=options.namespace, status=status)
    until = None if options.yes else agreed(options, question, bus.admin(verb, count=True, **which))
    with showing(lambda seconds: f"{verb}: {seconds:.0f} s so far"):
        return bus.admin(verb, confirm=True, until=until, **which)


@bus_command("cancel", ["cancel 01a20a3bf4423c55cce77efa455c0ada", "cancel --goal resize"],
             flag(*ID[0], **ID[1], nargs="?"),
             flag("--goal", help="all unfinished intents with this goal, as an admin"), YES, JSON)
def cancel_command(bus, options):
    """Cancel an unfinished intent, or all of a goal; a worker that has claimed it stops."""
    if bool(options.id) == bool(options.goal):
        raise Invalid("cancel needs an id, or --goal GOAL.")
    if options.id:
        return print_answer(options, bus.cancel(options.id), "status")
    print_answer(options, sweep(bus, options, "cancel", "Cancel {}?"), "cancelled")


@bus_command("retry", ["retry 01a20a3bf4423c55cce77efa455c0ada", "retry --goal resize"],
             flag(*ID[0], **ID[1], nargs="?"),
             flag("--goal", help="all dead intents with this goal"), flag("--all", action="store_true", help="all dead intents"),
             flag("--from-start", action="store_true", help="forget the steps that are done"),
             flag("--limit", type=positive_int, metavar="N", help="at most N intents"), YES, JSON)
def retry_command(bus, options):
    """Reopen a dead intent, or many; prints the new status, or the number of intents."""
    if bool(options.id) + bool(options.goal) + options.all != 1:
        raise Invalid("retry needs one of these: an id, --goal GOAL, --all.")
    if options.from_start and not options.id:
        raise Invalid("--from-start needs an id.")
    if options.id:
        return print_answer(options, bus.retry(options.id, from_start=options.from_start), "status")
    which = dict(goal=options.goal, namespace=options.namespace)
    counted = bus.retry(count=True, **which)
    which["until"] = agreed(options, "Retry {}?", counted)     # intents that die again meanwhile are left
    limit, retried = options.limit or sys.maxsize, 0
    with showing(lambda _: f"{retried} of {counted.number} retried"):
        while retried < limit and (more := bus.retry(limit=min(limit - retried, 1000), **which).retried):
            retried += more
    print_answer(options, Record(retried=retried), "retried")


@bus_command("limit", ["limit backup 1", "limit backup none"], GOAL_FLAG,
             flag("running", type=running_number, metavar="N", help="how many may run at once, over all workers; none for any number"), *TABLE)
def limit_command(bus, options):
    """Limit how many intents of a goal run at once; a limit outlives a pause."""
    Table(options, LIMIT_TABLE).print([bus.limit(options.goal, running=options.running)])


@bus_command("pause", ["pause backup"], GOAL_FLAG, *TABLE)
def pause_command(bus, options):
    """Pause a goal: its intents wait until resume; running ones go on."""
    Table(options, LIMIT_TABLE).print([bus.limit(options.goal, paused=True)])


@bus_command("resume", ["resume backup"], GOAL_FLAG, *TABLE)
def resume_command(bus, options):
    """End the pause of a goal."""
    Table(options, LIMIT_TABLE).print([bus.limit(options.goal, paused=False)])


@bus_command("limits", ["limits"], *TABLE)
def limits_command(bus, options):
    """List the goals that are limited or paused: namespace, goal, how many run, paused."""
    Table(options, LIMIT_TABLE).print(bus.limits().limits, f"no goal is limited or paused; limit one: {example_of('limit')}")


@command("schedule", ["schedule nightly backup host=nas --every 1d --ttl 6h",
                      """schedule report report '{}' --cron "0 7 * * mon-fri" --timezone Europe/Berlin --dry-run"""],
         *CONNECTION,
         flag("name", help="a name of your own; the schedule that has it already is replaced"), GOAL_FLAG, PAYLOAD, JSON,
         flag("--every", type=duration, help="the time from one run to the next, 10s or more"),
         flag("--cron", metavar='"M H D M W"', help="run at these minutes, hours, days of month, months, days of week"),
         flag("--timezone", metavar="ZONE", help="the time zone of --cron, such as Europe/Berlin or UTC (default that of the bus)"),
         flag("--overlap", choices=("skip", "allow"), help="allow: run even if the run before is unfinished (default skip)"),
         flag("--paused", action="store_true", help="store it without runs, for the command run"),
         flag("--dry-run", action="store_true", help="print the next five runs and store nothing"), OF_OWNER_FLAG, *INTENT_FLAGS)
def schedule_command(options):
    """Publish an intent again and again; prints the time of the next run. To change or resume a schedule, give it again."""
    fields = dict(given(options, SCHEDULE), payload=read_payload(options.payload))
    if (options.every is None) == (options.cron is None):
        raise Invalid('schedule needs either --every DURATION or --cron "M H D M W".')
    if not options.dry_run:
        answer = open_client(options).schedule(options.name, **fields)
        log(f"{options.name} is {answer.status}{', and paused' if options.paused else '; the next run by the clock of this machine:'}")
        return print_result(to_json(answer) if options.json else moment(answer.next_run_at) or "paused")
    at = time.time()
    schedule = Record(validate(SCHEDULE, fields), made_at=at)
    if options.cron and not options.timezone:
        log("this is the local time of this machine; the bus takes its own, unless you pass --timezone")
    for _ in range(5):
        at = next_run(schedule, at)
        print_result(moment(at, options.timezone))


@bus_command("schedules", ["schedules"], OF_OWNER_FLAG, *TABLE)
def schedules_command(bus, options):
    """List the schedules: name, goal, every or cron, time zone, next run, last run and its id.

    The times of the runs are in this machine's time zone.
    """
    none = f"no schedules of the owner {options.owner}" if options.owner else f"no schedules; add one: {example_of('schedule')}"
    Table(options, SCHEDULE_TABLE).print(bus.schedules(options.owner).schedules, none)


@bus_command("unschedule", ["unschedule nightly"], NAME_FLAG, OF_OWNER_FLAG)
def unschedule_command(bus, options):
    """Delete a schedule; exit 3 if there is none. Its intents stay."""
    bus.unschedule(options.name, options.owner)


@bus_command("run", ["run nightly"], NAME_FLAG, OF_OWNER_FLAG, JSON)
def run_schedule_command(bus, options):
    """Publish the intent of a schedule now, besides its runs; prints the id."""
    print_answer(options, bus.run(options.name, options.owner), "id")


@bus_command("set", ["""set thermostat '{"celsius": 19.5}' --ttl 1h""", 'set "nightly backup" mine --ttl 1h --if-absent'],
             STORED_KEY, flag("value", help="JSON; anything else is stored as text"),
             flag("--ttl", type=duration, default=VALUE_TTL_SECONDS, help="how long to keep it, up to 1d"),
             flag("--if-absent", action="store_true", help="exit 1 if the key has a value, so that it serves as a lock"))
def set_command(bus, options):
    """Store a value under a key, for some time."""
    try:
        value = from_json_or_text(options.value.encode())
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


@bus_command("keys add", ["keys add phone --role work --goal send_notification --expires 90d", "keys add wall --role viewer"],
             *NEW_KEY)
def keys_add_command(bus, options):
    """Issue a key and print it; it cannot be shown again. A viewer of all owners has the owner '*'."""
    made = bus.admin("generate_key", **given(options, KEY_FIELDS))
    about = ("this is an older bus, whose keys have no role: it may publish and work" if made.role is None else
             f"id {made.key_id}, owner {made.owner}, role {made.role}")
    log(f"{about}; the key is not shown again")
    print_result(made.api_key)


@bus_command("keys invite", ["keys invite phone --role work"], *NEW_KEY)
def keys_invite_command(bus, options):
    """Print a code with which another machine can join the bus: once, within ten minutes."""
    made = bus.admin("invite", **given(options, KEY_FIELDS))
    expiry = time.strftime("%H:%M", time.localtime(made.expires_at))
    log(f"for {made.name}, role {made.role}: valid until {expiry}, once. On the other machine: {INVOCATION} join URL {made.code}")
    print_result(made.code)


@bus_command("keys list", ["keys list"], *TABLE)
def keys_list_command(bus, options):
    """List the issued keys: id, role, owner, requests, last use, name, goals, end."""
    Table(options, KEY_TABLE).print(bus.admin("keys"), f"no issued keys; invite a machine: {example_of('keys invite')}")


@bus_command("keys revoke", ["keys revoke 267ecfd48ae038ad"], flag("key_id", help="the id that keys list prints"))
def keys_revoke_command(bus, options):
    """Revoke an issued key."""
    if made := bus.admin("revoke_key", key_id=options.key_id).schedules:
        log(f"{made} of its schedules still run; unschedule deletes one")


@command("join", ["join https://bus.example.com K7Q2-9MXW", "join http://100.101.102.103:8787 K7Q2-9MXW --plain"],
         flag("url", help="the URL of the bus, as seen from this machine"), flag("code", help="a code of keys invite"), CA,
         flag("--plain", action="store_true", help="allow plain http, because a VPN encrypts the connection"))
def join_command(options):
    """Join a bus: exchange a code for a key and save both the URL and the key, so that commands need no flags."""
    if "://" in options.code:
        raise Invalid("join takes the URL first, then the code.")
    bus = IntentClient(options.url, "none", ca=options.ca)
    if not (bus.secure or options.plain):
        raise SetupError("The key would cross the network unencrypted. Join over https, or through a tunnel that ends on "
                         "this machine; pass --plain if a VPN encrypts the connection.")
    in_home(CONFIG_FILE)     # raises before the code is used up
    made = bus.join(options.code)
    write_settings(bus.base_url, made.api_key, options.ca)
    log(f"joined {bus.base_url} as {made.name}, role {made.role}; the key is in {CONFIG_FILE}")
    if os.path.exists(in_home(KEY_FILE)):
        log(f"commands of this account use that key from now on; for the owner key, add --key-file {KEY_FILE}")


@bus_command("stats", ["stats", "stats --json"], *TABLE)
def stats_command(bus, options):
    """Print the state of the bus: what waits, runs, was done and failed, by goal, and who works; down a pipe, all of it as JSON."""
    summary = bus.admin("summary")
    if options.json or not sys.stdout.isatty():
        summary.pop("history", None)     # the data of a chart
        return print_result(json.dumps(summary, indent=2))
    none = f"nothing waits, runs or was done in the last day; publish an intent: {example_of('publish')}"
    for columns, records, none in ((GOAL_TABLE, summary.goals or summary.waiting, none),
                                   (WORKER_TABLE, summary.workers, NO_WORKERS.format(example_of("work")))):
        Table(options, columns).print(records, none)
        if records:
            print_line("")
    for namespace, states in summary.intents.items():
        print_result(f"{namespace}: {', '.join(f'{number} {status}' for status, number in states.items())}")


@bus_command("purge", ["purge --goal resize --status open", "purge --namespace test --yes"],
             flag("--goal", help="only intents with this goal"),
             flag("--status", choices=STATUSES, help="only intents with this status"), YES)
def purge_command(bus, options):
    """Delete all intents for good; --namespace, --goal and --status choose some of them. Prints their number."""
    print_result(sweep(bus, options, "purge", "Delete {} for good?", options.status).deleted)


@command("doctor", ["doctor"], *CONNECTION, DB, JSON)
def doctor_command(options):
    """Look for common problems and print their cures; exit 1 if one is bad."""
    import shutil
    import textwrap
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    findings = [finding for check in CHECKS for finding in check(options)]
    for finding in findings:
        line = escape("{:4}  {:8}  {}".format(*finding))
        print_result(to_json(finding._asdict()) if options.json else
                     textwrap.fill(line, width, subsequent_indent=" " * 6, break_long_words=False))
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
            with contextlib.closing(sqlite3.connect(uri, uri=True)) as here, contextlib.closing(sqlite3.connect(options.file)) as there, \
                    showing(lambda _: f"{os.path.getsize(options.file) >> 20} of {os.path.getsize(source) >> 20} MB copied"):
                here.backup(there)
            undo.pop_all()
    except (OSError, sqlite3.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise SetupError(f"{source} cannot be copied to {options.file}: {reason}.") from error


MADE_BY = "made by install, deleted by uninstall"     # in each file that install makes, so that it touches no other
LAUNCHER = """{start}
# Starts {library}; {made_by}.
import gc
import os
import sys

sys.path.insert(0, os.path.dirname({library!r}))
gc.disable()
try:
    from intentbus import main
except ModuleNotFoundError:
    sys.exit("intentbus: " + {library!r} + " is gone; run install of intentbus.py again")
gc.freeze()     # the module stays until the end: to look for garbage in it would cost a publish 2 ms
gc.enable()
os._exit(main())     # main has flushed stdout and stderr, and threads are daemons: to take the interpreter apart would cost 4 ms
"""
COMPLETIONS = {     # by shell: its file, how the shell finds it, and the content
    "bash": ("{data}/bash-completion/completions/intentbus", "the next shell has it, if bash-completion is installed; otherwise add this "
             "line to ~/.bashrc: . {file}", r"""
_intentbus() {
    local word typed found rest=$COMP_LINE count=0 words=("")
    COMPREPLY=()
    for word in "${COMP_WORDS[@]:0:COMP_CWORD+1}"; do     # bash splits words at : and = too
        if [[ $rest == [[:space:]]* ]]; then
            ((++count))
            rest=${rest#"${rest%%[![:space:]]*}"}
        fi
        words[count]+=$word
        rest=${rest#"$word"}
    done
    typed=${words[count]}
    [[ $word == *[!:=]* ]] || word=
    [[ $typed != *@"$word" ]] || word=@$word
    typed=${typed%"$word"}     # bash keeps this, and replaces the rest of the word
    while IFS=$'\t' read -r found _; do
        if [[ $word != [\"\']* ]]; then
            printf -v found %q "$found"
        elif [[ $found == *[^[:alnum:]._:@/=+\ -]* ]]; then     # bash inserts it between the quotes as it is
            continue
        fi
        COMPREPLY+=("${found#"$typed"}")
    done < <(intentbus complete "${words[@]:1}" 2>/dev/null)
}
complete -o default -F _intentbus intentbus
"""),
    "zsh": ("{data}/zsh/site-functions/_intentbus", "add this line to ~/.zshrc, above compinit: fpath=({folder} $fpath)", r"""
local line
local -a found
for line in ${(f)"$(intentbus complete "${(@)words[2,CURRENT]}" 2>/dev/null)"}; do
    found+=("${${${line%%$'\t'*}//\\/\\\\}//:/\\:}:${line#*$'\t'}")
done
if (( $#found )); then _describe intentbus found; else _files; fi
"""),
    "fish": ("{config}/fish/completions/intentbus.fish", "the next shell has it", r"""
function __intentbus_complete
    set -l words (commandline -opc) (commandline -ct)
    intentbus complete $words[2..-1] 2>/dev/null
    or __fish_complete_path (commandline -ct)
end
complete -c intentbus -f -a '(__intentbus_complete)'
"""),
}


def installed_file(shell=None):
    """Return the path of the completion for a shell, or of the launcher, in a folder that PATH should have."""
    prefix = os.environ.get("PREFIX") if in_termux() else None
    place = COMPLETIONS[shell][0] if shell else f"{prefix or '~/.local'}/bin/intentbus"
    return in_home(place.format(data=os.environ.get("XDG_DATA_HOME") or "~/.local/share",
                                config=os.environ.get("XDG_CONFIG_HOME") or "~/.config"))


def text_at(path):
    """Return the text of a file, "" if there is none; raises SetupError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise SetupError(f"The file {path} cannot be read: {error.strerror}.") from error


def is_ours(path):
    """Return whether there is a file that install has made; raises SetupError if it is another program's."""
    text = text_at(path)
    if MADE_BY not in text and os.path.lexists(path):
        raise SetupError(f"{path} is another program's: rename or delete it first.")
    return bool(text)


@command("install", ["install", "install --completion bash"],
         flag("--completion", choices=tuple(COMPLETIONS), help="let this shell complete commands, flags, goals and ids, too"))
def install_command(options):
    """Put the command intentbus into ~/.local/bin, or in Termux $PREFIX/bin: a compiled copy of this file, which starts faster.

    This file may be moved or changed then: the copy, in ~/.local/lib/intentbus, stays until another version is installed.
    """
    if not POSIX or not sys.executable:
        raise SetupError("install makes launchers for POSIX systems. On Windows, start the compiled module with python -m intentbus, in "
                         "the folder of intentbus.py.")
    import py_compile
    import shutil
    python = sys.executable if sys.prefix == sys.base_prefix else os.path.realpath(sys.executable)     # no virtual environment's
    start = f"#!{python}"
    if not re.fullmatch(r"\S{1,120}", python):     # Linux takes 127 characters there, and no space
        start = f"""#!/bin/sh\n'''exec' "{python}" "$0" "$@"\n' '''"""
    launcher, library, text = installed_file(), in_home(LIBRARY_FILE), text_at(__file__)
    texts = {launcher: LAUNCHER.format(start=start, library=library, made_by=MADE_BY)}
    older = re.search('^__version__ = "(.*)"$', text_at(library), re.M)
    replaced = f" in place of {older[1]}" if older and older[1] != __version__ else ""
    if shell := options.completion:
        file, (_, hint, script) = installed_file(shell), COMPLETIONS[shell]
        texts[file] = f"#compdef intentbus\n# {MADE_BY}{script}"     # the first line is for zsh
    for path in (*texts, library):     # this file has MADE_BY, too
        is_ours(path)
    replace_file(library, text, 0o644)
    with contextlib.suppress(OSError):     # the launcher compiles it then
        py_compile.compile(library, doraise=True)
    for path, content in texts.items():
        replace_file(path, content, 0o755 if path == launcher else 0o644)
    log(f"{launcher} starts {library}, a copy of {__version__}{replaced}")
    if shell:
        log(f"{file} completes it in {shell}: " + hint.format(file=file, folder=os.path.dirname(file)))
    found, folder = shutil.which("intentbus"), os.path.dirname(launcher)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        log(f'{folder} is not in PATH: add this line to ~/.profile and log in again: export PATH="{folder}:$PATH"')
    elif found and found != launcher:
        log(f"{found} comes before it in PATH")


@command("uninstall", ["uninstall"])
def uninstall_command(options):
    """Delete the launcher, its copy of intentbus.py and the completions; exit 3 if there are none. All other files stay."""
    import glob
    library = in_home(LIBRARY_FILE)
    folder, module = os.path.split(library)
    compiled = glob.glob(os.path.join(glob.escape(folder), "__pycache__", module.replace(".py", ".*.pyc")))
    made = list(filter(is_ours, map(installed_file, (None, *COMPLETIONS))))
    made += [path for path in (*compiled, library) if installed_file() in made and os.path.lexists(path)]
    if not made:
        raise NotFound("Nothing is installed.")
    try:
        for path in made:
            os.remove(path)
            log(f"deleted {path}")
    except OSError as error:
        raise SetupError(f"{error.filename} cannot be deleted: {error.strerror}.") from error
    for empty in (os.path.join(folder, "__pycache__"), folder):
        with contextlib.suppress(OSError):     # it is not empty
            os.rmdir(empty)


def suggestion(word, names):
    """Return the end of a sentence about an unknown word: the names that it may stand for, if there are any."""
    import difflib
    firsts = [name.partition(" ")[0] for name in names]     # of keys add, keys list and so on
    near = [name for name in names if name.startswith(word + " ")] or difflib.get_close_matches(word, [*names, *firsts], 1)
    return f"; did you mean {' or '.join(near)}?" if near else ""


class Parser(argparse.ArgumentParser):
    """The argument parser of one command; its help starts with examples."""

    def __init__(self, name):
        function, self._examples, flags = COMMANDS[name]
        super().__init__(f"{INVOCATION} {name}", description=function.__doc__)
        self._flags = [flag for names, _ in flags for flag in names]
        self._by_field = {}     # an option has the name of the field that it sets
        for names, settings in sorted(flags, key=CONNECTION.__contains__):     # the flags of all commands come last
            option = self.add_argument(*names, **settings)
            self._by_field[option.dest] = option

    def parse(self, words):
        """Return the options in a command line; flags may stand anywhere before "--"."""
        self._words = itertools.takewhile("--".__ne__, words)
        self.usage = ""     # which would take 3 ms to format, and is not shown
        return self.parse_args(words) if "--" in words else self.parse_intermixed_args(words)

    def error(self, message):
        """Raise Invalid, where argparse would print the usage and exit."""
        for word in (word.partition("=")[0] for word in self._words if word.startswith("--")):
            if not any(flag.startswith(word) for flag in self._flags):
                message = f"there is no flag {word}{suggestion(word, self._flags)}"
        raise Invalid(f"{message.rstrip('?')}; see {self.prog} --help.")

    def by_flag(self, error):
        """Return the error of a bus about a field, in the words of the flag that has set the field."""
        field, _, words = str(error).partition(" ")
        option = self._by_field.get(field)
        if not (option and option.option_strings and error.code == f"invalid_{field}"):
            return error
        if option.type is duration:
            words = re.sub(r"a number from (\d+) to (\d+)", lambda found: "from {} to {}".format(
                *(format_duration(int(seconds)) for seconds in found.groups())), words)
        return Invalid(f"{option.option_strings[-1]} {words.replace('Unix seconds', 'a time')}", error.code)

    def format_help(self):
        """Return the examples, then the usual help."""
        examples = "".join(f"  {INVOCATION} {example}\n" for example in self._examples)
        return f"examples:\n{examples}\n{super().format_help()}"


def summary_of(name):
    """Return the first clause of a command's help."""
    return re.split(r"[:;.](?:\s|$)", COMMANDS[name][0].__doc__)[0]


def summaries(names):
    """Return a line about each of these commands."""
    return "".join(f"  {name:12} {summary_of(name)}\n" for name in names)


def kinds_of(word):
    """Return the commands of two words that begin with this word."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def help_about(words):
    """Return the help of a command, of a group of commands such as keys, or, without words, of the program."""
    if not words:
        groups = "".join(f"{title}:\n{summaries(names)}\n" for title, names in GROUPS)
        return f"{INTRODUCTION.format(INVOCATION)}\n{groups}{EPILOG}"
    kinds = kinds_of(words[0])
    if kinds and " ".join(words[:2]) not in kinds:
        return summaries(kinds).rstrip("\n")
    return Parser(find_command(words)[0]).format_help()


def join_wait(words):
    """Return a command line where --wait has its value, or none, in the same word; and the value that stood apart, if any."""
    joined, apart = [], None
    for word in words:
        if joined[-1:] == ["--wait="] and re.fullmatch(DURATION, word, re.ASCII) and not re.fullmatch(SHORT_ID, word):
            joined[-1] += word
            apart = word
        else:
            joined.append("--wait=" if word == "--wait" else word)
    return joined, apart


def find_command(words):
    """Return the command in a command line, and the other words; flags may stand before it. Raises Invalid if there is none."""
    kinds = {name: settings for _, _, flags in COMMANDS.values() for names, settings in flags for name in names if name[0] == "-"}
    place = 0
    while place < len(words) and words[place].startswith("-"):
        name, has_value, _ = words[place].partition("=")
        if name not in kinds:
            raise Invalid(f"There is no flag {name}{suggestion(name, kinds) or '; --help lists the commands.'}")
        place += 2 if takes_value(kinds[name]) and not has_value else 1
    for end in (place + 2, place + 1):
        name = " ".join(words[place:end])
        if name in COMMANDS:
            return name, words[:place] + words[end:]
    if place >= len(words):
        raise Invalid("A COMMAND is missing; --help lists the commands.")
    raise Invalid(f"There is no command {words[place]!r}{suggestion(words[place], COMMANDS) or '; --help lists the commands.'}")


def known_goals(bus, name):
    """Yield (goal, description) for a shell to complete."""
    intents = bus.request("GET", "/intents", query=dict(limit=COMPLETION_INTENTS), retries=0).intents
    yield from ((intent.goal, "has intents") for intent in intents)
    workers = bus.request("GET", "/workers", retries=0).workers
    yield from ((goal, f"served by {worker.name}") for worker in workers for goal in worker.goals)


def known_ids(bus, name):
    """Yield (id, description) of intents that a command can change or show."""
    for status in {"cancel": ("open", "claimed"), "retry": ("dead",)}.get(name, (None,)):
        intents = bus.request("GET", "/intents", query=dict(limit=COMPLETION_INTENTS, status=status), retries=0).intents
        yield from ((intent.id, f"{intent.goal}, {intent.status}") for intent in intents)


def known_names(bus, name):
    """Yield (name, description) of the schedules that a command is about."""
    if name in ("schedule", "unschedule", "run"):
        schedules = bus.request("GET", "/schedules", retries=0).schedules
        yield from ((schedule.name, f"publishes {schedule.goal}") for schedule in schedules)


def known_keys(bus, name):
    """Yield (id, description) of the issued keys."""
    yield from ((key.key_id, f"{key.name or 'unnamed'}, {key.role}") for key in bus.admin("keys"))


KNOWN = {"goal": known_goals, "--goal": known_goals, "--on-success": known_goals, "--on-failure": known_goals, "id": known_ids,
         "name": known_names, "key_id": known_keys}


def following(name, words, begun):
    """Yield (word, description) of the words that may come next in the command line of a command."""
    flags = {flag: settings for names, settings in COMMANDS[name][2] for flag in names if flag.startswith("-")}
    takers = [flag for flag, settings in flags.items() if takes_value(settings)]
    places = iter([names[0] for names, _ in COMMANDS[name][2] if not names[0].startswith("-")])
    values = {}
    wanted = None     # the flag whose value comes next
    for word in join_wait(words)[0]:
        option, is_whole, value = word.partition("=")
        if wanted:
            values[wanted], wanted = word, None
        elif option in takers:
            values[option], wanted = value, None if is_whole else option
        elif not word.startswith("-"):
            next(places, None)
    if begun.startswith("-") and not wanted:
        yield from ((flag, settings["help"]) for flag, settings in flags.items())
    option, is_whole, _ = begun.partition("=")
    start = f"{option}=" if is_whole and option in takers and not wanted else ""
    wanted = wanted or (option if start else next(places, None))
    yield from ((start + choice, flags[wanted]["help"]) for choice in flags.get(wanted, {}).get("choices") or ())
    if wanted in KNOWN and "--" not in words:
        options = {option: values.get(f"--{option.replace('_', '-')}") for option in ("url", "key_file", "namespace", "ca")}
        bus = open_client(argparse.Namespace(**options, send_key="--send-key" in words), COMPLETION_SECONDS)
        yield from ((start + word, about) for word, about in KNOWN[wanted](bus, name) if start or not word.startswith("-"))


def print_completions(words):
    """Print the words that may stand in place of the begun last one in a command line, with descriptions; return 1 if there is none."""
    # shells pass words as they were typed
    words = [re.sub(r"""\\(.)|["']""", r"\1", word) for word in words]
    *before, begun = words[words[:1] == ["help"] and len(words) > 1:]
    try:
        found = following(*find_command(before), begun)
    except Invalid:     # no whole command is there yet
        found = ((name.split()[len(before)], summary_of(name)) for name in COMMANDS if name.split()[:len(before)] == before)
        if not before:
            found = ((word, ", ".join(kind.split()[1] for kind in kinds_of(word)) or about) for word, about in found)
    found = {word: about for word, about in found if word.startswith(begun)}
    for word, about in found.items():
        print_result(f"{escape(word)}\t{escape(about)}")
    return 0 if found else 1


def run_command(words, open_store):
    """Run the command in a command line; return its exit code."""
    if not words:     # find_command() raises the error
        print(INTRODUCTION.format(INVOCATION), file=sys.stderr)
    if words[:1] == ["complete"]:     # a shell that install --completion prepared asks; the user's next line shows any error
        with contextlib.suppress(Error, OSError):
            return print_completions(words[1:] or [""])
        return 1
    end = words.index("--") if "--" in words else len(words)
    words, program = words[:end], words[end:]
    if words[:1] in (["version"], ["--version"]):
        print(f"intentbus {__version__}")
        return 0
    asked = [word for word in words if word not in ("-h", "--help")]
    if asked != words or words[:1] == ["help"]:
        print(help_about(asked[asked[:1] == ["help"]:]))
        return 0
    words, apart = join_wait(words)
    name, words = find_command(words)
    parser = Parser(name)
    options = parser.parse(words + program)
    if apart and getattr(options, "payload", None) == []:
        raise Invalid(f"{apart} may be the payload or the time to wait: write --wait={apart}, or put the payload first.")
    if getattr(options, "namespace", "") is None:
        options.namespace = os.environ.get("INTENT_BUS_NAMESPACE", "").strip() or None
    options.open_store = open_store
    try:
        code = COMMANDS[name][0](options) or 0
    except Invalid as error:
        raise parser.by_flag(error) from None
    sys.stdout.flush()
    return code


def open_missing_streams():
    """Open /dev/null for each standard stream that is closed; sys.stdin stays None, for commands that need it."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)     # gets the lowest free descriptor, so that no other file gets the one of stdin
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))


def start_child_of_init():
    """As process 1 of a container, return in a child; the process itself passes signals on and reaps orphans until that ends.

    Linux sends process 1 no signal that it does not handle, and makes it the parent of all orphans.
    """
    awaited = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    child = os.fork()
    if not child:
        os.setsid()     # else Ctrl-C in a terminal would come twice
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        return
    while True:
        number = signal.sigwait(awaited)
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended = None
        while ended != 0:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == child:
                os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))


def main(arguments: Sequence[str] | None = None, open_store: Callable[[str | None], Store] = sqlite_store) -> int:
    """Run a command line, of sys.argv by default; return the exit code, and log an error as one sentence.

    open_store returns the Store of serve, given the value of --db or None.
    """
    if POSIX and os.getpid() == 1:
        start_child_of_init()
    open_missing_streams()
    warnings.showwarning = lambda message, *_: log(message)
    if isinstance(sys.stdout, io.TextIOWrapper):     # for characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments, open_store)
    except Error as error:
        log(error)
        return 2 if isinstance(error, SetupError) else EXIT_CODES.get(error.status, 5)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:     # the reader of stdout has had enough
        return 0
    except OSError as error:
        log(reason_of(error))
        return 2
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:     # Python would fail on its unwritten data at the exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
