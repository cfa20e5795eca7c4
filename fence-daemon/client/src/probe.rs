//! What only the daemon's library can find out. The program passes it in, so that no command here
//! needs libvirt, corosync or BPF.

use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

/// Questions to libvirt, to corosync, to the kernel about BPF, and to the daemon's own rules.
pub trait Probe {
    /// Asks all URIs for their domains at the same time. Each has `within` for its answer.
    fn domains(&self, uris: &[String], within: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)>;

    /// What keeps a kernel program from an interface; `None` if nothing does, or nothing is known.
    fn obstacle(&self, interface: &str) -> Option<Obstacle>;

    /// Whether the daemon would refuse this state directory because others could write to it.
    fn state_directory(&self, path: &Path) -> Option<Unsafe>;

    /// Asks corosync, which has `within` for its answer.
    ///
    /// # Errors
    /// See [`NoRing`].
    fn ring(&self, within: Duration) -> Result<Ring, NoRing>;
}

/// A domain that libvirt knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Its state, one of [`fence_common::domain_state`].
    pub state: u8,
    /// The URI that it is at.
    pub uri: String,
}

/// Why a URI has not listed its domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The time was over.
    Overdue,
    /// libvirt's error.
    Failed(String),
}

/// What keeps a kernel program from an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Another XDP program is attached.
    Occupant(String),
    /// Something else would miss the packets that the program consumes.
    Sharer(String),
}

/// A state directory that others can write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsafe {
    /// What is wrong.
    pub error: String,
    /// The command that corrects it.
    pub remedy: String,
}

/// What corosync says on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    /// This host's node ID.
    pub ours: u32,
    /// Whether somebody counts votes (`provider: corosync_votequorum`).
    pub has_provider: bool,
    /// Whether this host's part of the cluster has quorum.
    pub quorate: bool,
    /// The configured node list; empty if it lacks a node ID.
    pub nodes: Vec<RingNode>,
    /// The node IDs that corosync sees.
    pub seen: Vec<u32>,
}

/// A host of corosync's node list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingNode {
    /// Its node ID.
    pub id: u32,
    /// Its name; `None` if the list has none.
    pub name: Option<String>,
}

/// Why corosync says nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NoRing {
    /// Its libraries cannot be loaded.
    NoLibrary(String),
    /// It does not run, or refuses.
    Failed(String),
    /// It did not answer in time.
    Overdue,
}
