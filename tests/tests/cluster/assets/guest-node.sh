#!/bin/sh
# A node's init: network, corosync, Pacemaker. It is small, because systemd takes minutes without
# KVM. Then it runs commands from a serial port: lines "NUMBER COMMAND", answered by "lab
# NUMBER CODE STDOUT STDERR", the last two in base64 (- where empty).
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
. /lab/node
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /tmp
hostname "$NAME"
ip link set lo up
ip addr add "$ADDRESS/24" dev eth0
ip link set eth0 up
ip route add 224.0.0.0/4 dev eth0
# As the packages have them.
chown hacluster:haclient /etc/pacemaker/authkey /var/lib/pacemaker/cib/cib.xml
chmod 640 /etc/pacemaker/authkey
{
    # Corosync goes into the background when it serves.
    corosync
    exec pacemakerd
} > /run/cluster.log 2>&1 < /dev/null &
stty -F "$CONSOLE" raw -echo
exec 3<> "$CONSOLE"
while read -r number line <&3; do
    sh -c "$line" > /run/out 2> /run/err < /dev/null 3<&-
    code=$?
    out=$(base64 -w0 /run/out)
    err=$(base64 -w0 /run/err)
    echo "lab $number $code ${out:--} ${err:--}" >&3
done
