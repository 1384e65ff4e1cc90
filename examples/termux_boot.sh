#!/bin/sh
# Start a worker when the phone starts: for the app Termux:Boot, which has to be opened once.
#
#   mkdir -p ~/.termux/boot && cp ~/intentbus/examples/termux_boot.sh ~/.termux/boot/ && chmod +x ~/.termux/boot/termux_boot.sh
#
# It starts the worker again ten seconds after it has ended, whatever ended it but Ctrl-C, TERM, or a handler that
# cannot run. What it says is in ~/intentbus.log, which starts anew with each boot. INTENTBUS_GOAL and
# INTENTBUS_HANDLER may name another goal and handler.

cd "$HOME/intentbus" || exit 1
exec >"$HOME/intentbus.log" 2>&1
command -v termux-wake-lock >/dev/null && termux-wake-lock
while :; do
    python3 intentbus.py work --goal "${INTENTBUS_GOAL:-send_notification}" -- "${INTENTBUS_HANDLER:-./examples/handler.sh}"
    code=$?
    case $code in 0 | 2 | 4 | 130 | 143) exit $code ;; esac
    sleep "${INTENTBUS_PAUSE:-10}"
done
