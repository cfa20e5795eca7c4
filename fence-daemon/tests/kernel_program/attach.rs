//! Attached in either mode, found occupied, gone with its owner.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use fence_common::verdict::Counters;
use fence_daemon::intake::kernel::{AttachedMode, Error, KernelProgram, Mode};

use nix::libc;

use crate::bench::{LISTENER, in_namespace, ip, load};

/// The number of an interface.
fn number_of(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).unwrap()
}

/// Whether this kernel has tcx: since Linux 6.6.
fn has_tcx() -> bool {
    let release = nix::sys::utsname::uname().unwrap();
    let mut numbers = release.release().to_str().unwrap().split('.').map_while(|number| number.parse::<u32>().ok());
    (numbers.next().unwrap(), numbers.next().unwrap_or(0)) >= (6, 6)
}

/// The numbers of the tc programs on an interface, in their order.
pub(crate) fn tcx_on(interface: &str) -> Vec<u32> {
    if !has_tcx() {
        return Vec::new();
    }
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).unwrap();
    programs.iter().map(aya::programs::ProgramInfo::id).collect()
}

/// What is closed here is open a moment longer in what another test is just starting, until that is
/// a program of its own.
fn soon(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never: {what}");
}

#[test]
fn auto_is_xdp_on_a_bridge_and_tcx_where_a_driver_is_only_software() {
    in_namespace(|| {
        // Where there is no tcx (`cargo xtask test kernels` has such a kernel) all is XDP.
        let on_port = if has_tcx() { AttachedMode::Tcx } else { AttachedMode::Generic };
        for (interface, best) in [("virbr0", AttachedMode::Generic), ("port0", on_port)] {
            let is_xdp = best == AttachedMode::Generic;
            for mode in [Mode::Auto, Mode::Gentle] {
                let mut program = load();
                for _ in 0..2 {
                    let attached = program.attach(interface, mode).unwrap();
                    assert_eq!(attached.mode, best);
                    assert!(attached.second_best.is_none(), "{attached:?}");
                }
                let tcx: Vec<_> = program.id(AttachedMode::Tcx).filter(|_| !is_xdp).into_iter().collect();
                assert_eq!(tcx_on(interface), tcx);
                assert_eq!(program.id(AttachedMode::Generic).is_some(), is_xdp, "what is not attached is not loaded");
                assert_eq!(ip(&format!("link show {interface}")).contains("xdpgeneric"), is_xdp);
                drop(program);
                soon("detached", || {
                    tcx_on(interface).is_empty() && !ip(&format!("link show {interface}")).contains("xdp")
                });
            }
            let asked = load().attach(interface, Mode::Tcx).map(|attached| attached.mode);
            assert_eq!(asked.ok(), has_tcx().then_some(AttachedMode::Tcx));
        }
    });
}

/// Whether this kernel has VLANs.
fn has_vlans() -> bool {
    let made = std::process::Command::new("ip").args("link add vlan0 link virbr0 type vlan id 5".split(' ')).output();
    let made = made.unwrap().status.success();
    if made {
        ip("link del vlan0");
    } else {
        // Not silently: `cargo xtask test kernels` has kernels with VLANs.
        eprintln!("this kernel has no VLANs (CONFIG_VLAN_8021Q)");
    }
    made
}

/// XDP cannot see a VLAN's tag on a bridge, and tc can.
#[test]
fn auto_is_tcx_on_a_bridge_while_there_are_vlans() {
    in_namespace(|| {
        if !has_vlans() {
            return;
        }
        let mut program = load();
        let mut attach = |mode: Mode| program.attach("virbr0", mode).map(|there| (there.mode, there.second_best));
        let on = |kind: &str| tcx_on("virbr0").len() == usize::from(kind == "tcx");
        for (come, go, why) in [
            (
                "link set virbr0 type bridge vlan_filtering 1",
                "link set virbr0 type bridge vlan_filtering 0",
                "filtering",
            ),
            ("link add vlan0 link virbr0 type vlan id 5", "link del vlan0", "vlan0 is on top"),
        ] {
            assert!(matches!(attach(Mode::Auto), Ok((AttachedMode::Generic, None))));
            ip(come);
            let with = attach(Mode::Auto);
            if has_tcx() {
                assert!(
                    matches!(&with, Ok((AttachedMode::Tcx, Some(reason))) if reason.to_string().contains(why)),
                    "{with:?}"
                );
                assert!(on("tcx") && !ip("link show virbr0").contains("xdp"));
            } else if why == "filtering" {
                assert!(matches!(&with, Ok((AttachedMode::Generic, Some(Error::Vlans { .. })))), "{with:?}");
            } else {
                // XDP would take what the VLAN's device should get.
                assert!(matches!(&with, Err(Error::Vlans { .. })), "{with:?}");
                assert!(!ip("link show virbr0").contains("xdp"));
            }
            ip(go);
            assert!(matches!(attach(Mode::Auto), Ok((AttachedMode::Generic, None))));
            assert!(on("xdp"));
        }
        // What is asked for explicitly.
        let explicit = |mode| load().attach("guest0", mode).map(|there| there.mode);
        ip("link add vlan0 link guest0 type vlan id 5");
        assert!(matches!(explicit(Mode::Generic), Err(Error::Vlans { .. })));
        assert_eq!(explicit(Mode::Tcx).ok(), has_tcx().then_some(AttachedMode::Tcx));
    });
}

