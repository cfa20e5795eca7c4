//! A request's way through the daemon: the steps of `pipeline.rs`, with the real ledger.

use super::world::{Act, Asks, Client, Endpoint, Life, Number, Outcome, Step, Task, Who, World};
use super::{Flaw, Scenario};
use fence_common::ledger::{NoClaim, Ticket};
use fence_common::wire::Op;

impl World {
    /// The possible steps of requests.
    pub(super) fn requests(&self, acts: &mut Vec<Act>) {
        let Some(daemon) = &self.daemon else { return };
        if !self.queue.is_empty() {
            acts.push(Act::Take);
        }
        for (&number, task) in &daemon.tasks {
            if let Step::Calling(ticket) | Step::Connected(ticket, _) = &task.step
                && daemon.is_superseded(task.listener, ticket)
            {
                acts.push(Act::Overtaken(number));
            }
            match &task.step {
                Step::Calling(_) => acts.push(Act::Connect(number)),
                Step::Connected(..) => acts.push(Act::Authenticate(number)),
                Step::Talking(..) => acts.push(Act::Read(number)),
                Step::Read(..) => acts.push(Act::Claim(number)),
                Step::Claimed(..) => acts.push(Act::Note(number)),
                Step::Refused(..) => acts.push(Act::Reply(number)),
                Step::Acting(..) | Step::Unclaimed(..) => {}
                Step::Ended(..) if self.late.is_some() => {}
                Step::Ended(..) => acts.push(Act::ReadAgain(number)),
                Step::ReadAgain(..) => acts.push(Act::Reply(number)),
            }
        }
    }

    /// A request's next step.
    pub(super) fn request(&mut self, scenario: &Scenario, act: Act, number: Number) {
        let Some(daemon) = &mut self.daemon else { return };
        let Some(task) = daemon.tasks.get(&number).cloned() else { return };
        match (act, task.step.clone()) {
            (Act::Connect(_), Step::Calling(ticket)) => self.connect(scenario, number, &task, ticket),
            (Act::Overtaken(_), Step::Calling(ticket)) => self.forget(scenario, number, ticket),
            (Act::Overtaken(_), Step::Connected(ticket, peer)) => {
                self.forget(scenario, number, ticket);
                self.hang_up(scenario, number, &task, peer, false);
            }
            (Act::Authenticate(_), Step::Connected(ticket, peer)) => {
                self.authenticate(scenario, number, ticket, peer);
            }
            (Act::Read(_), Step::Talking(ticket, peer, at)) => {
                if scenario.works(Flaw::NothingReadBeforeClaim) && scenario.works(Flaw::NothingRead) {
                    self.take_in_all(scenario);
                }
                self.go_on(number, Step::Read(ticket, peer, at));
            }
            (Act::Claim(_), Step::Read(ticket, peer, at)) if scenario.clients[task.who].denied => {
                self.deny(scenario, number, &task, ticket, (peer, at));
            }
            (Act::Claim(_), Step::Read(ticket, peer, at)) if scenario.works(Flaw::ClaimAfterActing) => {
                self.claim(scenario, number, &task, ticket, (peer, at));
            }
            (Act::Claim(_), Step::Read(ticket, peer, at)) => {
                self.go_on(number, Step::Unclaimed(ticket, peer, at));
                self.begin_order(number, task.who);
            }
            (Act::Note(_), Step::Claimed(claim, peer)) => {
                self.claims.push(Self::id(scenario, task.who));
                self.go_on(number, Step::Acting(claim, peer));
                self.begin_order(number, task.who);
            }
            (Act::ReadAgain(_), Step::Ended(claim, peer, outcome)) => {
                if scenario.works(Flaw::NothingRead) {
                    self.take_in_all(scenario);
                }
                self.go_on(number, Step::ReadAgain(claim, peer, outcome));
            }
            (Act::Reply(_), Step::Refused(refusal, peer)) => {
                let refused = Outcome { success: false, instance: self.instance };
                self.read_line(scenario, &task);
                let Some(daemon) = &mut self.daemon else { return };
                let ledger = daemon.ledger(scenario, task.listener);
                let superseded = ledger.is_denial_superseded(&refusal);
                ledger.close_denial(refusal);
                daemon.tasks.remove(&number);
                if superseded {
                    self.hang_up(scenario, number, &task, peer, true);
                } else {
                    self.reply(scenario, number, &task, peer, refused);
                }
            }
            (Act::Reply(_), Step::ReadAgain(claim, peer, outcome)) => {
                self.read_line(scenario, &task);
                let nanos = self.nanos();
                let Some(daemon) = &mut self.daemon else { return };
                let ledger = daemon.ledger(scenario, task.listener);
                let superseded = ledger.is_claim_superseded(&claim);
                ledger.answered(nanos, claim);
                daemon.tasks.remove(&number);
                if superseded {
                    self.hang_up(scenario, number, &task, peer, true);
                } else {
                    self.reply(scenario, number, &task, peer, outcome);
                }
            }
            _ => {}
        }
    }

