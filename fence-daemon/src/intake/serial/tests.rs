//! The listener against UNIX sockets that the tests listen at, as QEMU does.

use fence_common::rate_limit::Limits;
use fence_common::wire::Op;
use fence_config::SerialMode;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;

use super::super::arrivals::Arrivals;
use super::super::keyring::Keyring;
use super::super::line::AtLine;
use super::super::replay_cache::ReplayCache;
use super::super::request::Waits;
use super::*;
use crate::observe::requests::Via;

const SOON: Duration = Duration::from_secs(20);
/// How long is waited for what must not come.
const QUIET: Duration = Duration::from_millis(300);

/// What "libvirt" says.
#[derive(Clone)]
struct Said {
    ports: Arc<Mutex<Vec<Port>>>,
    /// Whether a port is still its domain's.
    confirms: Arc<Mutex<bool>>,
    news: watch::Sender<()>,
}

impl Ports for Said {
    fn all(&self) -> Vec<Port> {
        lock(&self.ports).clone()
    }

    async fn is_there(&self, _: &Port) -> bool {
        *lock(&self.confirms)
    }

    fn news(&self) -> watch::Receiver<()> {
        self.news.subscribe()
    }
}

/// A host with lines, and a daemon that listens.
struct LinesHost {
    folder: TempDir,
    said: Said,
    intake: Arc<LineIntake>,
    arrivals: Arrivals,
    _inlet: Inlet,
}

impl LinesHost {
    fn new(limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        let settings = Serial { name: None, path, mode: SerialMode::Serial, uri: None, everyone: false };
        let judge = Judge::new(Keyring::new(None));
        let judge = judge.rate_limited(limits, Arc::new(ReplayCache::none(Duration::from_secs(1))));
        let (ports, confirms) = (Arc::default(), Arc::new(Mutex::new(true)));
        let said = Said { ports, confirms, news: watch::Sender::default() };
        let arrivals = Arrivals::default();
        let mut inlet = arrivals.inlets().inlet();
        let intake = LineIntake::start(settings, judge, said.clone(), &mut inlet);
        Self { folder, said, intake, arrivals, _inlet: inlet }
    }

    /// A domain begins to run. Returns where its QEMU listens.
    fn start(&self, name: &str) -> UnixListener {
        let path = self.folder.path().join(name);
        let qemu = UnixListener::bind(&path).unwrap();
        lock(&self.said.ports).push(Port { path, uuid: of(name), name: name.to_owned() });
        self.said.news.send_replace(());
        qemu
    }

    async fn next(&mut self) -> (Verified, AtLine) {
        match timeout(SOON, self.arrivals.next()).await.unwrap().split() {
            (request, Waits::OnLine(line)) => (request, line),
            (request, waits) => panic!("{request:?} {waits:?}"),
        }
    }

    fn counted(&self, verdict: Verdict) -> u64 {
        let mut one = Counters::default();
        one.count(verdict);
        let (name, _) = one.iter().find(|(_, count)| *count == 1).unwrap();
        self.intake.counters().iter().find(|(counter, _)| *counter == name).unwrap().1
    }

    async fn is_quiet(&mut self) -> bool {
        timeout(QUIET, self.arrivals.next()).await.is_err()
    }
}

fn of(name: &str) -> uuid::Uuid {
    uuid::Uuid::from_slice(format!("{name:_<16}").as_bytes()).unwrap()
}

async fn accept(qemu: &UnixListener) -> UnixStream {
    timeout(SOON, qemu.accept()).await.unwrap().unwrap().0
}

fn request(op: Op, domain: &str, seqno: u32) -> Vec<u8> {
    let mut bytes = [&b"abba"[..], &[op.to_wire(), 0], domain.as_bytes()].concat();
    bytes.resize(70, 0);
    bytes.extend(seqno.to_le_bytes());
    bytes
}

async fn received(guest: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    timeout(SOON, guest.read_exact(&mut bytes)).await.unwrap().unwrap();
    bytes
}

#[tokio::test]
async fn a_request_is_found_in_other_output_and_names_its_domain() {
    let mut host = LinesHost::new(Limits::default());
    let qemu = host.start("node1");
    let mut guest = accept(&qemu).await;
    guest.write_all(b"[    0.000000] Linux\r\nlogin: a").await.unwrap();
    guest.write_all(&request(Op::Off, "node2", 7)).await.unwrap();
    let (asked, line) = host.next().await;
    assert_eq!((asked.op(), asked.seqno(), asked.via()), (Op::Off, 7, Via::Serial));
    assert_eq!(asked.target().unwrap().to_string(), "node2");
    assert_eq!(asked.who().domain.unwrap(), &Vouched { name: "node1".to_owned(), uuid: of("node1") });
    line.reply(&[0]).await.unwrap();
    assert_eq!(received(&mut guest, 6).await, b"\0abba\0");
    let line = host.intake.lines().remove(0);
    assert_eq!((line.domain.as_str(), line.trouble, line.stray), ("node1", None, 30));
    assert_eq!(host.counted(Verdict::Delivered), 1);
}

