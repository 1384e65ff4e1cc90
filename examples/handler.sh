#!/bin/sh
# Show a notification: on a phone (Termux), else on a desktop, else as a line in a file.
#
#   python intentbus.py work --goal send_notification -- ./examples/handler.sh
#
# The payload: {"message": "The backup is done.", "title": "nas"}; the title may be left out. The file is
# INTENTBUS_NOTIFY_FILE, or ~/notifications.log. On a phone: pkg install termux-api, and the Termux:API app.

title=${INTENT_PAYLOAD_title:-intentbus}
message=${INTENT_PAYLOAD_message:-}
file=${INTENTBUS_NOTIFY_FILE:-$HOME/notifications.log}

phone() {
    command -v termux-notification >/dev/null && termux-notification --title "$title" --content "$message" </dev/null
}

desktop() {     # it reads \n and the like, so a backslash is doubled; without a display it fails
    command -v notify-send >/dev/null &&
        notify-send -- "$title" "$(printf '%s\n' "$message" | sed 's/\\/\\\\/g')"
}

line() {        # one line, whatever the message holds
    text=$(printf '%s: %s' "$title" "$message" | LC_ALL=C tr '[:cntrl:]' ' ')
    printf '%s  %s\n' "$(date '+%Y-%m-%d %H:%M:%S')" "$text" >>"$file"
}

if [ -z "$message" ]; then
    echo 'The payload has no message; send {"message": "..."}.' >&2
    exit 100    # for good: another attempt would find none either
fi

if phone; then echo "shown on the phone"
elif desktop; then echo "shown on the desktop"
elif line; then echo "written to $file"
else exit 1; fi
