//! Restarts that a daemon has left behind when it died.

use tempfile::{TempDir, tempdir};

use super::*;
use crate::clock::Moment;
use crate::hypervisor::fence::{Record, Records};

/// Name, UUID, number of the instance, XML.
type RecordParts<'l> = (&'l str, u128, Option<u32>, Option<&'l str>);

/// What a daemon leaves that dies after it has written down to restart these.
fn left_behind(directory: &TempDir, uri: &str, restarts: &[RecordParts<'_>]) -> Options {
    left_behind_by(directory, uri, restarts, None)
}

/// The same of a daemon that has written down when they died.
pub(super) fn left_behind_by(
    directory: &TempDir,
    uri: &str,
    restarts: &[RecordParts<'_>],
    died: Option<Moment>,
) -> Options {
    let state = Some(directory.path().join("state"));
    let records = Records::new(state.clone());
    for (name, uuid, instance, xml) in restarts {
        records.write(&Record::new(uri, Uuid::from_u128(*uuid), name, *instance, *xml).of_dead(died)).unwrap();
    }
    Options { state, ..Options::default() }
}

fn files(directory: &TempDir) -> usize {
    std::fs::read_dir(directory.path().join("state")).map_or(0, Iterator::count)
}

pub(super) async fn none_is_left(h: &Hypervisors, directory: &TempDir) {
    let begun = StdInstant::now();
    while !h.orders.restarts.all().is_empty() || files(directory) > 0 {
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", h.orders.restarts.all().len());
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_daemon_starts_a_killed_domain() {
    let directory = tempdir().unwrap();
    let file = Node::default().shut_off("a", 1).running("other", 9).file();
    let transient = xml("t", 2, "");
    let restarts = [("a", 1, Some(77), None), ("t", 2, Some(78), Some(transient.as_str()))];
    let options = left_behind(&directory, &file.uri(), &restarts);
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    until(&h, "a", Reply::Success).await;
    until(&h, "t", Reply::Success).await;
    none_is_left(&h, &directory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_domain_that_was_not_proven_dead_is_not_brought_back() {
    let directory = tempdir().unwrap();
    let file = Node::default().running("other", 9).file();
    let state = Some(directory.path().join("state"));
    let transient = xml("t", 2, "");
    let record = Record::new(&file.uri(), Uuid::from_u128(2), "t", Some(78), Some(&transient));
    Records::new(state.clone()).write(&record).unwrap();
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, Options { state, ..Options::default() });
    none_is_left(&h, &directory).await;
    h.wait_connected().await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(order(&h, Op::Status, name("t")).await.detail, Detail::Unknown, "it may have moved to another host");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_was_not_killed_is_left_alone() {
    let directory = tempdir().unwrap();
    let file = Node::default().running("a", 1).file();
    // The test driver numbers its instances from 1 on.
    let options = left_behind(&directory, &file.uri(), &[("a", 1, Some(1), None)]);
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    none_is_left(&h, &directory).await;
    assert_eq!(order(&h, Op::Status, name("a")).await.detail, Detail::Active(State(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_ends_what_another_daemon_has_begun() {
    let directory = tempdir().unwrap();
    let file = Scratch::new("xml");
    let options = left_behind(&directory, &file.uri(), &[("a", 1, Some(77), None)]);
    // libvirt is not there yet: nothing can be started.
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.first_round().await;
    assert_eq!(h.orders.restarts.all().len(), 1);
    let off = order(&h, Op::Off, name("a")).await;
    assert_eq!(off.reply, Reply::Failure, "nobody can say that it is off: {}", off.detail);
    none_is_left(&h, &directory).await;
    Node::default().shut_off("a", 1).write(&file);
    h.wait_connected().await;
    sleep(Duration::from_millis(300)).await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Off);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_that_is_done_leaves_nothing() {
    let directory = tempdir().unwrap();
    let file = Node::default().running("a", 1).file();
    let options = left_behind(&directory, &file.uri(), &[]);
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.wait_connected().await;
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success);
    until(&h, "a", Reply::Success).await;
    none_is_left(&h, &directory).await;
    assert_eq!(reply(&h, Op::Off, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success, "off already");
    assert_eq!(files(&directory), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_of_a_uri_that_is_gone_is_reported_and_removed() {
    let directory = tempdir().unwrap();
    let file = Node::default().shut_off("a", 1).file();
    let options = left_behind(&directory, "qemu:///system", &[("a", 1, Some(1), None)]);
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    none_is_left(&h, &directory).await;
    h.wait_connected().await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Off);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_that_never_had_its_turn_keeps_a_stuck_reboot_from_starting_the_domain() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    for unwanted in [name("t"), uuid(5)] {
        let asked = Instant::now();
        let since = h.orders.restarts.forbid(&unwanted);
        pend_since(&h, "t", 5, Source::Definition, asked).await;
        assert!(h.orders.restarts.all().is_empty(), "{unwanted}");
        h.orders.restarts.permit(&unwanted, since);
    }
    // An off that is done forbids nothing any more.
    assert_eq!(order(&h, Op::Off, name("t")).await.reply, Reply::Failure);
    pend(&h, "t", 5, Source::Definition).await;
    assert_eq!(h.orders.restarts.all().len(), 1);
}

/// Killed so long ago that somebody may have started it elsewhere by hand.
fn long_ago() -> Moment {
    Moment::now().before(Duration::from_secs(180))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_killed_long_ago_is_reported_and_not_started() {
    let directory = tempdir().unwrap();
    let file = Node::default().shut_off("a", 1).running("other", 9).file();
    let transient = xml("t", 2, "");
    let restarts = [("a", 1, Some(77), None), ("t", 2, Some(78), Some(transient.as_str()))];
    let options = left_behind_by(&directory, &file.uri(), &restarts, Some(long_ago()));
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.wait_connected().await;
    for domain in ["a", "t"] {
        assert_eq!(h.presence(&name(domain)).await, Presence::Defined, "{domain} may run elsewhere");
    }
    sleep(Duration::from_millis(500)).await;
    for domain in ["a", "t"] {
        assert_eq!(reply(&h, Op::Status, domain).await, Reply::Off, "{domain} was started blindly");
    }
    let told = h.restarts();
    assert!(told.len() == 2 && told.iter().all(|told| told.plan.held && told.plan.inherited), "{}", told.len());
    assert!(Moment::now().since(told[0].since) >= Duration::from_secs(180), "it waits since its death");
    assert_eq!(files(&directory), 2, "what the log says must outlive this daemon as well");
    // Somebody says what is to be done.
    assert_eq!(order(&h, Op::On, name("t")).await.detail, Detail::Started(State(1)));
    assert_eq!(order(&h, Op::Off, name("a")).await.detail, Detail::RestartCancelled);
    none_is_left(&h, &directory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_started_domain_is_no_longer_reported() {
    let directory = tempdir().unwrap();
    let file = Node::default().shut_off("a", 1).file();
    let options = left_behind_by(&directory, &file.uri(), &[("a", 1, Some(77), None)], Some(long_ago()));
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.wait_connected().await;
    arrange(&h, |connect| assert!(Domain::lookup_by_name(connect, "a").unwrap().create().is_ok())).await;
    none_is_left(&h, &directory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_started_at_another_uri_is_not_started_again() {
    let directory = tempdir().unwrap();
    let here = Node::default().shut_off("a", 1).file();
    let there = Node::default().running("a", 1).file();
    let options = left_behind_by(&directory, &here.uri(), &[("a", 1, Some(77), None)], Some(Moment::now()));
    let h = Hypervisors::with_limits(&[here.uri(), there.uri()], QUICK, options);
    none_is_left(&h, &directory).await;
    let states: Vec<_> = h.list().await.domains.iter().map(|listed| listed.state).collect();
    assert_eq!(states, [5, 1], "a second copy was started");
}

#[test]
fn a_stop_logs_who_starts_the_domain() {
    let now = Moment::now();
    let died = Some(now.before(Duration::from_secs(20)));
    let told = |kept, died| farewell(kept, died, Duration::ZERO, now);
    let next = told(true, died);
    assert!(next.contains("the next daemon") && next.contains("40 s") && next.contains("not by hand"), "{next}");
    for late in [told(true, Some(long_ago())), told(false, died)] {
        assert!(late.contains("by hand") && !late.contains("not by hand"), "{late}");
    }
}
