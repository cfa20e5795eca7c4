//! Calls about one domain. Everything here blocks, and runs on the threads of a
//! [`pool`](super::pool).
//!
//! Each call looks its domain up again, by UUID: no libvirt handle outlives its call, so none
//! outlives its connection.

use std::collections::HashMap;
use std::fmt;

use fence_common::domain_state;
use fence_common::target::Target;
use uuid::Uuid;
use virt::domain::Domain as Handle;
use virt::error::ErrorNumber;
use zeroize::Zeroizing;

use super::{CallError, Connect, Direction, LibvirtError, connection::once, error::known, migration};

/// libvirt's `virDomainState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u8);

impl State {
    /// Also of a domain whose process lives and of which libvirt says nothing.
    pub(crate) const RUNNING: Self = Self(domain_state::RUNNING);
    pub(crate) const SHUT_OFF: Self = Self(domain_state::SHUT_OFF);

    /// A value of no known state stays one that means "unknown" and nothing else.
    fn of(state: u32) -> Self {
        Self(u8::try_from(state).unwrap_or(u8::MAX))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(domain_state::name(self.0))
    }
}

/// Whether a domain has power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Power {
    /// It exists as a process or container, in this state.
    Active(State),
    /// libvirt positively says that it does not.
    Off,
    /// It is off here because it has moved to another host, where it may run.
    MovedAway,
}

impl Power {
    pub(crate) fn is_active(self) -> bool {
        matches!(self, Self::Active(_))
    }
}

/// A domain on one connection. Where its functions return `None`, libvirt positively says that
/// there is no such domain.
pub(crate) struct Domain(Handle);

impl Domain {
    /// Looks a domain up by its UUID.
    pub(crate) fn find(connect: &Connect, uuid: Uuid) -> Result<Option<Self>, CallError> {
        Ok(known(Handle::lookup_by_uuid(connect, uuid))?.map(Self))
    }

    /// The same of a domain that must be there: "no such domain" is an error, too.
    pub(crate) fn get(connect: &Connect, uuid: Uuid) -> Result<Self, CallError> {
        Ok(Self(Handle::lookup_by_uuid(connect, uuid)?))
    }

    fn find_target(connect: &Connect, target: &Target) -> Result<Option<Self>, CallError> {
        match target {
            Target::Uuid(uuid) => Self::find(connect, *uuid),
            // `virt` panics on such a name. None exists, as libvirt's names are C strings.
            Target::Name(name) if name.contains('\0') => Ok(None),
            Target::Name(name) => Ok(known(Handle::lookup_by_name(connect, name))?.map(Self)),
        }
    }

    pub(crate) fn name(&self) -> Result<String, CallError> {
        Ok(self.0.get_name()?)
    }

    /// libvirt's number of the running instance. A handle keeps the number that it was looked up
    /// with.
    pub(crate) fn id(&self) -> Option<u32> {
        self.0.get_id()
    }

    pub(crate) fn state(&self) -> Result<Option<State>, CallError> {
        Ok(known(self.0.get_state())?.map(|(state, _)| State::of(state)))
    }

    pub(crate) fn power(&self) -> Result<Option<Power>, CallError> {
        let Some((state, reason)) = known(self.0.get_state())? else { return Ok(None) };
        Ok(Some(match state {
            virt_sys::VIR_DOMAIN_SHUTOFF if u32::try_from(reason) == Ok(virt_sys::VIR_DOMAIN_SHUTOFF_MIGRATED) => {
                Power::MovedAway
            }
            virt_sys::VIR_DOMAIN_SHUTOFF => Power::Off,
            virt_sys::VIR_DOMAIN_RUNNING
            | virt_sys::VIR_DOMAIN_BLOCKED
            | virt_sys::VIR_DOMAIN_PAUSED
            | virt_sys::VIR_DOMAIN_SHUTDOWN
            | virt_sys::VIR_DOMAIN_PMSUSPENDED => Power::Active(State::of(state)),
            // "Crashed" and unknown states can be either: a definition may keep a crashed guest as
            // a process.
            _ => match known(self.0.is_active())? {
                None => return Ok(None),
                Some(true) => Power::Active(State::of(state)),
                Some(false) => Power::Off,
            },
        }))
    }

    /// Whether it has a definition that outlives it.
    pub(crate) fn is_persistent(&self) -> Result<Option<bool>, CallError> {
        known(self.0.is_persistent())
    }

    /// Whether it has been stopped here for another host to go on with it. The inner `None`:
    /// libvirt does not say.
    pub(crate) fn is_leaving(&self) -> Result<Option<Option<bool>>, CallError> {
        known(migration::is_leaving(&self.0))
    }

    /// The migration that is under way.
    pub(crate) fn migration(&self) -> Result<Direction, CallError> {
        Ok(migration::direction(&self.0)?)
    }

    /// Asks libvirt to end the job that it is doing with the domain.
    pub(crate) fn abort_job(&self) -> Result<(), CallError> {
        Ok(super::ffi::abort_job(&self.0)?)
    }

    /// Its XML without its secrets.
    pub(crate) fn plain_xml(&self) -> Result<Zeroizing<String>, CallError> {
        Ok(Zeroizing::new(self.0.get_xml_desc(0)?))
    }

