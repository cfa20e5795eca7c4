//! The life of a request, model-checked: every order in which copies, clients, crashes, libvirt's
//! failures and a kill can meet.
//!
//! The sans-IO parts are the real ones: [`fence_common::ledger::Ledger`] and
//! [`fence_common::replay_cache::ReplayCache`]. Code with system calls is modelled, step by step as
//! the daemon has it:
//!
//! * `intake`: what comes before the ledger.
//! * `request`: the daemon's `pipeline.rs`.
//! * `order`: its `act.rs`, `off.rs`, `kill.rs` and `restart.rs`.
//! * `world`: everything else.
//!
//! * `exam`: how attackers without the key and clients prove that they have it, in a model of its
//!   own. It has the real [`fence_common::exchange::Exchange`].
//!
//! Requests come by three kinds of listener, each with the real memory behind it: callbacks, the
//! client's own connection (tcp, vsock), and serial lines without a key.
//!
//! A step is atomic. Between any two steps whatever the scenario has left may happen: a crash, a
//! failure of libvirt, six seconds.
//!
//! The model leaves out: requests about several domains, several URIs, migrations, more than three
//! steps of time, and `auth = "none"`. Datagrams do not overtake each other on the segment: they
//! arrive in the order of sending, though one may be read late.
//!
//! A [`Flaw`] breaks one rule on purpose. For each one a test checks that its property breaks.

// (`cfg(test)` is always on here; saying it tells clippy that the modules may panic.)
#[cfg(test)]
mod exam;
#[cfg(test)]
mod intake;
mod order;
mod request;
mod tests;
mod world;

use stateright::{Model, Property};

use self::world::{Act, Asks, Client, Left, Life, World};

/// How the daemon kills.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The process, by its pidfd.
    Direct,
    /// By libvirt's destroy, and libvirt's answer afterwards.
    Libvirt,
}

/// A rule that is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    ClaimAfterActing,
    ClaimBeforePermission,
    NoClaimsFile,
    NoReplayCache,
    NoReplayCacheFile,
    OldDoesNotSupersede,
    NothingSupersedes,
    ClaimClosesNothing,
    ClaimClosesAll,
    OutdatedIsServed,
    NothingReadBeforeClaim,
    NothingRead,
    NoProof,
    NoRecord,
    OffLeavesRestart,
    LockReleasedEarly,
    DyingCountsAsAlive,
    LedgerPerListener,
    ReplayCachePerListener,
    StreamSkipsReplayCache,
    ClaimClosesLine,
    LineUnreadBeforeAnswer,
    ChallengesPerListener,
    OwnChallengesAnswered,
}

/// The clients, their requests, and what goes wrong.
#[derive(Clone, Debug)]
struct Scenario {
    /// Whether a datagram may be repeated that the daemon never read: it died before, or was not
    /// there.
    repeats_lost: bool,
    clients: &'static [Asks],
    way: Way,
    /// How often each client retransmits while it is not called back.
    sends_again: u8,
    troubles: Left,
    flaw: Option<Flaw>,
}

impl Scenario {
    /// Whether the rule holds that `flaw` would break.
    fn works(&self, flaw: Flaw) -> bool {
        self.flaw != Some(flaw)
    }

    /// Whether several clients listen at one endpoint.
    fn has_shared_endpoints(&self) -> bool {
        self.clients.iter().any(|asks| asks.follows.or(asks.beside).is_some())
    }
}

/// The promises.
mod promise {
    pub(super) const NO_FALSE_SUCCESS: &str = "no success without death";
    pub(super) const ONE_KILL: &str = "at most one kill per request";
    pub(super) const ACTS_ONCE: &str = "a request is carried out at most once";
    pub(super) const OWN_ANSWER: &str = "nobody gets another's answer";
    pub(super) const OWN_WORD: &str = "nothing is done for a client on another one's word";
    pub(super) const ONE_REPLY: &str = "at most one reply per request";
    pub(super) const NOT_DROPPED: &str =
        "who waits is answered, unless the daemon dies or somebody asks beside before the claim";
    pub(super) const ONE_ANSWER: &str = "who asks alone at a place gets one answer when nothing goes wrong";
    pub(super) const NOT_IN_THE_WAY: &str = "who may act is answered, whatever somebody sends who may not";
    pub(super) const STAYS_OFF: &str = "what is off stays off until somebody asks";
    pub(super) const COMES_BACK: &str = "what a reboot killed is started again, or its failure told";
    pub(super) const COMES_TO_AN_END: &str = "everything comes to an end";
}

impl World {
    /// Whether the daemon lives and has nothing left to do.
    fn is_quiet(&self) -> bool {
        let idle = |daemon: &world::Daemon| {
            daemon.tasks.is_empty() && daemon.orders.is_empty() && daemon.pending.is_none() && daemon.lock.is_none()
        };
        self.daemon.as_ref().is_some_and(idle)
            && self.queue.is_empty()
            && self.destroy.is_none()
            && self.life != Life::Dying
    }
}

