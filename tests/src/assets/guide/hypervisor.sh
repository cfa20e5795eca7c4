# The hypervisor of a guide: a root directory made of the nodes' image, in which everything may be written, with the lab's processes,
# devices, interfaces and libvirt.
# $1: the image, $2: the root directory, $3: where what is written goes. Runs with the lab's mounts.
set -eu
image=$1
root=$2
written=$3
mkdir -p "$root" "$written/upper" "$written/work"
mount -t overlay -o "lowerdir=$image,upperdir=$written/upper,workdir=$written/work" overlay "$root"
for directory in proc sys dev; do
    mount --rbind "/$directory" "$root/$directory"
done
# Not with what is mounted below it: this very directory is.
mount --bind /run "$root/run"
for directory in /etc/libvirt /var/lib/libvirt; do
    mkdir -p "$root$directory"
    mount --bind "$directory" "$root$directory"
done
