//! Attached in either mode, found occupied, gone with its owner.

use fence_common::verdict::Counters;
use fence_daemon::intake::kernel::{AttachedMode, Error, KernelProgram, Mode};

use crate::bench::{LISTENER, in_namespace, ip, load};

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
            assert_eq!(error.to_string(), format!("interface port0 already has an XDP program: fence_xdp (id {id})"));
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
