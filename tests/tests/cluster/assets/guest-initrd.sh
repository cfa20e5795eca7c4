#!/bin/busybox sh
# A node's first program, in the initramfs. It puts the node's root together, a read-only disk below
# and memory above, and continues there. The node's own files (addresses, keys, its init) lie under
# /node.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module"
done < /modules/order
mkdir /disk /memory /newroot
mount -t ext4 -o ro /dev/vda /disk
mount -t tmpfs tmpfs /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/disk,upperdir=/memory/upper,workdir=/memory/work overlay /newroot
cp -dR /node/. /newroot/
for directory in dev proc sys; do
    mount --move "/$directory" "/newroot/$directory"
done
exec switch_root /newroot /lab/init