/// The daemon does so at its start, and has no right to load another one later.
#[test]
fn forms_that_are_loaded_in_advance_are_all_that_is_attached() {
    in_namespace(|| {
        let mut program = load();
        program.load_forms(Mode::Gentle).unwrap();
        assert!(program.id(AttachedMode::Generic).is_some());
        assert_eq!(program.id(AttachedMode::Tcx).is_some(), has_tcx());
        assert_eq!(program.attach("virbr0", Mode::Gentle).unwrap().mode, AttachedMode::Generic);
        let by_tcx = program.attach_in("port0", &[AttachedMode::Tcx]);
        assert_eq!(by_tcx.is_ok(), has_tcx(), "{by_tcx:?}");
        assert!(program.reader().is_ok() && program.senders().is_ok() && program.rejected().is_ok());

        let mut only_xdp = load();
        only_xdp.load_forms(Mode::Generic).unwrap();
        let refused = only_xdp.attach("port0", Mode::Tcx);
        assert!(matches!(refused, Err(Error::Missing(_))), "{refused:?}");
    });
}

#[test]
fn a_mode_that_is_asked_for_is_the_mode_or_an_error() {
    in_namespace(|| {
        let mut program = load();
        let refused = program.attach("virbr0", Mode::Native);
        assert!(matches!(refused, Err(Error::Attach { mode: AttachedMode::Native, .. })), "{refused:?}");
        for (interface, mode, attached, shown) in [
            ("virbr0", Mode::Generic, AttachedMode::Generic, " xdpgeneric "),
            ("port0", Mode::Generic, AttachedMode::Generic, " xdpgeneric "),
            ("port0", Mode::Native, AttachedMode::Native, " xdp "),
        ] {
            assert_eq!(program.attach(interface, mode).unwrap().mode, attached);
            let show = ip(&format!("link show {interface}"));
            assert!(show.contains(shown), "{show}");
            assert!(show.contains(&format!("prog/xdp id {}", program.id(attached).unwrap())), "{show}");
            assert_eq!(tcx_on(interface), [0; 0]);
            program.detach(number_of(interface));
            soon("detached", || !ip(&format!("link show {interface}")).contains("xdp"));
        }
    });
}

/// One program on several interfaces, in several ways, with one ring buffer and one set of
/// counters.
#[test]
fn several_interfaces_have_a_link_each() {
    in_namespace(|| {
        let mut program = load();
        program.attach("virbr0", Mode::Generic).unwrap();
        program.attach("port0", Mode::Tcx).unwrap();
        program.attach("guest0", Mode::Native).unwrap();
        let all = ["virbr0", "port0", "guest0"].map(number_of);
        assert_eq!(all.map(|number| program.is_attached_to(number)), [true; 3]);
        program.detach(all[1]);
        assert_eq!(all.map(|number| program.is_attached_to(number)), [true, false, true]);
        soon("detached", || tcx_on("port0").is_empty());
        ip("link del virbr0");
        assert_eq!(all.map(|number| program.is_attached_to(number)), [false, false, true]);
        drop(program);
        soon("detached", || !ip("link show guest0").contains("xdp"));
    });
}

/// The ring buffer's owner may be gone, and its descriptor's number may be another file's.
#[test]
fn a_form_that_is_loaded_late_finds_its_maps() {
    in_namespace(|| {
        let mut program = load();
        drop(program.take_ring().unwrap().unwrap());
        let _others: Vec<_> = (0..20).map(|_| std::fs::File::open("/dev/null").unwrap()).collect();
        for mode in [Mode::Tcx, Mode::Generic] {
            program.attach("virbr0", mode).unwrap();
            program.detach(number_of("virbr0"));
        }
    });
}

