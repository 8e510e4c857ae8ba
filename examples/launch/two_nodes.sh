#!/usr/bin/env bash
# One run on several machines: this same command on each of them, at about the same time.
#   NODES=2 HEAD=10.0.0.1 examples/launch/two_nodes.sh run.yaml
# The machines see one folder: that of the run. HEAD is one of them, at whose port 29500 they meet. Where one is lost,
# the others wait for it, or for another that is started in its place with this command, and go on from the last save.
set -euo pipefail
is_host=0 # torchrun does not know an address for its own where the machine's name is not that of the address
for each in $(hostname -I) $(hostname) localhost; do
  if [ "$each" = "${HEAD:?the address of one of the machines}" ]; then is_host=1; fi
done
exec deft launch \
  --nnodes "${NODES:-2}" \
  --nproc-per-node "${RANKS:-auto}" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$HEAD:${PORT:-29500}" \
  --rdzv-conf "is_host=$is_host" \
  --rdzv-id "${RUN_ID:-deft}" \
  --max-restarts "${RESTARTS:-3}" \
  train "$@"
