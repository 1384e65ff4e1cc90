#!/bin/sh
# Show a notification: on a phone (Termux), otherwise on a desktop, otherwise as a line in a file.
#
#   python intentbus.py work --goal send_notification -- ./examples/handler.sh
#
# The payload is {"message": "The backup is done.", "title": "nas"}, whose title is optional, or a text, or the payload of an
# intent that publish --on-success or --on-failure has made. Any other payload is shown as JSON. The file is
# INTENTBUS_NOTIFY_FILE, or ~/notifications.log. A phone needs pkg install termux-api and the app Termux:API.

title=${INTENT_PAYLOAD_title:-${INTENT_PAYLOAD_goal:-intentbus}}
case ${INTENT_PAYLOAD_status:-} in fulfilled) end="done" ;; dead) end="failed" ;; *) end= ;; esac
outcome=${INTENT_PAYLOAD_error:-${INTENT_PAYLOAD_result:-}}
message=${INTENT_PAYLOAD_message:-$end${end:+${outcome:+: $outcome}}}
if [ -z "$message" ]; then     # read it from stdin, which has the payload as JSON
    message=$("${INTENT_PYTHON:-python3}" -c '
import json, sys
payload = json.load(sys.stdin)
message = payload.get("message") or payload if isinstance(payload, dict) else payload
text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False) if message else ""
print("".join(" " if letter < " " or "\x7f" <= letter < "\xa0" else letter for letter in text[:4000]))')
fi
file=${INTENTBUS_NOTIFY_FILE:-$HOME/notifications.log}

phone() {
    command -v termux-notification >/dev/null && termux-notification --title "$title" --content "$message" </dev/null
}

desktop() {     # the text is markup to a desktop, and notify-send interprets \n and the like; it fails without a display
    command -v notify-send >/dev/null &&
        notify-send -- "$title" "$(printf '%s\n' "$message" | sed 's/\\/\\\\/g; s/&/\&amp;/g; s/</\&lt;/g; s/>/\&gt;/g')"
}

line() {        # one line, even if the message has several
    text=$(printf '%s: %s' "$title" "$message" | LC_ALL=C tr '[:cntrl:]' ' ')
    printf '%s  %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$text" >>"$file"
}

if [ -z "$message" ]; then
    echo 'The payload is empty; send a text, or {"message": "..."}.' >&2
    exit 100    # no retry: another attempt would find the same payload
fi

if phone; then echo "shown on the phone"
elif desktop; then echo "shown on the desktop"
elif line; then echo "written to $file"
else exit 1; fi
