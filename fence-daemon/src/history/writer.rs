//! The thread that writes the history.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;
use std::time::Duration;

use fence_common::verdict::Verdict;
use fence_control::history::{Asked, Event, FILE, FILE_MAX, OLD_FILE, Record, UnsignedSender, parse};
use fence_control::report::Steps;

use super::unfinished::{Begun, unfinished};
use super::unix_ms;
use crate::clock::Moment;
use crate::observe::requests::Recent;
use crate::observe::sources::RejectedView;
use crate::state::file::LineFile;

/// How many requests may wait to be written: some hundred kilobytes.
const WAITING: usize = 1024;
/// The stack of the thread, all of which may be locked in memory.
const STACK: usize = 128 << 10;
/// How many senders without a signature are named at once.
const SENDERS_MAX: usize = 16;
/// The longest text about an outcome, in characters.
const DETAIL_MAX: usize = 1000;

enum Noted {
    Ended(Box<Recent>),
    Unsigned(Vec<RejectedView>),
    /// All before it are to be written.
    Flush(SyncSender<()>),
}

/// The history of this daemon. Clones write to the same file.
#[derive(Clone)]
pub struct History {
    queue: SyncSender<Noted>,
    lost: Arc<AtomicU64>,
}

impl History {
    /// Starts the thread. It opens the file in `directory`, creates both if need be, and adds what
    /// an earlier daemon has `begun` and not finished. While it cannot, the log says why, and it
    /// tries again with each line. The caller waits for no disk.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start(directory: PathBuf, begun: Vec<Begun>) -> io::Result<Self> {
        let writer = Writer { directory, begun, started: unix_ms(Moment::now()), file: None, failed: false };
        let (queue, waiting) = sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let thread = thread::Builder::new().name("fence-history".to_owned()).stack_size(STACK);
        thread.spawn(move || writer.follow(&waiting, &counted))?;
        Ok(Self { queue, lost })
    }

    /// A request has ended. Never waits.
    pub fn ended(&self, recent: Recent) {
        self.send(Noted::Ended(Box::new(recent)));
    }

    /// Requests of these senders were rejected. Those without a signature are named. Never waits.
    pub fn unsigned(&self, senders: &[RejectedView]) {
        let unsigned = senders.iter().filter(|one| one.verdict == Verdict::Unsigned).take(SENDERS_MAX);
        self.send(Noted::Unsigned(unsigned.cloned().collect()));
    }

    fn send(&self, message: Noted) {
        match self.queue.try_send(message) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits until all lines are written, but no longer than this.
    pub fn flush(&self, limit: Duration) {
        let (written, all_written) = sync_channel(1);
        if self.queue.try_send(Noted::Flush(written)).is_ok() {
            let _ = all_written.recv_timeout(limit);
        }
    }
}

struct Writer {
    directory: PathBuf,
    /// Until the file is open: what an earlier daemon has begun.
    begun: Vec<Begun>,
    /// When this daemon started, in milliseconds since 1970.
    started: u64,
    file: Option<Numbered>,
    /// Whether the last attempt failed, and the log says so.
    failed: bool,
}

/// The file, and the number of its next line.
struct Numbered {
    lines: LineFile,
    next: u64,
}

impl Writer {
    fn follow(mut self, waiting: &Receiver<Noted>, lost: &AtomicU64) {
        if let Err(error) = self.write(Vec::new()) {
            self.complain(&error);
        }
        while let Ok(first) = waiting.recv() {
            let (mut events, mut flushed) = (Vec::new(), Vec::new());
            let mut next = Ok(first);
            while let Ok(message) = next {
                match message {
                    Noted::Ended(recent) => events.extend(request(*recent)),
                    Noted::Unsigned(senders) => events.extend(senders.into_iter().map(unsigned)),
                    Noted::Flush(written) => flushed.push(written),
                }
                next = if events.len() < WAITING { waiting.try_recv() } else { Err(TryRecvError::Empty) };
            }
            let number = u64::try_from(events.len()).unwrap_or(u64::MAX);
            let count = lost.swap(0, Ordering::Relaxed);
            if count > 0 {
                events.push((unix_ms(Moment::now()), Event::Lost { count }));
            }
            match self.write(events) {
                Ok(()) => self.failed = false,
                Err(error) => {
                    lost.fetch_add(count.saturating_add(number), Ordering::Relaxed);
                    self.complain(&error);
                }
            }
            for written in flushed {
                let _ = written.send(());
            }
        }
    }

