#!/bin/sh
# A resource that must never run twice. Its node writes to a sector of its own on a disk that both
# nodes share, so a reader from outside sees which node has it. A killed node leaves its claim
# behind.
. /lab/node
state=/run/claim
boot=$(cat /proc/sys/kernel/random/boot_id)

write() {
    printf '%-511s\n' "$1 $boot" | dd of=/dev/vdb bs=512 count=1 seek="$SECTOR" iflag=fullblock oflag=direct conv=notrunc status=none
}

case $1 in
start)
    [ -e "$state" ] && exit 0
    write running && touch "$state" || exit 1
    ;;
stop)
    [ -e "$state" ] || exit 0
    write stopped && rm "$state" || exit 1
    ;;
monitor)
    [ -e "$state" ] || exit 7
    ;;
meta-data)
    cat << 'END'
<?xml version="1.0"?>
<resource-agent name="claim" version="1.0">
  <version>1.1</version>
  <longdesc lang="en">A claim on a shared disk.</longdesc>
  <shortdesc lang="en">A claim on a shared disk</shortdesc>
  <parameters/>
  <actions>
    <action name="start" timeout="60s"/>
    <action name="stop" timeout="60s"/>
    <action name="monitor" timeout="60s" interval="10s"/>
    <action name="meta-data" timeout="60s"/>
  </actions>
</resource-agent>
END
    ;;
*)
    exit 3
    ;;
esac
