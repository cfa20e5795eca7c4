#!/bin/sh
# mmdebstrap --include=PACKAGES bookworm DIRECTORY: mounts the nodes' image, which mmdebstrap has
# made, at that directory, with a layer in memory over it. The image must have the packages.
set -eu
if [ "$#" != 3 ] || [ "$2" != bookworm ] || [ "${1#--include=}" = "$1" ]; then
    echo "mmdebstrap: this stand-in knows --include=PACKAGES bookworm DIRECTORY" >&2
    exit 64
fi
image=/mnt/image
for package in $(echo "${1#--include=}" | tr , ' '); do
    if [ ! -e "$image/var/lib/dpkg/info/$package.list" ]; then
        echo "mmdebstrap: the image has no $package" >&2
        exit 1
    fi
done
written=/run/lab/written/$(basename "$3")
mkdir -p "$3" "$written/upper" "$written/work"
mount -t overlay -o "lowerdir=$image,upperdir=$written/upper,workdir=$written/work" overlay "$3"
# The same as the nodes of all tests begin with.
rm "$3/sbin/init"
sed 's,/sbin/init,/lib/systemd/systemd,' /run/guide/node.sh > "$3/sbin/init"
chmod 755 "$3/sbin/init"
