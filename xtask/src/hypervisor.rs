//! Detects a hypervisor, and the files and processes of fence_virtd on it.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The configuration file of fence_virtd, which our daemon reads as well.
pub(crate) const STOCK_CONFIG: &str = "etc/fence_virt.conf";

/// The key file of fence_virtd if its configuration names none.
const STOCK_KEY: &str = "/etc/cluster/fence_xvm.key";

/// The UDP port of requests, unless the configuration names another.
pub(crate) const PORT: u16 = 1229;

/// A machine with a running libvirt and its default network.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hypervisor {
    /// One of libvirt's sockets.
    pub(crate) socket: PathBuf,
}

impl Hypervisor {
    /// Looks below `root` for libvirt's sockets and the interface virbr0. The error says which one
    /// is missing.
    pub(crate) fn detect(root: &Path) -> Result<Self, String> {
        // The sockets of the daemons that run domains. virtlogd and virtlockd run none, and have
        // theirs in the same directory.
        let serving = ["libvirt-sock", "virtqemud-sock", "virtlxcd-sock", "virtxend-sock"];
        let mut sockets = ["run/libvirt", "var/run/libvirt"]
            .into_iter()
            .flat_map(|folder| serving.map(|name| root.join(folder).join(name)));
        let socket = sockets.find(|socket| socket.exists());
        let bridge = root.join("sys/class/net/virbr0").exists();
        match (socket, bridge) {
            (Some(socket), true) => Ok(Self { socket }),
            (Some(_), false) => Err("libvirt is here, but no interface virbr0".to_owned()),
            (None, true) => Err("there is a virbr0, but no libvirt socket in /run/libvirt".to_owned()),
            (None, false) => Err("no libvirt socket in /run/libvirt and no interface virbr0".to_owned()),
        }
    }
}

/// The configuration of fence_virtd under `root`, as far as xtask needs it. The daemon has the real
/// parser.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct StockConfig {
    /// The file.
    pub(crate) file: PathBuf,
    /// The key file from the configuration, or the default one.
    pub(crate) key: PathBuf,
    /// Whether the key file exists; the daemon checks its content.
    pub(crate) key_exists: bool,
    /// The UDP port of requests.
    pub(crate) port: u16,
}

