#!/bin/sh
# Installs the C library on Linux: install.sh PREFIX [options of cargo build]
#
# Headers, libawqua.so with its links, libawqua.a, a pkg-config file and a CMake package. Without options it builds
# with --profile dist: small and slow to build. The list of system libraries that a static link needs lies beside this
# script, in system-libs; a test links with it.
set -eu
[ $# -ge 1 ] || { echo "usage: $0 PREFIX [options of cargo build]" >&2; exit 2; }
prefix=$1
shift
[ $# -gt 0 ] || set -- --profile dist
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."

built=$(cargo build -p awqua-ffi "$@" --message-format json-render-diagnostics |
    sed -n 's/.*"filenames":\[\([^]]*libawqua\.so"[^]]*\)\].*/\1/p' | tail -n 1 | tr ',' '\n' | tr -d '"')
shared=$(printf '%s\n' "$built" | grep 'libawqua\.so$')
static=$(printf '%s\n' "$built" | grep 'libawqua\.a$')

version=$(sed -n '/^\[workspace.package\]/,/^$/s/^version = "\(.*\)"/\1/p' Cargo.toml)
major=$(sed -n 's/^pub const AWQUA_ABI_MAJOR: u32 = \(.*\);/\1/p' ffi/src/version.rs)

mkdir -p "$prefix/include" "$prefix/lib/pkgconfig" "$prefix/lib/cmake/awqua"
prefix=$(cd "$prefix" && pwd)
cp include/awqua.h include/awqua.hpp "$prefix/include/"
cp "$shared" "$prefix/lib/libawqua.so.$version"
ln -sf "libawqua.so.$version" "$prefix/lib/libawqua.so.$major"
ln -sf "libawqua.so.$major" "$prefix/lib/libawqua.so"
cp "$static" "$prefix/lib/libawqua.a"

fill() {
    sed -e "s|@PREFIX@|$prefix|" -e "s|@VERSION@|$version|" -e "s|@ABI_MAJOR@|$major|" \
        -e "s|@SYSTEM_LIBS@|$(cat ffi/system-libs)|" "ffi/$1.in" >"$prefix/lib/$2/$1"
}
fill awqua.pc pkgconfig
fill awqua-config.cmake cmake/awqua
fill awqua-config-version.cmake cmake/awqua
