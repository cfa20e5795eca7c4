//! What only the daemon's library can find out. The program passes it in, so that no command here
//! needs libvirt or BPF.

use std::path::Path;
use std::time::Duration;

use uuid::Uuid;

/// Questions to libvirt, to the kernel about BPF, and to the daemon's own rules.
pub trait Probe {
    /// Asks all URIs for their domains at the same time. Each has `within` for its answer.
    fn domains(&self, uris: &[String], within: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)>;

    /// What keeps a kernel program from an interface; `None` if nothing does, or nothing is known.
    fn obstacle(&self, interface: &str) -> Option<Obstacle>;

    /// Whether the daemon would refuse this state directory because others could write to it.
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
