#!/usr/bin/env bash
# Three drawings with a made-up word each are the shots; then another drawing of each thing, and the model writes its word.
#   docs/examples/fewshot.sh [http://127.0.0.1:8000]
# FLAMBOYANCE_API_KEY is the server's key, if it requires one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
server=${1:-http://127.0.0.1:8000}

key() { # options of curl that send the key, if there is one
    [[ -z ${FLAMBOYANCE_API_KEY:-} ]] || printf 'header = "Authorization: Bearer %s"\n' "$FLAMBOYANCE_API_KEY"
}
image() { printf '{"type":"image_url","image_url":{"url":"data:image/png;base64,%s"}}' "$(base64 <"$1" | tr -d '\n')"; }
text() { printf '{"type":"text","text":"%s"}' "$1"; }
shot() { printf '%s,%s,{"type":"end_of_chunk"},' "$(image "$1")" "$(text "$2")"; }

request() { # the query's file
    printf '{"prompt":['
    shot noto-elephant.png "This is a dax."
    shot noto-bicycle.png "This is a wug."
    shot noto-banana.png "This is a blicket."
    printf '%s,%s' "$(image "$1")" "$(text "This is a")"
    printf '],"max_tokens":12,"temperature":0,"stop":"."}'
}

ask() { # the query's file, the expected word
    local answer
    answer=$(request "$1" | curl --config <(key) --silent --show-error --fail-with-body \
        --header "Content-Type: application/json" --data-binary @- "$server/v1/completions") || { echo "$1: $answer" >&2; exit 1; }
    printf '%s: expected "%s", answered "%s"\n%s\n' \
        "$1" "$2" "$(sed -En 's/.*"text": ?" ?([^"]*)".*/\1/p' <<<"$answer")" "$answer"
}

# the first start downloads and converts the model before the server listens; every start loads the model after that
limit=${WAIT_SECONDS:-1800} # half an hour
status() { curl --silent --fail --max-time 10 --output /dev/null --write-out '%{http_code}' "$@" "$server/health/ready"; }
if ! status > /dev/null; then
    echo "waiting until $server is ready" >&2
    if ! last=$(status --retry "$limit" --retry-max-time "$limit" --retry-delay 1 --retry-connrefused); then
        echo "$server is not ready after $SECONDS s (last status: $last)." \
            "See the server's log, and run this script again." >&2
        exit 1
    fi
fi
ask fluent-elephant.png dax
ask fluent-bicycle.png wug
ask fluent-banana.png blicket
