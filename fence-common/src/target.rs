//! The domain that a request names.

use alloc::borrow::ToOwned as _;
use alloc::string::String;
use core::fmt;

use uuid::Uuid;

/// The domain that a request names.
///
/// As with `fence_virtd`, a canonical UUID (8-4-4-4-12 hexadecimal digits, any case) is looked up
/// as a UUID. Anything else is a name. The request's flag for it is ignored.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Look up by UUID.
    Uuid(Uuid),
    /// Look up by name, exactly as spelled.
    Name(String),
}

impl Target {
    /// The target in the text of a request's domain field. `None` if the text names no domain.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = core::str::from_utf8(text).ok().filter(|text| !text.is_empty())?;
        // `try_parse` also accepts braces, URNs and bare digits; only the canonical form has 36
        // bytes.
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

#[cfg(test)]
mod tests {
    use std::string::ToString as _;

    use super::*;

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    #[test]
    fn only_the_canonical_form_is_a_uuid() {
        assert!(matches!(Target::parse(UUID.as_bytes()), Some(Target::Uuid(_))));
        assert_eq!(Target::parse(UUID.as_bytes()), Target::parse(UUID.to_uppercase().as_bytes()));
        for name in ["6695eb01f6a4830479aa97f2502e193f", "{6695eb01-f6a4-8304-79aa-97f2502e193f}", "node1", "a b"] {
            assert_eq!(Target::parse(name.as_bytes()), Some(Target::Name(name.to_owned())));
        }
        assert_eq!(Target::parse(b""), None);
        assert_eq!(Target::parse(b"\xff"), None);
    }

    #[test]
    fn a_name_cannot_shape_a_log_line() {
        assert_eq!(Target::Name("a\n\"b".to_owned()).to_string(), r#"a\n\"b"#);
    }
}
