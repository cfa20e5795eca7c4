#!/bin/sh
# The first process of a container node, until it becomes systemd. With cgroups of the old kind,
# libvirt gives a container its own in some hierarchies only. In the others, two systemds would
# confuse each other's processes. So each start makes its own groups there, and systemd sees nothing
# above.
set -u
mount -t tmpfs tmpfs /run
mkdir /run/hierarchy
while IFS=: read -r number controllers path; do
    case "$path" in */*libvirt-lxc*) continue ;; esac
    case "$number:$controllers" in
        0:) mount -t cgroup2 cgroup2 /run/hierarchy ;;
        *:name=*) mount -t cgroup -o "none,$controllers" cgroup /run/hierarchy ;;
        *) mount -t cgroup -o "$controllers" cgroup /run/hierarchy ;;
    esac || continue
    own=$(mktemp -d -p "/run/hierarchy$path" "$LIBVIRT_LXC_NAME.XXXXXX") && echo 1 > "$own/cgroup.procs"
    umount /run/hierarchy
done < /proc/self/cgroup
umount /run
# A write there would reboot the host, and Pacemaker writes there when it despairs of a node.
if [ -e /proc/sysrq-trigger ]; then mount --bind /dev/null /proc/sysrq-trigger; fi
if grep -q name=systemd /proc/self/cgroup; then
    umount -R -l /sys/fs/cgroup
    exec unshare --cgroup /sbin/init systemd.legacy_systemd_cgroup_controller=yes
fi
exec /sbin/init
