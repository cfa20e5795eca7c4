//! One rule at a time, where nothing else goes wrong.

use std::time::Duration;

use fence_common::hosts::{
    ActEnd, GroupAnswer, HostDomain, HostNames, HostsOptions, HostsRule, LocalState, Look, NoAnswer, NoMessage,
};
use fence_common::target::Target;
use fence_common::wire::Op;
use uuid::Uuid;

use crate::driver::node;
use crate::group::{Group, SECOND, keys, request};
use crate::world::{NAME, UUID};

pub(crate) fn failure(answer: Option<GroupAnswer>) -> NoAnswer {
    match answer {
        Some(GroupAnswer::Failure(reason)) => reason,
        other => panic!("no failure: {other:?}"),
    }
}

pub(crate) fn named(host: &str) -> HostNames {
    HostNames(vec![host.to_owned()])
}

#[test]
fn the_owner_acts_and_proves_by_name_and_by_uuid() {
    for target in [Target::Name(NAME.into()), Target::Uuid(UUID)] {
        let mut group = Group::of(&[0, 1, 2]);
        group.runs_at(2);
        assert_eq!(group.ask_of(0, Op::Off, request(Op::Off, 1), target), Some(GroupAnswer::Success));
        let acts: Vec<_> = group.seats.iter().map(|seat| seat.acts.len()).collect();
        assert_eq!(acts, [0, 0, 1]);
    }
}

#[test]
fn both_of_two_that_run_it_are_killed_and_one_is_started_again() {
    let mut group = Group::of(&[0, 1, 2]);
    group.runs_at(1);
    group.runs_at(2);
    group.seats[2].end = None;
    assert_eq!(group.ask(0, Op::Reboot), None, "the second one has not proven it");
    let acts: Vec<_> = group.seats.iter().flat_map(|seat| seat.acts.clone()).collect();
    assert_eq!(acts, [Op::Reboot, Op::Off]);
    group.pass(20 * SECOND);
    assert_eq!(failure(group.answer.take()), NoAnswer::Silent(named("host2")));
}

#[test]
fn a_doubt_or_a_failed_act_is_a_failure() {
    let mut group = Group::of(&[0, 1, 2]);
    group.runs_at(1);
    group.seats[2].state = LocalState::CannotTell("libvirt is silent".into());
    assert!(matches!(failure(group.ask(0, Op::Off)), NoAnswer::CannotTell { host, .. } if host == named("host2")));
    group.seats[2].state = LocalState::NotHere;
    group.runs_at(1);
    group.seats[1].end = Some(ActEnd::Failed("it lives".into()));
    assert!(matches!(failure(group.ask(0, Op::Off)), NoAnswer::Failed { host, .. } if host == named("host1")));
}

#[test]
fn a_name_that_nobody_has_told_of_is_a_failure_and_one_that_is_gone_is_off() {
    let mut group = Group::of(&[0, 1]);
    assert_eq!(failure(group.ask(0, Op::Off)), NoAnswer::Unknown);
    assert_eq!(group.ask(0, Op::Status), Some(GroupAnswer::Off), "as fence_virtd says");
    group.runs_at(1);
    group.seats[1].state = LocalState::NotHere;
    group.seats[1].hosts.domains([]);
    group.run();
    assert_eq!(group.ask(0, Op::Off), Some(GroupAnswer::Success));
    assert_eq!(failure(group.ask(0, Op::On)), NoAnswer::NotDefined);
}

