#!/usr/bin/env bash
# Registers images in folders by label, SHOTS/LABEL/*.jpg, as a support set; evaluates it by leave-one-out; and classifies
# other images, QUERIES/LABEL/*.jpg, as the evaluation recommends. Without folders, the textures of docs/examples.
#   docs/examples/support_set.sh [http://127.0.0.1:8000 [SHOTS QUERIES]]
# FLAMBOYANCE_API_KEY is the server's key, if it requires one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
server=${1:-http://127.0.0.1:8000}
shots=${2:-$here/textures/shots}
queries=${3:-$here/textures/queries}

key() { # options of curl that send the key, if there is one
    [[ -z ${FLAMBOYANCE_API_KEY:-} ]] || printf 'header = "Authorization: Bearer %s"\n' "$FLAMBOYANCE_API_KEY"
}
call() { # path, then curl's own options; an error response is printed and ends the script
    local path=$1 answer
    shift
    answer=$(curl --config <(key) --silent --show-error --fail-with-body "$server$path" "$@") ||
        { echo "$path: $answer" >&2; exit 1; }
    printf '%s\n' "$answer"
}
send() { call "$1" --header "Content-Type: application/json" --data-binary "$2"; }
upload() { call /v1/images --header "Content-Type: application/octet-stream" --data-binary "@$1" | field id; }
# a text or number before the first nested object
field() { sed -En "s/^\{([^{]*,)?\"$1\": ?(\"([^\"]*)\"|([^\",}]*)).*/\3\4/p"; }
nested() { # the first object or text of that name, at any depth
    local json pattern="\"$1\": ?(\{[^}]*\}|\"[^\"]*\")"
    json=$(cat)
    [[ ! $json =~ $pattern ]] || printf '%s\n' "${BASH_REMATCH[1]}"
}
label() { basename "$(dirname "$1")"; }

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

# register and warm
files=("$shots"/*/*.jpg)
[[ -e ${files[0]} ]] || { echo "$shots has no images: it needs a folder for each label, with .jpg files" >&2; exit 1; }
examples=
for file in "${files[@]}"; do
    image=$(upload "$file")
    examples+="{\"image\":\"$image\",\"label\":\"$(label "$file")\"},"
done
set=$(send /v1/support_sets "{\"ttl_seconds\":3600,\"examples\":[${examples%,}]}" | field id)
send "/v1/support_sets/$set/warm" '{"wait":true}' | nested label_counts

# evaluate: is likeness enough, or is the language model better, with four shots at random or by similarity to the query?
k=$((${#files[@]} > 4 ? 4 : ${#files[@]} - 1))
evaluation=$(send "/v1/support_sets/$set/evaluate" "{\"k\":[$k],\"strategies\":[\"random\",\"rices_image\"]}" | field id)
while true; do
    result=$(call "/v1/evaluations/$evaluation")
    case $(field status <<<"$result") in
        queued | running) sleep 1 ;;
        completed) break ;;
        *) echo "the evaluation did not complete: $result" >&2; exit 1 ;;
    esac
done
nested reason <<<"$result"
nested note <<<"$result"

# classify; the server chooses the method if none is recommended
recommended=$(sed -En 's/.*"recommendation": ?\{/{/p' <<<"$result")
if [[ -n $recommended ]]; then
    how="\"examples\":$(nested examples <<<"$recommended"),\"method\":$(nested method <<<"$recommended")"
else
    how="\"examples\":{\"support_set\":\"$set\"}"
fi
for file in "$queries"/*/*.jpg; do
    image=$(upload "$file")
    answer=$(send /v1/classify "{\"query\":{\"image\":\"$image\"},$how}")
    confidence=$(field confidence <<<"$answer")
    printf '%s: expected "%s", answered "%s" (confidence %s)\n' \
        "${file#"$queries"/}" "$(label "$file")" "$(field label <<<"$answer")" "${confidence:0:5}"
done
