//! One scan for many questions.
//!
//! Each question gets a scan that has begun after it. All questions that come during a scan share
//! the next one, so a hundred fences at once take few scans. A lone question is never kept waiting.

use std::iter;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, SendError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use fence_common::sync::lock;
use tokio::sync::oneshot;

use super::super::driver::Driver;
use super::super::victim::Victim;
use super::Whom;
use super::scan::{self, Look, Readers, ScanMemory};

/// How long the next scan waits after one that served several questions, in multiples of its time.
/// In a storm of fences each scan serves many, and leaves the processors to the dying.
const REST: u32 = 3;
/// The longest such wait.
const REST_MAX: Duration = Duration::from_millis(10);

/// Whose processes are asked for, and where the answer goes.
type HostQuestion = (Vec<Whom>, oneshot::Sender<Arc<Look>>);

/// Has a thread of its own scan.
#[derive(Debug)]
pub(super) struct Scanner {
    /// Where processes are found: `/proc`.
    root: PathBuf,
    /// Whose domains run here.
    drivers: Vec<Driver>,
    memory: Arc<ScanMemory>,
    /// The way to the thread. It ends when this is dropped.
    thread: Mutex<Option<mpsc::Sender<HostQuestion>>>,
}

impl Scanner {
    pub(super) fn new(root: &Path, drivers: Vec<Driver>) -> Self {
        Self { root: root.to_owned(), drivers, memory: Arc::default(), thread: Mutex::default() }
    }

    /// Has scans know what this machine is while it dies. A container has its command line no
    /// longer than a machine, but is found by its control group.
    pub(super) fn note_dying(&self, whom: &Whom, victim: &Arc<Victim>) {
        if whom.driver == Driver::Qemu {
            self.memory.dying.note(whom.uuid, victim);
        }
    }

    /// Asks the thread, and starts it if there is none. The question is dropped if there can be
    /// none.
    pub(super) fn ask(&self, wanted: Vec<Whom>, answer: oneshot::Sender<Arc<Look>>) {
        let mut thread = lock(&self.thread);
        let question = match thread.as_ref() {
            Some(thread) => thread.send((wanted, answer)),
            None => Err(SendError((wanted, answer))),
        };
        let Err(SendError(question)) = question else { return };
        let (asked, questions) = mpsc::channel();
        // Cannot fail: the other end is here.
        let _ = asked.send(question);
        let (root, drivers, memory) = (self.root.clone(), self.drivers.clone(), Arc::clone(&self.memory));
        let answer_all = move || answer_all(&root, &drivers, &memory, &questions);
        let spawned = thread::Builder::new().name("host-look".to_owned()).spawn(answer_all);
        *thread = spawned.is_ok().then_some(asked);
    }
}

/// Scans whenever there are questions, for as long as there may be.
fn answer_all(root: &Path, drivers: &[Driver], memory: &Arc<ScanMemory>, questions: &mpsc::Receiver<HostQuestion>) {
    let mut readers = Readers::default();
    let mut not_before = Instant::now();
    while let Ok(first) = questions.recv() {
        thread::sleep(not_before.saturating_duration_since(Instant::now()));
        let begun = Instant::now();
        let (wanted, answers): (Vec<_>, Vec<_>) = iter::once(first).chain(questions.try_iter()).unzip();
        // A question without domains is about all. Else only the drivers that matter are read.
        let of_all = wanted.iter().any(Vec::is_empty);
        let wanted: Vec<Whom> = wanted.into_iter().flatten().collect();
        let is_asked = |driver: &Driver| of_all || wanted.iter().any(|whom| whom.driver == *driver);
        let drivers: Vec<_> = drivers.iter().copied().filter(is_asked).collect();
        let look = Arc::new(scan::scan(root, &drivers, wanted, of_all, memory, &mut readers));
        if answers.len() > 1 {
            not_before = Instant::now() + REST_MAX.min(begun.elapsed() * REST);
        }
        for answer in answers {
            // Fails only if the question was given up.
            let _ = answer.send(Arc::clone(&look));
        }
    }
}
