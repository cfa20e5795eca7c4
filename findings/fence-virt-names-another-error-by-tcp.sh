#!/bin/sh
# fence_virt names another error than the one that kept it from connecting
# (version: Debian 12, fence-virt 4.12.1-1).
#
# Seen on Debian 12:
#
#   what is wrong                                    what fence_virt -T says
#   nobody listens at the address's port (refused)   Bad file descriptor
#   a host name instead of a number                  No such file or directory
#   no route leads to the address                    Network is unreachable (the only right one)
#
# "Bad file descriptor" means that the server is down, or that a firewall refuses. "No such file or
# directory" means that ADDRESS is no numeric address: host names are never looked up, also if
# /etc/hosts has them. No file is missing.
#
# Needs root (a network namespace), apt-get and dpkg-deb. Nothing of fence-xdp takes part.
set -eu

package=fence-virt version=4.12.1-1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cd "$work"
chmod 755 .

# The client, and the libraries that it is linked with.
apt-get download -q "$package=$version" libnss3 libnspr4 >download.log 2>&1 || {
    cat download.log >&2
    exit 1
}
for archive in *.deb; do dpkg-deb -x "$archive" root; done
LD_LIBRARY_PATH=$(dirname "$(find "$work/root" -name libnss3.so | head -n 1)"):$(dirname "$(find "$work/root" -name libnspr4.so | head -n 1)")
export LD_LIBRARY_PATH
head -c 512 /dev/urandom >key

cat >ask.sh <<'INNER'
set -eu
ip link set lo up
getent hosts localhost >/dev/null
failed=0
# The address, and the error that the client names.
while read -r address error; do
    status=0
    root/usr/sbin/fence_virt -o status -n node1 -k "$PWD/key" -T "$address" >said 2>&1 || status=$?
    echo "fence_virt -T $address: exit status $status: $(head -n 1 said)"
    grep -qF "$error" said && [ "$status" -eq 1 ] || failed=1
done <<LINES
127.0.0.1 Bad file descriptor
localhost No such file or directory
192.0.2.1 Network is unreachable
LINES
exit $failed
INNER
unshare -n sh ask.sh || {
    echo "this is not what $package $version did before" >&2
    exit 1
}
