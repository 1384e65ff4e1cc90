#!/bin/sh
# A lock: several machines have the same cron job, and only the first to get the lock runs it.
#
#   examples/lock.sh NAME DURATION [COMMAND [ARGUMENT...]]
#
# With crontab -e, on each machine:
#   0 3 * * * $HOME/intentbus/examples/lock.sh nightly-backup 1h $HOME/bin/backup.sh
#
# Exit code: that of the command, if this machine got the lock (0 without a command); 75 if another machine has it; after
# an error, with nothing run: 2 wrong usage, 4 key refused, 5 bus unreachable. The lock lasts for DURATION (90s, 5m, 1h; at
# most 1d) and is not released when the command ends; otherwise a machine whose clock is slow would run the job again. It
# uses the bus in INTENT_BUS_URL, otherwise the bus joined, otherwise the bus on this machine.

[ $# -ge 2 ] || { echo "usage: $0 NAME DURATION [COMMAND [ARGUMENT...]]" >&2; exit 2; }
name=$1 duration=$2; shift 2
PATH=${PATH:-/usr/bin:/bin}:/usr/local/bin:/opt/homebrew/bin     # cron sets a short PATH
bus=$(dirname -- "$0")/../intentbus.py

said=$(python3 "$bus" set "lock $name" "held by $(uname -n), process $$" --ttl "$duration" --if-absent 2>&1)
code=$?
case $code:$said in
    0:*) ;;
    1:*" is taken."*) exit 75 ;;
    *) printf '%s\n' "$said" >&2; exit $code ;;
esac
[ $# -eq 0 ] || exec "$@"
