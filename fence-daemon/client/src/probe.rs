//! What only the daemon's library can find out. The program hands it in, so that no command here
//! needs libvirt or BPF.

use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

/// Looks that take libvirt, the kernel's BPF calls, or the daemon's own rules.
pub trait Probe {
    /// Asks each URI for its domains, at the same time. Each has `within` for its answer.
    fn domains(&self, uris: &[String], within: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)>;

    /// What keeps a kernel program from an interface; `None` if nothing does, or nothing is known.
    fn obstacle(&self, interface: &str) -> Option<Obstacle>;

    /// Whether the daemon would refuse this state directory, since others could write there.
    fn state_directory(&self, path: &Path) -> Option<Unsafe>;
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

/// Why a URI has not said its domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unanswered {
    /// The time was over.
    Overdue,
    /// This error.
    Failed(String),
}

/// What keeps a kernel program from an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// Another XDP program.
    Occupant(String),
    /// Who would miss what the program takes out.
    Sharer(String),
}

/// A state directory that others can write to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsafe {
    /// What is wrong with what.
    pub error: String,
    /// The command that mends it.
    pub remedy: String,
}
