//! Domains of libvirt's in-process test driver, in any number and state, without a daemon of
//! libvirt.
//!
//! `test:///PATH` reads its domains from a file. Their states belong to the process that opened it,
//! so every server begins with the file's states.

use std::fmt::Write as _;

use fence_common::domain_state;

/// A domain's state, with libvirt's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// It runs.
    Running = domain_state::RUNNING,
    /// It waits for a resource, which is a way of running.
    Blocked = domain_state::BLOCKED,
    /// Its CPUs are stopped, its memory and disks are still its.
    Paused = domain_state::PAUSED,
    /// It was asked to shut down and has not done so yet.
    ShuttingDown = domain_state::SHUTDOWN,
    /// It is off.
    ShutOff = domain_state::SHUT_OFF,
    /// Its kernel has crashed, and its process is still there.
    Crashed = domain_state::CRASHED,
    /// Its guest has suspended it to memory.
    Suspended = domain_state::SUSPENDED,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Running, Self::Blocked, Self::Paused, Self::ShuttingDown, Self::ShutOff, Self::Crashed, Self::Suspended];

    /// What to call it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting-down",
            Self::ShutOff => "off",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
        }
    }

    /// The state that libvirt means by a number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }
}

/// A domain of the test driver.
#[derive(Clone, Debug)]
pub struct TestDomain {
    /// Its name as XML text, without `&` and `<`.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The state that it begins in.
    pub state: State,
    /// Whether it has no definition, so that its end is the end of all that libvirt knows of it.
    pub transient: bool,
    /// Its devices, in libvirt's words.
    pub devices: String,
}

impl TestDomain {
    /// A domain with a definition.
    #[must_use]
    pub fn new(name: &str, uuid: &str, state: State) -> Self {
        let devices = String::new();
        Self { name: name.to_owned(), uuid: uuid.to_owned(), state, transient: false, devices }
    }

    /// With a device of this kind (`serial`, `channel`) whose socket on the hypervisor is this one.
    #[must_use]
    pub fn with_socket(mut self, kind: &str, path: &str) -> Self {
        let target = match kind {
            "serial" => format!("port='{}'", self.devices.matches("<serial").count()),
            _ => "type='guestfwd' address='10.0.2.179' port='1229'".to_owned(),
        };
        // Writing to a string does not fail.
        let _ =
            write!(self.devices, "<{kind} type='unix'><source mode='bind' path='{path}'/><target {target}/></{kind}>");
        self
    }
}

/// A UUID that is the same in every run: `number` makes it different from others.
#[must_use]
pub fn uuid(number: usize) -> String {
    format!("fe0ce000-0000-4000-8000-{number:012x}")
}

/// The file of a node with these domains.
#[must_use]
pub fn node(domains: &[TestDomain]) -> String {
    let mut xml = "<node>\n".to_owned();
    for TestDomain { name, uuid, state, transient, devices } in domains {
        let transient = if *transient { "<test:transient/>" } else { "" };
        // Writing to a string does not fail.
        let _ = writeln!(
            xml,
            "<domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'><name>{name}</name>\
             <uuid>{uuid}</uuid><memory>8192</memory><os><type>hvm</type></os><devices>{devices}</devices>\
             <test:runstate>{}</test:runstate>{transient}</domain>",
            *state as u8
        );
    }
    xml.push_str("</node>\n");
    xml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_libvirts_numbers() {
        for state in State::ALL {
            assert_eq!(State::from_number(state as u8), Some(state));
        }
        assert_eq!(State::from_number(5), Some(State::ShutOff));
        assert_eq!(State::from_number(0), None);
    }
}
