//! What an administrator can choose about reboots.

use super::*;

async fn node_with(options: Options, node: Node) -> (Hypervisors, Scratch) {
    let file = node.file();
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, options);
    h.wait_connected().await;
    (h, file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_can_be_answered_when_the_domain_runs_again() {
    let options = Options { reboot_reply: RebootReply::On, ..Options::default() };
    let nodes = Node::default().running("a", 1).shut_off("b", 2).domain("t", 3, "<test:transient/>");
    let (h, _file) = node_with(options, nodes).await;
    for domain in ["a", "t"] {
        let reboot = order(&h, Op::Reboot, name(domain)).await;
        assert_eq!((reboot.reply, &reboot.detail), (Reply::Success, &Detail::Rebooted), "{domain}");
        assert!(reboot.proven_off.is_some());
        assert_eq!(order(&h, Op::Status, name(domain)).await.detail, Detail::Active(State(1)), "{domain}");
    }
    // A domain that was off stays off, and is answered as ever.
    assert_eq!(order(&h, Op::Reboot, name("b")).await.detail, Detail::AlreadyOff);
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Off);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reboot_that_does_not_come_back_is_a_failure_where_that_was_asked_for() {
    let options = Options { reboot_reply: RebootReply::On, ..Options::default() };
    let (h, _file) = node_with(options, Node::default().running("a", 1)).await;
    // Its definition goes away with it: what is destroyed is gone.
    arrange(&h, |connect| Domain::lookup_by_name(connect, "a").unwrap().undefine().unwrap()).await;
    // The XML that was taken before is good for one start; a domain of that name is in its way.
    let reboot = tokio::spawn({
        let h = h.clone();
        async move { order(&h, Op::Reboot, name("a")).await }
    });
    arrange(&h, |connect| {
        let begun = StdInstant::now();
        while Domain::create_xml(connect, &xml("a", 7, ""), 0).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(2), "the place of `a` was never free");
        }
    })
    .await;
    let reboot = reboot.await.unwrap();
    let (failed, done) = ((Reply::Failure, Detail::NotStartedAgain), (Reply::Success, Detail::Rebooted));
    let what = (reboot.reply, reboot.detail);
    let runs = order(&h, Op::Status, uuid(1)).await.detail == Detail::Active(State(1));
    assert_eq!(what, if runs { done } else { failed });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unconfirmed_reset_is_followed_by_a_kill_and_a_start() {
    let options = Options { reboot_method: RebootMethod::Reset, ..Options::default() };
    let (h, _file) = node_with(options, Node::default().running("a", 1)).await;
    assert_eq!(order(&h, Op::Reboot, name("a")).await.detail, Detail::Rebooting { was: State(1) });
    until(&h, "a", Reply::Success).await;
}
