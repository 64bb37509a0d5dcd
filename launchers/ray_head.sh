#!/usr/bin/env bash
# Starts a Ray head on this machine, bound to localhost, with token authentication, in the foreground (Ctrl-C ends it).
# Usage: launchers/ray_head.sh [options of `ray start`]
# The token is RAY_AUTH_TOKEN, or the file ~/.ray/auth_token, which is made if absent.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/ray ] && PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token
[ -n "${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-}" ] || ray get-auth-token --generate >/dev/null
exec ray start --head --block --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1 --disable-usage-stats "$@"
