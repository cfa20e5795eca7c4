for unit in pcsd pcsd-ruby pcsd.service firewalld nftables apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer e2scrub_reap fstrim.timer libvirt-guests logrotate.timer ssh systemd-timesyncd; do
    chroot "$1" systemctl disable "$unit" >/dev/null 2>&1 || true
done
rm -f "$1/etc/hostname" "$1/etc/resolv.conf"
# Empty: each node makes its own when it starts.
: > "$1/etc/machine-id"
