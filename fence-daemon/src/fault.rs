//! Fault points: steps of a request at which a test lets the daemon die, as by the OOM killer or an
//! administrator's SIGKILL. At one of them only a thread stands still, as by a bug.
//!
//! They exist only with the feature `fault-points`, which only `fence-daemon-faults` enables, never
//! a release. Without it a step is a call of an empty function.

#[cfg(all(feature = "fault-points", not(debug_assertions)))]
compile_error!("the feature `fault-points` is for tests: it must not be in a release");

/// A step. The daemon dies at the step that the environment variable `FENCE_FAULT` names, in small
/// letters with `-`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "fault-points", derive(strum::AsRefStr), strum(serialize_all = "kebab-case"))]
pub(crate) enum Point {
    /// The request is right and new.
    AfterVerify,
    /// The peer has taken the callback.
    AfterConnect,
    /// The peer has proven that it has the key.
    AfterAuthentication,
    /// The request is claimed, in memory.
    AfterClaim,
    /// The claim is on disk.
    AfterNote,
    /// The record for the restart by the next daemon is on disk.
    AfterRecord,
    /// libvirt was asked to destroy the domain.
    AfterDestroy,
    /// SIGKILL was sent to the domain's process.
    AfterKill,
    /// The domain is proven dead.
    AfterProof,
    /// The answer is about to be sent.
    BeforeReply,
    /// The answer was sent.
    AfterReply,
    /// The domain is about to be started again.
    BeforeRestart,
    /// The domain was started again; that is not on record yet.
    AfterRestart,
    /// The loop that serves requests has taken one. The loop stands still, and nothing else does.
    InTheLoop,
}

#[cfg(feature = "fault-points")]
impl Point {
    /// Whether the daemon is to die here, or to stand still.
    fn is_the_end(self) -> bool {
        std::env::var_os("FENCE_FAULT").is_some_and(|name| name == self.as_ref())
    }
}

/// A step was reached.
#[cfg(feature = "fault-points")]
pub(crate) fn point(point: Point) {
    if point.is_the_end() {
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        // The thread goes no step further, however long the signal takes.
        loop {
            std::thread::park();
        }
    }
}

/// A step was reached.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub(crate) fn point(_: Point) {}

/// A step was reached at which this thread alone stands still.
#[cfg(feature = "fault-points")]
pub(crate) fn standstill(point: Point) {
    while point.is_the_end() {
        std::thread::park();
    }
}

/// A step was reached.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub(crate) fn standstill(_: Point) {}

/// Another thread has taken over the work. If the daemon is to die after that work, this waits for
/// it.
#[cfg(feature = "fault-points")]
pub(crate) async fn point_elsewhere(at: Point) {
    if at.is_the_end() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    point(at);
}

/// Something was handed to another thread.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
#[allow(clippy::unused_async, reason = "it waits where the feature is on")]
pub(crate) async fn point_elsewhere(_: Point) {}
