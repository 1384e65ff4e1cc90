#!/usr/bin/env python3
"""A worker in Python: counts the words in each payload.

    python examples/worker.py [HOW_MANY]      stop after HOW_MANY intents, or at Ctrl-C

examples/publisher.py publishes them. It uses the bus in INTENT_BUS_URL, otherwise the bus joined, otherwise the bus on this machine.
"""

import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

from intentbus import IntentClient, Reject


def count_words(payload):
    """Return the result for a payload; any exception but Reject has the intent retried."""
    if not isinstance(payload, dict) or not isinstance(payload.get("text"), str):
        raise Reject('The payload must be {"text": "..."}.')     # no retry can help
    words = payload["text"].split()
    return {"words": len(words), "longest": max(words, key=len, default="")}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # like Ctrl-C: finish running handlers, then stop
    how_many = int(sys.argv[1]) if len(sys.argv) > 1 else None
    IntentClient().listen("count_words", count_words, max_jobs=how_many,
                          on_message=lambda sentence: print(sentence, file=sys.stderr, flush=True))
