//! Keeps a multicast listener's socket and kernel program on the interfaces that exist: carries
//! out what [`Listening`] decides.
//!
//! The kernel may hold its lock for memberships and programs for long. So each listener has a task
//! and threads of its own for that, and no request waits for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use fence_common::verdict::Counters;
use fence_config::Alone;
use fence_net::interface::{Interface, Wanted};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::kernel::{self, Attachment, KernelProgram, Mode, Sharer};
use super::leads::Leads;
use super::links::Changes;
use super::listening::{Attached, Command, Ends, HeardInterface, InterfaceNews, Listening, Now, Refusal};
use super::socket::RequestSocket;
use crate::systemd::StatusPart;

/// The socket, the program, and the interfaces of both: one multicast listener's.
#[derive(Debug)]
pub struct Memberships {
    wanted: Wanted,
    socket: Arc<RequestSocket>,
    program: Option<(KernelProgram, Mode)>,
    /// The program, while it is still being loaded.
    coming: Option<Coming>,
    listening: Listening,
    leads: Leads,
    /// The status that systemd has.
    status: String,
    part: StatusPart,
    /// What its lines in the log begin with, if there are several listeners.
    label: String,
}

/// A program that is being loaded, and how it is to be attached. The loading task drops its end if
/// that fails.
pub type Coming = oneshot::Receiver<(KernelProgram, Mode)>;

/// What is listened on at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Whether requests are heard.
    pub hears: bool,
    /// The interfaces that they are heard through.
    pub interfaces: Vec<HeardInterface>,
    /// The kernel's ID of the program that is attached there, by the interface's index.
    pub programs: BTreeMap<u32, u32>,
    /// Whether the program is still being loaded.
    pub loading: bool,
    /// How it is, in a line.
    pub status: String,
}

impl Heard {
    /// The names of the interfaces, separated by commas.
    #[must_use]
    pub fn names(&self) -> String {
        self.interfaces.iter().map(|one| one.interface.name.as_str()).collect::<Vec<_>>().join(",")
    }

    /// How the program is attached, in a word; if the interfaces differ, a word for each.
    #[must_use]
    pub fn ways(&self) -> String {
        let way = |heard: &HeardInterface| heard.mode.map_or_else(|| "off".to_owned(), |mode| mode.to_string());
        match self.interfaces.split_first() {
            None => "off".to_owned(),
            Some((first, rest)) if rest.iter().all(|one| one.mode == first.mode) => way(first),
            Some(_) => {
                let each = |heard: &HeardInterface| format!("{}:{}", heard.interface.name, way(heard));
                self.interfaces.iter().map(each).collect::<Vec<_>>().join(",")
            }
        }
    }
}

impl Memberships {
    /// None yet: the listener is on no interface.
    #[must_use]
    pub fn new(wanted: Wanted, socket: Arc<RequestSocket>, program: Option<(KernelProgram, Mode)>) -> Self {
        let name = if let Wanted::Named(name) = &wanted { Some(name.clone()) } else { None };
        let listening = Listening::new(name, program.is_some());
        let leads = Leads::new(Alone::No);
        let (part, label) = (StatusPart::only(), String::new());
        Self { wanted, socket, program, coming: None, listening, leads, status: String::new(), part, label }
    }

    /// Begins its log lines with `label`, and shows its status as this part of the daemon's.
    #[must_use]
    pub fn among_others(self, label: String, part: StatusPart) -> Self {
        Self { label, part, ..self }
    }

    /// Logs where the interfaces lead, as far as that decides with this setting of `alone`.
    #[must_use]
    pub fn telling(self, alone: Alone) -> Self {
        Self { leads: Leads::new(alone), ..self }
    }

    /// Listens on another interface from the next look on.
    pub(super) fn want(&mut self, wanted: Wanted) {
        self.listening.want(if let Wanted::Named(name) = &wanted { Some(name.clone()) } else { None });
        self.wanted = wanted;
    }

    /// Attaches a program once it is loaded. Until then the socket serves.
    #[must_use]
    pub fn expecting(self, coming: Option<Coming>) -> Self {
        Self { coming, ..self }
    }

