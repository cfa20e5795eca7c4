#!/usr/bin/env bash
# Generic XDP with a "frags" program takes the Ethernet header from what tc redirects.
# version: Linux 6.18.44, with Debian 12's iproute2 6.1.0-3 and libbpf 1.1.2.
#
# A veth gets an XDP program that does nothing but pass, in generic mode, and behind it a tc
# program that redirects each frame to another interface. What arrives there is
#
#   without XDP, or with section "xdp"      02:00:00:00:00:0b 02:00:00:00:00:0a 0800 45 00 ...
#   with section "xdp.frags"                45 00 ...   (the frame begins with its IP header)
#
# The flag alone (BPF_F_XDP_HAS_FRAGS, meant for frames in several pieces) makes the difference,
# for a small frame in one piece, too. The kernel copies the frame for such a program, and the copy
# does not know the length of its Ethernet header. Nothing reports an error.
# Kernels before 6.9 have no frags in generic mode.
#
# Needs root (network namespaces), apt-get and dpkg-deb. Nothing of fence-xdp takes part.
set -euo pipefail

packages=(iproute2=6.1.0-3 libbpf1=1:1.1.2-0+deb12u1 llvm-14=1:14.0.6-12 libllvm14=1:14.0.6-12
    tcpdump=4.99.3-1 libpcap0.8 libelf1 libmnl0 libbsd0 libmd0 libxtables12 libcap2)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' INT TERM
cd "$work"
chmod 755 .
apt-get download -q "${packages[@]}" >download.log 2>&1 || {
    cat download.log >&2
    exit 1
}
for archive in *.deb; do dpkg-deb -x "$archive" tree; done
export LD_LIBRARY_PATH=$work/tree/usr/lib/x86_64-linux-gnu:$work/tree/lib/x86_64-linux-gnu
export PATH=$work/tree/sbin:$work/tree/bin:$work/tree/usr/bin:$work/tree/usr/sbin:$PATH

# Compiles a BPF program: its file, its section, what it does.
compile() {
    cat >"$1.ll" <<PROGRAM
target triple = "bpf"
define i32 @program(i8* %context) section "$2" {
$3
}
@gpl = global [4 x i8] c"GPL\\00", section "license"
PROGRAM
    llc-14 -march=bpf -filetype=obj "$1.ll" -o "$1.o"
}
export -f compile

cat >try.sh <<'INNER'
set -euo pipefail
sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1
ip link add name near type veth peer name far
ip link add name out type veth peer name seen
ip link set near address 02:00:00:00:00:0b
ip link set far address 02:00:00:00:00:0a
for link in near out seen; do ip link set "$link" up; done
unshare -n sleep 120 &
other=$!
trap 'kill "$other"' EXIT
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
ip link set far netns "$other"
nsenter -t "$other" -n sh -c '
    sysctl -qw net.ipv6.conf.all.disable_ipv6=1
    ip link set far up
    ip address add 192.0.2.1/24 dev far
    ip neighbour add 192.0.2.2 lladdr 02:00:00:00:00:0b dev far'

# bpf_redirect(out, 0)
number=$(ip -o link show out | cut -d : -f 1)
compile redirect tc "
    %to = call i64 inttoptr (i64 23 to i64 (i32, i64)*)(i32 $number, i64 0)
    %verdict = trunc i64 %to to i32
    ret i32 %verdict"
compile xdp xdp "ret i32 2"
compile frags xdp.frags "ret i32 2"
tc qdisc add dev near clsact
tc filter add dev near ingress bpf direct-action object-file redirect.o section tc

# What arrives behind an XDP program: the frame's first 16 bytes in hexadecimal.
arrives() {
    tcpdump -i seen -U -w frames -c 1 2>/dev/null &
    capture=$!
    sleep 1
    nsenter -t "$other" -n bash -c 'echo hello >/dev/udp/192.0.2.2/9'
    for _ in $(seq 50); do kill -0 "$capture" 2>/dev/null || break; sleep 0.1; done
    kill "$capture" 2>/dev/null || true
    wait "$capture" || true
    # Behind the file's header (24 bytes) and the frame's own (16).
    od -An -v -tx1 -j 40 -N 16 frames | tr -d ' \n'
}
failed=0
for kind in none xdp frags; do
    ip link set near xdpgeneric off
    section=$kind
    [ "$kind" = frags ] && section=xdp.frags
    [ "$kind" = none ] || ip link set near xdpgeneric object "$kind.o" section "$section"
    first=$(arrives)
    echo "$kind: $first"
    case $kind in
    frags) [[ $first == 4500* ]] || failed=1 ;;
    *) [[ $first == 02000000000b02000000000a08004500* ]] || failed=1 ;;
    esac
done
exit "$failed"
INNER
unshare -n bash try.sh || {
    echo "Linux $(uname -r) does not do what 6.18.44 did" >&2
    exit 1
}
echo "as stated, on Linux $(uname -r)"
