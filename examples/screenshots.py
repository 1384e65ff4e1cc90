#!/usr/bin/env python3
"""Takes the two screenshots of the dashboard, of a bus with made-up data. It needs chromium.

    python examples/screenshots.py [FOLDER]      writes dashboard_phone.png and dashboard_desktop.png; default: examples/
"""

import math
import pathlib
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))     # where intentbus.py is

import intentbus

KEY = "only-for-this-picture"
SIZES = {"phone": (390, 844), "desktop": (1280, 800)}
WORK = {     # goal: payload, worker, how many are fulfilled, fail, run and wait, and how many a day did
    "send_notification": ({"title": "nas", "message": "the backup is done"}, "phone termux 4711", 9, 0, 0, 0, 850),
    "resize": ({"file": "IMG_2041.jpg", "width": 1280}, "nas work 812", 6, 2, 2, 3, 1290),
    "backup": ({"host": "nas", "full": True}, "nas backup 77", 1, 1, 1, 2, 140),
    "transcode": ({"file": "tape-3.mov", "codec": "av1"}, "studio gpu 1", 0, 0, 0, 4, 0),
}


def remember_a_day(path):
    """Store the events of a day, with one spike."""
    minute, random_number = int(time.time() // 60), random.Random(1).random
    with sqlite3.connect(path) as db:
        for at in range(minute - 1439, minute):
            published = 640 if at == minute - 23 else int(6 * random_number() * (1.2 + math.sin(at / 200)))
            for event, times in ("published", published), ("fulfilled", published), ("failed", int(random_number() < 0.06)):
                db.execute("INSERT INTO history VALUES (?, ?, ?)", (at, event, times))
        for number, (goal, (*_, in_a_day)) in enumerate(WORK.items()):
            for at in range(minute // 10 * 10 - 1420, minute // 10 * 10, 10) if in_a_day else ():
                for event, times in ("fulfilled", in_a_day // 142), (f"ran {12 * number + at % 7}", 5), (f"waited {at % 9}", 5):
                    db.execute("INSERT INTO goal_history VALUES (?, 'default', ?, ?, ?)", (at, goal, event, times))
    db.close()


def do_the_work(bus):
    """Publish intents of all goals, and bring them into all states."""
    for goal, (payload, worker, fulfilled, failed, running, waiting, _) in WORK.items():
        bus.publish_many([dict(goal=goal, payload=payload)] * (fulfilled + failed + running + waiting))
        take = lambda: bus.claim(goal, worker_name=worker).id
        for _ in range(fulfilled):
            bus.fulfill(take(), result={"ok": True})
        for _ in range(failed):
            bus.fail(take(), error="The share is away: connection timed out", retry=False)
        for _ in range(running):
            take()
    bus.limit("backup", running=2)
    bus.limit("transcode", paused=True)


def main(folder=HERE):
    with tempfile.TemporaryDirectory() as scratch:
        path = f"{scratch}/bus.db"
        intentbus.Database(path).close()     # it has its tables now
        remember_a_day(path)
        bus = intentbus.Bus(intentbus.Store(intentbus.Database(path)))
        do_the_work(bus)
        server = intentbus.http_server(intentbus.API(bus, intentbus.Keys(KEY, bus.store)), port=0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, (width, height) in SIZES.items():
            subprocess.run(["chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={scratch}/{name}",
                            "--virtual-time-budget=3000", f"--window-size={width},{height}",
                            f"--screenshot={folder}/dashboard_{name}.png",
                            f"http://admin:{KEY}@127.0.0.1:{server.server_port}/admin/dashboard"],
                           check=True, stderr=subprocess.DEVNULL)
        server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
