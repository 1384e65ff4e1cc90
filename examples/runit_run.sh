#!/bin/sh
# A worker under runit, for example in Termux (pkg install termux-services, then restart Termux):
#
#   mkdir -p "$PREFIX/var/service/intentbus/log"
#   cp ~/intentbus/examples/runit_run.sh "$PREFIX/var/service/intentbus/run" && chmod +x "$PREFIX/var/service/intentbus/run"
#   ln -sf "$PREFIX/share/termux-services/svlogger" "$PREFIX/var/service/intentbus/log/run"
#   sv-enable intentbus              sv up, sv down, sv status intentbus
#
# INTENTBUS_GOAL and INTENTBUS_HANDLER set another goal and handler.

cd "$HOME/intentbus" || exit 1
exec python3 intentbus.py work --goal "${INTENTBUS_GOAL:-send_notification}" -- "${INTENTBUS_HANDLER:-./examples/handler.sh}" 2>&1
