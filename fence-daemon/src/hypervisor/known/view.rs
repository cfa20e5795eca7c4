//! What is known of URIs and their domains, for reports. It comes from the table, the connection's
//! state and the pidfds. libvirt is not asked, so this never waits.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::{Entry, Uri};
use crate::clock::Moment;

/// A URI and its domains.
#[derive(Clone, Debug)]
pub struct UriView {
    /// The URI.
    pub uri: Arc<str>,
    /// Whether it is connected.
    pub connected: bool,
    /// Connected, but the last question was not answered in time.
    pub silent: bool,
    /// Since when it is, or is not, connected. `None`: there was no connection yet.
    pub since: Option<Moment>,
    /// What went wrong last, and when, even if all is well now.
    pub last_error: Option<(Moment, String)>,
    /// Whether its domains are processes of this host that we know how to find.
    pub local: bool,
    /// The domains that are known, by name.
    pub domains: Vec<DomainView>,
}

/// A domain as the table knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// How it is.
    pub state: DomainState,
    /// Its process, where that is at hand.
    pub pid: Option<i32>,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// Whether this was observed over the present connection.
    pub fresh: bool,
    /// Processes of it that live although libvirt no longer speaks of them.
    pub orphans: Vec<i32>,
    /// Its disks whose writes this host cannot see: a server carries out what it was sent, also
    /// after the domain's death.
    pub unseen: Vec<String>,
}

/// How a domain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// libvirt's state of a domain that has power.
    Active(String),
    /// libvirt says that it is off.
    Off,
    /// It is off here because it moved to another host.
    MovedAway,
    /// It was killed, and its process is not dead yet.
    Dying,
    /// Its process is dead, and libvirt has not said so yet.
    Dead,
    /// libvirt knows no such domain any more, and a process of it lives.
    Lost,
}

/// A URI and its domains.
pub(crate) fn view(uri: &Uri) -> UriView {
    let state = uri.state().borrow().clone();
    let generation = uri.table.generation();
    let mut domains: Vec<_> = uri
        .table
        .all()
        .into_iter()
        .map(|(uuid, entry)| {
            let orphans = uri.table.orphans(uuid).iter().map(|victim| victim.pid()).collect();
            DomainView { unseen: uri.table.belongings.unseen(uuid), ..domain(uuid, entry, generation, orphans) }
        })
        .collect();
    domains.extend(uri.table.all_orphans().into_iter().map(|(uuid, orphans)| DomainView {
        name: orphans.first().map_or_else(String::new, |victim| victim.name().to_owned()),
        uuid,
        state: DomainState::Lost,
        pid: None,
        persistent: false,
        fresh: true,
        orphans: orphans.iter().map(|victim| victim.pid()).collect(),
        unseen: uri.table.belongings.unseen(uuid),
    }));
    domains.sort_by(|one, other| (&one.name, one.uuid).cmp(&(&other.name, other.uuid)));
    UriView {
        uri: Arc::clone(&uri.text),
        connected: state.connected,
        silent: uri.silent.load(Ordering::Relaxed),
        since: state.since,
        last_error: state.last_error,
        local: uri.table.driver.is_some(),
        domains,
    }
}

fn domain(uuid: Uuid, entry: Entry, generation: u64, orphans: Vec<i32>) -> DomainView {
    let victim = entry.victim().filter(|victim| !victim.is_dead());
    let state = match (&entry.instance, victim) {
        (None, _) if entry.moved_away => DomainState::MovedAway,
        (None, _) => DomainState::Off,
        (Some(_), Some(victim)) if victim.is_dying() => DomainState::Dying,
        (Some(instance), None) if instance.victim.is_some() => DomainState::Dead,
        (Some(instance), _) => DomainState::Active(instance.state.to_string()),
    };
    DomainView {
        uuid,
        state,
        pid: victim.map(|victim| victim.pid()),
        persistent: entry.persistent,
        fresh: entry.generation == generation,
        orphans,
        unseen: Vec::new(),
        name: entry.name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Hypervisors;
    use crate::hypervisor::known::Instance;
    use crate::hypervisor::libvirt::State;

    fn entry(instance: Option<Instance>, moved_away: bool) -> Entry {
        Entry {
            name: "node1".to_owned(),
            persistent: true,
            moved_away,
            instance,
            macs: [].into(),
            cid: None,
            generation: 3,
        }
    }

    #[test]
    fn a_domain_is_told_as_the_table_has_it() {
        let running = Instance { id: 1, state: State(1), victim: None };
        for (entry, generation, state, fresh) in [
            (entry(None, false), 3, DomainState::Off, true),
            (entry(None, true), 3, DomainState::MovedAway, true),
            (entry(Some(running), false), 4, DomainState::Active("running".to_owned()), false),
        ] {
            let view = domain(Uuid::from_u128(7), entry, generation, vec![12]);
            assert_eq!((view.state, view.fresh, view.pid, view.orphans), (state, fresh, None, vec![12]));
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_uri_is_reported_with_its_domains_and_since_when() {
        let hypervisors = Hypervisors::start(&["test:///default".to_owned()], fence_config::Options::default());
        let before = Moment::now();
        hypervisors.wait_connected().await;
        // The table is filled after the connection is there.
        let view = loop {
            let view = hypervisors.view().remove(0);
            if !view.domains.is_empty() {
                break view;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        };
        assert!(view.connected && !view.local && !view.silent && view.last_error.is_none(), "{view:?}");
        assert!(view.since.is_some_and(|since| since >= before || before.since(since).as_secs() < 60));
        assert_eq!((view.domains.len(), view.domains[0].name.as_str()), (1, "test"));
        assert_eq!(view.domains[0].state, DomainState::Active("running".to_owned()));
        assert!(view.domains[0].fresh && hypervisors.restarts().is_empty());
    }
}
