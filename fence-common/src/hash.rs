//! The kinds of digest, in the order of strength that a configured minimum is compared by.

/// The kind of digest in a request (`hashtype`) or in the callback exchange (`auth`).
///
/// The order is the order of strength. A server with `hash = "sha256"` accepts [`HashKind::Sha256`]
/// and [`HashKind::Sha512`] and rejects the rest. The numbers are those on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum HashKind {
    /// No digest. Only where the configuration says `none`.
    None = 0,
    /// SHA-1, 20 bytes.
    Sha1 = 1,
    /// SHA-256, 32 bytes.
    Sha256 = 2,
    /// SHA-512, 64 bytes.
    Sha512 = 3,
}

impl HashKind {
    /// Every kind, weakest first.
    pub const ALL: [Self; 4] = [Self::None, Self::Sha1, Self::Sha256, Self::Sha512];

    /// The kind that a byte on the wire names, if any.
    #[inline(always)]
    #[must_use]
    pub const fn from_wire(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::None),
            1 => Some(Self::Sha1),
            2 => Some(Self::Sha256),
            3 => Some(Self::Sha512),
            _ => None,
        }
    }

    /// The byte on the wire.
    #[inline(always)]
    #[must_use]
    pub const fn to_wire(self) -> u8 {
        self as u8
    }

    /// The name in a configuration file and on `fence_xvm`'s command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// The kind that a configuration file names, in any case of letters.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name().eq_ignore_ascii_case(name))
    }

    /// Length of the digest in bytes; 0 for [`HashKind::None`].
    #[must_use]
    pub const fn digest_len(self) -> usize {
        match self {
            Self::None => 0,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_and_name_round_trip_and_strength_is_ordered() {
        for kind in HashKind::ALL {
            assert_eq!(HashKind::from_wire(kind.to_wire()), Some(kind));
            assert_eq!(HashKind::from_name(kind.name()), Some(kind));
        }
        assert!((4..=u8::MAX).all(|byte| HashKind::from_wire(byte).is_none()));
        assert!(HashKind::ALL.is_sorted());
        assert_eq!(HashKind::from_name("SHA256"), Some(HashKind::Sha256));
        assert_eq!(HashKind::from_name("md5"), None);
    }
}
