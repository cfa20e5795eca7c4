//! The end of a run: all faults are over, and every domain is fenced and started once more.

use std::time::Duration;

use anyhow::{Context as _, Result};
use fence_common::wire::Op;
use fence_lab::process::poll_until;

use super::client::Asker;
use super::hands::Hands;
use super::judge::{Judge, Told};
use super::site::{Domain, Host, World};
use super::trouble::virsh;

/// How long a domain may take until its fence succeeds: a restart that failed in an outage is tried
/// again at most a minute apart.
const LIMIT: Duration = Duration::from_secs(100);
/// The pause before a failure is asked about again.
const AGAIN: Duration = Duration::from_millis(500);

/// Fences and starts every domain. A failure that stays is a violation.
pub(super) fn take(world: &World, judge: &Judge, hands: &mut Hands<'_>) -> Result<()> {
    for (number, host) in world.hosts.iter().enumerate() {
        of_host(number, host, judge, hands)?;
    }
    Ok(())
}

fn of_host(number: usize, host: &Host, judge: &Judge, hands: &mut Hands<'_>) -> Result<()> {
    for domain in &host.domains {
        for op in [Op::Off, Op::On] {
            let mut result = succeeds(host, op, domain);
            if result.is_err() && is_wedged(host, domain) {
                // No order to libvirt helps but the administrator's: a new libvirtd.
                hands.renew_libvirtd(number)?;
                judge.note(|notes| notes.wedged += 1);
                result = succeeds(host, op, domain);
            }
            if let Err(error) = result {
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

/// Whether libvirtd itself holds the domain for ever: a job that waits for a machine that is dead.
fn is_wedged(host: &Host, domain: &Domain) -> bool {
    let destroyed = virsh(&host.hypervisor, domain.uri, &["destroy", &domain.name]);
    destroyed.is_err_and(|error| format!("{error:#}").contains("state change lock"))
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
