#!/usr/bin/env python3
"""How fast the bus is on this machine, beside what one would take instead.

    python3 examples/benchmark.py                              everything, in about ten minutes
    python3 examples/benchmark.py --quick                      a short form, in about one
    python3 examples/benchmark.py --only growth,rows --rows 3000000 --dir /mnt/disk --json
    python3 examples/benchmark.py --only postgres,postgres_rows --postgres postgresql://bus@127.0.0.1/bus

It starts the bus itself, and beanstalkd and redis-server if they are installed, on free ports of this machine and with
databases in a directory of its own, and ends them all. A peer that is missing is a row that says so. RQ needs a Python
that can import rq: --rq-python. PostgreSQL is one that runs already, in which schemas can be made and dropped; it needs
psycopg, and procrastinate as its peer. Big tables take half a kilobyte of disk a row, in PostgreSQL one.

The figures are medians of rounds in which the peers take turns; a ratio is intentbus to peer. What makes the load is
the same code for all of them, in processes of its own: a client is a coroutine that yields a request and is sent the
answer, and one process drives many over keep-alive connections. The column "load" is the share of a core that those
processes took, beside intentbus / beside the peer: far below 100 % times their number (2 from 21 clients on), they are
not what is measured. "server" is the same of the server. Targets are aims, for a machine with nothing else to do.
"""

import argparse
import collections
import contextlib
import functools
import http.server
import importlib.util
import json
import logging
import math
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
import urllib.parse

HERE = pathlib.Path(__file__).resolve()
PROGRAM = HERE.parent.parent / "intentbus.py"
sys.path[:0] = map(str, (PROGRAM.parent, HERE.parent))     # where intentbus.py and postgres_bus.py are

import intentbus

SLOW_FSYNC_MS = 10          # as the flash of a cheap phone
CLIENTS_PER_PROCESS = 20    # more are shared by two processes
PATIENCE_SECONDS = 60       # what has not answered by then never will
PAYLOAD = b'{"message":"The backup is done.","title":"nas"}'
NOT_HERE = "not here"


# ---- The load: what each client asks ----
# A script is a coroutine: it yields a request, is sent the answer, and has ended when one unit of work is done.

def bus_requests(close, signed):
    """Return the function that makes a request to the bus: its path and body as bytes to send."""
    key = os.environ["INTENT_API_KEY"]
    fixed = f" HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-KEY: {key}\r\n" + "Connection: close\r\n" * close

    def signature(path, body):
        place, now, nonce = urllib.parse.urlsplit(path), str(int(time.time())), os.urandom(16).hex()
        made = intentbus.sign(key, "POST", place.path, urllib.parse.parse_qsl(place.query), now, nonce, body)
        return f"X-Timestamp: {now}\r\nX-Nonce: {nonce}\r\nX-Signature: {made}\r\n"

    def request(path, body=b""):
        head = f"POST {path}{fixed}{signature(path, body) if signed else ''}Content-Length: {len(body)}\r\n\r\n"
        return head.encode() + body
    return request


def bus_cycle(request, goal):
    """Publish, claim, fulfil."""
    yield from bus_publish(request, goal)
    status, body = yield request(f"/claim?goal={goal}")
    intent = json.loads(body)
    yield request(f"/fulfill/{intent['id']}", b'{"claim_token":"%s"}' % intent["claim_token"].encode())


def bus_publish(request, goal):
    """Publish."""
    yield request("/intent", b'{"goal":"%s","payload":%s}' % (goal.encode(), PAYLOAD))


def bus_claim(request, goal):
    """Claim what is not there."""
    status, _ = yield request(f"/claim?goal={goal}.nobody")
    assert status == b"204"


def beanstalkd_cycle(request, goal):
    """Put, reserve, delete."""
    yield b"put 100 0 60 %d\r\n%s\r\n" % (len(PAYLOAD), PAYLOAD)
    reserved = yield b"reserve\r\n"
    yield b"delete %s\r\n" % reserved[1]


def http_answer(received):
    """Return (status, body) of the answer that was received, or None while some of it is missing."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return None
    at = received.find(b"Content-Length: ", 0, head) + 16
    length = int(received[at:received.index(b"\r\n", at)]) if at > 15 else 0
    if len(received) < head + 4 + length:
        return None
    if received[9:10] != b"2":
        raise ValueError(received.decode())
    return received[9:12], received[head + 4:]


def beanstalkd_answer(received):
    """Return the words of the answer that was received, or None while some of it is missing."""
    line, end, body = received.partition(b"\r\n")
    words = line.split()
    if not end or words[0] == b"RESERVED" and len(body) < int(words[2]) + 2:
        return None
    if words[0] not in (b"INSERTED", b"RESERVED", b"DELETED"):
        raise ValueError(received.decode())
    return words


SCRIPTS = {
    "cycle": (bus_cycle, http_answer), "publish": (bus_publish, http_answer), "claim": (bus_claim, http_answer),
    "beanstalkd": (beanstalkd_cycle, beanstalkd_answer),
}


# ---- The load: who asks ----

def connected(port):
    """Return a connection to a port of this machine."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def arrived(sock):
    """Return what has arrived, at least a byte."""
    received = sock.recv(65536)
    if not received:
        raise ConnectionError("The server has hung up.")
    return received