/// The maps stay, and with them what was counted; the interface that comes may have the number of
/// the one that went.
#[test]
fn where_its_interface_was_deleted_it_can_be_attached_to_the_next() {
    in_namespace(|| {
        for (mode, way) in [(Mode::Tcx, AttachedMode::Tcx), (Mode::Generic, AttachedMode::Generic)] {
            let mut program = load();
            let number = number_of("virbr0");
            assert!(!program.is_attached_to(number));
            for _ in 0..3 {
                assert_eq!(program.attach("virbr0", mode).unwrap().mode, way);
                assert!(program.is_attached_to(number));
                ip("link del virbr0");
                assert!(!program.is_attached_to(number), "it is gone");
                ip(&format!("link add virbr0 index {number} type bridge"));
                assert!(!program.is_attached_to(number), "it is another one");
                program.detach(number);
            }
            program.attach("virbr0", mode).unwrap();
            assert!(program.is_attached_to(number));
        }
    });
}

#[test]
fn an_occupied_interface_says_by_whom_and_keeps_its_program() {
    in_namespace(|| {
        for (first, second) in
            [(Mode::Native, Mode::Native), (Mode::Generic, Mode::Native), (Mode::Native, Mode::Generic)]
        {
            let mut owner = load();
            let way = owner.attach("port0", first).unwrap().mode;
            let error = load().attach("port0", second).unwrap_err();
            let id = owner.id(way);
            let Error::Occupied { occupant, .. } = &error else { panic!("{first:?} then {second:?}: {error:?}") };
            let name = if way == AttachedMode::Native { "fence_xdp_frags" } else { "fence_xdp" };
            assert_eq!((occupant.id, occupant.name.as_deref()), (id, Some(name)));
            let id = id.unwrap();
            assert_eq!(error.to_string(), format!("interface port0 already has an XDP program: {name} (id {id})"));
            assert!(ip("link show port0").contains(&format!("prog/xdp id {id}")));
        }
    });
}

/// Two tc programs can be on one interface; ours is before the other, as XDP is before both.
#[test]
fn on_a_bridge_with_another_xdp_program_ours_is_the_first_tc_program_until_that_goes() {
    in_namespace(|| {
        let mut other = load();
        other.attach("virbr0", Mode::Tcx).unwrap();
        let mut xdp = load();
        xdp.attach("virbr0", Mode::Generic).unwrap();
        let mut ours = load();
        for _ in 0..2 {
            let attached = ours.attach("virbr0", Mode::Auto).unwrap();
            assert_eq!(attached.mode, AttachedMode::Tcx);
            assert!(matches!(attached.second_best, Some(Error::Occupied { .. })), "{attached:?}");
        }
        let id = |program: &KernelProgram| program.id(AttachedMode::Tcx).unwrap();
        assert_eq!(tcx_on("virbr0"), [id(&ours), id(&other)]);
        drop(xdp);
        soon("XDP", || ours.attach("virbr0", Mode::Auto).unwrap().mode == AttachedMode::Generic);
        assert_eq!(tcx_on("virbr0"), [id(&other)]);
    });
}

/// On a network card, which prefers its own driver; here a veth device is one.
#[test]
fn an_occupied_interface_gets_the_second_best_way_meanwhile() {
    const WAYS: &[AttachedMode] = &[AttachedMode::Native, AttachedMode::Tcx, AttachedMode::Generic];
    in_namespace(|| {
        for occupied in [Mode::Native, Mode::Generic] {
            let mut other = load();
            let way = other.attach("port0", occupied).unwrap().mode;
            let mut ours = load();
            for _ in 0..2 {
                let attached = ours.attach_in("port0", WAYS).unwrap();
                assert_eq!(attached.mode, AttachedMode::Tcx);
                let Some(Error::Occupied { occupant, .. }) = attached.second_best else { panic!("{attached:?}") };
                assert_eq!(occupant.id, other.id(way));
                assert_eq!(tcx_on("port0").len(), 1);
            }
            drop(other);
            soon("in the best way", || {
                let attached = ours.attach_in("port0", WAYS).unwrap();
                assert_eq!(attached.mode == AttachedMode::Native, attached.second_best.is_none());
                attached.mode == AttachedMode::Native
            });
            soon("no more in the other", || tcx_on("port0").is_empty());
            assert!(ours.is_attached_to(number_of("port0")));
            assert_eq!(ours.attach_in("port0", WAYS).unwrap().mode, AttachedMode::Native);
        }
    });
}

