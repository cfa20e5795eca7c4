//! Decides what to join, leave, attach and detach as interfaces come and go, and what to log.
//!
//! This module makes no system call. [`Listening::look`] takes the current interfaces and the
//! changes, and returns commands. The caller reports each command's result. [`Listening::tell`]
//! then compares with what it has logged before.

mod wanted;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use fence_net::interface::{Interface, Present};

use super::kernel::AttachedMode;
use super::links::Changes;

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Detach the program from the interface with this index, which may be gone already. This comes
    /// before the member's end, so that the socket gets the requests that come meanwhile.
    Detach(u32),
    /// Leave the group on the interface with this index, which may be gone already.
    Leave(u32),
    /// Join the group.
    Join(Interface),
    /// Attach the program. If it is attached already, see whether another way is better now.
    Attach(Interface),
}

/// What there is at the moment.
#[derive(Clone, Debug)]
pub struct Now<'a> {
    /// The interfaces on which requests are expected.
    pub there: &'a [Present],
    /// What has changed since the last look.
    pub changes: &'a Changes,
    /// What is wrong with attachments, by interface index. A deleted interface is not among them.
    pub spoilt: &'a BTreeMap<u32, Refusal>,
    /// Nothing has changed: this look retries failed commands.
    pub again: bool,
}

/// Why the program is not attached, or not in the best way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// Whether and when it is worth trying again.
    pub ends: Ends,
}

/// When the obstacle may be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// As long as this interface is there: never.
    Never,
    /// When the kernel reports a change of the interface.
    WithAChange,
    /// At any time, without a word from the kernel.
    Silently,
}

/// A change of an interface, for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceNews {
    /// The configured interface is missing at the start.
    Missing,
    /// It was there, and is no more.
    Gone,
    /// It is there, but switched off.
    Down,
    /// The group cannot be joined there.
    Deaf(String),
    /// Requests are heard through it again, or through one more.
    Heard(Again),
    /// The interface was there all the time, but the program is not attached, or not any more.
    NoProgram(String),
    /// The program is attached for the first time, or in a better way.
    Program(AttachedMode),
    /// The program is attached, but not in the best way, and why.
    SecondBest(AttachedMode, String),
}

/// How the program is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The way.
    pub mode: AttachedMode,
    /// What keeps it from a better one.
    pub second_best: Option<Refusal>,
}

/// An interface through which requests are heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeardInterface {
    /// Which one.
    pub interface: Interface,
    /// How the program is attached to it; `None` if only the socket hears.
    pub mode: Option<AttachedMode>,
    /// Why it is not, or not in the best way.
    pub reason: Option<String>,
}

/// Why requests are heard that were not before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The interface has come.
    Came,
    /// It was deleted and recreated.
    Recreated,
    /// It was switched on.
    Up,
    /// The group could be joined at last.
    Joined,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Program {
    /// There is none, or not yet.
    Unwanted,
    Attached(Attached),
    Refused(Refusal),
}

/// An interface that the daemon listens on, or should.
#[derive(Clone, Debug)]
struct Membership {
    name: String,
    up: bool,
    /// Why the group is not joined there.
    deaf: Option<String>,
    joined: bool,
    program: Program,
    recreated: bool,
}

/// What the log said last about an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LastNews {
    hearing: Hearing,
    program: Program,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hearing {
    Missing,
    Down,
    Deaf(String),
    Heard,
}

/// The state of all that is listened on.
#[derive(Debug, Default)]
pub struct Listening {
    /// The configured interface; without one, the daemon listens on all that come.
    name: Option<String>,
    /// Whether there is a program to attach.
    program: bool,
    /// Whether it has come since the last look.
    program_is_new: bool,
    memberships: BTreeMap<u32, Membership>,
    told: BTreeMap<String, LastNews>,
    /// Whether the lack of any interface was logged.
    told_of_none: bool,
    /// Whether requests were heard before.
    begun: bool,
    /// Whether this look repeats the one before.
    again: bool,
}

impl Listening {
    /// Listens on nothing yet. `name` is the configured interface; `program` says whether there is
    /// one to attach.
    #[must_use]
    pub fn new(name: Option<String>, program: bool) -> Self {
        Self { name, program, ..Self::default() }
    }

    /// The program is loaded now; the next look attaches it.
    pub fn bring_program(&mut self) {
        (self.program, self.program_is_new) = (true, true);
    }

