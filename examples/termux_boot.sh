#!/bin/sh
# Start a worker when the phone starts, with the app Termux:Boot, which must be opened once.
#
#   mkdir -p ~/.termux/boot && cp ~/intentbus/examples/termux_boot.sh ~/.termux/boot/ && chmod +x ~/.termux/boot/termux_boot.sh
#
# It restarts a worker that ends, after ten seconds, unless Ctrl-C, TERM, a refused key or wrong setup ended it. The log is
# ~/intentbus.log; each boot starts a new one. INTENTBUS_GOAL and INTENTBUS_HANDLER set another goal and handler.

cd "$HOME/intentbus" || exit 1
exec >"$HOME/intentbus.log" 2>&1
command -v termux-wake-lock >/dev/null && termux-wake-lock
while :; do
    python3 intentbus.py work --goal "${INTENTBUS_GOAL:-send_notification}" -- "${INTENTBUS_HANDLER:-./examples/handler.sh}"
    code=$?
    case $code in 0 | 2 | 4 | 130 | 143) exit $code ;; esac
    sleep "${INTENTBUS_PAUSE:-10}"
done
