#!/usr/bin/env python3
"""A publisher in Python: ask for a count of words, and wait for the result.

    python examples/publisher.py to be or not to be

examples/worker.py counts them. It uses the bus in INTENT_BUS_URL, otherwise the bus joined, otherwise the bus on this machine.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))     # where intentbus.py is

from intentbus import Error, IntentClient


def main(words):
    """Publish, wait up to 30 seconds, print the result; return the exit code."""
    bus = IntentClient()
    intent = bus.publish("count_words", {"text": " ".join(words)}, ttl=3600)
    print(f"published {intent.id}", file=sys.stderr)
    found = bus.get_result(intent.id, wait=30)
    if found.status == "fulfilled":
        print("{words} words, the longest is {longest!r}".format(**found.result))
        return 0
    print(f"the intent is {found.status}: {found.last_error or 'is a worker running?'}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Error as error:
        sys.exit(str(error))