    /// Logs why lines are not written, once until they are again.
    fn complain(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            let directory = self.directory.display();
            tracing::warn!(
                "no history in {directory}: {error} (is the disk full? see `history_directory`); fencing goes on"
            );
        }
    }

    /// Writes these events as lines, and waits until they are on the disk.
    fn write(&mut self, events: Vec<(u64, Event)>) -> io::Result<()> {
        match &mut self.file {
            Some(file) => file.write(events),
            None => {
                let mut file = self.open()?;
                file.write(events)?;
                self.file = Some(file);
                self.begun = Vec::new();
                Ok(())
            }
        }
    }

    /// Opens the file, and writes what happened until this daemon started.
    fn open(&self) -> io::Result<Numbered> {
        let (lines, found) = LineFile::open(&self.directory, FILE, OLD_FILE, FILE_MAX)?;
        let records = parse(&found);
        let next = records.last().map_or(1, |last| last.id.saturating_add(1));
        let mut file = Numbered { lines, next };
        let unfinished = unfinished(&self.begun, &records).into_iter();
        let mut events: Vec<_> = unfinished.map(|(at, one)| (at, Event::Unfinished(one))).collect();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        events.push((self.started, Event::Started { version, pid: std::process::id() }));
        file.write(events)?;
        Ok(file)
    }
}

impl Numbered {
    fn write(&mut self, events: Vec<(u64, Event)>) -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut next = self.next;
        for (time_unix_ms, event) in events {
            serde_json::to_writer(&mut bytes, &Record { id: next, time_unix_ms, event })?;
            bytes.push(b'\n');
            next += 1;
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.lines.append(&bytes)?;
        self.next = next;
        self.lines.sync()
    }
}

fn request(recent: Recent) -> Option<(u64, Event)> {
    let (ended, result, mut detail) = recent.end?;
    if let Some((at, _)) = detail.char_indices().nth(DETAIL_MAX) {
        detail.truncate(at);
    }
    let arrived = recent.steps.arrived;
    let after = |moment: Moment| u64::try_from(moment.since(arrived).as_micros()).unwrap_or(u64::MAX);
    let steps = Steps {
        verified_us: after(recent.steps.verified),
        called_back_us: recent.steps.called_back.map(after),
        dead_us: recent.steps.dead.map(after),
        replied_us: recent.steps.replied.map(after),
        ended_us: Some(after(ended)),
    };
    let asked = Asked {
        op: recent.op.name().to_owned(),
        domain: recent.domain,
        client: recent.client,
        seqno: recent.seqno,
        via: recent.via.to_string(),
        listener: recent.listener,
        result: result.name().to_owned(),
        detail,
        steps,
    };
    Some((unix_ms(arrived), Event::Request(asked)))
}

fn unsigned(view: RejectedView) -> (u64, Event) {
    let mac = view.mac.map(|mac| mac.map(|byte| format!("{byte:02x}")).join(":"));
    let sender = UnsignedSender { address: view.address.to_string(), mac, count: view.count };
    (unix_ms(view.last_seen), Event::Unsigned(sender))
}

#[cfg(test)]
mod tests {
    use fence_common::ending::Ending;
    use fence_common::wire::Op;
    use fence_control::history::read;
    use tempfile::tempdir;

    use super::*;
    use crate::observe::requests::Via;
    use crate::observe::steps;

    const SURELY: Duration = Duration::from_secs(60);

    fn recent(number: u64) -> Recent {
        let (arrived, verified) = (Moment::now(), Moment::now());
        let (called_back, dead, replied) = (None, None, None);
        Recent {
            number,
            op: Op::Off,
            domain: Some("node\\n1".to_owned()),
            client: "192.168.122.11:1229".to_owned(),
            seqno: 7,
            via: Via::Kernel,
            listener: None,
            steps: steps::Steps { arrived, verified, called_back, dead, replied },
            end: Some((Moment::now(), Ending::NoCallback, "refused".to_owned())),
        }
    }

