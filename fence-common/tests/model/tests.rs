//! The scenarios, and the flaws that each promise must detect.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model};

use super::world::Endpoint::{Callback, Line, Stream};
use super::world::{Asks, Endpoint, Left};
use super::{Flaw, Scenario, Way, promise};
use fence_common::wire::Op;

/// A stock client.
const fn asks(op: Op, endpoints: &'static [Endpoint]) -> Asks {
    Asks { op, endpoints, follows: None, beside: None, insists: false, copies: None, denied: false }
}

/// A client that takes over the first one's endpoint.
const fn then(op: Op) -> Asks {
    Asks { follows: Some(0), ..asks(op, &[Callback(1)]) }
}

/// A client that asks while the first one waits for its answer.
const fn beside(op: Op, endpoints: &'static [Endpoint]) -> Asks {
    Asks { beside: Some(0), ..asks(op, endpoints) }
}

/// One client with two addresses.
const TWO_ADDRESSES: &[Asks] = &[asks(Op::Reboot, &[Callback(1), Callback(2)])];
/// The same with a client that is not stock's.
const INSISTENT: &[Asks] = &[Asks { insists: true, ..asks(Op::Reboot, &[Callback(1), Callback(2)]) }];
/// Two clients at one endpoint, one after the other, about the same domain.
const ONE_ENDPOINT: &[Asks] = &[asks(Op::Reboot, &[Callback(1)]), then(Op::Off)];
const ONE_ENDPOINT_ON: &[Asks] = &[asks(Op::Off, &[Callback(1)]), then(Op::On)];
/// Two clients of one guest at the same time.
const AT_ONCE: &[Asks] = &[asks(Op::Reboot, &[Callback(1)]), beside(Op::Off, &[Callback(1)])];
const AT_ONCE_ON: &[Asks] = &[asks(Op::Off, &[Callback(1)]), beside(Op::On, &[Callback(1)])];
/// The same, in a guest with two addresses.
const AT_ONCE_TWICE: &[Asks] =
    &[asks(Op::Off, &[Callback(1), Callback(2)]), beside(Op::On, &[Callback(1), Callback(2)])];
/// Two clients, each at its own endpoint.
const TWO_ENDPOINTS: &[Asks] = &[asks(Op::Reboot, &[Callback(1)]), asks(Op::Off, &[Callback(2)])];
const OFF_AND_ON: &[Asks] = &[asks(Op::Off, &[Callback(1)]), asks(Op::On, &[Callback(2)])];

/// A client, and a key holder that copies its request for an address that the groups deny.
const DENIED_COPY: &[Asks] =
    &[asks(Op::Reboot, &[Callback(1)]), Asks { copies: Some(0), denied: true, ..asks(Op::Reboot, &[Callback(2)]) }];

/// A client that sends its one request by each kind of listener.
const EVERY_WAY: &[Asks] = &[Asks { insists: true, ..asks(Op::Reboot, &[Callback(1), Stream(1), Line(1)]) }];
/// A client for each kind of listener.
const BY_CONNECTION: &[Asks] = &[asks(Op::Reboot, &[Callback(1)]), asks(Op::Off, &[Stream(2)])];
const BY_LINE: &[Asks] = &[asks(Op::Off, &[Stream(1)]), asks(Op::Reboot, &[Line(2)])];
/// Two clients of one guest, one after the other, by its serial line.
const ONE_LINE: &[Asks] = &[asks(Op::Reboot, &[Line(1)]), Asks { follows: Some(0), ..asks(Op::Off, &[Line(1)]) }];
/// A client whose connection an attacker has heard, and a client whose exam it can relay.
const RELAYED: &[Asks] = &[asks(Op::Off, &[Stream(1)]), asks(Op::On, &[Callback(2)])];

const CALM: Left = Left::NONE;

fn scenario(clients: &'static [Asks], way: Way, troubles: Left) -> Scenario {
    Scenario { repeats_lost: true, clients, way, sends_again: 1, troubles, flaw: None }
}

