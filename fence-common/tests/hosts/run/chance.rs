//! What can happen, and the mending at the end.

use fence_common::hosts::{GroupAnswer, NodeId};
use fence_common::wire::Op;

use super::{Broken, Client, Open, PATIENCE, Run, SECOND, Theme};
use crate::cpg::Item;
use crate::driver::{Daemon, node};
use crate::world::Birth;

impl Run {
    /// Something of what the schedule is about.
    pub(super) fn themed(&mut self, host: usize) -> Result<(), Broken> {
        match self.theme {
            Theme::Any => {}
            Theme::Starts => match self.random.below(3) {
                0 => self.regroup(),
                1 => self.several_starts(),
                _ => self.new_client(Op::Off),
            },
            Theme::Moves => {
                self.start_outside(host);
                self.new_client(Op::Off);
                self.go_on(60)?;
                self.hop();
                self.go_on(100)?;
            }
            Theme::Arrivals => self.leave_unheard(host)?,
            Theme::Twins => {
                (0..self.hosts).for_each(|host| self.start_outside(host));
                self.client_of(Op::Reboot, (0..self.hosts).collect());
                self.go_on(200)?;
            }
            Theme::Doubts => {
                self.world.machines[host].libvirt_answers ^= true;
                self.new_client(Op::Off);
            }
        }
        Ok(())
    }

    /// Some of what is under way goes on, and nothing else happens.
    fn go_on(&mut self, most: usize) -> Result<(), Broken> {
        for _ in 0..self.random.below(most) {
            if !self.busy_step()? {
                break;
            }
        }
        Ok(())
    }

    /// A machine moves at once.
    fn hop(&mut self) {
        let living: Vec<_> = (0..self.world.instances.len()).filter(|at| self.world.instances[*at].lives).collect();
        let Some(&at) = self.random.one_of(&living) else { return };
        let to = self.random.below(self.hosts);
        let is_still = self.world.instances[at].to.is_none() && self.world.instances[at].host != to;
        if is_still && self.world.is_booted(self.now, to) {
            self.world.migrate(at, to);
            self.world.migrated(at, true);
            self.note(|run| format!("moves at once: {:?}", run.world.instances[at]));
        }
    }

    /// A host starts the domain, and is cut off before it tells so. The machine is on its way to
    /// another host then, where a client wants it off. The migration fails.
    fn leave_unheard(&mut self, host: usize) -> Result<(), Broken> {
        let to = (host + 1 + self.random.below(self.hosts - 1)) % self.hosts;
        self.start_outside(host);
        let Some(at) = self.world.here(host).find(|at| self.world.instances[*at].born == self.now) else {
            return Ok(());
        };
        if self.world.is_booted(self.now, to) {
            self.world.migrate(at, to);
        }
        for other in 0..self.hosts {
            let part = usize::from(other == host);
            self.parts[other] = if self.world.machines[other].is_up { part } else { self.hosts + other };
        }
        self.note(|run| format!("leaves a host that is cut off: {:?}", run.world.instances[at]));
        self.form_rings();
        (0..self.hosts).for_each(|host| self.tell_quorum(host));
        if self.random.percent(70) {
            self.settle()?;
        }
        self.client_of(Op::Off, vec![to]);
        self.go_on(60)?;
        self.world.migrated(at, false);
        self.go_on(100)
    }

    pub(super) fn deliver(&mut self, host: usize) {
        let is_idle = self.daemons[host].as_ref().is_none_or(|daemon| daemon.stands.is_some());
        if is_idle || !self.cpg.has_undelivered(host) {
            return;
        }
        if let (Some(item), Some(daemon)) = (self.cpg.deliver(host), &mut self.daemons[host]) {
            daemon.take(self.now, item);
        }
    }

    pub(super) fn work(&mut self, host: usize) {
        let Some(daemon) = self.daemons[host].as_mut().filter(|daemon| daemon.stands.is_none()) else { return };
        if daemon.has_tasks() {
            daemon.work(self.now, &mut self.world, &mut self.random);
        } else {
            daemon.start_again(self.now, &mut self.world);
        }
    }

