#!/bin/sh
# systemctl where systemd is not process 1: it starts and stops what the units' ExecStart say, one after the other, and nothing else of them.
# Where there is a journal, what they print is in it under the unit's name.
set -eu
state=/run/guide
mkdir -p "$state"
verb= now= units=
for word; do
    case $word in
    --now) now=yes ;;
    -*) echo "systemctl: this stand-in does not know $word" >&2; exit 64 ;;
    *) if [ -z "$verb" ]; then verb=$word; else units="$units ${word%.service}"; fi ;;
    esac
done

unit() {
    for directory in /etc/systemd/system /usr/local/lib/systemd/system /lib/systemd/system; do
        if [ -f "$directory/$1.service" ]; then
            echo "$directory/$1.service"
            return
        fi
    done
    echo "Unit $1.service could not be found." >&2
    exit 5
}

said() {
    sed -n "s/^$2=[-!+@]*//p" "$(unit "$1")" | sed -n 1p
}

is_active() {
    [ -e "$state/$1.pid" ] && kill -0 "$(cat "$state/$1.pid")" 2> /dev/null
}

start() {
    if is_active "$1"; then
        return
    fi
    command=$(said "$1" ExecStart)
    if [ "$(said "$1" Type)" = oneshot ]; then
        sh -c "$command"
        return
    fi
    if [ "$(said "$1" Type)" = dbus ] && [ ! -S /run/dbus/system_bus_socket ]; then
        mkdir -p /run/dbus
        dbus-daemon --system --fork --nopidfile
    fi
    : > "$state/$1.log"
    if [ -S /run/systemd/journal/stdout ]; then
        setsid /run/guide/in-journal "$1" sh -c "exec $command" < /dev/null > "$state/$1.log" 2>&1 &
    else
        setsid sh -c "exec $command" > "$state/$1.log" 2>&1 < /dev/null &
    fi
    echo $! > "$state/$1.pid"
    left=600
    until ready "$1"; do
        left=$((left - 1))
        if [ "$left" = 0 ] || ! is_active "$1"; then
            echo "Job for $1.service failed:" >&2
            said_by "$1" >&2
            exit 1
        fi
        sleep 0.1
    done
}

# What the unit's process has printed.
said_by() {
    cat "$state/$1.log"
    if [ -S /run/systemd/journal/stdout ]; then
        journalctl --quiet --output=cat "_PID=$(cat "$state/$1.pid")"
    fi
}

# What says so depends on the unit: systemd would be told over a socket.
ready() {
    case $1 in
    fence-daemon) said_by "$1" | grep -Eq '(^| )ready ' ;;
    firewalld) firewall-cmd --quiet --state 2> /dev/null ;;
    *) is_active "$1" ;;
    esac
}

stop() {
    if is_active "$1"; then
        pid=$(cat "$state/$1.pid")
        kill "$pid"
        while kill -0 "$pid" 2> /dev/null; do
            sleep 0.1
        done
    fi
    rm -f "$state/$1.pid"
}

case $verb in
daemon-reload) exit ;;
start | stop | restart | enable | disable | is-active) ;;
*) echo "systemctl: this stand-in does not know $verb" >&2; exit 64 ;;
esac
for unit in $units; do
    case $verb$now in
    start | enableyes) start "$unit" ;;
    stop | disableyes) stop "$unit" ;;
    restart) stop "$unit"; start "$unit" ;;
    enable | disable) unit "$unit" > /dev/null ;;
    is-active) if is_active "$unit"; then echo active; else echo inactive; exit 3; fi ;;
    esac
done
