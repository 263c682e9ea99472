#!/usr/bin/env bash
# From pictures in folders by label, FOLDER/LABEL/*.jpg, to a support set; how well it answers, by shots and strategy; and
# a picture that it classifies. Without a folder, what is alive and what is made, out of the photographs here.
#   docs/examples/support_set.sh [http://127.0.0.1:8000 [FOLDER QUERY.jpg]]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
server=${1:-http://127.0.0.1:8000}

pictures() { # label <tab> file, a line each
    if [ -z "${1:-}" ]; then
        printf '%s\t%s\n' alive "$here/cat.jpg" made "$here/coffee.jpg" alive "$here/astronaut.jpg" made "$here/rocket.jpg"
        return
    fi
    for file in "$1"/*/*.jpg; do
        printf '%s\t%s\n' "$(basename "$(dirname "$file")")" "$file"
    done
}

call() { # path, then curl's own options; a refusal is shown and ends all
    local path=$1 answer
    shift
    answer=$(curl --silent --show-error --fail-with-body "$server$path" "$@") || { echo "$path: $answer" >&2; exit 1; }
    printf '%s\n' "$answer"
}
send() { call "$1" --header "Content-Type: application/json" --data-binary "$2"; }
upload() { call /v1/images --header "Content-Type: application/octet-stream" --data-binary "@$1" | field id; }
field() { sed -En "s/^\{([^{]*,)?\"$1\": ?\"([^\"]*)\".*/\2/p"; } # of an object, before any object in it

examples=$(pictures "${2:-}" | while IFS=$'\t' read -r label file; do
    image=$(upload "$file")
    printf '{"image":"%s","label":"%s"},' "$image" "$label"
done)
set=$(send /v1/support_sets "{\"ttl_seconds\":3600,\"examples\":[${examples%,}]}" | field id)
send "/v1/support_sets/$set/warm" '{"wait":true}'

evaluation=$(send "/v1/support_sets/$set/evaluate" '{"strategies":["first","rices_image"]}' | field id)
while true; do
    found=$(call "/v1/evaluations/$evaluation")
    case $(field status <<<"$found") in
        queued | running) sleep 1 ;;
        completed) break ;;
        *) echo "the evaluation did not end well: $found" >&2; exit 1 ;;
    esac
done
printf '%s\n' "$found"

query=$(upload "${3:-$here/raccoon.jpg}")
send /v1/classify "{\"query\":{\"image\":\"$query\"},\"examples\":{\"support_set\":\"$set\",\"k\":4,\"strategy\":\"rices_image\"}}"