    pub(super) fn tick(&mut self, host: usize) {
        if let Some(daemon) = self.daemons[host].as_mut().filter(|daemon| daemon.stands.is_none())
            && daemon.hosts.wake().is_some_and(|at| at <= self.now)
        {
            daemon.hosts.tick(self.now);
        }
    }

    /// A cut between hosts, or its end; a host without power forms a ring of its own.
    pub(super) fn regroup(&mut self) {
        let is_whole = self.random.percent(50);
        let ways = 1 + self.random.below(self.hosts);
        for host in 0..self.hosts {
            let part = if is_whole { 0 } else { self.random.below(ways) };
            self.parts[host] = if self.world.machines[host].is_up { part } else { self.hosts + host };
        }
        self.form_rings();
        for host in 0..self.hosts {
            if self.random.percent(60) {
                self.tell_quorum(host);
            }
        }
    }

    /// corosync forms rings of the hosts that reach each other. Its daemons hear of it later.
    fn form_rings(&mut self) {
        self.note(|run| format!("rings: {:?}", run.parts));
        let before: Vec<_> = (0..self.hosts).map(|host| self.cpg.ring_number(host)).collect();
        self.cpg.regroup(&self.parts.clone(), &mut self.random);
        for (host, before) in before.into_iter().enumerate() {
            if before != self.cpg.ring_number(host) {
                let ring = self.ring_of(host);
                self.news[host].push_back(ring);
            }
        }
    }

    /// The ring of a host, and whether it has quorum.
    fn ring_of(&self, host: usize) -> (bool, Vec<NodeId>) {
        let ring = self.cpg.ring(host);
        // With two hosts each half goes on ("two_node").
        let is_quorate = self.hosts == 2 || 2 * ring.len() > self.hosts;
        (is_quorate, ring.iter().map(|host| node(*host)).collect())
    }

    /// Tells a daemon of all rings since the last time.
    pub(super) fn tell_quorum(&mut self, host: usize) {
        let Some(daemon) = self.daemons[host].as_mut().filter(|daemon| daemon.stands.is_none()) else { return };
        for (is_quorate, ring) in std::mem::take(&mut self.news[host]) {
            self.quorum[host] |= is_quorate;
            self.quorum_now[host] = is_quorate;
            daemon.hosts.quorum(self.now, is_quorate, &ring);
        }
    }

    pub(super) fn stop_daemon(&mut self, host: usize) {
        if let Some(daemon) = self.daemons[host].take() {
            (self.quorum[host], self.quorum_now[host]) = (false, false);
            self.note(|_| format!("host{host}: the daemon dies"));
            self.cpg.leave(host, daemon.member, &mut self.random);
            let clients: Vec<_> =
                self.open.iter().filter(|((at, _), _)| *at == host).map(|(_, open)| open.client).collect();
            for client in clients {
                // It may connect to the next one that calls back.
                self.clients[client].is_called &= self.random.percent(50);
            }
            self.open.retain(|(at, _), _| *at != host);
        }
    }

    pub(super) fn start_daemon(&mut self, host: usize) {
        let machine = &self.world.machines[host];
        if !machine.is_up
            || self.daemons[host].is_some()
            || self.cpg.ring(host).iter().any(|at| !self.world.machines[*at].is_up)
        {
            return;
        }
        self.note(|_| format!("host{host}: the daemon starts"));
        let daemon = Daemon::new(self.now, host, self.options, &self.world, &mut self.random);
        self.cpg.join(host, daemon.member);
        self.daemons[host] = Some(daemon);
        // It is told of the ring that is there, and of no earlier one.
        self.news[host] = [self.ring_of(host)].into();
        self.tell_quorum(host);
    }

    pub(super) fn stand_or_go(&mut self, host: usize) {
        let Some(daemon) = &mut self.daemons[host] else { return };
        let Some(since) = daemon.stands.take() else {
            daemon.stands = Some(self.now);
            return self.note(|_| format!("host{host}: the daemon stands still"));
        };
        self.note(|_| format!("host{host}: the daemon goes on"));
        if self.now - since > 2 * SECOND {
            // What has waited is dropped, but the memberships.
            while let Some(item) = self.cpg.deliver(host) {
                if let (Item::Membership(_), Some(daemon)) = (&item, &mut self.daemons[host]) {
                    daemon.take(self.now, item);
                }
            }
            if let Some(daemon) = &mut self.daemons[host] {
                daemon.hosts.stalled(self.now);
            }
        }
        self.tell_quorum(host);
    }

