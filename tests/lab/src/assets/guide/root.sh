# A machine of a guide that is a directory: the nodes' image under a layer in memory, with the lab's processes, devices, interfaces and libvirt.
# $1: the image, $2: the root directory, $3: where what is written goes, $4: `hypervisor`, or `guest` for one that shares nothing with it but the
# kernel. Runs with the lab's mounts and the machine's network.
set -eu
image=$1
root=$2
written=$3
mkdir -p "$root" "$written/upper" "$written/work"
mount -t overlay -o "lowerdir=$image,upperdir=$written/upper,workdir=$written/work" overlay "$root"
if [ "$4" = hypervisor ]; then
    # What is mounted on either side is to be seen on the other.
    for directory in /run /var/lib/libvirt /etc/libvirt; do
        mkdir -p "$root$directory"
        mount --make-shared "$directory"
        mount --bind "$directory" "$root$directory"
    done
else
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
fi
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
# Not with the cgroups: libvirt takes them to be where they were mounted last.
mount --bind /sys "$root/sys"
mkdir -p "$root/mnt/image"
mount --bind "$image" "$root/mnt/image"
