"""The tests of intentbus, in the order of its parts. Run: python -m pytest -q

Real parts throughout: a real server on port 0, real processes, a real SQLite file. INTENTBUS_TEST_SLOW=1 adds the long ones.
"""

import ast
import bisect
import collections
import contextlib
import inspect
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import symtable
import sys
import threading
import time
from pathlib import Path

import pytest

import intentbus
from intentbus import API, Bus, Caller, Intent, IntentClient, Keys, Reject, Store, Worker, listen

HERE = Path(__file__).parent
SOURCE = (HERE / "intentbus.py").read_text()
KEY = "k" * 48
SLOW = pytest.mark.skipif(not os.environ.get("INTENTBUS_TEST_SLOW"), reason="INTENTBUS_TEST_SLOW is not set")
POSIX = pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")


class Clock:
    """A wall clock and a steady one, both moved by hand."""

    def __init__(self):
        self.wall, self.steady = 1_800_000_000.0, 5.0

    def pass_(self, seconds):
        self.wall += seconds
        self.steady += seconds

    def set(self, seconds):
        self.wall += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "bus.db")
    yield store
    store.close()


@pytest.fixture
def bus(store, clock):
    """A bus at a time that stands still until a test moves it."""
    bus = Bus(store, clock=lambda: clock.wall, steady=lambda: clock.steady, jitter=lambda: 0.5)
    yield bus
    bus.stop()


@contextlib.contextmanager
def serving(store, **options):
    """A real server on a free port; yields the server, its bus as server.api.bus."""
    server = intentbus.http_server(API(Bus(store), Keys(KEY), **options), port=0)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def server(store):
    with serving(store) as server:
        yield server


@pytest.fixture
def client(server):
    return IntentClient(f"http://127.0.0.1:{server.server_port}", KEY)


def wait_until(fact, seconds=20):
    """Return what fact() returns once that is true."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not (found := fact()):
        assert time.monotonic() < deadline, "what was waited for did not come"
        pause.wait(0.01)
    return found


def in_thread(function, *args, **kwargs):
    """Run a function in a thread; return a function that waits for its result."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function(*args, **kwargs)), daemon=True)
    thread.start()

    def result():
        thread.join(20)
        assert results, "the thread did not end"
        return results[0]
    return result


def held(bus):
    """How many requests a bus holds."""
    return sum(map(len, bus._waiting._held.values()))


# ---- 0. The whole ----

def parts():
    """The parts of the module: (number, name, first line)."""
    return [(int(number), name, SOURCE[:SOURCE.index(f"# ---- {number}. {name} ----")].count("\n") + 1)
            for number, name in re.findall(r"^# ---- (\d+)\. (\w+) ----$", SOURCE, re.M)]


def test_the_map_in_the_docstring_is_the_outline_of_the_module():
    in_docstring = re.findall(r"^ +(\d+)\. (\w+)", intentbus.__doc__, re.M)
    assert [(int(number), name) for number, name in in_docstring] == [part[:2] for part in parts()]
    assert [number for number, _, _ in parts()] == list(range(1, 14))


def test_each_part_uses_only_the_parts_above_it():
    lines = [first for _, _, first in parts()]
    table = symtable.symtable(SOURCE, "intentbus.py", "exec")
    defined = {}
    for node in ast.parse(SOURCE).body:
        for target in node.targets if isinstance(node, ast.Assign) else [node]:
            defined.setdefault(getattr(target, "id", getattr(target, "name", None)), bisect.bisect(lines, node.lineno))
    low = []
    scopes = table.get_children()
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        part = bisect.bisect(lines, scope.get_lineno())
        low += [f"{scope.get_name()} (line {scope.get_lineno()}) uses {symbol.get_name()}" for symbol in scope.get_symbols()
                if symbol.is_global() and symbol.is_referenced() and defined.get(symbol.get_name(), 0) > part]
    assert defined["IntentClient"] == 11 and not low


def test_only_the_standard_library_is_imported():
    names = {alias.name for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.ImportFrom)}
    if sys.version_info < (3, 10):
        pytest.skip("this Python has no list of its standard library")
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_a_publish_pays_for_no_server_and_no_database():
    code = ("import sys, intentbus; intentbus.IntentClient('http://127.0.0.1:9', 'k')\n"
            "print({'sqlite3', 'http.server', 'socketserver', 'subprocess'} & set(sys.modules))")
    assert run_python("-c", code).stdout == "set()\n"


def test_every_setting_says_its_reason():
    numbers = re.findall(r"^([A-Z_]+) = \(?[\d.]+[^#]*(#.*)?$", SOURCE[:SOURCE.index("# ---- 2.")], re.M)
    assert len(numbers) > 30
    assert not [name for name, reason in numbers if not reason and not name.endswith("MAX_SECONDS")]


# ---- 3. Intent ----

def published(now=1000.0, **fields):
    defaults = dict(goal="g", payload=1, namespace="default", visibility="private", priority=100, delay=0, run_at=None,
                    ttl=3600, max_attempts=3, backoff_base=5, target_worker=None, required_capability=None)
    return Intent.new(now, "owner", **dict(defaults, **fields))


def claimed(**fields):
    intent = published(**fields)
    intent.update(intent.claimed(1000.0, "hash", 60, "owner", None))
    return intent


def test_ids_are_32_hex_digits_that_sort_by_time():
    ids = [intentbus.new_id(1_800_000_000 + ms / 1000) for ms in range(100)]
    assert ids == sorted(ids) and len(set(ids)) == 100
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in ids)


def test_an_intent_reads_both_ways():
    intent = published()
    assert intent["goal"] == intent.goal == "g"
    with pytest.raises(AttributeError, match="there is no colour in this Intent"):
        intent.colour


@pytest.mark.parametrize("change, status, ready, wake_at", [
    (lambda i: i.claimed(1000, "h", 60, "o", None), "claimed", 0, 1060),
    (lambda i: i.claimed(1000, "h", 9999, "o", None), "claimed", 0, 4600),
    (lambda i: i.fulfilled(1000, {"a": 1}, "json"), "fulfilled", 0, None),
    (lambda i: i.failed(1000, "no", True, 1), "open", 0, 1011),
    (lambda i: i.failed(1000, "no", False, 1), "dead", 0, None),
    (lambda i: i.released(1000, 0), "open", 1, 4600),
    (lambda i: i.released(1000, 7), "open", 0, 1007),
    (lambda i: i.cancelled(1000), "dead", 0, None),
    (lambda i: i.woken(1060), "open", 1, 4600),
    (lambda i: i.woken(4600), "dead", 0, None),
], ids=["claimed", "claimed beyond expiry", "fulfilled", "failed", "failed for good", "released", "released for later",
        "cancelled", "lease over", "expired"])
def test_what_happens_to_a_claimed_intent(change, status, ready, wake_at):
    changes = change(claimed())
    assert (changes.get("status", "claimed"), changes.get("ready", 0), changes["wake_at"]) == (status, ready, wake_at)


@pytest.mark.parametrize("attempt, delay", [(1, 11), (2, 21), (3, 41), (10, 3600)])
def test_backoff_doubles_with_each_attempt_up_to_an_hour(attempt, delay):
    intent = claimed(max_attempts=20, ttl=86400)
    intent["claim_attempts"] = attempt
    assert intent.failed(1000, "no", True, jitter=1)["run_at"] == 1000 + delay


# ---- 4. Store ----

def add(store, *intents):
    store.add(list(intents), Intent(), 0)


def test_the_file_is_its_owners_alone_and_says_what_the_protocol_says(store):
    add(store, published())
    assert stat.S_IMODE(os.stat(store.path).st_mode) == 0o600 or os.name != "posix"
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        assert db.execute("SELECT goal, status, priority, payload FROM intents").fetchall() == [("g", "open", 100, "1")]
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("PRAGMA user_version").fetchone() == (len(intentbus.MIGRATIONS),)


