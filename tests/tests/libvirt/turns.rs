//! Tests that leave writes without a process, and tests that no such write may disturb.
//!
//! The kernel's table of locks shows those of all labs. A daemon that has not seen its machine
//! alive takes each orphaned lock for its machine's. That is right on a hypervisor, and makes an
//! `off` fail beside a test that holds such a write. So the two groups take turns: the tests of one
//! group run beside each other, and never beside one of the other group.

use std::sync::{Condvar, Mutex};

use fence_common::sync::{lock, unpoisoned};

/// How many tests of each group run.
static RUNNING: Mutex<[usize; 2]> = Mutex::new([0, 0]);
static CHANGED: Condvar = Condvar::new();

/// The turn of a test's group. Dropping it ends the test's part in it.
#[derive(Debug)]
pub(super) struct Turn(usize);

impl Turn {
    /// For a test that leaves writes without a process. Waits for the tests of the other group.
    #[must_use]
    pub(super) fn to_leave_writes() -> Self {
        Self::of(0)
    }

    /// For a test whose daemon must not find such writes. Waits for the tests of the other group.
    #[must_use]
    pub(super) fn without_writes() -> Self {
        Self::of(1)
    }

    fn of(group: usize) -> Self {
        let mut running = lock(&RUNNING);
        while running[1 - group] > 0 {
            running = unpoisoned(CHANGED.wait(running));
        }
        running[group] += 1;
        Self(group)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&RUNNING)[self.0] -= 1;
        CHANGED.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_groups_take_turns() {
        let (one, other) = (Turn::to_leave_writes(), Turn::to_leave_writes());
        let (told, tells) = mpsc::channel();
        let quiet = std::thread::spawn(move || {
            let turn = Turn::without_writes();
            told.send(()).unwrap();
            drop(turn);
        });
        drop(one);
        assert!(tells.recv_timeout(Duration::from_millis(50)).is_err(), "beside the other group");
        drop(other);
        tells.recv_timeout(Duration::from_secs(60)).unwrap();
        quiet.join().unwrap();
    }
}
