# Runs a program in a root directory with a release of Debian, with this machine's kernel, devices
# and workspace. Has mounts of its own, which end with it.
# $1: the image, $2: an empty directory to mount on, $3: the workspace, $4: cargo's target
# directory, then the program and its arguments.
set -eu
image=$1
place=$2
workspace=$3
target=$4
shift 4
here=$PWD
mount -t tmpfs -o mode=755 tmpfs "$place"
root=$place/root
mkdir "$root" "$place/upper" "$place/work"
mount -t overlay -o "lowerdir=$image,upperdir=$place/upper,workdir=$place/work" overlay "$root"
for directory in /proc /sys /dev; do
    mount --rbind "$directory" "$root$directory"
done
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
# Without what is mounted below them, which would be this root directory again.
for directory in "$workspace" "$target"; do
    mkdir -p "$root$directory"
    mount --bind "$directory" "$root$directory"
done
# Not chroot alone: a lab's processes enter its mounts, and begin at the root of these.
mkdir "$root/.old"
cd "$root"
pivot_root . .old
cd /
umount -l /.old
rmdir /.old
cd "$here"
exec "$@"
