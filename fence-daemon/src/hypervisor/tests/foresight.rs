//! What was asked while the client was examined.

use super::*;
use crate::hypervisor::fence::Foresight;

async fn with(h: &Hypervisors, op: Op, foresight: Option<Foresight>) -> Outcome {
    let deadline = Deadline::at(Instant::now() + Duration::from_secs(60));
    h.carry_out_foreseen(&Authorized::dangerous_for_test(op, name("vm")), None, foresight, &deadline).await
}

async fn off() -> (Hypervisors, Scratch) {
    let (h, file) = node(Node::default().shut_off("vm", 1).running("on", 2)).await;
    h.filled_within(Duration::from_secs(30)).await;
    (h, file)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_off_is_foreseen_and_others_are_not() {
    let (h, _file) = off().await;
    assert!(h.foresee(&name("on")).is_none() && h.foresee(&name("nobody")).is_none());
    for (op, reply, detail) in
        [(Op::Status, Reply::Off, Detail::ShutOff), (Op::Off, Reply::Success, Detail::AlreadyOff)]
    {
        let foresight = h.foresee(&name("vm"));
        assert!(foresight.is_some());
        let outcome = with(&h, op, foresight).await;
        assert_eq!((outcome.reply, outcome.detail), (reply, detail));
        assert_eq!(outcome.domain.map(|domain| domain.name), Some("vm".to_owned()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_foreseen_is_no_word_about_a_domain_that_has_been_started() {
    let (h, _file) = off().await;
    let table = Arc::clone(&h.known.uris[0].table);
    let entry = table.get(Uuid::from_u128(1));
    let foresights = [h.foresee(&name("vm")), h.foresee(&name("vm"))];
    assert!(foresights.iter().all(Option::is_some));
    // Both have come to their end: nothing has happened yet.
    sleep(Duration::from_millis(20)).await;
    arrange(&h, |connect| assert!(Domain::lookup_by_name(connect, "vm").unwrap().create().is_ok())).await;
    while h.is_off_by_tables(&name("vm")) {
        sleep(Duration::from_millis(1)).await;
    }
    let [status, off] = foresights;
    assert_eq!(with(&h, Op::Status, status).await.reply, Reply::Success, "libvirt has told that it runs");
    // The same before libvirt has told it.
    table.put(Uuid::from_u128(1), entry);
    assert!(h.is_off_by_tables(&name("vm")));
    let outcome = with(&h, Op::Off, off).await;
    assert_eq!((outcome.reply, outcome.detail), (Reply::Success, Detail::Destroyed { was: State(1) }));
    arrange(&h, |connect| assert!(!Domain::lookup_by_name(connect, "vm").unwrap().is_active().unwrap())).await;
}
