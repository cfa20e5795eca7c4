//! Threads for calls that block. Each thread owns the connection that its calls go over.
//!
//! tokio's blocking threads would not do. A thread that hangs in a dead hypervisor must neither use
//! up what other hypervisors need nor keep the runtime from ending. And the number of threads
//! bounds the calls in flight to one URI.
//!
//! # How many connections
//!
//! A URI has two pools: one for queries, whose first connection also tells what happens to domains,
//! and one for actions. A client library from 10.4 on serves all calls of a pool over one
//! connection. Up to 10.3 it crashes when threads share a connection (CVE-2024-4418). A thread that
//! waits for an answer polls with a structure on its own stack, a call of another thread interrupts
//! that, and the structure stays registered after its thread has returned. So with an older library
//! each thread has a connection of its own. A thread is started when a call finds no free one, and
//! ends when it has had no call for [`IDLE`].
//!
//! A keepalive probe is sent during calls that take long, and interrupts as well. So with an older
//! library a connection serves no other call after a slow one. Its thread replaces it alone; the
//! others stay.

use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use fence_common::sync::{lock, unpoisoned};

/// Calls of a lane that may wait for a thread. More than any honest cluster asks at a time. The
/// bound keeps a hung URI from eating memory.
const QUEUE_LIMIT: usize = 256;
/// How long a thread stays without a call, if it is not the last one.
const IDLE: Duration = Duration::from_secs(10);
/// How long after a failure the next thread tries to open a connection.
const REFUSED: Duration = Duration::from_secs(5);
/// A connection serves no other call after one that took longer: a keepalive probe may have been
/// sent during it.
const SLOW_CALL: Duration = Duration::from_secs(4);

/// Which threads and connections a call uses. A lane bounds its own calls, so that hung calls in
/// one lane keep nobody in another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Questions of requests. They only read, and must never wait behind a kill.
    Query,
    /// Looks for the table. A look at a domain that libvirt is busy with takes as long as that.
    Look,
    /// Kills and resets that a client waits for.
    Kill,
    /// Starts. They must not wait behind kills of what does not die.
    Start,
    /// Destroys for libvirt's own record. Nobody waits for them.
    Record,
}

impl Lane {
    pub(super) const ALL: [Self; 5] = [Self::Query, Self::Look, Self::Kill, Self::Start, Self::Record];

    /// How many of its calls may be under way at a time. All lanes that change domains stay
    /// together below the 20 workers of a libvirtd. Each call over a remote URI may need a login of
    /// its own.
    pub(crate) fn calls(self, is_remote: bool) -> usize {
        let (local, remote) = match self {
            Self::Query => (6, 3),
            Self::Look => (6, 1),
            Self::Kill => (12, 4),
            Self::Start => (4, 1),
            // No domain of a remote host is killed by its own process.
            Self::Record => (2, 1),
        };
        if is_remote { remote } else { local }
    }

    pub(super) fn asks_only(self) -> bool {
        matches!(self, Self::Query | Self::Look)
    }
}

/// A call. It gets what its thread owns, or nothing if the pool was closed before the call.
pub(super) type Call<C> = Box<dyn FnOnce(Option<&C>) + Send>;

/// Opens, replaces and gives up what the threads own.
pub(super) trait Supply<C>: Send + Sync {
    /// Opens one for a new thread. Can block.
    ///
    /// # Errors
    /// There can be none now: why, for people.
    fn open(&self) -> Result<C, String>;
    /// Replaces one after a slow call or a panic. `None`: its thread ends.
    fn renew(&self, old: &C) -> Option<C>;
    /// Whether it must stay open, used or not.
    fn stays(&self, one: &C) -> bool;
    /// Whether calls may share one. Then slow calls do it no harm.
    fn is_shared(&self) -> bool;
    /// There is none, and none can be opened.
    fn failed(&self);
}

/// A call that waits, and until when it is of any use.
struct Waiting<C> {
    number: u64,
    lane: Lane,
    begin_by: Instant,
    call: Call<C>,
}

struct CallQueue<C> {
    waiting: VecDeque<Waiting<C>>,
    next: u64,
    /// Calls under way, by lane.
    busy: [usize; Lane::ALL.len()],
    threads: usize,
    idle: usize,
    /// Whether a thread is opening: one at a time, so that many calls do not open many at once.
    opening: bool,
    closed: bool,
}

