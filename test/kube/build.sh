#!/usr/bin/env bash
# Builds the Kubernetes that the tests of test/kube run against (kube-apiserver, etcd and kwok, at the versions that
# go.mod pins) into max_group's cache folder, from the Go module proxy. Needs Go 1.26, and 8 GB of disk for Go's own
# caches; a cold build takes many minutes, a second run none. GOFLAGS=-p=1 and `nice` keep it out of others' way.
#
#   test/kube/build.sh
#
# With KUBEBUILDER_ASSETS set, kube-apiserver and etcd are taken from there, as the field's own test tools do, and
# only kwok is built.
#
# go.mod beside this is all that says what is built: the three tools, and each of Kubernetes' staging modules (those
# that its own go.mod requires at v0.0.0) replaced by its published version. After a change there: `go mod tidy`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

version=$(awk '$1 == "k8s.io/kubernetes" && $2 ~ /^v/ { print substr($2, 2) }' go.mod)
home=${XDG_CACHE_HOME:-$HOME/.cache}/max_group/kube-$version
mkdir -p "$home/bin"
exec 9>"$home.lock"
if command -v flock >/dev/null; then flock 9; fi

# Else it calls itself v0.0.0, and clients that compare versions are puzzled.
stamp=k8s.io/component-base/version
IFS=. read -r major minor _ <<<"$version"
ldflags="-s -w -X $stamp.gitVersion=v$version -X $stamp.gitMajor=$major -X $stamp.gitMinor=$minor"
sum=$({ cat go.mod go.sum; echo "$ldflags"; } | sha256sum)

# build NAME PACKAGE: the binary appears by a rename, and NAME.sum, which says what it was made from, comes after it.
build() {
  local file=$home/bin/$1
  if [[ -x $file && -e $file.sum && $(<"$file.sum") == "$sum" ]]; then return; fi
  echo "building $1 into $home/bin (minutes, the first time)"
  SECONDS=0
  GOWORK=off CGO_ENABLED=0 go build -mod=readonly -trimpath -buildvcs=false -ldflags "$ldflags" -o "$file.new" "$2"
  mv "$file.new" "$file"
  echo "$sum" >"$file.sum"
  echo "built $1: $((SECONDS / 60)) min $((SECONDS % 60)) s, $(($(stat -Lc %s "$file") / 1000000)) MB"
}

build kwok sigs.k8s.io/kwok/cmd/kwok
if [[ -n ${KUBEBUILDER_ASSETS:-} ]]; then
  for name in etcd kube-apiserver; do
    if [[ ! -x $KUBEBUILDER_ASSETS/$name ]]; then echo "KUBEBUILDER_ASSETS has no $name: $KUBEBUILDER_ASSETS" >&2; exit 1; fi
  done
else
  build etcd go.etcd.io/etcd/server/v3
  build kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver
fi
