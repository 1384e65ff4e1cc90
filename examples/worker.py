#!/usr/bin/env python3
"""Count words for whoever asks: a worker in Python.

    python examples/worker.py [HOW_MANY]      leaves after so many intents, or at Ctrl-C

examples/publisher.py asks it. The bus is INTENT_BUS_URL, or on this machine; the key is in ~/.apikey.
"""

import pathlib
import signal
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

from intentbus import IntentClient, Reject


def count_words(payload):
    """Return the result for a payload; the intent is tried again if this raises anything but Reject."""
    if not isinstance(payload, dict) or not isinstance(payload.get("text"), str):
        raise Reject('The payload must be {"text": "..."}.')     # for good: no retry can mend it
    words = payload["text"].split()
    return {"words": len(words), "longest": max(words, key=len, default="")}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)     # as Ctrl-C: finish what runs, then leave
    how_many = int(sys.argv[1]) if len(sys.argv) > 1 else None
    IntentClient().listen("count_words", count_words, max_jobs=how_many,
                          on_message=lambda sentence: print(sentence, file=sys.stderr, flush=True))