#[test]
fn a_missing_host_is_needed_unless_another_one_proves_and_it_never_ran_there() {
    let options = HostsOptions { has_fencing: true, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 1, 2]);
    group.runs_at(1);
    // In repair: it has nothing to do with the machine.
    group.join(&[0, 1]);
    assert_eq!(group.ask(0, Op::Off), Some(GroupAnswer::Success));
    // It runs nowhere that is there.
    assert_eq!(group.ask(0, Op::Off), None);
    assert!(group.seats[0].fencing_asked);
    group.seats[0].hosts.fenced(group.now, node(2), group.now, Duration::from_secs(1), false);
    group.run();
    assert_eq!(group.answer.take(), None, "it was heard a moment ago");
    group.pass(10 * SECOND);
    group.seats[0].hosts.fenced(group.now, node(2), group.now, Duration::from_secs(1), false);
    group.run();
    assert_eq!(group.answer.take(), Some(GroupAnswer::Success));
    // A reboot proves nothing for long, and a host that was left off only if that is said afresh.
    group.pass(10 * SECOND);
    assert_eq!(group.ask(0, Op::Off), None);
    group.seats[0].hosts.fenced(group.now, node(2), group.now, Duration::from_secs(2), true);
    group.run();
    assert_eq!(group.answer.take(), Some(GroupAnswer::Success));
}

#[test]
fn a_missing_host_that_was_last_known_to_run_it_is_needed_beside_an_owner() {
    let mut group = Group::of(&[0, 1, 2]);
    group.runs_at(2);
    group.join(&[0, 1]);
    group.runs_at(1);
    assert_eq!(failure(group.ask(0, Op::Off)), NoAnswer::Unproven(named("host2")));
}

/// A host answers a question, and is lost before it tells of its domains.
#[test]
fn a_host_that_has_just_said_that_it_runs_a_domain_is_known_to() {
    let mut group = Group::of(&[0, 1, 2]);
    group.seats[2].state = LocalState::RunsHere;
    assert_eq!(group.ask(0, Op::Status), Some(GroupAnswer::Success));
    group.join(&[0, 1]);
    // It arrives elsewhere, by a migration that may fail yet.
    group.runs_at(1);
    assert_eq!(failure(group.ask(0, Op::Off)), NoAnswer::Unproven(named("host2")));
}

/// A reboot is proven, and its host tells nothing new: for it the domain runs as before.
#[test]
fn a_host_that_has_rebooted_a_domain_is_still_known_to_run_it() {
    let mut group = Group::of(&[0, 1, 2]);
    group.runs_at(2);
    assert_eq!(group.ask(0, Op::Reboot), Some(GroupAnswer::Success));
    // It is silent now, and somebody starts a second copy.
    group.join(&[0, 1]);
    group.runs_at(1);
    assert_eq!(failure(group.ask(0, Op::Off)), NoAnswer::Unproven(named("host2")));
}

/// A host that was left off, and what happens to it in the next minute. Returns whether it still
/// counts as dead, with a rule that is broken.
fn stays_dead(broken: Option<HostsRule>, happens: impl Fn(&mut Group)) -> bool {
    let options = HostsOptions { has_fencing: true, dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 1, 2]);
    group.runs_at(1);
    (group.seats[1].state, group.seats[0].end) = (LocalState::NotHere, None);
    group.join(&[0, 1]);
    group.pass(10 * SECOND);
    let says_off = |group: &mut Group, ago| {
        let now = group.now;
        group.seats[0].hosts.fenced(now, node(2), now, Duration::from_secs(ago), true);
        group.run();
    };
    says_off(&mut group, 1);
    group.pass(20 * SECOND);
    happens(&mut group);
    group.pass(20 * SECOND);
    let answer = group.ask(0, Op::Off);
    if answer.is_none() && group.seats[0].fencing_asked {
        says_off(&mut group, 41);
    }
    answer.or(group.answer.take()) == Some(GroupAnswer::Success)
}

/// Whether the word of 20 s ago, that a host was left off, still counts.
fn is_old_word_enough(broken: Option<HostsRule>) -> bool {
    let options = HostsOptions { has_fencing: true, dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 1, 2]);
    group.runs_at(1);
    group.seats[1].state = LocalState::NotHere;
    group.join(&[0, 1]);
    group.pass(10 * SECOND);
    let now = group.now;
    group.seats[0].hosts.fenced(now, node(2), now, Duration::from_secs(1), true);
    group.pass(20 * SECOND);
    group.ask(0, Op::Off) == Some(GroupAnswer::Success)
}

