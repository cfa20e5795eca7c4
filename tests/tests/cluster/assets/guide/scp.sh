#!/bin/sh
# scp -p FILE root@NODE:PATH: copies into the root directory of the node's container.
set -eu
if [ "$#" != 3 ] || [ "$1" != -p ]; then
    echo "scp: this stand-in knows -p FILE root@NODE:PATH" >&2
    exit 64
fi
node=${3%%:*}
node=${node#root@}
for root in "/run/lab/nodes/$node/root" "/var/lib/libvirt/filesystems/$node"; do
    if [ -d "$root/etc" ]; then
        exec cp -p "$2" "$root/${3#*:}"
    fi
done
echo "scp: there is no node $node" >&2
exit 1
