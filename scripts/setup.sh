#!/usr/bin/env bash
# Installs what building, testing and fetching the model need, from Debian 12's or Ubuntu 24.04's own packages.
# usage: scripts/setup.sh [--check]     --check adds what scripts/check.sh reads with (clang-format, clang-tidy, clang)
# Does nothing, and needs no root, when everything is there.
set -euo pipefail
packages=(build-essential cmake ninja-build ccache git ca-certificates python3 python3-venv libfmt-dev nlohmann-json3-dev
  libsqlite3-dev zlib1g-dev libcli11-dev catch2 libbenchmark-dev)
# oneDNN multiplies faster; without it (it is in Debian's main and Ubuntu's universe) own loops serve.
# libcurl fetches suites; without it they come from a folder.
optional=(libdnnl-dev libcurl4-openssl-dev)
case ${1:-} in
  --check) packages+=(clang-format clang-tidy clang) ;;
  "") ;;
  *) echo "setup: unknown argument \"$1\"; usage: scripts/setup.sh [--check]" >&2; exit 2 ;;
esac
command -v dpkg-query >/dev/null || {
  echo "setup: this is not Debian or Ubuntu; install these yourself: ${packages[*]} ${optional[*]}" >&2
  exit 1
}
missing_of() {
  local p
  for p in "$@"; do
    dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q '^install ok installed' || echo "$p"
  done
}
mapfile -t missing < <(missing_of "${packages[@]}")
mapfile -t wanted < <(missing_of "${optional[@]}")
[ $((${#missing[@]} + ${#wanted[@]})) -eq 0 ] && exit 0
if [ "$(id -u)" -ne 0 ]; then
  if [ ${#missing[@]} -eq 0 ]; then
    echo "setup: ${wanted[*]} is missing (optional, faster products); as root: apt-get install ${wanted[*]}" >&2
    exit 0
  fi
  echo "setup: packages are missing; run as root: apt-get install ${missing[*]} ${wanted[*]}" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
echo "setup: installing ${missing[*]} ${wanted[*]}"
apt-get update -qq
[ ${#missing[@]} -eq 0 ] || install "${missing[@]}"
[ ${#wanted[@]} -eq 0 ] || install "${wanted[@]}" 2>/dev/null ||
  echo "setup: ${wanted[*]} is not to be had here; own loops multiply" >&2
