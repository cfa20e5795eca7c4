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
