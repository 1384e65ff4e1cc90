#!/bin/sh
# Warn of a disk that is nearly full: publishes a send_notification, at most one an hour for each disk.
#
#   examples/cron_publish.sh [PERCENT [MOUNT...]]      from 90 percent on, / only; 0 always warns
#
# With crontab -e, every ten minutes:
#   */10 * * * * $HOME/intentbus/examples/cron_publish.sh 90 / /home
#
# It is silent unless something is wrong, so cron has nothing to mail; exit code 1 if a warning could not be
# published. The bus is INTENT_BUS_URL, or on this machine; the key is in ~/.apikey.

limit=${1:-90}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- /
case $limit in *[!0-9]*) echo "usage: $0 [PERCENT [MOUNT...]]" >&2; exit 2 ;; esac

PATH=${PATH:-/usr/bin:/bin}:/usr/local/bin:/opt/homebrew/bin     # cron gives little
bus=$(dirname -- "$0")/../intentbus.py
host=$(uname -n)
hour=$(date -u +%Y-%m-%dT%H)

usage_of() {    # "PERCENT FREE SIZE" of a mount point, in GiB; names with spaces stand at both ends of df's line
    df -Pk -- "$1" | LC_ALL=C awk 'NR == 2 && match($0, / [0-9]+ +[0-9]+ +-?[0-9]+ +[0-9]+% /) {
        split(substr($0, RSTART, RLENGTH), blocks)
        printf "%d %.1f %.1f\n", blocks[4], blocks[3] / 1048576, blocks[1] / 1048576
    }'
}

warn() {        # mount, percent, free, size; the key names the hour, so the same warning is stored once in it
    said=$(python3 "$bus" publish send_notification \
        title="Disk nearly full on $host" message="$1 is $2 % full: $3 of $4 GiB are free." \
        mount="$1" percent:="$2" \
        --idempotency-key "disk $hour $host $(printf %s "$1" | cksum)" 2>&1)
    case $?:$said in
        0:*) ;;
        6:*"Key reused"*) ;;     # told in this hour already, with other figures
        *) printf '%s\n' "$said" >&2; return 1 ;;
    esac
}

failed=0
for mount; do
    figures=$(usage_of "$mount")
    if [ -z "$figures" ]; then
        printf '%s\n' "df has no figures for $mount" >&2
        failed=1
    elif [ "${figures%% *}" -ge "$limit" ]; then
        warn "$mount" $figures || failed=1
    fi
done
exit $failed
