//! A domain's disks by libvirt's definition: where their writes go, and whether this host can see
//! the end of a write.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node};
use serde::{Deserialize, Serialize};

use super::locks::Inode;

/// The disks of one domain, and whatever else of it writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Disks {
    /// Files and block devices, by path on this host.
    paths: BTreeSet<PathBuf>,
    /// Whether there is a disk of which neither is known.
    untold: bool,
    /// The disks whose writes this host cannot see. A server goes on with what it was sent, after
    /// the death of the sender.
    pub(crate) unseen: Vec<String>,
}

impl Disks {
    /// Reads a domain's definition.
    ///
    /// # Errors
    /// It is no XML.
    pub(crate) fn of(xml: &str) -> Result<Self, roxmltree::Error> {
        let document = Document::parse(xml)?;
        let devices = document.root_element().children().find(|node| node.has_tag_name("devices"));
        let mut disks = Self::default();
        for device in devices.into_iter().flat_map(|devices| devices.children()).filter(Node::is_element) {
            match device.tag_name().name() {
                "disk" => disks.add_disk(device),
                "filesystem" => disks.unseen.extend(served_filesystem(device)),
                "hostdev" => disks.unseen.extend(remote_hostdev(device)),
                _ => {}
            }
        }
        Ok(disks)
    }

    fn add_disk(&mut self, disk: Node<'_, '_>) {
        let child = |name: &str| disk.children().find(|node| node.has_tag_name(name));
        let Some(source) = child("source") else { return };
        let target = child("target").and_then(|target| target.attribute("dev")).unwrap_or("?");
        let say = |name: &str| source.attribute(name).unwrap_or("?").escape_debug().to_string();
        match disk.attribute("type") {
            Some("file") => self.add_path(source.attribute("file")),
            Some("block") => self.add_path(source.attribute("dev")),
            Some("network") => {
                let hosts: Vec<_> = source
                    .children()
                    .filter(|node| node.has_tag_name("host"))
                    .filter_map(|host| host.attribute("name").or_else(|| host.attribute("socket")))
                    .map(|host| host.escape_debug().to_string())
                    .collect();
                let at = if hosts.is_empty() { String::new() } else { format!(" at {}", hosts.join(", ")) };
                self.unseen.push(format!("disk {target}: {} {}{at}", say("protocol"), say("name")));
            }
            Some("vhostuser") => self.unseen.push(format!("disk {target}: vhost-user server at {}", say("path"))),
            Some("vhostvdpa") => self.unseen.push(format!("disk {target}: vDPA device {}", say("dev"))),
            Some("volume") => {
                self.untold = true;
                self.unseen.push(format!(
                    "disk {target}: volume {} of pool {}, if that pool is a server's",
                    say("volume"),
                    say("pool")
                ));
            }
            // A PCI device: the kernel resets it when its process ends.
            Some("nvme") => {}
            // A directory as a disk can only be read. What else there may be is not known.
            Some("dir") => {}
            _ => self.untold = true,
        }
    }

    fn add_path(&mut self, path: Option<&str>) {
        match path {
            Some(path) => drop(self.paths.insert(PathBuf::from(path))),
            None => self.untold = true,
        }
    }

    /// The inodes of the files, as the kernel's table of locks has them. May wait for storage that
    /// does not answer.
    pub(super) fn resolve(&self) -> Resolved {
        let mut resolved = Resolved { inodes: BTreeSet::new(), untold: self.untold };
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        for path in &self.paths {
            match inode(path, &mounts) {
                Some((inode, is_told)) => {
                    resolved.inodes.insert(inode);
                    resolved.untold |= !is_told;
                }
                None => resolved.untold = true,
            }
        }
        resolved
    }
}

/// What the paths of a domain's disks lead to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) inodes: BTreeSet<Inode>,
    /// Whether there are disks with an unknown inode: block devices, of which each machine has
    /// nodes of its own, and files that are not there (any more).
    pub(super) untold: bool,
}

/// A file's inode as the kernel's table of locks has it, and whether there can be no other. `None`:
/// it is not known.
fn inode(path: &Path, mounts: &str) -> Option<(Inode, bool)> {
    let about = fs::metadata(path).ok()?;
    // This is the host's node. The machine may have another one.
    let is_told = !about.file_type().is_block_device();
    // The table has the file system's own device. `stat` may have another one (btrfs), or other
    // inodes (overlayfs). The inode is not known then.
    let device = device_of_mount(path, mounts)?;
    let own = (nix::libc::major(about.dev()), nix::libc::minor(about.dev()));
    (device == own).then(|| (format!("{:02x}:{:02x}:{}", own.0, own.1, about.ino()), is_told))
}

