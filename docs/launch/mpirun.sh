#!/bin/bash
# One process per host, eight GPUs each, one engine. HOSTFILE has one host per line, the first of which prints.
#
#   docs/launch/mpirun.sh HOSTFILE path/to/checkpoint prompts.txt
#
# Two hosts run tp=8, pp=2; eight hosts tp=8, pp=8; MESH=dp=2,tp=8 (or a file) another mesh. From the repository's root,
# with its environment (.venv) active.
set -euo pipefail
hostfile=$1
model=$2
prompts=$3
hosts=$(grep -cv '^\s*\(#\|$\)' "$hostfile")
mesh=${MESH:-sharding/configs/${hosts}x8-tp8-pp${hosts}.toml}
first=$(grep -v '^\s*\(#\|$\)' "$hostfile" | head -n 1 | cut -d ' ' -f 1)

# mpirun says which process is which, but not where process 0 is. Without --bind-to none a process gets one core.
exec mpirun --hostfile "$hostfile" --map-by ppr:1:node --bind-to none -np "$hosts" -x PATH -x LD_LIBRARY_PATH \
    jaxserve generate --coordinator "$first:12321" \
    --model "$model" --mesh "$mesh" \
    --prompts-file "$prompts" --max-tokens 128
