//! Several hosts in one process: real drivers and machines, libvirt's in-process test driver, and a
//! group in memory with one order of messages.

use std::io::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fence_common::domain_state::{RUNNING, SHUT_OFF};
use fence_common::key::Key;
use fence_common::keys::{KeyPair, Keys};
use fence_common::ledger::RequestId;
use fence_common::sync::lock;
use fence_common::target::Target;
use fence_common::wire::{Op, Reply, Request};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;
use zerocopy::FromZeros;

use super::driver::{Parts, start};
use super::handle::{Election, Hosts};
use super::local::Verdict;
use super::transport::{Departure, Event, HostNode, Member, SendError, Transport};
use crate::clock::Moment;
use crate::hypervisor::{Deadline, Hypervisors};
use crate::policy::Authorized;

/// How long a certain event may take on a loaded machine.
const SURELY: Duration = Duration::from_secs(20);

/// A group in memory: each message reaches all members in one order.
#[derive(Clone, Default)]
struct Bus(Arc<Mutex<Daemons>>);

/// Each daemon, and where its events go.
type Daemons = Vec<(Member, mpsc::Sender<Event>)>;

impl Bus {
    fn say_all(&self, event: &Event) {
        for (_, to) in lock(&self.0).iter() {
            let _ = to.try_send(event.clone());
        }
    }

    fn say_members(&self, left: &[(Member, Departure)]) {
        let all: Vec<_> = lock(&self.0).iter().map(|(member, _)| *member).collect();
        self.say_all(&Event::Members { all, left: left.to_vec() });
    }

    /// A daemon joins a group whose configured hosts are these nodes.
    fn join(&self, member: Member, nodes: u32, events: mpsc::Sender<Event>) {
        let host = |node| HostNode { node, name: Some(format!("host{node}")), address: None };
        let first = [Event::Joined(member), Event::Configured((1..=nodes).map(host).collect())];
        first.into_iter().for_each(|event| events.try_send(event).unwrap());
        lock(&self.0).push((member, events));
        self.say_ring(true);
        self.say_members(&[]);
    }

    /// A daemon is gone, for whatever reason.
    fn lose(&self, node: u32) {
        let mut gone = Vec::new();
        lock(&self.0).retain(|(member, _)| {
            if member.node == node {
                gone.push((*member, Departure::HostLost));
            }
            member.node != node
        });
        self.say_ring(true);
        self.say_members(&gone);
    }

    /// A ring of the hosts with a daemon.
    fn say_ring(&self, quorate: bool) {
        let ring = lock(&self.0).iter().map(|(member, _)| member.node).collect();
        self.say_all(&Event::Quorum { quorate, ring });
    }
}

/// One daemon's way to the group.
#[derive(Clone)]
struct OnBus(Bus, Member);

impl Transport for OnBus {
    async fn send(&self, bytes: Vec<u8>, _: Moment) -> Result<(), SendError> {
        let Self(bus, from) = self;
        let members = lock(&bus.0);
        if !members.iter().any(|(member, _)| member == from) {
            return Err(SendError::NotJoined);
        }
        for (_, to) in members.iter() {
            let sent_after = Some(Moment::now());
            let _ = to.try_send(Event::Message { from: *from, sent_after, bytes: bytes.clone() });
        }
        Ok(())
    }
}

/// A host with libvirt's test driver.
struct OneHost {
    hosts: Hosts,
    hypervisors: Hypervisors,
    noted: Arc<Mutex<Vec<RequestId>>>,
    events: mpsc::Sender<Event>,
    _dir: TempDir,
}

/// What a test starts a host with.
struct Start<'a> {
    node: u32,
    /// Names of the domains that run there. Each has the same UUID on all hosts.
    domains: &'a [&'a str],
    key: &'a str,
    recent: Vec<RequestId>,
}

