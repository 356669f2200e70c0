#!/usr/bin/env bash
# Puts SwiftShader, a Vulkan that needs no GPU, and a Vulkan loader into a directory: tests/software_vulkan.sh DIR
#
# Both are in Debian's package chromium-common, which is fetched and unpacked, not installed. A machine without
# apt-get, or where it cannot fetch, gets nothing, and the tests of WebGPU are skipped there.
set -euo pipefail
target=$1

give_up() {
    echo "no software Vulkan: $1; tests of WebGPU will be skipped" >&2
    exit 0
}

[ -f "$target/vk_swiftshader_icd.json" ] && exit 0
for program in apt-get dpkg-deb; do
    command -v "$program" >/dev/null || give_up "there is no $program"
done
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
# apt fetches as a user of its own.
chmod 755 "$directory"
cd "$directory"
if ! apt-get -qq download chromium-common 2>/dev/null; then
    # The lists of packages may be missing or old; only root may fetch them.
    apt-get -qq update 2>/dev/null || give_up "apt-get cannot fetch the lists of packages"
    apt-get -qq download chromium-common 2>/dev/null || give_up "apt-get cannot fetch chromium-common"
fi
dpkg-deb -x chromium-common_*.deb files
cd - >/dev/null
mkdir -p "$target"
for file in libvulkan.so.1 libvk_swiftshader.so vk_swiftshader_icd.json; do
    found="$directory/files/usr/lib/chromium/$file"
    [ -f "$found" ] || give_up "chromium-common has no $file"
    cp "$found" "$target/"
done
