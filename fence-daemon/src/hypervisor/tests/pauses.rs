//! The pause between a domain's death and its start again.

use fence_config::PAUSE_MAX_ANSWERED;
use tempfile::tempdir;

use super::inherited::{left_behind_by, none_is_left};
use super::*;
use crate::clock::Moment;

/// Long enough to be seen.
const SHORT: Duration = Duration::from_millis(800);
/// Longer than any test may take.
const LONG: Duration = Duration::from_secs(60);

fn pausing(pause: Duration) -> Options {
    Options { reboot_pause: pause, ..Options::default() }
}

async fn node_with(options: Options, node: Node) -> (Hypervisors, Scratch) {
    let file = node.file();
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.wait_connected().await;
    (h, file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_is_not_started_before_its_pause_is_over() {
    let nodes = Node::default().running("a", 1).domain("t", 2, "<test:transient/>");
    let (h, _file) = node_with(pausing(SHORT), nodes).await;
    for domain in ["a", "t"] {
        let reboot = order(&h, Op::Reboot, name(domain)).await;
        assert_eq!((reboot.reply, &reboot.detail), (Reply::Success, &Detail::Rebooting { was: State(1) }));
        let died = reboot.proven_off.unwrap();
        let waiting = h.restarts().remove(0);
        assert_eq!((waiting.plan.domain.name.as_str(), waiting.not_before), (domain, died.plus(SHORT)));
        // A transient one is known nowhere else meanwhile.
        assert_eq!(h.presence(&name(domain)).await, Presence::Runs, "{domain}");
        assert_eq!(reply(&h, Op::Status, domain).await, Reply::Off, "{domain}");
        until(&h, domain, Reply::Success).await;
        assert!(Moment::now().since(died) >= SHORT, "{domain} was back too soon");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_in_the_pause_ends_with_the_domain_off() {
    let nodes = Node::default().running("a", 1).domain("t", 2, "<test:transient/>");
    let (h, _file) = node_with(pausing(SHORT), nodes).await;
    for domain in ["a", "t"] {
        assert_eq!(reply(&h, Op::Reboot, domain).await, Reply::Success);
        let off = order(&h, Op::Off, name(domain)).await;
        assert_eq!((off.reply, off.detail), (Reply::Success, Detail::RestartCancelled), "{domain}");
        assert!(h.restarts().is_empty());
    }
    sleep(2 * SHORT).await;
    assert_eq!(order(&h, Op::Status, name("a")).await.detail, Detail::ShutOff);
    assert_eq!(order(&h, Op::Status, name("t")).await.detail, Detail::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_on_in_the_pause_starts_the_domain_at_once() {
    let nodes = Node::default().running("a", 1).domain("t", 2, "<test:transient/>");
    let (h, _file) = node_with(pausing(LONG), nodes).await;
    for domain in ["a", "t"] {
        assert_eq!(reply(&h, Op::Reboot, domain).await, Reply::Success);
        assert_eq!(reply(&h, Op::Status, domain).await, Reply::Off);
        let on = order(&h, Op::On, name(domain)).await;
        assert_eq!((on.reply, on.detail), (Reply::Success, Detail::Started(State(1))), "{domain}");
        assert_eq!(reply(&h, Op::Status, domain).await, Reply::Success);
        assert!(h.restarts().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_in_the_pause_is_the_same_reboot() {
    let nodes = Node::default().running("a", 1).domain("t", 2, "<test:transient/>");
    let (h, _file) = node_with(pausing(SHORT), nodes).await;
    for domain in ["a", "t"] {
        let died = order(&h, Op::Reboot, name(domain)).await.proven_off.unwrap();
        let again = order(&h, Op::Reboot, name(domain)).await;
        assert_eq!((again.reply, again.detail), (Reply::Success, Detail::RestartPending), "{domain}");
        let waiting = h.restarts();
        assert_eq!(waiting.len(), 1);
        assert_eq!(waiting[0].not_before, died.plus(SHORT), "the pause does not begin again");
        until(&h, domain, Reply::Success).await;
        assert!(Moment::now().since(died) >= SHORT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reboot_reply_on_answers_after_the_pause() {
    let options = Options { reboot_reply: RebootReply::On, ..pausing(SHORT) };
    let (h, _file) = node_with(options, Node::default().running("a", 1)).await;
    let reboot = order(&h, Op::Reboot, name("a")).await;
    assert_eq!((reboot.reply, &reboot.detail), (Reply::Success, &Detail::Rebooted));
    assert!(Moment::now().since(reboot.proven_off.unwrap()) >= SHORT);
    // The longest pause that the configuration takes with it leaves time for the start.
    assert!(LIMITS.begin.saturating_sub(PAUSE_MAX_ANSWERED) >= Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_daemon_keeps_the_rest_of_the_pause() {
    let now = Moment::now();
    let moments = [
        // What is left of it, all of it, none of it.
        ("rest", 1, Some(now), now.plus(SHORT)),
        ("unknown", 2, None, now.plus(SHORT)),
        ("over", 3, Some(now.before(10 * SHORT)), now),
        ("nonsense", 4, Some(Moment::from_ktime(u64::MAX)), now.plus(SHORT)),
    ];
    for (domain, number, died, not_before) in moments {
        let directory = tempdir().unwrap();
        let file = Node::default().shut_off(domain, number).file();
        let options = left_behind_by(&directory, &file.uri(), &[(domain, number, Some(77), None)], died);
        let h = Hypervisors::with_limits(&[file.uri()], QUICK, Options { reboot_pause: SHORT, ..options });
        until(&h, domain, Reply::Success).await;
        assert!(Moment::now() >= not_before, "{domain} was back too soon");
        none_is_left(&h, &directory).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_died_is_on_record_for_the_next_daemon() {
    for transient in ["", "<test:transient/>"] {
        let directory = tempdir().unwrap();
        let state = directory.path().join("state");
        let running = format!("<test:runstate>1</test:runstate>{transient}");
        let options = Options { state: Some(state.clone()), ..pausing(LONG) };
        let (h, _file) = node_with(options, Node::default().domain("a", 1, &running)).await;
        let died = order(&h, Op::Reboot, name("a")).await.proven_off.unwrap();
        let record = std::fs::read_dir(&state).unwrap().next().unwrap().unwrap().path();
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(record).unwrap()).unwrap();
        assert_eq!(record["died"].as_u64(), Some(died.nanos()), "{transient}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_ends_leaves_what_pauses_to_the_next() {
    let directory = tempdir().unwrap();
    let options = Options { state: Some(directory.path().join("state")), ..pausing(LONG) };
    let (h, _file) = node_with(options, Node::default().running("a", 1)).await;
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success);
    let begun = StdInstant::now();
    h.start_pending(Duration::from_secs(4)).await;
    h.shutdown(Duration::from_secs(4)).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "waited for what the next daemon does");
    assert_eq!(h.restarts().len(), 1, "started before its pause was over");
    assert_eq!(std::fs::read_dir(directory.path().join("state")).unwrap().count(), 1, "its record");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_ends_starts_what_pauses_and_is_on_no_record() {
    let (h, _file) = node_with(pausing(LONG), Node::default().running("a", 1)).await;
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success);
    h.shutdown(Duration::from_millis(300)).await;
    assert!(h.restarts().is_empty(), "nobody would ever start it");
}
