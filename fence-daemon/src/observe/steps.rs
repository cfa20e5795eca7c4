//! The times of a request's steps.

use std::fmt;

use crate::clock::Moment;

/// When a request passed each step. A step that it did not reach is `None`.
#[derive(Clone, Copy, Debug)]
pub struct Steps {
    /// The kernel program saw the datagram, or the socket returned it.
    pub arrived: Moment,
    /// User space knew it as verified.
    pub verified: Moment,
    /// The callback was connected and authenticated.
    pub called_back: Option<Moment>,
    /// The victim was proven dead.
    pub dead: Option<Moment>,
    /// The answer was handed to the kernel.
    pub replied: Option<Moment>,
}

impl Steps {
    /// The time between two moments, printed as the steps are.
    #[must_use]
    pub fn elapsed(from: Moment, to: Moment) -> Elapsed {
        Elapsed(Some(to.since(from).as_micros()))
    }

    /// A step's time since the arrival.
    #[must_use]
    pub fn since_arrival(&self, step: Option<Moment>) -> Elapsed {
        Elapsed(step.map(|moment| moment.since(self.arrived).as_micros()))
    }
}

/// Microseconds since the arrival, printed like `2087us`; `-` for a step that was not taken.
#[derive(Clone, Copy, Debug)]
pub struct Elapsed(Option<u128>);

impl fmt::Display for Elapsed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(micros) => write!(f, "{micros}us"),
            None => f.write_str("-"),
        }
    }
}
