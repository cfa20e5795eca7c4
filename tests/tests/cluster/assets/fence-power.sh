#!/bin/bash
# The fence agent of the hosts' own cluster: asks the lab's power switch, which is in the hosts'
# network. It succeeds when the switch says that it is done.
SWITCH=/dev/tcp/10.88.0.254/623
action=reboot
plug=
while IFS= read -r line; do
    case "$line" in
    action=*) action=${line#*=} ;;
    port=* | plug=*) plug=${line#*=} ;;
    esac
done
case "$action" in
metadata)
    cat << END
<?xml version="1.0"?>
<resource-agent name="fence_power" shortdesc="The lab's power switch">
<longdesc>The lab's power switch</longdesc>
<parameters>
<parameter name="action" required="1"><content type="string" default="reboot"/><shortdesc lang="en">Action</shortdesc></parameter>
<parameter name="port" required="0"><content type="string"/><shortdesc lang="en">Host</shortdesc></parameter>
</parameters>
<actions>
<action name="on"/><action name="off"/><action name="reboot"/><action name="monitor"/><action name="metadata"/>
</actions>
</resource-agent>
END
    ;;
monitor) exit 0 ;;
off | reboot | on)
    exec 3<> "$SWITCH" || exit 1
    echo "$action $plug" >&3
    read -r answer <&3 && [ "$answer" = done ]
    ;;
*) exit 1 ;;
esac