    fn go_on(&mut self, number: Number, step: Step) {
        if let Some(task) = self.daemon.as_mut().and_then(|daemon| daemon.tasks.get_mut(&number)) {
            task.step = step;
        }
    }

    fn forget(&mut self, scenario: &Scenario, number: Number, ticket: Ticket) {
        if let Some(daemon) = &mut self.daemon
            && let Some(task) = daemon.tasks.remove(&number)
        {
            daemon.ledger(scenario, task.listener).forget(ticket);
        }
    }

    /// A line has no end between two clients, so it is read once more right before each answer. The
    /// model leaves out what happens between that and the answer's arrival in the guest.
    fn read_line(&mut self, scenario: &Scenario, task: &Task) {
        if matches!(task.endpoint, Endpoint::Line(_)) && scenario.works(Flaw::LineUnreadBeforeAnswer) {
            self.take_in_all(scenario);
        }
    }

    /// A client that listens there accepts the connection, and has the key; or no client does. On
    /// the client's own connection it is the client itself. An attacker can relay the exam to any
    /// client that waits for a callback.
    fn connect(&mut self, scenario: &Scenario, number: Number, task: &Task, ticket: Ticket) {
        let listens = |who: Who| {
            let Asks { endpoints, insists, .. } = scenario.clients[who];
            let takes = match self.clients[who] {
                Client::Asking { .. } => true,
                Client::Talking(_) => insists,
                Client::Unborn | Client::Done | Client::Gone => false,
            };
            takes
                && match task.endpoint {
                    _ if task.is_repeated => endpoints.iter().any(|at| matches!(at, Endpoint::Callback(_))),
                    Endpoint::Stream(_) => who == task.who,
                    there @ (Endpoint::Callback(_) | Endpoint::Line(_)) => endpoints.contains(&there),
                }
        };
        match (0..self.clients.len()).find(|&who| listens(who)) {
            Some(peer) => {
                self.clients[peer] = Client::Talking(number);
                if scenario.has_shared_endpoints() {
                    self.go_on(number, Step::Connected(ticket, peer));
                } else {
                    self.authenticate(scenario, number, ticket, peer);
                }
            }
            None => self.forget(scenario, number, ticket),
        }
    }

    /// What arrives from now on is later. If no clients share an endpoint, that makes no difference
    /// and would only add states.
    fn authenticate(&mut self, scenario: &Scenario, number: Number, ticket: Ticket, peer: Who) {
        self.go_on(number, Step::Talking(ticket, peer, self.nanos()));
        if scenario.has_shared_endpoints() {
            self.moment += 1;
        }
    }

