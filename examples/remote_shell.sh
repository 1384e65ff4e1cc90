#!/bin/sh
# A few commands on a machine that nobody can reach, such as a phone behind a mobile network. It asks the bus for them.
#
#   examples/remote_shell.sh serve [AS]         there: do what is asked, until Ctrl-C; AS is this machine's name
#   examples/remote_shell.sh run NAME [ON]      here: have it done (by the machine ON, else by any), print what it says
#
# Only what stands in the list below is ever run, and nothing of a request becomes part of a command. Exit code of run:
# 0 done; 1 it ended badly, or nobody took it within a minute; others as the README says. The bus is INTENT_BUS_URL, or on
# this machine; the key is in ~/.apikey: give the machine there one that may only work (keys add phone --role work).

here=$(dirname -- "$0")
bus=$here/../intentbus.py

do_it() {           # the whitelist: add a line, and restart serve
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

reject() {          # exit code 100: for good, another attempt would find the same
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
