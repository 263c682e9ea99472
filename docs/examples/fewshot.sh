#!/usr/bin/env bash
# Three photographs with a word for each, then a fourth without: the model writes the fourth's. Streams as it writes.
#   docs/examples/fewshot.sh [http://127.0.0.1:8000]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
server=${1:-http://127.0.0.1:8000}

image() { printf '{"type":"image_url","image_url":{"url":"data:image/jpeg;base64,%s"}}' "$(base64 <"$1" | tr -d '\n')"; }
text() { printf '{"type":"text","text":"%s"}' "$1"; }
shot() { printf '%s,%s,{"type":"end_of_chunk"},' "$(image "$1")" "$(text "$2")"; }

{
    printf '{"prompt":['
    shot cat.jpg "This is a cat."
    shot coffee.jpg "This is a cup of coffee."
    shot rocket.jpg "This is a rocket."
    printf '%s,%s' "$(image raccoon.jpg)" "$(text "This is a")"
    printf '],"max_tokens":12,"temperature":0,"stream":true,"stream_options":{"include_usage":true}}'
} | curl --silent --show-error --no-buffer --header "Content-Type: application/json" --data-binary @- "$server/v1/completions"