def test_every_write_is_synced(store):
    assert store._db.execute("PRAGMA synchronous").fetchone().synchronous == 2


def test_operations_of_many_threads_share_commits_and_a_failure_hurts_nobody_else(store):
    commits = []
    store.on_commit = lambda intents: commits.append(len(intents))
    errors = []

    def publish(number):
        try:
            add(store, *[published(payload=number)] * (2 if number % 10 == 0 else 1))     # the same id twice: refused
        except sqlite3.IntegrityError:
            errors.append(number)

    with store._writing:     # a slow commit: all that comes meanwhile queues up behind it
        threads = [threading.Thread(target=publish, args=(number,)) for number in range(50)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(store._jobs) == 50)
    for thread in threads:
        thread.join()
    assert sorted(errors) == [0, 10, 20, 30, 40]
    assert commits == [45] and len(store.list(100)) == 45


def test_a_commit_that_fails_fails_everyone_in_it_and_the_next_one_works(store, monkeypatch):
    class Broken:
        def __init__(self, db):
            self.db = db

        def __getattr__(self, name):
            return getattr(self.db, name)

        def execute(self, statement, *args):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("database or disk is full")
            return self.db.execute(statement, *args)

    monkeypatch.setattr(store, "_db", Broken(store._db))
    with pytest.raises(intentbus.StorageFull, match="nothing of this request was stored"):
        add(store, published())
    monkeypatch.undo()
    add(store, published())
    assert len(store.list(10)) == 1


def test_a_second_store_on_the_same_file_is_refused_in_words(store):
    with pytest.raises(intentbus.SetupError, match="Another bus is serving .*bus.db; stop it, or"):
        Store(store.path)


@POSIX
def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path):
    path = tmp_path / "bus.db"
    process = subprocess.Popen([sys.executable, "-c", "import intentbus, sys; store = intentbus.Store(sys.argv[1])\n"
                                "print('open', flush=True); input()", str(path)], cwd=HERE, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"open\n"
    process.kill()
    process.communicate()
    Store(path).close()


def plan(store, statement, **values):
    rows = store._db.execute("EXPLAIN QUERY PLAN " + statement, values).fetchall()
    return " / ".join(row.detail for row in rows)


def test_claims_and_deadlines_neither_scan_nor_sort(store):
    claims = [plan(store, intentbus.HEAD_OF_LANE, lane="x"), plan(store, intentbus.HEAD_OF_NEXT_LANE, after="a", end="b")]
    assert claims == ["SEARCH intents USING INDEX intents_ready (lane=?)",
                      "SEARCH intents USING INDEX intents_ready (lane>? AND lane<?)"]
    statements = []
    store._db.set_trace_callback(statements.append)
    store.settle(1000)
    store.clean(1000, 7)
    store._db.set_trace_callback(None)
    plans = [plan(store, s) for s in statements if re.match(r"\s*(SELECT|DELETE|UPDATE)", s)]
    assert len(plans) == 3 and not [p for p in plans if "SCAN" in p or "TEMP B-TREE" in p]


def test_the_next_wake_is_one_look_into_an_index(store):
    add(store, published(), published(now=2000.0))
    assert store.next_wake() == 1000 + 3600
    assert "intents_wake" in plan(store, "SELECT MIN(wake_at) AS wake_at FROM intents WHERE wake_at IS NOT NULL")


def test_what_has_ended_is_deleted_after_its_retention_and_not_before(store):
    done, waiting = published(), published()
    add(store, done, waiting)
    store.change(done.id, lambda intent: intent.fulfilled(1000, None, "json"))
    store.clean(1000 + 59, retention=60)
    assert len(store.list(10)) == 2
    store.clean(1000 + 60, retention=60)
    assert [intent.id for intent in store.list(10)] == [waiting.id]


@pytest.mark.parametrize("prepare, sentence", [
    ("PRAGMA user_version = 999", "was written by a newer intentbus \\(schema 999"),
    ("CREATE TABLE recipes (name)", "belongs to another program"),
])
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, prepare, sentence):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute(prepare)
        db.commit()
    before = path.read_bytes()
    with pytest.raises(intentbus.SetupError, match=sentence):
        Store(path)
    assert path.read_bytes()[100:] == before[100:]


def test_what_is_no_database_is_refused_in_words(tmp_path):
    (tmp_path / "notes.txt").write_text("milk, bread, and a lot of other things that are no database " * 20)
    with pytest.raises(intentbus.SetupError, match="cannot be used: file is not a database"):
        Store(tmp_path / "notes.txt")
    with pytest.raises(intentbus.SetupError, match="cannot be opened: No such file or directory"):
        Store(tmp_path / "nowhere" / "bus.db")


# ---- 5. Bus ----

ALICE = Caller("k1", "alice", "both", False)
BOB = Caller("k2", "bob", "both", False)


def test_an_intent_goes_from_its_publisher_to_a_worker_and_its_result_back(bus):
    answer = bus.publish("greet", {"name": "Ada"})
    intent = bus.claim("greet", worker_id="w1")
    assert (intent.id, intent.payload, intent.claim_attempts, intent.claim_timeout) == (answer.id, {"name": "Ada"}, 1, 60)
    bus.fulfill(intent.id, intent.claim_token, {"said": "hi"})
    found = bus.get_result(answer.id)
    assert (found.status, found.result, found.result_type) == ("fulfilled", {"said": "hi"}, "json")
    assert bus.claim("greet") is None


def test_a_silent_worker_loses_its_intent_to_another(bus, clock):
    bus.publish("g", 1)
    first = bus.claim("g")
    clock.pass_(59.9)
    assert bus.claim("g") is None
    clock.pass_(0.1)
    second = bus.claim("g")
    assert (second.id, second.claim_attempts) == (first.id, 2)
    for late in (bus.fulfill, bus.fail, bus.release, bus.extend_claim):
        with pytest.raises(intentbus.NotFound, match="drop the job"):
            late(first.id, first.claim_token)
    bus.fulfill(second.id, second.claim_token)


def test_work_done_after_the_lease_counts_unless_somebody_else_has_claimed_it(bus, clock):
    bus.publish("g", 1, max_attempts=1)
    intent = bus.claim("g")
    clock.pass_(61)
    assert bus.get_status(intent.id).status == "dead"
    with pytest.raises(intentbus.NotFound):
        bus.extend_claim(intent.id, intent.claim_token)
    bus.fulfill(intent.id, intent.claim_token, "done")
    assert bus.get_result(intent.id).result == "done"


@pytest.mark.parametrize("verb, others", [("fulfill", ("fail", "release")), ("fail", ("fulfill", "release")),
                                          ("release", ("fulfill", "fail"))])
def test_a_report_may_be_repeated_and_not_be_contradicted(bus, verb, others):
    bus.publish("g", 1)
    intent = bus.claim("g")
    first = getattr(bus, verb)(intent.id, intent.claim_token)
    status = bus.get_status(intent.id)
    assert getattr(bus, verb)(intent.id, intent.claim_token) == first
    for other in others + ("extend_claim",):
        with pytest.raises(intentbus.NotFound):
            getattr(bus, other)(intent.id, intent.claim_token)
    assert bus.get_status(intent.id) == status


def test_without_a_token_the_owner_of_the_running_claim_may_report(bus, clock):
    bus.publish("g", 1, visibility="public")
    intent = bus.claim("g", caller=ALICE)
    with pytest.raises(intentbus.NotFound):
        bus.fulfill(intent.id, caller=BOB)
    bus.fulfill(intent.id, caller=ALICE)
    with pytest.raises(intentbus.NotFound):
        bus.fulfill(intent.id, caller=ALICE)


