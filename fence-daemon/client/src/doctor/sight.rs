//! Reads `/proc` and `/sys`, without judging.

use std::fs;
use std::path::Path;

/// A file's text, trimmed; `None` if it cannot be read.
#[must_use]
pub fn text(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The number in a file.
#[must_use]
pub fn number(path: impl AsRef<Path>) -> Option<u64> {
    text(path)?.parse().ok()
}

/// A process that has something open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its process ID.
    pub pid: u32,
    /// Its program's name.
    pub name: String,
}

/// The processes that have a socket open, as far as this process can see.
#[must_use]
pub fn owners(inode: u64) -> Vec<Owner> {
    users(Path::new(&format!("socket:[{inode}]")))
}

/// The processes that have a file open, as far as this process can see. `link` is what the file is
/// called in `/proc/PID/fd`.
#[must_use]
pub fn users(link: &Path) -> Vec<Owner> {
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let has = |pid: &u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.into_iter().any(|file| fs::read_link(file.path()).is_ok_and(|target| target == link))
    };
    pids.filter(has).map(|pid| Owner { pid, name: program_of(pid) }).collect()
}

/// The name of a process's program.
#[must_use]
pub fn program_of(pid: u32) -> String {
    let file = fs::read_link(format!("/proc/{pid}/exe")).ok();
    let name = file.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.or_else(|| text(format!("/proc/{pid}/comm"))).unwrap_or_else(|| "unknown".to_owned())
}

/// The inodes of the sockets with this local port in a table of `/proc/net` (`udp`, `tcp6`, ...).
/// With `listening`, listening sockets only.
#[must_use]
pub fn sockets(table: &str, port: u16, listening: bool) -> Vec<u64> {
    /// `TCP_LISTEN`.
    const LISTEN: &str = "0A";
    let suffix = format!(":{port:04X}");
    let inode = |line: &str| {
        let mut words = line.split_whitespace().skip(1);
        let (local, _, state) = (words.next()?, words.next()?, words.next()?);
        let fits = local.ends_with(&suffix) && (!listening || state == LISTEN);
        // Queues, timer, retransmissions, user, timeout, inode.
        fits.then(|| words.nth(5)?.parse().ok()).flatten()
    };
    table.lines().skip(1).filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UDP: &str = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n \
        1223: 0C0000E1:04CD 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 77001 2 0000000000000000 0\n \
        1224: 00000000:14E9 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 77002 2 0000000000000000 0\n";
    const TCP: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
        0: 00000000:04CD 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 88001 1 0000000000000000 100 0 0 10 0\n   \
        1: 0100007F:04CD 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 88002 1 0000000000000000 100 0 0 10 0\n";

    #[test]
    fn sockets_are_found_by_port_and_state() {
        assert_eq!(sockets(UDP, 1229, false), [77001]);
        assert_eq!(sockets(TCP, 1229, true), [88001]);
        assert_eq!(sockets(TCP, 1229, false), [88001, 88002]);
        assert_eq!(sockets("", 1229, false), Vec::<u64>::new());
    }

    #[test]
    fn a_sockets_owner_is_found() {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        let table = text("/proc/net/udp").unwrap();
        let inodes = sockets(&table, port, false);
        assert_eq!(inodes.len(), 1);
        assert!(owners(inodes[0]).iter().any(|owner| owner.pid == std::process::id()));
    }
}