    /// Its XML, with its secrets if we may have them: without its password a display would come
    /// back open.
    pub(crate) fn xml(&self) -> Result<Zeroizing<String>, CallError> {
        let xml = match self.0.get_xml_desc(virt_sys::VIR_DOMAIN_XML_SECURE) {
            Err(error) if matches!(error.code(), ErrorNumber::OperationDenied | ErrorNumber::AccessDenied) => {
                self.0.get_xml_desc(0)
            }
            other => other,
        };
        xml.map(Zeroizing::new).map_err(|error| CallError::Libvirt(LibvirtError::without_text(&error)))
    }

    pub(crate) fn suspend(&self) -> Result<(), CallError> {
        Ok(self.0.suspend().map(drop)?)
    }

    pub(crate) fn resume(&self) -> Result<(), CallError> {
        Ok(self.0.resume().map(drop)?)
    }

    pub(crate) fn destroy(&self) -> Result<(), CallError> {
        Ok(self.0.destroy()?)
    }

    /// Asks the driver to reset it. An event tells that it *was* reset.
    pub(crate) fn reset(&self) -> Result<(), CallError> {
        Ok(self.0.reset().map(drop)?)
    }

    /// Whether libvirt has saved an image of it, from which a start would resume it.
    pub(crate) fn has_saved_image(&self) -> bool {
        matches!(self.0.has_managed_save(0), Ok(true))
    }

    /// Starts it from its definition. `force_boot`: not from its saved image.
    pub(crate) fn start(&self, force_boot: bool) -> Result<(), CallError> {
        let flags = if force_boot { virt_sys::VIR_DOMAIN_START_FORCE_BOOT } else { 0 };
        Ok(self.0.create_with_flags(flags).map(drop)?)
    }

    /// Starts a transient domain.
    pub(crate) fn start_transient(connect: &Connect, xml: &str) -> Result<Self, CallError> {
        let started = Handle::create_xml(connect, xml, 0);
        started.map(Self).map_err(|error| CallError::Libvirt(LibvirtError::without_text(&error)))
    }
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

/// Looks `target` up. `None` only if libvirt positively says that there is no such domain.
pub(crate) fn look_up(connect: &Connect, target: &Target) -> Result<Option<Seen>, CallError> {
    // A transient domain can vanish between the two calls, and be back at once. The second look
    // says what is so.
    for _ in 0..2 {
        let Some(domain) = Domain::find_target(connect, target)? else { return Ok(None) };
        if let Some(power) = domain.power()? {
            return Ok(Some(Seen { name: domain.name()?, uuid: domain.0.get_uuid()?, id: domain.id(), power }));
        }
    }
    Err(CallError::Overdue)
}

/// The number of the instance that libvirt speaks of now.
pub(crate) fn id(connect: &Connect, uuid: Uuid) -> Result<Option<u32>, CallError> {
    Ok(Domain::find(connect, uuid)?.and_then(|domain| domain.id()))
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
    let found = uuids.into_iter().filter_map(|uuid| Domain::find(connect, uuid).transpose());
    found.filter_map(|domain| domain.and_then(|domain| row(&domain)).transpose()).collect()
}

/// All domains. `known` has the states of running instances; one that it lacks is asked for. So a
/// thousand domains take one call.
pub(crate) fn list(connect: &Connect, known: &HashMap<(Uuid, u32), State>) -> Result<Vec<Row>, CallError> {
    let all = connect.list_all_domains(0)?;
    let one = |domain| -> Result<Option<Row>, CallError> {
        let domain = Domain(domain);
        let (uuid, id) = (domain.0.get_uuid()?, domain.id());
        match id.map_or(Some(&State::SHUT_OFF), |id| known.get(&(uuid, id))) {
            Some(&state) => Ok(Some(Row { name: domain.name()?, uuid, id, state })),
            None => row(&domain),
        }
    };
    all.into_iter().filter_map(|domain| one(domain).transpose()).collect()
}

/// A domain's row. `None`: it has vanished meanwhile.
fn row(domain: &Domain) -> Result<Option<Row>, CallError> {
    let Some(state) = domain.state()? else { return Ok(None) };
    Ok(Some(Row { name: domain.name()?, uuid: domain.0.get_uuid()?, id: domain.id(), state }))
}

/// All domains of a URI, asked from outside of the daemon. Blocks as long as the server does.
pub(crate) fn list_once(uri: &str) -> Result<Vec<Row>, CallError> {
    once(uri, |connect| list(connect, &HashMap::new()))
}

/// The UUIDs of all domains.
pub(crate) fn uuids(connect: &Connect) -> Result<Vec<Uuid>, CallError> {
    connect.list_all_domains(0)?.iter().map(|domain| Ok(domain.get_uuid()?)).collect()
}

/// A real libvirt error that is anything but "no such domain".
#[cfg(test)]
pub(crate) fn some_error() -> CallError {
    let error = list_once("test:///nonexistent.xml").err().unwrap();
    assert!(matches!(error, CallError::Libvirt(_)));
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_libvirts_error_code_means_no_such_domain() {
        let error =
            once("test:///default", |connect| Ok(known(Handle::lookup_by_name(connect, "nobody").map(drop)).unwrap()));
        assert_eq!(error, Ok(None));
        let failed = virt::connect::Connect::open(Some("test:///nonexistent.xml")).map(drop);
        assert!(known(failed).is_err());
    }

    #[test]
    fn a_name_that_cannot_be_is_unknown_and_no_panic() {
        let of = |name: &str| once("test:///default", |connect| look_up(connect, &Target::Name(name.to_owned())));
        assert!(of("te\0st").unwrap().is_none());
        assert!(of("test").unwrap().is_some());
    }
}
