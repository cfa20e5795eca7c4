//! What is done to one domain on one connection: look-up, power state, destroy with proof, start. Everything here blocks and runs
//! on the threads of [`connection`](super::connection).
//!
//! A domain is looked up anew for each job, by UUID: no libvirt handle outlives its job, so none outlives its connection.

mod start;

use std::fmt;
use std::sync::Arc;

use fence_common::target::Target;
use fence_net::neighbour::Mac;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumber};
use zeroize::Zeroizing;

pub(crate) use self::start::{Started, start};
use super::error::{CallError, LibvirtError, is_no_domain};
use super::migration;
use crate::clock::Moment;
use crate::fault::{self, Point};
use crate::hypervisor::deadline::Deadline;
use crate::hypervisor::fence::fence_race;
use crate::hypervisor::known::table::{Entry, Instance, Table};
use crate::hypervisor::process::host::{Disks, Left};
use crate::hypervisor::process::victim::{Driver, Victim, VictimError};

/// libvirt's `virDomainState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u8);

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match u32::from(self.0) {
            virt_sys::VIR_DOMAIN_RUNNING => "running",
            virt_sys::VIR_DOMAIN_BLOCKED => "blocked",
            virt_sys::VIR_DOMAIN_PAUSED => "paused",
            virt_sys::VIR_DOMAIN_SHUTDOWN => "shutting down",
            virt_sys::VIR_DOMAIN_SHUTOFF => "shut off",
            virt_sys::VIR_DOMAIN_CRASHED => "crashed",
            virt_sys::VIR_DOMAIN_PMSUSPENDED => "suspended",
            _ => "in an unknown state",
        })
    }
}

/// Whether a domain has power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Power {
    /// It exists as a process or container, whatever it is doing.
    Active(State),
    /// libvirt positively says that it does not.
    Off,
    /// It is off here because it has moved to another host, where it may well run.
    MovedAway,
}

/// A domain as a look-up found it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// libvirt's number of the running instance.
    pub(crate) id: Option<u32>,
    pub(crate) power: Power,
}

/// Looks `target` up; `None` only if libvirt positively says that there is no such domain.
pub(crate) fn look_up(connect: &Connect, target: &Target) -> Result<Option<Seen>, CallError> {
    // A transient domain can vanish between the two calls, and be back at once: the second look says what is so.
    for _ in 0..2 {
        let found = match target {
            Target::Uuid(uuid) => Domain::lookup_by_uuid(connect, *uuid),
            // `virt` panics on such a name. None exists, as libvirt's names are C strings.
            Target::Name(name) if name.contains('\0') => return Ok(None),
            Target::Name(name) => Domain::lookup_by_name(connect, name),
        };
        let Some(domain) = known(found)? else { return Ok(None) };
        if let Some(power) = known(power(&domain))? {
            let (name, uuid, id) = (domain.get_name()?, domain.get_uuid()?, domain.get_id());
            return Ok(Some(Seen { name, uuid, id, power }));
        }
    }
    Err(CallError::Overdue)
}

/// A domain of a list.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) uuid: Uuid,
    /// libvirt's number of the running instance.
    pub(crate) id: Option<u32>,
    pub(crate) state: State,
}

/// These domains, each asked for by itself.
pub(crate) fn list_each(connect: &Connect, uuids: Vec<Uuid>) -> Result<Vec<Row>, CallError> {
    let mut list = Vec::new();
    for uuid in uuids {
        let Some(domain) = known(Domain::lookup_by_uuid(connect, uuid))? else { continue };
        list.extend(row(&domain)?);
    }
    Ok(list)
}

/// All domains.
pub(crate) fn list(connect: &Connect) -> Result<Vec<Row>, CallError> {
    let mut list = Vec::new();
    for domain in connect.list_all_domains(0)? {
        list.extend(row(&domain)?);
    }
    Ok(list)
}

/// A domain's row; none if it has vanished meanwhile.
fn row(domain: &Domain) -> Result<Option<Row>, CallError> {
    let Some((state, _)) = known(domain.get_state())? else { return Ok(None) };
    let (name, uuid, id) = (domain.get_name()?, domain.get_uuid()?, domain.get_id());
    Ok(Some(Row { name, uuid, id, state: state_of(state) }))
}

