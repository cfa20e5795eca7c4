# Makes the root directory of a hypervisor with systemd: the nodes' image with a layer in memory
# over it, and the lab's /run and libvirt.
# $0: its name, $1: the image, $2: the root directory. Runs with the lab's mounts.
set -eu
image=$1
root=$2
written=$root-written
mkdir -p "$root" "$written/upper" "$written/work"
mount -t overlay -o "lowerdir=$image,upperdir=$written/upper,workdir=$written/work" overlay "$root"
# What is mounted on either side is to be seen on the other.
for directory in /run /var/lib/libvirt /etc/libvirt; do
    mkdir -p "$root$directory"
    mount --make-shared "$directory"
    mount --bind "$directory" "$root$directory"
done
# systemd makes device nodes: not in this machine's /dev.
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    : > "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
mount -t tmpfs tmpfs "$root/dev/shm"
mkdir -p "$root/mnt/image"
mount --bind "$image" "$root/mnt/image"
echo "$0" > "$root/etc/hostname"
echo "127.0.1.1 $0" >> "$root/etc/hosts"
# A hypervisor is no cluster node, and the kernel's file systems are this machine's, too.
for unit in corosync.service pacemaker.service logd.service sys-kernel-debug.mount sys-kernel-tracing.mount; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/journald.conf.d"
printf '[Journal]\nStorage=volatile\nReadKMsg=no\nAudit=no\nRateLimitBurst=0\n' > "$root/etc/systemd/journald.conf.d/lab.conf"
