#!/usr/bin/env bash
# Runs the tests. Sets everything up on the first start.
#   ./test.sh           the quick ones
#   ./test.sh --all     and the slow ones
# Other arguments go to pytest: ./test.sh tests/unit/flow -k sigma
set -euo pipefail
# shellcheck source=tools/environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/tools/environment.sh"

environment dev
cd -- "$root"
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
exec "$python" -P -m pytest "$@"
