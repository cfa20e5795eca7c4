#!/bin/busybox sh
# A guest's first program: brings up the network, then runs commands from a serial port.
# Each is a line "NUMBER COMMAND". The answer is a line "lab NUMBER CODE STDOUT STDERR", the last
# two in base64 (- where empty).
/bin/busybox --install -s /bin
# A tool of its own comes before busybox's.
export PATH=/usr/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
@MODULES@
ip link set lo up
ip link set eth0 up
ip addr add @ADDRESS@/24 dev eth0
ip route add 224.0.0.0/4 dev eth0
stty -F @CONSOLE@ raw -echo
exec 3<>@CONSOLE@
while read -r number line <&3; do
    sh -c "$line" >/tmp/out 2>/tmp/err </dev/null
    code=$?
    out=$(base64 -w0 /tmp/out)
    err=$(base64 -w0 /tmp/err)
    echo "lab $number $code ${out:--} ${err:--}" >&3
done
