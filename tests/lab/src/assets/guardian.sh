# Makes one lab's namespaces and keeps them while its standard input stays open. Then it removes
# what the kernel leaves: the lab's cgroups. The lab's owner holds the other end of that pipe, so
# the lab ends with its owner.
# $1: the lab's name. Prints "ready PID" with the lab's process 1 as the host numbers it. Errors go
# to standard error.
set -u
lab=$1
trap '' INT HUP TERM

# The lab's cgroups are one subtree of each hierarchy, the root of the lab's cgroup namespace. So
# machines of two labs, or of a lab and the host, can have the same name.
hierarchies=$(awk '$3 == "cgroup" || $3 == "cgroup2" { print $2 }' /proc/self/mounts)
for mounted in $hierarchies; do
    mkdir -p "$mounted/$lab/init" || exit 1
    if [ -e "$mounted/cpuset.cpus" ]; then
        for part in cpus mems; do
            cat "$mounted/cpuset.$part" > "$mounted/$lab/cpuset.$part"
            cat "$mounted/cpuset.$part" > "$mounted/$lab/init/cpuset.$part"
        done
    fi
done

# A subshell enters the cgroups, so that this process stays outside and can remove them.
(
    self=$(exec sh -c 'echo $PPID')
    for mounted in $hierarchies; do
        echo "$self" > "$mounted/$lab/cgroup.procs" || exit 1
    done
    # tini is process 1 of the lab and reaps its orphans. It ends when `cat` reads the end of the
    # pipe, and the kernel then kills all other processes of the lab.
    exec unshare --mount --propagation private --net --pid --cgroup --ipc --uts --fork \
        sh -c "$INSIDE" inside "$lab" "$hierarchies"
)
code=$?

# The namespace's process 1 ends after all of its processes: the cgroups are empty now, or soon.
for mounted in $hierarchies; do
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        find "$mounted/$lab" -depth -type d -exec rmdir {} + 2> /dev/null
        [ -d "$mounted/$lab" ] || break
        sleep 0.2
    done
done
exit $code
