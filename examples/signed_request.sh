#!/bin/sh
# A signed request with only curl and openssl, for plain HTTP: the key itself never leaves this machine.
#
#   examples/signed_request.sh POST /intent '{"goal": "hello", "payload": {"name": "world"}}'
#   examples/signed_request.sh GET /status/ID
#   examples/signed_request.sh POST /fulfill/ID - <answer.json
#
# Prints the answer. Exit code 0: success; 1: refused, the answer says why; 2: wrong usage; 5: bus unreachable. Settings:
# INTENT_BUS_URL, INTENT_API_KEY (or the key in ~/.apikey). Others on the network can read the body and the answer, but
# cannot change the body, since the signature covers it. A path with a query is not supported, since a signature needs its
# parameters sorted and encoded.

[ $# -ge 2 ] || { echo "usage: $0 METHOD PATH [BODY, or - for stdin]" >&2; exit 2; }
case $2 in /*[?#%\ ]* | [!/]*) echo "The path must be like /status/ID, without a query or percent signs." >&2; exit 2 ;; esac
method=$1 path=$2
url=$(printf %s "${INTENT_BUS_URL:-http://127.0.0.1:8787}" | tr -d '\r')      # files from Windows have CR LF
key=${INTENT_API_KEY:-$(cat "$HOME/.apikey")} && key=$(printf %s "$key" | LC_ALL=C tr -cd '!-~') && [ "$key" ] || exit 2
unset INTENT_API_KEY
umask 077
tmp=$(mktemp -d) || exit 2
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM
if [ "$3" = - ]; then cat; else printf %s "$3"; fi >"$tmp/body"

# openssl takes the key of an HMAC only as an argument, which every user of this machine can see. So the HMAC is made
# from plain hashes (RFC 2104): H((key xor opad) + H((key xor ipad) + text)). printf is part of the shell, so its
# arguments are not visible.

hash() { openssl dgst -sha256 -binary; }
octal() { od -An -v -to1; }
bytes() { printf %b "$(printf '\\0%s' $*)"; }       # write the bytes with these octal numbers

xored() {           # NUMBER: print the key, padded to 64 bytes, each byte xor NUMBER
    left=64
    for byte in $key_bytes; do printf '%03o ' $((0$byte ^ $1)); left=$((left - 1)); done
    while [ $left -gt 0 ]; do printf '%03o ' "$1"; left=$((left - 1)); done
}

if [ ${#key} -gt 64 ]; then key_bytes=$(printf %s "$key" | hash | octal); else key_bytes=$(printf %s "$key" | octal); fi
time=$(date +%s) nonce=$(openssl rand -hex 16)
inner=$({ bytes "$(xored 54)"; printf '%s\n' "$method" "$path" "$time" "$nonce"; cat "$tmp/body"; } | hash | octal)
signature=$({ bytes "$(xored 92)"; bytes "$inner"; } | hash | od -An -v -tx1 | tr -d ' \n')

id=owner            # the id is part of an issued key
case $key in tk_*) [ ${#key} -ne 59 ] || { id=${key#tk_}; id=${id%"${id#????????????????}"}; } ;; esac

set -- -sS -X "$method" -o "$tmp/answer" -w '%{http_code}' -m 60 -H "X-Key-ID: $id" -H "X-Timestamp: $time" \
    -H "X-Nonce: $nonce" -H "X-Signature: $signature" -H 'Content-Type: application/json'
[ "$method" = GET ] || set -- "$@" --data-binary @"$tmp/body"
status=$(curl "$@" "${url%/}$path") || exit 5
[ ! -s "$tmp/answer" ] || { cat "$tmp/answer"; echo; }
case $status in 2*) ;; *) exit 1 ;; esac
