#!/bin/sh
# Back up a folder in steps: an attempt goes on where the last one has ended, even after a crash of the machine.
#
#   python intentbus.py work --goal backup --timeout 1h -- ./examples/backup_in_steps.sh
#   python intentbus.py publish backup folder=/home/you/photos to=you@nas:backups
#
# The payload names the folder, and where the backup goes: a folder, or HOST:FOLDER by scp. Unfinished files are in
# BACKUP_WORK, ~/.cache/backup by default. They are on one machine, so the names of steps that use them have its name in it:
# another machine does these again, but does not upload again.

set -eu

at() {      # run a command where the backup goes
    case $1 in *:*) ssh "${1%%:*}" "cd '${1#*:}' && $2" ;; *) (cd "$1" && sh -c "$2") ;; esac
}

case ${1:-} in
upload)     # TO FILE NAME: it has its name once it is complete
    case $2 in *:*) scp -q "$3" "$2/$4.part" ;; *) cp "$3" "$2/$4.part" ;; esac
    at "$2" "mv '$4.part' '$4'"
    cksum <"$3"
    exit ;;
verify)     # TO NAME CHECKSUM
    [ "$(at "$2" "cksum <'$3'")" = "$4" ] || { echo "$2/$3 is damaged" >&2; exit 1; }
    exit ;;
esac

step() { "$INTENT_PYTHON" "$INTENT_BUS_PROGRAM" step "$@" || exit; }     # its exit code ends this script, too
here() { label="$1 on ${BACKUP_MACHINE:-$(uname -n)}"; shift; step "$label" "$@"; }

from=${INTENT_PAYLOAD_folder:?the payload has no folder}
to=${INTENT_PAYLOAD_to:?the payload does not say where to}
work=${BACKUP_WORK:-$HOME/.cache/backup}/$INTENT_ID
file=$work/backup.tar
name=backup-$INTENT_ID.tar.gz

mkdir -p "$work"
here dump -- tar -cf "$file" -C "$from" .
here compress -- sh -c 'gzip -n <"$1" >"$1.gz"' sh "$file"
checksum=$(step upload -- "$0" upload "$to" "$file.gz" "$name")
step verify -- "$0" verify "$to" "$name" "$checksum"
here clean -- rm -rf "$work"
echo "$to/$name"