    /// Waits for the program that is being loaded, if there is one. Dropping the future loses
    /// nothing; call it again.
    pub(super) async fn program_came(&mut self) {
        let Some(coming) = &mut self.coming else { return std::future::pending().await };
        let program = coming.await.ok();
        self.coming = None;
        if program.is_some() {
            self.program = program;
            self.listening.bring_program();
        }
    }

    /// If there is nothing to listen on, logs it and returns the text for the waiting start.
    pub fn complain(&mut self) -> Option<String> {
        if !self.wanted.there().is_empty() {
            return None;
        }
        for (interface, line) in self.listening.tell() {
            self.log(&interface, &line);
        }
        self.show(&self.listening.status());
        Some(match &self.wanted {
            Wanted::Named(name) => waiting_for(name),
            Wanted::Suitable(_) => self.listening.status(),
        })
    }

    /// Looks at the interfaces and carries out what has to be done. May be as slow as the kernel.
    /// Must be called within a tokio runtime.
    pub(super) fn look(&mut self, changes: &Changes, again: bool) -> Heard {
        let there = self.wanted.there();
        let there_is = |index: u32| there.iter().any(|present| present.interface.index == index);
        let attached = self.listening.attached_to();
        let stays = |interface: &&Interface| there_is(interface.index) && !changes.ended(interface.index);
        let spoilt: BTreeMap<u32, Refusal> = attached
            .iter()
            .filter(stays)
            .filter_map(|interface| {
                let (program, _) = self.program.as_ref()?;
                let about = changes.concern(interface.index) || again;
                Some((interface.index, spoilt(program, interface, about)?))
            })
            .collect();
        for command in self.listening.look(&Now { there: &there, changes, spoilt: &spoilt, again }) {
            debug!(?command, "following the interfaces");
            self.carry_out(command);
        }
        for (interface, line) in self.listening.tell() {
            self.log(&interface, &line);
        }
        let status = self.listening.status();
        if self.status != status {
            self.show(&status);
            self.status = status;
        }
        let heard = self.heard();
        self.leads.look(&heard.interfaces);
        heard
    }

    /// Tells systemd the status.
    fn show(&self, status: &str) {
        self.part.show(&format!("{}{status}", self.label));
    }

    fn heard(&self) -> Heard {
        let listening = &self.listening;
        let interfaces = listening.heard_interfaces();
        let program = |heard: &HeardInterface| {
            let (program, _) = self.program.as_ref()?;
            Some((heard.interface.index, program.id(heard.mode?)?))
        };
        Heard {
            hears: listening.hears(),
            programs: interfaces.iter().filter_map(program).collect(),
            interfaces,
            loading: self.coming.is_some(),
            status: self.status.clone(),
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::Detach(index) => {
                if let Some((program, _)) = &mut self.program {
                    program.detach(index);
                }
            }
            Command::Leave(index) => self.socket.leave(index),
            Command::Join(interface) => match self.socket.join(&interface) {
                Ok(()) => self.listening.joined(interface.index, Ok(())),
                Err(error) if is_there(&interface) => {
                    self.listening.joined(interface.index, Err(error.to_string()));
                }
                Err(_) => self.listening.vanished(interface.index),
            },
            Command::Attach(interface) => {
                // If it has vanished meanwhile, there is nothing to say: the kernel will send a
                // message.
                let Some((program, mode)) = self.program.as_mut().filter(|_| is_there(&interface)) else { return };
                match program.attach(&interface.name, *mode) {
                    Ok(attachment) => self.listening.attached(interface.index, Ok(attached(attachment))),
                    Err(error) if is_there(&interface) => {
                        self.listening.attached(interface.index, Err(refusal(&error)));
                    }
                    Err(_) => {}
                }
            }
        }
    }