impl StockConfig {
    /// Reads the configuration; `None` if there is no such file.
    ///
    /// # Errors
    /// The file exists and cannot be read. Ignoring it would start the daemon with another key than
    /// the guests have.
    pub(crate) fn read(root: &Path) -> io::Result<Option<Self>> {
        match fs::read(root.join(STOCK_CONFIG)) {
            Ok(text) => Ok(Some(Self::of(root, &text))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Parses the configuration's `text`.
    pub(crate) fn of(root: &Path, text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let key = last_value(&text, "key_file").unwrap_or_else(|| STOCK_KEY.to_owned());
        // A key in a directory that only root may enter counts as existing.
        let key_exists = match fs::metadata(root.join(key.trim_start_matches('/'))) {
            Ok(_) => true,
            Err(error) => !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory),
        };
        let port = last_value(&text, "port").and_then(|port| port.parse().ok()).unwrap_or(PORT);
        Self { file: root.join(STOCK_CONFIG), key: key.into(), key_exists, port }
    }
}

/// The last `key = "value"` of a configuration, in any section. This suffices to check whether a
/// file exists.
fn last_value(text: &str, key: &str) -> Option<String> {
    let bare = |line: &str| line.split('#').next().unwrap_or_default().to_owned();
    let text: Vec<String> = text.lines().map(bare).collect();
    let text = text.join(" ");
    let statements = text.split([';', '{', '}']).filter_map(|statement| statement.split_once('='));
    let values = statements.filter(|(name, _)| name.trim().eq_ignore_ascii_case(key));
    values.map(|(_, value)| value.trim().trim_matches('"').to_owned()).rfind(|value| !value.is_empty())
}

/// Whether a process has the UDP port `port` open, by the kernel's tables under `root`.
pub(crate) fn udp_port_taken(root: &Path, port: u16) -> bool {
    ["proc/net/udp", "proc/net/udp6"].iter().any(|table| {
        let text = fs::read_to_string(root.join(table)).unwrap_or_default();
        text.lines().skip(1).filter_map(local_port).any(|taken| taken == port)
    })
}

/// The local port of a line of /proc/net/udp: `1229: 00000000:04CD 00000000:0000 ...`.
fn local_port(line: &str) -> Option<u16> {
    u16::from_str_radix(line.split_whitespace().nth(1)?.rsplit_once(':')?.1, 16).ok()
}

/// Whether a process under `root` has the name of stock's daemon.
pub(crate) fn stock_daemon_runs(root: &Path) -> bool {
    let Ok(processes) = fs::read_dir(root.join("proc")) else { return false };
    processes.flatten().any(|process| {
        fs::read_to_string(process.path().join("comm")).is_ok_and(|name| name.trim_end() == "fence_virtd")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root directory made of files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let file = root.path().join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }
        root
    }

    #[test]
    fn a_hypervisor_has_both_a_serving_libvirt_and_the_bridge() {
        let bridge = ("sys/class/net/virbr0/ifindex", "3\n");
        let both = tree(&[("run/libvirt/virtqemud-sock", ""), bridge]);
        assert_eq!(Hypervisor::detect(both.path()).unwrap().socket, both.path().join("run/libvirt/virtqemud-sock"));
        let old = tree(&[("var/run/libvirt/libvirt-sock", ""), bridge]);
        assert!(Hypervisor::detect(old.path()).is_ok());
        let no_bridge = tree(&[("run/libvirt/libvirt-sock", ""), ("sys/class/net/eth0/ifindex", "2\n")]);
        assert!(Hypervisor::detect(no_bridge.path()).unwrap_err().contains("no interface virbr0"));
        // A log daemon alone runs no domains.
        let no_libvirt = tree(&[("run/libvirt/virtlogd-sock", ""), bridge]);
        assert!(Hypervisor::detect(no_libvirt.path()).unwrap_err().contains("no libvirt socket"));
        assert!(Hypervisor::detect(tree(&[]).path()).is_err());
    }

    #[test]
    fn the_key_of_a_stock_configuration_is_found() {
        let text = "listeners { multicast {\n  # key_file = \"/etc/old.key\";\n  Key_File = \"/etc/fence_virt.key\"; port=\"1230\" ; } }\n";
        let there = tree(&[(STOCK_CONFIG, text), ("etc/fence_virt.key", "k")]);
        let config = StockConfig::read(there.path()).unwrap().unwrap();
        assert_eq!((config.key.to_str(), config.key_exists, config.port), (Some("/etc/fence_virt.key"), true, 1230));
        let gone = tree(&[(STOCK_CONFIG, text)]);
        assert!(!StockConfig::read(gone.path()).unwrap().unwrap().key_exists);
        // The file has a mistake, which the daemon will report: no reason for another key.
        let folder = tree(&[(STOCK_CONFIG, text), ("etc/fence_virt.key/x", "")]);
        assert!(StockConfig::read(folder.path()).unwrap().unwrap().key_exists);
        let plain =
            tree(&[(STOCK_CONFIG, "fence_virtd { backend = \"libvirt\"; }"), ("etc/cluster/fence_xvm.key", "k")]);
        let config = StockConfig::read(plain.path()).unwrap().unwrap();
        assert_eq!((config.key.to_str(), config.key_exists, config.port), (Some(STOCK_KEY), true, PORT));
        assert_eq!(StockConfig::read(tree(&[]).path()).unwrap(), None);
        // A path that exists and cannot be read (a directory, here) is an error.
        assert!(StockConfig::read(tree(&[("etc/fence_virt.conf/x", "")]).path()).is_err());
    }

    #[test]
    fn a_taken_port_is_seen_in_either_table() {
        let head = "  sl  local_address rem_address   st tx_queue rx_queue\n";
        let line = "  703: 00000000:04CD 00000000:0000 07 00000000:00000000\n";
        let line6 = "  703: 00000000000000000000000000000000:04CD 00000000000000000000000000000000:0000 07\n";
        let other = "  703: 00000000:04CE 00000000:04CD 07 00000000:00000000\n";
        assert!(udp_port_taken(tree(&[("proc/net/udp", &format!("{head}{other}{line}"))]).path(), PORT));
        assert!(udp_port_taken(
            tree(&[("proc/net/udp", head), ("proc/net/udp6", &format!("{head}{line6}"))]).path(),
            PORT
        ));
        assert!(!udp_port_taken(tree(&[("proc/net/udp", &format!("{head}{other}"))]).path(), PORT));
    }

    #[test]
    fn stocks_daemon_is_known_by_its_name() {
        assert!(stock_daemon_runs(tree(&[("proc/1/comm", "init\n"), ("proc/77/comm", "fence_virtd\n")]).path()));
        assert!(!stock_daemon_runs(tree(&[("proc/1/comm", "init\n"), ("proc/77/comm", "fence-daemon\n")]).path()));
    }
}
