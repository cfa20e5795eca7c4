#!/bin/sh
# journalctl -u UNIT -n NUMBER -o cat: what the unit's process has printed.
set -eu
if [ "$#" != 6 ] || [ "$1$3$5$6" != "-u-n-ocat" ]; then
    echo "journalctl: this stand-in knows -u UNIT -n NUMBER -o cat" >&2
    exit 64
fi
tail -n "$4" "/run/guide/$2.log"
