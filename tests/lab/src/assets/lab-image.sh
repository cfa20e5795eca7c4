for unit in apt-daily.timer apt-daily-upgrade.timer corosync dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap \
    fence_virtd fstrim.timer nftables prometheus prometheus-node-exporter systemd-timesyncd; do
    chroot "$1" systemctl disable "$unit" >/dev/null 2>&1 || true
done
rm -f "$1/etc/hostname" "$1/etc/resolv.conf"
# Empty: each machine makes its own when it starts.
: > "$1/etc/machine-id"
