//! Powering a domain off by libvirt's destroy, with libvirt's word as the proof.
//!
//! libvirt's word that a destroy succeeded is not enough: it is asked afresh for the state.
//!
//! A migration out is ended first, through libvirt. Once libvirt says that there is no such job any
//! more, the domain is either here and nowhere else, and can be destroyed; or it has left, and
//! nothing is said about it. What cannot be settled is a failure. A migration in is not ours to
//! end: as long as it lasts the domain runs on the other host.

use std::thread::sleep;
use std::time::Duration;

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;

use super::{Off, Source, Unproven};
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::known::{Table, Uri};
use crate::hypervisor::libvirt::{CallError, Connect, Direction, Domain, Lane, Power, domain};
use crate::hypervisor::process::Driver;

/// How long a migration may take to end. A job that cannot be aborted (the last phase, post-copy)
/// is over by then, or is left alone.
const SETTLE: Duration = Duration::from_secs(8);
/// How often the daemon asks whether it has ended.
const LOOK: Duration = Duration::from_millis(20);

/// Has libvirt power a domain off. `restart` asks for what starting it again needs.
pub(super) async fn off(uri: &Uri, uuid: Uuid, restart: bool, deadline: &Deadline) -> Result<Off, CallError> {
    if let Some(victim) = uri.table.instance(uuid).as_ref().and_then(|instance| instance.living()) {
        // If it cannot be looked at, what was seen of it before has to do.
        let _ = uri.table.note_kill(uuid, victim);
    }
    let (table, step) = (Arc::clone(&uri.table), deadline.clone());
    let power_off = move |connect: &Connect| power_off(connect, uuid, restart, &table, &step);
    let off = uri.call(Lane::Kill, deadline.by(), power_off).await;
    if may_overrule(uri.table.driver, &off)
        && let Ok(Some(id)) = uri.call(Lane::Query, deadline.by(), move |connect| domain::id(connect, uuid)).await
        && uri.table.is_dead(uuid, Some(id))
    {
        return Ok(Off::Already(Moment::now()));
    }
    off
}

/// Whether the death of its process may overrule libvirt's "active". libvirt calls a container
/// active for ever that it could not kill in time. Of containers only: the death of a QEMU that is
/// on its way to another host proves nothing.
fn may_overrule(driver: Option<Driver>, off: &Result<Off, CallError>) -> bool {
    driver == Some(Driver::Lxc) && matches!(off, Ok(Off::Unproven { why: Unproven::Active(..), .. }))
}

/// Powers the domain off, hard, and proves it.
///
/// # Errors
/// libvirt cannot say, or the deadline was over before anything was done to the domain.
pub(crate) fn power_off(
    connect: &Connect,
    uuid: Uuid,
    restart: bool,
    table: &Table,
    deadline: &Deadline,
) -> Result<Off, CallError> {
    let Some(domain) = Domain::find(connect, uuid)? else { return Ok(Off::Gone) };
    let was = match domain.power()? {
        None => return Ok(Off::Gone),
        Some(Power::Off) if table.is_leaving(uuid) => {
            let name = domain.name()?;
            tracing::warn!(domain = %name.escape_debug(), "libvirt calls it shut off, but it ended on its way to another host, which may have gone on with it: fence it there, or start it here");
            return Ok(Off::MovedAway);
        }
        Some(Power::Off) => return Ok(Off::Already(Moment::now())),
        Some(Power::MovedAway) => return Ok(Off::MovedAway),
        Some(Power::Active(state)) => state,
    };
    // There may be no job, and the machine runs on the other host: after a migration whose libvirtd
    // has died, and after a post-copy migration that has failed.
    if !settle(&domain, deadline)? || domain.is_leaving()? == Some(Some(true)) {
        return Ok(Off::Unproven { was, why: Unproven::Migrating });
    }
    // If that is not known, the start will show it.
    let transient = domain.is_persistent().is_ok_and(|persistent| persistent == Some(false));
    let source = match restart && transient {
        true => domain.xml().map_or_else(Source::Nothing, Source::Xml),
        false => Source::Definition,
    };
    deadline.check()?;
    if table.driver == Some(Driver::Lxc) {
        // The driver asks a running container to end, and waits for 1.6 s before it kills it. It
        // kills a paused one at once. If the container cannot be paused, it only takes longer.
        let _ = domain.suspend();
        if let Err(late) = deadline.check() {
            // It was to end, not to stand still.
            let _ = domain.resume();
            return Err(late.into());
        }
    }
    let destroyed = domain.destroy();
    fault::point(Point::AfterDestroy);
    // Whatever destroy said ("not running" is an error, too), libvirt is asked afresh.
    let power = domain.power();
    let at = Moment::now();
    // No migration was under way when it was destroyed. If it ended by itself, one may have been.
    let ours = destroyed.is_ok();
    if ours {
        table.note_leaving(uuid, false);
    }
    Ok(match judge(destroyed, power, transient) {
        Ok(()) if !ours && table.is_leaving(uuid) => Off::Unproven { was, why: Unproven::MovedAway },
        Ok(()) => Off::Proven { was, at, source },
        Err(why) => Off::Unproven { was, why },
    })
}

