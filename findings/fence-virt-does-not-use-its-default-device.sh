#!/bin/sh
# fence_virt does not use the serial device that it calls its default
# (version: Debian 12, fence-virt 4.12.1-1).
#
# Help and metadata give `serial_device` the default /dev/ttyS1, and `ipaddr` the default
# 127.0.0.1. Seen on Debian 12, with none of both on the command line:
#
#   what the client does                             connects by TCP to 10.0.2.179 port 1229
#                                                    (the address of a "VM channel")
#   what it sends there                              74 bytes, as over a serial line
#   who listens at 127.0.0.1 port 1229               is not asked
#
# A device is used only if it is named. So a fence device in Pacemaker that relies on the default
# fails, or reaches whatever has the address 10.0.2.179. Name serial_device, ipaddr or vsock.
#
# Needs root (a network namespace), python3, apt-get and dpkg-deb. Nothing of fence-xdp takes part.
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

cat >ask.py <<'INNER'
import re, select, socket, subprocess, sys

client = "root/usr/sbin/fence_virt"
metadata = subprocess.run([client, "-o", "metadata"], capture_output=True, text=True).stdout
defaults = {
    name: re.search(f'name="{name}".*?default="([^"]*)"', metadata, re.S).group(1)
    for name in ("serial_device", "ipaddr", "channel_address")
}
print("the defaults that the metadata names:", defaults)
listeners = {}
for address in ("10.0.2.179", "127.0.0.1"):
    listener = socket.create_server((address, 1229))
    listeners[listener] = address
running = subprocess.Popen([client, "-o", "status", "-n", "node1", "-t", "2"],
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
asked = select.select(list(listeners), [], [], 10)[0]
addresses = [listeners[listener] for listener in asked]
request = b""
if asked:
    connection, _ = asked[0].accept()
    connection.settimeout(5)
    while len(request) < 74:
        part = connection.recv(4096)
        if not part:
            break
        request += part
    connection.close()
running.wait()
print("asked:", addresses, len(request), "bytes:", request[:12])
expected = {"serial_device": "/dev/ttyS1", "ipaddr": "127.0.0.1", "channel_address": "10.0.2.179"}
sys.exit(not (defaults == expected and addresses == ["10.0.2.179"] and len(request) == 74
              and request.startswith(b"abba")))
INNER
# shellcheck disable=SC2016
unshare -n sh -c 'ip link set lo up && ip address add 10.0.2.179/32 dev lo && exec python3 ask.py' || {
    echo "this is not what $package $version did before" >&2
    exit 1
}
