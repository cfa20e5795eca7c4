//! The setup of these tests: the object, a namespace, a loaded program.

use std::path::PathBuf;
use std::process::Command;

use fence_common::admit::Rules;
use fence_common::boundary::Listener;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::rate_limit::Limits;
use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_GROUP_V6, DEFAULT_PORT};
use fence_daemon::intake::kernel::KernelProgram;

/// The requirements on requests.
pub(crate) const RULES: Rules = Rules { min_hash: HashKind::Sha256, strict_source: true };

/// Both families, the default groups and port.
pub(crate) const LISTENER: Listener = Listener {
    group_v4: Some(DEFAULT_GROUP_V4),
    group_v6: Some(DEFAULT_GROUP_V6),
    port: DEFAULT_PORT,
    rules: RULES,
    limits: Limits::NONE,
};

pub(crate) fn key() -> Key {
    Key::new(b"secret").unwrap()
}

pub(crate) fn object() -> Vec<u8> {
    let path = std::env::var_os("FENCE_EBPF_OBJECT").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/fence-xdp.o")),
        PathBuf::from,
    );
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}. Remedy: `cargo xtask build`", path.display()))
}

pub(crate) fn load() -> KernelProgram {
    KernelProgram::load(&object(), &LISTENER, Some(&key())).unwrap()
}

/// The output of `ip`. Children of this thread live in its namespace.
pub(crate) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.unwrap_or_else(|error| panic!("ip: {error}. Remedy: apt-get install iproute2"));
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn require_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "BPF needs root. Remedy: run the tests as root, as `cargo xtask test` does"
    );
}

/// Runs a test in a namespace with a bridge `virbr0` and a veth pair `port0`, `guest0`, all of them
/// up.
pub(crate) fn in_namespace(test: fn()) {
    require_root();
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ip("link add virbr0 type bridge forward_delay 0");
        ip("link add port0 type veth peer name guest0");
        for interface in ["lo", "virbr0", "port0", "guest0"] {
            ip(&format!("link set {interface} up"));
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}