/// What was observed of a domain.
#[derive(Default)]
pub(crate) struct Observed {
    /// How it is; `None` if there is no such domain.
    pub(crate) entry: Option<Entry>,
    /// Why its process is not at hand although it runs.
    pub(crate) lacking: Option<VictimError>,
    /// Whether it has been stopped for another host to go on with it; `None` where that cannot be seen.
    pub(crate) leaving: Option<bool>,
    /// The XML of a transient domain that runs: without it a reboot could not bring it back while libvirt is silent.
    pub(crate) xml: Option<Arc<Zeroizing<String>>>,
    /// Its disks by its definition, if that could be had.
    pub(crate) disks: Option<Disks>,
}

/// How a domain is now, for the table: with its process, if the driver's are known, held while libvirt says before and after that it is the same
/// instance that runs. `old` is what was known before: a process that lives is not looked for again.
pub(crate) fn observe(
    connect: &Connect,
    uuid: Uuid,
    driver: Option<Driver>,
    old: Option<&Entry>,
    generation: u64,
) -> Result<Observed, CallError> {
    // A domain can come and go between two calls; the next look says what is so.
    for _ in 0..3 {
        let Some(domain) = known(Domain::lookup_by_uuid(connect, uuid))? else { return Ok(Observed::default()) };
        let (Some(power), Some(persistent)) = (known(power(&domain))?, known(domain.is_persistent())?) else {
            continue;
        };
        let name = domain.get_name()?;
        let leaving = known(migration::is_leaving(&domain))?.flatten();
        let mut lacking = None;
        let instance = match (power, domain.get_id()) {
            (Power::Active(state), Some(id)) => {
                let before = old.filter(|old| old.generation == generation).and_then(|old| old.instance.as_ref());
                let before = before.filter(|before| before.id == id);
                let victim = match before.and_then(Instance::living) {
                    Some(victim) => Some(Arc::clone(victim)),
                    None => driver.and_then(|driver| match Victim::open(driver, &name, uuid) {
                        Ok(victim) => Some(Arc::new(victim)),
                        Err(error) => {
                            let known = old.and_then(|old| old.instance.as_ref()).filter(|known| known.id == id);
                            let kept = known.filter(|_| error.is_of_ended_controller(driver, id));
                            let kept = kept.and_then(|known| known.victim.clone());
                            lacking = kept.is_none().then_some(error);
                            kept
                        }
                    }),
                };
                if self::id(connect, uuid)? != Some(id) {
                    continue;
                }
                Some(Instance { id, state, victim })
            }
            _ => None,
        };
        // One that is off is asked for as well: its disks tell whose writes may be under way.
        let transient = instance.is_some() && !persistent;
        let xml = if transient { xml(&domain) } else { plain_xml(&domain) };
        let xml = xml.inspect_err(|error| tracing::debug!(%error, "a domain's XML cannot be had")).ok();
        let disks = xml.as_ref().and_then(|xml| Disks::of(xml).ok());
        let macs = xml.as_ref().filter(|_| instance.is_some()).map(|xml| macs(xml)).unwrap_or_default();
        let entry = Entry { name, persistent, moved_away: power == Power::MovedAway, instance, macs, generation };
        // What has a definition is started from that.
        let xml = xml.filter(|_| transient).map(Arc::new);
        return Ok(Observed { entry: Some(entry), lacking, leaving, xml, disks });
    }
    Err(CallError::Overdue)
}

/// The Ethernet addresses in the XML of a domain that runs. That they are not known keeps nobody from being fenced.
fn macs(xml: &str) -> Arc<[Mac]> {
    fence_race::macs(xml).unwrap_or_else(|error| {
        tracing::debug!(%error, "a domain's XML does not tell its interfaces");
        Arc::default()
    })
}

/// A domain's XML without its secrets.
fn plain_xml(domain: &Domain) -> Result<Zeroizing<String>, CallError> {
    Ok(Zeroizing::new(domain.get_xml_desc(0)?))
}

/// The UUIDs of all domains.
pub(crate) fn uuids(connect: &Connect) -> Result<Vec<Uuid>, CallError> {
    connect.list_all_domains(0)?.iter().map(|domain| Ok(domain.get_uuid()?)).collect()
}

/// The number of the instance that libvirt speaks of now.
pub(crate) fn id(connect: &Connect, uuid: Uuid) -> Result<Option<u32>, CallError> {
    // Asked with a look-up, as a handle keeps the number that it was looked up with.
    Ok(known(Domain::lookup_by_uuid(connect, uuid))?.and_then(|domain| domain.get_id()))
}