class Client:
    """A connection that asks what a coroutine yields, and sends it the answers."""

    def __init__(self, selector, port, playing, answer, close):
        self._selector, self._port, self._playing, self._answer, self._close = selector, port, playing, answer, close
        self._connect()
        self._sock.sendall(next(self._playing))

    def _connect(self):
        self._sock, self._received = connected(self._port), b""
        self._selector.register(self._sock, selectors.EVENT_READ, self.receive)

    def end(self):
        self._selector.unregister(self._sock)
        self._sock.close()

    def receive(self):
        """Take what has arrived, and ask on once it is all there."""
        self._received += arrived(self._sock)
        answer = self._answer(self._received)
        if answer is None:
            return
        self._received = b""
        if self._close:
            self.end()
            self._connect()
        self._sock.sendall(self._playing.send(answer))


def play(port, script, goal, clients, start, seconds, most=None, close=False, signed=False):
    """Let clients play a script, and count its ends for so many seconds from start, or until there are so many.

    Times are those of time.monotonic(), which all processes share.
    """
    ends, selector, request = 0, selectors.DefaultSelector(), bus_requests(close, signed)
    script, answer = SCRIPTS[script]

    def playing():
        nonlocal ends
        while True:
            yield from script(request, goal)
            ends += 1

    def play_until(time_is_up):
        while not time_is_up():
            for ready, _ in selector.select(0.1):
                ready.data()
    crowd = [Client(selector, port, playing(), answer, close) for _ in range(clients)]
    play_until(lambda: time.monotonic() >= start)
    before, cpu, began = ends, time.process_time(), time.monotonic()
    play_until(lambda: time.monotonic() >= began + seconds or most and ends - before >= most)
    took = time.monotonic() - began
    for client in crowd:
        client.end()
    return dict(number=ends - before, seconds=took, cpu=time.process_time() - cpu)


def load_role():
    """Play what each line of stdin says, and print a line with how it went."""
    for line in sys.stdin:
        print(json.dumps(play(**json.loads(line))), flush=True)


Speed = collections.namedtuple("Speed", "rate load server")     # ends a second, and shares of a core


