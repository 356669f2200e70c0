#!/usr/bin/env bash
# Puts a Chromium into a directory, where the system has none: tests/chromium.sh DIR
#
# Debian's packages are fetched and unpacked, not installed: no root is needed, and nothing outside DIR changes.
# DIR/chromium starts it with the libraries and fonts beside it. A machine without apt-get, or where it cannot fetch,
# gets nothing, and the tests that look at pages are skipped there.
set -euo pipefail
target=$1

give_up() {
    echo "no Chromium: $1; tests of the report in a browser will be skipped" >&2
    exit 0
}

[ -x "$target/chromium" ] && exit 0
for program in chromium chromium-browser google-chrome; do
    command -v "$program" >/dev/null && exit 0
done
for program in apt-get dpkg-deb; do
    command -v "$program" >/dev/null || give_up "there is no $program"
done

# What would have to be installed; without drivers of graphics cards, which nothing here draws with.
missing() {
    LC_ALL=C apt-get -s install --no-install-recommends chromium fonts-dejavu-core 2>/dev/null |
        awk '$1 == "Inst" { print $2 }' | grep -vE '^(libllvm|libgl1-mesa-dri|libz3-|adwaita-icon-theme|systemd|udev|perl|libperl)'
}
packages=$(missing) || true
if [ -z "$packages" ]; then
    # The lists of packages may be missing or old; only root may fetch them.
    apt-get -qq update 2>/dev/null || give_up "apt-get cannot fetch the lists of packages"
    packages=$(missing) || give_up "apt-get knows no package chromium"
fi

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
# apt fetches as a user of its own.
chmod 755 "$directory"
cd "$directory"
# shellcheck disable=SC2086 # each word is a package
if ! apt-get -qq download $packages 2>/dev/null; then
    apt-get -qq update 2>/dev/null || give_up "apt-get cannot fetch the lists of packages"
    apt-get -qq download $packages 2>/dev/null || give_up "apt-get cannot fetch the packages"
fi
for package in *.deb; do
    dpkg-deb --fsys-tarfile "$package" | tar -x --exclude='./usr/share/doc' --exclude='./usr/share/man' \
        --exclude='./usr/share/locale' --one-top-level=files
done
cd - >/dev/null
[ -x "$directory/files/usr/lib/chromium/chromium" ] || give_up "the package has no program (a snap?)"
mkdir -p "$target"
target=$(cd "$target" && pwd)
rm -rf "$target/files"
mv "$directory/files" "$target/files"
cat >"$target/fonts.conf" <<FONTS
<?xml version="1.0"?>
<fontconfig><dir>$target/files/usr/share/fonts</dir><dir>/usr/share/fonts</dir><cachedir>$target/fontcache</cachedir></fontconfig>
FONTS
machine=$(dpkg-architecture -qDEB_HOST_MULTIARCH 2>/dev/null || basename "$(dirname "$(ls "$target"/files/usr/lib/*/libnss3.so | head -1)")")
# Some libraries have those that only they need in a folder of their own, which is known to the system's loader alone.
libraries=$(find "$target/files" -path "*/lib/$machine*" -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat >"$target/chromium.new" <<PROGRAM
#!/bin/sh
export LD_LIBRARY_PATH="$libraries"
export FONTCONFIG_FILE="$target/fonts.conf"
exec "$target/files/usr/lib/chromium/chromium" "\$@"
PROGRAM
chmod +x "$target/chromium.new"
said=$("$target/chromium.new" --version 2>&1) || give_up "what was unpacked does not start: $said"
mv "$target/chromium.new" "$target/chromium"
echo "$said in $target"