#[tokio::test]
async fn only_the_newest_client_of_a_line_is_answered() {
    let mut host = LinesHost::new(Limits::default());
    let (one, two) = (host.start("node1"), host.start("node2"));
    let (mut first, mut second) = (accept(&one).await, accept(&two).await);
    first.write_all(&request(Op::Off, "x", 1)).await.unwrap();
    let (_, old) = host.next().await;
    second.write_all(&request(Op::Off, "x", 2)).await.unwrap();
    let (_, elsewhere) = host.next().await;
    first.write_all(&request(Op::Status, "y", 3)).await.unwrap();
    let (_, new) = host.next().await;
    assert!(old.reply(&[0]).await.is_err(), "its client is gone, and another one would believe it");
    new.reply(&[2]).await.unwrap();
    assert_eq!(received(&mut first, 6).await, b"\0abba\x02");
    elsewhere.reply(&[3]).await.unwrap();
    assert_eq!(received(&mut second, 6).await, b"\0abba\x03");
}

#[tokio::test]
async fn a_line_that_ends_is_connected_again_and_one_of_no_domain_is_not_served() {
    let mut host = LinesHost::new(Limits::default());
    let qemu = host.start("node1");
    drop(accept(&qemu).await);
    let mut guest = accept(&qemu).await;
    guest.write_all(&request(Op::Status, "x", 1)).await.unwrap();
    host.next().await;
    // Its domain ends, and libvirt no longer vouches for what listens there.
    *lock(&host.said.confirms) = false;
    drop(guest);
    let mut stranger = accept(&qemu).await;
    stranger.write_all(&request(Op::Off, "x", 2)).await.unwrap();
    assert!(host.is_quiet().await, "nobody vouches for who asks");
    lock(&host.said.ports).clear();
    host.said.news.send_replace(());
    timeout(SOON, async {
        while !host.intake.lines().is_empty() {
            sleep(AGAIN).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn sockets_elsewhere_are_left_alone() {
    let mut host = LinesHost::new(Limits::default());
    let elsewhere = tempfile::tempdir().unwrap();
    let path = elsewhere.path().join("console");
    let other = UnixListener::bind(&path).unwrap();
    lock(&host.said.ports).push(Port { path, uuid: of("other"), name: "other".to_owned() });
    let qemu = host.start("node1");
    let mut guest = accept(&qemu).await;
    guest.write_all(&request(Op::Status, "x", 1)).await.unwrap();
    host.next().await;
    assert!(timeout(QUIET, other.accept()).await.is_err(), "somebody else's socket");
}

#[tokio::test]
async fn a_guest_that_never_reads_holds_up_nobody_and_is_cut_off() {
    let mut host = LinesHost::new(Limits::default());
    let (one, two) = (host.start("deaf"), host.start("node2"));
    let (mut deaf, mut honest) = (accept(&one).await, accept(&two).await);
    deaf.write_all(&request(Op::HostList, "", 1)).await.unwrap();
    let (_, line) = host.next().await;
    let writing = tokio::spawn(async move { line.reply(&vec![1; 64 << 20]).await });
    honest.write_all(&request(Op::Status, "x", 2)).await.unwrap();
    let (_, line) = host.next().await;
    line.reply(&[0]).await.unwrap();
    assert_eq!(received(&mut honest, 6).await, b"\0abba\0");
    assert!(timeout(SOON, writing).await.unwrap().unwrap().is_err(), "nobody reads it");
    // Half an answer is on the line, so it is connected again.
    let mut deaf = accept(&one).await;
    deaf.write_all(&request(Op::Status, "x", 3)).await.unwrap();
    assert_eq!(host.next().await.0.seqno(), 3);
}

#[tokio::test]
async fn each_domain_has_a_budget_of_its_own() {
    let limits = Limits { deliveries: fence_common::rate_limit::Limit::per_second(1, 3), ..Limits::default() };
    let mut host = LinesHost::new(limits);
    let (one, two) = (host.start("loud"), host.start("node2"));
    let (mut loud, mut honest) = (accept(&one).await, accept(&two).await);
    let many: Vec<u8> = (0..100).flat_map(|seqno| request(Op::Status, "x", seqno)).collect();
    loud.write_all(&many).await.unwrap();
    for _ in 0..3 {
        assert_eq!(host.next().await.0.who().domain.unwrap().name, "loud");
    }
    honest.write_all(&request(Op::Status, "x", 7)).await.unwrap();
    let served = async { while host.next().await.0.who().domain.unwrap().name == "loud" {} };
    timeout(SOON, served).await.unwrap();
    // A long line is read in pieces.
    timeout(SOON, async {
        while host.counted(Verdict::DeliveryLimit) < 50 {
            sleep(REST).await;
        }
    })
    .await
    .unwrap();
}