class Load:
    """The processes that make the load."""

    def __init__(self):
        self._processes = [start([sys.executable, HERE, "load"], stdin=subprocess.PIPE, text=True) for _ in range(2)]

    def __call__(self, server, script, clients, seconds, most=None, **more):
        """Return the Speed of so many clients with a script at a server."""
        shares = [clients] if clients <= CLIENTS_PER_PROCESS else [clients // 2, clients - clients // 2]
        begin = time.monotonic() + 0.05 + min(seconds, 5) / 10     # by then all are connected and warm
        for process, share in zip(self._processes, shares):
            asked = dict(more, port=server.port, script=script, clients=share, start=begin, seconds=seconds,
                         goal=more.get("goal", script), most=most and most // len(shares))
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
        time.sleep(max(0, begin - time.monotonic()))
        cpu, began = cpu_seconds(server.pid), time.monotonic()
        found = [json.loads(process.stdout.readline()) for process, _ in zip(self._processes, shares)]
        share = (cpu_seconds(server.pid) - cpu) / (time.monotonic() - began)
        return Speed(sum(each["number"] / each["seconds"] for each in found),
                     sum(each["cpu"] / each["seconds"] for each in found), share)


# ---- The servers ----

Server = collections.namedtuple("Server", "port pid")
STARTED = []     # processes, of which none outlives this one


def start(arguments, stdout=subprocess.PIPE, **options):
    """Start a process that ends with this one; Ctrl-C reaches only this one, which then ends it."""
    process = subprocess.Popen(list(map(str, arguments)), stdout=stdout, start_new_session=True, **options)
    STARTED.append(process)
    return process


def end(process):
    """End a process that start() started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_seconds(pid):
    """Return the processor time that a process has used; not a number where there is no /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except FileNotFoundError:
        return math.nan


def memory_mb(pid):
    """Return the memory of a process (resident set); not a number where there is no /proc."""
    try:
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024
    except FileNotFoundError:
        return math.nan


def answers(port):
    """Return whether there is a server at a port."""
    with contextlib.suppress(OSError):
        connected(port).close()
        return True


def wait_until(fact):
    """Return once fact() is true."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fact():
        if time.monotonic() > deadline:
            raise TimeoutError("what was waited for did not come")
        time.sleep(0.005)


def first_line(*command):
    """Return the first line that a command prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0].strip()


class Bench:
    """What the sections share: the options, the load, a directory, and how to start the servers in it."""

    def __init__(self, options, directory):
        self.options, self.directory, self.load = options, directory, Load()
        self.many = lambda number: max(1, round(number * options.scale))
        self.rq_version = first_line(options.rq_python, "-c", "import rq; print(rq.VERSION)")
        self._grown = None

    def place(self):
        """Return a new directory."""
        return tempfile.mkdtemp(dir=self.directory)

    @contextlib.contextmanager
    def schema(self):
        """Make a new schema in PostgreSQL; return the DSN of it, or None if there is no PostgreSQL."""
        if not self.options.postgres:
            yield None
            return
        import psycopg
        name = f"benchmark_{secrets.token_hex(8)}"
        with psycopg.connect(self.options.postgres, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {name}")
            try:
                yield psycopg.conninfo.make_conninfo(self.options.postgres, options=f"-c search_path={name}")
            finally:
                db.execute(f"DROP SCHEMA {name} CASCADE")

    @contextlib.contextmanager
    def bus(self, postgres=None, **environment):
        """Run the bus, on a file of its own or on a PostgreSQL."""
        program = [HERE.parent / "postgres_bus.py"] if postgres else [PROGRAM, "serve"]
        process = start([sys.executable, *program, "--port", "0", "--db", postgres or f"{self.place()}/bus.db"],
                        stderr=subprocess.DEVNULL, env=dict(os.environ, **environment))
        try:
            yield Server(int(process.stdout.readline().rpartition(b":")[2]), process.pid)
        finally:
            end(process)

    @contextlib.contextmanager
    def _peer(self, program, port_flag, arguments, environment):
        if not shutil.which(program):
            yield None
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = start([program, port_flag, port, *arguments], subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                        env=dict(os.environ, **environment))
        try:
            wait_until(lambda: answers(port))
            yield Server(port, process.pid)
        finally:
            end(process)

    def beanstalkd(self, **environment):
        """Run beanstalkd with an fsync per write, or yield None."""
        return self._peer("beanstalkd", "-p", ["-l", "127.0.0.1", "-b", self.place(), "-f0"], environment)

    def redis(self):
        """Run redis-server with an append-only file and an fsync a second, or yield None."""
        flags = [*"--bind 127.0.0.1 --appendonly yes --appendfsync everysec --dir".split(), self.place(), "--save", ""]
        return self._peer("redis-server" if self.rq_version else "", "--port", flags, {})

    def speed(self, server, script, clients, **more):
        """Return the function that measures the Speed of a script once, or None for a missing server."""
        return server and functools.partial(self.load, server, script, clients, self.options.seconds, **more)

    def medians(self, *runs):
        """Return the median of each run, a function, called in turns; None for None."""
        rounds = [[run and run() for run in runs] for _ in range(self.options.rounds)]
        return [results[0] and sorted(results)[len(results) // 2] for results in zip(*rounds)]

    def compare(self, what, ours, peers, target, peer="beanstalkd"):
        """Return the row of two speeds."""
        ours, peers = self.medians(ours, peers)
        return row(what, ours.rate, peers.rate if peers else NOT_HERE, target, peer, "1/s",
                   load=[found.load for found in (ours, peers) if found],
                   server=[found.server for found in (ours, peers) if found])

    def compare_cycles(self, bus, peer, clients, target=""):
        """Return the row of full cycles with so many clients."""
        return self.compare(f"full cycles, {clients} client{'s' * (clients > 1)}", self.speed(bus, "cycle", clients),
                            self.speed(peer, "beanstalkd", clients), target)

    def grown(self, rows):
        """Return a file with at least so many rows; see fill()."""
        if self._grown is None:
            self._grown = Stored(f"{self.place()}/bus.db")
        self._grown.fill(rows)
        return self._grown


def row(what, ours, peers=None, target="", peer="", unit="", **more):
    """Return a row of the table; what is None is not shown."""
    both = all(isinstance(number, (int, float)) for number in (ours, peers))
    return dict(what=what, intentbus=ours, peer=peer, peers=peers, ratio=ours / peers if both and peers else None,
                target=target, unit=unit, **more)


def plot(names, points, unit):
    """Return a plot in plain text: a line for each (x, [y, ...]), with the first letters of the names at their y."""
    most = max(y for _, values in points for y in values)
    lines = ["", f"{'':>9}  {'  '.join(f'{name:>10}' for name in names)}   0{f'{most:,.3g} {unit}':>60}"]
    for x, values in points:
        line = [" "] * 61
        for name, y in zip(names, values):
            at = round(60 * y / most)
            line[at] = name[0] if line[at] == " " else "*"
        lines.append(f"{x:>9,}  {'  '.join(f'{y:>10,.4g}' for y in values)}   {''.join(line).rstrip()}")
    return "\n".join(lines)


# ---- Many rows, without HTTP ----

TIMES = ("created_at", "run_at", "expires_at", "completed_at", "claim_expires_at", "wake_at")
ROWS_PER_SECOND = 100     # how far apart the stored intents were published


def mix(now):
    """Return 150 intents, as the bus stores them, that many rows are copies of.

    A third has one goal: half of these are delayed, at a higher priority, and most others are at the head, but need
    what the workers here lack. A third has fifty other goals. A third is fulfilled.
    """
    def new(goal="resize", **fields):
        fields = dict(fields, goal=goal, payload=json.loads(PAYLOAD), ttl=intentbus.YEAR_SECONDS)
        return intentbus.Intent.new(now, "owner", "owner", fields)

    def fulfilled(intent):
        intent.update(intent.claimed(now, "0" * 64, intentbus.LEASE_SECONDS, "owner", None))
        intent.update(intent.fulfilled(now + 1, "done", "json"))
        return intent
    return [*(new(priority=900, delay=30 * 86400) for _ in range(25)),
            *(new(priority=800, required_capability="tpu") for _ in range(20)),
            *(new(required_capability=capability) for capability in (None, None, None, "gpu", "arm")),
            *(new(f"goal-{number}") for number in range(50)),
            *(fulfilled(new()) for _ in range(50))]


KINDS = 150


def copies(new_id):
    """Return the SQL of the columns of a copy of one of the kinds, with an id of its own and later times."""
    copied = {name: f"kinds.{name}" for name in intentbus.COLUMNS}
    copied.update((name, f"kinds.{name} + number * 1.0 / {ROWS_PER_SECOND}") for name in TIMES)
    return ", ".join(dict(copied, id=new_id).values())


RECOUNT = "DELETE FROM tallies", """
    INSERT INTO tallies (namespace, publisher, status, intents)
    SELECT namespace, publisher, status, COUNT(*) FROM intents GROUP BY namespace, publisher, status
"""


class Stored:
    """A bus in this process, without sockets, whose commits do not wait for the disk: that would hide all the rest."""

    def __init__(self, path):
        self.path, self.rows, self.seconds, self._began = path, 0, 0, time.time() - 3 * 86400
        self._open()

    def _open(self):
        self.store = intentbus.Store(self.path)
        self.store._db.execute("PRAGMA synchronous = OFF")
        self.bus = intentbus.Bus(self.store)
        self.api = intentbus.API(self.bus, intentbus.Keys(os.environ["INTENT_API_KEY"], self.store))

    def fill(self, rows):
        """Bring the file to so many rows: the database itself copies mix(), with ids and times of their own."""
        if rows <= self.rows:
            return
        began = time.monotonic()
        self.store.close()
        self._copy(dict(first=self.rows, last=rows, began=int(self._began * 1000) << 16, apart=65_536_000 // ROWS_PER_SECOND))
        self._open()
        self.rows, self.seconds = rows, self.seconds + time.monotonic() - began

    def _copy(self, numbers):
        db = sqlite3.connect(self.path, isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -200000"):
            db.execute(f"PRAGMA {pragma}")
        db.execute("CREATE TEMP TABLE kinds AS SELECT * FROM intents LIMIT 0")
        db.executemany(f"INSERT INTO kinds VALUES (:{', :'.join(intentbus.COLUMNS)})", mix(self._began))
        db.execute("BEGIN")
        db.execute(f"""
            WITH RECURSIVE numbers (number) AS (
                SELECT :first WHERE :first < :last
                UNION ALL SELECT number + 1 FROM numbers WHERE number + 1 < :last)
            INSERT INTO intents ({", ".join(intentbus.COLUMNS)})
            SELECT {copies("printf('%016x%016x', :began + number * :apart, number)")}
            FROM   numbers CROSS JOIN kinds ON kinds.rowid = number * 7 % {KINDS} + 1
        """, numbers)
        for statement in RECOUNT:
            db.execute(statement)
        db.execute("COMMIT")
        db.close()

    def life(self, **claim):
        """Publish, claim and fulfil; return the milliseconds of each."""
        times = [time.perf_counter()]
        self.bus.publish("resize", json.loads(PAYLOAD))
        times.append(time.perf_counter())
        intent = self.bus.claim(**claim)
        times.append(time.perf_counter())
        self.bus.fulfill(intent.id, intent.claim_token)
        times.append(time.perf_counter())
        return [1000 * (after - before) for before, after in zip(times, times[1:])]

    def get_ms(self, path):
        """Return the milliseconds that the answer to a GET takes."""
        began = time.perf_counter()
        response = self.api.handle(intentbus.Request("GET", path, {"x-api-key": os.environ["INTENT_API_KEY"]}))
        if response.status != 200:
            raise ValueError(response.body)
        return 1000 * (time.perf_counter() - began)


class StoredInPostgres(Stored):
    """A bus in this process on PostgreSQL, where a publish and a fulfilment do wait for the disk."""

    def _open(self):
        import postgres_bus
        self.store = postgres_bus.PostgresStore(self.path)
        self.bus = intentbus.Bus(self.store)

    def _copy(self, numbers):
        import psycopg
        with psycopg.connect(self.path, autocommit=True, cursor_factory=psycopg.ClientCursor) as db:
            db.execute("CREATE TEMP TABLE kinds AS SELECT 0 AS kind, * FROM intents LIMIT 0")
            for kind, intent in enumerate(mix(self._began)):
                db.execute(f"INSERT INTO kinds VALUES (%s, {', '.join(['%s'] * len(intent))})",
                           [kind, *(intent[name] for name in intentbus.COLUMNS)])
            new_id = "LPAD(TO_HEX(%(began)s + number * %(apart)s), 16, '0') || LPAD(TO_HEX(number), 16, '0')"
            db.execute(f"""
                INSERT INTO intents ({", ".join(intentbus.COLUMNS)})
                SELECT {copies(new_id)}
                FROM   generate_series(CAST(%(first)s AS BIGINT), %(last)s - 1) AS number
                JOIN   kinds ON kinds.kind = number * 7 %% {KINDS}
            """, numbers)
            for statement in (*RECOUNT, "VACUUM (ANALYZE) intents"):
                db.execute(statement)


VERBS = ("publish", "claim", "fulfil")


def lives(number, *buses, **claim):
    """Return, for each bus, the median milliseconds of publish, claim and fulfil; they take turns."""
    times = [[bus.life(**claim) for bus in buses] for _ in range(number)]
    return [[statistics.median(column) for column in zip(*each)] for each in zip(*times)]


# ---- The sections ----
# Each is a function that yields rows, or plots as text.

SECTIONS = {}


def section(function):
    """Make a function a section, by its name."""
    SECTIONS[function.__name__] = function
    return function


@section
def cycles(bench):
    """Full cycles (publish, claim, fulfil; put, reserve, delete), each commit synced to disk."""
    with bench.bus() as bus, bench.beanstalkd() as peer:
        for number, target in ((1, ">= 0.5"), (8, ">= 1.0"), (40, ">= 1.2")):
            yield bench.compare_cycles(bus, peer, number, target)
        yield bench.compare("the same, signed", bench.speed(bus, "cycle", 40, signed=True),
                            bench.speed(peer, "beanstalkd", 40), "")
        yield bench.compare("the same, a connection per request", bench.speed(bus, "cycle", 40, close=True),
                            bench.speed(bus, "cycle", 40), ">= 0.65", "keep-alive")


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


@section
def slow_disk(bench):
    """Full cycles where each fsync takes longer, for both servers."""
    what, shim = f"full cycles, 40 clients, fsync + {SLOW_FSYNC_MS} ms", f"{bench.place()}/slow_fsync.so"
    if not (sys.platform == "linux" and shutil.which("cc")):
        yield row(what, "no cc here", target=">= 8", unit="1/s")
        return
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, "-x", "c", "-", "-ldl"], check=True, text=True,
                   input=SLOW_FSYNC % (1000 * SLOW_FSYNC_MS))
    with bench.bus(LD_PRELOAD=shim) as bus, bench.beanstalkd(LD_PRELOAD=shim) as peer:
        yield bench.compare(what, bench.speed(bus, "cycle", 40), bench.speed(peer, "beanstalkd", 40), ">= 8")


@section
def clients(bench):
    """How the full cycles grow with the number of clients."""
    points, names = [], ["intentbus", "beanstalkd"]
    with bench.bus() as bus, bench.beanstalkd() as peer:
        for number in (1, 2, 4, 8, 16, 40, 100, 200):
            found = bench.compare_cycles(bus, peer, number)
            points.append((number, [found["intentbus"], found["peers"]][:2 if peer else 1]))
            yield found
    yield plot(names[:2 if peer else 1], points, "cycles/s")


@section
def polls(bench):
    """Claims that find nothing, against publishes."""
    with bench.bus() as bus:
        yield bench.compare("empty claims, 8 clients", bench.speed(bus, "claim", 8),
                            bench.speed(bus, "publish", 8), ">= 3", "publishes")


def client_of(server):
    """Return an IntentClient of the bus."""
    return intentbus.IntentClient(f"http://127.0.0.1:{server.port}")


def wall_ms(server, compiled, *command):
    """Return the milliseconds that a command takes, in the program's folder; modules are kept compiled."""
    environment = dict(os.environ, INTENT_BUS_URL=f"http://127.0.0.1:{server.port}", PYTHONPYCACHEPREFIX=compiled)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    subprocess.run(command, env=environment, cwd=PROGRAM.parent, check=True,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - began)


def publish_jobs(server, goal, number):
    """Publish so many intents."""
    for first in range(0, number, 1000):
        client_of(server).publish_many([dict(goal=goal, payload=n) for n in range(first, min(first + 1000, number))])


def listen_role(port, goal, number):
    """Listen with a handler that returns when it started, and print how many a second that were."""
    began = time.monotonic()
    client_of(Server(port, None)).listen(goal, lambda payload: time.monotonic(), max_jobs=int(number))
    print(int(number) / (time.monotonic() - began))


def rq_role(port, kind, number):
    """Work off so many jobs of RQ, and print how many a second that were, its start not counted."""
    import redis
    import rq
    queue = rq.Queue(connection=redis.Redis(port=int(port)))
    queue.enqueue_many([rq.Queue.prepare_data("time.monotonic") for _ in range(int(number))])
    worker = {"simple": rq.SimpleWorker, "forking": rq.Worker}[kind]([queue], connection=queue.connection)
    began = time.monotonic()
    worker.work(burst=True, logging_level="WARNING")
    took = time.monotonic() - began
    if queue.finished_job_registry.count < int(number):
        raise ValueError("RQ has not finished its jobs")
    queue.finished_job_registry.cleanup(time.time() + 86400)
    print(int(number) / took)


def printed_rate(*command):
    """Return the number that a command of ours prints."""
    process = start(command, text=True)
    return Speed(float(process.communicate(timeout=10 * PATIENCE_SECONDS)[0]), math.nan, math.nan)


def rq_rate(bench, redis, kind, number):
    """Return the function that measures RQ once, or None if it is not here."""
    return redis and functools.partial(printed_rate, bench.options.rq_python, HERE, "rq", redis.port, kind, number)


@section
def listen(bench):
    """A trivial handler in Python, one worker."""
    number = bench.many(2000)
    with bench.bus() as bus, bench.redis() as redis:
        def ours():
            publish_jobs(bus, "listen", number)
            return printed_rate(sys.executable, HERE, "listen", bus.port, "listen", number)
        yield bench.compare("listen, a trivial handler", ours, rq_rate(bench, redis, "simple", number), ">= 4",
                            "RQ SimpleWorker")


@section
def programs(bench):
    """A program for each intent, four at once, against a fork for each job; ours with the start of the worker."""
    number = bench.many(200)
    with bench.bus() as bus, bench.redis() as redis:
        def ours():
            publish_jobs(bus, "programs", number)
            took = wall_ms(bus, bench.place(), sys.executable, PROGRAM, *"work --goal programs --drain -j 4 -- true".split())
            return Speed(1000 * number / took, math.nan, math.nan)
        yield bench.compare("work -j 4 -- true", ours, rq_rate(bench, redis, "forking", number), ">= 5", "RQ Worker")
        ended = client_of(bus).admin("summary").intents["default"]
        if ended != {"fulfilled": number * bench.options.rounds}:
            raise ValueError(f"not all intents are fulfilled: {ended}")


@section
def growth(bench):
    """How publish, claim and fulfil grow with what is stored; in this process, without the disk's fsync."""
    most = math.log10(bench.options.rows)
    sizes = [round(10 ** (half / 2)) for half in range(6, math.ceil(2 * most))] + [bench.options.rows]
    points = []
    for size in sizes:
        points.append((size, lives(bench.many(1000), bench.grown(size), goal="resize")[0]))
        for verb, median in zip(VERBS, points[-1][1]):
            yield row(f"{verb}, {size:,} rows", median, unit="ms", plotted=True)
    yield plot(VERBS, points, "ms")


@section
def rows(bench):
    """A full table against an empty one; in this process, without the disk's fsync."""
    full, empty = bench.grown(bench.options.rows), Stored(f"{bench.place()}/empty.db")
    size = os.path.getsize(full.path) / 1e6
    yield f"filled to {full.rows:,} rows, {size:,.0f} MB, in {full.seconds:.1f} s, by SQL from copies of 150 intents"
    for name, claim in (("goal given", dict(goal="resize")), ("goal not given", {}),
                        ("two capabilities", dict(goal="resize", capabilities=("gpu", "arm")))):
        among, alone = lives(bench.many(1000), full, empty, **claim)
        yield row(f"claim, {name}, {full.rows:,} rows", among[1], alone[1], "<= 1.5", "empty table", "ms")
    yield row(f"publish, {full.rows * 2 // 3:,} open", among[0], alone[0], "<= 1.3", "empty table", "ms")
    yield row(f"fulfil, {full.rows:,} rows", among[2], alone[2], "", "empty table", "ms")
    some = full.bus.list(limit=1).intents[0]["id"]
    for name, path in (("status", f"/status/{some}"), ("list", "/intents"), ("list, of a goal", "/intents?goal=goal-7"),
                       ("list, of an unknown goal", "/intents?goal=unknown"), ("list, dead", "/intents?status=dead"),
                       ("summary", "/admin/summary"), ("metrics", "/metrics")):
        median = statistics.median(full.get_ms(path) for _ in range(5))
        yield row(f"{name}, {full.rows:,} rows", median, target="<= 50 ms", unit="ms")


def held(server):
    """Return how many requests the bus holds."""
    return client_of(server).admin("summary").held_requests


def delays(what, times, median="", p99=""):
    """Yield the rows of how long something took, with the targets of median and 99th percentile."""
    yield row(f"{what}, median", statistics.median(times), target=median, unit="ms")
    yield row("the same, p99", sorted(times)[int(0.99 * len(times))], target=p99, unit="ms")


def ask(sock, request):
    """Send a request; return the time at which that was begun."""
    began = time.monotonic()
    sock.sendall(request)
    return began


def receive(sock):
    """Return the answer that comes, and the time at which it had come."""
    received = b""
    while (answer := http_answer(received)) is None:
        received += arrived(sock)
    return answer, time.monotonic()


@section
def handoff(bench):
    """From the call of publish to where a waiting worker has the intent."""
    number = bench.many(200)
    with bench.bus() as bus:
        worker, client, times = start([sys.executable, HERE, "listen", bus.port, "handoff", number]), client_of(bus), []
        for _ in range(number):
            wait_until(lambda: held(bus))
            called = time.monotonic()
            intent = client.publish("handoff", 1)
            times.append(1000 * (client.get_result(intent.id, wait=PATIENCE_SECONDS).result - called))
        worker.wait(PATIENCE_SECONDS)
        yield from delays("publish() to handler start in listen()", times, "< 2 ms", "< 10 ms")
        yield from delays("publish sent to claim answered", raw_handoffs(number, bus, bus))


def raw_handoffs(number, bus, other):
    """Return the milliseconds from when a publish is sent to a bus to when a claim that another holds is answered."""
    request, times = bus_requests(False, False), []
    with connected(bus.port) as publisher, connected(other.port) as waiting:
        for _ in range(number):
            ask(waiting, request(f"/claim?goal=raw&wait={PATIENCE_SECONDS}"))
            wait_until(lambda: held(other))
            sent = ask(publisher, next(bus_publish(request, "raw")))
            times.append(1000 * (receive(waiting)[1] - sent))
            receive(publisher)
    return times


@section
def parked(bench):
    """A thousand workers that wait."""
    workers, request, times = 1000, bus_requests(False, False), []
    allow_files(workers + 100)
    with bench.bus() as bus, contextlib.ExitStack() as sockets, selectors.DefaultSelector() as selector:
        held(bus)
        before = memory_mb(bus.pid)
        for _ in range(workers):
            sock = sockets.enter_context(connected(bus.port))
            ask(sock, request(f"/claim?goal=parked&wait={PATIENCE_SECONDS}"))
            selector.register(sock, selectors.EVENT_READ)
        wait_until(lambda: held(bus) == workers)
        memory, cpu, seconds = memory_mb(bus.pid), cpu_seconds(bus.pid), min(10, 2 * bench.options.seconds)
        time.sleep(seconds)
        idle = 100 * (cpu_seconds(bus.pid) - cpu) / seconds
        with connected(bus.port) as publisher:
            for _ in range(bench.many(200)):
                sent = ask(publisher, next(bus_publish(request, "parked")))
                woken = selector.select(PATIENCE_SECONDS)[0][0].fileobj
                times.append(1000 * (receive(woken)[1] - sent))
                receive(publisher)
                selector.unregister(woken)
        yield row(f"memory with {workers:,} parked workers", memory, target="<= 60 MB", unit="MB")
        yield row("of which for them", memory - before, unit="MB")
        yield row("CPU while nothing happens", idle, target="< 1 %", unit="%")
        yield from delays("publish sent to claim answered", times, "", "< 2 ms")


def allow_files(number):
    """Let this process open so many files, if it may."""
    with contextlib.suppress(ImportError):
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if 0 <= soft < number:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard) if hard >= 0 else number, hard))


@section
def process(bench):
    """What cron starts: a process that publishes."""
    compiled = bench.place()
    with bench.bus() as bus:
        times = [[wall_ms(bus, compiled, sys.executable, *rest) for rest in (
            ("-I", "-S", PROGRAM, "publish", "cron", "{}"), ("-S", "-m", "intentbus", "publish", "cron", "{}"),
            ("-I", "-S", "-c", "import urllib.request"))] for _ in range(bench.many(20))]
        ours, kept, peers = map(statistics.median, zip(*times))
        yield row("publish, the whole process", ours, peers, "<= 1.2", "import urllib.request", "ms")
        yield row("the same as -m intentbus, which is kept compiled", kept, peers, "<= 1.2", "import urllib.request", "ms")


@section
def memory(bench):
    """What the server holds on to."""
    few, many = bench.many(10_000), bench.options.cycles
    with bench.bus() as bus:
        bench.load(bus, "cycle", 8, 3600, most=few)
        early = memory_mb(bus.pid)
        bench.load(bus, "cycle", 8, 3600, most=max(1, many - few))
        yield row(f"memory after {many:,} cycles", memory_mb(bus.pid), early, "<= 1.1", f"after {few:,}", "MB")


def procrastinate_role(dsn, clients, seconds):
    """Defer, fetch and finish jobs of procrastinate, so many at once, and print how many a second that were."""
    import asyncio
    import procrastinate
    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, min_size=int(clients), max_size=int(clients)))
    task = app.task(name="task", queue="queue")(lambda **payload: None)

    async def play():
        async with app.open_async():
            if not await app.check_connection_async():
                await app.schema_manager.apply_schema_async()
            worker, ends, began = await app.job_manager.register_worker(), 0, time.monotonic()

            async def client():
                nonlocal ends
                while time.monotonic() < began + float(seconds):
                    await task.defer_async(**json.loads(PAYLOAD))
                    if job := await app.job_manager.fetch_job(["queue"], worker):     # another client may have had it
                        await app.job_manager.finish_job(job, procrastinate.jobs.Status.SUCCEEDED, delete_job=False)
                        ends += 1
            await asyncio.gather(*(client() for _ in range(int(clients))))
            print(ends / (time.monotonic() - began))
    asyncio.run(play())


