#!/bin/sh
# Starts Triton with interfaces closed: `closed.sh INTERFACES tritonserver ...`.
#
# They ask for the header "evit-key" (in gRPC "triton-grpc-protocol-evit-key") with a key that is made here, at every
# start, and is written nowhere: no client has it. An operator who needs them sets EVIT_KEY from a secret.
set -eu
closed=$1
shift
case ${1:-} in
tritonserver | */tritonserver)
    key=${EVIT_KEY:-$(od -An -N32 -v -tx1 /dev/urandom | tr -d ' \n')}
    if [ ${#key} -lt 32 ]; then
        echo "closed.sh: the key has ${#key} characters, and 32 or more are needed" >&2
        exit 1
    fi
    set -- "$@" "--http-restricted-api=$closed:evit-key=$key" "--grpc-restricted-protocol=$closed:evit-key=$key"
    ;;
esac
exec "$@"