/// Destroys this instance, for libvirt's record.
pub(crate) fn destroy(connect: &Connect, uuid: Uuid, instance: u32, deadline: &Deadline) -> Result<(), CallError> {
    let domain = Domain::lookup_by_uuid(connect, uuid)?;
    // Somebody else may have started it again meanwhile.
    if domain.get_id() == Some(instance) {
        deadline.check()?;
        domain.destroy()?;
    }
    Ok(())
}

/// A domain's XML, with its secrets if we may have them.
pub(crate) fn xml_of(connect: &Connect, uuid: Uuid) -> Result<Zeroizing<String>, CallError> {
    xml(&Domain::lookup_by_uuid(connect, uuid)?)
}

/// `None` for libvirt's "no such domain"; every other error stays one.
fn known<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if is_no_domain(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A value of no known state stays one that means "unknown" and nothing else.
pub(crate) fn state_of(state: u32) -> State {
    State(u8::try_from(state).unwrap_or(u8::MAX))
}

/// Asks for the power state.
fn power(domain: &Domain) -> Result<Power, Error> {
    let (state, reason) = domain.get_state()?;
    Ok(match state {
        virt_sys::VIR_DOMAIN_SHUTOFF if u32::try_from(reason) == Ok(virt_sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => {
            Power::MovedAway
        }
        virt_sys::VIR_DOMAIN_SHUTOFF => Power::Off,
        virt_sys::VIR_DOMAIN_RUNNING
        | virt_sys::VIR_DOMAIN_BLOCKED
        | virt_sys::VIR_DOMAIN_PAUSED
        | virt_sys::VIR_DOMAIN_SHUTDOWN
        | virt_sys::VIR_DOMAIN_PMSUSPENDED => Power::Active(state_of(state)),
        // "Crashed" and what we do not know can be either: a crashed guest is kept as a process if its definition says so.
        _ if domain.is_active()? => Power::Active(state_of(state)),
        _ => Power::Off,
    })
}

/// What is needed to start a domain again.
pub(crate) enum Source {
    /// Its persistent definition.
    Definition,
    /// A transient domain's XML, taken while it ran. It may hold passwords: never logged, wiped after use.
    Xml(Zeroizing<String>),
    /// Nothing: why.
    Nothing(CallError),
}

impl Source {
    /// The XML, if that is what it is.
    pub(crate) fn xml(&self) -> Option<&str> {
        match self {
            Self::Xml(xml) => Some(xml.as_str()),
            Self::Definition | Self::Nothing(_) => None,
        }
    }
}

/// What came of powering a domain off.
pub(crate) enum Off {
    /// It was off already, at this moment.
    Already(Moment),
    /// It was active and is proven off since this moment; what a restart would need.
    Proven { was: State, at: Moment, source: Source },
    /// Off here, but only because it moved to another host.
    MovedAway,
    /// libvirt does not know it (any more).
    Gone,
    /// Not off, or not known to be off.
    Unproven { was: State, why: Unproven },
}

/// Why a destroyed domain does not count as off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unproven {
    /// It still is, or is again, in this state; with destroy's own error.
    Active(State, Option<LibvirtError>),
    /// It vanished, but not provably by our hand: it may run on another host now.
    Vanished(Option<LibvirtError>),
    /// It moved to another host while we were at it.
    MovedAway,
    /// The state could not be asked.
    Unknown(CallError),
    /// libvirt has lost it, and its process does not die.
    Stray,
    /// On this host something of it lives, or it cannot be told.
    Left(Left),
    /// It is on its way to or from another host, and cannot be held back. Nothing was done to it.
    Migrating,
}

/// Powers the domain off, hard, and proves it. `restart` asks for what starting it again needs.
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
    let driver = table.driver;
    let Some(domain) = known(Domain::lookup_by_uuid(connect, uuid))? else { return Ok(Off::Gone) };
    let was = match known(power(&domain))? {
        None => return Ok(Off::Gone),
        Some(Power::Off) if table.is_leaving(uuid) => {
            migration::warn_of(&domain.get_name()?);
            return Ok(Off::MovedAway);
        }
        Some(Power::Off) => return Ok(Off::Already(Moment::now())),
        Some(Power::MovedAway) => return Ok(Off::MovedAway),
        Some(Power::Active(state)) => state,
    };
    // No job need be left of a migration whose libvirtd has died, or of a post-copy one that has failed, and the machine runs there.
    if !migration::settle(&domain, deadline)? || migration::is_leaving(&domain)? == Some(true) {
        return Ok(Off::Unproven { was, why: Unproven::Migrating });
    }
    let transient = domain.is_persistent().map(|persistent| !persistent);
    let source = match (restart, &transient) {
        // What is not wanted is not asked for.
        (false, _) | (true, Ok(false)) => Source::Definition,
        (true, Ok(true)) => xml(&domain).map_or_else(Source::Nothing, Source::Xml),
        // Whether it has a definition will show when it is started.
        (true, Err(_)) => Source::Definition,
    };
    deadline.check()?;
    if driver == Some(Driver::Lxc) {
        // The driver asks a running container to end and waits for 1.6 s before it kills it; a paused one it kills at once. If it cannot be
        // paused it only takes longer.
        let _ = domain.suspend();
        if let Err(late) = deadline.check() {
            // It was not asked to stand still, but to end.
            let _ = domain.resume();
            return Err(late);
        }
    }
    let destroyed = domain.destroy();
    fault::point(Point::AfterDestroy);
    // Our own word is no proof: libvirt is asked afresh, whatever destroy said ("not running" is an error, too).
    let power = known(power(&domain));
    let at = Moment::now();
    // No migration was under way when it was destroyed. If it ended by itself before that, one may have been.
    let ours = destroyed.is_ok();
    if ours {
        table.note_leaving(uuid, false);
    }
    Ok(match judge(destroyed, power, transient.unwrap_or(false)) {
        Ok(()) if !ours && table.is_leaving(uuid) => Off::Unproven { was, why: Unproven::MovedAway },
        Ok(()) => Off::Proven { was, at, source },
        Err(why) => Off::Unproven { was, why },
    })
}

