#!/usr/bin/env python3
"""Measure how fast the bus is on this machine, beside beanstalkd, RQ and procrastinate.

    python3 examples/benchmark.py                              everything, in about ten minutes
    python3 examples/benchmark.py --quick                      a short form, in about one
    python3 examples/benchmark.py --only rows --rows 3000000 --dir /mnt/disk --json
    python3 examples/benchmark.py --only postgres,postgres_rows --postgres postgresql://bus@127.0.0.1/bus

It starts the bus, and beanstalkd and redis-server where they are installed, on free ports of this machine and with databases
in a temporary directory, and ends them all. A missing rival is "not here". RQ needs a Python that can import rq: --rq-python.
The measurements on PostgreSQL need a running server, psycopg, and procrastinate as the rival; they create schemas and drop
them. A million rows take half a gigabyte of disk, and twice that in PostgreSQL.

A measurement takes several rounds, in which the bus and its rival take turns. The table shows the medians of the rounds. A
ratio is the median of the ratios of the rounds, intentbus to the rival. Aims are for a machine with nothing else to do.

The load generators are Python processes and share the cores with the servers. The last two columns show the processor time
that a server and its load generators used, in cores: 0.85 + 0.14 is 85 % of one core for the server and 14 % for the load. If
such a sum comes near to the number of cores, the load generators slow the server down. The cycles in README were measured by
the project's load generator in C, in a tool that leaves the bus a core of its own.
"""

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import functools
import hmac
import importlib
import itertools
import json
import logging
import math
import multiprocessing
import operator
import os
import pathlib
import platform
import secrets
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time

EXAMPLES = pathlib.Path(__file__).resolve().parent
PROGRAM = EXAMPLES.parent / "intentbus.py"
sys.path[:0] = map(str, (PROGRAM.parent, EXAMPLES))     # where intentbus.py and postgres_bus.py are

import intentbus


