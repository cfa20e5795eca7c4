//! Tests the way of a request with everything real but the datagram: TCP peers on the loopback,
//! libvirt's in-process test driver.

mod denied;
mod superseded;

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::time::Duration;

use fence_common::ending::Ending;
use fence_common::hash::HashKind;
use fence_common::key::Key;
use fence_common::target::Target;
use fence_common::wire::{FAMILY_V4, HASH_LEN, HOST_LIST, HostRecord, Op, Request};
use fence_config::{Alone, Group};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use zerocopy::{FromBytes, FromZeros};

use super::last_word::told;
use super::*;
use crate::hypervisor::Presence;
use crate::intake::request::Origin;

const AUTH: HashKind = HashKind::Sha256;
const SOON: Duration = Duration::from_secs(20);

fn key() -> Key {
    Key::new(b"the key of these tests").unwrap()
}

/// A pipeline over its own libvirt test driver, with the domains `one` and `two` running. The
/// backlog is always empty.
async fn pipeline(groups: Groups) -> (Pipeline, Hypervisors, TempDir) {
    pipeline_behind(groups, Backlog::new().0).await
}

async fn pipeline_behind(groups: Groups, backlog: Backlog) -> (Pipeline, Hypervisors, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let node = dir.path().join("node.xml");
    let domain = |name: &str, last: char| {
        format!(
            "<domain type='test'><name>{name}</name><uuid>00000000-0000-4000-8000-00000000000{last}</uuid>\
             <memory>1024</memory><os><type>hvm</type></os></domain>"
        )
    };
    let mut file = std::fs::File::create(&node).unwrap();
    write!(file, "<node>{}{}</node>", domain("one", '1'), domain("two", '2')).unwrap();
    let hypervisors = Hypervisors::start(&[format!("test://{}", node.display())], fence_config::Options::default());
    timeout(SOON, hypervisors.wait_connected()).await.unwrap();
    let (claims, requests) = (Arc::new(Claims::none()), Arc::default());
    let pipeline = Pipeline::new(groups, hypervisors.clone(), None, backlog, claims, unwritten(), requests);
    (pipeline, hypervisors, dir)
}

/// A replay cache without a file.
fn unwritten() -> Arc<ReplayCache> {
    Arc::new(ReplayCache::none(Duration::from_secs(60)))
}

async fn listen() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn request(op: Op, domain: &str, seqno: u32, caller: SocketAddr) -> Verified {
    request_with(key(), op, domain, seqno, caller)
}

fn request_with(key: Key, op: Op, domain: &str, seqno: u32, caller: SocketAddr) -> Verified {
    let mut request = Request::new_zeroed();
    request.op = op.to_wire();
    request.domain[..domain.len()].copy_from_slice(domain.as_bytes());
    let std::net::IpAddr::V4(ip) = caller.ip() else { panic!("IPv4 here") };
    request.address[..4].copy_from_slice(&ip.octets());
    request.port = caller.port().into();
    request.family = FAMILY_V4.into();
    request.seqno = seqno.into();
    Verified::dangerous_for_test(&request, Some(Arc::new(key)))
}

/// The client's half of the exchange.
async fn authenticate(stream: &mut TcpStream) {
    authenticate_with(&key(), stream).await;
}

async fn authenticate_with(key: &Key, stream: &mut TcpStream) {
    let challenge = [0x5a; HASH_LEN];
    stream.write_all(&challenge).await.unwrap();
    let (mut response, mut theirs) = ([0; HASH_LEN], [0; HASH_LEN]);
    stream.read_exact(&mut response).await.unwrap();
    assert_eq!(response, key.digest(AUTH, &[&challenge]), "the host must have the key too");
    stream.read_exact(&mut theirs).await.unwrap();
    stream.write_all(&key.digest(AUTH, &[&theirs])).await.unwrap();
}

/// An honest client: accepts one callback, authenticates and returns all that it receives then.
fn client(listener: TcpListener) -> JoinHandle<Vec<u8>> {
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        authenticate(&mut stream).await;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    })
}

