//! SIGHUP: reads the configuration and the key files again, and takes all of them or nothing. Names
//! of tcp listeners are looked up again.
//!
//! Keys, groups, rate limits, listeners, and how domains are killed and rebooted change at once.
//! All else takes a restart: a file with such a change is refused as one with a mistake is. So is a
//! listener that cannot be opened. The log then shows where it is, and `systemctl status` names it.

use std::path::PathBuf;
use std::sync::Arc;

use fence_common::sync::Current;
use fence_config::{Config, ConfigError, Groups, KeyFiles, Listener};
use tokio::runtime::Handle;
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::key_plan::{KeyPlan, ReloadError};
use super::listeners::Listeners;
use crate::hypervisor::Hypervisors;
use crate::intake::kernel;
use crate::intake::keyring::{Rotated, RotationError};
use crate::intake::memberships::chain;
use crate::intake::rate_limits::RateLimits;
use crate::intake::replay_cache::ReplayCache;
use crate::systemd::{self, StatusPart};

/// The configuration file and what it says.
#[derive(Clone, Debug)]
pub struct ConfigFile {
    /// The file.
    pub path: PathBuf,
    /// What the file said when it was last taken, without the command line.
    pub config: Config,
}

/// What a reload changes.
pub(super) struct Reload {
    pub(super) running: ConfigFile,
    pub(super) plan: KeyPlan,
    pub(super) groups: Current<Groups>,
    pub(super) limits: RateLimits,
    pub(super) replays: Arc<ReplayCache>,
    pub(super) hypervisors: Hypervisors,
    pub(super) listeners: Arc<Listeners>,
    /// Where `systemctl status` says why a file was not taken.
    pub(super) status: StatusPart,
    owners: Vec<KeyFiles>,
    numbers: ListenerNumbers,
}

/// The listeners that there ever were, by their numbers.
#[derive(Clone, Debug)]
struct ListenerNumbers(Vec<Listener>);

impl ListenerNumbers {
    /// The numbers of these listeners: a section has one for ever.
    fn of(&mut self, listeners: &[Listener]) -> Vec<usize> {
        let number = |listener: &Listener| {
            self.0.iter().position(|known| known.is_same_section(listener)).unwrap_or_else(|| {
                self.0.push(listener.clone());
                self.0.len().saturating_sub(1)
            })
        };
        listeners.iter().map(number).collect()
    }
}