impl<'a> Start<'a> {
    fn of(node: u32, domains: &'a [&'a str]) -> Self {
        Self { node, domains, key: "the key of all hosts", recent: Vec::new() }
    }

    async fn run(self, bus: &Bus, nodes: u32) -> OneHost {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.xml");
        let domain = |name: &&str| {
            format!(
                "<domain type='test'><name>{name}</name><uuid>{}</uuid><memory>1024</memory><os><type>hvm</type></os></domain>",
                uuid(name)
            )
        };
        let xml: String = self.domains.iter().map(domain).collect();
        write!(std::fs::File::create(&file).unwrap(), "<node>{xml}</node>").unwrap();
        let hypervisors = Hypervisors::start(&[format!("test://{}", file.display())], fence_config::Options::default());
        timeout(SURELY, hypervisors.wait_connected()).await.unwrap();
        hypervisors.filled_within(SURELY).await;
        let (events, taken) = mpsc::channel(100_000);
        let noted = Arc::<Mutex<Vec<RequestId>>>::default();
        let notes = Arc::clone(&noted);
        let keys = Arc::new(Keys::from(KeyPair::from(Key::new(self.key.as_bytes()).unwrap())));
        let member = Member { node: self.node, pid: 100 + self.node };
        let parts = Parts {
            hypervisors: hypervisors.clone(),
            keys: Box::new(move || Arc::clone(&keys)),
            recent: self.recent,
            note: Box::new(move |id| lock(&notes).push(id)),
            has_fencing: false,
            incarnation: [u8::try_from(self.node).unwrap(); 16],
        };
        let hosts = start(OnBus(bus.clone(), member), taken, parts);
        bus.join(member, nodes, events.clone());
        OneHost { hosts, hypervisors, noted, events, _dir: dir }
    }
}

impl OneHost {
    async fn order(&self, op: Op, domain: &str, seqno: u32) -> Verdict {
        let order = Authorized::dangerous_for_test(op, Target::parse(domain.as_bytes()).unwrap());
        let deadline = Deadline::at(Instant::now() + Duration::from_secs(10));
        let id = id(op, domain, seqno);
        timeout(SURELY, self.hosts.carry_out(&self.hypervisors, &order, id, None, &deadline)).await.unwrap()
    }

    async fn reply(&self, op: Op, domain: &str, seqno: u32) -> Reply {
        self.order(op, domain, seqno).await.reply
    }

    /// Whether the domain runs on this host.
    async fn runs(&self, domain: &str) -> bool {
        let listing = self.hypervisors.list().await;
        listing.domains.iter().any(|listed| listed.name == domain && listed.state == RUNNING)
    }
}

fn uuid(name: &str) -> Uuid {
    Uuid::from_u128(name.bytes().fold(0x4000_8000, |all, byte| all * 256 + u128::from(byte)))
}

fn id(op: Op, domain: &str, seqno: u32) -> RequestId {
    let mut request = Request::new_zeroed();
    request.seqno = seqno.into();
    request.domain[..domain.len()].copy_from_slice(domain.as_bytes());
    RequestId::of(op, &request)
}

/// Hosts with these domains, when each has heard all others.
async fn cluster(domains: &[&[&str]]) -> (Bus, Vec<OneHost>) {
    let bus = Bus::default();
    let nodes = u32::try_from(domains.len()).unwrap();
    let mut all = Vec::new();
    for (node, domains) in (1..).zip(domains) {
        all.push(Start::of(node, domains).run(&bus, nodes).await);
    }
    wait_heard(&all, domains.len()).await;
    (bus, all)
}

