//! Detects a hypervisor: a machine with a running libvirt and its default network.

use std::path::{Path, PathBuf};

/// Looks below `root` for libvirt's sockets and the interface virbr0: one of the sockets. The error
/// says which of the two is missing.
pub(crate) fn detect(root: &Path) -> Result<PathBuf, String> {
    // The sockets of the daemons that run domains. virtlogd and virtlockd run none, and have theirs
    // in the same directory.
    let serving = ["libvirt-sock", "virtqemud-sock", "virtlxcd-sock", "virtxend-sock"];
    let mut sockets = ["run/libvirt", "var/run/libvirt"]
        .into_iter()
        .flat_map(|folder| serving.map(|name| root.join(folder).join(name)));
    let socket = sockets.find(|socket| socket.exists());
    let bridge = root.join("sys/class/net/virbr0").exists();
    match (socket, bridge) {
        (Some(socket), true) => Ok(socket),
        (Some(_), false) => Err("libvirt is here, but no interface virbr0".to_owned()),
        (None, true) => Err("there is a virbr0, but no libvirt socket in /run/libvirt".to_owned()),
        (None, false) => Err("no libvirt socket in /run/libvirt and no interface virbr0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

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
        assert_eq!(detect(both.path()).unwrap(), both.path().join("run/libvirt/virtqemud-sock"));
        let old = tree(&[("var/run/libvirt/libvirt-sock", ""), bridge]);
        assert!(detect(old.path()).is_ok());
        let no_bridge = tree(&[("run/libvirt/libvirt-sock", ""), ("sys/class/net/eth0/ifindex", "2\n")]);
        assert!(detect(no_bridge.path()).unwrap_err().contains("no interface virbr0"));
        // A log daemon alone runs no domains.
        let no_libvirt = tree(&[("run/libvirt/virtlogd-sock", ""), bridge]);
        assert!(detect(no_libvirt.path()).unwrap_err().contains("no libvirt socket"));
        assert!(detect(tree(&[]).path()).is_err());
    }
}