def test_a_bus_can_insist_on_tokens(store):
    bus = Bus(store, require_claim_token=True)
    bus.publish("g", 1)
    intent = bus.claim("g")
    with pytest.raises(intentbus.Invalid, match="claim_token is required"):
        bus.fulfill(intent.id)
    bus.fulfill(intent.id, intent.claim_token)


def test_an_extension_moves_the_end_of_the_lease(bus, clock):
    bus.publish("g", 1)
    intent = bus.claim("g")
    clock.pass_(50)
    assert bus.extend_claim(intent.id, intent.claim_token, 30).claim_expires_at == clock.wall + 30
    clock.pass_(29)
    assert bus.claim("g") is None
    clock.pass_(1)
    assert bus.claim("g").id == intent.id


def test_a_failure_is_tried_again_after_its_backoff_until_no_attempt_is_left(bus, clock):
    bus.publish("g", 1, max_attempts=2, backoff_base=5)
    intent = bus.claim("g")
    answer = bus.fail(intent.id, intent.claim_token, "x" * 3000)
    assert (answer.status, answer.run_at) == ("open", clock.wall + 5 * 2 + 1)
    assert bus.get_status(intent.id).last_error == "x" * 2000
    assert bus.claim("g") is None
    clock.pass_(11)
    again = bus.claim("g")
    assert bus.fail(again.id, again.claim_token, "still no").status == "dead"
    assert bus.get_result(again.id).error == "still no"


def test_a_release_gives_the_attempt_back(bus, clock):
    bus.publish("g", 1)
    intent = bus.claim("g")
    assert bus.release(intent.id, intent.claim_token, delay=30).run_at == clock.wall + 30
    assert bus.claim("g") is None
    clock.pass_(30)
    assert bus.claim("g").claim_attempts == 1


@pytest.mark.parametrize("claim_first", [False, True])
def test_what_nobody_finishes_in_time_expires(bus, clock, claim_first):
    answer = bus.publish("g", 1, ttl=30, delay=10)
    clock.pass_(10)
    if claim_first:
        bus.claim("g")
    clock.pass_(30)
    assert bus.claim("g") is None
    status = bus.get_status(answer.id)
    assert (status.status, status.last_error, status.completed_at) == ("dead", "expired", clock.wall)


def test_more_expired_intents_than_one_pass_settles_are_still_not_claimed(bus, clock, monkeypatch):
    monkeypatch.setattr(intentbus, "SETTLE_ROWS", 2)
    for number in range(5):
        bus.publish("g", number, ttl=30)
    bus.publish("g", "fresh", ttl=3600)
    clock.pass_(31)
    assert bus.claim("g").payload == "fresh"


def test_intents_are_claimed_by_priority_then_time(bus, clock):
    for payload, priority in (("a", 100), ("b", 500), ("c", 100), ("d", 0), ("e", 500)):
        bus.publish("g", payload, priority=priority)
        clock.pass_(0.01)
    assert [bus.claim("g").payload for _ in range(5)] == ["b", "e", "a", "c", "d"]


def test_without_a_goal_the_first_of_all_goals_is_claimed(bus, clock):
    for goal, priority in (("b", 100), ("a", 100), ("c", 900)):
        bus.publish(goal, goal, priority=priority)
        clock.pass_(0.01)
    bus.publish("z", "elsewhere", namespace="other", priority=1000)
    assert [bus.claim().payload for _ in range(3)] == ["c", "b", "a"]
    assert bus.claim() is None
    assert bus.claim(["y", "z"], namespace="other").payload == "elsewhere"


@pytest.mark.parametrize("fields, claim, taken", [
    ({}, {}, True),
    ({}, {"namespace": "other"}, False),
    ({"target_worker": "w1"}, {}, False),
    ({"target_worker": "w1"}, {"worker_id": "w2"}, False),
    ({"target_worker": "w1"}, {"worker_id": "w1"}, True),
    ({"required_capability": "gpu"}, {"capabilities": ("GPU", "gp")}, False),
    ({"required_capability": "gpu"}, {"capabilities": ("cpu", "gpu")}, True),
    ({"required_capability": "gpu", "target_worker": "w1"}, {"capabilities": ("gpu",)}, False),
    ({}, {"caller": BOB}, False),
    ({"visibility": "public"}, {"caller": BOB}, True),
    ({"visibility": "public"}, {"caller": BOB, "publisher": "bob"}, False),
    ({"visibility": "public"}, {"caller": ALICE, "publisher": "alice"}, True),
    ({}, {"caller": intentbus.OWNER}, False),
    ({}, {"caller": intentbus.OWNER, "publisher": "alice"}, True),
])
@pytest.mark.parametrize("goal", ["g", None])
def test_who_may_take_what_alice_published(bus, fields, claim, taken, goal):
    bus.publish("g", 1, caller=ALICE, **fields)
    assert bool(bus.claim(goal, **dict({"caller": ALICE}, **claim))) == taken


def test_only_an_admin_may_claim_what_another_published(bus):
    with pytest.raises(intentbus.Forbidden):
        bus.claim("g", publisher="alice", caller=BOB)


def test_a_private_intent_is_invisible_to_others_as_if_it_did_not_exist(bus):
    answer = bus.publish("g", 1, caller=ALICE)
    for verb in (bus.get_status, bus.get_result, bus.cancel, bus.retry):
        with pytest.raises(intentbus.NotFound, match=f"There is no intent {answer.id}"):
            verb(answer.id, caller=BOB)
    assert bus.list(caller=BOB).intents == [] and len(bus.list(caller=ALICE).intents) == 1
    assert bus.get_status(answer.id).status == "open"


def test_the_worker_of_a_public_intent_may_look_at_it_and_not_cancel_it(bus):
    answer = bus.publish("g", 1, visibility="public", caller=ALICE)
    bus.claim("g", caller=BOB)
    assert bus.get_status(answer.id, caller=BOB).status == "claimed"
    with pytest.raises(intentbus.NotFound):
        bus.cancel(answer.id, caller=BOB)


def test_an_idempotency_key_stores_one_intent_for_a_day(bus, clock):
    first = bus.publish("g", {"b": 1, "a": 2}, idempotency_key="k")
    assert bus.publish("g", {"a": 2, "b": 1}, idempotency_key="k") == first
    assert bus.publish("g", 1, idempotency_key="k", caller=ALICE) != first
    with pytest.raises(intentbus.IdempotencyConflict, match="Key reused with different payload"):
        bus.publish("g", {"a": 3}, idempotency_key="k")
    clock.pass_(86400)
    assert bus.publish("g", {"a": 3}, idempotency_key="k") != first
    assert len(bus.list().intents) == 3


def test_cancel_ends_an_unfinished_intent_and_its_worker_learns_of_it(bus):
    answer = bus.publish("g", 1)
    intent = bus.claim("g")
    assert bus.cancel(answer.id).status == "dead"
    for verb in (bus.extend_claim, bus.fulfill):
        with pytest.raises(intentbus.NotFound):
            verb(intent.id, intent.claim_token)
    with pytest.raises(intentbus.Conflict, match="This intent is dead"):
        bus.cancel(answer.id)
    assert bus.get_status(answer.id).last_error == "Cancelled"


def test_retry_gives_dead_intents_a_new_life(bus, clock):
    ids = [bus.publish(goal, 1).id for goal in ("a", "a", "b")]
    with pytest.raises(intentbus.Conflict, match="only a dead one"):
        bus.retry(ids[0])
    for id in ids:
        bus.cancel(id)
        clock.pass_(1)
    assert bus.retry(ids[2]).status == "open"
    assert bus.retry(goal="a", limit=1).retried == 1
    status = bus.get_status(ids[0])
    assert (status.status, status.claim_attempts, status.last_error, status.completed_at) == ("open", 0, None, None)
    assert bus.get_status(ids[1]).status == "dead"


