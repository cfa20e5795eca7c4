//! Guests that are fenced while they want others to be.

use std::net::SocketAddr;

use fence_net::neighbour::Mac;

use super::super::fence::{Fenced, Fencing};
use super::*;
use crate::clock::Moment;

const ADDRESS: Mac = [0x52, 0x54, 0, 0, 0, 2];

/// Of `a` and `b`, `b` has an Ethernet address, and it is the requester.
async fn pair() -> (Hypervisors, Scratch) {
    let interface = "<devices><interface type='network'><mac address='52:54:00:00:00:02'/><source network='default'/>\
                     </interface></devices><test:runstate>1</test:runstate>";
    let file = Node::default().running("a", 1).domain("b", 2, interface).file();
    let races = FenceRaces::with_neighbours(|_, _| Ok(vec![ADDRESS]));
    let h = Hypervisors::with_races(&[file.uri()], QUICK, Options::default(), races);
    h.wait_connected().await;
    let known = || h.known.uris[0].table.running_with(ADDRESS).len();
    while known() == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    (h, file)
}

/// A fence of `b` that is under way as long as this is held.
fn fence_of_b(h: &Hypervisors) -> Fencing {
    let b = Fenced { uuid: Uuid::from_u128(2), name: "b".to_owned(), macs: [ADDRESS].into() };
    h.orders.races.enter(None, vec![b], |_| Vec::new()).ok().unwrap()
}

/// What `b` asks.
fn b_asks(h: &Hypervisors, op: Op, domain: &str) -> tokio::task::JoinHandle<Outcome> {
    let caller = SocketAddr::from(([192, 0, 2, 2], 1229));
    let (h, target, asker) = (
        h.clone(),
        name(domain),
        Requester { caller: caller.into(), domain: None, interface: 0, arrived: Moment::now() },
    );
    tokio::spawn(async move {
        let deadline = Deadline::at(Instant::now() + Duration::from_secs(60));
        h.carry_out(&Authorized::dangerous_for_test(op, target), Some(asker), &deadline).await
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_survives_its_fence_gets_its_order() {
    let (h, _file) = pair().await;
    for op in [Op::Off, Op::Reboot] {
        let aim = fence_of_b(&h);
        let mut asked = b_asks(&h, op, "a");
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut asked).await.is_err(), "{op:?}");
        // Nobody else waits for it.
        assert_eq!(order(&h, Op::Reboot, name("a")).await.reply, Reply::Success);
        until(&h, "a", Reply::Success).await;
        drop(aim);
        let outcome = asked.await.unwrap();
        assert_eq!(outcome.reply, Reply::Success, "{:?}", outcome.detail);
        order(&h, Op::On, name("a")).await;
        until(&h, "a", Reply::Success).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_fenced_nodes_are_not_carried_out() {
    let (h, _file) = pair().await;
    let aim = fence_of_b(&h);
    let asked = b_asks(&h, Op::Off, "a");
    sleep(Duration::from_millis(50)).await;
    aim.killed(Moment::now());
    assert_eq!(asked.await.unwrap().detail, Detail::Condemned("b".to_owned()));
    // A fence that takes too long is not waited for any longer than anything else.
    let aim = fence_of_b(&h);
    let late = b_asks(&h, Op::Off, "a").await.unwrap().detail;
    assert!(late == Detail::Condemned("b".to_owned()) || late == Detail::Late, "{late:?}");
    drop(aim);
    // Its order does not keep others' reboots from starting it again.
    assert_eq!(order(&h, Op::Reboot, name("a")).await.reply, Reply::Success);
    until(&h, "a", Reply::Success).await;
}