def optional(name):
    """Return a module, or None if it is not installed."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(name)


psycopg, procrastinate = map(optional, ("psycopg", "procrastinate"))

PAYLOAD = dict(message="The backup is done.", title="nas")
BODY = json.dumps(PAYLOAD, separators=(",", ":")).encode()
CLIENTS_PER_PROCESS = 20    # more clients are shared by two load generators
PATIENCE_SECONDS = 60       # for an answer
SLOW_FSYNC_MS = 10          # added to an fsync: the flash of a cheap phone takes that long
NOT_HERE = "not here"


# ---- Requests ----

def requests_with(key, signed=False, close=False):
    """Return the function that makes the bytes of a request to the bus."""
    head = f" HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-KEY: {key}\r\n" + "Connection: close\r\n" * close
    prefix, numbers = secrets.token_hex(16), itertools.count()

    def signature(method, path, body):
        now, nonce = int(time.time()), f"{prefix}{next(numbers)}"
        text = f"{method}\n{path}\n{now}\n{nonce}\n".encode() + body     # all paths here are in canonical form
        made = hmac.digest(key.encode(), text, "sha256").hex()
        return f"X-Timestamp: {now}\r\nX-Nonce: {nonce}\r\nX-Signature: {made}\r\n"

    def request(method, path, body=b""):
        lines = signature(method, path, body) if signed else ""
        return f"{method} {path}{head}{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    return request


def own_request(method, path, body=b""):
    """Return an unsigned request with the owner key."""
    return requests_with(os.environ["INTENT_API_KEY"])(method, path, body)


# A script is a coroutine: it yields a request, is sent the answer, and ends after one unit of work.

def publish(request, goal):
    """Publish an intent."""
    yield request("POST", "/intent", b'{"goal":"%s","payload":%s}' % (goal.encode(), BODY))


def cycle(request, goal):
    """Publish, claim, fulfil."""
    yield from publish(request, goal)
    intent = json.loads((yield request("POST", f"/claim?goal={goal}")))
    yield request("POST", f"/fulfill/{intent['id']}", b'{"claim_token":"%s"}' % intent["claim_token"].encode())


def empty_claim(request, goal):
    """Claim an intent of a goal that has none."""
    yield request("POST", f"/claim?goal={goal}")


def beanstalkd_cycle(request, goal):
    """Put, reserve, delete."""
    yield b"put 100 0 60 %d\r\n%s\r\n" % (len(BODY), BODY)
    reserved = yield b"reserve\r\n"
    yield b"delete %s\r\n" % reserved[1]


def http_answer(received):
    """Return the body of an answer of HTTP, or None if it is incomplete."""
    head, end, body = received.partition(b"\r\n\r\n")
    length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
    if not end or len(body) < length:
        return None
    if head[9:10] != b"2":
        raise ValueError(received.decode())
    return body


def beanstalkd_answer(received):
    """Return the words of an answer of beanstalkd, or None if it is incomplete."""
    line, end, body = received.partition(b"\r\n")
    words = line.split()
    if not end or words[0] == b"RESERVED" and len(body) < int(words[2]) + 2:
        return None
    if words[0] not in (b"INSERTED", b"RESERVED", b"DELETED"):
        raise ValueError(received.decode())
    return words


class Connection:
    """A connection to a port of this machine, with one request at a time."""

    def __init__(self, port, answer_of=http_answer):
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.close = self.sock.close
        self._answer_of = answer_of
        self._received = b""

    def take(self):
        """Receive once; return the answer if it is complete, else None."""
        arrived = self.sock.recv(65536)
        if not arrived:
            raise ConnectionError("The server has closed the connection.")
        self._received += arrived
        answer = self._answer_of(self._received)
        if answer is not None:
            self._received = b""
        return answer

    def answer(self):
        """Wait for the answer and return it."""
        while (answer := self.take()) is None:
            pass
        return answer

    def ask(self, request):
        """Send a request and return its answer."""
        self.sock.sendall(request)
        return self.answer()


# ---- Load ----

class Crowd:
    """Clients that play a script again and again, each over a connection of its own."""

    def __init__(self, port, script, clients, key=None, signed=False, close=False, answer_of=http_answer):
        self.ends = 0     # of scripts
        self._port, self._close, self._answer_of = port, close, answer_of
        self._selector = selectors.DefaultSelector()
        request = requests_with(key or os.environ["INTENT_API_KEY"], signed, close)
        for _ in range(clients):
            client = self._playing(script, request)
            self._connect(client, next(client))

    def play_until(self, deadline):
        """Play until a time of time.monotonic()."""
        while time.monotonic() < deadline:
            for ready, _ in self._selector.select(0.1):
                self._go_on(*ready.data)

    def leave(self):
        """Close all connections."""
        for ready in self._selector.get_map().values():
            ready.fileobj.close()

    def _playing(self, script, request):
        while True:
            yield from script(request, script.__name__)
            self.ends += 1

    def _connect(self, client, request):
        connection = Connection(self._port, self._answer_of)
        self._selector.register(connection.sock, selectors.EVENT_READ, (connection, client))
        connection.sock.sendall(request)

    def _go_on(self, connection, client):
        answer = connection.take()
        if answer is None:
            return
        request = client.send(answer)
        if self._close:
            self._selector.unregister(connection.sock)
            connection.close()
            self._connect(client, request)
        else:
            connection.sock.sendall(request)


def play(port, script, clients, start, seconds, **options):
    """Return how often a second the clients of a Crowd end a script, from start on, for some seconds.

    start is a time of time.monotonic(), which all processes share. The clients play before it, so they are warm by then.
    """
    crowd = Crowd(port, script, clients, **options)
    crowd.play_until(start)
    before, began = crowd.ends, time.monotonic()
    crowd.play_until(began + seconds)
    rate = (crowd.ends - before) / (time.monotonic() - began)
    crowd.leave()
    return rate


def metered(function, *arguments, **options):
    """Return the value of a function, the seconds that it took, and the cores that this process and its children used."""
    began, cpu = time.monotonic(), sum(os.times()[:4])
    value = function(*arguments, **options)
    seconds = time.monotonic() - began
    return value, seconds, (sum(os.times()[:4]) - cpu) / seconds


# ---- Servers, rounds and rows ----

Server = collections.namedtuple("Server", "port pid")
Result = collections.namedtuple("Result", "value server load", defaults=(None, None))     # the cores of the server and the load
HTTP_SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", 65536, True
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer.request_queue_size = 1024
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
RIVALS = {
    "beanstalkd": "beanstalkd -l 127.0.0.1 -p {port} -b {folder} -f0".split(),
    "redis": "redis-server --bind 127.0.0.1 --port {port} --dir {folder} --appendonly yes --appendfsync everysec".split(),
    "http.server": [sys.executable, "-c", HTTP_SERVER, "{port}"],
}


class Bench:
    """The options, a directory, and all that measurements share."""

    def __init__(self, options, directory):
        self.options = options
        self.directory = directory
        self._pool = concurrent.futures.ProcessPoolExecutor(
            3, multiprocessing.get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
        list(self._pool.map(time.sleep, [0.5] * 3))     # all processes have started

    def scaled(self, number):
        """Return a number of operations: a fifth in the short form."""
        return number // 5 if self.options.quick else number

    def folder(self):
        """Return a new directory."""
        return tempfile.mkdtemp(dir=self.directory)

    # -- Servers --

    @contextlib.contextmanager
    def _running(self, port, *command, **environment):
        errors = pathlib.Path(self.folder(), "stderr")
        with errors.open("w") as stderr, subprocess.Popen(
                list(map(str, command)), env=dict(os.environ, **environment), start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=stderr) as process:
            try:
                wait_until(lambda: listens(port) or process.poll() is not None)
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} has ended: {errors.read_text()}")
                yield Server(port, process.pid)
            finally:
                process.kill()     # its database is of no further use

    def bus(self, *flags, db=None, postgres=None, **environment):
        """Run the bus on a new file, on the file db, or on PostgreSQL."""
        port = free_port()
        program = [EXAMPLES / "postgres_bus.py"] if postgres else [PROGRAM, "serve"]
        environment["BUS_DB_PATH"] = postgres or db or f"{self.folder()}/bus.db"
        return self._running(port, sys.executable, *program, "--port", port, *flags, **environment)

    def rival(self, name, **environment):
        """Run one of RIVALS; the context is None if it is not installed."""
        port, folder = free_port(), self.folder()
        command = [word.format(port=port, folder=folder) for word in RIVALS[name]]
        return self._running(port, *command, **environment) if shutil.which(command[0]) else contextlib.nullcontext()

    @contextlib.contextmanager
    def schema(self):
        """Make a schema in PostgreSQL; the context is its DSN."""
        schema = f"benchmark_{secrets.token_hex(8)}"
        with psycopg.connect(self.options.postgres, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {schema}")
            try:
                yield psycopg.conninfo.make_conninfo(self.options.postgres, options=f"-c search_path={schema}")
            finally:
                db.execute(f"DROP SCHEMA {schema} CASCADE")

    # -- Rounds --

    def start(self, function, *arguments, **options):
        """Call a function in another process; return the future of metered()."""
        return self._pool.submit(metered, function, *arguments, **options)

    def speed(self, server, script, clients, **options):
        """Return the function that measures the ends of a script per second, once; None for a missing server."""
        shares = [clients] if clients <= CLIENTS_PER_PROCESS else [clients // 2, clients - clients // 2]
        seconds = self.options.seconds

        def measure():
            start = time.monotonic() + 0.1 + min(seconds, 5) / 10     # by then all clients are warm
            started = [self.start(play, server.port, script, share, start, seconds, **options) for share in shares]
            time.sleep(max(0, start - time.monotonic()))
            rates, _, *cores = finished(server, started)
            return Result(sum(rates), *cores)
        return server and measure

    def turns(self, *runs, rounds=None):
        """Call functions in turns; return a list of results for each function, and None for None."""
        results = zip(*([run and run() for run in runs] for _ in range(rounds or self.options.rounds)))
        return [run and list(each) for run, each in zip(runs, results)]

    def compare(self, what, ours, other, other_name, aim=""):
        """Return the row of two functions that measure a rate."""
        return row(what, "1/s", *self.turns(ours, other), other_name, aim)


def finished(server, started):
    """Wait for futures of metered(); return their values, the longest time in seconds, and the cores of server and load."""
    began, cpu = time.monotonic(), server and cpu_seconds(server.pid)
    values, seconds, loads = zip(*(each.result() for each in started))
    server_cores = (cpu_seconds(server.pid) - cpu) / (time.monotonic() - began) if server else 0
    return values, max(seconds), server_cores, sum(loads)


def cpu_seconds(pid):
    """Return the processor time of a process; not a number where there is no /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except FileNotFoundError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(pid):
    """Return the resident memory of a process; not a number where there is no /proc."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024
    except FileNotFoundError:
        return math.nan


def free_port():
    """Return a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def listens(port):
    """Return whether a server listens at a port."""
    with contextlib.suppress(OSError):
        Connection(port).close()
        return True