def test_a_list_is_newest_first_in_pages_and_without_payloads(bus, clock):
    ids = []
    for number in range(5):
        ids.append(bus.publish("g", number).id)
        clock.pass_(0.01)
    page = bus.list(limit=3)
    assert [intent.id for intent in page.intents] == ids[:1:-1] and "payload" not in page.intents[0]
    page = bus.list(limit=3, before=page.next, payload=True)
    assert [intent.payload for intent in page.intents] == [1, 0] and page.next is None
    assert not bus.list(status="dead").intents and not bus.list(goal="x").intents


# Waiting: a bus with a running clock, tended as a server does.

@pytest.fixture
def live(store):
    bus = Bus(store)
    threading.Thread(target=bus.tend, daemon=True).start()
    yield bus
    bus.stop()


def test_a_held_claim_gets_what_is_published_and_wakes_nobody_else(live):
    claims = [in_thread(live.claim, goal, wait=20) for goal in ("g", None, "other")]
    wait_until(lambda: held(live) == 6)     # in the private and the public lane each
    live.publish("g", 1)
    assert wait_until(lambda: held(live) == 4)
    assert claims[0]().payload == 1
    live.publish("g", 2)
    assert claims[1]().payload == 2
    assert held(live) == 2


@pytest.mark.parametrize("wake", [
    lambda bus: bus.publish("g", 1, delay=0.05),
    lambda bus: bus.retry(goal="dead"),
    lambda bus, intent: bus.release(intent.id, intent.claim_token),
    lambda bus, intent: bus.extend_claim(intent.id, intent.claim_token, 0.05),
], ids=["a delay that is over", "a retry", "a release", "a lease that is over"])
def test_a_held_claim_is_woken_by(live, wake):
    live.cancel(live.publish("dead", 1).id)
    live.publish("taken", 1)
    taken = live.claim("taken")
    claim = in_thread(live.claim, None, wait=20)
    wait_until(lambda: held(live) == 2)
    wake(*(live, taken)[:wake.__code__.co_argcount])
    assert claim().payload == 1


def test_news_for_a_client_that_hung_up_goes_to_the_next(live):
    gone = threading.Event()
    first = in_thread(live.claim, "g", wait=20, still_there=lambda: not gone.is_set())
    wait_until(lambda: held(live) == 2)
    second = in_thread(live.claim, "g", wait=20)
    wait_until(lambda: held(live) == 4)
    gone.set()
    live.publish("g", 1)
    assert first() is None and second().payload == 1


def test_a_held_claim_is_empty_when_its_time_is_over(live):
    assert live.claim("g", wait=0.05) is None
    assert held(live) == 0


def test_a_held_result_comes_when_the_intent_ends(live):
    answer = live.publish("g", 1)
    results = [in_thread(live.get_result, answer.id, wait=20) for _ in range(3)]
    wait_until(lambda: held(live) == 3)
    intent = live.claim("g")
    live.fulfill(intent.id, intent.claim_token, "text", "text")
    assert [result().result for result in results] == ["text"] * 3
    assert live.get_result(live.publish("g", 1).id, wait=0.05).status == "open"


def test_rows_written_by_another_program_are_noticed(live, store):
    claim = in_thread(live.claim, "g", wait=20)
    wait_until(lambda: held(live) == 2)
    row = published(now=time.time())
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute(intentbus.INSERT, row)
        db.commit()
    assert claim().id == row.id


def test_many_threads_share_the_work_and_each_intent_is_claimed_once(live):
    taken = collections.Counter()

    def work():
        while intent := live.claim("g"):
            taken[intent.payload] += 1
            live.fulfill(intent.id, intent.claim_token)

    for number in range(400):
        live.publish("g", number)
    for thread in [in_thread(lambda: work() or True) for _ in range(8)]:
        thread()
    assert len(taken) == 400 and set(taken.values()) == {1}


@pytest.mark.parametrize("jump", [3600, -3600, 10 * 366 * 86400, -50 * 366 * 86400])
def test_a_jump_of_the_wall_clock_expires_nothing_and_stalls_nothing(bus, clock, jump):
    bus.publish("leased", 1)
    bus.publish("delayed", 2, delay=30)
    intent = bus.claim("leased")
    clock.set(jump)
    clock.pass_(29)
    assert bus.claim() is None
    clock.pass_(1)
    assert bus.claim().payload == 2
    bus.extend_claim(intent.id, intent.claim_token)
    clock.pass_(61)
    assert bus.claim("leased").claim_attempts == 2
    assert not bus.list(status="dead").intents


def test_a_bus_that_starts_with_its_clock_set_back_carries_on(store, clock):
    Bus(store, clock=lambda: clock.wall, steady=lambda: clock.steady).publish("g", 1, delay=30)
    clock.set(-40 * 366 * 86400)
    bus = Bus(store, clock=lambda: clock.wall, steady=lambda: clock.steady)
    assert bus.claim("g") is None
    clock.pass_(31)
    assert bus.claim("g").payload == 1


# ---- 6. Keys ----

@pytest.mark.parametrize("headers, key", [
    ({"x-api-key": "a b"}, "a b"),
    ({"authorization": "Bearer abc"}, "abc"),
    ({"authorization": "bearer  abc"}, "abc"),
    ({"authorization": "Basic YWRtaW46c2U6Y3JldA=="}, "se:cret"),
    ({"authorization": "Basic !!"}, ""),
    ({"authorization": "Digest x"}, None),
    ({"x-api-key": "first", "authorization": "Bearer second"}, "first"),
    ({}, None),
])
def test_where_a_key_is_looked_for(headers, key):
    assert intentbus.presented_key(headers) == key


def test_a_new_key_file_is_its_owners_alone_and_reads_back(tmp_path):
    path = str(tmp_path / "key")
    assert intentbus.read_key(path) is None
    key = intentbus.make_key(path)
    assert intentbus.read_key(path) == key and len(key) == 48
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(intentbus.SetupError, match="cannot be made: File exists"):
        intentbus.make_key(path)


