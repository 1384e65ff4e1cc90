#!/bin/sh
# Warn of a nearly full disk: publish a send_notification, at most one an hour for each disk.
#
#   examples/cron_publish.sh [PERCENT [MOUNT...]]      default: 90 percent, of / only; 0 always warns
#
# With crontab -e, every ten minutes:
#   */10 * * * * $HOME/intentbus/examples/cron_publish.sh 90 / /home
#
# It prints nothing unless something is wrong, so cron sends no mail. Exit code 1: a warning could not be published.
# It uses the bus in INTENT_BUS_URL, otherwise the bus joined, otherwise the bus on this machine.

limit=${1:-90}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- /
case $limit in *[!0-9]*) echo "usage: $0 [PERCENT [MOUNT...]]" >&2; exit 2 ;; esac

PATH=${PATH:-/usr/bin:/bin}:/usr/local/bin:/opt/homebrew/bin     # cron sets a short PATH
bus=$(dirname -- "$0")/../intentbus.py
host=$(uname -n)
hour=$(date -u +%Y-%m-%dT%H)

usage_of() {    # print "PERCENT FREE SIZE" of a mount point, in GiB; df's names at both ends of a line may have spaces
    df -Pk -- "$1" | LC_ALL=C awk 'NR == 2 && match($0, / [0-9]+ +[0-9]+ +-?[0-9]+ +[0-9]+% /) {
        split(substr($0, RSTART, RLENGTH), blocks)
        printf "%d %.1f %.1f\n", blocks[4], blocks[3] / 1048576, blocks[1] / 1048576
    }'
}

warn() {        # MOUNT PERCENT FREE SIZE; the key names the hour, so that the bus stores one warning an hour
    said=$(python3 "$bus" publish send_notification \
        title="Disk nearly full on $host" message="$1 is $2 % full: $3 of $4 GiB are free." \
        mount="$1" percent:="$2" \
        --idempotency-key "disk $hour $host $(printf %s "$1" | cksum)" 2>&1)
    case $?:$said in
        0:*) ;;
        6:*"Key reused"*) ;;     # already sent in this hour, with other figures
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