def wait_until(fact):
    """Return once fact() is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fact():
        if time.monotonic() > deadline:
            raise TimeoutError("a fact did not come true")
        time.sleep(0.005)


def first_line(*command):
    """Return the first line that a command prints; None if it cannot run."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0].strip()


def p99(values):
    """Return the 99th percentile."""
    return sorted(values)[int(0.99 * len(values))]


def row(what, unit, ours, others=None, other_name="", aim="", of=statistics.median):
    """Return a row of the table: for the Results of the bus in each round, and for those of what it is compared with.

    It shows the median of the rounds, or what `of` returns. Results that are None are of a rival that is not here.
    """
    values = [result.value for result in ours]
    other_values = [result.value for result in others or ()]
    cores = [[statistics.median(each) for each in list(zip(*results))[1:]] for results in (ours, others)
             if results and results[0].server is not None]
    return dict(what=what, unit=unit, intentbus=of(values), other_name=other_name, aim=aim, cores=cores,
                other=of(other_values) if others else NOT_HERE if other_name else None,
                ratio=statistics.median(map(operator.truediv, values, other_values)) if others else None)


def median_and_p99(what, results, aims=("", "")):
    """Yield the rows of the median and of the p99."""
    yield row(f"{what}, median", "ms", results, aim=aims[0])
    yield row(f"{what}, p99", "ms", results, aim=aims[1], of=p99)


def timed_ms(function, *arguments, **options):
    """Return the milliseconds that a function takes, as a Result."""
    began = time.perf_counter()
    function(*arguments, **options)
    return Result(1000 * (time.perf_counter() - began))


# ---- Many rows ----

TIMES = ("created_at", "run_at", "expires_at", "completed_at", "due_at")
ROWS_PER_SECOND = 100           # the rate at which the stored intents were published
OLDEST_SECONDS = 3 * 86400      # how long ago the first one was