@section
def postgres(bench):
    """Full cycles on PostgreSQL, against those on a file, and those of procrastinate, which has no HTTP, on the same server."""
    with bench.schema() as dsn, bench.schema() as place, contextlib.ExitStack() as running:
        if not dsn:
            yield row("full cycles on PostgreSQL", NOT_HERE, unit="1/s")
            return
        bus, file = running.enter_context(bench.bus(dsn)), running.enter_context(bench.bus())
        for clients in (1, 8, 40):
            peer = None
            if importlib.util.find_spec("procrastinate"):
                peer = functools.partial(printed_rate, sys.executable, HERE, "procrastinate", place, clients, bench.options.seconds)
            ours, files, peers = bench.medians(bench.speed(bus, "cycle", clients), bench.speed(file, "cycle", clients), peer)
            yield row(f"full cycles on PostgreSQL, {clients} client{'s' * (clients > 1)}", ours.rate, files.rate, "", "on a file",
                      "1/s", load=[ours.load, files.load], server=[ours.server, files.server])
            yield row("the same", ours.rate, peers.rate if peers else NOT_HERE, "", "procrastinate", "1/s")
        other = running.enter_context(bench.bus(dsn))
        yield from delays("publish at one bus to claim answered at another", raw_handoffs(bench.many(200), bus, other))


