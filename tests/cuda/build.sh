#!/bin/sh
# Builds the driver of driver.cpp as FOLDER/libcuda.so; needs g++ on x86-64 Linux.
set -eu
out="$1"
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$out"
flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -fno-strict-aliasing -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
# shellcheck disable=SC2086 # a list
g++ $flags -I"$here" -I"$here/../../shaders/src" -I"$here/../../shaders/cuda" -shared -o "$out/libcuda.so" \
    "$here/machine.cpp" "$here/driver.cpp"