def mix(now):
    """Return 150 intents, as the bus stores them, of which all rows are copies.

    A third has one goal: half of these are delayed, at a higher priority, and most others need a capability that the workers
    here lack, also at a higher priority. A third has fifty other goals. A third has ended: 30 are fulfilled, 20 are dead.
    """
    def new(goal="resize", **fields):
        return intentbus.Intent.new("", now, "owner", "owner", dict(
            fields, goal=goal, payload=PAYLOAD, ttl=intentbus.YEAR_SECONDS))

    def ended(transition, *arguments):
        intent = new()
        intent.update(intent.claimed(now, "0" * 64, intentbus.LEASE_SECONDS, "owner", "owner", None, None).columns)
        intent.update(transition(intent, now + 1, *arguments).columns)
        return intent
    return [*(new(priority=900, delay=30 * 86400) for _ in range(25)),
            *(new(priority=800, required_capability="tpu") for _ in range(20)),
            *(new(required_capability=capability) for capability in (None, None, None, "gpu", "arm")),
            *(new(f"goal-{number}") for number in range(50)),
            *(ended(intentbus.Intent.fulfilled, "done", "json", "owner") for _ in range(30)),
            *(ended(intentbus.Intent.failed, "no such file", False, 0) for _ in range(20))]


def copies(first, last):
    """Yield rows, number first to last - 1, as values of COLUMNS: copies of mix() with ids and times of their own."""
    began = time.time() - OLDEST_SECONDS
    kinds = [[intent[name] for name in intentbus.COLUMNS] for intent in mix(began)]
    times = [intentbus.COLUMNS.index(name) for name in TIMES]
    for number in range(first, last):
        values, later = kinds[number * 7 % len(kinds)].copy(), number / ROWS_PER_SECOND
        values[0] = f"{int(1000 * (began + later)) << 16:016x}{number:016x}"
        for at in times:
            if values[at] is not None:
                values[at] += later
        yield values


COLUMNS = ", ".join(intentbus.COLUMNS)
RECOUNT = "DELETE FROM tallies", """
    INSERT INTO tallies (namespace, publisher, status, intents)
    SELECT namespace, publisher, status, COUNT(*) FROM intents GROUP BY namespace, publisher, status
"""


def fill(path, first, last):
    """Bring a file from `first` rows to `last`."""
    intentbus.Database(path).close()     # creates the tables
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
            db.execute(f"PRAGMA {pragma}")
        db.executemany(f"INSERT INTO intents ({COLUMNS}) VALUES ({', '.join('?' * len(intentbus.COLUMNS))})", copies(first, last))
        for statement in RECOUNT:
            db.execute(statement)


def fill_postgres(dsn, rows):
    """Store rows in a new PostgreSQL database."""
    with psycopg.connect(dsn, autocommit=True) as db:
        with db.cursor().copy(f"COPY intents ({COLUMNS}) FROM STDIN") as copy:
            for values in copies(0, rows):
                copy.write_row(values)
        for statement in (*RECOUNT, "VACUUM (ANALYZE) intents"):
            db.execute(statement)


@contextlib.contextmanager
def one_round(store):
    """Share one commit among the verbs of a block, as the server does; on PostgreSQL each verb is a transaction."""
    if store.database.shared:
        yield
        return
    store.database.begin()
    yield
    store.prepare()
    store.database.commit()
    store.finish()


def life(bus, **claim):
    """Publish, claim and fulfil at a Bus in this process; return the milliseconds of each as Results."""
    claimed = []
    with one_round(bus.store):
        return dict(publish=timed_ms(bus.publish, "resize", PAYLOAD),
                    claim=timed_ms(lambda: claimed.append(bus.claim(**claim))),
                    fulfil=timed_ms(lambda: bus.fulfill(claimed[0].id, claimed[0].claim_token)))


CLAIMS = {
    "goal given": dict(goal="resize"), "any goal": {}, "two capabilities": dict(goal="resize", capabilities=("gpu", "arm")),
}


def compare_lives(bench, full, empty, rows, number):
    """Yield the rows of publish, claim and fulfil at the stores of a full table and of an empty one."""
    buses = intentbus.Bus(full), intentbus.Bus(empty)
    bench.turns(*(functools.partial(life, bus) for bus in buses), rounds=number)     # both are warm from now on
    for name, claim in CLAIMS.items():
        lives = bench.turns(*(functools.partial(life, bus, **claim) for bus in buses), rounds=number)
        publishes, claims, fulfils = ([[times[verb] for times in each] for each in lives]
                                      for verb in ("publish", "claim", "fulfil"))
        yield row(f"claim, {name}, {rows:,} rows", "ms", *claims, "empty table", "<= 1.5")
    yield row(f"publish, {rows:,} rows", "ms", *publishes, "empty table", "<= 1.3")
    yield row(f"fulfil, {rows:,} rows", "ms", *fulfils, "empty table")


# ---- The measurements ----
# Each is a generator of rows and of lines of text.

def client_of(server):
    """Return an IntentClient of the bus."""
    return intentbus.IntentClient(f"http://127.0.0.1:{server.port}")


def cycles(bench):
    """Full cycles (publish, claim, fulfil; put, reserve, delete), each commit synced to disk."""
    aims = {1: ">= 0.5", 8: ">= 1.0", 40: ">= 1.2"}
    with bench.bus("--rate-limit", 999_999_999, "--max-unfinished", 999_999_999) as bus, bench.rival("beanstalkd") as rival:
        for clients in (1, 2, 4, 8, 16, 40, 100, 200):
            theirs = bench.speed(rival, beanstalkd_cycle, clients, answer_of=beanstalkd_answer)
            yield bench.compare(f"full cycles, {clients} at once", bench.speed(bus, cycle, clients), theirs, "beanstalkd",
                                aims.get(clients, ""))
        issued = client_of(bus).admin("generate_key", owner="owner", name="benchmark", role="both").api_key
        kinds = {"signed": dict(signed=True), "an issued key": dict(key=issued), "a connection a request": dict(close=True)}
        plain, *others = bench.turns(*(bench.speed(bus, cycle, 40, **kind) for kind in ({}, *kinds.values())))
        for kind, results in zip(kinds, others):
            yield row(f"full cycles, 40 at once, {kind}", "1/s", results, plain, "owner key, keep-alive",
                      ">= 0.65" if "close" in kinds[kind] else "")