/// Whether destroy's result and the state asked for after it prove that the domain is off.
fn judge(destroyed: Result<(), Error>, power: Result<Option<Power>, Error>, transient: bool) -> Result<(), Unproven> {
    let error = |destroyed: Result<(), Error>| match destroyed.map_err(CallError::from) {
        Err(CallError::Libvirt(error)) => Some(error),
        _ => None,
    };
    match power {
        Ok(Some(Power::Off)) => Ok(()),
        // A transient domain that was destroyed is gone. If destroy failed it may have migrated away instead of dying.
        Ok(None) if destroyed.is_ok() && transient => Ok(()),
        Ok(None) => Err(Unproven::Vanished(error(destroyed))),
        Ok(Some(Power::MovedAway)) => Err(Unproven::MovedAway),
        Ok(Some(Power::Active(state))) => Err(Unproven::Active(state, error(destroyed))),
        Err(unknown) => Err(Unproven::Unknown(unknown.into())),
    }
}

/// A transient domain's XML, with its secrets if we may have them: without its password a display would come back open.
fn xml(domain: &Domain) -> Result<Zeroizing<String>, CallError> {
    let secure = domain.get_xml_desc(virt_sys::VIR_DOMAIN_XML_SECURE);
    let xml = match secure {
        Err(error) if matches!(error.code(), ErrorNumber::OperationDenied | ErrorNumber::AccessDenied) => {
            domain.get_xml_desc(0)
        }
        other => other,
    };
    xml.map(Zeroizing::new).map_err(|error| CallError::Libvirt(LibvirtError::without_text(&error)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A real libvirt error that is anything but "no such domain".
    fn error() -> Error {
        crate::hypervisor::libvirt::ffi::prepare().unwrap();
        let error = Connect::open(Some("test:///nonexistent.xml")).err().unwrap();
        assert!(!is_no_domain(&error));
        error
    }

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
    fn only_the_code_for_it_means_that_there_is_no_such_domain() {
        assert!(known::<()>(Err(error())).is_err());
        let connect = Connect::open(Some("test:///default")).unwrap();
        let unknown = Domain::lookup_by_name(&connect, "nobody").map(drop);
        assert_eq!(known(unknown), Ok(None));
    }

    #[test]
    fn a_name_that_cannot_be_is_unknown_and_no_panic() {
        crate::hypervisor::libvirt::ffi::prepare().unwrap();
        let connect = Connect::open(Some("test:///default")).unwrap();
        assert!(look_up(&connect, &Target::Name("te\0st".to_owned())).unwrap().is_none());
        assert!(look_up(&connect, &Target::Name("test".to_owned())).unwrap().is_some());
    }
}
