//! Ctrl-C and its like for programs that keep a lab up. While the lab rests, a signal is only
//! noted, so that the program ends in order. Before that, the first signal ends the process, and
//! the lab's guardian cleans up.

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// What has come so far.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    resting: Arc<AtomicBool>,
    came: Arc<AtomicBool>,
}

impl Interrupt {
    /// Begins to wait for signals. Call it before any other thread exists, because threads inherit
    /// the mask.
    pub fn watch() -> Result<Self> {
        let interrupt = Self::default();
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        signals.thread_block().context("blocking signals")?;
        let theirs = interrupt.clone();
        std::thread::spawn(move || {
            while signals.wait().is_ok() {
                if !theirs.resting.load(Ordering::SeqCst) || theirs.came.swap(true, Ordering::SeqCst) {
                    let _ = writeln!(std::io::stdout(), "\ninterrupted: the lab is being removed");
                    std::process::exit(130);
                }
            }
        });
        Ok(interrupt)
    }

    /// From now on the first one is only noted.
    pub fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
    }

    /// Whether one was noted.
    #[must_use]
    pub fn came(&self) -> bool {
        self.came.load(Ordering::SeqCst)
    }
}