#[test]
fn a_host_that_was_left_off_is_dead_until_a_ring_has_it_or_rings_were_missed() {
    let nothing = |_: &mut Group| {};
    assert!(stays_dead(None, nothing), "off, and nothing since");
    let returns = |group: &mut Group| {
        for ring in [[node(0), node(1), node(2)].as_slice(), &[node(0), node(1)]] {
            group.seats[0].hosts.quorum(group.now, true, ring);
        }
    };
    assert!(!stays_dead(None, returns), "corosync has seen it");
    assert!(stays_dead(Some(HostsRule::RingRefutes), returns));
    // Nobody asks Pacemaker again, which has switched it on meanwhile.
    assert!(!is_old_word_enough(None) && is_old_word_enough(Some(HostsRule::HistoryFresh)));
    let misses = |group: &mut Group| {
        group.join(&[1]);
        group.join(&[0, 1]);
    };
    assert!(!stays_dead(None, misses), "it may have been there meanwhile");
    assert!(stays_dead(Some(HostsRule::RingsSeen), misses));
}

#[test]
fn a_host_with_another_key_is_named() {
    let mut group = Group::apart(&[0, 1], HostsOptions::default());
    group.seats[1].hosts.set_keys(keys(b"another key"));
    group.join(&[0, 1]);
    assert_eq!(group.seats[0].foreign, [NoMessage::Key], "once");
    let reason = failure(group.ask(0, Op::Off));
    assert_eq!(reason, NoAnswer::Foreign { host: named("host1"), trouble: NoMessage::Key });
    let mut bytes = group.sent[0].1.clone();
    bytes[8] = 2;
    group.deliver(group.seats[1].member, &bytes);
    group.run();
    assert_eq!(group.seats[0].foreign.last(), Some(&NoMessage::Version(2)));
}

#[test]
fn a_recorded_question_does_nothing() {
    let mut group = Group::of(&[0, 1]);
    group.runs_at(1);
    assert_eq!(group.ask(0, Op::Off), Some(GroupAnswer::Success));
    let recorded = group.sent.clone();
    // A host that was there, and one that has come since with the old one's name.
    let mut later = Group::apart(&[0, 1], HostsOptions::default());
    later.seats.swap(0, 1);
    later.join(&[0, 1]);
    for group in [&mut group, &mut later] {
        for seat in &mut group.seats {
            (seat.state, seat.acts) = (LocalState::RunsHere, Vec::new());
        }
        for (from, bytes) in &recorded {
            let (from, bytes) = (*from, bytes.clone());
            group.deliver(from, &bytes);
            group.run();
        }
    }
    assert!(group.seats.iter().all(|seat| seat.acts.is_empty()));
}

#[test]
fn one_host_calls_back_and_another_takes_over() {
    let mut group = Group::of(&[0, 1, 2]);
    let wanted = request(Op::Off, 1);
    let called = |group: &Group| group.seats.iter().map(|seat| seat.called_back.len()).collect::<Vec<_>>();
    for seat in 0..3 {
        group.seats[seat].hosts.heard(group.now, wanted);
    }
    group.run();
    assert_eq!(called(&group), [1, 0, 0]);
    group.seats[0].hosts.answered(wanted, false);
    group.run();
    assert_eq!(called(&group), [1, 1, 0], "the first one did not reach the client");
    group.join(&[0, 2]);
    assert_eq!(called(&group), [1, 1, 1], "the second one has left");
    group.seats[2].hosts.answered(wanted, true);
    group.join(&[0]);
    assert_eq!(called(&group), [1, 1, 1], "the client was answered");
}

