//! The stock client `fence_xvm`, as a guest's administrator or Pacemaker runs it.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use fence_common::hash::HashKind;

use crate::lab::Space;
use crate::process::{Finished, Process, run};

/// Which addresses are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The name in configuration files and on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// One call of `fence_xvm`. Options that are not set have the stock default.
#[derive(Clone, Debug)]
pub struct Client {
    program: &'static str,
    arguments: Vec<String>,
    /// `-t`, in seconds.
    timeout: u32,
}

impl Client {
    /// `fence_xvm -o OP`, with the key file at `key` (a path inside the lab).
    #[must_use]
    pub fn new(op: &str, key: &str) -> Self {
        Self { program: "fence_xvm", arguments: ["-o", op, "-k", key].map(str::to_owned).to_vec(), timeout: 30 }
    }

    fn with(mut self, option: &str, value: &str) -> Self {
        self.arguments.extend([option.to_owned(), value.to_owned()]);
        self
    }

    /// `fence_virt -T`: connects to this address by tcp.
    #[must_use]
    pub fn tcp(self, address: &str) -> Self {
        Self { program: "fence_virt", ..self }.with("-T", address)
    }

    /// `fence_virt -D`: asks over this serial port.
    #[must_use]
    pub fn serial(self, device: &str) -> Self {
        Self { program: "fence_virt", ..self }.with("-D", device)
    }

    /// `-H`: the domain, by name (or by UUID: the server looks at its form).
    #[must_use]
    pub fn domain(self, domain: &str) -> Self {
        self.with("-H", domain)
    }

    /// `-u`: flags the domain as a UUID.
    #[must_use]
    pub fn uuid(mut self) -> Self {
        self.arguments.push("-u".to_owned());
        self
    }

    /// `-c`: the datagram's digest.
    #[must_use]
    pub fn hash(self, kind: HashKind) -> Self {
        self.with("-c", kind.name())
    }

    /// `-C`: the digest of the callback.
    #[must_use]
    pub fn auth(self, kind: HashKind) -> Self {
        self.with("-C", kind.name())
    }

    /// `-i`: the family of addresses.
    #[must_use]
    pub fn family(self, family: Family) -> Self {
        self.with("-i", family.name())
    }

    /// `-a`: the multicast group.
    #[must_use]
    pub fn group(self, address: &str) -> Self {
        self.with("-a", address)
    }

    /// `-p`: the server's UDP port and the callback's TCP port.
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.with("-p", &port.to_string())
    }

    /// `-r`: the interval between copies of the request, in tenths of a second.
    #[must_use]
    pub fn retransmit(self, tenths: u32) -> Self {
        self.with("-r", &tenths.to_string())
    }

    /// `-t`: gives up after this many seconds.
    #[must_use]
    pub fn timeout(mut self, seconds: u32) -> Self {
        self.timeout = seconds;
        self.with("-t", &seconds.to_string())
    }

    /// Which of the client's two names is called.
    #[must_use]
    pub fn program(&self) -> &'static str {
        self.program
    }

    /// The arguments, for showing the command to a person.
    #[must_use]
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command.args(&self.arguments);
        command
    }

    /// Runs it to its end. The exit code is the server's reply, or 1 or 255.
    ///
    /// # Errors
    /// It could not be started, or did not end long after its own limit.
    pub fn run(&self, space: &Space) -> Result<Finished> {
        run(space, &mut self.command(), Duration::from_secs(u64::from(self.timeout) + 30))
    }

    /// Starts it and does not wait.
    pub fn start(&self, space: &Space) -> Result<Process> {
        Process::start(space, &mut self.command())
    }
}
