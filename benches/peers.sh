#!/bin/bash
# Sets llama.cpp and torch beside this crate, on the same weights: prefill of 512 and 2048 tokens and
# decoding of 64, two threads, taking turns.
#
#     bash benches/peers.sh
#
# The model is SmolLM2, where the README fetches it to, or where HYBRID_ATTENTION_SMOLLM2 says it is.
# llama.cpp is built by pip from the sdist of llama-cpp-python, for this very processor; torch and
# transformers come from PyPI. All of it goes to a temporary folder, or to $PEERS, which is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
peers=$(realpath -m "${PEERS:-$(mktemp -d)}") # benches run in a folder of their own
[ -n "${PEERS:-}" ] || trap 'rm -rf "$peers"' EXIT
mkdir -p "$peers"

if [ ! -e "$peers/venv/bin/python" ]; then
    python3 -m venv "$peers/venv"
    "$peers/venv/bin/pip" install -q cmake ninja numpy
    PATH=$peers/venv/bin:$PATH "$peers/venv/bin/pip" install -q --no-binary llama-cpp-python llama-cpp-python
    "$peers/venv/bin/pip" install -q torch transformers safetensors ||
        echo "torch or transformers could not be installed: left out" >&2
fi

cargo bench -q --bench speed -- --write "$peers/models"
OMP_NUM_THREADS=2 "$peers/venv/bin/python" benches/peers.py "$peers/models"
cargo bench -q --bench speed
