//! Restarts that are still to be done: what ends them, what keeps them, and what the log says of
//! them.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_pending_restart_is_cancelled_by_off_and_kept_by_reboot() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    let broken = || Source::Xml(Zeroizing::new("<no domain>".to_owned()));
    for by in [name("t"), uuid(5)] {
        pend(&h, "t", 5, broken()).await;
        assert_eq!(h.orders.restarts.all().len(), 1);
        let again = order(&h, Op::Reboot, by.clone()).await;
        assert_eq!((again.reply, again.detail), (Reply::Success, Detail::RestartPending));
        assert_eq!(h.orders.restarts.all().len(), 1);
        let off = order(&h, Op::Off, by).await;
        assert_eq!((off.reply, off.detail), (Reply::Success, Detail::RestartCancelled));
        assert!(off.proven_off.is_some());
        assert!(h.orders.restarts.all().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_is_tried_again_unless_its_definition_is_gone() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    // Its definition comes back after a while, as when storage was away.
    pend(&h, "late", 5, Source::Definition).await;
    arrange(&h, |connect| drop(Domain::define_xml(connect, &xml("late", 5, "")).unwrap())).await;
    until(&h, "late", Reply::Success).await;
    // That it runs is seen a moment before its start has returned.
    h.orders.restarts.over(0, Uuid::from_u128(5), Instant::now() + Duration::from_secs(10)).await;
    assert!(h.orders.restarts.all().is_empty());

    // And one that cannot come back is given up, not tried for ever.
    let begun = StdInstant::now();
    pend(&h, "never", 6, Source::Definition).await;
    while !h.orders.restarts.all().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(4), "tried for ever");
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failing_restart_is_reported_until_the_domain_runs() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    pend(&h, "t", 5, Source::Nothing(CallError::Overdue)).await;
    let told = h.restarts().remove(0);
    assert!(told.plan.held && told.reason.as_ref().is_some_and(|why| why.contains("XML")), "{:?}", told.reason);
    assert_eq!(h.presence(&name("t")).await, Presence::Defined);
    arrange(&h, |connect| drop(Domain::create_xml(connect, &xml("t", 5, ""), 0).unwrap())).await;
    let begun = StdInstant::now();
    while !h.restarts().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10), "{}", h.restarts().len());
        sleep(Duration::from_millis(20)).await;
    }
    // And an off ends it.
    pend(&h, "u", 6, Source::Nothing(CallError::Overdue)).await;
    assert_eq!(order(&h, Op::Off, name("u")).await.detail, Detail::RestartCancelled);
    assert!(h.restarts().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_that_may_succeed_one_day_is_kept_and_told() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    // The name is taken.
    arrange(&h, |connect| drop(Domain::create_xml(connect, &xml("t", 6, ""), 0).unwrap())).await;
    pend(&h, "t", 5, Source::Xml(Zeroizing::new(xml("t", 5, "")))).await;
    sleep(Duration::from_secs(8)).await;
    let told = h.restarts().pop().expect("the restart has vanished");
    assert!(told.attempts > 3 && told.reason.is_some(), "{:?}", told.reason);
    assert_eq!(reply(&h, Op::Status, "t").await, Reply::Success, "that is the other one");
    arrange(&h, |connect| Domain::lookup_by_uuid(connect, Uuid::from_u128(6)).unwrap().destroy().unwrap()).await;
    h.orders.restarts.over(0, Uuid::from_u128(5), Instant::now() + Duration::from_secs(10)).await;
    assert_eq!(order(&h, Op::Status, uuid(5)).await.detail, Detail::Active(State(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_takes_over_a_pending_restart_with_its_xml() {
    let (h, _file) = node(Node::default().running("other", 9)).await;
    pend(&h, "t", 5, Source::Definition).await;
    assert_eq!(order(&h, Op::On, name("t")).await.reply, Reply::Failure);
    assert_eq!(h.orders.restarts.all().len(), 1, "a failed on must not lose the restart");
    h.orders.restarts.cancel(0, Uuid::from_u128(5));

    // A start that failed once for a reason that has gone: the name was taken.
    arrange(&h, |connect| drop(Domain::create_xml(connect, &xml("t", 6, ""), 0).unwrap())).await;
    pend(&h, "t", 5, Source::Xml(Zeroizing::new(xml("t", 5, "")))).await;
    assert_eq!(h.orders.restarts.all().len(), 1);
    assert_eq!(order(&h, Op::Off, uuid(6)).await.reply, Reply::Success);
    assert_eq!(order(&h, Op::On, uuid(5)).await.detail, Detail::Started(State(1)));
    assert!(h.orders.restarts.all().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_that_never_had_its_turn_forbids_no_later_reboot() {
    let (h, _file) = node(Node::default().running("a", 1)).await;
    let held = h.orders.locks.uuid(Uuid::from_u128(1)).await;
    assert_eq!(order(&h, Op::Off, name("a")).await.detail, Detail::Occupied);
    drop(held);
    let reboot = order(&h, Op::Reboot, uuid(1)).await;
    assert_eq!(reboot.detail, Detail::Rebooting { was: State(1) });
    until(&h, "a", Reply::Success).await;
}
