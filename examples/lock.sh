#!/bin/sh
# One of many: the same cron job on several machines, and only the first that asks runs it.
#
#   examples/lock.sh NAME DURATION [COMMAND [ARGUMENT...]]
#
# With crontab -e, on each machine:
#   0 3 * * * $HOME/intentbus/examples/lock.sh nightly-backup 1h $HOME/bin/backup.sh
#
# Exit code: the command's own if this one won (0 if there is none); 75 if another has the lock; else the lock could
# not be asked for and nothing has run: 2 misused, 4 the key, 5 no bus. The lock is not given back when the command
# ends: it lasts for DURATION (90s, 5m, 1h; at most 1d), or else a machine whose clock is late would run it once more.
# The bus is INTENT_BUS_URL, or on this machine; the key is in ~/.apikey.

[ $# -ge 2 ] || { echo "usage: $0 NAME DURATION [COMMAND [ARGUMENT...]]" >&2; exit 2; }
name=$1 duration=$2; shift 2
PATH=${PATH:-/usr/bin:/bin}:/usr/local/bin:/opt/homebrew/bin     # cron gives little
bus=$(dirname -- "$0")/../intentbus.py

said=$(python3 "$bus" set "lock $name" "held by $(uname -n), process $$" --ttl "$duration" --if-absent 2>&1)
code=$?
case $code:$said in
    0:*) ;;
    1:*" is taken."*) exit 75 ;;
    *) printf '%s\n' "$said" >&2; exit $code ;;
esac
[ $# -eq 0 ] || exec "$@"
