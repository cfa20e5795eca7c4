//! What a domain is to this host.

use super::*;
use crate::clock::Moment;

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_waits_long_for_its_restart_may_run_elsewhere() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    pend(&h, "t", 5, Source::Xml(Zeroizing::new("<no domain>".to_owned()))).await;
    let now = Moment::now();
    for target in [name("t"), uuid(5)] {
        assert_eq!(
            status::presence(&h.known, &h.orders.restarts, &target, now).await,
            Presence::Runs,
            "it was killed a moment ago"
        );
        assert_eq!(status::presence(&h.known, &h.orders.restarts, &target, now.plus(FRESH)).await, Presence::Defined);
    }
    assert_eq!(status::presence(&h.known, &h.orders.restarts, &name("nobody"), now).await, Presence::Unknown);
    assert_eq!(status::presence(&h.known, &h.orders.restarts, &name("other"), now.plus(FRESH)).await, Presence::Runs);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_tables_without_a_doubt_say_that_a_domain_is_off() {
    let (h, _file) = node(Node::default().shut_off("off", 1).running("on", 2).shut_off("waits", 3)).await;
    h.filled_within(Duration::from_secs(30)).await;
    assert!(h.known.uris[0].table.is_filled());
    for (target, is_off) in [(name("off"), true), (uuid(1), true), (name("on"), false), (name("nobody"), false)] {
        assert_eq!(h.is_off_by_tables(&target), is_off, "{target}");
    }
    pend(&h, "waits", 3, Source::Xml(Zeroizing::new("<no domain>".to_owned()))).await;
    assert!(!h.is_off_by_tables(&name("waits")), "it comes back");
    let table = &h.known.uris[0].table;
    table.note_leaving(Uuid::from_u128(1), true);
    assert!(!h.is_off_by_tables(&name("off")), "another host may go on with it");
    table.note_leaving(Uuid::from_u128(1), false);
    assert!(h.is_off_by_tables(&name("off")));
    h.known.uris[0].silent.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(!h.is_off_by_tables(&name("off")), "libvirt is silent");
    h.known.uris[0].silent.store(false, std::sync::atomic::Ordering::Relaxed);
    table.begin_generation(libvirt::Told { changes: true, resets: true });
    assert!(!h.is_off_by_tables(&name("off")), "not seen over this connection");
    table.begin_generation(libvirt::Told { changes: false, resets: false });
    assert!(!h.is_off_by_tables(&name("off")), "libvirt tells no events");
    table.forget_for_test();
    assert!(!h.is_off_by_tables(&name("off")), "not all domains were seen yet");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_look_at_all_domains_is_waited_for() {
    let (h, _file) = node(Node::default().running("a", 1)).await;
    let ever = Duration::from_secs(3600);
    assert!(timeout_at(Instant::now() + Duration::from_secs(30), h.filled_within(ever)).await.is_ok());
    let table = Arc::clone(&h.known.uris[0].table);
    table.forget_for_test();
    assert!(timeout_at(Instant::now() + Duration::from_millis(50), h.filled_within(ever)).await.is_err());
    h.filled_within(Duration::from_millis(50)).await;
    assert!(!table.is_filled(), "the wait has an end");
    let waits = tokio::spawn(async move { h.filled_within(ever).await });
    sleep(Duration::from_millis(50)).await;
    table.note_filled();
    assert!(timeout_at(Instant::now() + Duration::from_secs(30), waits).await.is_ok());
}
