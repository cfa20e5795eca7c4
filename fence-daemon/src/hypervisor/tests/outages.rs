//! URIs that are dead, hang, or come back: they cost nobody else anything.

use super::*;

/// What must hold with one good URI and one that says nothing.
async fn one_sick_uri(sick: String) {
    let good = Node::default().running("a", 1).shut_off("b", 2).file();
    let h = Hypervisors::with_limits(&[sick.clone(), good.uri()], QUICK, Options::default());
    while !h.any_connected() {
        sleep(Duration::from_millis(5)).await;
    }
    let begun = StdInstant::now();
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Off);
    assert_eq!(reply(&h, Op::Off, "b").await, Reply::Success);
    assert_eq!(reply(&h, Op::Off, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::On, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success);
    assert!(begun.elapsed() < Duration::from_millis(1000), "the sick URI delayed the good one: {:?}", begun.elapsed());
    for op in [Op::Off, Op::On, Op::Reboot, Op::Status] {
        let begun = StdInstant::now();
        let outcome = order(&h, op, name("elsewhere")).await;
        assert_eq!(outcome.reply, Reply::Failure, "{op:?} out of ignorance");
        assert!(matches!(&outcome.detail, Detail::Doubt { uri, .. } if **uri == *sick), "{}", outcome.detail);
        assert!(begun.elapsed() < QUICK.act);
    }
    let listing = h.list().await;
    assert_eq!((listing.domains.len(), listing.failed.len()), (2, 1));
    let uris = h.view();
    assert!(!uris[0].connected && uris[1].connected);
    h.shutdown(Duration::from_millis(500)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_uri_vetoes_nothing_and_delays_nobody() {
    one_sick_uri("test:///nonexistent/node.xml".to_owned()).await;
    one_sick_uri("qemu+unix:///system?socket=/nonexistent/socket".to_owned()).await;
    one_sick_uri("no such driver".to_owned()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_uri_vetoes_nothing_and_delays_nobody() {
    let socket = Scratch::new("sock");
    let _listener = UnixListener::bind(&socket.0).unwrap();
    one_sick_uri(format!("qemu+unix:///system?socket={}", socket.0.display())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_uri_that_comes_back_is_used_at_once() {
    let file = Scratch::new("xml");
    let h = Hypervisors::with_limits(&[file.uri()], QUICK, Options::default());
    h.first_round().await;
    let uris = h.view();
    assert!(!uris[0].connected && uris[0].last_error.is_some());
    assert!(!h.any_connected());
    assert!(matches!(order(&h, Op::Off, name("a")).await.detail, Detail::Doubt { .. }));
    // By now the back-off is longer than a request would want to wait.
    sleep(Duration::from_secs(2)).await;
    Node::default().running("a", 1).write(&file);
    let begun = StdInstant::now();
    assert_eq!(reply(&h, Op::Off, "a").await, Reply::Success);
    assert!(begun.elapsed() < Duration::from_millis(500));
    assert!(h.any_connected() && h.view()[0].connected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hypervisor_that_hangs_in_kills_stops_no_question_and_no_other() {
    let one = Node::default().running("a", 1).file();
    let two = Node::default().running("b", 2).file();
    let h = connect(&[one.uri(), two.uri()]).await;
    occupy_actions(&h, 0, Duration::from_secs(4)).await;
    let begun = StdInstant::now();
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(h.list().await.domains.len(), 2);
    assert_eq!(reply(&h, Op::Off, "b").await, Reply::Success);
    assert!(begun.elapsed() < Duration::from_millis(1000));
    let off = order(&h, Op::Off, name("a")).await;
    assert_eq!((off.reply, off.proven_off), (Reply::Failure, None));
    assert!(begun.elapsed() < Duration::from_millis(4000), "no answer in time: {:?}", begun.elapsed());
    // What was answered with a failure, and was not begun, must not happen later.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Off, "a").await, Reply::Success);
}