#[test]
fn two_daemons_of_one_host_are_told_apart() {
    // The second daemon sees a machine that it does not manage.
    let mut group = Group::of(&[0, 1, 1]);
    group.runs_at(1);
    group.seats[2].state = LocalState::CannotTell("an orphan".into());
    assert_eq!(group.ask(0, Op::Off), Some(GroupAnswer::Success));
    // Both manage it: one of them reboots it.
    let mut group = Group::of(&[0, 1, 1]);
    group.runs_at(1);
    group.runs_at(2);
    assert_eq!(group.ask(0, Op::Reboot), Some(GroupAnswer::Success));
    assert_eq!(group.seats.iter().map(|seat| seat.acts.len()).collect::<Vec<_>>(), [0, 1, 0]);
    // The one that manages it is gone.
    let mut group = Group::of(&[0, 1, 1]);
    group.runs_at(1);
    group.seats[2].state = LocalState::CannotTell("an orphan".into());
    group.join(&[0, 2]);
    assert!(matches!(failure(group.ask(0, Op::Off)), NoAnswer::CannotTell { .. }));
    // It goes while it acts.
    group.join(&[0, 1, 2]);
    (group.seats[1].state, group.seats[1].end) = (LocalState::RunsHere, None);
    assert_eq!(group.ask(0, Op::Off), None);
    group.join(&[0, 2]);
    assert!(matches!(failure(group.answer.take()), NoAnswer::CannotTell { .. }));
}

#[test]
fn a_request_that_an_earlier_daemon_has_carried_out_is_not_carried_out_again() {
    let mut group = Group::of(&[0, 1]);
    group.runs_at(1);
    group.seats[1].hosts.remember(group.now, request(Op::Off, 1));
    let answer = group.ask_of(0, Op::Off, request(Op::Off, 1), Target::Name(NAME.into()));
    assert!(matches!(failure(answer), NoAnswer::CannotTell { .. }));
    assert!(group.seats[1].acts.is_empty());
    assert_eq!(group.ask(0, Op::Off), Some(GroupAnswer::Success));
}

#[test]
fn list_and_monitor_need_every_configured_host() {
    let mut group = Group::of(&[0, 1]);
    assert!(matches!(group.ask(0, Op::HostList), Some(GroupAnswer::List(lists)) if lists.len() == 2));
    assert_eq!(group.ask(0, Op::DevStatus), Some(GroupAnswer::Success));
    group.join(&[0]);
    for op in [Op::HostList, Op::DevStatus] {
        assert_eq!(failure(group.ask(0, op)), NoAnswer::Missing(named("host1")));
    }
}

#[test]
fn a_daemon_without_quorum_or_group_answers_failure_and_one_that_stood_still_starts_anew() {
    let mut group = Group::of(&[0, 1]);
    group.runs_at(1);
    group.seats[1].end = None;
    assert_eq!(group.ask(0, Op::Off), None);
    group.seats[0].hosts.stalled(group.now);
    group.run();
    assert_eq!(failure(group.answer.take()), NoAnswer::Stalled);
    assert_eq!(group.ask(0, Op::Off), None);
    group.seats[0].hosts.quorum(group.now, false, &[node(0)]);
    group.run();
    assert_eq!(failure(group.answer.take()), NoAnswer::NoQuorum);
    group.seats[0].hosts.disconnected(group.now);
    assert_eq!(failure(group.ask(0, Op::Off)), NoAnswer::NotJoined);
}

/// A look began before a start, and ended after it. Returns what the other host was told to do.
fn starts_beside_a_start(broken: Option<HostsRule>) -> Vec<Op> {
    let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1], options);
    group.join(&[0, 1]);
    for seat in &mut group.seats {
        seat.state = LocalState::DefinedHere;
    }
    group.seats[0].end = None;
    assert_eq!(group.ask(0, Op::On), None, "it is being started");
    assert_eq!(group.seats[0].acts, [Op::On]);
    group.seats[0].looks_slowly = true;
    assert_eq!(group.ask(1, Op::On), None, "the first host is slow");
    let (act, look) = (group.seats[0].last_act, group.seats[0].looks[0]);
    let now = group.now;
    group.seats[0].hosts.acted(now, act, ActEnd::Done, 1);
    let (uuid, name) = (Some(UUID), Some(NAME.to_owned()));
    group.seats[0].hosts.looked(now, look, Look { state: LocalState::DefinedHere, uuid, name, changes: 0 });
    group.seats[0].looks_slowly = false;
    group.run();
    std::mem::take(&mut group.seats[1].acts)
}

#[test]
fn what_was_seen_before_a_start_does_not_count_after_it() {
    assert_eq!(starts_beside_a_start(None), []);
    assert_eq!(starts_beside_a_start(Some(HostsRule::StartHidesLook)), [Op::On]);
}