/// Why nothing changes.
#[derive(Debug, thiserror::Error)]
enum NotTaken {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A key file, or the kernel refuses a key.
    #[error(transparent)]
    Keys(#[from] ReloadError),
    /// The kernel refuses the rate limits.
    #[error("{}", chain(.0))]
    Limits(#[from] kernel::Error),
}

/// What a reload has changed.
#[derive(Debug)]
struct Taken {
    keys: Rotated,
    /// Whether any key is needed.
    is_keyed: bool,
    /// The parts of the configuration that are others now.
    changed: Vec<&'static str>,
    /// A key that was dropped, and that a kernel program may still have.
    not_wiped: Option<ReloadError>,
}

impl Reload {
    pub(super) fn new(
        running: ConfigFile,
        plan: KeyPlan,
        (groups, limits, replays): (Current<Groups>, RateLimits, Arc<ReplayCache>),
        hypervisors: Hypervisors,
        listeners: Arc<Listeners>,
        status: StatusPart,
    ) -> Self {
        let owners = running.config.groups.key_files().map(|(_, files)| files.clone()).collect();
        let numbers = ListenerNumbers(running.config.listeners.clone());
        Self { running, plan, groups, limits, replays, hypervisors, listeners, status, owners, numbers }
    }

    /// Reads all files again, and takes what they say.
    fn reload(&mut self) -> Result<Taken, NotTaken> {
        let (mut config, warnings) = fence_config::load_again(&self.running.path, &self.running.config)?;
        let mut owners = self.owners.clone();
        config.groups.number_owners(&mut owners);
        let mut numbers = self.numbers.clone();
        let order = numbers.of(&config.listeners);
        let found = self.plan.read(&config.listeners, &config.groups)?;
        let before: Vec<_> =
            numbers.of(&self.running.config.listeners).into_iter().zip(&self.running.config.listeners).collect();
        let after: Vec<_> = order.iter().copied().zip(&config.listeners).collect();
        let listeners = self.listeners.prepare(&self.running.path, &before, &after)?;

        // What can fail comes first.
        let before = self.limits.now();
        self.limits.change(config.rate_limit.limits())?;
        let (mut keys, not_wiped) = match self.plan.rotate(&order, &found) {
            Ok(keys) => (keys, None),
            Err(error @ ReloadError::Rotation(RotationError::NotWiped(_))) => {
                (Rotated { added: 0, dropped: 0, accepted: 0 }, Some(error))
            }
            Err(error) => {
                if let Err(error) = self.limits.change(before) {
                    error!("old rate limits cannot be put back: {}", chain(&error));
                }
                return Err(error.into());
            }
        };
        // The groups before their keys: nobody is denied who has signed with a new key. If
        // everybody's key becomes a group's, nobody has it for a moment. A request at that moment
        // is sent again.
        let mut groups = config.groups.clone();
        groups.number_listeners(&order);
        self.groups.set(groups);
        let is_keyed = config.listeners.iter().any(|listener| listener.key_files().is_some());
        keys = keys.and(self.plan.set_groups(&found.groups.into_iter().map(|found| found.key).collect::<Vec<_>>()));
        self.replays.set_window(config.rate_limit.replay_window);
        self.hypervisors.set_options(config.hypervisor.clone());
        for line in warnings.lines() {
            warn!("{line}");
        }
        for (number, pair) in order.iter().zip(found.listeners) {
            if !self.plan.has(*number) {
                self.plan.add(*number, pair);
            }
        }
        self.plan.keep(&order);
        let mut changed = changed(&self.running.config, &config);
        changed.extend((!listeners.is_empty()).then_some("listeners"));
        Handle::current().block_on(self.listeners.carry_out(listeners, |number| self.plan.ring(number)));
        (self.running.config, self.owners, self.numbers) = (config, owners, numbers);
        Ok(Taken { keys, is_keyed, changed, not_wiped })
    }

    /// Reads all files again, and tells what came of it.
    fn at_signal(&mut self) {
        let taken = match self.reload() {
            Ok(taken) => taken,
            Err(refused) => {
                // One line for `systemctl status`, and all lines for the log.
                self.status.show(&format!("the last reload was refused: {refused}"));
                error!("SIGHUP: the old keys stay in force, and the old configuration: {refused}");
                if let NotTaken::Config(error) = refused {
                    error.render(false).lines().for_each(|line| error!("{line}"));
                }
                return;
            }
        };
        self.status.show("");
        let Rotated { added, dropped, accepted } = taken.keys;
        match taken.not_wiped {
            Some(error) => error!("SIGHUP: {error}"),
            None if !taken.is_keyed => {
                info!("SIGHUP: no key is needed (hash and auth are \"none\"), so none is read again");
            }
            None if added + dropped == 0 => info!(accepted, "SIGHUP: the keys were read again, and are the same"),
            None => info!(accepted, added, dropped, "SIGHUP: the keys were read again, and changed"),
        }
        if !taken.changed.is_empty() {
            info!("the configuration was read again, and changed: {}", taken.changed.join(", "));
        }
    }
}

/// The parts in which two configurations differ.
fn changed(one: &Config, other: &Config) -> Vec<&'static str> {
    let has_other_files = |listener: &Listener| {
        let mut same = one.listeners.iter().filter(|before| before.is_same_section(listener));
        same.any(|before| before.key_files() != listener.key_files())
    };
    let each = [
        ("key files", other.listeners.iter().any(has_other_files)),
        ("groups", one.groups != other.groups),
        ("rate limits", one.rate_limit != other.rate_limit),
        ("how domains are killed and rebooted", one.hypervisor != other.hypervisor),
    ];
    each.iter().filter(|(_, differs)| *differs).map(|(part, _)| *part).collect()
}

/// Reloads at each SIGHUP, until it is dropped. Tells systemd when that begins and ends, and
/// `reloads` at its beginning.
pub(super) async fn at_each(mut hangup: Signal, mut reload: Reload, reloads: watch::Sender<()>) {
    while hangup.recv().await.is_some() {
        systemd::notify_reloading();
        reloads.send_replace(());
        // It waits while another process writes a file.
        let again = tokio::task::spawn_blocking(move || {
            reload.at_signal();
            reload
        });
        match again.await {
            Ok(again) => reload = again,
            // It has panicked, which must not end the daemon.
            Err(error) => return error!("SIGHUP: files are not read again any more: {error}"),
        }
        systemd::notify_ready();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fence_config::{Source, Warnings, parse};

    use super::*;

    /// A request under way carries its listener's number, and the new groups decide about it.
    #[test]
    fn a_section_has_one_number_whatever_comes_and_goes_around_it() {
        let listeners = |sections: &str| {
            let text = format!(
                "fence_virtd {{ listener = \"multicast,tcp\"; backend = \"libvirt\"; }}\nlisteners {{ {sections} }}\n\
                 groups {{ group {{ listener = \"b\"; ip = \"10.0.0.1\"; uuid = \"a\"; }} }}\n"
            );
            parse(&Source::new(Path::new("f"), text.as_bytes()), Warnings::default()).unwrap().0
        };
        let [a, b] = ["a", "b"].map(|name| format!("multicast \"{name}\" {{ interface = \"if-{name}\"; }}"));
        let mut numbers = ListenerNumbers(listeners(&format!("{a} {b}")).listeners);
        for (sections, expected, of_b) in [(b.clone(), vec![1, 2], 1), (format!("{b} {a}"), vec![1, 0, 2], 1)] {
            let mut config = listeners(&sections);
            let order = numbers.of(&config.listeners);
            assert_eq!(order, expected, "{sections}");
            config.groups.number_listeners(&order);
            let Groups::Only(groups) = &config.groups else { panic!("one group") };
            assert_eq!(groups[0].listeners, [of_b], "{sections}");
        }
    }
}