    fn log(&self, interface: &str, line: &InterfaceNews) {
        let program = self.listening.mode_on(interface).map_or_else(|| "off".to_owned(), |mode| mode.to_string());
        let is_configured = matches!(self.wanted, Wanted::Named(_));
        let of = &self.label;
        match line {
            InterfaceNews::Missing if is_configured => warn!("{of}{}", waiting_for(interface)),
            InterfaceNews::Missing => {
                warn!(
                    "{of}waiting for an interface that is up, can multicast and has an address of the group's family"
                );
            }
            InterfaceNews::Gone if is_configured => {
                error!(%interface, "{of}the interface is gone, and no request is heard through it until it is back");
            }
            InterfaceNews::Gone if self.listening.hears() => {
                info!(%interface, "{of}the interface is gone: one less to listen on");
            }
            InterfaceNews::Gone => {
                error!(%interface, "{of}the last interface is gone, and no request is heard until there is one");
            }
            InterfaceNews::Down => warn!(
                %interface,
                "{of}the interface is down, and no request is heard through it until it is up (`ip link set {interface} up`)"
            ),
            InterfaceNews::Deaf(why) => error!(%interface, "{of}no request is heard through it: {why}; trying again"),
            InterfaceNews::Heard(again) => info!(%interface, %program, "{of}{again}: requests are heard through it"),
            InterfaceNews::NoProgram(why) => {
                warn!(%interface, "{of}serving without the kernel program, through the socket alone: {why}");
            }
            InterfaceNews::Program(_) => info!(%interface, %program, "{of}the kernel program is attached now"),
            InterfaceNews::SecondBest(_, why) => {
                info!(%interface, %program, "{of}the kernel program is attached in another way: {why}");
            }
        }
    }

    /// When where the interfaces lead is to be looked at next.
    pub(super) fn leads_due(&self) -> Option<Instant> {
        self.leads.due()
    }

    /// Whether to look again in a while, even if nothing changes.
    pub(super) fn is_unfinished(&self) -> bool {
        self.listening.is_unfinished()
    }

    /// Detaches the program. Returns its counters, if there is a program.
    pub(super) fn end(self) -> Option<Counters> {
        // Its links go with it.
        self.program?.0.counters().ok()
    }
}

/// The text about an interface that is missing at the start.
fn waiting_for(interface: &str) -> String {
    format!(
        "waiting for the interface {interface}: start its network (`virsh net-start default` makes virbr0), or name another \
         with `interface` in the multicast section"
    )
}

/// Whether the interface of this name is still the one that was found.
fn is_there(interface: &Interface) -> bool {
    Interface::named(&interface.name).as_ref() == Some(interface)
}

/// What is wrong with the program's attachment to an existing interface.
fn spoilt(program: &KernelProgram, interface: &Interface, look_for_sharers: bool) -> Option<Refusal> {
    if !program.is_attached_to(interface.index) {
        let reason = "the kernel program was taken off the interface by somebody else".to_owned();
        // It may have gone with an interface that has just vanished (`virsh net-destroy`).
        return is_there(interface).then_some(Refusal { reason, ends: Ends::Silently });
    }
    // If the kernel does not tell, the attachment stays.
    let sharer: Option<Sharer> = if look_for_sharers { KernelProgram::sharer(interface).ok().flatten() } else { None };
    let interface = interface.name.clone();
    sharer.map(|sharer| refusal(&kernel::Error::Shared { interface, sharer }))
}

fn attached(attachment: Attachment) -> Attached {
    let second_best = attachment.second_best.as_ref().map(refusal);
    Attached { mode: attachment.mode, second_best }
}

fn refusal(error: &kernel::Error) -> Refusal {
    let ends = match error {
        kernel::Error::Occupied { .. } | kernel::Error::Shared { .. } => Ends::Silently,
        kernel::Error::NoInterface { .. } | kernel::Error::Vlans { .. } | kernel::Error::Attach { .. } => {
            Ends::WithAChange
        }
        kernel::Error::Earlier(error) => return refusal(error),
        // The kernel's verifier has decided, and would decide the same again.
        kernel::Error::Object(_)
        | kernel::Error::NotPermitted(_)
        | kernel::Error::Missing(_)
        | kernel::Error::Abi(_)
        | kernel::Error::Map { .. }
        | kernel::Error::Refused { .. }
        | kernel::Error::Program(_) => Ends::Never,
    };
    Refusal { reason: chain(error), ends }
}

/// An error with its causes, in one line. The kernel's own logs, which some errors carry, have
/// thousands.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let first_line = |error: &dyn std::error::Error| error.to_string().lines().next().unwrap_or_default().to_owned();
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(first_line(error), |text, cause| format!("{text}: {}", first_line(cause)))
}
