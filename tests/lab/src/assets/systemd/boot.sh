# Becomes systemd in the root directory $1, as the first process of its PID namespace. Runs with
# mounts of its own: libvirt uses the cgroups where they were mounted last, and systemd mounts
# them again. What is mounted below /run and libvirt's directories is still seen on both sides.
set -eu
root=$1
# systemd takes its own cgroup for the root of all.
for hierarchy in $(awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/self/mounts); do
    echo $$ > "$hierarchy/cgroup.procs"
done
option=
if grep -q name=systemd /proc/self/cgroup; then
    # The second: a newer systemd takes the first as a mistake otherwise.
    option="systemd.legacy_systemd_cgroup_controller=yes SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"
fi
mount -t sysfs sysfs "$root/sys"
mount -t bpf bpf "$root/sys/fs/bpf" 2> /dev/null || true
mount -t proc proc "$root/proc"
# Devices and kernel variables are this machine's: systemd leaves them alone where it cannot write.
mount -o remount,bind,ro "$root/sys"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
for family in ipv4 ipv6; do
    mount --bind "/proc/sys/net/$family" "$root/proc/sys/net/$family"
done
if [ -e /proc/sysrq-trigger ]; then
    mount --bind /dev/null "$root/proc/sysrq-trigger"
fi
exec chroot "$root" env -i container=lab /lib/systemd/systemd $option