SLOW_FSYNC = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int slow(const char *name, int fd) {
    usleep(%d);
    return ((int (*)(int)) dlsym(RTLD_NEXT, name))(fd);
}
int fsync(int fd) { return slow("fsync", fd); }
int fdatasync(int fd) { return slow("fdatasync", fd); }
"""


def slow_disk(bench):
    """Full cycles where each fsync takes longer, at both servers."""
    if not (sys.platform == "linux" and shutil.which("cc")):
        yield f"{NOT_HERE}: it needs Linux and cc"
        return
    library = f"{bench.folder()}/slow_fsync.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-", "-ldl"], check=True, text=True,
                   input=SLOW_FSYNC % (1000 * SLOW_FSYNC_MS))
    with bench.bus(LD_PRELOAD=library) as bus, bench.rival("beanstalkd", LD_PRELOAD=library) as rival:
        theirs = bench.speed(rival, beanstalkd_cycle, 40, answer_of=beanstalkd_answer)
        yield bench.compare(f"full cycles, 40 at once, fsync + {SLOW_FSYNC_MS} ms", bench.speed(bus, cycle, 40), theirs,
                            "beanstalkd", ">= 8")


def commit(db, seconds):
    """Return the inserts per second that SQLite commits, as a Result."""
    number, began = 0, time.monotonic()
    while time.monotonic() < began + seconds:
        db.execute("INSERT INTO floor VALUES (?)", (BODY,))
        number += 1
    return Result(number / (time.monotonic() - began))


def single(bench):
    """Single requests: publishes beside the parts below them, SQLite and HTTP; and claims that find nothing."""
    with contextlib.ExitStack() as opened:
        bus, empty = opened.enter_context(bench.bus()), opened.enter_context(bench.rival("http.server"))
        db = opened.enter_context(contextlib.closing(sqlite3.connect(f"{bench.folder()}/floor.db", isolation_level=None)))
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE floor (payload TEXT)"):
            db.execute(statement)
        yield bench.compare("publishes, 1 at once", bench.speed(bus, publish, 1),
                            functools.partial(commit, db, bench.options.seconds), "commits of SQLite")
        yield bench.compare("publishes, 8 at once", bench.speed(bus, publish, 8), bench.speed(empty, publish, 8),
                            "empty http.server")
        yield bench.compare("empty claims, 8 at once", bench.speed(bus, empty_claim, 8), bench.speed(bus, publish, 8),
                            "publishes", ">= 3")


def run_handlers(server, goal, number):
    """Run intents with a Python handler that returns when it started."""
    client_of(server).listen(goal, lambda payload: time.monotonic(), max_jobs=number)


def run_programs(server, goal, number):
    """Run intents with a program each, four at once."""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        intentbus.main(["work", "--url", f"http://127.0.0.1:{server.port}", "--goal", goal, "--drain", "-j", "4", "--", "true"])


RQ_JOBS = """
import sys, time, redis, rq
port, worker, number = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
queue = rq.Queue(str(time.time()), connection=redis.Redis(port=port))
queue.enqueue_many([rq.Queue.prepare_data("time.monotonic") for _ in range(number)])
began = time.monotonic()
getattr(rq, worker)([queue], connection=queue.connection).work(burst=True, logging_level="WARNING")
print(number / (time.monotonic() - began))
if queue.finished_job_registry.count < number: sys.exit("RQ has not finished its jobs.")
"""


def run_rq(*command):
    """Run RQ_JOBS; return the jobs per second."""
    return float(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout)


def workers(bench):
    """Jobs of one worker: a trivial handler in Python, and a program for each job, four at once; RQ forks for each job."""
    python = bench.options.rq_python
    version = first_line(python, "-c", "import rq; print(rq.VERSION)")
    yield f"RQ {version or NOT_HERE}, redis-server with appendfsync everysec"

    def ours(run, number):
        client_of(bus).publish_many([dict(goal=run.__name__, payload=each) for each in range(number)])
        _, seconds, *cores = finished(bus, [bench.start(run, bus, run.__name__, number)])
        return Result(number / seconds, *cores)

    def theirs(worker, number):
        cpu = cpu_seconds(redis.pid)
        rate, seconds, load = metered(run_rq, python, "-c", RQ_JOBS, redis.port, worker, number)
        return Result(rate, (cpu_seconds(redis.pid) - cpu) / seconds, load)
    with bench.bus() as bus, (bench.rival("redis") if version else contextlib.nullcontext()) as redis:
        for what, run, number, worker, aim in (
                ("a trivial handler in Python", run_handlers, bench.scaled(1000), "SimpleWorker", ">= 4"),
                ("a program for each job, four at once", run_programs, bench.scaled(400), "Worker", ">= 5")):
            yield bench.compare(what, functools.partial(ours, run, number),
                                redis and functools.partial(theirs, worker, number), f"RQ {worker}", aim)
        if set(client_of(bus).admin("summary").intents["default"]) != {"fulfilled"}:
            raise RuntimeError("the bus has not finished its jobs")


def rows(bench):
    """Full tables beside an empty one: verbs in this process, without the fsync of their commit; reads over HTTP."""
    most, path = bench.options.rows, f"{bench.folder()}/bus.db"
    sizes = [10 ** power for power in range(3, 8) if 10 ** power < most] + [most]
    for stored, number in zip([0, *sizes], sizes):
        began = time.monotonic()
        fill(path, stored, number)
        yield f"{number:,} rows, {os.path.getsize(path) / 1e6:,.0f} MB, filled in {time.monotonic() - began:.0f} s"
        stores = [intentbus.Store(intentbus.Database(each)) for each in (path, f"{bench.folder()}/bus.db")]
        with contextlib.closing(stores[0]), contextlib.closing(stores[1]):
            yield from compare_lives(bench, *stores, number, bench.scaled(1000))
    with bench.bus(db=path) as bus, contextlib.closing(Connection(bus.port)) as client:
        newest = json.loads(client.ask(own_request("GET", "/intents?limit=1")))["intents"][0]["id"]
        for name, target in (("status", f"/status/{newest}"), ("list", "/intents"),
                             ("list, of a goal", "/intents?goal=goal-7"), ("list, of an unknown goal", "/intents?goal=unknown"),
                             ("list, dead", "/intents?status=dead"), ("summary", "/admin/summary"), ("metrics", "/metrics")):
            times, = bench.turns(functools.partial(timed_ms, client.ask, own_request("GET", target)), rounds=20)
            yield row(f"{name}, {most:,} rows", "ms", times, aim="<= 50 ms")


def held(observer):
    """Return how many requests the bus holds."""
    return json.loads(observer.ask(own_request("GET", "/admin/summary")))["held_requests"]


def park(opened, server, number):
    """Open connections and have the bus hold a claim of each; return their selector."""
    selector = opened.enter_context(selectors.DefaultSelector())
    observer, *waiting = (opened.enter_context(contextlib.closing(Connection(server.port))) for _ in range(number + 1))
    for each in waiting:
        each.sock.sendall(own_request("POST", f"/claim?goal=parked&wait={PATIENCE_SECONDS}"))
        selector.register(each.sock, selectors.EVENT_READ, each)
    wait_until(lambda: held(observer) == number)
    return selector


def wake(server, selector, number):
    """Publish intents one by one; return the times until a parked claim was answered, as Results in ms."""
    times = []
    with contextlib.closing(Connection(server.port)) as publisher:
        for _ in range(number):
            began = time.monotonic()
            publisher.sock.sendall(next(publish(own_request, "parked")))
            (ready, _), *_ = selector.select(PATIENCE_SECONDS)
            ready.data.answer()
            times.append(Result(1000 * (time.monotonic() - began)))
            selector.unregister(ready.fileobj)
            publisher.answer()
    return times


def hand_off(bus, client, observer):
    """Publish to a worker that waits; return the time until its handler started, as a Result in ms."""
    wait_until(lambda: held(observer))
    called = time.monotonic()
    intent = client.publish("handoff", 1)
    return Result(1000 * (client.get_result(intent.id, wait=PATIENCE_SECONDS).result - called))


def handoff(bench):
    """From the call of publish to a worker that waits: with our client and listen(), and with plain sockets."""
    number, times = bench.scaled(200), []
    with bench.bus() as bus, contextlib.closing(Connection(bus.port)) as observer:
        worker, client = bench.start(run_handlers, bus, "handoff", number), client_of(bus)
        yield from median_and_p99("publish() to handler start in listen()",
                                  [hand_off(bus, client, observer) for _ in range(number)], ("< 2 ms", "< 10 ms"))
        worker.result()
        for _ in range(number):
            with contextlib.ExitStack() as opened:
                times += wake(bus, park(opened, bus, 1), 1)
        yield from median_and_p99("publish to claim", times, ("", "< 2 ms"))


def parked(bench):
    """Workers that wait for an intent."""
    number = min(bench.options.parked, intentbus.connection_limit() - 100)     # 100: for everything else
    with bench.bus() as bus, contextlib.ExitStack() as opened:
        empty = memory_mb(bus.pid)
        selector = park(opened, bus, number)
        memory = memory_mb(bus.pid)
        cpu, seconds = cpu_seconds(bus.pid), min(10, 2 * bench.options.seconds)
        time.sleep(seconds)
        idle = (cpu_seconds(bus.pid) - cpu) / seconds
        yield row(f"{number:,} held claims, memory of the bus", "MB", [Result(memory)], aim="<= 60 MB" if number == 1000 else "")
        yield row(f"{number:,} held claims, memory for them", "MB", [Result(memory - empty)])
        yield row(f"{number:,} held claims, CPU while nothing happens", "%", [Result(100 * idle)], aim="< 1 %")
        times = wake(bus, selector, min(bench.scaled(200), number))
        yield from median_and_p99(f"{number:,} held claims, publish to claim", times, ("", "< 2 ms"))


def process(bench):
    """The process that cron starts: one publish."""
    with bench.bus() as bus:
        environment = dict(os.environ, INTENT_BUS_URL=f"http://127.0.0.1:{bus.port}", PYTHONPYCACHEPREFIX=bench.folder())
        environment.pop("PYTHONDONTWRITEBYTECODE", None)     # -m keeps the module compiled
        run = functools.partial(timed_ms, subprocess.run, env=environment, cwd=PROGRAM.parent, check=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        home = bench.folder()
        subprocess.run([sys.executable, PROGRAM, "install"], env=dict(environment, HOME=home), stderr=subprocess.DEVNULL, check=True)
        launcher = os.path.join(home, ".local", "bin", "intentbus")
        with open(launcher) as file:
            python = file.readline()[2:].rstrip()
        publish = ("publish", "cron", "{}")
        file, module, launched, bare = bench.turns(*(functools.partial(run, arguments) for arguments in (
            (python, PROGRAM, *publish), (python, "-m", "intentbus", *publish), (launcher, *publish),
            (python, "-c", "import urllib.request"))), rounds=bench.scaled(20))
        yield row("intentbus.py publish", "ms", file, bare, "import urllib.request")
        yield row("python3 -m intentbus publish", "ms", module, bare, "import urllib.request")
        yield row("intentbus publish, by the launcher of install", "ms", launched, bare, "import urllib.request", "<= 1.2")


def memory(bench):
    """The memory of the bus after many cycles."""
    done, early = 0, None
    with bench.bus() as bus:
        measure = bench.speed(bus, cycle, 8)
        while done < bench.options.cycles:
            result = measure()
            done += round(result.value * bench.options.seconds)
            early = early or (done, memory_mb(bus.pid))
        yield row(f"memory after {done:,} cycles", "MB", [result._replace(value=memory_mb(bus.pid))], [Result(early[1])],
                  f"after {early[0]:,}", "<= 1.1")


def play_procrastinate(dsn, clients, seconds):
    """Let clients defer, fetch and finish jobs of procrastinate; return the jobs per second."""
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, min_size=clients, max_size=clients))
    task = app.task(name="task", queue="queue")(lambda **payload: None)

    async def play_one(worker, until):
        ends = 0
        while time.monotonic() < until:
            await task.defer_async(**PAYLOAD)
            if job := await app.job_manager.fetch_job(["queue"], worker):     # another client may have taken it
                await app.job_manager.finish_job(job, procrastinate.jobs.Status.SUCCEEDED, delete_job=False)
                ends += 1
        return ends

    async def play_all():
        async with app.open_async():
            if not await app.check_connection_async():
                await app.schema_manager.apply_schema_async()
            worker, began = await app.job_manager.register_worker(), time.monotonic()
            ends = await asyncio.gather(*(play_one(worker, began + seconds) for _ in range(clients)))
            return sum(ends) / (time.monotonic() - began)
    return asyncio.run(play_all())


def postgres(bench):
    """Full cycles on PostgreSQL, whose own cores are not counted. Procrastinate is a library without HTTP."""
    if not (bench.options.postgres and psycopg):
        yield f"{NOT_HERE}: it needs --postgres and psycopg"
        return
    with bench.schema() as dsn, bench.schema() as theirs, contextlib.ExitStack() as opened:
        bus, file = opened.enter_context(bench.bus(postgres=dsn)), opened.enter_context(bench.bus())

        def rival(clients):
            (rate,), _, *cores = finished(None, [bench.start(play_procrastinate, theirs, clients, bench.options.seconds)])
            return Result(rate, *cores)
        for clients in (1, 8, 40):
            ours, on_file, others = bench.turns(bench.speed(bus, cycle, clients), bench.speed(file, cycle, clients),
                                                procrastinate and functools.partial(rival, clients))
            what = f"full cycles on PostgreSQL, {clients} at once"
            yield row(what, "1/s", ours, on_file, "on a file")
            yield row(what, "1/s", ours, others, "procrastinate")
        number, other = bench.scaled(200), opened.enter_context(bench.bus(postgres=dsn))
        yield from median_and_p99("publish at one bus to claim at another", wake(bus, park(opened, other, number), number))


def postgres_rows(bench):
    """A full table in PostgreSQL beside an empty one; in this process, where each verb waits for the disk."""
    if not (bench.options.postgres and psycopg):
        yield f"{NOT_HERE}: it needs --postgres and psycopg"
        return
    import postgres_bus
    with bench.schema() as dsn, bench.schema() as other, contextlib.ExitStack() as opened:
        full, empty = (opened.enter_context(contextlib.closing(postgres_bus.open_store(each))) for each in (dsn, other))
        number, began = bench.options.rows, time.monotonic()
        fill_postgres(dsn, number)
        yield f"{number:,} rows, {full.database.sizes()[0] / 1e6:,.0f} MB, filled in {time.monotonic() - began:.0f} s"
        yield from compare_lives(bench, full, empty, number, bench.scaled(300))


MEASUREMENTS = {function.__name__: function for function in (
    cycles, slow_disk, single, workers, rows, handoff, parked, process, memory, postgres, postgres_rows)}


# ---- The report ----

def machine(bench):
    """Return the lines above the table: the machine, the versions, and when each server syncs to disk."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("model name")[2].split("\n")[0].strip("\t :") or cpu
    with contextlib.suppress(AttributeError, OSError):
        cpu += f", load average {os.getloadavg()[0]:.1f}"
    return {
        "cores": f"{os.cpu_count()}, {cpu}",
        "system": f"{platform.system()} {platform.release()}",
        "Python": f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "directory": f"{bench.directory}, of type {first_line('stat', '-f', '-c', '%T', bench.directory) or 'unknown'}",
        "rounds": f"{bench.options.rounds} of {bench.options.seconds:g} s",
        "load": "Python processes on the same cores; the last two columns are the cores that a server and its load used",
        "README": "its cycles are from the project's load generator in C, in a tool that leaves the bus a core of its own",
        "intentbus": f"{intentbus.__version__}, SQLite's WAL with synchronous=FULL: an fsync before each answer to a write",
        "beanstalkd": f"{first_line('beanstalkd', '-v') or NOT_HERE}, -b DIR -f0: an fsync before each answer to a write",
    }


