//! Which domain a vsock number stands for.

use fence_common::caller::Vouched;

use super::*;

fn vsock(name: &str, uuid: u128, cid: u32, state: u8) -> String {
    let extra = format!(
        "<test:runstate>{state}</test:runstate><devices><vsock><cid auto='no' address='{cid}'/></vsock></devices>"
    );
    xml(name, uuid, &extra)
}

fn called(name: &str, uuid: u128) -> Option<Vouched> {
    Some(Vouched { name: name.to_owned(), uuid: Uuid::from_u128(uuid) })
}

/// Asks until the table is complete.
async fn asked(h: &Hypervisors, cid: u32, expected: Option<Vouched>) {
    let by = Instant::now() + Duration::from_secs(10);
    while h.domain_of_cid(cid).await != expected {
        assert!(Instant::now() < by, "CID {cid} is {:?} and not {expected:?}", h.domain_of_cid(cid).await);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_number_is_that_of_the_running_domain_and_of_no_other_one() {
    let domains = [vsock("a", 1, 7, 1), vsock("off", 2, 8, 5), vsock("b", 3, 9, 1), vsock("twin", 4, 9, 1)];
    let (h, _file) = node(Node(domains.concat()).running("none", 5)).await;
    asked(&h, 7, called("a", 1)).await;
    // Of a domain that is off, of two at once, of nobody.
    for cid in [8, 9, 10] {
        assert_eq!(h.domain_of_cid(cid).await, None, "{cid}");
    }

    // The number goes from one machine to another.
    arrange(&h, |connect| Domain::lookup_by_name(connect, "b").unwrap().destroy().unwrap()).await;
    asked(&h, 9, called("twin", 4)).await;
    arrange(&h, |connect| Domain::lookup_by_name(connect, "twin").unwrap().destroy().unwrap()).await;
    assert_eq!(h.domain_of_cid(9).await, None, "nobody has it now, whatever the table still says");
    arrange(&h, |connect| assert!(Domain::lookup_by_name(connect, "b").unwrap().create().is_ok())).await;
    asked(&h, 9, called("b", 3)).await;
}