@section
def postgres_rows(bench):
    """Full tables in PostgreSQL against empty ones; in this process, after as many cycles as are measured."""
    with bench.schema() as place, bench.schema() as other:
        if not place:
            yield row("claims in PostgreSQL", NOT_HERE, unit="ms")
            return
        full, empty = StoredInPostgres(place), StoredInPostgres(other)
        full.fill(bench.options.rows)
        yield f"filled to {full.rows:,} rows, {full.store.bytes()[0] / 1e6:,.0f} MB, in {full.seconds:.1f} s"
        for name, claim in (("goal given", dict(goal="resize")), ("goal not given", {}),
                            ("two capabilities", dict(goal="resize", capabilities=("gpu", "arm")))):
            lives(bench.many(300), full, empty, **claim)
            among, alone = lives(bench.many(300), full, empty, **claim)
            yield row(f"claim, {name}, {full.rows:,} rows", among[1], alone[1], "<= 1.5", "empty table", "ms")
        yield row(f"publish, {full.rows:,} rows", among[0], alone[0], "", "empty table", "ms")
        yield row(f"fulfil, {full.rows:,} rows", among[2], alone[2], "", "empty table", "ms")
        full.store.close()
        empty.store.close()


@section
def floor(bench):
    """What SQLite and http.server cost by themselves."""
    db = sqlite3.connect(f"{bench.place()}/floor.db", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, payload TEXT)")
    began = time.monotonic()
    while (took := time.monotonic() - began) < bench.options.seconds:
        db.execute("INSERT INTO rows (payload) VALUES (?)", (PAYLOAD * 10,))
    commits = db.execute("SELECT MAX(number) FROM rows").fetchone()[0] / took
    db.close()
    yield row("SQLite commits, FULL, one connection", commits, unit="1/s")
    server = start([sys.executable, HERE, "httpd"], stderr=subprocess.DEVNULL)
    found, = bench.medians(bench.speed(Server(int(server.stdout.readline()), server.pid), "publish", 8))
    end(server)
    yield row("requests of an empty http.server, 8 clients", found.rate, unit="1/s", load=[found.load],
              server=[found.server])


