//! Decides what is joined, left, attached and detached as interfaces come and go, and what is worth a word.
//!
//! No system call is made here: [`Listening::look`] is told what there is and what has changed, and says what to do; what came of it
//! is told back; [`Listening::tell`] then compares with what it has told before.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::interface::{Interface, Present};
use super::kernel::AttachedMode;
use super::links::Changes;

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Take the program off; the interface may be gone already. Before the membership, so that the socket gets what comes meanwhile.
    Detach,
    /// Leave the group on the interface with this number, which may be gone already.
    Leave(u32),
    /// Join the group.
    Join(Interface),
    /// Attach the program.
    Attach(Interface),
}

/// What there is at the moment.
#[derive(Clone, Debug)]
pub struct Now<'a> {
    /// The interfaces that requests are expected on.
    pub there: &'a [Present],
    /// What has changed since the last look.
    pub changes: &'a Changes,
    /// What is wrong with the attachment, if there is one, and it is not that its interface is gone.
    pub spoilt: Option<Refusal>,
    /// Nothing has changed: it is looked because of what could not be done before.
    pub again: bool,
}

/// Why the program is not attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// In words.
    pub reason: String,
    /// Whether it may end without a word from the kernel.
    pub may_end: bool,
}

/// What is told about an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// The configured interface is not there at the start.
    Missing,
    /// It was there, and is no more.
    Gone,
    /// It is there, but switched off.
    Down,
    /// The group cannot be joined there.
    Deaf(String),
    /// Requests are heard through it again, or through one more.
    Heard(Again),
    /// It was there all the time, but the program is not attached, or not any more.
    NoProgram(String),
    /// The program, which could not be attached before or was not there yet, is.
    Program(AttachedMode),
}

/// Why requests are heard that were not before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Again {
    /// The interface has come.
    Came,
    /// It was deleted and made anew.
    MadeAnew,
    /// It was switched on.
    Up,
    /// The group could be joined at last.
    Joined,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Program {
    /// There is none, or not for this interface.
    Unwanted,
    Attached(AttachedMode),
    Refused(Refusal),
}

/// An interface that is listened on, or should be.
#[derive(Clone, Debug)]
struct Ear {
    name: String,
    up: bool,
    /// Why the group is not joined there.
    deaf: Option<String>,
    joined: bool,
    program: Program,
    made_anew: bool,
}

/// What was told last about an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
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
#[derive(Debug)]
pub struct Listening {
    /// The configured interface; without one all that come are listened on.
    name: Option<String>,
    /// Whether there is a program to attach.
    program: bool,
    /// Whether it has come since the last look.
    program_is_new: bool,
    ears: BTreeMap<u32, Ear>,
    /// Where the program is.
    attached: Option<u32>,
    told: BTreeMap<String, Told>,
    /// Whether it was told that there is no interface at all.
    told_of_none: bool,
    /// Whether requests were heard before.
    begun: bool,
    /// Whether this look is one more at what was there before.
    again: bool,
}

impl Listening {
    /// Listens on nothing yet. `name` is the configured interface; `program` says whether there is one to attach to it.
    #[must_use]
    pub fn new(name: Option<String>, program: bool) -> Self {
        let program = program && name.is_some();
        let (ears, told) = (BTreeMap::new(), BTreeMap::new());
        Self {
            name,
            program,
            program_is_new: false,
            ears,
            attached: None,
            told,
            told_of_none: false,
            begun: false,
            again: false,
        }
    }

    /// There is a program now; the next look has it attached.
    pub fn bring_program(&mut self) {
        self.program = self.name.is_some();
        self.program_is_new = self.program;
    }