/// Checks every state of a scenario, and prints how many there are.
fn check(name: &str, scenario: Scenario) {
    let begun = Instant::now();
    let checker = scenario.checker().threads(2).spawn_bfs().join();
    let (states, unique, took) = (checker.state_count(), checker.unique_state_count(), begun.elapsed());
    // Straight to stdout: the test harness hides what a passing test prints.
    let _ = writeln!(std::io::stdout(), "model: {name}: {unique} states, {states} steps, {took:.1?}");
    let found = checker.discoveries();
    for property in checker.model().properties() {
        let path = found.get(property.name);
        match property.expectation {
            stateright::Expectation::Sometimes => assert!(path.is_some(), "{name}: never: {}", property.name),
            stateright::Expectation::Always | stateright::Expectation::Eventually => {
                let steps = path.map(|path| path.clone().into_actions());
                assert!(steps.is_none(), "{name}: broken: {}: {steps:#?}", property.name);
            }
        }
    }
}

/// Checks that a scenario keeps this promise; other promises do not count.
fn keeps(name: &str, promise: &'static str, scenario: Scenario) {
    let checker = scenario.checker().threads(2).spawn_bfs().join();
    let _ = writeln!(std::io::stdout(), "model: {name}: {} states", checker.unique_state_count());
    let steps = checker.discovery(promise).map(|path| path.into_actions());
    assert!(steps.is_none(), "{name}: broken: {promise}: {steps:#?}");
}

/// Checks that a scenario with a flaw breaks this promise. Returns the steps that do it.
fn breaks(flaw: Option<Flaw>, promise: &'static str, scenario: Scenario) -> Vec<String> {
    let scenario = Scenario { flaw, ..scenario };
    let until = HasDiscoveries::AnyOf(BTreeSet::from([promise]));
    let checker = scenario.checker().threads(2).finish_when(until).spawn_bfs().join();
    let path = checker.discovery(promise);
    assert!(path.is_some(), "{flaw:?} goes unnoticed: {promise}");
    path.into_iter().flat_map(|path| path.into_actions()).map(|act| format!("{act:?}")).collect()
}

/// Prints how a flaw breaks a promise.
fn shows(flaw: Flaw, promise: &'static str, scenario: Scenario) {
    let steps = breaks(Some(flaw), promise, scenario);
    let (count, steps) = (steps.len(), steps.join(" "));
    let _ = writeln!(std::io::stdout(), "model: {flaw:?} breaks \"{promise}\" in {count} steps: {steps}");
}

#[test]
fn copies_over_two_addresses() {
    for (name, way) in [("copies, direct", Way::Direct), ("copies, libvirt", Way::Libvirt)] {
        check(name, scenario(TWO_ADDRESSES, way, Left { crashes: 2, faults: 2, ticks: 1, ..CALM }));
    }
}

#[test]
fn a_client_that_insists() {
    for (name, way) in [("insistent, direct", Way::Direct), ("insistent, libvirt", Way::Libvirt)] {
        check(name, scenario(INSISTENT, way, Left { crashes: 1, faults: 2, ..CALM }));
    }
}

#[test]
fn two_clients_at_one_place() {
    let troubles = Left { crashes: 1, faults: 1, ..CALM };
    check("one endpoint, direct", scenario(ONE_ENDPOINT, Way::Direct, troubles));
    check("one endpoint, libvirt", scenario(ONE_ENDPOINT, Way::Libvirt, troubles));
    check("one endpoint, off and on", scenario(ONE_ENDPOINT_ON, Way::Direct, troubles));
}

#[test]
fn two_clients_of_one_guest_at_once() {
    check("at once, direct", scenario(AT_ONCE, Way::Direct, Left { crashes: 1, faults: 1, ..CALM }));
    check("at once, off and on", scenario(AT_ONCE_ON, Way::Libvirt, Left { faults: 1, replays: 1, ..CALM }));
    let once = Scenario { sends_again: 0, ..scenario(AT_ONCE_TWICE, Way::Direct, Left { faults: 1, ..CALM }) };
    check("at once, two addresses", once);
}