@POSIX
def test_a_key_file_that_others_can_reach_is_refused_or_warned_of(tmp_path):
    path = tmp_path / "key"
    intentbus.make_key(path)
    path.chmod(0o644)
    with pytest.warns(UserWarning, match="chmod 600"):
        intentbus.read_key(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(intentbus.SetupError, match="is a link or belongs to somebody else"):
        intentbus.read_key(tmp_path / "link")
    path.write_text("")
    path.chmod(0o600)
    with pytest.raises(intentbus.SetupError, match="holds no key"):
        intentbus.read_key(path)


# ---- 11. Client ----

class Proxy:
    """Passes requests on to a server, and drops the answers to the first so many."""

    def __init__(self, port, drop=0):
        self.port, self.drop, self.passed = port, drop, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                with self.listener.accept()[0] as near, socket.create_connection(("127.0.0.1", self.port)) as far:
                    answer = self.answer(near, far)
                    self.passed += 1
                    if self.passed > self.drop:
                        near.sendall(answer)

    def answer(self, near, far):
        near.settimeout(0.2)     # urllib sends a body right behind its headers
        with contextlib.suppress(TimeoutError, socket.timeout):
            while data := near.recv(65536):
                far.sendall(data)
                if b"\r\n\r\n" in data and b"Content-Length: 0" in data or data.endswith(b"}"):
                    break
        return b"".join(iter(lambda: far.recv(65536), b""))


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(intentbus, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(intentbus, "RETRY_MAX_SECONDS", 0.01)


def test_the_client_has_every_verb_of_the_bus_with_the_same_answers(client, server):
    bus = server.api.bus
    answer = client.publish("g", {"n": 1}, priority=7)
    assert client.get_status(answer.id) == bus.get_status(answer["id"])
    intent = client.claim("g", worker_id="w", capabilities=("a", "b"), wait=1)
    assert (intent.priority, intent.payload) == (7, {"n": 1})
    assert client.extend_claim(intent.id, intent.claim_token, 30).extended_by == 30
    assert client.release(intent.id, intent.claim_token).status == "open"
    intent = client.claim(["x", "g"])
    assert client.fail(intent.id, intent.claim_token, "no", retry=False).status == "dead"
    assert client.retry(intent.id).status == "open"
    intent = client.claim()
    assert client.fulfill(intent.id, intent.claim_token, "ok", "text").ok
    assert client.get_result(intent.id, wait=5) == bus.get_result(intent.id)
    assert client.cancel(client.publish("g", 1).id).status == "dead"
    assert client.retry(goal="g").retried == 1
    assert client.list(status="open").intents[0].goal == "g"
    assert client.claim("nothing") is None


def test_the_verbs_of_bus_and_client_take_the_same_arguments():
    verbs = ("publish", "claim", "extend_claim", "fulfill", "fail", "release", "get_status", "get_result", "list", "cancel",
             "retry")
    for verb in verbs:
        ours, theirs = (inspect.signature(getattr(kind, verb)).parameters for kind in (Bus, IntentClient))
        assert set(theirs) - {"fields"} <= set(ours), verb
        assert verb == "publish" or set(ours) - {"caller", "still_there"} <= set(theirs), verb


@pytest.mark.parametrize("cause, kind, code", [
    (lambda c: c.get_status("0" * 32), intentbus.NotFound, "not_found"),
    (lambda c: c.publish("", 1), intentbus.Invalid, "invalid_goal"),
    (lambda c: c.publish("g", 1, priorty=1), intentbus.Invalid, "invalid_request"),
    (lambda c: c.publish("g", "x" * 300_000), intentbus.PayloadTooLarge, "payload_too_large"),
    (lambda c: c.cancel(c.claim("g").id) and c.cancel(c.list().intents[0].id), intentbus.Conflict, "conflict"),
])
def test_the_client_raises_what_the_bus_raised(client, cause, kind, code):
    client.publish("g", 1)
    with pytest.raises(kind) as caught:
        cause(client)
    assert (type(caught.value), caught.value.code) == (kind, code) and str(caught.value).endswith(".")


def test_a_lost_answer_to_a_publish_stores_no_second_intent(client, server, impatient):
    proxy = Proxy(server.server_port, drop=3)
    answer = IntentClient(proxy.url, KEY).publish("g", 1)
    assert [intent.id for intent in client.list().intents] == [answer.id] and proxy.passed == 4


def test_a_lost_answer_to_a_report_is_asked_for_again(client, server, impatient):
    client.publish("g", 1)
    intent = client.claim("g")
    assert IntentClient(Proxy(server.server_port, drop=2).url, KEY).fulfill(intent.id, intent.claim_token, 5).ok
    assert client.get_result(intent.id).result == 5


def test_a_bus_that_stays_away_is_unreachable_in_words(impatient):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(intentbus.Unreachable, match=f"The bus at http://127.0.0.1:{port} cannot be reached: .*refused"):
        IntentClient(f"http://127.0.0.1:{port}", KEY).get_status("x")


@pytest.mark.parametrize("answer, sentence", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n<html>Log in", "a proxy page answered, not a bus"),
    (b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", "answered 502 without JSON"),
    (b"HTTP/1.1 302 Found\r\nLocation: https://x.example/\r\nContent-Length: 0\r\n\r\n", "redirects to https://x.example/"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached"),
    (b"", "cannot be reached"),
])
def test_what_is_no_bus_is_told_from_one(answer, sentence, impatient):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer_all():
            with contextlib.suppress(OSError):
                while True:
                    with listener.accept()[0] as sock:
                        sock.recv(65536)
                        sock.sendall(answer)
        threading.Thread(target=answer_all, daemon=True).start()
        with pytest.raises(intentbus.Unreachable, match=re.escape(sentence)):
            IntentClient(f"http://127.0.0.1:{listener.getsockname()[1]}", KEY).get_status("x")


def test_where_the_client_finds_its_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INTENT_BUS_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("INTENT_BUS_NAMESPACE", "home")
    monkeypatch.delenv("INTENT_API_KEY", raising=False)
    with pytest.raises(intentbus.SetupError, match="No key: put the bus's into ~/.apikey or INTENT_API_KEY"):
        IntentClient()
    key = intentbus.make_key()
    found = IntentClient()
    assert (found.base_url, found.namespace, found._key) == ("http://127.0.0.1:1", "home", key)
    with pytest.raises(intentbus.SetupError, match="not 'ftp://x'"):
        IntentClient("ftp://x")


# ---- 12. Worker ----

@pytest.fixture
def quick_leases(monkeypatch):
    monkeypatch.setattr(intentbus, "LEASE_CHECK_SECONDS", 0.01)


def work(bus, goal, handler, **options):
    """Work off all there is; return what was said."""
    said = []
    Worker(bus, goal, handler, drain=True, say=said.append, **options).run()
    return said


def script(tmp_path, text, name="handler.sh"):
    path = tmp_path / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def run_handler(bus, tmp_path, text, payload, arguments=(), **options):
    """Publish a payload, work it off with a shell script, and return how it ended."""
    answer = bus.publish("g", payload)
    work(bus, "g", intentbus.Program([script(tmp_path, "#!/bin/sh\n" + text), *arguments], **options))
    return bus.get_result(answer.id)


@pytest.mark.parametrize("either", ["bus", "client"])
def test_listen_hands_payloads_to_a_function_and_returns_its_results(server, client, either):
    bus = client if either == "client" else server.api.bus
    answers = [bus.publish("double", n).id for n in (1, 2, "x", None or [])]
    listen(bus, "double", lambda payload: {"twice": payload * 2}, drain=True)
    assert [bus.get_result(id).result for id in answers] == [{"twice": 2}, {"twice": 4}, {"twice": "xx"}, {"twice": []}]


def refuse(payload):
    raise Reject("never")


@pytest.mark.parametrize("handler, status, error", [
    (lambda payload: False, "open", "The handler returned False."),
    (lambda payload: 1 / 0, "open", "ZeroDivisionError: division by zero"),
    (lambda payload: {1, 2}, "open", "TypeError: Object of type set is not JSON serializable"),
    (refuse, "dead", "never"),
    (lambda payload: "x" * 300_000, "dead", "The result was refused: The body is over the limit of 262144 bytes."),
])
def test_a_handler_that_does_not_succeed_fails_the_intent(client, handler, status, error):
    answer = client.publish("g", 1)
    client.listen("g", handler, drain=True)
    found = client.get_status(answer.id)
    assert (found.status, found.last_error) == (status, error)


def test_a_handler_may_have_the_whole_intent(client):
    client.publish("g", 1, priority=3)
    seen = []
    client.listen("g", seen.append, full_envelope=True, max_jobs=1)
    assert (seen[0].priority, seen[0].claim_attempts) == (3, 1)


def test_a_lease_is_kept_up_while_the_handler_works(live, quick_leases):
    answer = live.publish("g", 1)
    ends = []

    def handler(intent):     # returns once its lease has been extended to twice its length
        wait_until(lambda: ends.append(live.get_status(intent.id).claim_expires_at) or ends[-1] > intent.claim_expires_at + 0.6)
        assert live.claim("g") is None

    listen(live, "g", handler, full_envelope=True, drain=True, lease=0.6)
    found = live.get_status(answer.id)
    assert (found.status, found.claim_attempts) == ("fulfilled", 1)


@POSIX
def test_a_program_whose_lease_is_lost_is_ended_and_not_reported(live, quick_leases, tmp_path):
    answer = live.publish("g", 1)
    program = intentbus.Program([script(tmp_path, "#!/bin/sh\necho $$ > pid\nexec sleep 60\n")], kill_after=1)
    said = []
    worker = in_thread(lambda: Worker(live, "g", program, max_jobs=1, lease=0.3, say=said.append).run() or True)
    wait_until(lambda: (HERE / "pid").exists() and (HERE / "pid").read_text().strip())
    pid = int((HERE / "pid").read_text())
    (HERE / "pid").unlink()
    live.cancel(answer.id)
    assert worker() and said == [f"{answer.id} lost: cancelled, or its lease was over before it was done"]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_concurrent_workers_do_each_intent_once(live):
    done = collections.Counter()
    for number in range(200):
        live.publish("g", number)
    work(live, "g", lambda intent, lease: (done.update([intent.payload]), "json"), concurrency=8)
    assert len(done) == 200 and set(done.values()) == {1}


@POSIX
@pytest.mark.parametrize("text, status, result", [
    ("cat", "fulfilled", {"a": "b", "n": 3}),
    ("true", "fulfilled", None),
    ("echo hello; echo world", "fulfilled", "hello\nworld"),
    ("echo '{\"ok\": 1}'", "fulfilled", {"ok": 1}),
    ("printf '\\377'", "fulfilled", "\ufffd"),
    ("exec 0<&-; echo done", "fulfilled", "done"),
    ("echo $INTENT_GOAL $INTENT_NAMESPACE $INTENT_ATTEMPT/$INTENT_MAX_ATTEMPTS", "fulfilled", "g default 1/3"),
    ("echo $INTENT_PAYLOAD; echo $INTENT_PAYLOAD_a$INTENT_PAYLOAD_n", "fulfilled", '{"a":"b","n":3}\nb3'),
    ("echo \"<$INTENT_API_KEY$BUS_SECRET>\"", "fulfilled", "<>"),
    ("sleep 60 & echo started", "fulfilled", "started"),
    ("echo one >&2; echo two >&2; exit 3", "open", "exit code 3: one\ntwo"),
    ("echo bad >&2; exit 100", "dead", "bad"),
    ("exit 100", "dead", "The handler rejected it with exit code 100."),
    ("kill -9 $$", "open", "killed by signal 9"),
    ("head -c 5000 /dev/zero | tr '\\0' x >&2; exit 1", "open", "exit code 1: " + "x" * 1987),
], ids=range(15))
def test_what_a_program_does_and_what_becomes_of_the_intent(bus, tmp_path, monkeypatch, text, status, result):
    monkeypatch.setenv("INTENT_API_KEY", "secret")
    monkeypatch.setenv("BUS_SECRET", "secret")
    found = run_handler(bus, tmp_path, text, {"a": "b", "n": 3})
    assert (found.status, found.result if status == "fulfilled" else found.last_error) == (status, result)


@POSIX
@pytest.mark.parametrize("payload, argument, expected", [
    ({"to": "a b; rm -rf / $(x) `y` \"'"}, "{to}", "a b; rm -rf / $(x) `y` \"'"),
    ({"to": "-rf\nnewline"}, "x{to}y", "x-rf\nnewliney"),
    ({"n": 1.5, "b": True, "z": None}, "{n},{b},{z}", "1.5,true,"),
    ({"list": [1, {"a": 2}]}, "{list}", '[1,{"a":2}]'),
    ({"id": "x"}, "{goal} {payload} {{payload}} {} {a-b} ${HOME}", 'g {"id":"x"} {payload} {} {a-b} $HOME-is-missing'),
], ids=range(5))
def test_fields_of_the_payload_become_one_argument_each(bus, tmp_path, payload, argument, expected):
    if "missing" in expected:
        argument, expected = argument.replace(" ${HOME}", ""), expected.replace(" $HOME-is-missing", "")
    found = run_handler(bus, tmp_path, "printf '%s|' \"$@\"", payload, [argument, "end"], result="text")
    assert found.result == f"{expected}|end|"


@POSIX
@pytest.mark.parametrize("payload, argument, error", [
    ({"a": 1}, "{b}", "The payload has no field 'b', which the handler's arguments need."),
    ("text", "{a}", "The payload has no field 'a', which the handler's arguments need."),
    ({"a": "x\0y"}, "{a}", "The payload cannot be an argument: embedded null byte."),
    ({"a": "x" * 200_000}, "{a}", "The payload is too long for an argument."),
])
def test_a_payload_that_fits_no_argument_is_rejected_for_good(bus, tmp_path, payload, argument, error):
    found = run_handler(bus, tmp_path, "true", payload, [argument])
    assert (found.status, found.last_error) == ("dead", error)


@POSIX
@pytest.mark.parametrize("text", ["exec sleep 60", "trap '' TERM; sleep 60 & wait; sleep 60"], ids=["ends", "ignores TERM"])
def test_a_program_that_takes_too_long_is_ended(bus, tmp_path, text):
    found = run_handler(bus, tmp_path, "echo waiting >&2\n" + text, 1, timeout=0.3, kill_after=0.1)
    assert (found.status, found.last_error) == ("open", "timed out after 0.3 s: waiting")


@POSIX
def test_output_is_cut_and_nothing_blocks_on_it(bus, tmp_path):
    found = run_handler(bus, tmp_path, "yes | head -c 3000000; yes err | head -c 1000000 >&2", "x" * 200_000,
                        max_output=1000, result="text")
    assert (found.status, len(found.result)) == ("fulfilled", 999)


@POSIX
@pytest.mark.parametrize("text, sentence", [
    ("#!/bin/sh\nexit 127\n", "exit code 127, which means it cannot run here"),
    ("#!/nowhere/sh\n", "cannot be run: No such file or directory; does it start with #!"),
    ("\x7fELF nonsense", "cannot be run: Exec format error"),
])
def test_a_program_that_cannot_run_stops_the_worker_and_costs_no_attempt(bus, tmp_path, text, sentence):
    answer = bus.publish("g", 1)
    with pytest.raises(intentbus.SetupError, match=re.escape(sentence)):
        work(bus, "g", intentbus.Program([script(tmp_path, text)]))
    assert (bus.get_status(answer.id).status, bus.get_status(answer.id).claim_attempts) == ("open", 0)
    with pytest.raises(intentbus.SetupError, match="There is no program './nothing.sh' that can be run"):
        intentbus.Program(["./nothing.sh"])


def test_a_worker_goes_on_when_the_bus_comes_back(store, impatient, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said, done = [], []
    client = IntentClient(f"http://127.0.0.1:{port}", KEY)
    worker = Worker(client, "g", lambda intent, lease: (done.append(intent.payload), "json"), max_jobs=1, say=said.append,
                    poll=0.5)
    running = in_thread(lambda: worker.run() or True)
    wait_until(lambda: any("cannot be reached" in sentence for sentence in said))
    bus = Bus(store)
    server = intentbus.http_server(API(bus, Keys(KEY)), port=port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bus.publish("g", "there")
    assert running() and done == ["there"]
    server.close()


# ---- 13. Commands ----

class Serve:
    """`intentbus.py serve` as a process, in a directory and HOME of its own."""

    def __init__(self, home, *arguments):
        self.env = dict(os.environ, HOME=str(home), PYTHONUNBUFFERED="1")
        for name in ("INTENT_API_KEY", "INTENT_BUS_URL", "INTENT_BUS_NAMESPACE", "BUS_SECRET", "BUS_DB_PATH"):
            self.env.pop(name, None)
        self.home = home
        self.process = subprocess.Popen([sys.executable, HERE / "intentbus.py", "serve", "--port", "0", *arguments], cwd=home,
                                        env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()
        self.env["INTENT_BUS_URL"] = self.url

    def run(self, *arguments, **options):
        """Run a command to its end."""
        return subprocess.run([sys.executable, HERE / "intentbus.py", *arguments], cwd=self.home, env=self.env, timeout=60,
                              capture_output=True, text=True, **dict({"stdin": subprocess.DEVNULL}, **options)
                              if "input" not in options else options)

    def start(self, *arguments):
        """Start a command."""
        return subprocess.Popen([sys.executable, HERE / "intentbus.py", *arguments], cwd=self.home, env=self.env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def stop(self):
        """End it well; return its exit code and what it said."""
        if self.process.poll() is None:
            self.process.terminate()
        output, errors = self.process.communicate(timeout=10)
        return self.process.returncode, output, errors


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    serve = Serve(tmp_path_factory.mktemp("home"))
    yield serve
    serve.stop()


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=HERE, capture_output=True, text=True, timeout=30, **options)


@POSIX
def test_serve_makes_a_key_prints_its_url_and_ends_well(tmp_path):
    serve = Serve(tmp_path)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", serve.url)
    claim = serve.start("work", "--goal", "g")
    published = serve.run("publish", "later", "1")
    code, output, errors = serve.stop()
    assert (code, output) == (0, "") and "Traceback" not in errors
    assert "the key is new, in ~/.apikey" in errors and f"publish --url {serve.url} hello name=world" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [".apikey", "intentbus.db", "intentbus.db.lock"]
    with contextlib.closing(sqlite3.connect(tmp_path / "intentbus.db")) as db:
        assert db.execute("SELECT id FROM intents").fetchall() == [(published.stdout.strip(),)]
    claim.terminate()
    assert claim.wait(10) == 143
    claim.communicate()


def test_a_session_from_publish_to_result(serve):
    id = serve.run("publish", "greet", "name=Ada", "times:=2").stdout.strip()
    assert serve.run("status", id).stdout == "open\n"
    result = serve.run("result", id)
    assert (result.returncode, result.stdout) == (3, "") and "is still open" in result.stderr
    work = serve.run("work", "--goal", "greet", "--drain", "--", "echo", "hello {name} {times}")
    assert (work.returncode, work.stdout) == (0, "") and f"{id} fulfilled" in work.stderr
    assert serve.run("result", id).stdout == "hello Ada 2\n"
    assert re.fullmatch(rf"{id}  fulfilled  1/3    \ds  greet\n", serve.run("list", "--goal", "greet").stdout)
    assert json.loads(serve.run("status", id, "--json").stdout)["status"] == "fulfilled"


@POSIX
def test_publish_wait_is_a_remote_command(serve):
    worker = serve.start("work", "--goal", "remote", "-j", "2", "--", "sh", "-c", 'echo "$INTENT_PAYLOAD_say"; exit "{code}"')
    ok = serve.run("publish", "remote", "say=hi", "code:=0", "--wait")
    assert (ok.returncode, ok.stdout, ok.stderr) == (0, "hi\n", "")
    bad = serve.run("publish", "--wait=20s", "remote", "say=no", "code:=100")
    assert (bad.returncode, bad.stdout) == (1, "") and "is dead: The handler rejected it" in bad.stderr
    late = serve.run("publish", "nobody", "1", "--wait=0.1s")
    assert late.returncode == 124 and "is still open; ask again with: result " in late.stderr
    worker.terminate()
    assert worker.wait(10) == 143
    worker.communicate()


@pytest.mark.parametrize("words, stdin, payload", [
    (['{"a": [1, null]}'], None, {"a": [1, None]}),
    (['"text"'], None, "text"),
    (["5"], None, 5),
    (["-"], "[1]", [1]),
    ([], '{"b": 2}\n', {"b": 2}),
    (["@file.json"], None, {"from": "file"}),
    (["name=a=b", "n:=1", "empty=", 'list:=["x"]'], None, {"name": "a=b", "n": 1, "empty": "", "list": ["x"]}),
])
def test_the_ways_to_say_a_payload(serve, words, stdin, payload):
    (serve.home / "file.json").write_text('{"from": "file"}')
    options = {"input": stdin} if stdin else {}
    id = serve.run("publish", "ways", *words, "--priority", "9", "--delay", "2h", "--capability", "x", **options).stdout.strip()
    intent = IntentClient(serve.url, intentbus.read_key(serve.home / ".apikey")).list(goal="ways", payload=True).intents[0]
    assert (intent.id, intent.payload, intent.priority, intent.required_capability) == (id, payload, 9, "x")
    assert round(intent.run_at - intent.created_at) == 7200


def test_work_without_a_program_prints_the_payloads(serve):
    for number in (1, 2):
        serve.run("publish", "print", f"n:={number}")
    work = serve.run("work", "--goal", "print", "--max-jobs", "2")
    assert (work.returncode, work.stdout) == (0, '{"n":1}\n{"n":2}\n')


def test_cancel_retry_and_list_from_the_command_line(serve):
    id = serve.run("publish", "c", "1").stdout.strip()
    assert serve.run("cancel", id).stdout == "dead\n"
    assert serve.run("cancel", id).returncode == 1
    assert "Cancelled" in serve.run("list", "--status", "dead", "--limit", "1").stdout
    assert serve.run("retry", id).stdout == "open\n"
    assert serve.run("retry", "--goal", "c").stdout == "0\n"
    assert serve.run("cancel", "0" * 32).returncode == 3


@POSIX
def test_the_first_signal_lets_a_worker_finish_and_the_second_hands_back(serve, tmp_path):
    fifo = tmp_path / "go"
    os.mkfifo(fifo)
    started = tmp_path / "started"
    id = serve.run("publish", "slow", "1").stdout.strip()
    worker = serve.start("work", "--goal", "slow", "--", "sh", "-c", f"touch {started}; cat {fifo}")
    wait_until(started.exists)
    worker.terminate()
    assert "finishing 1 more" in worker.stderr.readline()
    fifo.write_text("finished")
    assert worker.wait(10) == 143
    worker.communicate()
    assert serve.run("result", id).stdout == "finished\n"

    started.unlink()
    id = serve.run("publish", "slow", "2").stdout.strip()
    worker = serve.start("work", "--goal", "slow", "--", "sh", "-c", f"touch {started}; cat {fifo}")
    wait_until(started.exists)
    worker.send_signal(signal.SIGINT)
    assert "finishing 1 more" in worker.stderr.readline()
    worker.send_signal(signal.SIGINT)
    assert worker.wait(10) == 130
    worker.communicate()
    status = json.loads(serve.run("status", id, "--json").stdout)
    assert (status["status"], status["claim_attempts"]) == ("open", 0)


def test_every_command_and_flag_explains_itself_and_is_in_the_readme(serve):
    readme = (HERE / "README.md").read_text()
    for name, (function, flags) in intentbus.COMMANDS.items():
        assert f"`{name}" in readme and function.__doc__
        for names, options in flags:
            assert options["help"], names
            assert not names[-1].startswith("--") or f"`{names[-1]}" in readme or f"{names[-1]}" in readme, (name, names)
    assert serve.run("work", "--help").returncode == 0


@pytest.mark.parametrize("words, seconds", [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("7d", 604800)])
def test_durations(words, seconds):
    assert intentbus.duration(words) == seconds


def test_what_is_printed_cannot_command_the_terminal(serve):
    client = IntentClient(serve.url, intentbus.read_key(serve.home / ".apikey"))
    intent = client.publish("escape", 1) and client.claim("escape")
    client.fail(intent.id, intent.claim_token, "\x1b]0;owned\x07\x1b[2J\nsecond line", retry=False)
    for output in (serve.run("list", "--status", "dead").stdout, serve.run("result", intent.id).stderr):
        assert "\\x1b]0;owned\\x07" in output and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", output)


# ---- The README and the examples ----

README = HERE / "README.md"


def blocks(language):
    """The code blocks of the README in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


def shell(serve, command, **environment):
    """Run a shell command as it would be typed in the project's directory."""
    return subprocess.run(["sh", "-ec", command], cwd=HERE, env=dict(serve.env, **environment), capture_output=True,
                          text=True, timeout=60, stdin=subprocess.DEVNULL)


@POSIX
@pytest.mark.parametrize("words", ["hello name=world", "curl -sS"])
def test_the_shell_sessions_of_the_readme(serve, words):
    if "curl" in words and not shutil.which("curl"):
        pytest.skip("curl is not on this machine")
    block = next(block for block in blocks("sh") if words in block)
    found = shell(serve, block)
    assert found.returncode == 0 and "hello, world" in found.stdout.splitlines()[-1], found.stderr


def test_the_python_session_of_the_readme(serve):
    found = subprocess.run([sys.executable, "-c", blocks("python")[0]], cwd=HERE, env=serve.env, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "hello, world\n"), found.stderr


def test_the_readme_starts_the_bus_and_passes_the_tests_in_a_line_each():
    assert blocks("sh")[:2] == ["python3 intentbus.py serve\n", "python3 -m venv .venv && .venv/bin/pip install -q pytest "
                                "&& .venv/bin/python -m pytest -q\n"]


def test_the_readme_names_every_route_and_field():
    readme = README.read_text()
    paths = {path.replace("/*", "/ID") for _, path, _, _ in intentbus.ROUTES}
    assert not [path for path in paths if f"`{path}`" not in readme]
    assert not [name for name in intentbus.PUBLISH if name != "reward" and f"`{name}`" not in readme]


@POSIX
@pytest.mark.parametrize("path", sorted((HERE / "examples").glob("*.sh")), ids=lambda path: path.name)
def test_every_shell_example_says_how_to_run_it_and_parses(path):
    assert path.read_text().startswith("#!/bin/sh\n# ") and path.name in path.read_text()[:500]
    assert os.access(path, os.X_OK)
    subprocess.run([shutil.which("dash") or "sh", "-n", path], check=True)


@POSIX
def test_cron_publishes_real_disk_figures_and_the_handler_delivers_them(serve):
    bare = {"PATH": os.path.dirname(sys.executable) + ":/usr/bin:/bin"}
    notified = serve.home / "notified.log"
    assert shell(serve, "examples/cron_publish.sh 0 /", **bare).returncode == 0
    again = shell(serve, "examples/cron_publish.sh 0 /", **bare)
    assert (again.returncode, again.stdout) == (0, "")
    work = shell(serve, f"{sys.executable} intentbus.py work --goal send_notification --drain -- ./examples/handler.sh",
                 INTENTBUS_NOTIFY_FILE=str(notified), **bare)
    assert work.returncode == 0
    percent = re.search(r"/ is (\d+) % full: [\d.]+ of [\d.]+ GiB are free\.\n$", notified.read_text())[1]
    assert notified.read_text().count("\n") == 1 and 0 <= int(percent) <= 100
    assert shell(serve, "examples/cron_publish.sh 101 /", **bare).returncode == 0
    assert shell(serve, "examples/cron_publish.sh 0 /", INTENT_BUS_URL="http://127.0.0.1:9/x", **bare).returncode == 1


@POSIX
@pytest.mark.parametrize("payload, status, line", [
    ('{"message": "a\\nb\\u001b[2J", "title": "-t"}', "fulfilled", "-t: a b [2J"),
    ('{"title": "x"}', "dead", None),
])
def test_the_notification_handler(serve, payload, status, line):
    notified = serve.home / f"{status}.log"
    id = serve.run("publish", "notify", payload).stdout.strip()
    shell(serve, f"{sys.executable} intentbus.py work --goal notify --drain -- ./examples/handler.sh",
          INTENTBUS_NOTIFY_FILE=str(notified), PATH="/usr/bin:/bin", DISPLAY="")
    assert serve.run("status", id).stdout == status + "\n"
    assert not line or notified.read_text().endswith(f"  {line}\n")


def test_the_python_examples_work_together(serve):
    worker = subprocess.Popen([sys.executable, HERE / "examples" / "worker.py", "1"], env=serve.env, stderr=subprocess.PIPE)
    found = subprocess.run([sys.executable, HERE / "examples" / "publisher.py", "to", "be", "or", "notwithstanding"],
                           env=serve.env, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, "4 words, the longest is 'notwithstanding'\n")
    assert b"fulfilled" in worker.communicate(timeout=10)[1] and worker.returncode == 0


@POSIX
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not on this machine")
def test_a_worker_of_curl_and_a_shell(serve):
    id = serve.run("publish", "curl", '{"claim_token": "00", "text": "a\\"b\\\\n"}').stdout.strip()
    done = shell(serve, "examples/curl_worker.sh curl cat", ONCE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(serve.run("result", id).stdout)["payload"] == {"claim_token": "00", "text": 'a"b\\n'}
    id = serve.run("publish", "curl", "1").stdout.strip()
    shell(serve, "examples/curl_worker.sh curl sh -c 'echo no >&2; exit 100'", ONCE="1")
    assert "exit code 100\nno" in json.loads(serve.run("status", id, "--json").stdout)["last_error"]


# ---- Long ones ----

@SLOW
@POSIX
def test_slow_ten_thousand_intents_are_done_once_each_by_eight_workers(serve, tmp_path):
    client = IntentClient(serve.url, intentbus.read_key(serve.home / ".apikey"))
    worker = serve.start("work", "--goal", "bulk", "-j", "8", "--max-jobs", "5000")
    done = collections.Counter()
    output = in_thread(lambda: [done.update([json.loads(line)]) for line in worker.stdout])
    errors = in_thread(lambda: worker.stderr.read())
    publishers = [in_thread(lambda first=first: [client.publish("bulk", n) for n in range(first, first + 1250)])
                  for first in range(0, 10_000, 1250)]
    listener = in_thread(lambda: listen(client, "bulk", lambda n: done.update([n]), concurrency=8, max_jobs=5000) or True)
    for thread in publishers:
        wait_until(lambda: sum(done.values()) == 10_000, 300)
        thread()
    assert worker.wait(10) == 0 and listener() and output() is not None and errors() is not None
    assert len(done) == 10_000 and set(done.values()) == {1}


@SLOW
@POSIX
def test_slow_what_a_killed_worker_had_is_done_by_another_at_the_latest_a_lease_later(serve, tmp_path):
    started = tmp_path / "started"
    id = serve.run("publish", "kill", "1").stdout.strip()
    first = serve.start("work", "--goal", "kill", "--lease", "10s", "--", "sh", "-c", f"echo $$ > {started}; exec sleep 60")
    wait_until(lambda: started.exists() and started.read_text())
    first.kill()
    first.communicate()
    killed = time.monotonic()
    second = serve.run("work", "--goal", "kill", "--once", "--", "echo", "rescued")
    assert (second.returncode, serve.run("result", id).stdout) == (0, "rescued\n")
    assert time.monotonic() - killed < 10 + 2
    os.kill(int(started.read_text()), signal.SIGKILL)
