//! The end of a run: all faults are over, and every domain is fenced and started once more.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use fence_common::wire::Op;
use fence_lab::process::poll_until;

use super::client::Asker;
use super::judge::{Judge, Told};
use super::site::{Domain, Host, World};

/// How long a domain may take until its fence succeeds: a restart that failed in an outage is tried
/// again at most a minute apart.
const LIMIT: Duration = Duration::from_secs(100);
/// The pause before a failure is asked about again.
const AGAIN: Duration = Duration::from_millis(500);

/// Fences and starts every domain. A failure that stays is a violation.
pub(super) fn take(world: &World, judge: &Judge) -> Result<()> {
    std::thread::scope(|scope| {
        let hosts = world.hosts.iter().enumerate();
        let threads: Vec<_> = hosts.map(|(number, host)| scope.spawn(move || of_host(number, host, judge))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("the exam panicked"))?)
    })
}

fn of_host(number: usize, host: &Host, judge: &Judge) -> Result<()> {
    for domain in &host.domains {
        for op in [Op::Off, Op::On] {
            if let Err(error) = succeeds(host, op, domain) {
                if !judge.is_violation(number, &error) {
                    let what = format_args!("{} of {} does not succeed any more: {error:#}", op.name(), domain.name);
                    judge.violation(format_args!("hypervisor {}: {what}", number + 1));
                }
                return Ok(());
            }
        }
        judge.note(|notes| notes.examined += 1);
    }
    for (name, witness) in &host.untouched {
        if witness.is_dead()? {
            judge.violation(format_args!("hypervisor {}: {name} is dead, and nobody may fence it", number + 1));
        }
    }
    Ok(())
}

fn succeeds(host: &Host, op: Op, domain: &Domain) -> Result<()> {
    let mut asker = Asker::OwnMulticast(host.guests.get(1).context("no guest")?.clone());
    poll_until("its success", LIMIT, || {
        let victims = domain.living(&host.hypervisor)?;
        let said = asker.ask(host, op, &domain.name, &victims)?;
        if said.told != Told::Success {
            std::thread::sleep(AGAIN);
            return Ok(None);
        }
        Ok(Some(()))
    })
}
