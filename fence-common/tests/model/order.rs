//! What the daemon does to the domain: the steps of `act.rs`, `off.rs`, `kill.rs` and `restart.rs`.

use super::world::{Act, Daemon, How, Life, Number, Outcome, Step, Who, World};
use super::{Flaw, Scenario, Way};
use fence_common::wire::Op;

/// The lock's holder while a restart is attempted.
const RESTART: Number = Number::MAX;
/// How many attempts a restart gets.
const ATTEMPTS: u8 = 2;

/// An order to change the domain's power.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Order {
    pub(super) number: Number,
    who: Who,
    instance: u8,
    step: At,
}

/// An order's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Waiting,
    /// It holds the domain's lock.
    Locked,
    /// The record of the restart is written, or libvirt's destroy was sent beside the kill.
    Ready,
    /// SIGKILL was sent.
    Killed,
    /// libvirt's destroy has returned.
    Asked,
}

/// A pending restart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub(super) instance: u8,
    pub(super) inherited: bool,
    pub(super) attempts: u8,
    /// The domain was started; the record is still to be removed.
    pub(super) started: bool,
}

impl World {
    /// The possible steps of orders and of the restart.
    pub(super) fn orders(&self, scenario: &Scenario, acts: &mut Vec<Act>) {
        let Some(daemon) = &self.daemon else { return };
        let faulty = self.left.faults > 0;
        for order in &daemon.orders {
            let op = scenario.clients[order.who].op;
            let mut can = |how| acts.push(Act::Order(order.number, how));
            match order.step {
                At::Waiting if daemon.lock.is_none() => can(How::Well),
                At::Waiting => {}
                At::Locked => {
                    can(How::Well);
                    let asks_libvirt = self.life == Life::Dead || (op == Op::Off && scenario.way == Way::Direct);
                    if faulty && asks_libvirt {
                        can(How::Fails);
                    }
                }
                At::Ready => {
                    can(How::Well);
                    if faulty && scenario.way == Way::Libvirt {
                        can(How::Fails);
                        can(How::FailsLate);
                    }
                }
                At::Killed => {
                    if self.is_over(order.instance) || !scenario.works(Flaw::NoProof) {
                        can(How::Well);
                    }
                }
                At::Asked => {
                    can(How::Well);
                    if faulty {
                        can(How::Fails);
                    }
                }
            }
            let waited_for = daemon.tasks.get(&order.number).is_some_and(|task| matches!(task.step, Step::Acting(..)));
            if faulty && waited_for {
                acts.push(Act::Late(order.number));
            }
        }
        if let Some(plan) = &daemon.pending {
            let free = daemon.lock.is_none() || daemon.lock == Some(RESTART);
            // A dying process is waited for.
            let waits = self.life == Life::Dying && scenario.works(Flaw::DyingCountsAsAlive);
            if free && (plan.started || !waits) {
                acts.push(Act::Restart(How::Well));
                if faulty && !plan.started && self.life == Life::Dead {
                    acts.push(Act::Restart(How::Fails));
                }
            }
        }
    }

    /// Whether an instance is dead.
    fn is_over(&self, instance: u8) -> bool {
        self.instance != instance || self.life == Life::Dead
    }

    /// Begins to execute a request.
    pub(super) fn begin_order(&mut self, number: Number, who: Who) {
        *self.observed.acted.entry(who).or_default() += 1;
        if let Some(daemon) = &mut self.daemon {
            daemon.orders.push(Order { number, who, instance: 0, step: At::Waiting });
        }
    }

    /// An order's next step.
    pub(super) fn order(&mut self, scenario: &Scenario, number: Number, how: How) {
        let Some(daemon) = &mut self.daemon else { return };
        let Some(at) = daemon.orders.iter().position(|order| order.number == number) else { return };
        let order = daemon.orders[at].clone();
        let op = scenario.clients[order.who].op;
        if how != How::Well {
            self.left.faults -= 1;
        }
        let next = match order.step {
            At::Waiting => self.take_lock(scenario, number, op),
            At::Locked => self.first_step(scenario, &order, op, how),
            At::Ready => Some(self.strike(scenario, &order, op, how)),
            At::Killed => {
                self.end(scenario, &order, op, true);
                None
            }
            At::Asked => {
                let proven = match how {
                    How::Well => self.is_over(order.instance),
                    How::Fails | How::FailsLate => !scenario.works(Flaw::NoProof),
                };
                self.observed.owed |= proven && op == Op::Reboot;
                self.end(scenario, &order, op, proven);
                None
            }
        };
        if let (Some(next), Some(daemon)) = (next, &mut self.daemon) {
            let instance = if order.step == At::Waiting { self.instance } else { order.instance };
            daemon.orders[at] = Order { instance, step: next, ..order };
        }
    }

    fn take_lock(&mut self, scenario: &Scenario, number: Number, op: Op) -> Option<At> {
        let daemon = self.daemon.as_mut()?;
        daemon.lock = Some(number);
        if op == Op::Off {
            // An off of any client ends a pending restart.
            if scenario.works(Flaw::OffLeavesRestart) {
                daemon.pending = None;
                self.record = None;
            }
            self.observed.owed = false;
        } else {
            self.observed.kept_off = false;
        }
        Some(At::Locked)
    }

