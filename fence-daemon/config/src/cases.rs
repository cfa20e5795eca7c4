//! The table of bad configurations. It feeds the tests of this crate, the daemon and
//! `check-config`, and the fuzzer.
//!
//! Each row of `messages.txt` has a kind of mistake, a file, and the exact text about it.

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// The kind of mistake.
    pub title: &'static str,
    /// The configuration file. `\xNN` stands for a byte.
    pub text: &'static str,
    /// The text about a file at [`PATH`]. It begins with `error:` or `warning:`.
    pub says: &'static str,
}

/// The configuration file's path in [`Case::says`].
pub const PATH: &str = "/etc/fence_virt.conf";

/// All rows.
pub fn cases() -> impl Iterator<Item = Case> {
    include_str!("messages.txt").split("=== ").skip(1).filter_map(|row| {
        let (title, rest) = row.split_once('\n')?;
        let (text, says) = rest.split_once("--- says\n")?;
        Some(Case { title, text, says: says.trim_end_matches('\n') })
    })
}

impl Case {
    /// The file's bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut parts = self.text.split("\\x");
        let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
        for part in parts {
            let (digits, rest) = part.split_at_checked(2).unwrap_or((part, ""));
            bytes.extend(u8::from_str_radix(digits, 16));
            bytes.extend_from_slice(rest.as_bytes());
        }
        bytes
    }
}
