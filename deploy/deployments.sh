#!/bin/sh
# Registers the work pools and the five deployments of prefect.yaml; run again, it changes nothing that is right.
set -eu
here=$(dirname "$0")
for pool in cpu gpu; do
  prefect work-pool create "$pool" --type process --overwrite
done
BESSEMER_PROJECT=$PWD prefect --no-prompt deploy --all --prefect-file "$here/../prefect.yaml"
