//! What a domain is to this host, for the other hosts of a cluster.

use super::*;

/// Nobody is there: it never connects.
const SILENT: &str = "qemu+unix:///system?socket=/nonexistent/socket";

fn soon() -> Instant {
    Instant::now() + Duration::from_millis(100)
}

/// In one word.
async fn standing(h: &Hypervisors, target: Target) -> &'static str {
    match h.standing(&target, soon()).await {
        Standing::Runs(_) => "runs",
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
