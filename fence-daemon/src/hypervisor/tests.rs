//! The rules, row by row, on libvirt's in-process test driver: `test:///FILE` is a node of its own
//! with the domains of the file.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Instant as StdInstant;

use fence_common::target::Target;
use fence_common::wire::{Op, Reply};
use fence_config::{RebootMethod, RebootReply};
use tempfile::TempDir;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use zeroize::Zeroizing;

use super::fence::FRESH;
use super::fence::{Plan, Source};
use super::libvirt::Lane;
use super::*;

mod choices;
mod deadlines;
mod fence_races;
mod foresight;
mod inherited;
mod lost;
mod outages;
mod pauses;
mod presence;
mod restarts;
mod silence;
mod standing;
mod vouched;

/// Short enough for tests, long enough for a loaded machine to tell a wait from none.
const QUICK: Limits = Limits {
    look_up: Duration::from_millis(1500),
    grace: Duration::from_millis(300),
    begin: Duration::from_millis(2500),
    act: Duration::from_millis(3000),
    reset: Duration::from_millis(500),
    restart_pause: Duration::from_secs(1),
    unrecorded: Duration::from_secs(4),
};

/// Locks that nobody carries count for every machine of this host of which nothing is known: held
/// by each test that makes some, and by each that wants none.
pub(super) static ORPHANS: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A file or socket of this test's own, in a directory that is removed with it.
struct Scratch(PathBuf, #[expect(dead_code, reason = "removes the directory")] TempDir);

impl Scratch {
    fn new(end: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self(directory.path().join(format!("node.{end}")), directory)
    }

    fn uri(&self) -> String {
        format!("test://{}", self.0.display())
    }
}

/// A node for the test driver.
#[derive(Default)]
struct Node(String);

impl Node {
    fn domain(mut self, name: &str, uuid: u128, extra: &str) -> Self {
        self.0.push_str(&xml(name, uuid, extra));
        self
    }

    fn running(self, name: &str, uuid: u128) -> Self {
        self.domain(name, uuid, "<test:runstate>1</test:runstate>")
    }

    fn shut_off(self, name: &str, uuid: u128) -> Self {
        self.domain(name, uuid, "<test:runstate>5</test:runstate>")
    }

    fn file(self) -> Scratch {
        let scratch = Scratch::new("xml");
        self.write(&scratch);
        scratch
    }

    fn write(self, to: &Scratch) {
        // Written beside and moved there, so that no one reads half of it.
        let draft = to.0.with_extension("draft");
        std::fs::write(&draft, format!("<node>{}</node>", self.0)).unwrap();
        std::fs::rename(draft, &to.0).unwrap();
    }
}

fn xml(name: &str, uuid: u128, extra: &str) -> String {
    format!(
        "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><name>{name}</name>\
         <uuid>{}</uuid><memory>8192</memory><os><type>hvm</type></os>{extra}</domain>",
        Uuid::from_u128(uuid)
    )
}

async fn connect(uris: &[String]) -> Hypervisors {
    let hypervisors = Hypervisors::with_limits(uris, QUICK, Options::default());
    hypervisors.wait_connected().await;
    hypervisors
}

async fn node(node: Node) -> (Hypervisors, Scratch) {
    let file = node.file();
    (connect(&[file.uri()]).await, file)
}

fn name(text: &str) -> Target {
    Target::Name(text.to_owned())
}

fn uuid(number: u128) -> Target {
    Target::Uuid(Uuid::from_u128(number))
}

async fn order(hypervisors: &Hypervisors, op: Op, target: Target) -> Outcome {
    let deadline = Deadline::at(Instant::now() + Duration::from_secs(60));
    hypervisors.carry_out(&Authorized::dangerous_for_test(op, target), None, &deadline).await
}

async fn reply(hypervisors: &Hypervisors, op: Op, domain: &str) -> Reply {
    order(hypervisors, op, name(domain)).await.reply
}

/// Does something at the first URI's node with libvirt itself.
async fn arrange(hypervisors: &Hypervisors, what: impl FnOnce(&Connect) + Send + 'static) {
    let call = move |connect: &Connect| {
        what(connect);
        Ok(())
    };
    hypervisors.known.uris[0].call(Lane::Query, Instant::now() + Duration::from_secs(5), call).await.unwrap();
}

/// Waits until the domain has the state that `status` replies with `wanted`.
async fn until(hypervisors: &Hypervisors, domain: &str, wanted: Reply) {
    let begun = StdInstant::now();
    while reply(hypervisors, Op::Status, domain).await != wanted {
        assert!(begun.elapsed() < Duration::from_secs(5), "{domain} never became {wanted:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Every thread for actions of the URI is busy for `time`, as with a hypervisor that hangs.
async fn occupy_actions(hypervisors: &Hypervisors, uri: usize, time: Duration) {
    for _ in 0..16 {
        let uri = Arc::clone(&hypervisors.known.uris[uri]);
        tokio::spawn(async move {
            let call = move |_: &Connect| {
                std::thread::sleep(time);
                Ok(())
            };
            uri.call(Lane::Kill, Instant::now() + Duration::from_secs(5), call).await.unwrap();
        });
    }
    sleep(Duration::from_millis(50)).await;
}

/// Enters a restart that cannot succeed for now: as of a transient domain, whose XML is `xml`.
async fn pend(h: &Hypervisors, domain: &str, number: u128, source: Source) {
    pend_since(h, domain, number, source, Instant::now()).await;
}

/// The same of a reboot that was asked for at this moment.
async fn pend_since(h: &Hypervisors, domain: &str, number: u128, source: Source, asked: Instant) {
    let uuid = Uuid::from_u128(number);
    let identity = Identity { uri: Arc::clone(&h.known.uris[0].text), uuid, name: domain.to_owned() };
    let held = h.orders.locks.uuid(uuid).await;
    let plan =
        Plan { index: 0, domain: identity, source, dead: None, died: None, kept: None, inherited: false, held: false };
    h.orders.restarter.schedule(plan, asked);
    drop(held);
    // The first attempt fails at once, the next is a while off.
    sleep(Duration::from_millis(100)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn off_kills_what_is_active_and_proves_it() {
    let paused = "<test:runstate>3</test:runstate>";
    let (h, _file) =
        node(Node::default().running("a", 1).running("b", 2).shut_off("c", 3).domain("p", 4, paused)).await;
    let before = Moment::now();
    let off = order(&h, Op::Off, name("a")).await;
    assert_eq!((off.reply, &off.detail), (Reply::Success, &Detail::Destroyed { was: State(1) }));
    assert!(off.proven_off.unwrap() >= before && off.proven_off.unwrap() <= Moment::now());
    let domain = off.domain.unwrap();
    assert_eq!((domain.name.as_str(), domain.uuid), ("a", Uuid::from_u128(1)));
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Off);

    assert_eq!(order(&h, Op::Off, uuid(2)).await.detail, Detail::Destroyed { was: State(1) });
    assert_eq!(order(&h, Op::Status, uuid(2)).await.detail, Detail::ShutOff);

    let off = order(&h, Op::Off, name("c")).await;
    assert_eq!((off.reply, off.detail, off.proven_off.is_some()), (Reply::Success, Detail::AlreadyOff, true));

    assert_eq!(order(&h, Op::Off, name("p")).await.detail, Detail::Destroyed { was: State(3) });
    assert_eq!(reply(&h, Op::Status, "p").await, Reply::Off);

    for unknown in [name("nobody"), uuid(99), name("A"), name("a\0")] {
        let off = order(&h, Op::Off, unknown).await;
        assert_eq!((off.reply, off.detail, off.proven_off), (Reply::Failure, Detail::Unknown, None));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_domain_is_off_when_it_is_gone() {
    let (h, _file) = node(Node::default().domain("t", 1, "<test:transient/>")).await;
    assert_eq!(order(&h, Op::Off, name("t")).await.detail, Detail::Destroyed { was: State(1) });
    assert_eq!(order(&h, Op::Status, name("t")).await.detail, Detail::Unknown);
    assert_eq!(order(&h, Op::Off, name("t")).await.reply, Reply::Failure);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_starts_what_is_off() {
    let paused = "<test:runstate>3</test:runstate>";
    let (h, _file) = node(Node::default().running("a", 1).shut_off("b", 2).domain("p", 3, paused)).await;
    assert_eq!(order(&h, Op::On, name("a")).await.detail, Detail::AlreadyActive(State(1)));
    let on = order(&h, Op::On, uuid(2)).await;
    assert_eq!((on.reply, on.detail, on.proven_off), (Reply::Success, Detail::Started(State(1)), None));
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Success);
    assert_eq!(order(&h, Op::On, name("p")).await.reply, Reply::Success);
    assert_eq!(order(&h, Op::Status, name("p")).await.detail, Detail::Active(State(3)));
    assert_eq!(order(&h, Op::On, name("nobody")).await.detail, Detail::Unknown);
    assert_eq!(reply(&h, Op::On, "nobody").await, Reply::Failure);
}

#[tokio::test(flavor = "multi_thread")]
async fn status_tells_on_from_off() {
    let (h, _file) = node(Node::default().running("a", 1).shut_off("b", 2)).await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Off);
    assert_eq!(reply(&h, Op::Status, "nobody").await, Reply::Off);
    for op in [Op::Null, Op::DevStatus, Op::HostList] {
        assert_eq!(order(&h, op, name("a")).await.detail, Detail::NotAboutADomain);
    }
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
}

#[tokio::test(flavor = "multi_thread")]
async fn reboot_is_answered_when_off_is_proven_and_comes_back() {
    let (h, _file) = node(Node::default().running("a", 1).shut_off("b", 2)).await;
    // The instance that comes back is another one: libvirt gives each start an ID of its own.
    let id = async |domain: &'static str| {
        let (sender, receiver) = std::sync::mpsc::channel();
        arrange(&h, move |connect| sender.send(Domain::lookup_by_name(connect, domain).unwrap().get_id()).unwrap())
            .await;
        receiver.recv().unwrap()
    };
    let old = id("a").await;
    let reboot = order(&h, Op::Reboot, name("a")).await;
    assert_eq!((reboot.reply, &reboot.detail), (Reply::Success, &Detail::Rebooting { was: State(1) }));
    assert!(reboot.proven_off.is_some());
    until(&h, "a", Reply::Success).await;
    assert_ne!(id("a").await, old);

    assert_eq!(order(&h, Op::Reboot, name("b")).await.detail, Detail::AlreadyOff);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(reply(&h, Op::Status, "b").await, Reply::Off);
    assert_eq!(order(&h, Op::Reboot, name("nobody")).await.detail, Detail::Unknown);
    assert_eq!(reply(&h, Op::Reboot, "nobody").await, Reply::Failure);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transient_domain_comes_back_from_its_xml_with_its_secrets() {
    let vnc = "<test:transient/><devices><graphics type='vnc' port='-1' autoport='yes' passwd='secret'/></devices>";
    let (h, _file) = node(Node::default().domain("t", 1, vnc)).await;
    let reboot = order(&h, Op::Reboot, uuid(1)).await;
    assert_eq!((reboot.reply, reboot.detail), (Reply::Success, Detail::Rebooting { was: State(1) }));
    until(&h, "t", Reply::Success).await;
    arrange(&h, |connect| {
        let domain = Domain::lookup_by_uuid(connect, Uuid::from_u128(1)).unwrap();
        assert!(!domain.is_persistent().unwrap());
        assert!(domain.get_xml_desc(virt_sys::VIR_DOMAIN_XML_SECURE).unwrap().contains("passwd='secret'"));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_off_after_a_reboot_ends_with_the_domain_off() {
    let (h, _file) = node(Node::default().running("a", 1).domain("t", 2, "<test:transient/>")).await;
    for round in 0..40 {
        let by = if round % 2 == 0 { name("a") } else { uuid(1) };
        assert_eq!(order(&h, Op::Reboot, name("a")).await.reply, Reply::Success);
        assert_eq!(order(&h, Op::Off, by).await.reply, Reply::Success);
        sleep(Duration::from_millis(5)).await;
        assert_eq!(reply(&h, Op::Status, "a").await, Reply::Off, "round {round}");
        assert_eq!(reply(&h, Op::On, "a").await, Reply::Success);
    }
    // Both at once: whichever is first, no restart may come after the off has been answered.
    for round in 0..40 {
        let reboot = tokio::spawn({
            let h = h.clone();
            async move { order(&h, Op::Reboot, name("a")).await.reply }
        });
        assert_eq!(order(&h, Op::Off, uuid(1)).await.reply, Reply::Success);
        assert_eq!(reboot.await.unwrap(), Reply::Success);
        sleep(Duration::from_millis(5)).await;
        let state = reply(&h, Op::Status, "a").await;
        // The reboot came second: it found the domain off, where it stays.
        assert_eq!(state, Reply::Off, "round {round}");
        assert_eq!(reply(&h, Op::On, "a").await, Reply::Success);
    }
    assert_eq!(reply(&h, Op::Reboot, "t").await, Reply::Success);
    let off = order(&h, Op::Off, name("t")).await;
    assert_eq!(off.reply, Reply::Success, "{off:?}");
    sleep(Duration::from_millis(300)).await;
    assert_eq!(order(&h, Op::Status, name("t")).await.detail, Detail::Unknown);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_means_every_running_instance() {
    let one = Node::default().shut_off("a", 1).running("b", 2).shut_off("c", 3).file();
    let two = Node::default().running("a", 1).running("b", 20).shut_off("c", 3).file();
    let h = connect(&[one.uri(), two.uri()]).await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    assert_eq!(order(&h, Op::On, name("a")).await.detail, Detail::AlreadyActive(State(1)));
    let off = order(&h, Op::Off, uuid(1)).await;
    assert_eq!((off.reply, off.detail), (Reply::Success, Detail::Destroyed { was: State(1) }));
    assert_eq!(*off.domain.unwrap().uri, *two.uri());
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Off);

    assert_eq!(reply(&h, Op::Off, "b").await, Reply::Success);
    assert_eq!(order(&h, Op::Status, uuid(2)).await.reply, Reply::Off);
    assert_eq!(order(&h, Op::Status, uuid(20)).await.reply, Reply::Off);

    assert_eq!(*order(&h, Op::On, name("c")).await.domain.unwrap().uri, *one.uri());
    let listing = h.list().await;
    let seen: Vec<_> = listing.domains.iter().map(|d| (d.name.as_str(), d.state, *d.uri == *one.uri())).collect();
    let mut first: Vec<_> = seen[..3].to_vec();
    first.sort_unstable();
    assert_eq!(first, [("a", 5, true), ("b", 5, true), ("c", 1, true)]);
    assert!(listing.failed.is_empty());
    assert_eq!(seen.len(), 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_one_domain_wait_for_each_other_and_others_do_not() {
    let (h, _file) = node(Node::default().running("a", 1).running("b", 2)).await;
    let held = h.orders.locks.uuid(Uuid::from_u128(1)).await;
    let by_name = tokio::spawn({
        let h = h.clone();
        async move { reply(&h, Op::Off, "a").await }
    });
    assert_eq!(reply(&h, Op::Off, "b").await, Reply::Success);
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    sleep(Duration::from_millis(300)).await;
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    // By UUID and by name are the same domain; a request that waits too long fails.
    assert_eq!(order(&h, Op::Off, uuid(1)).await.detail, Detail::Occupied);
    drop(held);
    assert_eq!(by_name.await.unwrap(), Reply::Failure);
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success, "an order that came too late was carried out");
    assert_eq!(reply(&h, Op::Off, "a").await, Reply::Success);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lock_is_held_while_libvirt_works() {
    let (h, _file) = node(Node::default().running("a", 1)).await;
    occupy_actions(&h, 0, Duration::from_millis(1000)).await;
    let off = tokio::spawn({
        let h = h.clone();
        async move { reply(&h, Op::Off, "a").await }
    });
    sleep(Duration::from_millis(200)).await;
    let second = tokio::time::timeout(Duration::from_millis(300), h.orders.locks.uuid(Uuid::from_u128(1))).await;
    assert!(second.is_err(), "two requests at one domain");
    assert_eq!(off.await.unwrap(), Reply::Success);
    h.orders.locks.uuid(Uuid::from_u128(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_waits_for_restarts_and_is_bounded() {
    let (h, _file) = node(Node::default().running("a", 1)).await;
    pend(&h, "t", 5, Source::Xml(Zeroizing::new("<no domain>".to_owned()))).await;
    let begun = StdInstant::now();
    h.start_pending(Duration::ZERO).await;
    let took = begun.elapsed();
    // On no record: it is waited for while requests are served.
    assert!(took >= QUICK.unrecorded && took < 2 * QUICK.unrecorded, "{took:?}");
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Success);
    let begun = StdInstant::now();
    h.shutdown(Duration::from_millis(300)).await;
    let took = begun.elapsed();
    assert!(took >= LAST_ATTEMPT && took < Duration::from_secs(2), "{took:?}");

    let (h, _file) = node(Node::default().running("a", 1)).await;
    assert_eq!(reply(&h, Op::Reboot, "a").await, Reply::Success);
    let begun = StdInstant::now();
    h.start_pending(Duration::ZERO).await;
    h.shutdown(Duration::from_secs(5)).await;
    assert!(begun.elapsed() < Duration::from_secs(2));
    assert!(h.orders.restarts.all().is_empty());
    assert!(!h.known.uris[0].is_open(), "a connection is still open");
    let begun = StdInstant::now();
    assert_eq!(reply(&h, Op::Status, "a").await, Reply::Failure);
    assert!(begun.elapsed() < Duration::from_millis(500));
}