    fn claim(&mut self, scenario: &Scenario, number: Number, task: &Task, ticket: Ticket, (peer, at): (Who, u64)) {
        let nanos = self.nanos();
        let Some(daemon) = &mut self.daemon else { return };
        let at = if scenario.works(Flaw::ClaimClosesAll) { at } else { 0 };
        let asked = Some(at).filter(|_| scenario.works(Flaw::ClaimClosesNothing) && closes(scenario, task));
        match daemon.ledger(scenario, task.listener).claim(nanos, ticket, asked) {
            Ok(claim) => {
                self.observed.anothers_word |= task.who != peer;
                self.go_on(number, Step::Claimed(claim, peer));
            }
            Err(reason) => {
                daemon.tasks.remove(&number);
                self.observed.superseded |= reason == NoClaim::Superseded;
                self.hang_up(scenario, number, task, peer, false);
            }
        }
    }

    /// The groups deny the request.
    fn deny(&mut self, scenario: &Scenario, number: Number, task: &Task, ticket: Ticket, (peer, at): (Who, u64)) {
        let (nanos, instance) = (self.nanos(), self.instance);
        let Some(daemon) = &mut self.daemon else { return };
        let ledger = daemon.ledger(scenario, task.listener);
        let asked = Some(at).filter(|_| closes(scenario, task));
        let next = if scenario.works(Flaw::ClaimBeforePermission) {
            ledger.deny(ticket, asked).map(|refusal| Step::Refused(refusal, peer))
        } else {
            let refused = Outcome { success: false, instance };
            ledger.claim(nanos, ticket, asked).map(|claim| Step::Ended(claim, peer, refused))
        };
        match next {
            Ok(step) => self.go_on(number, step),
            Err(_) => {
                daemon.tasks.remove(&number);
                self.hang_up(scenario, number, task, peer, false);
            }
        }
    }

    /// Only with a flaw: the claim comes after the act.
    pub(super) fn claim_late(
        &mut self,
        scenario: &Scenario,
        number: Number,
        ticket: Ticket,
        (peer, at): (Who, u64),
        outcome: Outcome,
    ) {
        let nanos = self.nanos();
        let Some(daemon) = &mut self.daemon else { return };
        let Some(listener) = daemon.tasks.get(&number).map(|task| task.listener) else { return };
        match daemon.ledger(scenario, listener).claim(nanos, ticket, Some(at)) {
            Ok(claim) => self.go_on(number, Step::Ended(claim, peer, outcome)),
            Err(_) => {
                daemon.tasks.remove(&number);
            }
        }
    }

    fn reply(&mut self, scenario: &Scenario, number: Number, task: &Task, peer: Who, outcome: Outcome) {
        let says_dead = outcome.success && scenario.clients[task.who].op != Op::On;
        self.observed.false_success |= says_dead && self.life != Life::Dead && self.instance == outcome.instance;
        *self.observed.replies.entry(task.who).or_default() += 1;
        if outcome.success {
            self.observed.successes.insert(task.who);
        }
        let reads = |who: &Who| {
            let Asks { endpoints, .. } = scenario.clients[*who];
            matches!(self.clients[*who], Client::Asking { .. }) && endpoints.contains(&task.endpoint)
        };
        let receiver = match task.endpoint {
            Endpoint::Line(_) => (0..self.clients.len()).find(reads),
            Endpoint::Callback(_) | Endpoint::Stream(_) => {
                Some(peer).filter(|&peer| self.clients[peer] == Client::Talking(number))
            }
        };
        if let Some(receiver) = receiver {
            self.clients[receiver] = Client::Done;
            self.observed.anothers_answer |= receiver != task.who;
        }
    }
}

/// Whether a claim closes the entry: what arrives later is for another connection. A line has only
/// one, so a later client's request there comes from the client that would read the answer.
fn closes(scenario: &Scenario, task: &Task) -> bool {
    !matches!(task.endpoint, Endpoint::Line(_)) || !scenario.works(Flaw::ClaimClosesLine)
}
