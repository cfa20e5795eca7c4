//! Listeners and backends, which fence_virtd calls plugins: their keys and names.

use std::fmt;

/// What `listener` and `backend` name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plugin {
    /// Where requests come from.
    Listener,
    /// What carries requests out.
    Backend,
}

impl Plugin {
    /// The configuration key.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Backend => "backend",
        }
    }

    /// The supported names, the usual one first.
    #[must_use]
    pub const fn supported(self) -> &'static [&'static str] {
        match self {
            Self::Listener => &["multicast", "tcp", "vsock", "serial"],
            Self::Backend => &["libvirt", "cpg"],
        }
    }

    /// The usual name.
    #[must_use]
    pub fn usual(self) -> &'static str {
        self.supported().first().copied().unwrap_or_default()
    }
}

impl fmt::Display for Plugin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}
