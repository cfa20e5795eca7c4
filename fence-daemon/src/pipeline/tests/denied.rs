//! A denied request takes nothing from a permitted one.

use fence_common::keys::KeyOwner;

use super::*;

/// `127.0.0.1` may fence `one`, `127.0.0.2` only `two`.
fn two_groups() -> Groups {
    let group = |ip: &str, uuid: &str| Group {
        ips: vec![ip.parse().unwrap()],
        uuids: vec![uuid.to_owned()],
        ..Group::default()
    };
    Groups::Only(vec![group("127.0.0.1", "one"), group("127.0.0.2", "two")])
}

async fn listen_at(ip: &str) -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((ip, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// Each holder of the key hears each request on the segment, and can send one that counts as its
/// copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_denied_copy_does_not_use_up_the_request() {
    let (pipeline, _, _dir) = pipeline(two_groups()).await;
    let (denied, denied_at) = listen_at("127.0.0.2").await;
    pipeline.accept(request(Op::Off, "one", 7, denied_at));
    assert_eq!(timeout(SOON, client(denied)).await.unwrap().unwrap(), [Reply::PermissionDenied.to_wire()]);
    let answer = timeout(SOON, ask(&pipeline, Op::Off, "one", 7)).await;
    assert_eq!(answer.expect("the permitted copy was never called back"), [Reply::Success.to_wire()]);
}

/// The same while the denied peer is being answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_denied_copy_under_way_does_not_block_the_request() {
    let (backlog, mut questions) = Backlog::new();
    let (pipeline, _, _dir) = pipeline_behind(two_groups(), backlog).await;
    let (denied, denied_at) = listen_at("127.0.0.2").await;
    pipeline.accept(request(Op::Off, "one", 7, denied_at));
    let denied = client(denied);
    // The denied peer has authenticated. It is held before its answer.
    drop(timeout(SOON, questions.next()).await.unwrap());
    let held = timeout(SOON, questions.next()).await.unwrap();
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::Off, "one", 7, caller));
    let permitted = client(listener);
    drop(held);
    let reader = tokio::spawn(async move {
        loop {
            drop(questions.next().await);
        }
    });
    assert_eq!(timeout(SOON, permitted).await.unwrap().unwrap(), [Reply::Success.to_wire()]);
    // By then its request was answered elsewhere, or it receives the denial.
    let told = timeout(SOON, denied).await.unwrap().unwrap();
    reader.abort();
    assert!(told.is_empty() || told == [Reply::PermissionDenied.to_wire()], "{told:?}");
}

/// A guest asks with each of its addresses, and its client believes the first callback.
#[tokio::test(flavor = "multi_thread")]
async fn the_address_that_is_permitted_is_called_back_first() {
    let (pipeline, _, _dir) = pipeline(two_groups()).await;
    for seqno in 0..5 {
        let [(permitted, permitted_at), (denied, denied_at)] = [listen().await, listen_at("127.0.0.2").await];
        pipeline.accept(request(Op::Status, "one", seqno, denied_at));
        pipeline.accept(request(Op::Status, "one", seqno, permitted_at));
        tokio::select! {
            biased;
            _ = denied.accept() => panic!("the address that is denied was called back first"),
            first = timeout(SOON, permitted.accept()) => assert!(first.is_ok()),
        }
    }
}

/// The key that signs decides, not the address: `127.0.0.1` is in both groups.
#[tokio::test(flavor = "multi_thread")]
async fn a_groups_own_key_fences_in_its_group_and_nowhere_else() {
    let group = |owner, uuid: &str| Group {
        ips: vec!["127.0.0.1".parse().unwrap()],
        uuids: vec![uuid.to_owned()],
        owner: KeyOwner(owner),
        ..Group::default()
    };
    let groups = Groups::Only(vec![group(1, "one"), group(0, "two")]);
    let (pipeline, _, _dir) = pipeline(groups).await;
    let (granted, refused) = ([Reply::Success.to_wire()], [Reply::PermissionDenied.to_wire()]);
    let script = [(0, "one", refused), (1, "two", refused), (1, "one", granted), (0, "two", granted)];
    for (seqno, (owner, domain, expected)) in (20..).zip(script) {
        let (listener, caller) = listen().await;
        let client = client(listener);
        let asked = request(Op::Off, domain, seqno, caller).dangerous_for_owner_for_test(KeyOwner(owner));
        pipeline.accept(asked);
        let answer = timeout(SOON, client).await.unwrap().unwrap();
        assert_eq!(answer, expected, "key {owner} for {domain}");
    }
}
