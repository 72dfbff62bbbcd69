#!/usr/bin/env bash
# Runs one v4jax command on every worker of a Cloud TPU VM pod. The workers find each other by themselves.
#
#   TPU=my-pod ZONE=us-east5-a SOURCE=/mnt/shared/v4jax-0.1.0-py3-none-any.whl scripts/pod_tpu_vm.sh \
#     finetune gs-mounted/DeepSeek-V4-Flash --data corpus/ --out /mnt/shared/run --mesh expert=64,fsdp=8
#
# Needs: gcloud, logged in; a queued resource that is ACTIVE, for example
#   gcloud compute tpus queued-resources create my-pod --node-id my-pod --zone us-east5-a \
#     --accelerator-type v5p-1024 --runtime-version v2-alpha-tpuv5
# and paths that all workers see (a mounted bucket or Filestore): model, data and --out are shared.
set -euo pipefail

: "${TPU:?name of the TPU VM}" "${ZONE:?its zone}" "${SOURCE:?what pip installs: a wheel that all workers see}"
if [ $# -eq 0 ]; then
  echo "usage: TPU=NAME ZONE=ZONE SOURCE=WHEEL $0 VERB ARGUMENTS…" >&2
  exit 2
fi

on_all() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

# Once per pod; pip leaves it alone when it is there.
on_all "python3 -m venv ~/v4jax-env && ~/v4jax-env/bin/pip install --quiet '${SOURCE}[tpu,train]'"

# printf %q keeps each argument one word through the remote shell. A worker that fails ends the others; the same command
# again goes on from the last saved state.
on_all "~/v4jax-env/bin/v4jax $(printf '%q ' "$@")"