class Empty(http.server.BaseHTTPRequestHandler):
    """Reads a request and answers nothing, as fast as http.server can: kept alive, one write, no Nagle."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", 65536, True

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def httpd_role():
    """Serve, and print the port."""
    http.server.ThreadingHTTPServer.request_queue_size = 1024     # with 5, the default, clients wait to connect
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Empty) as server:
        print(server.server_port, flush=True)
        server.serve_forever()


# ---- The report ----

def machine(bench):
    """Return what the figures are of: the machine, the versions, and what each server does before it answers."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = pathlib.Path("/proc/cpuinfo").read_text().partition("model name")[2].split("\n")[0].strip("\t :") or cpu
    beanstalkd = shutil.which("beanstalkd") and first_line("beanstalkd", "-v")
    redis = shutil.which("redis-server") and bench.rq_version
    return {
        "CPU": f"{os.cpu_count()} x {cpu}",
        "system": f"{platform.system()} {platform.release()}, load average " + " ".join(
            f"{number:.1f}" for number in getattr(os, "getloadavg", tuple)()),
        "Python": f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "directory": f"{bench.directory} on {file_system(bench.directory)}",
        "measured": f"{bench.options.rounds} rounds of {bench.options.seconds:g} s",
        "intentbus": f"{intentbus.__version__}: SQLite's WAL, synchronous=FULL, an fsync before each answer to a write",
        "beanstalkd": f"{beanstalkd}: -b DIR -f0, an fsync before each answer to a write" if beanstalkd else NOT_HERE,
        "RQ": f"{redis} on {first_line('redis-server', '--version')[:21]}: appendfsync everysec" if redis else NOT_HERE,
    }


