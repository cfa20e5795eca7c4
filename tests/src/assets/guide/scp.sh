#!/bin/sh
# scp -p FILE root@NODE:PATH: copies into the node's root directory, which the lab has under its name.
set -eu
if [ "$#" != 3 ] || [ "$1" != -p ]; then
    echo "scp: this stand-in knows -p FILE root@NODE:PATH" >&2
    exit 64
fi
node=${3%%:*}
exec cp -p "$2" "/run/guide/nodes/${node#root@}/${3#*:}"
