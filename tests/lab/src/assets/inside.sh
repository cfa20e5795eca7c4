# The first process of a lab's new namespaces. It gives the lab file systems of its own, then waits
# for its end.
# $1: the lab's name, $2: where cgroup hierarchies are mounted.
set -eu
trap '' INT HUP TERM
lab=$1
hierarchies=$2
# /proc is still the host's: this is the number that the host knows this process by.
read -r outside rest < /proc/self/stat

for mounted in $hierarchies; do
    echo $$ > "$mounted/$lab/init/cgroup.procs"
done
mount -t proc proc /proc
echo "$lab" > /proc/sys/kernel/hostname

# libvirt takes the lab's part of each hierarchy for the whole. A second, unified hierarchy beside
# the old ones confuses its LXC driver, so it stays only where it is the only one.
for mounted in $hierarchies; do
    if [ "$mounted" = /sys/fs/cgroup/unified ]; then
        umount "$mounted"
    else
        mount --bind "$mounted/$lab" "$mounted"
    fi
done

# /sys of the lab's own network, with the cgroups kept.
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --rbind /run/cgroup /sys/fs/cgroup
umount -l /run/cgroup
mount -t bpf bpf /sys/fs/bpf 2> /dev/null || true
mount -t tracefs tracefs /sys/kernel/tracing 2> /dev/null || true

# /run has no service of the host, and the host's libvirt is neither visible nor touched.
mkdir -p /run/lab /run/lock /run/netns
for directory in /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /etc/libvirt; do
    if [ -d "$directory" ]; then
        mount -t tmpfs -o mode=755 tmpfs "$directory"
    fi
done

ip link set lo up
echo "ready $outside"
exec tini -- cat > /dev/null
