//! When what happened after a cluster was broken.

use std::fmt;
use std::time::Duration;

use fence_common::wire::Op;

use super::watch::{Event, Seen};

/// A step on the way from the break to a whole cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The survivor's Pacemaker says that something is wrong.
    Noticed,
    /// Its request is on the wire.
    Asked,
    /// The victim's last process is dead.
    Dead,
    /// The reply of success is on the wire.
    Replied,
    /// The service runs again.
    Started,
    /// The survivor has the fenced node back.
    Back,
}

impl Phase {
    /// All, in their order.
    pub const ALL: [Self; 6] = [Self::Noticed, Self::Asked, Self::Dead, Self::Replied, Self::Started, Self::Back];

    /// For people.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Noticed => "noticed",
            Self::Asked => "fence sent",
            Self::Dead => "dead",
            Self::Replied => "replied",
            Self::Started => "service up",
            Self::Back => "node back",
        }
    }
}

/// The phases' times after the break; a phase that there was none of is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    /// Which node died first.
    pub victim: usize,
    /// How many deaths there were.
    pub deaths: usize,
    times: [Option<Duration>; 6],
}

impl Timeline {
    pub(super) fn of(begun: Duration, seen: &[Seen], victim: usize) -> Self {
        let survivor = 1 - victim;
        let died = seen.iter().find(|one| one.event == Event::Died(victim)).map(|one| one.at);
        let time = |phase| {
            let is_it = |one: &&Seen| match phase {
                Phase::Noticed => one.event == Event::Noticed(survivor),
                Phase::Asked => {
                    matches!(&one.event, Event::Asked { by, op: Op::Off | Op::Reboot, .. } if *by == survivor)
                }
                Phase::Dead => one.event == Event::Died(victim),
                Phase::Replied => {
                    one.event == Event::Replied { to: survivor, byte: 0 } && died.is_some_and(|died| one.at >= died)
                }
                Phase::Started => matches!(one.event, Event::Started(_)),
                Phase::Back => one.event == Event::Returned(survivor) && died.is_some_and(|died| one.at >= died),
            };
            seen.iter().find(is_it).map(|one| one.at.saturating_sub(begun))
        };
        let mut times = Phase::ALL.map(time);
        // A node that fences on request has noticed nothing before.
        if times[Phase::Noticed as usize] > times[Phase::Asked as usize] {
            times[Phase::Noticed as usize] = None;
        }
        let deaths = seen.iter().filter(|one| matches!(one.event, Event::Died(_))).count();
        Self { victim, deaths, times }
    }

    /// A timeline with these times, for reports about it.
    #[must_use]
    pub fn new(times: [Option<Duration>; 6]) -> Self {
        Self { victim: 0, deaths: 1, times }
    }

    /// How long after the break a phase was.
    #[must_use]
    pub fn get(&self, phase: Phase) -> Option<Duration> {
        self.times[phase as usize]
    }
}

impl fmt::Display for Timeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let told = Phase::ALL.into_iter().filter_map(|phase| Some((phase.title(), self.get(phase)?)));
        let told: Vec<_> = told.map(|(title, time)| format!("{title} {:.2} s", time.as_secs_f64())).collect();
        f.write_str(&told.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_the_first_events_of_their_kind() {
        let at = |millis, event| Seen { at: Duration::from_millis(millis), event };
        let asked = |by, op| Event::Asked { by, op, domain: "d".to_owned() };
        let seen = [
            at(1010, asked(1, Op::DevStatus)),
            at(1011, Event::Replied { to: 1, byte: 0 }),
            at(1100, Event::Noticed(1)),
            at(1200, asked(0, Op::Reboot)),
            at(1300, asked(1, Op::Reboot)),
            at(1302, Event::Died(0)),
            at(1303, Event::Replied { to: 1, byte: 0 }),
            at(1900, Event::Started(1)),
        ];
        let timeline = Timeline::of(Duration::from_secs(1), &seen, 0);
        let times = Phase::ALL.map(|phase| timeline.get(phase).map(|time| time.as_millis()));
        assert_eq!(times, [Some(100), Some(300), Some(302), Some(303), Some(900), None]);
    }
}
