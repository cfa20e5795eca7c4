//! A bounded pool of plain threads for calls that block.
//!
//! Own threads, and not tokio's blocking ones: a thread that hangs in a dead hypervisor must neither use up what other
//! hypervisors need nor keep the runtime from ending, and a pool's size is what bounds the calls in flight to one URI.
//! Threads are started as they are needed.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Calls that may wait for a thread. More than any honest cluster asks at a time; a bound keeps a hung URI from eating memory.
const QUEUE_LIMIT: usize = 256;

/// A call.
pub(crate) type Call = Box<dyn FnOnce() + Send>;

/// A call that waits, and until when it is of any use.
struct Waiting {
    begin_by: Instant,
    call: Call,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    threads: usize,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    news: Condvar,
}

/// The pool. Dropping it lets its threads end after the call that each is in.
pub(crate) struct Pool {
    name: String,
    size: usize,
    shared: Arc<Shared>,
}

impl Pool {
    /// A pool of at most `size` threads.
    pub(crate) fn new(name: String, size: usize) -> Self {
        Self { name, size, shared: Arc::default() }
    }

    /// Queues a call. It is dropped without being run if no thread takes it up before `begin_by`.
    ///
    /// # Errors
    /// A reason if the queue is full, or if no thread could be started at all.
    pub(crate) fn submit(&self, begin_by: Instant, call: Call) -> Result<(), &'static str> {
        let mut queue = lock(&self.shared);
        if queue.waiting.len() >= QUEUE_LIMIT {
            let now = Instant::now();
            queue.waiting.retain(|waiting| waiting.begin_by > now);
            if queue.waiting.len() >= QUEUE_LIMIT {
                return Err("too many calls wait for it");
            }
        }
        if queue.idle <= queue.waiting.len() && queue.threads < self.size {
            let shared = Arc::clone(&self.shared);
            // Linux shows the first 15 bytes.
            let spawned =
                thread::Builder::new().name(format!("{}-{}", self.name, queue.threads)).spawn(move || work(&shared));
            match spawned {
                Ok(_) => queue.threads += 1,
                Err(_) if queue.threads > 0 => {}
                Err(_) => return Err("no thread could be started for it"),
            }
        }
        queue.waiting.push_back(Waiting { begin_by, call });
        drop(queue);
        self.shared.news.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut queue = lock(&self.shared);
        queue.closed = true;
        queue.waiting.clear();
        drop(queue);
        self.shared.news.notify_all();
    }
}

/// The queue, whatever happened to a thread that held it: calls run outside the lock, so it is whole.
fn lock(shared: &Shared) -> MutexGuard<'_, Queue> {
    shared.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A thread's life.
fn work(shared: &Shared) {
    loop {
        let mut queue = lock(shared);
        let waiting = loop {
            if queue.closed {
                return;
            }
            if let Some(waiting) = queue.waiting.pop_front() {
                break waiting;
            }
            queue.idle += 1;
            queue = shared.news.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        };
        drop(queue);
        if waiting.begin_by > Instant::now() {
            // A bug in one call must not cost the pool a thread; whoever waits for the call sees its channel closed.
            if panic::catch_unwind(AssertUnwindSafe(|| (waiting.call)())).is_err() {
                tracing::error!("a libvirt call panicked; this is a bug");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::sync::mpsc;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn calls_run_side_by_side_up_to_the_size() {
        let pool = Pool::new("t".to_owned(), 3);
        let (started, starts) = mpsc::channel();
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        for _ in 0..5 {
            let (started, gate) = (started.clone(), Arc::clone(&gate));
            let call = Box::new(move || {
                started.send(thread::current().id()).unwrap();
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
            });
            pool.submit(soon(), call).unwrap();
        }
        let threads: HashSet<_> = (0..3).map(|_| starts.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        assert_eq!(threads.len(), 3);
        assert!(starts.recv_timeout(Duration::from_millis(50)).is_err(), "a fourth call ran on three threads");
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        for _ in 0..2 {
            starts.recv_timeout(Duration::from_secs(5)).unwrap();
        }
    }

    #[test]
    fn a_call_that_waited_too_long_is_never_run() {
        let pool = Pool::new("t".to_owned(), 1);
        let (done, results) = mpsc::channel();
        pool.submit(soon(), Box::new(|| thread::sleep(Duration::from_millis(80)))).unwrap();
        let late = done.clone();
        pool.submit(Instant::now() + Duration::from_millis(10), Box::new(move || late.send("late").unwrap())).unwrap();
        pool.submit(soon(), Box::new(move || done.send("in time").unwrap())).unwrap();
        assert_eq!(results.recv_timeout(Duration::from_secs(5)), Ok("in time"));
        assert!(results.try_recv().is_err());
    }

    #[test]
    fn a_panic_costs_no_thread() {
        let pool = Pool::new("t".to_owned(), 1);
        pool.submit(soon(), Box::new(|| panic!("on purpose"))).unwrap();
        let (done, results) = mpsc::channel();
        pool.submit(soon(), Box::new(move || done.send(()).unwrap())).unwrap();
        results.recv_timeout(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn the_queue_is_bounded_but_makes_room_for_the_living() {
        let pool = Pool::new("t".to_owned(), 1);
        let (release, gate) = mpsc::channel::<()>();
        pool.submit(soon(), Box::new(move || assert!(gate.recv().is_err()))).unwrap();
        thread::sleep(Duration::from_millis(50));
        let short = Instant::now() + Duration::from_millis(100);
        for _ in 0..QUEUE_LIMIT {
            pool.submit(short, Box::new(|| {})).unwrap();
        }
        assert!(pool.submit(soon(), Box::new(|| {})).is_err());
        thread::sleep(Duration::from_millis(120));
        pool.submit(soon(), Box::new(|| {})).unwrap();
        drop(release);
    }
}
