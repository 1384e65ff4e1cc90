#!/bin/sh
# A worker with only curl (7.55 or newer) and a shell: runs a command for each intent with a goal.
#
#   examples/curl_worker.sh GOAL COMMAND [ARGUMENT...]      e.g.  examples/curl_worker.sh hello wc -c
#
# The command gets the claimed intent as JSON on stdin. Exit code 0: its stdout is the result, as text. 100: the
# intent is dead at once. 126, 127: the intent is released, and this worker stops. Any other: it is retried later. The
# command must end within LEASE seconds (300). First Ctrl-C or TERM: finish, then stop; second: end the command and
# release the intent. Settings: INTENT_BUS_URL, INTENT_API_KEY (or the key in ~/.apikey), INTENT_BUS_NAMESPACE; ONCE=1
# stops after one intent.

[ $# -ge 2 ] || { echo "usage: $0 GOAL COMMAND [ARGUMENT...]" >&2; exit 2; }
goal=$1; shift
url=$(printf %s "${INTENT_BUS_URL:-http://127.0.0.1:8787}" | tr -d '\r')      # files from Windows have CR LF
namespace=$(printf %s "${INTENT_BUS_NAMESPACE:-default}" | tr -d '\r')
key=${INTENT_API_KEY:-$(cat "$HOME/.apikey")} && key=$(printf %s "$key" | LC_ALL=C tr -cd '!-~') && [ "$key" ] || exit 2
unset INTENT_API_KEY                        # the command must not see it
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT

new_token() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

signals=0 patience=9 running= token=$(new_token)
interrupted() {
    signals=$((signals + 1))
    if [ $signals -ge $patience ]; then kill "$running" 2>/dev/null; fi
}
trap interrupted INT TERM

await() {           # PATIENCE COMMAND: run it until PATIENCE signals came; Ctrl-C does not reach the background
    patience=$1; shift
    "$@" & running=$!
    wait $running; code=$?
    while kill -0 $running 2>/dev/null; do wait $running; code=$?; done     # a signal ends the wait, not the child
    patience=9
}

post() {            # PATH and curl's options; fills $tmp/answer and $tmp/status; ps does not show the key on stdin
    path=$1; shift; : >"$tmp/answer"
    exec curl -sS -X POST -H @- -o "$tmp/answer" -w '%{http_code}' -m 60 "$@" "${url%/}$path" >"$tmp/status" <<EOF
X-API-KEY: $key
X-Claim-Token: $token
EOF
}

command_of() { exec "$@" <"$tmp/intent" >"$tmp/output" 2>"$tmp/errors"; }

json_string() {     # stdin as a JSON string (RFC 8259, section 7); NUL is left out
    LC_ALL=C tr -d '\000' | LC_ALL=C awk '
        BEGIN { for (i = 1; i < 32; i++) code[sprintf("%c", i)] = sprintf("\\u%04x", i)
                code["\\"] = "\\\\"; code["\""] = "\\\""; printf "\"" }
              { if (NR > 1) printf "\\n"
                for (i = 1; i <= length($0); i++) { c = substr($0, i, 1); printf "%s", c in code ? code[c] : c } }
        END   { printf "\"" }'
}

report() {          # VERB (fulfill, fail or release) and further fields; safe to repeat with the same token
    printf '{"claim_token": "%s"%s}' "$token" "$2" >"$tmp/body"
    await 9 post "/$1/$id" -H 'Content-Type: application/json' --data-binary @"$tmp/body" --retry 4 --retry-connrefused
    status=$(cat "$tmp/status")
    case $status in
        200) echo "$id $1" >&2 ;;
        *) echo "$id $1 was not accepted: $status $(cat "$tmp/answer")" >&2 ;;
    esac
}

claim() {           # set id, empty if there is no intent; after a lost answer, the same token gets the same intent
    id=''
    await 1 post /claim -G --data-urlencode "goal=$goal" --data-urlencode "namespace=$namespace" \
        -d wait=20 -d "lease=${LEASE:-300}"
    case $(cat "$tmp/status") in
        200) cp "$tmp/answer" "$tmp/intent"
             id=$(sed -n 's/^{"id": *"\([0-9a-f]*\)".*/\1/p' "$tmp/intent") ;;
        204) ;;
        4*)  cat "$tmp/answer" >&2; exit 4 ;;
        *)   [ $signals -gt 0 ] || await 1 sleep 5 ;;     # curl has printed the error
    esac
}

work() {            # run the command and report the outcome
    await 2 command_of "$@"
    error=", \"error\": $( { echo "exit code $code"; tail -c 1900 "$tmp/errors"; } | LC_ALL=C tr -c '\n\t -~' '?' | json_string)"
    if [ $signals -gt 1 ]; then report release; return; fi
    case $code in
        0) report fulfill ", \"result_type\": \"text\", \"result\": $(json_string <"$tmp/output")"
           case $status in 400 | 413) report fail ', "retry": false, "error": "The output is too long, or not UTF-8."' ;; esac ;;
        100) report fail "$error, \"retry\": false" ;;
        126 | 127) report release; cat "$tmp/errors" >&2; exit 2 ;;
        *) report fail "$error" ;;
    esac
}

while [ $signals -eq 0 ]; do
    claim
    [ "$id" ] || continue
    work "$@"
    token=$(new_token)
    [ -z "$ONCE" ] || break
done
