//! Two clients at one callback address and port: neither receives the other's answer, and neither
//! takes anything from the other.

use super::*;

/// When a newer request from the same endpoint arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newer {
    BeforeAuthentication,
    AfterAuthentication,
}

/// A client authenticates. When the daemon reads its backlog for the `nth` time, it finds a newer
/// request from the same endpoint. Returns what the first client receives; the newer one always
/// gets its own answer.
async fn superseded_at_the(nth: usize, newer: Newer) -> Vec<u8> {
    let (backlog, mut questions) = Backlog::new();
    let (pipeline, _, _dir) = pipeline_behind(Groups::Everyone, backlog).await;
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::DevStatus, "", 1, caller));
    let (mut old, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    let early = request(Op::Off, "nobody", 2, caller);
    authenticate(&mut old).await;
    for look in 1..=nth {
        let question = timeout(SOON, questions.next()).await.unwrap();
        if look == nth {
            let late = request(Op::Off, "nobody", 2, caller);
            pipeline.accept(if newer == Newer::BeforeAuthentication { early.clone() } else { late });
        }
        drop(question);
    }
    drop(questions);
    let mut answer = Vec::new();
    timeout(SOON, old.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(timeout(SOON, client(listener)).await.unwrap().unwrap(), [Reply::Failure.to_wire()]);
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn a_superseded_request_is_never_claimed() {
    for newer in [Newer::BeforeAuthentication, Newer::AfterAuthentication] {
        let answer = superseded_at_the(1, newer).await;
        assert_eq!(answer, b"", "{newer:?}: the answer to `monitor` would be taken for that to `off`");
    }
}

/// The first client is gone, and the next one listens there with another request. The daemon cannot
/// know then whose connection it holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_from_before_the_authentication_supersedes_a_claimed_one() {
    assert_eq!(superseded_at_the(2, Newer::BeforeAuthentication).await, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_request_takes_nothing_from_an_authenticated_client() {
    assert_eq!(superseded_at_the(2, Newer::AfterAuthentication).await, [Reply::Success.to_wire()]);
}

/// A client that need not talk may have sent its request after our connection.
#[tokio::test(flavor = "multi_thread")]
async fn without_authentication_a_newer_request_supersedes_until_the_answer() {
    let (backlog, mut questions) = Backlog::new();
    let (pipeline, _, _dir) = pipeline_behind(Groups::Everyone, backlog).await;
    let request = |op, domain: &str, seqno, caller| {
        request(op, domain, seqno, caller).dangerous_from_for_test(Origin { auth: HashKind::None, ..Origin::default() })
    };
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::DevStatus, "", 1, caller));
    let (mut old, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    drop(timeout(SOON, questions.next()).await.unwrap());
    let before_the_reply = timeout(SOON, questions.next()).await.unwrap();
    pipeline.accept(request(Op::Off, "nobody", 2, caller));
    drop((before_the_reply, questions));
    let mut answer = Vec::new();
    timeout(SOON, old.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"");
}

/// The ring and the socket have no common order.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_read_after_a_newer_one_gets_no_callback() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (listener, caller) = listen().await;
    let older = request(Op::DevStatus, "", 1, caller);
    pipeline.accept(request(Op::Off, "nobody", 2, caller));
    pipeline.accept(older);
    // Neither brings an answer to the other's client: the newer one waits for its turn, and would
    // ask again.
    assert_eq!(pipeline.shared.ledger().serving(), 1);
    pipeline.accept(request(Op::Off, "nobody", 2, caller));
    assert_eq!(timeout(SOON, client(listener)).await.unwrap().unwrap(), [Reply::Failure.to_wire()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_callback_ends_when_its_request_is_superseded() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::DevStatus, "", 1, caller));
    let (mut silent, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    pipeline.accept(request(Op::Off, "nobody", 2, caller));
    let end = timeout(crate::callback::EXCHANGE_LIMIT / 2, silent.read(&mut [0; 1])).await;
    assert_eq!(end.unwrap().unwrap(), 0, "closed");
    assert_eq!(timeout(SOON, client(listener)).await.unwrap().unwrap(), [Reply::Failure.to_wire()]);
    let nothing_left = async {
        while !pipeline.shared.newest.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, nothing_left).await.unwrap();
    assert_eq!(pipeline.shared.ledger().serving(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_request_still_supersedes() {
    let (pipeline, hypervisors, _dir) = pipeline(Groups::Everyone).await;
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::Off, "one", 1, caller));
    let (mut stream, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
    // Another client listens here now, and has sent this before it accepted that callback.
    let newer = request(Op::Status, "one", 2, caller);
    pipeline.accept(newer.dangerous_older_for_test(BEGIN_WITHIN + Duration::from_millis(1)));
    authenticate(&mut stream).await;
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert!(answer.is_empty(), "it received the answer to another request: {answer:?}");
    let one = hypervisors.list().await.domains.into_iter().find(|domain| domain.name == "one").unwrap();
    assert_eq!(one.state, 1, "fenced on the word of another one");
}
