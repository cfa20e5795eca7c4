#!/bin/sh
# mmdebstrap --include=PACKAGES bookworm DIRECTORY: the nodes' image, under a layer in memory, for that directory; each package must be in it.
set -eu
if [ "$#" != 3 ] || [ "$2" != bookworm ] || [ "${1#--include=}" = "$1" ]; then
    echo "mmdebstrap: this stand-in knows --include=PACKAGES bookworm DIRECTORY" >&2
    exit 64
fi
for package in $(echo "${1#--include=}" | tr , ' '); do
    if [ ! -e "/var/lib/dpkg/info/$package.list" ]; then
        echo "mmdebstrap: the image has no $package" >&2
        exit 1
    fi
done
exec /run/guide/make-root "$3"