impl<C> CallQueue<C> {
    fn has_room(&self, lane: Lane, is_remote: bool) -> bool {
        self.busy[lane as usize] < lane.calls(is_remote)
    }

    /// Whether calls could begin if there were more threads.
    fn wants_thread(&self, is_remote: bool) -> bool {
        let ready = |lane: Lane| {
            let waiting = self.waiting.iter().filter(|waiting| waiting.lane == lane).count();
            waiting.min(lane.calls(is_remote).saturating_sub(self.busy[lane as usize]))
        };
        !self.closed && !self.opening && Lane::ALL.into_iter().map(ready).sum::<usize>() > self.idle
    }
}

struct SharedPool<C> {
    name: String,
    is_remote: bool,
    supply: Box<dyn Supply<C>>,
    queue: Mutex<CallQueue<C>>,
    news: Condvar,
}

/// The pool. Dropping it lets its threads end after the call that each is in.
pub(super) struct Pool<C: 'static>(Arc<SharedPool<C>>);

/// A queued call.
pub(super) struct Queued<C>(Arc<SharedPool<C>>, u64);

impl<C: 'static> Queued<C> {
    /// Takes the call out of the queue again. `false`: it has begun, or is over.
    pub(super) fn withdraw(self) -> bool {
        let mut queue = self.0.queue();
        let found = queue.waiting.iter().position(|waiting| waiting.number == self.1);
        // Dropped without the lock: nobody knows what a call holds.
        let call = found.and_then(|index| queue.waiting.remove(index));
        drop(queue);
        call.is_some()
    }
}

impl<C: 'static> Pool<C> {
    /// A pool without threads. Linux shows 15 bytes of `name`.
    pub(super) fn new(name: String, is_remote: bool, supply: Box<dyn Supply<C>>) -> Self {
        let busy = [0; Lane::ALL.len()];
        let (waiting, next, threads, idle) = (VecDeque::new(), 0, 0, 0);
        let queue = Mutex::new(CallQueue { waiting, next, busy, threads, idle, opening: false, closed: false });
        Self(Arc::new(SharedPool { name, is_remote, supply, queue, news: Condvar::new() }))
    }

    /// Queues a call for a thread of the pool.
    ///
    /// # Errors
    /// The queue is full.
    pub(super) fn submit(&self, lane: Lane, begin_by: Instant, call: Call<C>) -> Result<Queued<C>, &'static str> {
        let mut queue = self.0.queue();
        let is_full = |queue: &CallQueue<C>| queue.waiting.iter().filter(|it| it.lane == lane).count() >= QUEUE_LIMIT;
        if is_full(&queue) {
            let now = Instant::now();
            queue.waiting.retain(|waiting| waiting.begin_by > now);
            if is_full(&queue) {
                return Err("too many calls wait for it");
            }
        }
        let number = queue.next;
        queue.next += 1;
        queue.waiting.push_back(Waiting { number, lane, begin_by, call });
        self.0.grow(&mut queue);
        drop(queue);
        self.0.news.notify_one();
        Ok(Queued(Arc::clone(&self.0), number))
    }

    /// Whether all of its threads wait for calls.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        let queue = self.0.queue();
        queue.idle == queue.threads && queue.waiting.is_empty() && !queue.opening
    }

    /// Starts a thread before any call needs it.
    pub(super) fn warm(&self) {
        self.0.spawn(&mut self.0.queue());
    }

    /// Has the calling thread serve calls until the pool is dropped. `adopt` gets the pool first.
    pub(super) fn adopt(self, own: C, adopt: impl FnOnce(Self)) {
        let shared = Arc::clone(&self.0);
        shared.queue().threads += 1;
        adopt(self);
        shared.work(own);
    }
}

impl<C: 'static> Drop for Pool<C> {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.closed = true;
        let waiting = std::mem::take(&mut queue.waiting);
        drop(queue);
        self.0.news.notify_all();
        waiting.into_iter().for_each(|waiting| (waiting.call)(None));
    }
}