async fn ask(pipeline: &Pipeline, op: Op, domain: &str, seqno: u32) -> Vec<u8> {
    let (listener, caller) = listen().await;
    let client = client(listener);
    pipeline.accept(request(op, domain, seqno, caller));
    timeout(SOON, client).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_callback_uses_the_key_that_signed_the_request() {
    let (pipeline, _hypervisors, _dir) = pipeline(Groups::Everyone).await;
    for (seqno, name) in [(1, "the old key"), (2, "the new key")] {
        let key = Key::new(name.as_bytes()).unwrap();
        let (listener, caller) = listen().await;
        pipeline.accept(request_with(key.clone(), Op::Status, "one", seqno, caller));
        let (mut stream, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
        authenticate_with(&key, &mut stream).await;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [0], "{name}");
        // A client with another accepted key than the signing one does not pass.
        let (listener, caller) = listen().await;
        pipeline.accept(request_with(key.clone(), Op::Status, "one", seqno + 10, caller));
        let (mut stream, _) = timeout(SOON, listener.accept()).await.unwrap().unwrap();
        stream.write_all(&[0x5a; HASH_LEN]).await.unwrap();
        let mut both = [0; 2 * HASH_LEN];
        stream.read_exact(&mut both).await.unwrap();
        let other = Key::new(b"a key that is accepted, too").unwrap();
        stream.write_all(&other.digest(AUTH, &[&both[HASH_LEN..]])).await.unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).await.unwrap_or(0), 0, "answered to another key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_has_its_answer() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let script = [
        (Op::Null, "", 1),
        (Op::DevStatus, "", 0),
        (Op::Status, "one", 0),
        (Op::Off, "one", 0),
        (Op::Status, "one", 2),
        (Op::Status, "two", 0),
        (Op::On, "one", 0),
        (Op::Reboot, "00000000-0000-4000-8000-000000000001", 0),
        (Op::Off, "nobody", 1),
        (Op::Off, "", 1),
    ];
    for (seqno, (op, domain, reply)) in (0..).zip(script) {
        assert_eq!(ask(&pipeline, op, domain, seqno).await, [reply], "{} {domain}", op.name());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_list_shows_what_the_client_may_fence() {
    let group = |ip: &str| Group { ips: vec![ip.parse().unwrap()], uuids: vec!["two".to_owned()], ..Group::default() };
    let (pipeline, _, _dir) = pipeline(Groups::Only(vec![group("127.0.0.1")])).await;
    let list = ask(&pipeline, Op::HostList, "", 1).await;
    assert_eq!((list[0], list.len()), (HOST_LIST, 1 + 2 * size_of::<HostRecord>() + 1));
    let (two, _) = HostRecord::read_from_prefix(&list[1..]).unwrap();
    assert!(two == HostRecord::new("two", "00000000-0000-4000-8000-000000000002", 1));
    assert_eq!(list[1 + size_of::<HostRecord>()..], [0; size_of::<HostRecord>() + 1]);

    assert_eq!(ask(&pipeline, Op::Off, "two", 2).await, [Reply::Success.to_wire()]);
    assert_eq!(ask(&pipeline, Op::Off, "one", 3).await, [Reply::PermissionDenied.to_wire()]);
    assert_eq!(ask(&pipeline, Op::Status, "nobody", 4).await, [Reply::PermissionDenied.to_wire()]);
    assert_eq!(ask(&pipeline, Op::DevStatus, "", 5).await, [Reply::Success.to_wire()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_by_other_addresses_are_answered_once() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (first, first_at) = listen().await;
    let (second, second_at) = listen().await;
    pipeline.accept(request(Op::Off, "one", 7, first_at));
    pipeline.accept(request(Op::Off, "ONE", 7, second_at));
    // The stock client accepts one connection only; this one accepts both, so the daemon has to
    // choose.
    let (a, b) = (client(first), client(second));
    let answers = [timeout(SOON, a).await.unwrap().unwrap(), timeout(SOON, b).await.unwrap().unwrap()];
    let answered: Vec<_> = answers.iter().filter(|answer| !answer.is_empty()).collect();
    // The names differ in case, and this driver's domains have lower-case names: the winner may be
    // the unknown one.
    assert_eq!(answered.len(), 1, "{answers:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_request_is_rejected() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (_listener, caller) = listen().await;
    let late = request(Op::Off, "one", 1, caller).dangerous_older_for_test(BEGIN_WITHIN + Duration::from_millis(1));
    pipeline.accept(late);
    assert_eq!(pipeline.shared.ledger().serving(), 0);
}

/// A pipeline whose deferral never ends if the domain is not known.
async fn deferring_for_ever() -> (Pipeline, TempDir) {
    let (mut pipeline, _, dir) = pipeline(Groups::Everyone).await;
    Arc::get_mut(&mut pipeline.shared).unwrap().defer = Duration::from_secs(3600);
    (pipeline, dir)
}

#[tokio::test(flavor = "multi_thread")]
async fn only_requests_for_unknown_domains_are_deferred() {
    let (pipeline, _dir) = deferring_for_ever().await;
    let (listener, caller) = listen().await;
    pipeline.accept(request(Op::Status, "nobody", 100, caller));
    let script = [
        (Op::Status, "two", 0),
        (Op::On, "00000000-0000-4000-8000-000000000001", 0),
        (Op::Off, "one", 0),
        (Op::DevStatus, "nobody", 0),
        (Op::Null, "nobody", 1),
    ];
    for (seqno, (op, domain, reply)) in (0..).zip(script) {
        assert_eq!(ask(&pipeline, op, domain, seqno).await, [reply], "{} {domain}", op.name());
    }
    assert_eq!(ask(&pipeline, Op::HostList, "nobody", 50).await[0], HOST_LIST);
    // A domain that is only defined here may run on another host.
    let (off, off_at) = listen().await;
    pipeline.accept(request(Op::Status, "one", 60, off_at));
    assert!(
        timeout(Duration::from_millis(100), async { tokio::join!(listener.accept(), off.accept()) }).await.is_err()
    );
    assert!(timeout(Duration::from_millis(100), off.accept()).await.is_err());
    // A newer request supersedes a deferred one, and a stop ends it.
    pipeline.accept(request(Op::Status, "two", 101, caller));
    assert_eq!(timeout(SOON, client(listener)).await.unwrap().unwrap(), [Reply::Success.to_wire()]);
    let (_listener, caller) = listen().await;
    pipeline.accept(request(Op::Off, "nobody", 102, caller));
    assert_eq!(timeout(SOON, pipeline.shutdown(SOON)).await, Ok(0));
    assert_eq!(pipeline.shared.ledger().serving(), 0);
}

/// Waits until the table knows that a domain does not run any more. It is a moment behind.
async fn wait_off(pipeline: &Pipeline, domain: &str) {
    let target = Target::Name(domain.to_owned());
    while pipeline.shared.hypervisors.presence(&target).await == Presence::Runs {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_is_off_is_deferred_unless_no_other_host_hears() {
    for alone in [Alone::Yes, Alone::No, Alone::Auto] {
        let (pipeline, _dir) = deferring_for_ever().await;
        // The setting is that of the request's listener.
        let from = |request: Verified| request.dangerous_from_for_test(Origin { alone, ..Origin::default() });
        assert_eq!(ask(&pipeline, Op::Off, "one", 1).await, [Reply::Success.to_wire()]);
        wait_off(&pipeline, "one").await;
        let [(off, off_at), (unknown, unknown_at)] = [listen().await, listen().await];
        pipeline.accept(from(request(Op::Status, "nobody", 2, unknown_at)));
        pipeline.accept(from(request(Op::Status, "one", 3, off_at)));
        if alone == Alone::Yes {
            assert_eq!(timeout(SOON, client(off)).await.unwrap().unwrap(), [Reply::Off.to_wire()]);
        } else {
            // These requests came by no known interface.
            assert!(timeout(Duration::from_millis(200), off.accept()).await.is_err(), "{alone:?}");
        }
        // A hypervisor in a guest may have it.
        assert!(timeout(Duration::from_millis(50), unknown.accept()).await.is_err(), "{alone:?}");
    }
}

/// What delayed this host's read may have delayed the host where the domain runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_read_late_is_deferred_as_long() {
    const DEFER: Duration = Duration::from_millis(500);
    let (mut pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    Arc::get_mut(&mut pipeline.shared).unwrap().defer = DEFER;
    assert_eq!(ask(&pipeline, Op::Off, "one", 1).await, [Reply::Success.to_wire()]);
    wait_off(&pipeline, "one").await;
    let (listener, caller) = listen().await;
    let begun = std::time::Instant::now();
    pipeline.accept(request(Op::Off, "one", 2, caller).dangerous_older_for_test(2 * DEFER));
    timeout(SOON, listener.accept()).await.unwrap().unwrap();
    assert!(begun.elapsed() >= DEFER, "called back after {:?}", begun.elapsed());
}

/// Of two hosts where the domain does not run, the one that knows it must be first. The other can
/// say nothing about it.
#[tokio::test(flavor = "multi_thread")]
async fn a_defined_domain_is_deferred_less_than_an_unknown_one() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    assert_eq!(ask(&pipeline, Op::Off, "one", 1).await, [Reply::Success.to_wire()]);
    let [(unknown, unknown_at), (defined, defined_at)] = [listen().await, listen().await];
    pipeline.accept(request(Op::Status, "nobody", 2, unknown_at));
    pipeline.accept(request(Op::Status, "one", 3, defined_at));
    tokio::select! {
        biased;
        _ = unknown.accept() => panic!("the unknown one was first"),
        first = timeout(SOON, defined.accept()) => assert!(first.is_ok()),
    }
    assert!(timeout(SOON, unknown.accept()).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_and_dead_clients_delay_no_other_request() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let mut silent = Vec::new();
    for seqno in 100..150 {
        let (listener, caller) = listen().await;
        pipeline.accept(request(Op::Off, "one", seqno, caller));
        silent.push(listener);
    }
    // An honest client is answered while all of them are waited for: they would take 10 s each.
    let honest = timeout(crate::callback::EXCHANGE_LIMIT / 2, ask(&pipeline, Op::Status, "one", 1)).await;
    assert_eq!(honest.unwrap(), [Reply::Success.to_wire()]);
    // The answer is sent a moment before the request is over.
    let only_the_silent = async {
        while pipeline.shared.ledger().serving() > silent.len() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, only_the_silent).await.unwrap();
    assert_eq!(pipeline.shared.ledger().serving(), silent.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_take_all_slots() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let mut silent = Vec::new();
    for seqno in 0..2 * u32::try_from(SERVING_MAX_PER_CALLER).unwrap() {
        let listener = TcpListener::bind("127.0.0.2:0").await.unwrap();
        pipeline.accept(request(Op::Off, "one", 100 + seqno, listener.local_addr().unwrap()));
        silent.push(listener);
    }
    assert_eq!(pipeline.shared.ledger().serving(), SERVING_MAX_PER_CALLER);
    assert_eq!(ask(&pipeline, Op::Status, "one", 1).await, [Reply::Success.to_wire()]);
}

/// A holder of the key with many addresses can have that many requests under way.
#[tokio::test(flavor = "multi_thread")]
async fn clients_at_many_addresses_cannot_take_all_places() {
    let (pipeline, _dir) = deferring_for_ever().await;
    for number in 0..u32::try_from(SERVING_MAX).unwrap() {
        let [_, _, high, low] = number.to_be_bytes();
        pipeline.accept(request(Op::Off, "nobody", 100 + number, SocketAddr::from(([127, 1, high, low], 1))));
    }
    assert_eq!(pipeline.shared.ledger().serving(), SERVING_MAX);
    for seqno in 0..10 {
        let answer = timeout(SOON, ask(&pipeline, Op::Status, "one", seqno)).await;
        assert_eq!(answer.expect("all places were taken"), [Reply::Success.to_wire()]);
    }
    let bounded = async {
        while pipeline.shared.ledger().serving() > SERVING_MAX {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, bounded).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_first_waits_for_the_requests_of_its_moment_and_serves_on() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    timeout(SOON, pipeline.settle(SOON)).await.expect("nothing is under way");
    let (slow, caller) = listen().await;
    pipeline.accept(request(Op::Status, "one", 1, caller));
    let (mut stream, _) = timeout(SOON, slow.accept()).await.unwrap().unwrap();
    let settled = pipeline.settle(SOON);
    tokio::pin!(settled);
    assert!(timeout(Duration::from_millis(50), &mut settled).await.is_err(), "a request is under way");
    // Another one is served meanwhile, and a later one is not waited for.
    assert_eq!(ask(&pipeline, Op::Status, "two", 2).await, [Reply::Success.to_wire()]);
    let (_later, caller) = listen().await;
    pipeline.accept(request(Op::Status, "one", 3, caller));
    authenticate(&mut stream).await;
    timeout(SOON / 2, settled).await.expect("it was answered");
    // Its time is bounded.
    timeout(SOON, pipeline.settle(Duration::from_millis(50))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_drops_silent_clients_and_takes_no_new_requests() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (silent, caller) = listen().await;
    pipeline.accept(request(Op::Off, "one", 1, caller));
    let (mut stream, _) = timeout(SOON, silent.accept()).await.unwrap().unwrap();
    assert_eq!(timeout(crate::callback::EXCHANGE_LIMIT / 2, pipeline.shutdown(SOON)).await, Ok(0));
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "closed");
    pipeline.accept(request(Op::Off, "one", 2, caller));
    assert_eq!(pipeline.shared.ledger().serving(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reflected_challenge_is_not_answered() {
    let (pipeline, _, _dir) = pipeline(Groups::Everyone).await;
    let (first, first_at) = listen().await;
    let (second, second_at) = listen().await;
    pipeline.accept(request(Op::Off, "one", 1, first_at));
    pipeline.accept(request(Op::Off, "one", 2, second_at));
    let (mut victim, _) = timeout(SOON, first.accept()).await.unwrap().unwrap();
    let (mut oracle, _) = timeout(SOON, second.accept()).await.unwrap().unwrap();
    // A peer without the key asks the second conversation for the answer to the first one's
    // challenge.
    victim.write_all(&[1; HASH_LEN]).await.unwrap();
    let mut both = [0; 2 * HASH_LEN];
    victim.read_exact(&mut both).await.unwrap();
    oracle.write_all(&both[HASH_LEN..]).await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON, oracle.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"", "the host has answered its own challenge");
}

#[test]
fn the_log_shows_a_success_only_if_the_client_received_it() {
    let success = Ending::Success;
    assert_eq!(told(success, Some(&Ok(()))), (success, String::new()));
    let (reply, note) = told(success, Some(&Err(io::ErrorKind::BrokenPipe.into())));
    assert!(reply == Ending::Undelivered && note.contains("could not be delivered"), "{reply:?}{note}");
    let (reply, note) = told(success, None);
    assert!(reply == Ending::Unsent && note.contains("newer"), "{reply:?}{note}");
}