def shown(value):
    """Return a value as the table shows it."""
    if not isinstance(value, (int, float)):
        return value or ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def shown_cores(cores):
    """Return the cores of a server and of its load, as the table shows them."""
    return f"{cores[0]:.2f} + {cores[1]:.2f}" if cores else ""


LINE = "{:<47}{:>10} {:<4}{:>9} {:<22}{:>6}  {:<9}{:>13}{:>15}"


def table_line(found):
    """Return a row as a line of text."""
    ours, other = (*found["cores"], (), ())[:2]
    return LINE.format(found["what"], shown(found["intentbus"]), found["unit"], shown(found["other"]), found["other_name"],
                       f"{found['ratio']:.2f}" if found["ratio"] else "", found["aim"], shown_cores(ours),
                       shown_cores(other)).rstrip()


def report(bench, names):
    """Take measurements and print their rows as they come, or all as JSON at the end."""
    say = functools.partial(print, file=sys.stderr if bench.options.json else sys.stdout, flush=True)
    about, found_rows = machine(bench), []
    for name, value in about.items():
        say(f"{name + ':':<12} {value}")
    say("\n" + LINE.format("", "intentbus", "", "beside", "", "ratio", "aim", "bus + load", "beside + load"))
    for name in names:
        say(f"\n{name}: {MEASUREMENTS[name].__doc__}")
        with contextlib.closing(MEASUREMENTS[name](bench)) as measuring:     # however this ends, its servers end
            for found in measuring:
                say(found if isinstance(found, str) else table_line(found))
                if not isinstance(found, str):
                    found_rows.append(dict(measurement=name, **found))
    if bench.options.json:
        known = json.loads(json.dumps(found_rows), parse_constant=lambda not_a_number: None)
        print(json.dumps(dict(machine=about, rows=known), indent=1))