    #[test]
    fn each_request_is_a_line_and_numbers_go_on_with_the_next_daemon() {
        let directory = tempdir().unwrap();
        let start = || History::start(directory.path().to_owned(), Vec::new()).unwrap();
        let first = start();
        first.flush(SURELY);
        assert!(LineFile::open(directory.path(), FILE, OLD_FILE, 10).is_err(), "two daemons write one file");
        (0..3).for_each(|number| first.ended(recent(number)));
        let (address, mac) = (std::net::IpAddr::from([192, 168, 122, 13]).into(), Some([2; 6]));
        let (verdict, last_seen) = (Verdict::Unsigned, Moment::now());
        let sender = RejectedView { address, mac, verdict, count: 5, last_seen };
        first.unsigned(&[RejectedView { verdict: Verdict::Source, ..sender.clone() }, sender]);
        first.flush(SURELY);
        drop(first);
        let kind = |record: &Record| match &record.event {
            Event::Started { .. } => "started".to_owned(),
            Event::Request(asked) => asked.result.clone(),
            Event::Unsigned(sender) => sender.mac.clone().unwrap_or_default(),
            Event::Unfinished(_) | Event::Lost { .. } => "another".to_owned(),
        };
        let records = read(directory.path()).unwrap();
        let kinds: Vec<_> = records.iter().map(kind).collect();
        assert_eq!(kinds, ["started", "no callback", "no callback", "no callback", "02:02:02:02:02:02"]);
        // The thread lets go of the file when it notices the end.
        let begun = std::time::Instant::now();
        while let Err(error) = LineFile::open(directory.path(), FILE, OLD_FILE, 10) {
            assert!(begun.elapsed() < SURELY, "{error}");
        }
        let second = start();
        second.ended(recent(0));
        second.flush(SURELY);
        let records = read(directory.path()).unwrap();
        assert!(records.iter().map(|record| record.id).eq(1..=7), "{records:?}");
    }

    #[test]
    fn a_disk_that_takes_nothing_is_counted_and_tried_again() {
        let directory = tempdir().unwrap();
        let in_the_way = directory.path().join("history");
        std::fs::create_dir(&in_the_way).unwrap();
        let history = History::start(directory.path().to_owned(), Vec::new()).unwrap();
        history.ended(recent(1));
        history.flush(SURELY);
        assert_eq!(history.lost.load(Ordering::Relaxed), 1);
        std::fs::remove_dir(&in_the_way).unwrap();
        history.ended(recent(2));
        history.flush(SURELY);
        let kinds: Vec<_> = read(directory.path()).unwrap().into_iter().map(|record| record.event).collect();
        assert!(matches!(kinds[..], [Event::Started { .. }, Event::Request(_), Event::Lost { count: 1 }]), "{kinds:?}");
        assert_eq!(history.lost.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_the_daemon_before_has_not_finished_comes_before_the_start() {
        let directory = tempdir().unwrap();
        let start = |begun| {
            let history = History::start(directory.path().to_owned(), begun).unwrap();
            history.flush(SURELY);
        };
        start(Vec::new());
        let mut request = <fence_common::wire::Request as zerocopy::FromZeros>::new_zeroed();
        request.seqno = 9.into();
        let begun = Begun { at: Moment::now(), id: fence_common::ledger::RequestId::of(Op::Off, &request) };
        let since = std::time::Instant::now();
        while let Err(error) = LineFile::open(directory.path(), FILE, OLD_FILE, 10) {
            assert!(since.elapsed() < SURELY, "{error}");
        }
        start(vec![begun]);
        let kinds: Vec<_> = read(directory.path()).unwrap().into_iter().map(|record| record.event).collect();
        let [Event::Started { .. }, Event::Unfinished(one), Event::Started { .. }] = &kinds[..] else {
            panic!("{kinds:?}")
        };
        assert_eq!((one.op.as_str(), one.seqno), ("off", 9));
    }
}
