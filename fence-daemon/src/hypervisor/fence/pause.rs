//! How long a domain stays off in a reboot, at least, counted from its proven death.
//!
//! A cluster learns by silence that a healthy node has ended. If the node is back before the others
//! have missed it, they take it in first, and only then take over its services. How long they take
//! to miss it is the cluster's to say. So the pause is the administrator's choice.

use std::time::Duration;

use crate::clock::Moment;

/// The earliest moment at which a domain may be started again that died at `died`. If that is not
/// known, the pause is counted from now, which is later.
pub(crate) fn end(pause: Duration, died: Option<Moment>) -> Moment {
    let now = Moment::now();
    died.map_or(now, |died| died.min(now)).plus(pause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_counted_from_the_death_and_never_from_later_than_now() {
        let pause = Duration::from_secs(40);
        let died = Moment::now().before(Duration::from_secs(30));
        assert_eq!(end(pause, Some(died)), died.plus(pause));
        for unknown in [None, Some(Moment::from_ktime(u64::MAX))] {
            let earliest = Moment::now().plus(pause);
            let end = end(pause, unknown);
            assert!(earliest <= end && end <= Moment::now().plus(pause));
        }
    }
}
