//! Sends log lines from a thread of their own: the destination may hang, and no request may wait
//! for it.
//!
//! A full pipe, a stopped terminal, a syslog daemon on a dead disk: logs are among the first to
//! stand still on a host in trouble. That is also when guests are fenced. Lines that find no room
//! are dropped and counted, and the next line tells the count.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// How many lines may wait: some hundred kilobytes.
const WAITING: usize = 2048;

/// The relay of this process, which is flushed at its end.
static RELAY: OnceLock<Relay> = OnceLock::new();

/// What takes whole lines, each with its level. It returns whether it has taken the line.
pub(super) type Sink = Box<dyn Fn(Level, &[u8]) -> bool + Send>;
/// Makes a line of a warning.
pub(super) type Warning = fn(&str) -> Vec<u8>;

enum Message {
    Line(Level, Vec<u8>),
    /// All before it were written.
    Flush(SyncSender<()>),
}

/// Takes lines, and never waits.
#[derive(Clone)]
pub(super) struct Relay {
    messages: SyncSender<Message>,
    lost: Arc<AtomicU64>,
}

/// A line in the making. Dropping it sends it.
pub(super) struct Line<'r> {
    relay: &'r Relay,
    level: Level,
    bytes: Vec<u8>,
}

impl Relay {
    /// Starts the thread that writes to `sink`. A `warning` there reports lost lines.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(sink: Sink, warning: Warning) -> io::Result<Self> {
        let (messages, waiting) = sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        thread::Builder::new().name("fence-log".to_owned()).spawn(move || {
            // Writing takes none. A thread that keeps them writes all the same.
            let none = CapabilitySet::empty();
            let _ = set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none });
            write(&waiting, &counted, &sink, warning);
        })?;
        Ok(Self { messages, lost })
    }

    /// Makes this relay the one that [`flush`] empties.
    pub(super) fn keep(&self) {
        // There is no second one: see `logging::init`.
        let _ = RELAY.set(self.clone());
    }

    pub(super) fn send(&self, level: Level, bytes: Vec<u8>) {
        match self.messages.try_send(Message::Line(level, bytes)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn flush(&self, limit: Duration) {
        let (written, all_written) = sync_channel(1);
        if self.messages.try_send(Message::Flush(written)).is_ok() {
            // The destination may hang: then the remaining lines are lost with the process.
            let _ = all_written.recv_timeout(limit);
        }
    }
}

/// Waits until all lines are written, but no longer than this.
pub fn flush(limit: Duration) {
    if let Some(relay) = RELAY.get() {
        relay.flush(limit);
    }
}

fn write(waiting: &Receiver<Message>, lost: &AtomicU64, sink: &Sink, warning: Warning) {
    while let Ok(message) = waiting.recv() {
        let is_taken = match message {
            Message::Line(level, bytes) => sink(level, &bytes),
            Message::Flush(written) => {
                let _ = written.send(());
                true
            }
        };
        let count = lost.swap(0, Ordering::Relaxed) + u64::from(!is_taken);
        let tell = || warning(&format!("{count} messages were dropped here: the log's reader did not take them"));
        if count > 0 && !sink(Level::WARN, &tell()) {
            lost.fetch_add(count, Ordering::Relaxed);
        }
    }
}

impl<'w> MakeWriter<'w> for Relay {
    type Writer = Line<'w>;

    fn make_writer(&'w self) -> Line<'w> {
        Line { relay: self, level: Level::INFO, bytes: Vec::new() }
    }

    fn make_writer_for(&'w self, about: &Metadata<'_>) -> Line<'w> {
        Line { relay: self, level: *about.level(), bytes: Vec::new() }
    }
}

impl io::Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        if !self.bytes.is_empty() {
            self.relay.send(self.level, std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::sync::{Mutex, MutexGuard};

    type Shared<T> = Arc<Mutex<T>>;

    /// A relay to a list, which takes lines only while nobody holds the gate.
    fn relay() -> (Relay, Shared<()>, Shared<Vec<String>>) {
        let (gate, lines) = (Shared::default(), Shared::default());
        let (passing, taken): (_, Shared<Vec<String>>) = (Arc::clone(&gate), Arc::clone(&lines));
        let sink = move |level: Level, bytes: &[u8]| {
            let _gate = passing.lock().unwrap();
            taken.lock().unwrap().push(format!("{level} {}", String::from_utf8_lossy(bytes)));
            true
        };
        (Relay::start(Box::new(sink), |text| text.as_bytes().to_vec()).unwrap(), gate, lines)
    }

    fn lines(lines: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
        lines.lock().unwrap()
    }

    #[test]
    fn lines_arrive_whole_and_in_order() {
        let (relay, _, taken) = relay();
        for number in 0..3 {
            let mut line = relay.make_writer();
            write!(line, "line {number}").unwrap();
            writeln!(line, " ends").unwrap();
        }
        relay.flush(Duration::from_secs(20));
        assert_eq!(*lines(&taken), ["INFO line 0 ends\n", "INFO line 1 ends\n", "INFO line 2 ends\n"]);
    }

    #[test]
    fn lines_that_the_destination_refuses_are_counted_until_it_takes_one() {
        let (refusals, taken) = (AtomicU64::new(4), Shared::<Vec<String>>::default());
        let list = Arc::clone(&taken);
        let sink = move |_: Level, bytes: &[u8]| {
            let refuses = refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if refuses.is_err() {
                list.lock().unwrap().push(String::from_utf8_lossy(bytes).into_owned());
            }
            refuses.is_err()
        };
        let relay = Relay::start(Box::new(sink), |text| text.as_bytes().to_vec()).unwrap();
        for line in ["one", "two", "three"] {
            relay.send(Level::INFO, line.into());
        }
        relay.flush(Duration::from_secs(20));
        // Refused: one, the warning, two, the warning.
        let told = "2 messages were dropped here: the log's reader did not take them";
        assert_eq!(*lines(&taken), ["three", told]);
    }

    #[test]
    fn a_hanging_destination_delays_nobody_and_lost_lines_are_counted() {
        let (relay, gate, taken) = relay();
        let held = gate.lock().unwrap();
        for _ in 0..WAITING + 100 {
            relay.send(Level::INFO, b"a line".to_vec());
        }
        relay.flush(Duration::from_millis(10));
        assert!(lines(&taken).is_empty());
        drop(held);
        let in_a_while = std::time::Instant::now() + Duration::from_secs(20);
        let told = |taken: &Mutex<Vec<String>>| lines(taken).iter().position(|line| line.contains("were dropped here"));
        while told(&taken).is_none() && std::time::Instant::now() < in_a_while {
            thread::sleep(Duration::from_millis(5));
        }
        let position = told(&taken).unwrap();
        let line = lines(&taken)[position].clone();
        // The hanging destination holds at most one line.
        assert!(line.starts_with("WARN 99 messages") || line.starts_with("WARN 100 messages"), "{line}");
    }
}
