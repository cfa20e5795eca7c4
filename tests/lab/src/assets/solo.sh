#!/bin/sh
# The resource agent ocf:lab:solo: a service that must never run twice. Its process holds a lock on
# shared storage as long as it lives, so the kernel says which node is first. Each start and stop
# adds a line to a log there, with the time since the host's boot in nanoseconds.
: "${OCF_RESKEY_directory:=/shared}"
process=/run/solo.pid

runs() {
    [ -e "$process" ] && kill -0 "$(cat "$process")" 2> /dev/null
}

note() {
    perl -MTime::HiRes=clock_gettime -e 'printf "%s %s %.0f\n", @ARGV, clock_gettime(7) * 1e9' "$1" "$(hostname)" >> "$OCF_RESKEY_directory/log"
}

case "$1" in
start)
    runs && exit 0
    exec 9>> "$OCF_RESKEY_directory/lock"
    if ! flock -n 9; then
        # Somewhere the service still runs, whatever the cluster thinks.
        note refused
        exit 1
    fi
    note start
    # The service: the lock is its own from here on.
    setsid sleep infinity < /dev/null > /dev/null 2>&1 &
    echo $! > "$process"
    ;;
stop)
    runs || exit 0
    kill -KILL "$(cat "$process")"
    rm -f "$process"
    # Killed is not gone yet.
    exec 9>> "$OCF_RESKEY_directory/lock"
    flock -w 10 9 || exit 1
    note stop
    ;;
monitor)
    runs || exit 7
    ;;
meta-data)
    cat << END
<?xml version="1.0"?>
<resource-agent name="solo" version="1.0">
<version>1.0</version>
<longdesc lang="en">A service that must never run twice.</longdesc>
<shortdesc lang="en">Must never run twice</shortdesc>
<parameters>
<parameter name="directory" unique="0" required="0">
<longdesc lang="en">A directory on storage that all nodes share.</longdesc>
<shortdesc lang="en">Shared directory</shortdesc>
<content type="string" default="/shared"/>
</parameter>
</parameters>
<actions>
<action name="start" timeout="20s"/>
<action name="stop" timeout="20s"/>
<action name="monitor" timeout="20s" interval="1s" depth="0"/>
<action name="meta-data" timeout="5s"/>
</actions>
</resource-agent>
END
    ;;
validate-all) ;;
*) exit 3 ;;
esac
exit 0