    /// What has to be done about what there is now. Each command's result is to be told back.
    pub fn look(&mut self, now: &Now<'_>) -> Vec<Command> {
        self.again = now.again;
        let program_is_new = std::mem::take(&mut self.program_is_new);
        let mut commands = Vec::new();
        let here: BTreeSet<u32> = now.there.iter().map(|present| present.interface.index).collect();
        let ended = |index: &u32| now.changes.ended(*index) || !here.contains(index);
        let old: Vec<u32> = self.ears.keys().copied().filter(ended).collect();
        let mut names = BTreeSet::new();
        for index in old {
            let Some(ear) = self.ears.remove(&index) else { continue };
            if self.attached == Some(index) {
                self.attached = None;
                commands.push(Command::Detach);
            }
            if ear.joined {
                commands.push(Command::Leave(index));
            }
            names.insert(ear.name);
        }
        if let Some((index, refusal)) = self.attached.zip(now.spoilt.clone()) {
            self.attached = None;
            commands.push(Command::Detach);
            if let Some(ear) = self.ears.get_mut(&index) {
                ear.program = Program::Refused(refusal);
            }
        }
        for Present { interface, up } in now.there {
            let made_anew = names.contains(&interface.name);
            let is_new = !self.ears.contains_key(&interface.index);
            let ear = self.ears.entry(interface.index).or_insert_with(|| Ear {
                name: String::new(),
                up: false,
                deaf: None,
                joined: false,
                program: Program::Unwanted,
                // After lost messages nobody knows; most likely it was not.
                made_anew: made_anew && !now.changes.everything,
            });
            ear.name.clone_from(&interface.name);
            ear.up = *up;
            if !ear.joined {
                commands.push(Command::Join(interface.clone()));
            }
            let worth_trying = match &ear.program {
                Program::Unwanted => is_new || program_is_new,
                Program::Attached(_) => false,
                // What was taken off just now was so for a reason: not against it at once.
                Program::Refused(_) if now.spoilt.is_some() => false,
                Program::Refused(refusal) => now.changes.concern(interface.index) || (now.again && refusal.may_end),
            };
            if self.program && worth_trying {
                commands.push(Command::Attach(interface.clone()));
            }
        }
        commands
    }

    /// What came of [`Command::Join`].
    pub fn joined(&mut self, index: u32, result: Result<(), String>) {
        if let Some(ear) = self.ears.get_mut(&index) {
            ear.joined = result.is_ok();
            ear.deaf = result.err();
        }
    }

    /// The interface went before [`Command::Join`] could be carried out; that it is gone is still to be told by the kernel.
    pub fn vanished(&mut self, index: u32) {
        self.ears.remove(&index);
    }

    /// What came of [`Command::Attach`]. Where its interface vanished before there is nothing to say.
    pub fn attached(&mut self, index: u32, result: Result<AttachedMode, Refusal>) {
        if let Some(ear) = self.ears.get_mut(&index) {
            if result.is_ok() {
                self.attached = Some(index);
            }
            ear.program = result.map_or_else(Program::Refused, Program::Attached);
        }
    }

