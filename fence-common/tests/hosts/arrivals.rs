//! Copies of a machine that are on their way in by migration: their end proves nothing.

use fence_common::hosts::{ActEnd, GroupAnswer, HostsOptions, HostsRule, LocalState, NoAnswer};
use fence_common::wire::Op;

use crate::group::Group;
use crate::rules::{failure, named};

/// A machine migrates, and its source is lost before this life of the other host has heard of it.
/// The copy that came in is gone when it is to be killed. Returns the answer.
fn answer_beside_an_arrival(broken: Option<HostsRule>) -> Option<GroupAnswer> {
    let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1], options);
    group.join(&[0]);
    group.seats[0].state = LocalState::Arriving;
    group.ask(0, Op::Off)
}

#[test]
fn a_copy_that_comes_in_is_no_machine_that_was_killed() {
    let named_arrival = |answer| {
        let reason = failure(answer).to_string();
        reason.starts_with("host0 cannot tell") && reason.contains("on its way in")
    };
    assert!(named_arrival(answer_beside_an_arrival(None)));
    // Nothing was there to be killed, and the source goes on with it.
    assert_eq!(answer_beside_an_arrival(Some(HostsRule::ArrivalsWait)), Some(GroupAnswer::Success));
    // The source has the machine, and kills it. It may have arrived before.
    let mut group = Group::of(&[0, 1]);
    group.runs_at(1);
    group.seats[0].state = LocalState::Arriving;
    assert!(named_arrival(group.ask(1, Op::Off)));
    assert_eq!(group.seats.iter().map(|seat| seat.acts.len()).collect::<Vec<_>>(), [0, 1]);
}

/// A host finds a machine, and its act ends so. The other host, which may be the source of a
/// migration, is lost or has the machine. Returns the answer, and how often each host has acted.
fn answer_after(
    state: &LocalState,
    end: &ActEnd,
    source: Option<LocalState>,
    broken: Option<HostsRule>,
) -> (Option<GroupAnswer>, [usize; 2]) {
    let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1], options);
    group.join(if source.is_some() { &[0, 1] } else { &[0] });
    (group.seats[0].state, group.seats[0].end) = (state.clone(), Some(end.clone()));
    group.seats[1].state = source.unwrap_or(LocalState::NotHere);
    let answer = group.ask(0, Op::Off);
    (answer, [group.seats[0].acts.len(), group.seats[1].acts.len()])
}

#[test]
fn an_act_that_may_have_killed_only_a_copy_needs_the_word_of_all() {
    let broken = Some(HostsRule::GoneIsNoProof);
    for (state, end) in [(LocalState::MayBeArriving, ActEnd::ProvenOff), (LocalState::RunsHere, ActEnd::Gone)] {
        let (answer, acts) = answer_after(&state, &end, None, None);
        assert_eq!((failure(answer), acts), (NoAnswer::Unproven(named("host1")), [1, 0]));
        assert_eq!(answer_after(&state, &end, None, broken).0, Some(GroupAnswer::Success), "{state:?}");
        // The other host is there, and says that it has no machine, or kills it.
        for (source, acts) in [(LocalState::NotHere, [1, 0]), (LocalState::RunsHere, [1, 1])] {
            assert_eq!(answer_after(&state, &end, Some(source), None), (Some(GroupAnswer::Success), acts));
        }
        let (answer, _) = answer_after(&state, &end, Some(LocalState::CannotTell("it leaves".into())), None);
        assert!(matches!(failure(answer), NoAnswer::CannotTell { host, .. } if host == named("host1")));
    }
    // A reboot would start it beside its source.
    let mut group = Group::of(&[0, 1]);
    group.seats[0].state = LocalState::MayBeArriving;
    assert!(matches!(failure(group.ask(0, Op::Reboot)), NoAnswer::CannotTell { host, .. } if host == named("host0")));
    assert_eq!(group.seats[0].acts, []);
}