    pub(super) fn migrate(&mut self) {
        let living: Vec<_> = (0..self.world.instances.len()).filter(|at| self.world.instances[*at].lives).collect();
        let Some(&at) = self.random.one_of(&living) else { return };
        if self.world.instances[at].to.is_some() {
            let is_well = self.random.percent(80);
            self.world.migrated(at, is_well);
            return self.note(|run| format!("migrated: {:?}", run.world.instances[at]));
        }
        let to = self.random.below(self.hosts);
        if to != self.world.instances[at].host && self.world.is_booted(self.now, to) {
            self.world.migrate(at, to);
            self.note(|run| format!("migrates: {:?}", run.world.instances[at]));
        }
    }

    /// The hosts' own cluster fences a host, mostly one that is cut off.
    pub(super) fn fence(&mut self, host: usize) {
        let is_cut_off = self.cpg.ring(host).len() < self.hosts || self.daemons[host].is_none();
        if !self.world.machines[host].is_up || (!is_cut_off && self.random.percent(80)) {
            return;
        }
        let stays_off = self.random.percent(50);
        self.lose_power(host);
        self.note(|_| format!("host{host}: fenced, stays off: {stays_off}"));
        let machine = &mut self.world.machines[host];
        machine.fenced = Some((self.now, stays_off));
        if !stays_off {
            (machine.is_up, machine.up_since) = (true, self.now);
        }
    }

    pub(super) fn lose_power(&mut self, host: usize) {
        if self.world.machines[host].is_up {
            self.note(|_| format!("host{host}: no power"));
            self.stop_daemon(host);
            self.world.dies(host);
            // A boot loses the record of acts, and takes longer than any client waits.
            self.acts.retain(|(at, _), _| *at != host);
            let autostarts = self.random.percent(50);
            self.world.machines[host].autostarts = autostarts;
            self.parts[host] = self.hosts + host;
            self.form_rings();
        }
    }

    /// A host has booted: libvirt starts its domains, with the daemon or without.
    pub(super) fn boot(&mut self, host: usize) {
        let machine = &self.world.machines[host];
        if !machine.is_up && (machine.fenced.is_none() || self.random.percent(if self.boots { 40 } else { 10 })) {
            let is_left_off = machine.fenced.is_some_and(|(at, stays_off)| stays_off && self.now - at < 3600 * SECOND);
            if is_left_off {
                if self.random.percent(50) {
                    // By the hosts' Pacemaker, whose history says so.
                    self.world.machines[host].fenced = None;
                } else if !self.join_ring(host) {
                    return;
                }
            }
            self.note(|_| format!("host{host}: switched on"));
            let machine = &mut self.world.machines[host];
            (machine.is_up, machine.up_since) = (true, self.now);
        }
        let is_booted = self.world.is_booted(self.now, host);
        let machine = &mut self.world.machines[host];
        if is_booted && machine.autostarts && machine.is_defined {
            machine.autostarts = false;
            self.note(|_| format!("host{host}: autostart"));
            if self.copies || self.world.living().next().is_none() {
                self.world.start(self.now, host, Birth::Outside);
            }
        }
    }

    /// A host that was left off is switched on by hand. Nothing runs there until it is in the ring
    /// of the others, as the guide demands. Returns whether there is such a ring.
    fn join_ring(&mut self, host: usize) -> bool {
        let is_others = |other: &usize| *other != host && self.world.machines[*other].is_up && self.ring_of(*other).0;
        let Some(other) = (0..self.hosts).find(is_others) else { return false };
        self.parts[host] = self.parts[other];
        self.form_rings();
        (0..self.hosts).for_each(|host| self.tell_quorum(host));
        true
    }