impl<C: 'static> SharedPool<C> {
    /// The queue, whatever happened to a thread that held it: calls run outside the lock.
    fn queue(&self) -> MutexGuard<'_, CallQueue<C>> {
        lock(&self.queue)
    }

    /// Starts another thread if there is work for it.
    fn grow(self: &Arc<Self>, queue: &mut CallQueue<C>) {
        if queue.wants_thread(self.is_remote) {
            self.spawn(queue);
        }
    }

    fn spawn(self: &Arc<Self>, queue: &mut CallQueue<C>) {
        let shared = Arc::clone(self);
        let open = move || {
            if let Some(own) = shared.open() {
                shared.work(own);
            }
        };
        match thread::Builder::new().name(format!("{}-{}", self.name, queue.threads)).spawn(open) {
            Ok(_) => queue.opening = true,
            Err(error) => {
                tracing::warn!(pool = self.name, %error, "no thread for calls to libvirt");
                if queue.threads == 0 {
                    self.supply.failed();
                }
            }
        }
    }

    /// Opens what a new thread owns. After a failure it tries again while calls wait, and the other
    /// threads live.
    fn open(&self) -> Option<C> {
        loop {
            let opened = self.supply.open();
            let mut queue = self.queue();
            match opened {
                Ok(own) => {
                    queue.opening = false;
                    queue.threads += 1;
                    return Some(own);
                }
                Err(error) if queue.threads > 0 && !queue.closed => {
                    // The server may permit so many connections and no more.
                    tracing::warn!(
                        pool = self.name,
                        error,
                        "libvirt takes no more connections: less can be done there at once"
                    );
                    drop(queue);
                    thread::sleep(REFUSED);
                    queue = self.queue();
                    queue.opening = false;
                    if !queue.wants_thread(self.is_remote) {
                        return None;
                    }
                    queue.opening = true;
                }
                Err(error) => {
                    queue.opening = false;
                    drop(queue);
                    tracing::debug!(pool = self.name, error, "a connection to libvirt fails");
                    self.supply.failed();
                    return None;
                }
            }
        }
    }

    /// A thread's life.
    fn work(self: &Arc<Self>, mut own: C) {
        while let Some(waiting) = self.next(&own) {
            let begun = Instant::now();
            // A bug in one call must not cost the pool a thread. The call's channel is closed then.
            let panicked = panic::catch_unwind(AssertUnwindSafe(|| (waiting.call)(Some(&own)))).is_err();
            if panicked {
                tracing::error!("a libvirt call panicked; this is a bug");
            }
            self.queue().busy[waiting.lane as usize] -= 1;
            if panicked || begun.elapsed() > SLOW_CALL && !self.supply.is_shared() {
                // Another thread may take what waits. After a panic it is not known how far the
                // call has come.
                self.news.notify_one();
                match self.supply.renew(&own) {
                    Some(successor) => own = successor,
                    None => {
                        self.queue().threads -= 1;
                        break;
                    }
                }
            }
        }
        drop(own);
        self.grow(&mut self.queue());
    }

    /// The next call for a thread. `None`: the thread ends, and is counted off.
    fn next(self: &Arc<Self>, own: &C) -> Option<Waiting<C>> {
        let mut queue = self.queue();
        let since = Instant::now();
        loop {
            // The last one waits without a limit, so that it does not wake up for nothing.
            let may_end = queue.threads > 1 && !self.supply.stays(own);
            let is_idle = may_end && since.elapsed() >= IDLE;
            if queue.closed || is_idle && queue.waiting.is_empty() {
                queue.threads -= 1;
                return None;
            }
            let now = Instant::now();
            let ready =
                queue.waiting.iter().position(|it| it.begin_by <= now || queue.has_room(it.lane, self.is_remote));
            if let Some(waiting) = ready.and_then(|index| queue.waiting.remove(index)) {
                if waiting.begin_by > now {
                    queue.busy[waiting.lane as usize] += 1;
                    self.grow(&mut queue);
                    return Some(waiting);
                }
                // Dropped without the lock: nobody knows what a call holds.
                drop(queue);
                drop(waiting);
                queue = self.queue();
                continue;
            }
            queue.idle += 1;
            queue = if may_end {
                let left = IDLE.checked_sub(since.elapsed()).unwrap_or(IDLE);
                unpoisoned(self.news.wait_timeout(queue, left)).0
            } else {
                unpoisoned(self.news.wait(queue))
            };
            queue.idle -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    /// Numbers instead of connections: each opened one is the next.
    #[derive(Clone, Default)]
    struct Numbers(Arc<Counted>);

    #[derive(Default)]
    struct Counted {
        opened: AtomicUsize,
        most: Option<usize>,
        renewed: AtomicUsize,
        failed: AtomicUsize,
    }

    impl Supply<usize> for Numbers {
        fn open(&self) -> Result<usize, String> {
            let number = self.0.opened.fetch_add(1, Ordering::SeqCst);
            if self.0.most.is_some_and(|most| number >= most) { Err("no more".to_owned()) } else { Ok(number) }
        }

        fn renew(&self, _: &usize) -> Option<usize> {
            self.0.renewed.fetch_add(1, Ordering::SeqCst);
            None
        }

        fn stays(&self, _: &usize) -> bool {
            false
        }

        fn is_shared(&self) -> bool {
            false
        }

        fn failed(&self) {
            self.0.failed.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn pool(numbers: &Numbers) -> Pool<usize> {
        Pool::new("t".to_owned(), true, Box::new(numbers.clone()))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn submit(pool: &Pool<usize>, lane: Lane, by: Instant, call: impl FnOnce(usize) + Send + 'static) {
        let call = Box::new(move |own: Option<&usize>| own.copied().map_or((), call));
        assert!(pool.submit(lane, by, call).is_ok());
    }

    /// A gate that calls wait at.
    #[derive(Clone, Default)]
    struct Gate(Arc<(Mutex<bool>, Condvar)>);

    impl Gate {
        fn wait(&self) {
            let open = self.0.0.lock().unwrap();
            drop(self.0.1.wait_while(open, |open| !*open).unwrap());
        }

        fn open(&self) {
            *self.0.0.lock().unwrap() = true;
            self.0.1.notify_all();
        }
    }

    #[test]
    fn calls_run_side_by_side_up_to_their_lanes_bound_each_over_its_own_connection() {
        let (numbers, gate) = (Numbers::default(), Gate::default());
        let pool = pool(&numbers);
        let (started, starts) = mpsc::channel();
        for _ in 0..5 {
            let (started, gate) = (started.clone(), gate.clone());
            submit(&pool, Lane::Query, soon(), move |own| {
                started.send((own, thread::current().id())).unwrap();
                gate.wait();
            });
        }
        let begun: HashSet<_> = (0..3).map(|_| starts.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        assert_eq!(begun.iter().map(|(own, _)| own).collect::<HashSet<_>>().len(), 3, "a connection is shared");
        assert_eq!(begun.iter().map(|(_, thread)| thread).collect::<HashSet<_>>().len(), 3);
        assert!(starts.recv_timeout(Duration::from_millis(50)).is_err(), "a fourth call of a lane of three");
        // Another lane does not wait for that.
        let (done, other) = mpsc::channel();
        submit(&pool, Lane::Look, soon(), move |_| done.send(()).unwrap());
        other.recv_timeout(Duration::from_secs(5)).unwrap();
        gate.open();
        for _ in 0..2 {
            starts.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        assert_eq!(numbers.0.opened.load(Ordering::SeqCst), 4);
    }

    #[test]
    fn one_call_at_a_time_needs_one_connection() {
        let numbers = Numbers::default();
        let pool = pool(&numbers);
        for _ in 0..3 {
            let (done, result) = mpsc::channel();
            submit(&pool, Lane::Query, soon(), move |_| done.send(()).unwrap());
            result.recv_timeout(Duration::from_secs(5)).unwrap();
            while !pool.is_idle() {
                thread::yield_now();
            }
        }
        assert_eq!(numbers.0.opened.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_call_that_waited_too_long_is_never_run() {
        let pool = pool(&Numbers::default());
        let (done, results) = mpsc::channel();
        submit(&pool, Lane::Start, soon(), |_| thread::sleep(Duration::from_millis(80)));
        let late = done.clone();
        submit(&pool, Lane::Start, Instant::now() + Duration::from_millis(10), move |_| late.send("late").unwrap());
        submit(&pool, Lane::Start, soon(), move |_| done.send("in time").unwrap());
        assert_eq!(results.recv_timeout(Duration::from_secs(5)), Ok("in time"));
        assert!(results.try_recv().is_err());
    }

    #[test]
    fn a_call_that_has_not_begun_can_be_withdrawn() {
        let (pool, gate) = (pool(&Numbers::default()), Gate::default());
        let (done, results) = mpsc::channel();
        let (begun, held) = (done.clone(), gate.clone());
        let first = Box::new(move |_: Option<&usize>| {
            begun.send("first").unwrap();
            held.wait();
        });
        let first = pool.submit(Lane::Start, soon(), first).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(results.recv_timeout(Duration::from_secs(5)), Ok("first"));
        let second = Box::new(move |_: Option<&usize>| done.send("second").unwrap());
        let second = pool.submit(Lane::Start, soon(), second).unwrap_or_else(|error| panic!("{error}"));
        assert!(second.withdraw() && !first.withdraw());
        gate.open();
        assert!(results.recv_timeout(Duration::from_secs(5)).is_err(), "it was run all the same");
    }

    #[test]
    fn a_panic_costs_its_connection_and_no_other_call() {
        let numbers = Numbers::default();
        let pool = pool(&numbers);
        submit(&pool, Lane::Start, soon(), |_| panic!("on purpose"));
        let (done, results) = mpsc::channel();
        submit(&pool, Lane::Start, soon(), move |own| done.send(own).unwrap());
        assert_eq!(results.recv_timeout(Duration::from_secs(5)), Ok(1));
        assert_eq!(numbers.0.renewed.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn the_queue_is_bounded_but_makes_room_for_the_living() {
        let pool = pool(&Numbers::default());
        let (release, gate) = mpsc::channel::<()>();
        submit(&pool, Lane::Start, soon(), move |_| assert!(gate.recv().is_err()));
        thread::sleep(Duration::from_millis(50));
        let short = Instant::now() + Duration::from_millis(100);
        for _ in 0..QUEUE_LIMIT {
            submit(&pool, Lane::Start, short, |_| {});
        }
        assert!(pool.submit(Lane::Start, soon(), Box::new(|_| {})).is_err());
        thread::sleep(Duration::from_millis(120));
        submit(&pool, Lane::Start, soon(), |_| {});
        drop(release);
    }

    #[test]
    fn a_failed_connection_pauses_and_the_others_serve() {
        let numbers = Numbers(Arc::new(Counted { most: Some(1), ..Counted::default() }));
        let pool = pool(&numbers);
        let (done, results) = mpsc::channel();
        for _ in 0..2 {
            let done = done.clone();
            submit(&pool, Lane::Query, soon(), move |own| {
                thread::sleep(Duration::from_millis(50));
                done.send(own).unwrap();
            });
        }
        assert_eq!([(); 2].map(|()| results.recv_timeout(Duration::from_secs(5))), [Ok(0), Ok(0)]);
        assert!(numbers.0.opened.load(Ordering::SeqCst) <= 2);
        assert_eq!(numbers.0.failed.load(Ordering::SeqCst), 0, "one connection is there");
    }

    #[test]
    fn calls_end_with_a_pool_that_cannot_connect() {
        let numbers = Numbers(Arc::new(Counted { most: Some(0), ..Counted::default() }));
        let pool = pool(&numbers);
        let (done, results) = mpsc::channel();
        let call = Box::new(move |own: Option<&usize>| done.send(own.copied()).unwrap());
        assert!(pool.submit(Lane::Query, soon(), call).is_ok());
        let begun = Instant::now();
        while numbers.0.failed.load(Ordering::SeqCst) == 0 && begun.elapsed() < Duration::from_secs(5) {
            thread::yield_now();
        }
        assert_eq!(numbers.0.failed.load(Ordering::SeqCst), 1);
        drop(pool);
        assert_eq!(results.recv_timeout(Duration::from_secs(5)), Ok(None));
    }

    #[test]
    fn actions_leave_libvirtd_workers_free() {
        let acts = |is_remote| {
            let lanes = Lane::ALL.into_iter().filter(|lane| !lane.asks_only());
            lanes.map(|lane| lane.calls(is_remote)).sum::<usize>()
        };
        assert!(acts(false) < 20);
        assert!(acts(true) <= 6, "logins");
    }
}