/// The device of the file system that a path leads into, by the kernel's list of mounts.
fn device_of_mount(path: &Path, mounts: &str) -> Option<(u32, u32)> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let (flags, mask) = (rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::MNT_ID);
    let about = rustix::fs::statx(rustix::fs::CWD, path.as_c_str(), flags, mask).ok()?;
    if about.stx_mask & rustix::fs::StatxFlags::MNT_ID.bits() == 0 {
        return None;
    }
    let mount = about.stx_mnt_id.to_string();
    let line = mounts.lines().find(|line| line.split(' ').next() == Some(mount.as_str()))?;
    let kind = line.split_once(" - ")?.1.split(' ').next()?;
    let (major, minor) = line.split(' ').nth(2)?.split_once(':')?;
    (kind != "overlay").then_some(())?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A shared directory whose server libvirt does not start.
fn served_filesystem(filesystem: Node<'_, '_>) -> Option<String> {
    let child = |name: &str| filesystem.children().find(|node| node.has_tag_name(name));
    let socket = child("source")?.attribute("socket")?.escape_debug();
    let target = child("target").and_then(|target| target.attribute("dir")).unwrap_or("?").escape_debug();
    Some(format!("file system {target}: virtiofs server at {socket}"))
}

/// A SCSI device that QEMU itself reaches over the network.
fn remote_hostdev(hostdev: Node<'_, '_>) -> Option<String> {
    let source = hostdev.children().find(|node| node.has_tag_name("source"))?;
    let protocol = source.attribute("protocol")?.escape_debug();
    Some(format!("host device: {protocol} {}", source.attribute("name").unwrap_or("?").escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(devices: &str) -> Disks {
        Disks::of(&format!("<domain><name>x</name><devices>{devices}</devices></domain>")).unwrap()
    }

    #[test]
    fn disks_are_told_by_where_their_writes_go() {
        let disks = of("<disk type='file'><source file='/images/a'/><target dev='vda'/></disk>\
             <disk type='block'><source dev='/dev/vg/b'/><target dev='vdb'/></disk>\
             <disk type='file' device='cdrom'><target dev='sda'/></disk>\
             <interface type='vhostuser'><source type='unix' path='/s'/></interface>");
        assert_eq!(disks.paths, ["/images/a", "/dev/vg/b"].map(PathBuf::from).into());
        assert!(disks.unseen.is_empty() && !disks.untold, "{disks:?}");
        assert!(Disks::of("<domain").is_err());
        assert_eq!(Disks::of("<domain/>").unwrap(), Disks::default());
        assert!(of("<disk type='new'><source x='y'/></disk>").untold);
    }

    #[test]
    fn disks_of_a_server_are_reported_as_unseen() {
        let disks = of(
            "<disk type='network'><source protocol='nbd' name='export'><host name='san' port='10809'/></source>\
             <target dev='vda'/></disk>\
             <disk type='network'><source protocol='rbd' name='pool/image'/><target dev='vdb'/></disk>\
             <disk type='vhostuser'><source type='unix' path='/run/spdk.sock'/><target dev='vdc'/></disk>\
             <disk type='volume'><source pool='p' volume='v'/><target dev='vdd'/></disk>\
             <filesystem type='mount'><driver type='virtiofs'/><source socket='/run/fs.sock'/><target dir='data'/></filesystem>\
             <filesystem type='mount'><driver type='virtiofs'/><source dir='/srv'/><target dir='own'/></filesystem>\
             <hostdev mode='subsystem' type='scsi'><source protocol='iscsi' name='iqn.x/1'/></hostdev>",
        );
        let unseen = [
            "disk vda: nbd export at san",
            "disk vdb: rbd pool/image",
            "disk vdc: vhost-user server at /run/spdk.sock",
            "disk vdd: volume v of pool p, if that pool is a server's",
            "file system data: virtiofs server at /run/fs.sock",
            "host device: iscsi iqn.x/1",
        ];
        assert_eq!(disks.unseen, unseen);
        assert!(disks.untold, "where the volume is, is not told");
    }

    #[test]
    fn a_file_has_the_inode_that_the_kernels_table_has() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("image");
        fs::write(&path, [0; 512]).unwrap();
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        super::super::locks::tests::lock(&file, 100);
        let resolved = of(&format!("<disk type='file'><source file='{}'/></disk>", path.display())).resolve();
        let (held, _) = super::super::locks::held().unwrap();
        let is_held = |inode: &Inode| held.keys().any(|lock| lock.inode == *inode);
        assert!(resolved.untold || resolved.inodes.len() == 1 && resolved.inodes.iter().all(is_held), "{resolved:?}");
        let resolved = of("<disk type='file'><source file='/nonexistent/image'/></disk>").resolve();
        assert_eq!(resolved, Resolved { inodes: BTreeSet::new(), untold: true });
    }
}
