#!/usr/bin/env bash
# Builds the Consul that the tests of test/consul run against, at the version that go.mod pins, into max_group's cache
# folder, from the Go module proxy. Needs Go 1.26; a cold build takes minutes, a second run nothing.
#
#   test/consul/build.sh
#
# A main module of its own, because `go install consul@VERSION` refuses a go.mod with replacements, and because
# Consul's exclusions hold only where they stand in the main module. Later versions than 1.19.2 do not resolve outside
# of their own repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

version=$(awk '$1 == "github.com/hashicorp/consul" && $2 ~ /^v/ { print substr($2, 2) }' go.mod)
home=${XDG_CACHE_HOME:-$HOME/.cache}/max_group/consul-$version
mkdir -p "$home/bin"
exec 9>"$home.lock"
if command -v flock >/dev/null; then flock 9; fi

# The binary appears by a rename, and consul.sum, which says what it was made from, comes after it.
sum=$(cat go.mod go.sum | sha256sum)
file=$home/bin/consul
if [[ -x $file && -e $file.sum && $(<"$file.sum") == "$sum" ]]; then exit; fi
echo "building consul into $home/bin (minutes, the first time)"
SECONDS=0
GOWORK=off CGO_ENABLED=0 go build -mod=readonly -trimpath -buildvcs=false -ldflags "-s -w" -o "$file.new" github.com/hashicorp/consul
mv "$file.new" "$file"
echo "$sum" >"$file.sum"
echo "built consul: $((SECONDS / 60)) min $((SECONDS % 60)) s, $(($(stat -Lc %s "$file") / 1000000)) MB"