NUMBERS = {     # an option: its default, that of --quick, and its help
    "rounds": (3, 1, "rounds of each measurement"),
    "seconds": (3.0, 0.5, "of each measurement in a round"),
    "rows": (100_000, 10_000, "in the big tables"),
    "cycles": (100_000, 4_000, "of the measurement memory"),
    "parked": (1_000, 200, "waiting workers of the measurement parked"),
}


def options_of(arguments):
    """Return the options in a command line; --quick changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form")
    parser.add_argument("--only", default=",".join(MEASUREMENTS), metavar="NAME,...", help=f"of {', '.join(MEASUREMENTS)}")
    for name, (default, quick, words) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=type(default), metavar="N", help=f"{words} (default {default:,}, quick {quick:,})")
    parser.add_argument("--dir", help="where the databases are meanwhile (default: where temporary files are)")
    parser.add_argument("--rq-python", default=sys.executable, metavar="PATH", help="a Python that can import rq")
    parser.add_argument("--postgres", metavar="DSN", help="a running PostgreSQL server")
    parser.add_argument("--json", action="store_true", help="print JSON, and the table on stderr")
    options = parser.parse_args(arguments)
    for name, (default, quick, _) in NUMBERS.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else default)
    unknown = set(options.only.split(",")) - set(MEASUREMENTS)
    if unknown:
        parser.error(f"there is no measurement {', '.join(sorted(unknown))}")
    return options


def main(arguments):
    """Measure, and clean up whatever happens."""
    options = options_of(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C
    for name in list(os.environ):
        if name.startswith(("BUS_", "INTENT_", "DASHBOARD_")):     # settings of another bus
            del os.environ[name]
    os.environ["BUS_SECRET"] = os.environ["INTENT_API_KEY"] = secrets.token_hex(24)
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        try:
            report(Bench(options, directory), options.only.split(","))
        except KeyboardInterrupt:
            return 130
        finally:
            for process in multiprocessing.active_children():
                process.kill()     # the load generators, which may have a handler of SIGTERM


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
