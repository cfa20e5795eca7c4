//! Checks the port's owner: UDP for requests on the hypervisor, TCP for the callback in a guest.

use super::finding::Finding;
use super::sight::{self, Owner};

/// The check's name.
pub const CHECK: &str = "port";

/// Checks UDP on the hypervisor. `daemon` is the process ID of the daemon that answers on the
/// control socket.
#[must_use]
pub fn udp(port: u16, daemon: Option<u32>) -> Vec<Finding> {
    judge_udp(port, daemon, &owners("udp", port, false))
}

/// The sockets of a port: inode and processes of each.
fn owners(protocol: &str, port: u16, listening: bool) -> Vec<(u64, Vec<Owner>)> {
    let tables = [format!("/proc/net/{protocol}"), format!("/proc/net/{protocol}6")];
    let inodes = tables.iter().filter_map(sight::text).flat_map(|table| sight::sockets(&table, port, listening));
    inodes.map(|inode| (inode, sight::owners(inode))).collect()
}

fn judge_udp(port: u16, daemon: Option<u32>, sockets: &[(u64, Vec<Owner>)]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (inode, owners) in sockets {
        let Some(owner) = owners.iter().find(|owner| Some(owner.pid) == daemon).or(owners.first()) else {
            let seen = format!("an invisible process has UDP port {port} (socket {inode})");
            findings.push(Finding::unknown(
                CHECK,
                seen,
                "a process of another namespace, or of root: ask again as root on the host itself",
            ));
            continue;
        };
        let Owner { pid, name } = owner;
        if Some(*pid) == daemon {
            findings.push(Finding::ok(CHECK, format!("UDP {port} is the daemon's")));
        } else if name == "fence-daemon" {
            let seen =
                format!("fence-daemon (process {pid}) has UDP port {port} and is not the daemon of this configuration");
            let remedy = "it has another configuration or state directory: name its file with -f, or end it";
            findings.push(Finding::wrong(CHECK, seen, remedy).command(format!("kill {pid}")));
        } else {
            let remedy = "only one server can have the port, and this daemon gets no requests: stop the other";
            let finding = Finding::wrong(CHECK, format!("{name} (process {pid}) has UDP port {port}"), remedy);
            let stop = if name == "fence_virtd" {
                "systemctl disable --now fence_virtd".to_owned()
            } else {
                format!("kill {pid}")
            };
            findings.push(finding.command(stop));
        }
    }
    if findings.is_empty() {
        findings.push(match daemon {
            None => Finding::ok(CHECK, format!("UDP {port} is free")),
            Some(_) => Finding::wrong(
                CHECK,
                format!("no process has UDP port {port}, although the daemon runs"),
                "it waits for its interface, or listens to another port: see what `status` says",
            )
            .command("fence-daemon status"),
        });
    }
    findings
}

/// Checks TCP in a guest, where `fence_xvm` waits for the callback.
#[must_use]
pub fn tcp(port: u16) -> Finding {
    judge_tcp(port, &owners("tcp", port, true))
}

fn judge_tcp(port: u16, sockets: &[(u64, Vec<Owner>)]) -> Finding {
    let Some((inode, owners)) = sockets.first() else {
        return Finding::ok(CHECK, format!("TCP {port} is free for the callback"));
    };
    match owners.first() {
        Some(Owner { pid, name }) if name == "fence_xvm" => {
            let remedy = "one request at a time: another one fails while it runs, and Pacemaker tries again";
            Finding::warning(
                CHECK,
                format!("a fence_xvm (process {pid}) waits for a callback at TCP {port} at this moment"),
                remedy,
            )
        }
        Some(Owner { pid, name }) => {
            let remedy = "fence_xvm cannot be called back there: stop it, or have both sides use another port (`port` in fence_virt.conf, \
                          fence_xvm -p)";
            Finding::wrong(CHECK, format!("{name} (process {pid}) listens on TCP {port}"), remedy)
                .command(format!("kill {pid}"))
        }
        None => {
            let seen = format!("an invisible process listens on TCP {port} (socket {inode})");
            Finding::wrong(CHECK, seen, "fence_xvm cannot be called back there")
                .command(format!("ss -ltnp sport = :{port}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;

    fn socket(pid: u32, name: &str) -> (u64, Vec<Owner>) {
        (77, vec![Owner { pid, name: name.to_owned() }])
    }

    #[test]
    fn the_port_belongs_to_the_daemon_that_answers() {
        let states = |daemon, sockets: &[(u64, Vec<Owner>)]| -> Vec<State> {
            judge_udp(1229, daemon, sockets).iter().map(|finding| finding.state).collect()
        };
        assert_eq!(states(Some(5), &[socket(5, "fence-daemon")]), [State::Ok]);
        assert_eq!(states(None, &[]), [State::Ok]);
        assert_eq!(states(Some(5), &[]), [State::Wrong]);
        assert_eq!(states(Some(5), &[socket(5, "fence-daemon"), socket(6, "fence_virtd")]), [State::Ok, State::Wrong]);
        assert_eq!(states(None, &[socket(6, "fence-daemon")]), [State::Wrong]);
        assert_eq!(states(None, &[(77, vec![])]), [State::Unknown]);
        let stock = judge_udp(1229, None, &[socket(6, "fence_virtd")]);
        assert_eq!(stock[0].commands, ["systemctl disable --now fence_virtd"]);
    }

    #[test]
    fn the_call_backs_port_must_be_free() {
        let state = |sockets: &[(u64, Vec<Owner>)]| judge_tcp(1229, sockets).state;
        assert_eq!(state(&[]), State::Ok);
        assert_eq!(state(&[socket(5, "fence_xvm")]), State::Warning);
        assert_eq!(state(&[socket(5, "nc")]), State::Wrong);
        assert_eq!(state(&[(77, vec![])]), State::Wrong);
    }
}