/// A host that runs a second copy joins when the first one has been rebooted, and another host has
/// yet to answer. Returns what it does.
fn joins_beside_a_reboot(broken: Option<HostsRule>) -> Vec<Op> {
    let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 2]);
    group.runs_at(0);
    (group.seats[1].state, group.seats[2].looks_slowly) = (LocalState::RunsHere, true);
    assert_eq!(group.ask(0, Op::Reboot), None, "a host is slow");
    assert_eq!(group.seats[0].acts, [Op::Reboot]);
    group.join(&[0, 1, 2]);
    std::mem::take(&mut group.seats[1].acts)
}

#[test]
fn a_host_that_joins_beside_a_reboot_starts_no_second_copy() {
    assert_eq!(joins_beside_a_reboot(None), []);
    assert_eq!(joins_beside_a_reboot(Some(HostsRule::WholeReboot)), [Op::Reboot]);
}

/// Two hosts are told to start it at once, the ring breaks, and the first order is lost on the side
/// of the second one. Returns whether that one starts it all the same.
fn starts_after_a_change(broken: Option<HostsRule>) -> bool {
    let options = HostsOptions { dangerous_broken: broken, has_fencing: true, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 1, 2]);
    for seat in &mut group.seats {
        seat.state = LocalState::DefinedHere;
    }
    group.changes_before_ready = true;
    group.ask(0, Op::On);
    !group.seats[0].acts.is_empty()
}

#[test]
fn a_change_of_members_forbids_a_start() {
    assert!(!starts_after_a_change(None));
    assert!(starts_after_a_change(Some(HostsRule::SameMembers)));
}

/// The daemon that runs it is gone while it acts, and the other one of its host is in doubt.
/// Returns the answer.
fn answer_for_one_that_left(broken: Option<HostsRule>) -> Option<GroupAnswer> {
    let options = HostsOptions { dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 1], options);
    group.join(&[0, 1, 2]);
    group.runs_at(1);
    group.seats[2].state = LocalState::CannotTell("an orphan".into());
    group.seats[1].end = None;
    assert_eq!(group.ask(0, Op::Off), None);
    group.join(&[0, 2]);
    group.answer.take()
}

#[test]
fn a_daemon_that_left_answers_for_no_other() {
    assert!(matches!(failure(answer_for_one_that_left(None)), NoAnswer::CannotTell { .. }));
    assert_eq!(answer_for_one_that_left(Some(HostsRule::PresentCovers)), Some(GroupAnswer::Success));
}

/// A host that is missing, fenced so long ago, and heard so long ago. Returns whether the proof
/// counts, with a rule that is broken.
fn is_proof(broken: Option<HostsRule>, fenced: u64, heard: u64) -> bool {
    let options = HostsOptions { has_fencing: true, dangerous_broken: broken, ..HostsOptions::default() };
    let mut group = Group::apart(&[0, 1, 2], options);
    group.join(&[0, 1, 2]);
    group.runs_at(1);
    (group.seats[1].state, group.seats[0].end) = (LocalState::NotHere, None);
    group.pass(10 * SECOND);
    // Its last word, long after the ring was formed.
    group.seats[2].hosts.domains([HostDomain { uuid: Uuid::nil(), name: "another".into(), state: 5 }]);
    group.run();
    group.join(&[0, 1]);
    group.pass(heard * SECOND);
    group.seats[0].hosts.fenced(group.now, node(2), group.now, Duration::from_secs(fenced), false);
    group.ask(0, Op::Off) == Some(GroupAnswer::Success)
}

#[test]
fn a_rule_about_fencings_that_is_broken_is_missed() {
    assert!(is_proof(None, 2, 10), "a good proof");
    assert!(!is_proof(None, 8, 10), "it may be up again");
    assert!(is_proof(Some(HostsRule::BootLimited), 8, 10), "and it would count");
    assert!(!is_proof(None, 4, 2), "it was heard since");
    assert!(is_proof(Some(HostsRule::HeardRefutes), 4, 2), "and it would count");
}
