//! What is late is not begun: its client has received "failure" already.

use super::super::fence::Off;
use super::super::fence::by_libvirt::{destroy, power_off, settle};
use super::super::fence::reset;
use super::super::fence::start::start;
use super::super::known::Table;
use super::super::libvirt::domain;
use super::*;
use crate::hypervisor::libvirt::CallError;

fn late() -> Deadline {
    Deadline::at(Instant::now())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_step_begins_after_its_deadline() {
    let (h, _file) = node(Node::default().running("a", 1).shut_off("b", 2)).await;
    arrange(&h, |connect| {
        let table = Table::new("test:///");
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let state = |name: &str| Domain::lookup_by_name(connect, name).unwrap().get_state().unwrap().0;
        for restart in [false, true] {
            let off = power_off(connect, one, restart, &table, &late());
            assert!(matches!(off, Err(CallError::TooLate)), "killed although its client received a failure");
        }
        let id = Domain::lookup_by_uuid(connect, one).unwrap().get_id().unwrap();
        assert_eq!(destroy(connect, one, id, &late()), Err(CallError::TooLate));
        assert_eq!(reset::ask(connect, one, &late()), Err(CallError::TooLate));
        assert_eq!(state("a"), 1);
        assert!(matches!(start(connect, two, None, None, &table, || Ok(()), &late()), Err(CallError::TooLate)));
        let xml = xml("c", 3, "");
        let transient = start(connect, Uuid::from_u128(3), Some(&xml), None, &table, || Ok(()), &late());
        assert!(matches!(transient, Err(CallError::TooLate)));
        assert_eq!((state("b"), Domain::lookup_by_name(connect, "c").is_err()), (5, true));
        // A question is answered all the same.
        assert!(matches!(power_off(connect, two, false, &table, &late()), Ok(Off::Already(_))));
        let domain = domain::Domain::get(connect, one).unwrap();
        assert_eq!(settle(&domain, &late()), Ok(true), "there is none");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_is_called_off_does_nothing() {
    let (h, _file) = node(Node::default().running("a", 1).shut_off("b", 2)).await;
    for (op, domain) in [(Op::Off, "a"), (Op::Reboot, "a"), (Op::On, "b")] {
        let deadline = Deadline::at(Instant::now() + Duration::from_secs(60));
        deadline.call_off();
        let outcome = h.carry_out(&Authorized::dangerous_for_test(op, name(domain)), None, &deadline).await;
        assert_eq!(outcome.reply, Reply::Failure, "{}", outcome.detail);
    }
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Off);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_domain_is_not_reset() {
    let states = Node::default().domain("p", 1, "<test:runstate>3</test:runstate>").running("r", 2);
    let (h, _file) = node(states).await;
    arrange(&h, |connect| {
        let soon = Deadline::at(Instant::now() + Duration::from_secs(5));
        let paused = reset::ask(connect, Uuid::from_u128(1), &soon);
        assert_eq!(paused, Ok(reset::Asked::StandsStill(State(3))));
        let running = reset::ask(connect, Uuid::from_u128(2), &soon);
        assert!(!matches!(running, Ok(reset::Asked::StandsStill(_))), "{running:?}");
    })
    .await;
}
