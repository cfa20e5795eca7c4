//! SIGHUP: reads the configuration and the key files again, and takes all of them or nothing. Names
//! of tcp listeners are looked up again.
//!
//! Keys, groups, rate limits, and how domains are killed and rebooted change at once. All else
//! takes a restart: a file with such a change is refused as one with a mistake is. The log then
//! shows where it is, and `systemctl status` names it.

use std::path::PathBuf;
use std::sync::Arc;

use fence_common::sync::Current;
use fence_config::{Config, ConfigError, Groups, KeyFiles, Listener};
use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::key_plan::{KeyPlan, ReloadError};
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
    /// Where `systemctl status` says why a file was not taken.
    pub(super) status: StatusPart,
    owners: Vec<KeyFiles>,
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
        groups: Current<Groups>,
        limits: RateLimits,
        replays: Arc<ReplayCache>,
        hypervisors: Hypervisors,
        status: StatusPart,
    ) -> Self {
        let owners = running.config.groups.key_files().map(|(_, files)| files.clone()).collect();
        Self { running, plan, groups, limits, replays, hypervisors, status, owners }
    }

    /// Reads all files again, and takes what they say.
    fn reload(&mut self) -> Result<Taken, NotTaken> {
        let (mut config, warnings) = fence_config::load_again(&self.running.path, &self.running.config)?;
        let mut owners = self.owners.clone();
        config.groups.number_owners(&mut owners);
        let found = self.plan.read(&config.listeners, &config.groups)?;

        // What can fail comes first.
        let before = self.limits.now();
        self.limits.change(config.rate_limit.limits())?;
        let (mut keys, not_wiped) = match self.plan.rotate(&found) {
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
        self.groups.set(config.groups.clone());
        let is_keyed = config.listeners.iter().any(|listener| listener.key_files().is_some());
        keys = keys.and(self.plan.set_groups(&found.groups.into_iter().map(|found| found.key).collect::<Vec<_>>()));
        self.replays.set_window(config.rate_limit.replay_window);
        self.hypervisors.set_options(config.hypervisor.clone());
        for line in warnings.lines() {
            warn!("{line}");
        }
        let changed = changed(&self.running.config, &config);
        (self.running.config, self.owners) = (config, owners);
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
    let files = |config: &Config| config.listeners.iter().map(Listener::key_files).collect::<Vec<_>>();
    let each = [
        ("key files", files(one) != files(other)),
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
