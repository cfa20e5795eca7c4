//! Asks for fences, and judges each answer by the kernel's word alone.
//!
//! Before an `off` or a `reboot`, the observer opens pidfds of the domain's processes. At the
//! client's success all of them must be dead, and for a container everything in it. The observer
//! asks neither libvirt nor the server's log.

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fence_common::wire::Op;

use crate::client::{Client, Family};
use crate::lab::{Guest, Hypervisor};
use crate::peer::Peer;
use crate::process::{Finished, Process};
use crate::witness::Witness;

/// The time limit of a stock client. Its own limit is 30 s.
pub const CLIENT_LIMIT: Duration = Duration::from_secs(60);

/// A guest that asks.
#[derive(Clone, Debug)]
pub struct Observer {
    hypervisor: Hypervisor,
    guest: Guest,
    key: String,
}

/// A stock client that waits for its answer.
#[derive(Debug)]
pub struct Asked {
    what: String,
    client: Process,
    victims: Vec<Witness>,
    kills: bool,
}

impl Observer {
    /// Asks from `guest`, with the key file at `key` in the lab.
    #[must_use]
    pub fn new(hypervisor: &Hypervisor, guest: Guest, key: &str) -> Self {
        Self { hypervisor: hypervisor.clone(), guest, key: key.to_owned() }
    }

    /// The guest that asks.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Starts a stock client.
    pub fn start(&self, op: &str, domain: &str) -> Result<Asked> {
        let victims = Witness::of_all(&self.hypervisor, domain)?;
        self.start_with(Client::new(op, &self.key).domain(domain), op, domain, victims)
    }

    /// As [`Self::start`], with another client about `domain`, and with these victims.
    pub fn start_with(&self, client: Client, op: &str, domain: &str, victims: Vec<Witness>) -> Result<Asked> {
        let client = client.start(self.guest.space())?;
        Ok(Asked { what: format!("{op} of {domain}"), client, victims, kills: kills(op) })
    }

    /// Asks like the stock client, to the end.
    pub fn fence(&self, op: &str, domain: &str) -> Result<Finished> {
        self.start(op, domain)?.finish()
    }

    /// As [`Self::fence`]; it must end with this exit code.
    ///
    /// # Errors
    /// As [`Self::fence`], or it ends with another one.
    pub fn expect(&self, op: &str, domain: &str, code: i32) -> Result<Finished> {
        let answer = self.fence(op, domain)?;
        ensure!(answer.code == Some(code), "{op} of {domain}: {code} expected, not {answer:?}");
        Ok(answer)
    }

    /// The stock client's list of domains and states.
    pub fn list(&self) -> Result<Finished> {
        Client::new("list", &self.key).run(self.guest.space())
    }

    /// Asks with a client and sockets of our own, so that many can ask at once: the reply byte. A
    /// false success is an error, and so is no answer.
    pub fn ask(&self, key: &[u8], op: Op, domain: &str) -> Result<u8> {
        let victims = if kills(op.name()) { Witness::of_all(&self.hypervisor, domain)? } else { Vec::new() };
        self.ask_about(key, op, domain, &victims)
    }

    /// As [`Self::ask`], with these victims.
    pub fn ask_about(&self, key: &[u8], op: Op, domain: &str, victims: &[Witness]) -> Result<u8> {
        let what = || format!("{} of {domain}", op.name());
        let reply = Peer::new(&self.guest, key, Family::V4)?.ask(op, domain)?.converse().with_context(what)?;
        judged(&what(), reply == 0 && kills(op.name()), alive(victims)?)?;
        Ok(reply)
    }
}

impl Asked {
    /// Waits for the client's end. A success while a victim lives is an error.
    pub fn finish(self) -> Result<Finished> {
        let Self { what, client, victims, kills } = self;
        client.ends_within(CLIENT_LIMIT)?;
        // Now, before anything else is done: a death that comes later is no excuse.
        let alive = alive(&victims)?;
        let answer = client.finish(Duration::ZERO).with_context(|| what.clone())?;
        judged(&what, answer.code == Some(0) && kills, alive)?;
        Ok(answer)
    }

    /// Whether it waits still.
    pub fn waits(&mut self) -> Result<bool> {
        self.client.is_running()
    }

    /// Whom it is about.
    #[must_use]
    pub fn victims(&self) -> &[Witness] {
        &self.victims
    }
}

/// Whether success means a death.
fn kills(op: &str) -> bool {
    matches!(op, "off" | "reboot")
}

/// A victim that lives now, for [`judged`].
pub fn alive(victims: &[Witness]) -> Result<Option<String>> {
    for victim in victims {
        if !victim.is_dead()? {
            return Ok(Some(victim.describe()));
        }
    }
    Ok(None)
}

/// Judges an answer by the victim that lived at its moment. `is_told` is whether the answer calls
/// the victims dead.
///
/// # Errors
/// [`FalseSuccess`]: it does, and there was one.
pub fn judged(what: &str, is_told: bool, alive: Option<String>) -> Result<()> {
    match alive {
        Some(victim) if is_told => {
            Err(FalseSuccess(format!("{what} was answered with success, and there lives {victim}")).into())
        }
        _ => Ok(()),
    }
}

/// As [`judged`], of an answer that has come just now.
///
/// # Errors
/// As [`judged`], or the kernel does not say.
pub fn judge_now(what: &str, is_told: bool, victims: &[Witness]) -> Result<()> {
    judged(what, is_told, alive(victims)?)
}

/// The error about an answer that calls a living domain dead.
#[derive(Debug)]
pub struct FalseSuccess(String);

impl fmt::Display for FalseSuccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FALSE SUCCESS: {}", self.0)
    }
}

impl std::error::Error for FalseSuccess {}
