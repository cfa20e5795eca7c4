#!/bin/sh
# fence_xvm gives up earlier than its -t says (version: Debian 12, fence-virt 4.12.1-1).
#
# `-t SECONDS` is documented as the time to wait. The client counts it in whole retransmission
# intervals (`-r`, in tenths of a second, 2.0 s by default) and rounds down. Seen on Debian 12:
#
#   -t 3          gives up after 2.0 s
#   -t 5          gives up after 4.0 s
#   -t 5 -r 30    gives up after 3.0 s
#   -t 6          gives up after 6.0 s
#
# So a server that answers within the stated time can find its client gone, and only a multiple
# of the interval (as the default, 30 s, is) means what it says.
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
ip link set lo up multicast on
ip route add 224.0.0.0/4 dev lo
failed=0
# The options, and after how many tenths of a second the client gives up.
while read -r tenths options; do
    begin=$(date +%s%N)
    status=0
    # shellcheck disable=SC2086
    root/usr/sbin/fence_xvm -o status -H nobody -k "$PWD/key" $options >said 2>&1 || status=$?
    took=$((($(date +%s%N) - begin) / 100000000))
    echo "fence_xvm $options: exit status $status after $((took / 10)).$((took % 10)) s: $(head -n 1 said)"
    grep -q 'Timed out' said && [ "$status" -eq 1 ] || failed=1
    # Half a second of slack for a busy machine; the next interval is a second away at least.
    [ "$took" -ge "$tenths" ] && [ "$took" -lt $((tenths + 5)) ] || failed=1
done <<LINES
20 -t 3
40 -t 5
30 -t 5 -r 30
60 -t 6
LINES
exit $failed
INNER
unshare -n sh ask.sh || {
    echo "this is not what $package $version did before" >&2
    exit 1
}
