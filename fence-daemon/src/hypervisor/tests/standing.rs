//! What a domain is to this host, for the other hosts of a cluster.

use super::lost::{Machine, enter};
use super::*;
use crate::hypervisor::process::Driver;

/// Nobody is there: it never connects.
const SILENT: &str = "qemu+unix:///system?socket=/nonexistent/socket";

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(100)
}

/// In one word.
async fn standing(h: &Hypervisors, target: Target) -> &'static str {
    match h.standing(&target, soon()).await {
        Standing::Runs(_) => "runs",
        Standing::Arriving(_) => "arriving",
        Standing::MayBeArriving(_) => "may be arriving",
        Standing::Off(_) => "off",
        Standing::Moved(_) => "moved",
        Standing::Unknown => "unknown",
        Standing::Unclear(_) => "unclear",
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_to_come_back_counts_as_running() {
    let (h, _file) = node(Node::default().running("on", 1).shut_off("off", 2)).await;
    for (target, expected) in
        [(name("on"), "runs"), (uuid(2), "off"), (name("nobody"), "unknown"), (uuid(9), "unknown")]
    {
        assert_eq!(standing(&h, target.clone()).await, expected, "{target}");
    }
    // libvirt does not know it: only the restart does.
    assert_eq!(standing(&h, name("waits")).await, "unknown");
    pend(&h, "waits", 3, Source::Xml(Zeroizing::new("<no domain>".to_owned()))).await;
    assert_eq!(standing(&h, name("waits")).await, "runs");
    assert_eq!(standing(&h, uuid(3)).await, "runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_tells_while_libvirt_is_silent_or_the_domain_is_on_its_way() {
    let here = Node::default().running("on", 1).shut_off("off", 2).file();
    let h = Hypervisors::with_limits(&[here.uri(), SILENT.to_owned()], QUICK, Options::default());
    while !h.any_connected() {
        sleep(Duration::from_millis(5)).await;
    }
    h.filled_within(Duration::from_secs(30)).await;
    assert_eq!(standing(&h, name("nobody")).await, "unclear", "the silent URI may have it");
    assert_eq!(standing(&h, name("on")).await, "runs");
    h.known.uris[0].table.note_leaving(Uuid::from_u128(1), true);
    assert_eq!(standing(&h, name("on")).await, "unclear", "another host may go on with it");
    h.known.uris[0].table.note_leaving(Uuid::from_u128(1), false);
    assert_eq!(standing(&h, name("on")).await, "runs");
}

/// A process lives, libvirt's record of it cannot be read, and libvirt does not say either.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_active_may_be_arriving_if_nobody_says_that_it_is_not() {
    let _none = ORPHANS.lock().await;
    let machine = Machine::start("unrecorded");
    let target = || Target::Uuid(machine.uuid);
    let h = Hypervisors::with_limits(&["qemu:///system".to_owned()], QUICK, Options::default());
    h.first_round().await;
    assert_eq!(standing(&h, target()).await, "may be arriving", "a process that libvirt does not know");
    enter(&h, 0, ("unrecorded", machine.uuid.as_u128()), Driver::Qemu, Some(&machine));
    assert_eq!(standing(&h, target()).await, "may be arriving", "a process of its table");
    // Containers do not migrate.
    let h = Hypervisors::with_limits(&["lxc:///".to_owned()], QUICK, Options::default());
    h.first_round().await;
    enter(&h, 0, ("unrecorded", machine.uuid.as_u128()), Driver::Lxc, Some(&machine));
    assert_eq!(standing(&h, target()).await, "runs");
}

/// As a machine that ran on by post-copy on another host when its process here died.
#[tokio::test(flavor = "multi_thread")]
async fn what_ended_here_on_its_way_has_moved_if_nothing_of_it_is_left() {
    let (h, _file) = node(Node::default().shut_off("gone", 1).running("here", 2)).await;
    h.filled_within(Duration::from_secs(30)).await;
    assert_eq!(standing(&h, name("gone")).await, "off");
    for number in [1, 2] {
        h.known.uris[0].table.note_leaving(Uuid::from_u128(number), true);
    }
    assert_eq!(standing(&h, name("gone")).await, "moved");
    assert_eq!(standing(&h, name("here")).await, "unclear", "it has not ended here");
    // For a host alone nothing has changed.
    assert_eq!(order(&h, Op::Status, name("gone")).await.reply, Reply::Failure);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_started_elsewhere_has_no_definition_by_the_word_of_all() {
    let here = Node::default().shut_off("off", 1).file();
    let h = connect(&[here.uri()]).await;
    assert!(h.is_defined(Uuid::from_u128(1)).await);
    assert!(!h.is_defined(Uuid::from_u128(9)).await);
    let h = Hypervisors::with_limits(&[here.uri(), SILENT.to_owned()], QUICK, Options::default());
    while !h.any_connected() {
        sleep(Duration::from_millis(5)).await;
    }
    assert!(h.is_defined(Uuid::from_u128(9)).await, "the silent URI may have it");
}

#[tokio::test(flavor = "multi_thread")]
async fn appearances_grow_with_each_start_and_never_fall() {
    let (h, _file) = node(Node::default().running("a", 1).running("b", 2)).await;
    h.filled_within(Duration::from_secs(30)).await;
    let before = [h.appearances(&name("a")), h.appearances(&name("b"))];
    assert_eq!(order(&h, Op::Off, name("a")).await.reply, Reply::Success);
    assert_eq!(order(&h, Op::On, name("a")).await.reply, Reply::Success);
    let begun = StdInstant::now();
    while h.appearances(&name("a")) == before[0] {
        assert!(begun.elapsed() < Duration::from_secs(30), "a start is not counted");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(h.appearances(&name("b")), before[1], "another domain");
    assert_eq!(h.appearances(&uuid(2)), before[1]);
}
