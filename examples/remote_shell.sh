#!/bin/sh
# Run a few commands on a machine without a public address, such as a phone. The machine asks the bus for requests.
#
#   examples/remote_shell.sh serve [AS]         on that machine: run the requests, until Ctrl-C; AS is its name
#   examples/remote_shell.sh run NAME [ON]      on another: request the command NAME (of the machine ON, or of any) and
#                                               print its output
#
# Only the commands listed below are run, and no text of a request becomes part of a command. Exit code of run: 0 success;
# 1 it failed, or no machine took it within a minute; others as in README. Both use the bus in INTENT_BUS_URL, otherwise the
# bus joined, otherwise the bus on their machine. The key of the machine that serves needs the role work only
# (keys invite phone --role work).

here=$(dirname -- "$0")
bus=$here/../intentbus.py

do_it() {           # the list of commands; after a change, restart serve
    case $1 in
        uptime)  program uptime ;;
        date)    program date ;;
        disk)    program df -h ;;
        memory)  program free -m ;;
        system)  program uname -a ;;
        battery) program termux-battery-status ;;
        *)       reject "There is no command '$1' here; there are: uptime date disk memory system battery." ;;
    esac
}

program() {
    command -v "$1" >/dev/null || reject "There is no program '$1' on this machine."
    exec "$@"
}

reject() {          # exit code 100: no retry, since it would fail too
    printf '%s\n' "$1" >&2
    exit 100
}

case $1:$# in
    serve:[12])
        exec python3 "$bus" work --goal remote_shell --worker-id "${2:-$(uname -n)}" --timeout 30s --result text -- \
            "$here/$(basename -- "$0")" do "{name}" ;;
    run:2 | run:3)
        exec python3 "$bus" publish remote_shell name="$2" ${3:+--worker "$3"} --ttl 1m --max-attempts 1 --wait=70s ;;
    do:2)
        do_it "$2" ;;
    *)
        echo "usage: $0 serve [AS] | $0 run NAME [ON]" >&2
        exit 2 ;;
esac