/// Whether destroy's result and the state asked for after it prove that the domain is off.
fn judge(
    destroyed: Result<(), CallError>,
    power: Result<Option<Power>, CallError>,
    transient: bool,
) -> Result<(), Unproven> {
    let error = |destroyed: Result<(), CallError>| match destroyed {
        Err(CallError::Libvirt(error)) => Some(error),
        _ => None,
    };
    match power {
        Ok(Some(Power::Off)) => Ok(()),
        // A transient domain that was destroyed is gone. If destroy failed it may have migrated.
        Ok(None) if destroyed.is_ok() && transient => Ok(()),
        Ok(None) => Err(Unproven::Vanished(error(destroyed))),
        Ok(Some(Power::MovedAway)) => Err(Unproven::MovedAway),
        Ok(Some(Power::Active(state))) => Err(Unproven::Active(state, error(destroyed))),
        Err(unknown) => Err(Unproven::Unknown(unknown)),
    }
}

/// Ends a migration of the domain to another host, if there is one. `true`: no migration is under
/// way (any more).
///
/// # Errors
/// libvirt cannot say.
pub(crate) fn settle(domain: &Domain, deadline: &Deadline) -> Result<bool, CallError> {
    let until = deadline.not_after(Instant::now() + SETTLE);
    let mut aborted = false;
    loop {
        match domain.migration()? {
            Direction::None => return Ok(true),
            Direction::In => return Ok(false),
            Direction::Out if !aborted => {
                aborted = true;
                deadline.check()?;
                // It may have ended, or be in a phase that cannot be ended. The next question
                // shows.
                if let Err(error) = domain.abort_job() {
                    tracing::debug!(%error, "the migration is not ended");
                }
            }
            Direction::Out => {}
        }
        if until.check().is_err() {
            return Ok(false);
        }
        sleep(LOOK);
    }
}

/// Destroys this instance, for libvirt's record.
pub(crate) fn destroy(connect: &Connect, uuid: Uuid, instance: u32, deadline: &Deadline) -> Result<(), CallError> {
    let domain = Domain::get(connect, uuid)?;
    // Else somebody else has started it again meanwhile.
    if domain.id() == Some(instance) {
        deadline.check()?;
        domain.destroy()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::libvirt::{State, domain::some_error as error};

    #[test]
    fn only_a_fresh_positive_word_proves_a_domain_off() {
        let bad = || Err(error());
        for transient in [false, true] {
            for destroyed in [|| Ok(()), || Err(error())] {
                assert_eq!(judge(destroyed(), Ok(Some(Power::Off)), transient), Ok(()));
                assert!(judge(destroyed(), Ok(Some(Power::MovedAway)), transient).is_err());
                assert!(judge(destroyed(), Ok(Some(Power::Active(State(1)))), transient).is_err());
                assert!(judge(destroyed(), Err(error()), transient).is_err());
            }
            assert!(judge(bad(), Ok(None), transient).is_err(), "vanished by another hand");
        }
        assert_eq!(judge(Ok(()), Ok(None), true), Ok(()));
        assert!(judge(Ok(()), Ok(None), false).is_err(), "a persistent domain does not vanish by destroy");
    }

    #[test]
    fn a_dead_process_overrules_libvirt_about_containers_that_it_calls_active_and_about_nothing_else() {
        let unproven = |why| Ok(Off::Unproven { was: State(1), why });
        let active = || unproven(Unproven::Active(State(3), None));
        assert!(may_overrule(Some(Driver::Lxc), &active()));
        for driver in [Some(Driver::Qemu), None] {
            assert!(!may_overrule(driver, &active()), "{driver:?}");
        }
        let others = [
            unproven(Unproven::Migrating),
            unproven(Unproven::MovedAway),
            unproven(Unproven::Vanished(None)),
            unproven(Unproven::Orphan),
            unproven(Unproven::Unknown(CallError::Overdue)),
            Ok(Off::MovedAway),
            Ok(Off::Gone),
            Err(CallError::Overdue),
        ];
        for driver in [Some(Driver::Lxc), Some(Driver::Qemu), None] {
            assert!(others.iter().all(|off| !may_overrule(driver, off)), "{driver:?}");
        }
    }
}