    /// The commands for the interfaces that exist now. The caller must report each command's
    /// result.
    pub fn look(&mut self, now: &Now<'_>) -> Vec<Command> {
        self.again = now.again;
        let program_is_new = std::mem::take(&mut self.program_is_new);
        let mut commands = Vec::new();
        let here: BTreeSet<u32> = now.there.iter().map(|present| present.interface.index).collect();
        let ended = |index: &u32| now.changes.ended(*index) || !here.contains(index);
        let old: Vec<u32> = self.memberships.keys().copied().filter(ended).collect();
        let mut names = BTreeSet::new();
        for index in old {
            let Some(member) = self.memberships.remove(&index) else { continue };
            if matches!(member.program, Program::Attached(_)) {
                commands.push(Command::Detach(index));
            }
            if member.joined {
                commands.push(Command::Leave(index));
            }
            names.insert(member.name);
        }
        for (index, refusal) in now.spoilt {
            let Some(member) = self.memberships.get_mut(index) else { continue };
            if matches!(member.program, Program::Attached(_)) {
                commands.push(Command::Detach(*index));
                member.program = Program::Refused(refusal.clone());
            }
        }
        for Present { interface, up } in now.there {
            let recreated = names.contains(&interface.name);
            let is_new = !self.memberships.contains_key(&interface.index);
            let member = self.memberships.entry(interface.index).or_insert_with(|| Membership {
                name: String::new(),
                up: false,
                deaf: None,
                joined: false,
                program: Program::Unwanted,
                // After lost messages nobody knows; most likely it was not.
                recreated: recreated && !now.changes.everything,
            });
            member.name.clone_from(&interface.name);
            member.up = *up;
            if !member.joined {
                commands.push(Command::Join(interface.clone()));
            }
            let may_have_ended = |refusal: &Refusal| match refusal.ends {
                Ends::Never => false,
                Ends::WithAChange => now.changes.concern(interface.index),
                Ends::Silently => now.changes.concern(interface.index) || now.again,
            };
            let worth_trying = match &member.program {
                Program::Unwanted => is_new || program_is_new,
                Program::Attached(Attached { second_best: Some(refusal), .. }) if may_have_ended(refusal) => true,
                // VLANs may have come or gone.
                Program::Attached(_) => now.changes.concern(interface.index),
                // The program was detached just now for a reason, so do not attach it at once.
                Program::Refused(_) if now.spoilt.contains_key(&interface.index) => false,
                Program::Refused(refusal) => may_have_ended(refusal),
            };
            if self.program && worth_trying {
                commands.push(Command::Attach(interface.clone()));
            }
        }
        commands
    }

    /// What came of [`Command::Join`].
    pub fn joined(&mut self, index: u32, result: Result<(), String>) {
        if let Some(member) = self.memberships.get_mut(&index) {
            member.joined = result.is_ok();
            member.deaf = result.err();
        }
    }

    /// The interface vanished before [`Command::Join`] was carried out; the kernel's message about
    /// it is still to come.
    pub fn vanished(&mut self, index: u32) {
        self.memberships.remove(&index);
    }

    /// The result of [`Command::Attach`]. If the interface vanished before, there is nothing to
    /// report.
    pub fn attached(&mut self, index: u32, result: Result<Attached, Refusal>) {
        if let Some(member) = self.memberships.get_mut(&index) {
            member.program = result.map_or_else(Program::Refused, Program::Attached);
        }
    }

    /// The lines to log now, each with the name of its interface.
    pub fn tell(&mut self) -> Vec<(String, InterfaceNews)> {
        let mut names: BTreeSet<String> = self.told.keys().cloned().collect();
        names.extend(self.name.clone());
        names.extend(self.memberships.values().map(|member| member.name.clone()));
        let mut lines = Vec::new();
        if names.is_empty() && !self.begun && !std::mem::replace(&mut self.told_of_none, true) {
            lines.push((String::new(), InterfaceNews::Missing));
        }
        for name in names {
            let (mut now, recreated) = self.state(&name);
            if recreated && now.hearing == Hearing::Down {
                // It is just being made: gone until it is up.
                now = LastNews { hearing: Hearing::Missing, program: Program::Unwanted };
            }
            let before = self.told.get(&name);
            let hearing = self.line(before.map(|told| &told.hearing), &now.hearing, recreated);
            let heard_before = before.is_some_and(|told| told.hearing == Hearing::Heard);
            if now.hearing == Hearing::Down
                && before.is_some_and(|told| told.hearing == Hearing::Missing)
                && !self.again
            {
                // As above: not worth a line unless it stays so.
                continue;
            }
            let program = match (before.map(|told| &told.program), &now.program) {
                (before, now) if before == Some(now) && !recreated => None,
                (_, Program::Refused(refusal)) => Some(InterfaceNews::NoProgram(refusal.reason.clone())),
                (_, Program::Attached(Attached { mode, second_best: Some(refusal) })) => {
                    Some(InterfaceNews::SecondBest(*mode, refusal.reason.clone()))
                }
                (Some(_), Program::Attached(Attached { mode, second_best: None }))
                    if heard_before && hearing.is_none() && !recreated =>
                {
                    Some(InterfaceNews::Program(*mode))
                }
                _ => None,
            };
            lines.extend(hearing.into_iter().chain(program).map(|line| (name.clone(), line)));
            if now.hearing == Hearing::Missing && self.name.as_ref() != Some(&name) {
                self.told.remove(&name);
            } else {
                self.told.insert(name, now);
            }
        }
        for member in self.memberships.values_mut() {
            member.recreated = false;
        }
        self.begun |= self.hears();
        lines
    }

