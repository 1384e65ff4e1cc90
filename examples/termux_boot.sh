#!/bin/sh
# Start a worker when the phone starts, with the app Termux:Boot, which must be opened once.
#
#   mkdir -p ~/.termux/boot && cp ~/intentbus/examples/termux_boot.sh ~/.termux/boot/ && chmod +x ~/.termux/boot/termux_boot.sh
#
# It restarts a worker that ends, after ten seconds, unless Ctrl-C, TERM, a refused key or wrong setup ended it. The log is
# ~/intentbus.log; each boot starts a new one. INTENTBUS_GOAL and INTENTBUS_HANDLER set another goal and handler.
#
# With the tunnel below, it also opens an ssh tunnel to the bus, again and again: when the network has changed, ssh notices
# within 90 seconds. It needs an ssh key without a passphrase: ssh-keygen -t ed25519 -N "" && ssh-copy-id you@bus.example.com

tunnel=${INTENTBUS_TUNNEL:-}     # you@bus.example.com; empty with Tailscale or https, which need no tunnel
ports=${INTENTBUS_PORTS:-8787:127.0.0.1:8787}     # of this phone, and of the bus on that machine

keep_tunnel() {
    trap 'kill "$child" 2>/dev/null; exit' TERM
    while :; do
        ssh -N -o ServerAliveInterval=30 -o ServerAliveCountMax=3 -o ExitOnForwardFailure=yes -o BatchMode=yes -L "$ports" "$tunnel" &
        child=$!
        wait "$child"
        echo "the tunnel to $tunnel has ended; it is opened again"
        sleep "${INTENTBUS_PAUSE:-10}" &
        child=$!
        wait "$child"
    done
}

cd "$HOME/intentbus" || exit 1
exec >"$HOME/intentbus.log" 2>&1
command -v termux-wake-lock >/dev/null && termux-wake-lock
if [ -n "$tunnel" ]; then
    keep_tunnel &
    trap 'kill '$! EXIT
    trap 'exit 143' TERM
fi
while :; do
    python3 intentbus.py work --goal "${INTENTBUS_GOAL:-send_notification}" -- "${INTENTBUS_HANDLER:-./examples/handler.sh}"
    code=$?
    case $code in 0 | 2 | 4 | 130 | 143) exit $code ;; esac
    sleep "${INTENTBUS_PAUSE:-10}"
done