/// A datagram has its time before it can be read. A request whose peer had asked something else may
/// fail then. But that peer must not take its answer for its own.
#[test]
fn a_request_read_late_still_supersedes() {
    let late = scenario(ONE_ENDPOINT, Way::Direct, Left { late: 1, ..CALM });
    keeps("read late", promise::OWN_ANSWER, late.clone());
    keeps("read late, at once", promise::OWN_ANSWER, Scenario { clients: AT_ONCE, ..late.clone() });
    for flaw in [Flaw::ClaimClosesAll, Flaw::OutdatedIsServed] {
        let steps = breaks(Some(flaw), promise::OWN_ANSWER, late.clone());
        let _ = writeln!(std::io::stdout(), "model: {flaw:?}: {}", steps.join(" "));
    }
}

#[test]
fn two_clients_at_two_places() {
    let troubles = Left { crashes: 1, faults: 1, ..CALM };
    check("two endpoints, direct", scenario(TWO_ENDPOINTS, Way::Direct, troubles));
    check("two endpoints, libvirt", scenario(TWO_ENDPOINTS, Way::Libvirt, troubles));
    check("two endpoints, off and on", scenario(OFF_AND_ON, Way::Direct, troubles));
}

#[test]
fn somebody_whom_the_groups_deny_sends_a_copy() {
    check("denied copy, direct", scenario(DENIED_COPY, Way::Direct, CALM));
    check("denied copy, libvirt", scenario(DENIED_COPY, Way::Libvirt, Left { faults: 1, ..CALM }));
}

#[test]
fn somebody_without_the_key_repeats_what_was_heard() {
    let troubles = Left { replays: 1, ticks: 1, ..CALM };
    check("replays", scenario(ONE_ENDPOINT, Way::Direct, troubles));
}

#[test]
fn one_request_by_every_way() {
    check("every way", scenario(EVERY_WAY, Way::Direct, Left { crashes: 1, ..CALM }));
    let answered = |clients| scenario(clients, Way::Direct, CALM);
    check("by callback and connection", answered(BY_CONNECTION));
    check("by connection and line", answered(BY_LINE));
    check("by line, libvirt", scenario(BY_LINE, Way::Libvirt, Left { faults: 1, ..CALM }));
}

#[test]
fn two_clients_at_one_line() {
    check("one line", scenario(ONE_LINE, Way::Direct, Left { crashes: 1, ..CALM }));
}

/// An attacker without the key repeats a connection's request. It relays the exam to a client that
/// waits for its callback.
#[test]
fn somebody_without_the_key_repeats_a_connection() {
    let troubles = Left { replays: 1, ticks: 1, ..CALM };
    check("relayed", Scenario { sends_again: 0, ..scenario(RELAYED, Way::Direct, troubles) });
}