impl Model for Scenario {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        [World::first(self)].into()
    }

    fn actions(&self, state: &World, acts: &mut Vec<Act>) {
        state.outside(self, acts);
        state.requests(acts);
        state.orders(self, acts);
    }

    fn next_state(&self, before: &World, act: Act) -> Option<World> {
        let mut state = before.clone();
        match act {
            Act::Begin(_)
            | Act::SendAgain(..)
            | Act::Die(_)
            | Act::Replay(_)
            | Act::Tick
            | Act::Delay
            | Act::Surface
            | Act::Destroyed
            | Act::Dies
            | Act::Crash
            | Act::Start => state.happen_outside(self, act),
            Act::Take => state.take_in(self),
            Act::Connect(number)
            | Act::Authenticate(number)
            | Act::Overtaken(number)
            | Act::Read(number)
            | Act::Claim(number)
            | Act::Note(number)
            | Act::ReadAgain(number)
            | Act::Reply(number) => state.request(self, act, number),
            Act::Order(number, how) => state.order(self, number, how),
            Act::Late(number) => state.late(number),
            Act::Restart(how) => state.restart(how),
        }
        (state != *before).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties: Vec<Property<Self>> = Vec::new();
        let mut promise = |name, kept: fn(&Self, &World) -> bool| properties.push(Property::always(name, kept));
        promise(promise::NO_FALSE_SUCCESS, |_, state| !state.observed.false_success);
        promise(promise::ONE_KILL, |_, state| state.observed.killed.values().all(|killed| killed.len() <= 1));
        promise(promise::ACTS_ONCE, |_, state| state.observed.acted.values().all(|&times| times <= 1));
        promise(promise::OWN_ANSWER, |_, state| !state.observed.anothers_answer);
        promise(promise::OWN_WORD, |_, state| !state.observed.anothers_word);
        promise(promise::ONE_REPLY, |_, state| state.observed.replies.values().all(|&times| times <= 1));
        promise(promise::NOT_DROPPED, |_, state| !state.observed.dropped);
        promise(promise::STAYS_OFF, |_, state| !state.observed.risen);
        promise(promise::COMES_BACK, |_, state| !(state.is_quiet() && state.observed.owed));
        // Every step uses something up, so there are no cycles. A state without a successor is an
        // end.
        promise(promise::COMES_TO_AN_END, |scenario, state| {
            let mut acts = Vec::new();
            scenario.actions(state, &mut acts);
            !acts.is_empty() || (state.is_quiet() && !state.clients.iter().any(Client::talks))
        });
        promise(promise::NOT_IN_THE_WAY, |scenario, state| {
            let mut acts = Vec::new();
            scenario.actions(state, &mut acts);
            let answered = |(asks, client): (&Asks, &Client)| asks.denied || *client == Client::Done;
            let is_calm = scenario.troubles == Left::NONE && scenario.clients.iter().any(|asks| asks.denied);
            !is_calm || !acts.is_empty() || scenario.clients.iter().zip(&state.clients).all(answered)
        });
        promise(promise::ONE_ANSWER, |scenario, state| {
            let mut acts = Vec::new();
            scenario.actions(state, &mut acts);
            let is_calm = scenario.troubles == Left::NONE && !scenario.has_shared_endpoints();
            let are_equals = scenario.clients.iter().all(|asks| asks.copies.is_none());
            let is_answered = |who| state.observed.replies.get(&who) == Some(&1) && state.clients[who] == Client::Done;
            !acts.is_empty() || !is_calm || !are_equals || (0..state.clients.len()).all(is_answered)
        });
        let mut possible =
            |name, observed: fn(&Self, &World) -> bool| properties.push(Property::sometimes(name, observed));
        possible("a client receives a success", |_, state| !state.observed.successes.is_empty());
        possible("a client receives a failure", |scenario, state| {
            scenario.troubles.faults == 0 || state.observed.replies.len() > state.observed.successes.len()
        });
        possible("every client receives a success", |scenario, state| {
            scenario.clients.iter().any(|asks| asks.follows.is_some() || asks.denied)
                || state.observed.successes.len() == scenario.clients.len()
        });
        possible("somebody asks at the same endpoint before a claim", |scenario, state| {
            !scenario.has_shared_endpoints() || state.observed.superseded
        });
        possible("the next daemon starts what this one has killed", |scenario, state| {
            scenario.troubles.crashes == 0
                || !scenario.reboots()
                || (state.observed.inherited && state.observed.started)
        });
        possible("a restart is given up, loudly", |scenario, state| {
            scenario.troubles.faults < 2 || !scenario.reboots() || state.observed.gave_up
        });
        properties
    }
}

impl Scenario {
    fn reboots(&self) -> bool {
        self.clients.iter().any(|asks| asks.op == fence_common::wire::Op::Reboot)
    }
}