def file_system(path):
    """Return the kind of file system that a path is on."""
    try:
        mounts = [line.split()[1:3] for line in open("/proc/mounts", encoding="utf-8")]
    except OSError:
        return "an unknown file system"
    within = [(len(place), kind) for place, kind in mounts if os.path.commonpath([place, path]) == place]
    return max(within)[1] if within else "an unknown file system"


def shown(value):
    """Return a value as the table shows it."""
    if not isinstance(value, (int, float)):
        return value or ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def percents(shares):
    """Return shares as percentages, those that are known."""
    return " / ".join(f"{100 * share:.0f} %" for share in shares if not math.isnan(share))


LINE = "{:<46} {:<4}{:>13} {:>9}  {:<22}{:>6}  {:<9} {:<14} {}"     # what, unit, ..., load, server


def table_line(found):
    """Return a row as a line of text."""
    ratio = f"{found['ratio']:.2f}" if found["ratio"] else ""
    load, server = percents(found.get("load", ())), percents(found.get("server", ()))
    return LINE.format(found["what"], found["unit"], shown(found["intentbus"]), shown(found["peers"]), found["peer"],
                       ratio, found["target"], load, server).rstrip()


def report(bench, names):
    """Run sections, print their tables as they come, or all as JSON in the end."""
    say = functools.partial(print, file=sys.stderr if bench.options.json else sys.stdout, flush=True)
    about, results = machine(bench), []
    for name, value in about.items():
        say(f"{name + ':':<12} {value}")
    say("\n" + LINE.format("what", "unit", "intentbus", "peer", "", "ratio", "target", "load", "server"))
    for name in names:
        say(f"\n{name}: {SECTIONS[name].__doc__}")
        for found in SECTIONS[name](bench):
            if isinstance(found, str):
                say(found)
                continue
            results.append(dict(section=name, **found))
            if not found.get("plotted"):
                say(table_line(found))
    if bench.options.json:
        known = json.loads(json.dumps(results), parse_constant=lambda not_a_number: None)
        print(json.dumps(dict(machine=about, rows=known), indent=1))


