for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap fstrim.timer \
    systemd-timesyncd fence_virtd; do
    chroot "$1" systemctl disable "$unit" >/dev/null 2>&1 || true
done
# An archive with fence-virtd alone, to go back to it without a network.
mkdir "$1/srv/archive"
(cd "$1/srv/archive" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get download fence-virtd)
package=$(cd "$1/srv/archive" && echo fence-virtd_*.deb)
APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-cache show --no-all-versions fence-virtd |
    sed "s|^Filename: .*|Filename: ./$package|" > "$1/srv/archive/Packages"
rm -f "$1"/etc/apt/sources.list.d/*
echo 'deb [trusted=yes] file:/srv/archive ./' > "$1/etc/apt/sources.list"
# What is installed from here on is whole.
sed -i /path-exclude/d "$1/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
rm -f "$1/etc/hostname" "$1/etc/resolv.conf"
# Empty: each machine makes its own when it starts.
: > "$1/etc/machine-id"
