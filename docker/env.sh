#!/usr/bin/env bash
# Write docker/.env, which compose.yaml reads: a token and keys of chance, once; what is there stays.
set -euo pipefail

file=$(cd "$(dirname "$0")" && pwd)/.env
if [ -e "$file" ]; then
  echo "$file is there already and stays as it is"
  exit 0
fi
random() { head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n'; }
umask 077
cat >"$file" <<END
# What the cluster of compose.yaml asks for, and what whisper-jobs on this machine needs: set -a; . docker/.env; set +a
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(random)
RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
AWS_ACCESS_KEY_ID=whisper-jobs
AWS_SECRET_ACCESS_KEY=$(random)
AWS_ENDPOINT_URL=http://127.0.0.1:8333
AWS_REGION=us-east-1
END
echo "wrote $file"