def options_of(arguments):
    """Return the options; --quick is other defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form, in about a minute")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAME,...", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, help="of each measurement (default 3, quick 1)")
    parser.add_argument("--seconds", type=float, help="of each measurement in a round (default 3, quick 0.5)")
    parser.add_argument("--rows", type=int, help="in the big tables (default 100000, quick 10000)")
    parser.add_argument("--cycles", type=int, help="in the section memory (default 100000, quick 4000)")
    parser.add_argument("--dir", help="where the databases are for the time being (default: where temporary files are)")
    parser.add_argument("--rq-python", default=sys.executable, metavar="PATH", help="a Python that can import rq")
    parser.add_argument("--postgres", metavar="DSN", help="a PostgreSQL server (default: without)")
    parser.add_argument("--json", action="store_true", help="print JSON, and the table on stderr")
    options = parser.parse_args(arguments)
    quick = dict(rounds=1, seconds=0.5, rows=10_000, cycles=4_000)
    for name, value in (quick if options.quick else dict(rounds=3, seconds=3, rows=100_000, cycles=100_000)).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.scale = 0.2 if options.quick else 1
    unknown = set(options.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"there is no section {', '.join(sorted(unknown))}")
    return options


def main(arguments):
    """Measure, and clean up whatever happens."""
    roles = {"load": load_role, "listen": listen_role, "rq": rq_role, "procrastinate": procrastinate_role, "httpd": httpd_role}
    if arguments and arguments[0] in roles:
        return roles[arguments[0]](*arguments[1:])
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
            for process in STARTED:
                end(process)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