/// What a driver runs before there is a packet must not keep large frames from the interface.
#[test]
fn large_frames_stay_possible_where_the_driver_runs_it() {
    in_namespace(|| {
        let mtu = |mtu: u32| {
            let set =
                std::process::Command::new("ip").args(["link", "set", "guest0", "mtu", &mtu.to_string()]).output();
            set.unwrap().status.success()
        };
        let mut program = load();
        assert_eq!(program.attach("port0", Mode::Native).unwrap().mode, AttachedMode::Native);
        assert_eq!((mtu(9000), mtu(1500)), (true, true));
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

/// Routes multicast from an interface, for as long as the socket is open.
pub(crate) fn route_multicast(interface: &str) -> OwnedFd {
    // From <linux/mroute.h>.
    const MRT_INIT: i32 = 200;
    const MRT_ADD_VIF: i32 = 202;
    const VIFF_USE_IFINDEX: u8 = 8;
    #[repr(C)]
    struct Vifctl {
        vif: u16,
        flags: u8,
        threshold: u8,
        rate_limit: u32,
        ifindex: i32,
        remote: u32,
    }
    let check = |result: i32| if result < 0 { panic!("{}", std::io::Error::last_os_error()) } else { result };
    // SAFETY: there is no safe way to a raw IGMP socket here. No pointer is passed; the result is
    // checked.
    let fd = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_IGMP) });
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let on: i32 = 1;
    // SAFETY: the kernel reads the four bytes of a live value.
    check(unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, MRT_INIT, (&raw const on).cast(), 4) });
    let ifindex = i32::try_from(nix::net::if_::if_nametoindex(interface).unwrap()).unwrap();
    let vif = Vifctl { vif: 0, flags: VIFF_USE_IFINDEX, threshold: 1, rate_limit: 0, ifindex, remote: 0 };
    let len = u32::try_from(size_of_val(&vif)).unwrap();
    // SAFETY: the kernel reads `len` bytes of a live value without padding.
    check(unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, MRT_ADD_VIF, (&raw const vif).cast(), len) });
    socket
}

#[test]
fn a_shared_interface_gets_no_program() {
    in_namespace(|| {
        let refused = |interface: &str| match load().attach(interface, Mode::Auto) {
            Err(Error::Shared { sharer, .. }) => sharer.to_string(),
            other => panic!("{interface}: {other:?}"),
        };
        ip("link set port0 master virbr0");
        assert_eq!(refused("port0"), "virbr0, of which it is a port");
        ip("link add top0 link virbr0 type macvlan");
        assert_eq!(refused("virbr0"), "top0, a device on top of it");
        ip("link del top0");
        let router = route_multicast("virbr0");
        assert_eq!(refused("virbr0"), "other networks, to which this host routes multicast");
        drop(router);
        assert_eq!(load().attach("virbr0", Mode::Auto).unwrap().mode, AttachedMode::Generic);
    });
}

#[test]
fn among_many_interfaces_the_one_on_top_is_found() {
    in_namespace(|| {
        // More than the kernel describes in one datagram.
        for number in 0..60 {
            ip(&format!("link add other{number} type bridge"));
        }
        ip("link add top0 link virbr0 type macvlan");
        let refused = load().attach("virbr0", Mode::Auto);
        assert!(matches!(refused, Err(Error::Shared { .. })), "{refused:?}");
        ip("link del top0");
        assert_eq!(load().attach("virbr0", Mode::Auto).unwrap().mode, AttachedMode::Generic);
    });
}

#[test]
fn a_device_whose_lower_one_is_in_another_namespace_shares_nothing() {
    in_namespace(|| {
        let number = nix::net::if_::if_nametoindex("virbr0").unwrap();
        let here = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
        // Its lower one has the number of ours, there. The device lives as long as that namespace.
        let elsewhere = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ip(&format!("link add below0 index {number} type bridge"));
            ip("link add top0 link below0 type macvlan");
            ip(&format!("link set top0 netns {here}"));
            std::fs::File::open("/proc/thread-self/ns/net").unwrap()
        });
        let elsewhere = elsewhere.join().unwrap();
        let show = ip("link show top0");
        assert!(show.contains(&format!("top0@if{number}:")), "{show}");
        assert_eq!(load().attach("virbr0", Mode::Auto).unwrap().mode, AttachedMode::Generic);
        drop(elsewhere);
    });
}
