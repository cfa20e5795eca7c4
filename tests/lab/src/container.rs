//! A real libvirt-LXC container: busybox with an init that ignores SIGTERM, on the lab's bridge.

use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};

use crate::lab::{BRIDGE, Hypervisor};
use crate::libvirtd::Libvirtd;
use crate::tools;

/// libvirt's driver for containers.
pub const URI: &str = "lxc:///";

const INIT: &str = "#!/bin/sh\ntrap '' TERM INT\nwhile :; do /bin/busybox sleep 3600; done\n";

/// Makes a container's root directory in the lab, defines the container and starts it.
pub fn start(libvirtd: &Libvirtd, name: &str) -> Result<()> {
    start_with(libvirtd, name, INIT, None)
}

/// Like [`start`], with this script as init, and optionally a directory of the lab at `/data`.
pub fn start_with(libvirtd: &Libvirtd, name: &str, init: &str, data: Option<&str>) -> Result<()> {
    let root = make_root(libvirtd.hypervisor(), name, init)?;
    let data =
        data.map(|data| format!("<filesystem type='mount'><source dir='{data}'/><target dir='/data'/></filesystem>"));
    let data = data.unwrap_or_default();
    let emulator = emulator()?;
    let xml = format!(
        "<domain type='lxc'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type>exe</type><init>/init</init></os>\
         <devices><emulator>{emulator}</emulator>\
         <filesystem type='mount' accessmode='passthrough'><source dir='{root}'/><target dir='/'/></filesystem>{data}\
         <interface type='bridge'><source bridge='{BRIDGE}'/></interface><console type='pty'/></devices></domain>"
    );
    libvirtd.define(URI, name, &xml)?;
    libvirtd.start_domain(URI, name)
}

/// The path of the program that libvirt runs a container in.
///
/// # Errors
/// It is not installed.
pub fn emulator() -> Result<&'static str> {
    let places = ["/usr/lib/libvirt/libvirt_lxc", "/usr/libexec/libvirt_lxc"];
    places.into_iter().find(|path| std::path::Path::new(path).exists()).context(
        "libvirt's LXC driver is missing (Debian package libvirt-daemon-driver-lxc): run `cargo xtask setup --for test`",
    )
}

fn make_root(hypervisor: &Hypervisor, name: &str, init: &str) -> Result<String> {
    let file = |path: &str| format!("{name}-root/{path}");
    hypervisor.write_mode(&file("bin/busybox"), &std::fs::read(tools::find("busybox")?)?, 0o755)?;
    hypervisor.write_mode(&file("init"), init.as_bytes(), 0o755)?;
    let root = hypervisor.path(&format!("{name}-root"));
    let outside = hypervisor.outside(&root);
    // busybox is the shell if it is called by that name.
    std::fs::hard_link(outside.join("bin/busybox"), outside.join("bin/sh"))?;
    for directory in ["proc", "sys", "dev", "tmp", "etc", "data"] {
        std::fs::create_dir_all(outside.join(directory))?;
    }
    std::fs::set_permissions(&outside, std::fs::Permissions::from_mode(0o755))?;
    Ok(root)
}