/// Waits until each of these hosts has heard so many.
async fn wait_heard(all: &[OneHost], of: usize) {
    let heard = |one: &OneHost| one.hosts.view().hosts.iter().filter(|host| host.heard.is_some()).count();
    let tells = |one: &OneHost| one.hosts.view().hosts.iter().filter(|host| host.version.is_some()).count();
    let begun = Instant::now();
    while !all.iter().all(|one| heard(one) >= of && tells(one) >= of) {
        assert!(begun.elapsed() < SURELY, "{:?}", all.iter().map(|one| one.hosts.view()).collect::<Vec<_>>());
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_carried_out_where_the_domain_runs() {
    let (_bus, all) = cluster(&[&["one"], &["two"], &[]]).await;
    // HostsQuestion at each host in turn, also by UUID.
    let two = uuid("two").to_string();
    assert_eq!(all[0].reply(Op::Status, "two", 1).await, Reply::Success);
    assert_eq!(all[2].reply(Op::Status, &two, 2).await, Reply::Success);
    let fenced = all[2].order(Op::Off, &two, 3).await;
    assert!(fenced.reply == Reply::Success && fenced.proven_off.is_some(), "{fenced:?}");
    assert!(!all[1].runs("two").await && all[0].runs("one").await);
    for (seqno, host) in (4..).zip(&all) {
        assert_eq!(host.reply(Op::Status, "two", seqno).await, Reply::Off);
        assert_eq!(host.reply(Op::Off, "two", 10 + seqno).await, Reply::Success, "off already, by all hosts");
    }
    assert_eq!(all[0].reply(Op::On, "two", 20).await, Reply::Success);
    assert!(all[1].runs("two").await);
    let reboot = all[0].order(Op::Reboot, "one", 21).await;
    assert!(reboot.reply == Reply::Success && reboot.detail.contains("starting again"), "{reboot:?}");
    // The host that acts has written it down first.
    assert!(lock(&all[1].noted).contains(&id(Op::Off, &two, 3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_called_off_on_a_guess() {
    let (bus, all) = cluster(&[&["one"], &["two"], &["three"]]).await;
    let unknown = all[0].order(Op::Off, "nobody", 1).await;
    assert!(unknown.reply == Reply::Failure && !unknown.is_known, "{unknown:?}");
    assert_eq!(all[0].reply(Op::Off, "three", 2).await, Reply::Success);
    // A host is silent: what ran there, and what may run there, is not off.
    bus.lose(3);
    for (op, domain, seqno) in [(Op::Off, "three", 3), (Op::Status, "three", 4), (Op::On, "three", 5)] {
        let verdict = all[0].order(op, domain, seqno).await;
        assert!(verdict.reply == Reply::Failure && verdict.detail.contains("host3"), "{verdict:?}");
    }
    // What runs on a host that is there is fenced all the same.
    assert_eq!(all[0].reply(Op::Off, "two", 6).await, Reply::Success);
    assert!(!all[1].runs("two").await);
    // Without quorum nobody acts.
    bus.say_ring(false);
    let verdict = all[1].order(Op::Off, "one", 7).await;
    assert!(verdict.reply == Reply::Failure && verdict.detail.contains("quorum"), "{verdict:?}");
    assert!(all[0].runs("one").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_domain_that_runs_twice_is_killed_twice() {
    let (_bus, all) = cluster(&[&["one"], &["one"]]).await;
    assert_eq!(all[0].reply(Op::Off, "one", 1).await, Reply::Success);
    assert!(!all[0].runs("one").await && !all[1].runs("one").await);
    // It is defined on both, and started on one.
    assert_eq!(all[1].reply(Op::On, "one", 2).await, Reply::Success);
    assert!(all[0].runs("one").await ^ all[1].runs("one").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_all_hosts_or_is_none() {
    let (bus, all) = cluster(&[&["one"], &["two"]]).await;
    let by = || Instant::now() + Duration::from_secs(5);
    assert_eq!(all[0].reply(Op::Off, "two", 1).await, Reply::Success);
    let (ran, ended) = (("one", RUNNING, "host1 (node 1)".to_owned()), ("two", SHUT_OFF, "host2 (node 2)".to_owned()));
    // The list shows the end as soon as the host itself tells it.
    for number in 100.. {
        assert!(number < 400, "the host does not tell that its domain ended");
        let list = all[0].hosts.list(id(Op::HostList, "", number), by()).await.unwrap();
        let listed: Vec<_> =
            list.iter().map(|one| (one.domain.name.as_str(), one.domain.state, one.hosts.join(" "))).collect();
        if listed == [ran.clone(), ended.clone()] {
            break;
        }
        assert_eq!(listed, [ran.clone(), ("two", RUNNING, "host2 (node 2)".to_owned())]);
        sleep(Duration::from_millis(20)).await;
    }
    all[1].hosts.monitor(id(Op::DevStatus, "", 3), by()).await.unwrap();
    bus.lose(2);
    let no_list = all[0].hosts.list(id(Op::HostList, "", 4), by()).await.unwrap_err();
    let unwell = all[0].hosts.monitor(id(Op::DevStatus, "", 5), by()).await.unwrap_err();
    assert!(no_list.contains("host2") && unwell.contains("host2"), "{no_list}; {unwell}");
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_one_host_calls_a_client_back() {
    let (_bus, all) = cluster(&[&[], &[], &[]]).await;
    let request = id(Op::Off, "one", 1);
    let by = Instant::now() + Duration::from_millis(700);
    let elections = all.iter().map(|host| host.hosts.elect(request, by));
    let mut ours = 0;
    // Kept: an end without a word elects another one.
    let mut kept = Vec::new();
    for election in together(elections).await {
        match election {
            Election::Won(mut elected) => {
                elected.reached();
                ours += 1;
                kept.push(elected);
            }
            Election::Lost => {}
            Election::Open => panic!("all hosts are there"),
        }
    }
    assert_eq!(ours, 1);
}

/// Awaits all at once.
async fn together<F: Future<Output: Send> + Send>(all: impl Iterator<Item = F>) -> Vec<F::Output> {
    let mut pinned: Vec<_> = all.map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(move |context| {
        let mut is_pending = false;
        for (future, output) in &mut pinned {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    std::task::Poll::Ready(done) => *output = Some(done),
                    std::task::Poll::Pending => is_pending = true,
                }
            }
        }
        if is_pending {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(pinned.iter_mut().filter_map(|(_, output)| output.take()).collect())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_with_another_key_is_not_understood_and_named() {
    let bus = Bus::default();
    let one = Start::of(1, &["one"]).run(&bus, 2).await;
    let other = Start { key: "another key", ..Start::of(2, &["two"]) }.run(&bus, 2).await;
    let differs = |host: &OneHost, node| {
        let view = host.hosts.view();
        view.hosts.iter().any(|host| host.node == node && host.key_agrees == Some(false))
    };
    let begun = Instant::now();
    while !differs(&one, 2) || !differs(&other, 1) {
        assert!(begun.elapsed() < SURELY, "{:?} {:?}", one.hosts.view(), other.hosts.view());
        sleep(Duration::from_millis(5)).await;
    }
    let verdict = one.order(Op::Off, "two", 1).await;
    assert_eq!(verdict.reply, Reply::Failure, "{verdict:?}");
    assert!(other.runs("two").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_daemon_has_done_is_not_done_again() {
    let bus = Bus::default();
    let request = id(Op::Off, "two", 7);
    let one = Start::of(1, &["one"]).run(&bus, 2).await;
    let two = Start { recent: vec![request], ..Start::of(2, &["two"]) }.run(&bus, 2).await;
    let all = [one, two];
    wait_heard(&all, 2).await;
    let again = all[0].order(Op::Off, "two", 7).await;
    assert!(again.reply == Reply::Failure && all[1].runs("two").await, "{again:?}");
    assert_eq!(all[0].reply(Op::Off, "two", 8).await, Reply::Success, "another request");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_corosync_only_what_runs_here_is_fenced() {
    let (bus, all) = cluster(&[&["one"], &["two"]]).await;
    bus.lose(1);
    all[0].events.send(Event::Lost("corosync has ended".to_owned())).await.unwrap();
    let begun = Instant::now();
    while all[0].hosts.view().ours.is_some() {
        assert!(begun.elapsed() < SURELY);
        sleep(Duration::from_millis(5)).await;
    }
    let verdict = all[0].order(Op::Off, "two", 1).await;
    let says_why = verdict.detail.contains("corosync has ended");
    assert!(verdict.reply == Reply::Failure && says_why, "{verdict:?}");
    assert_eq!(all[0].reply(Op::Status, "one", 2).await, Reply::Success);
    assert_eq!(all[0].reply(Op::Off, "one", 3).await, Reply::Success);
    assert!(!all[0].runs("one").await && all[1].runs("two").await);
    // It is off here, and may run on another host.
    for (op, seqno) in [(Op::Off, 4), (Op::Status, 5), (Op::On, 6), (Op::Reboot, 7)] {
        assert_eq!(all[0].reply(op, "one", seqno).await, Reply::Failure, "{}", op.name());
    }
    let by = Instant::now() + Duration::from_secs(5);
    assert!(all[0].hosts.list(id(Op::HostList, "", 8), by).await.is_err());
    assert!(matches!(all[0].hosts.elect(id(Op::Off, "one", 9), by).await, Election::Open));
}