    /// What is to be told by now, each line with the name of the interface that it is about.
    pub fn tell(&mut self) -> Vec<(String, Line)> {
        let mut names: BTreeSet<String> = self.told.keys().cloned().collect();
        names.extend(self.name.clone());
        names.extend(self.ears.values().map(|ear| ear.name.clone()));
        let mut lines = Vec::new();
        if names.is_empty() && !self.begun && !std::mem::replace(&mut self.told_of_none, true) {
            lines.push((String::new(), Line::Missing));
        }
        for name in names {
            let (mut now, made_anew) = self.state(&name);
            if made_anew && now.hearing == Hearing::Down {
                // It is just being made: gone until it is up.
                now = Told { hearing: Hearing::Missing, program: Program::Unwanted };
            }
            let before = self.told.get(&name);
            let hearing = self.line(before.map(|told| &told.hearing), &now.hearing, made_anew);
            let heard_before = before.is_some_and(|told| told.hearing == Hearing::Heard);
            if now.hearing == Hearing::Down
                && before.is_some_and(|told| told.hearing == Hearing::Missing)
                && !self.again
            {
                // As above: not worth a line of its own unless it stays so.
                continue;
            }
            let program = match (before.map(|told| &told.program), &now.program) {
                (before, now) if before == Some(now) && !made_anew => None,
                (_, Program::Refused(refusal)) => Some(Line::NoProgram(refusal.reason.clone())),
                (Some(Program::Refused(_) | Program::Unwanted), Program::Attached(mode))
                    if heard_before && hearing.is_none() =>
                {
                    Some(Line::Program(*mode))
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
        for ear in self.ears.values_mut() {
            ear.made_anew = false;
        }
        self.begun |= self.hears();
        lines
    }

    fn line(&self, before: Option<&Hearing>, now: &Hearing, made_anew: bool) -> Option<Line> {
        if before == Some(now) && !(made_anew && *now == Hearing::Heard) {
            return None;
        }
        Some(match (before, now) {
            (_, Hearing::Missing) if !self.begun => Line::Missing,
            (_, Hearing::Missing) => Line::Gone,
            (_, Hearing::Down) => Line::Down,
            (_, Hearing::Deaf(why)) => Line::Deaf(why.clone()),
            // The beginning is told by whoever waits for it.
            (_, Hearing::Heard) if !self.begun => return None,
            (Some(Hearing::Heard), Hearing::Heard) => Line::Heard(Again::MadeAnew),
            (None | Some(Hearing::Missing), Hearing::Heard) => Line::Heard(Again::Came),
            (Some(Hearing::Down), Hearing::Heard) => Line::Heard(Again::Up),
            (Some(Hearing::Deaf(_)), Hearing::Heard) => Line::Heard(Again::Joined),
        })
    }

    /// How it is about the interface of this name, and whether that was made anew.
    fn state(&self, name: &str) -> (Told, bool) {
        let Some(ear) = self.ears.values().find(|ear| ear.name == name) else {
            return (Told { hearing: Hearing::Missing, program: Program::Unwanted }, false);
        };
        let hearing = match (&ear.deaf, ear.up) {
            (Some(why), _) => Hearing::Deaf(why.clone()),
            (None, false) => Hearing::Down,
            (None, true) => Hearing::Heard,
        };
        (Told { hearing, program: ear.program.clone() }, ear.made_anew)
    }

    /// Whether requests are heard through any interface.
    #[must_use]
    pub fn hears(&self) -> bool {
        self.ears.values().any(|ear| ear.joined && ear.up)
    }

    /// Whether to look again in a while, though nothing changes.
    #[must_use]
    pub fn is_unfinished(&self) -> bool {
        let tried_in_vain =
            |ear: &Ear| ear.deaf.is_some() || matches!(&ear.program, Program::Refused(refusal) if refusal.may_end);
        let untold = |ear: &Ear| !ear.up && self.told.get(&ear.name).is_none_or(|told| told.hearing != Hearing::Down);
        self.ears.values().any(|ear| tried_in_vain(ear) || untold(ear))
    }

    /// The number of the interface that the program is on.
    #[must_use]
    pub fn attached_to(&self) -> Option<u32> {
        self.attached
    }

    /// The names of the interfaces that requests are heard through.
    #[must_use]
    pub fn names(&self) -> String {
        let heard = self.ears.values().filter(|ear| ear.joined && ear.up);
        heard.map(|ear| ear.name.as_str()).collect::<Vec<_>>().join(",")
    }

    /// How the program is attached.
    #[must_use]
    pub fn mode(&self) -> Option<AttachedMode> {
        match self.ears.get(&self.attached?)?.program {
            Program::Attached(mode) => Some(mode),
            Program::Unwanted | Program::Refused(_) => None,
        }
    }

    /// How it is now, in a line for `systemctl status`.
    #[must_use]
    pub fn status(&self) -> String {
        let heard = self.names();
        if !heard.is_empty() {
            return match self.mode() {
                Some(mode) => format!("serving {heard} (xdp {mode})"),
                None => format!("serving {heard} (through the socket)"),
            };
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
            Self::MadeAnew => "the interface was made anew",
            Self::Up => "the interface is up again",
            Self::Joined => "the group could be joined at last",
        })
    }
}

#[cfg(test)]
mod tests;
