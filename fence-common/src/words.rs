//! Words for people that log lines, reports and errors share.

use alloc::format;
use alloc::string::{String, ToString as _};
use core::fmt::Display;

/// So many of something: "1 domain", "2 domains". `what` is a noun that takes an "s".
#[must_use]
pub fn counted(count: impl Display, what: &str) -> String {
    let count = count.to_string();
    let plural = if count == "1" { "" } else { "s" };
    format!("{count} {what}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_is_singular() {
        assert_eq!(counted(1, "domain"), "1 domain");
        assert_eq!(counted(0_u64, "domain"), "0 domains");
        assert_eq!(counted(11_usize, "wrong datagram"), "11 wrong datagrams");
    }
}