    /// An administrator starts the domain; in some schedules although it runs elsewhere.
    pub(super) fn start_outside(&mut self, host: usize) {
        let machine = &self.world.machines[host];
        let is_free = self.world.here(host).next().is_none() && machine.owes.is_none();
        let is_only = self.world.living().next().is_none() && self.world.machines.iter().all(|one| one.owes.is_none());
        if self.world.is_booted(self.now, host) && machine.is_defined && is_free && (is_only || self.copies) {
            self.note(|_| format!("host{host}: started by hand"));
            self.world.start(self.now, host, Birth::Outside);
        }
    }

    pub(super) fn tell_domains(&mut self, host: usize) {
        let table = self.world.table(host);
        if let Some(daemon) = self.daemons[host].as_mut().filter(|daemon| daemon.stands.is_none()) {
            daemon.hosts.domains(table);
        }
    }

    /// Everything that is under way ends, in a random order.
    pub(super) fn settle(&mut self) -> Result<(), Broken> {
        for _ in 0..20_000 {
            if !self.busy_step()? {
                return Ok(());
            }
        }
        Err("it never settles".into())
    }

    /// Something that is under way goes on. `false`: nothing is.
    fn busy_step(&mut self) -> Result<bool, Broken> {
        // What stands still does nothing.
        let goes = |host: usize| self.daemons[host].as_ref().is_some_and(|daemon| daemon.stands.is_none());
        let busy = |host: &usize| {
            let has_tasks = self.daemons[*host].as_ref().is_some_and(Daemon::has_tasks);
            self.cpg.has_unsent(*host) || (goes(*host) && (self.cpg.has_undelivered(*host) || has_tasks))
        };
        let hosts: Vec<_> = (0..self.hosts).filter(busy).collect();
        let Some(&host) = self.random.one_of(&hosts) else { return Ok(false) };
        self.now += 100_000;
        match self.random.below(3) {
            0 => self.cpg.order(host),
            1 => self.deliver(host),
            _ if self.daemons[host].as_ref().is_some_and(Daemon::has_tasks) => self.work(host),
            _ => {}
        }
        self.tick(host);
        self.judge()?;
        Ok(true)
    }

    /// Mends everything. Then an `off` must work.
    pub(super) fn mend(&mut self) -> Result<(), Broken> {
        self.note(|_| "all is mended".into());
        for host in 0..self.hosts {
            let machine = &mut self.world.machines[host];
            machine.up_since = 0;
            (machine.is_up, machine.libvirt_answers, machine.autostarts) = (true, true, false);
            if self.daemons[host].as_ref().is_some_and(|daemon| daemon.stands.is_some()) {
                self.now += 3 * SECOND;
                self.stand_or_go(host);
            }
        }
        for at in 0..self.world.instances.len() {
            self.world.migrated(at, true);
        }
        self.parts = vec![0; self.hosts];
        self.form_rings();
        for host in 0..self.hosts {
            self.start_daemon(host);
            self.tell_quorum(host);
        }
        self.settle()?;
        // What is open comes to an end.
        for _ in 0..2 {
            self.now += PATIENCE;
            for host in 0..self.hosts {
                self.tell_domains(host);
                self.tick(host);
            }
            self.judge()?;
            self.settle()?;
        }
        if let Some(open) = self.open.values().next() {
            return Err(format!("never answered: {:?}", self.clients[open.client]));
        }
        self.works()
    }

    /// A client's `off`, again and again: a host may fail by chance, not always.
    fn works(&mut self) -> Result<(), Broken> {
        let mut why = Vec::new();
        for host in (0..self.hosts).cycle().take(12) {
            let request = self.request(Op::Off);
            let hears = Vec::new();
            self.clients.push(Client {
                op: Op::Off,
                request,
                hears,
                sent: self.now,
                asked: None,
                is_called: true,
                answer: None,
            });
            let client = self.clients.len() - 1;
            let Some(daemon) = &mut self.daemons[host] else { return Err(format!("host{host} has no daemon")) };
            let question = daemon.ask(self.now, request, Op::Off, PATIENCE);
            self.open.insert((host, question), Open { client, asked: self.now });
            self.judge()?;
            self.settle()?;
            match self.clients[client].answer.take() {
                Some(GroupAnswer::Success) if self.world.living().next().is_none() => return Ok(()),
                answer => why.push(answer),
            }
            self.now += SECOND;
        }
        Err(format!("off does not work although all is well: {why:?}"))
    }
}