    fn first_step(&mut self, scenario: &Scenario, order: &Order, op: Op, how: How) -> Option<At> {
        let well = how == How::Well;
        match (op, self.life) {
            (Op::On, Life::Dead) => {
                if well {
                    self.rise();
                    self.drop_restart();
                }
                self.end(scenario, order, op, well);
                None
            }
            (Op::On, Life::Alive | Life::Dying) => {
                // An instance that another daemon may have killed is not known to run on.
                let pending = self.daemon.as_ref().and_then(|daemon| daemon.pending.as_ref());
                let runs = pending.is_none_or(|plan| plan.instance != self.instance);
                if runs {
                    self.drop_restart();
                }
                self.end(scenario, order, op, runs);
                None
            }
            // Off by libvirt's answer to a new query.
            (_, Life::Dead) => {
                self.end(scenario, order, op, well);
                None
            }
            (Op::Reboot, Life::Alive | Life::Dying) => {
                if scenario.works(Flaw::NoRecord) {
                    self.record = Some(self.instance);
                }
                Some(At::Ready)
            }
            (_, Life::Alive | Life::Dying) => {
                if well && scenario.way == Way::Direct {
                    self.destroy = Some((order.who, order.number));
                }
                Some(At::Ready)
            }
        }
    }

    fn strike(&mut self, scenario: &Scenario, order: &Order, op: Op, how: How) -> At {
        if how != How::Fails && self.life == Life::Alive {
            // A pidfd means one instance; libvirt's destroy means whatever runs.
            let meant = scenario.way == Way::Libvirt || self.instance == order.instance;
            if meant {
                self.observed.killed.entry(order.who).or_default().insert(self.instance);
                self.life = Life::Dying;
            }
        }
        if scenario.way == Way::Libvirt {
            if how != How::Fails {
                self.life = Life::Dead;
            }
            return At::Asked;
        }
        self.observed.owed |= op == Op::Reboot;
        At::Killed
    }

    /// The order is over, with this result.
    fn end(&mut self, scenario: &Scenario, order: &Order, op: Op, success: bool) {
        let killed = matches!(order.step, At::Killed | At::Asked);
        if op == Op::Reboot && killed {
            if success {
                self.record = scenario.works(Flaw::NoRecord).then_some(order.instance);
            } else {
                self.record = None;
            }
        }
        self.observed.kept_off |= op == Op::Off && success;
        let Some(daemon) = &mut self.daemon else { return };
        if op == Op::Reboot && killed && success {
            daemon.pending = Some(Plan { instance: order.instance, inherited: false, attempts: 0, started: false });
        }
        daemon.orders.retain(|other| other.number != order.number);
        let outcome = Outcome { success, instance: order.instance };
        if let Some(task) = daemon.tasks.get_mut(&order.number) {
            match task.step.clone() {
                Step::Acting(claim, peer) => task.step = Step::Ended(claim, peer, outcome),
                Step::Unclaimed(ticket, peer, at) => {
                    self.claim_late(scenario, order.number, ticket, (peer, at), outcome);
                }
                // It was answered already, when its time was over.
                Step::Calling(_) | Step::Connected(..) | Step::Talking(..) | Step::Read(..) | Step::Claimed(..) => {}
                Step::Refused(..) | Step::Ended(..) | Step::ReadAgain(..) => {}
            }
        }
        // Not before libvirt's destroy is over: it must not hit what a later request starts.
        if self.destroy.is_none_or(|(_, number)| number != order.number) || !scenario.works(Flaw::LockReleasedEarly) {
            self.unlock(order.number);
        }
    }

    /// Releases the lock if its holder is done.
    pub(super) fn unlock(&mut self, number: Number) {
        if let Some(daemon) = &mut self.daemon {
            let acts = daemon.orders.iter().any(|order| order.number == number);
            if daemon.lock == Some(number) && !acts {
                daemon.lock = None;
            }
        }
    }

    /// The client's time is over.
    pub(super) fn late(&mut self, number: Number) {
        self.left.faults -= 1;
        let task = self.daemon.as_mut().and_then(|daemon| daemon.tasks.get_mut(&number));
        if let Some(task) = task
            && let Step::Acting(claim, peer) = task.step.clone()
        {
            task.step = Step::Ended(claim, peer, Outcome { success: false, instance: 0 });
        }
    }

    fn rise(&mut self) {
        self.instance += 1;
        self.life = Life::Alive;
        self.observed.owed = false;
        self.observed.started = true;
        self.observed.risen |= self.observed.kept_off;
    }

    fn drop_restart(&mut self) {
        self.record = None;
        if let Some(Daemon { pending, lock, .. }) = &mut self.daemon {
            *pending = None;
            if *lock == Some(RESTART) {
                *lock = None;
            }
        }
    }

    /// The pending restart's next step.
    pub(super) fn restart(&mut self, how: How) {
        let Some(daemon) = &mut self.daemon else { return };
        let Some(plan) = &mut daemon.pending else { return };
        let runs_on = plan.inherited && self.instance == plan.instance;
        match (self.life, how) {
            _ if plan.started => self.drop_restart(),
            // The domain was never killed.
            (Life::Alive | Life::Dying, _) if runs_on => {
                self.observed.owed &= self.life == Life::Dying;
                self.drop_restart();
            }
            // It was started meanwhile.
            (Life::Alive | Life::Dying, _) => self.drop_restart(),
            (Life::Dead, How::Well) => {
                plan.started = true;
                daemon.lock = Some(RESTART);
                self.rise();
            }
            (Life::Dead, How::Fails | How::FailsLate) => {
                self.left.faults -= 1;
                plan.attempts += 1;
                if plan.attempts >= ATTEMPTS {
                    // The daemon logs an error.
                    (self.observed.owed, self.observed.gave_up) = (false, true);
                    self.drop_restart();
                }
            }
        }
    }
}
