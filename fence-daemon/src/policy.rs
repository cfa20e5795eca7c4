//! Who may fence what: targets, groups, and the permission that everything that acts demands.

use std::fmt;

use fence_common::wire::Op;
use uuid::Uuid;

/// The domain that a request means.
///
/// As with stock servers a canonical UUID text (8-4-4-4-12 hexadecimal digits, any case) is looked up as a UUID and anything
/// else as a name; the request's flag for it is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Look up by UUID.
    Uuid(Uuid),
    /// Look up by name, exactly as spelled.
    Name(String),
}

impl Target {
    /// The target that the text of a request's domain field means; `None` for text that can name no domain.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(text).ok().filter(|text| !text.is_empty())?;
        // `try_parse` also takes braces, URNs and digits alone; only the canonical form is 36 bytes long.
        Some(match Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 => Self::Uuid(uuid),
            _ => Self::Name(text.to_owned()),
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => write!(f, "{uuid}"),
            // Names come from outside: quotes and control characters must not shape a log line.
            Self::Name(name) => write!(f, "{}", name.escape_debug()),
        }
    }
}

/// Permission to act on one domain. The hypervisor takes nothing less.
#[derive(Debug)]
pub struct Authorized {
    op: Op,
    target: Target,
}

impl Authorized {
    /// What to do.
    #[must_use]
    pub fn op(&self) -> Op {
        self.op
    }

    /// Which domain to do it to.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// A permission out of nowhere, for tests of what acts on one.
    #[cfg(test)]
    pub(crate) fn dangerous_for_test(op: Op, target: Target) -> Self {
        Self { op, target }
    }
}