#[test]
fn a_rule_that_is_not_kept_breaks_its_promise() {
    let crash = Left { crashes: 1, ..CALM };
    let fault = Left { faults: 1, ..CALM };
    let wait = Left { ticks: 1, ..CALM };
    for (flaw, promise, scenario) in [
        (Flaw::ClaimAfterActing, promise::ACTS_ONCE, scenario(INSISTENT, Way::Direct, CALM)),
        (Flaw::ClaimBeforePermission, promise::NOT_IN_THE_WAY, scenario(DENIED_COPY, Way::Direct, CALM)),
        (Flaw::NoClaimsFile, promise::ACTS_ONCE, scenario(INSISTENT, Way::Direct, crash)),
        (
            Flaw::NoReplayCache,
            promise::ONE_KILL,
            scenario(ONE_ENDPOINT, Way::Direct, Left { replays: 1, ticks: 2, ..CALM }),
        ),
        (Flaw::OldDoesNotSupersede, promise::OWN_ANSWER, scenario(ONE_ENDPOINT, Way::Direct, wait)),
        (Flaw::NothingSupersedes, promise::OWN_ANSWER, scenario(ONE_ENDPOINT, Way::Direct, CALM)),
        (Flaw::NothingSupersedes, promise::OWN_WORD, scenario(AT_ONCE, Way::Direct, CALM)),
        (Flaw::ClaimClosesNothing, promise::NOT_DROPPED, scenario(AT_ONCE, Way::Direct, CALM)),
        (Flaw::NothingReadBeforeClaim, promise::OWN_WORD, scenario(ONE_ENDPOINT, Way::Direct, CALM)),
        (Flaw::NothingRead, promise::OWN_ANSWER, scenario(ONE_ENDPOINT, Way::Direct, CALM)),
        (Flaw::NoProof, promise::NO_FALSE_SUCCESS, scenario(TWO_ADDRESSES, Way::Direct, CALM)),
        (Flaw::NoProof, promise::NO_FALSE_SUCCESS, scenario(TWO_ADDRESSES, Way::Libvirt, Left { faults: 2, ..CALM })),
        (Flaw::NoRecord, promise::COMES_BACK, scenario(TWO_ADDRESSES, Way::Direct, crash)),
        (Flaw::DyingCountsAsAlive, promise::COMES_BACK, scenario(TWO_ADDRESSES, Way::Direct, crash)),
        (Flaw::OffLeavesRestart, promise::STAYS_OFF, scenario(TWO_ENDPOINTS, Way::Direct, fault)),
        (Flaw::LockReleasedEarly, promise::ONE_KILL, scenario(OFF_AND_ON, Way::Direct, CALM)),
    ] {
        shows(flaw, promise, scenario);
    }
}

#[test]
fn a_rule_of_several_listeners_that_is_not_kept_breaks_its_promise() {
    let replay = Left { replays: 1, ticks: 2, ..CALM };
    let relayed = Scenario { sends_again: 0, ..scenario(RELAYED, Way::Direct, replay) };
    for (flaw, promise, scenario) in [
        (Flaw::LedgerPerListener, promise::ACTS_ONCE, scenario(EVERY_WAY, Way::Direct, CALM)),
        (Flaw::ReplayCachePerListener, promise::OWN_WORD, relayed.clone()),
        (Flaw::ReplayCachePerListener, promise::ACTS_ONCE, relayed.clone()),
        (Flaw::StreamSkipsReplayCache, promise::OWN_WORD, relayed.clone()),
        (Flaw::ClaimClosesLine, promise::OWN_ANSWER, scenario(ONE_LINE, Way::Direct, CALM)),
        (Flaw::LineUnreadBeforeAnswer, promise::OWN_ANSWER, scenario(ONE_LINE, Way::Direct, CALM)),
    ] {
        shows(flaw, promise, scenario);
    }
}

/// A datagram that was lost unread at a crash is new to the next daemon, as if sent later
/// (docs/design/replay-cache.md). No other datagram is.
#[test]
fn a_datagram_repeated_after_a_crash_does_nothing_unless_it_was_lost() {
    let troubles = Left { crashes: 1, replays: 1, ..CALM };
    let lossless = Scenario { repeats_lost: false, ..scenario(ONE_ENDPOINT, Way::Direct, troubles) };
    let steps = breaks(Some(Flaw::NoReplayCacheFile), promise::OWN_WORD, lossless.clone());
    let _ = writeln!(std::io::stdout(), "model: NoReplayCacheFile: {}", steps.join(" "));
    check("replays after a crash", lossless);
    let steps = breaks(None, promise::OWN_WORD, scenario(ONE_ENDPOINT, Way::Direct, troubles));
    let _ = writeln!(std::io::stdout(), "model: the documented limit: {}", steps.join(" "));
}
