//! Which domains, and which of this host's processes, a word about a domain may mean. Whether they
//! live is [`host`](crate::hypervisor::process::host)'s to say.

use fence_common::target::Target;
use uuid::Uuid;

use super::{FoundDomain, Identity, Known, Uri};
use crate::hypervisor::process::{Driver, Job, Look, Remains, Whom};

/// A domain of which this host has processes, whatever the URIs say of it.
pub(crate) struct Unknown {
    /// The URI's index.
    pub(crate) index: usize,
    pub(crate) domain: Identity,
    /// Whether it may be on its way to or from another host, by libvirt's status files. It must not
    /// be killed then.
    pub(crate) may_be_elsewhere: bool,
}

impl Known {
    /// The driver of a URI, if its domains are processes of this host.
    pub(crate) fn driver(&self, index: usize) -> Option<Driver> {
        self.uris.get(index)?.table.driver
    }

    /// The first URI of a driver.
    pub(crate) fn index_of(&self, driver: Driver) -> Option<usize> {
        self.uris.iter().position(|uri| uri.table.driver == Some(driver))
    }

    /// Whether exactly one process of a domain lives here. Then a reset ends only what that one was
    /// doing.
    pub(crate) async fn is_alone(&self, uri: &Uri, domain: &Identity) -> bool {
        if !uri.table.orphans(domain.uuid).is_empty() {
            return false;
        }
        let Some(whom) = uri.table.whom(domain.uuid, &domain.name) else { return true };
        matches!(self.host.remains_now(&whom).await, Remains::Living(found) if found.len() == 1)
    }

    /// The domains that a word about a domain at a URI may be about, each once, with the URI's
    /// index: the domain there, and a machine of this host with that UUID, since a URI without a
    /// driver may speak of it, too. A container is its own URI's alone.
    pub(crate) fn whoms(&self, index: usize, uuid: Uuid, name: &str) -> Vec<(usize, Whom)> {
        let machines = (0..self.uris.len()).filter(|other| self.driver(*other) == Some(Driver::Qemu));
        let others = machines.filter(|_| self.driver(index) != Some(Driver::Lxc));
        let mut whoms: Vec<(usize, Whom)> = Vec::new();
        for index in std::iter::once(index).chain(others) {
            let whom = self.uris.get(index).and_then(|uri| uri.table.whom(uuid, name));
            if let Some(whom) = whom.filter(|whom| !whoms.iter().any(|(_, known)| known == whom)) {
                whoms.push((index, whom));
            }
        }
        whoms
    }

    /// Whether something of a domain that is off by libvirt's word lives here, for reports.
    pub(crate) async fn lives(&self, FoundDomain { index, seen }: &FoundDomain) -> bool {
        for (_, whom) in self.whoms(*index, seen.uuid, &seen.name) {
            if !matches!(self.host.remains_now(&whom).await, Remains::Nothing) {
                return true;
            }
        }
        false
    }

    /// The domains that a target means by this host's own processes, and the machines with these
    /// UUIDs.
    pub(crate) fn unknown(&self, look: &Look, target: &Target, machines: &[Uuid]) -> Vec<Unknown> {
        let mut all: Vec<Unknown> = Vec::new();
        for (driver, uuid, name) in look.domains() {
            let is_meant = match target {
                Target::Uuid(wanted) => uuid == *wanted,
                Target::Name(wanted) => name == Some(wanted.as_str()),
            };
            let is_meant = is_meant || driver == Driver::Qemu && machines.contains(&uuid);
            let Some(index) = self.index_of(driver) else { continue };
            if !is_meant || all.iter().any(|known| known.index == index && known.domain.uuid == uuid) {
                continue;
            }
            let name = name.map_or_else(|| uuid.to_string(), str::to_owned);
            let uri = &self.uris[index];
            // A URI that answers has lost the domain, and its file with it. A silent one may be in
            // the middle of a migration.
            let may_be_elsewhere = match Job::on_record(driver, &name) {
                Job::None => false,
                Job::Unknown => !uri.is_lively(),
                Job::Leaving | Job::Arriving => true,
            };
            let may_be_elsewhere = may_be_elsewhere || uri.table.is_elsewhere(uuid);
            all.push(Unknown { index, domain: uri.identity(uuid, &name), may_be_elsewhere });
        }
        all
    }
}
