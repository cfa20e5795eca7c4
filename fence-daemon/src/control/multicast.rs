//! A multicast listener in the report.

use std::sync::{Arc, OnceLock, Weak};

use fence_common::sync::Current;
use fence_common::verdict::Counters;
use fence_config::{Alone, Multicast};
use fence_control::report::{Interface, Listener};
use fence_net::way_out;
use tokio::sync::watch;

use super::inspector::{by_name, clip};
use crate::intake::kernel::CounterReader;
use crate::intake::listening::HeardInterface;
use crate::intake::memberships::Heard;
use crate::intake::socket::RequestSocket;
use crate::observe::sources::{self, RejectedView, SourceView};

/// What can be looked at.
pub struct Watched {
    settings: Current<Multicast>,
    /// Whether there is to be a kernel program.
    program_wanted: bool,
    /// Not kept: the membership goes with it.
    socket: Weak<RequestSocket>,
    heard: OnceLock<watch::Receiver<Heard>>,
    kernel: OnceLock<CounterReader>,
    sources: OnceLock<sources::Provider>,
    rejected: OnceLock<sources::RejectedProvider>,
}

impl Watched {
    /// A listener that is starting.
    #[must_use]
    pub fn new(settings: Multicast, socket: &Arc<RequestSocket>, program_wanted: bool) -> Arc<Self> {
        Arc::new(Self {
            settings: settings.into(),
            program_wanted,
            socket: Arc::downgrade(socket),
            heard: OnceLock::new(),
            kernel: OnceLock::new(),
            sources: OnceLock::new(),
            rejected: OnceLock::new(),
        })
    }

    /// The configuration of the listener.
    #[must_use]
    pub fn settings(&self) -> Arc<Multicast> {
        self.settings.now()
    }

    /// The listener has these settings from now on.
    pub fn set_settings(&self, settings: Multicast) {
        self.settings.set(settings);
    }

    /// Where the listener says what it hears.
    pub fn set_heard(&self, heard: watch::Receiver<Heard>) {
        let _ = self.heard.set(heard);
    }

    /// The kernel program's counters, once it is loaded.
    pub fn set_kernel(&self, kernel: CounterReader) {
        let _ = self.kernel.set(kernel);
    }

    /// The kernel program's sources, once it is loaded.
    pub fn set_sources(&self, sources: sources::Provider) {
        let _ = self.sources.set(sources);
    }

    /// The senders that the kernel program rejected, once it is loaded.
    pub fn set_rejected(&self, rejected: sources::RejectedProvider) {
        let _ = self.rejected.set(rejected);
    }

    fn heard(&self) -> Heard {
        self.heard.get().map(|heard| heard.borrow().clone()).unwrap_or_default()
    }

    /// The kernel program's counters: `None` without a program, and `None` within if the kernel
    /// does not tell.
    pub(super) fn in_kernel(&self) -> Option<Option<Counters>> {
        self.kernel.get().map(|kernel| kernel.counters().ok())
    }

    /// The socket's counters.
    pub(super) fn at_socket(&self) -> Counters {
        self.socket.upgrade().map(|socket| socket.counters()).unwrap_or_default()
    }

    /// The kernel program's sources.
    pub(super) fn sources(&self) -> Vec<SourceView> {
        self.sources.get().map(|sources| sources()).unwrap_or_default()
    }

    /// The senders that the kernel program rejected.
    pub(super) fn rejected(&self) -> Vec<RejectedView> {
        self.rejected.get().map(|rejected| rejected()).unwrap_or_default()
    }

    /// Whether an interface lacks the program that it should have.
    pub(super) fn lacks_program(&self) -> bool {
        let heard = self.heard();
        self.program_wanted && !heard.loading && heard.interfaces.iter().any(|one| one.mode.is_none())
    }

    pub(super) fn view(&self) -> Listener {
        let (settings, heard) = (self.settings(), self.heard());
        let interfaces: Vec<_> = heard.interfaces.iter().map(|one| self.interface(one, &heard)).collect();
        let mut status =
            if heard.status.is_empty() { "looking for interfaces".to_owned() } else { heard.status.clone() };
        if !interfaces.is_empty() && interfaces.iter().all(|interface| interface.alone) {
            status.push_str(", alone");
        }
        Listener {
            kind: "multicast".to_owned(),
            name: settings.name.clone(),
            address: settings.group.to_string(),
            port: settings.port,
            interface: settings.interface.clone(),
            hash: settings.hash.name().to_owned(),
            auth: settings.auth.name().to_owned(),
            attach: Some(settings.attach.name().to_owned()),
            alone: Some(<&str>::from(settings.alone).to_owned()),
            hears: heard.hears,
            status,
            interfaces,
            counters: by_name(self.at_socket()),
        }
    }

    fn interface(&self, one: &HeardInterface, heard: &Heard) -> Interface {
        let way_out = way_out(one.interface.index);
        Interface {
            name: one.interface.name.clone(),
            program: one.mode.map(|mode| mode.to_string()),
            program_id: heard.programs.get(&one.interface.index).copied(),
            reason: one.reason.clone().map(clip),
            alone: match self.settings().alone {
                Alone::Auto => way_out.is_none(),
                Alone::Yes => true,
                Alone::No => false,
            },
            way_out,
        }
    }
}

/// The first way out of an interface, in words, as the kernel sees it now.
fn way_out(interface: u32) -> Option<String> {
    match way_out::of(interface) {
        Ok(ways) => ways.first().map(ToString::to_string),
        Err(error) => Some(format!("an unknown way (the kernel does not say: {error})")),
    }
}
