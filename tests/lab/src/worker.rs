//! A thread that works beside a test until it is stopped, or dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};

/// The thread. Dropping it stops it and waits for its end.
#[derive(Debug)]
pub struct Worker {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Worker {
    /// Starts `work`, which ends soon after its argument becomes true.
    pub fn start(work: impl FnOnce(&AtomicBool) -> Result<()> + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || work(&stop)
        });
        Self { stop, thread: Some(thread) }
    }

    /// Whether it has ended by itself.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for its end. An error is the thread's own.
    pub fn wait(&mut self) -> Result<()> {
        self.thread.take().map_or(Ok(()), |thread| thread.join().map_err(|_| anyhow!("a thread panicked"))?)
    }

    /// Stops it and waits for its end. An error is the thread's own.
    pub fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.wait()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
