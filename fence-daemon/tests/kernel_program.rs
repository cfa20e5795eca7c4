//! The kernel program on real interfaces: attached in either mode, found occupied, gone with its owner.
//!
//! Each test runs in a network namespace of its own, that of its thread, which vanishes with it. Needs root, `ip` and the object
//! that `cargo xtask build` makes.

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::process::Command;

    use fence_common::admit::Rules;
    use fence_common::boundary::Listener;
    use fence_common::hash::HashKind;
    use fence_common::key::Key;
    use fence_common::verdict::Counters;
    use fence_common::wire::{DEFAULT_GROUP_V4, DEFAULT_PORT};
    use fence_daemon::intake::kernel::{AttachedMode, Error, KernelProgram, Mode};

    const LISTENER: Listener = Listener {
        group_v4: Some(DEFAULT_GROUP_V4),
        group_v6: None,
        port: DEFAULT_PORT,
        rules: Rules { min_hash: HashKind::Sha256, strict_source: true },
    };

    fn object() -> Vec<u8> {
        let path = std::env::var_os("FENCE_EBPF_OBJECT").map_or_else(
            || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/fence-xdp.o")),
            PathBuf::from,
        );
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}. Remedy: `cargo xtask build`", path.display()))
    }

    fn load() -> KernelProgram {
        let key = Key::new(b"secret").unwrap();
        KernelProgram::load(&object(), &LISTENER, Some(&key)).unwrap()
    }

    /// What `ip` prints; children of this thread live in its namespace.
    fn ip(arguments: &str) -> String {
        let output = Command::new("ip").args(arguments.split(' ')).output();
        let output = output.unwrap_or_else(|error| panic!("ip: {error}. Remedy: apt-get install iproute2"));
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a test in a namespace with a bridge `virbr0` and a veth pair `port0`, `guest0`, all of them up.
    fn in_namespace(test: fn()) {
        assert!(
            nix::unistd::geteuid().is_root(),
            "BPF needs root. Remedy: run the tests as root, as `cargo xtask test` does"
        );
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ip("link add virbr0 type bridge");
            ip("link add port0 type veth peer name guest0");
            for interface in ["virbr0", "port0", "guest0"] {
                ip(&format!("link set {interface} up"));
            }
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    #[test]
    fn auto_is_native_where_the_device_can_and_generic_elsewhere() {
        in_namespace(|| {
            for (interface, attached, shown) in
                [("virbr0", AttachedMode::Generic, " xdpgeneric "), ("port0", AttachedMode::Native, " xdp ")]
            {
                let mut program = load();
                assert_eq!(program.attach(interface, Mode::Auto).unwrap(), attached);
                let show = ip(&format!("link show {interface}"));
                assert!(show.contains(shown), "{show}");
                assert!(show.contains(&format!("prog/xdp id {}", program.id().unwrap())), "{show}");
                assert!(matches!(program.attach(interface, Mode::Auto), Err(Error::Attached)));
                drop(program);
                let show = ip(&format!("link show {interface}"));
                assert!(!show.contains("xdp"), "{show}");
            }
        });
    }

    #[test]
    fn a_mode_that_is_asked_for_is_the_mode_or_an_error() {
        in_namespace(|| {
            let mut program = load();
            let refused = program.attach("virbr0", Mode::Native);
            assert!(matches!(refused, Err(Error::Attach { mode: AttachedMode::Native, .. })), "{refused:?}");
            assert_eq!(program.attach("port0", Mode::Generic).unwrap(), AttachedMode::Generic);
            program.detach();
            assert!(!ip("link show port0").contains("xdp"));
            assert_eq!(program.attach("port0", Mode::Native).unwrap(), AttachedMode::Native);
        });
    }

    #[test]
    fn an_occupied_interface_says_by_whom_and_keeps_its_program() {
        in_namespace(|| {
            for (first, second) in [
                (Mode::Native, Mode::Auto),
                (Mode::Native, Mode::Native),
                (Mode::Generic, Mode::Auto),
                (Mode::Native, Mode::Generic),
            ] {
                let mut owner = load();
                owner.attach("port0", first).unwrap();
                let error = load().attach("port0", second).unwrap_err();
                let id = owner.id().unwrap();
                let Error::Occupied { occupant, .. } = &error else { panic!("{first:?} then {second:?}: {error:?}") };
                assert_eq!((occupant.id, occupant.name.as_deref()), (Some(id), Some("fence_xdp")));
                assert_eq!(
                    error.to_string(),
                    format!("interface port0 already has an XDP program: fence_xdp (id {id})")
                );
                assert!(ip("link show port0").contains(&format!("prog/xdp id {id}")));
            }
        });
    }

    #[test]
    fn a_missing_interface_and_a_wrong_object_are_errors_of_their_own() {
        in_namespace(|| {
            let refused = load().attach("nosuch0", Mode::Auto);
            assert!(matches!(refused, Err(Error::NoInterface { .. })), "{refused:?}");
        });
        assert!(matches!(KernelProgram::load(b"not an object", &LISTENER, None), Err(Error::Object(_))));
    }

    fn sendable<T: Send + Sync>(value: T) -> T {
        value
    }

    #[test]
    fn counters_start_at_zero_and_the_ring_has_one_reader() {
        in_namespace(|| {
            let mut program = load();
            assert_eq!(program.counters().unwrap(), Counters::default());
            // On a thread of its own, if the reader likes.
            let mut ring = sendable(program.take_ring().unwrap().unwrap());
            assert!(ring.next().is_none());
            assert!(program.take_ring().unwrap().is_none());
        });
    }
}
