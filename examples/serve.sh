#!/usr/bin/env bash
# Serve a packed model over HTTP with `transformers serve`, ask it once, and stop.
#
#     bash examples/serve.sh [DIR]        # default: the bundled model, quantized now into ./quantized
#
# PYTHON names the interpreter that hf-littlebit is installed in (default: python), PORT the port (default: 8000).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
url="http://localhost:${PORT:-8000}"
model=${1:-quantized}

if ! "$python" -c 'import sys; from transformers.utils.import_utils import is_serve_available as s; sys.exit(not s())'; then
    echo 'serve.sh: transformers serve needs more packages: pip install "transformers[serving]"' >&2
    exit 1
fi
if [ ! -e "$model/config.json" ]; then
    "$python" "$here/quantize.py" --out "$model"
fi

# The packed checkpoint needs hf_littlebit imported; `python -m hf_littlebit` does that for any program.
"$python" -m hf_littlebit transformers.cli.transformers serve "$model" --device cpu --port "${PORT:-8000}" &
server=$!
trap 'kill $server; wait $server || true' EXIT
for _ in $(seq 60); do
    kill -0 $server
    curl --silent --fail "$url/health" >/dev/null && break
    sleep 1
done

echo "answer of $url/v1/completions:"
curl --silent --show-error --fail "$url/v1/completions" --header 'Content-Type: application/json' \
    --data "{\"model\": \"$model\", \"prompt\": \"def read_lines(path):\\n\", \"max_tokens\": 40}"
echo
