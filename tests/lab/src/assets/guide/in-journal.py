#!/usr/bin/python3
"""in-journal UNIT COMMAND...: runs a command as systemd runs a service.

Its output is the journal's, and its cgroup has the unit's name: by that the journal tells whose a message is.
"""
import os
import socket
import sys

unit, command = sys.argv[1], sys.argv[2:]
# The lab's cgroups, as its first process has them: the old hierarchy of systemd, or the only one.
cgroups = "/proc/1/root/sys/fs/cgroup"
if os.path.isdir(f"{cgroups}/systemd"):
    cgroups += "/systemd"
# To the journal the first process's cgroup is the root.
own = f"{cgroups}/init/system.slice/{unit}.service"
os.makedirs(own, exist_ok=True)
with open(f"{own}/cgroup.procs", "w") as file:
    file.write("0")
stream = socket.socket(socket.AF_UNIX)
stream.connect("/run/systemd/journal/stdout")
# The identifier, the unit, the priority, whether lines may begin with another one, and three places to copy to.
stream.sendall(f"{unit}\n{unit}.service\n6\n1\n0\n0\n0\n".encode())
stream.shutdown(socket.SHUT_RD)
os.dup2(stream.fileno(), 1)
os.dup2(stream.fileno(), 2)
about = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{about.st_dev}:{about.st_ino}"
os.execvp(command[0], command)