    fn line(&self, before: Option<&Hearing>, now: &Hearing, recreated: bool) -> Option<InterfaceNews> {
        if before == Some(now) && !(recreated && *now == Hearing::Heard) {
            return None;
        }
        Some(match (before, now) {
            (_, Hearing::Missing) if !self.begun => InterfaceNews::Missing,
            (_, Hearing::Missing) => InterfaceNews::Gone,
            (_, Hearing::Down) => InterfaceNews::Down,
            (_, Hearing::Deaf(why)) => InterfaceNews::Deaf(why.clone()),
            // The start waits for the listener and logs its beginning.
            (_, Hearing::Heard) if !self.begun => return None,
            (Some(Hearing::Heard), Hearing::Heard) => InterfaceNews::Heard(Again::Recreated),
            (None | Some(Hearing::Missing), Hearing::Heard) => InterfaceNews::Heard(Again::Came),
            (Some(Hearing::Down), Hearing::Heard) => InterfaceNews::Heard(Again::Up),
            (Some(Hearing::Deaf(_)), Hearing::Heard) => InterfaceNews::Heard(Again::Joined),
        })
    }

    /// The state of the interface of this name, and whether it was replaced.
    fn state(&self, name: &str) -> (LastNews, bool) {
        let Some(member) = self.memberships.values().find(|member| member.name == name) else {
            return (LastNews { hearing: Hearing::Missing, program: Program::Unwanted }, false);
        };
        let hearing = match (&member.deaf, member.up) {
            (Some(why), _) => Hearing::Deaf(why.clone()),
            (None, false) => Hearing::Down,
            (None, true) => Hearing::Heard,
        };
        (LastNews { hearing, program: member.program.clone() }, member.recreated)
    }

    /// Whether requests are heard through any interface.
    #[must_use]
    pub fn hears(&self) -> bool {
        self.memberships.values().any(|member| member.joined && member.up)
    }

    /// Whether to look again in a while, even if nothing changes.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        let waits = |one: &Membership| match &one.program {
            Program::Refused(refusal) | Program::Attached(Attached { second_best: Some(refusal), .. }) => {
                refusal.ends == Ends::Silently
            }
            Program::Attached(Attached { second_best: None, .. }) | Program::Unwanted => false,
        };
        let untold =
            |one: &Membership| !one.up && self.told.get(&one.name).is_none_or(|told| told.hearing != Hearing::Down);
        self.memberships.values().any(|member| member.deaf.is_some() || waits(member) || untold(member))
    }

    /// The interfaces that the program is on.
    #[must_use]
    pub fn attached_to(&self) -> Vec<Interface> {
        let attached = self.memberships.iter().filter(|(_, member)| matches!(member.program, Program::Attached(_)));
        attached.map(|(index, member)| Interface { name: member.name.clone(), index: *index }).collect()
    }

    /// The interfaces through which requests are heard.
    #[must_use]
    pub fn heard_interfaces(&self) -> Vec<HeardInterface> {
        let heard = self.memberships.iter().filter(|(_, member)| member.joined && member.up);
        heard
            .map(|(index, member)| {
                let (mode, refusal) = match &member.program {
                    Program::Unwanted => (None, None),
                    Program::Attached(Attached { mode, second_best }) => (Some(*mode), second_best.as_ref()),
                    Program::Refused(refusal) => (None, Some(refusal)),
                };
                HeardInterface {
                    interface: Interface { name: member.name.clone(), index: *index },
                    mode,
                    reason: refusal.map(|refusal| refusal.reason.clone()),
                }
            })
            .collect()
    }

    /// How the program is attached to the interface of this name.
    #[must_use]
    pub fn mode_on(&self, name: &str) -> Option<AttachedMode> {
        let member = self.memberships.values().find(|member| member.name == name)?;
        if let Program::Attached(attached) = &member.program { Some(attached.mode) } else { None }
    }

    /// The current state, in a line for `systemctl status`.
    #[must_use]
    pub fn status(&self) -> String {
        let heard = self.heard_interfaces();
        let way = |mode: Option<AttachedMode>| match mode {
            Some(AttachedMode::Tcx) => "tcx".to_owned(),
            Some(mode @ (AttachedMode::Native | AttachedMode::Generic)) => format!("xdp {mode}"),
            None => "through the socket".to_owned(),
        };
        let groups = heard.chunk_by(|one, next| one.mode == next.mode).map(|group| {
            let names: Vec<_> = group.iter().map(|one| one.interface.name.as_str()).collect();
            format!("{} ({})", names.join(","), way(group.first().and_then(|one| one.mode)))
        });
        let serving = groups.collect::<Vec<_>>().join(", ");
        if !serving.is_empty() {
            return format!("serving {serving}");
        }
        match &self.name {
            Some(name) => match self.state(name).0.hearing {
                Hearing::Down => format!("interface {name} is down: no request is heard"),
                Hearing::Deaf(why) => format!("no request is heard: {why}"),
                Hearing::Missing | Hearing::Heard => format!("interface {name} is not there: waiting for it"),
            },
            None => "no interface is up and can multicast: waiting for one".to_owned(),
        }
    }
}

impl fmt::Display for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Came => "the interface is there",
            Self::Recreated => "the interface was recreated",
            Self::Up => "the interface is up again",
            Self::Joined => "the group could be joined at last",
        })
    }
}

#[cfg(test)]
mod tests;
