//! What `-l` prints: the backends and listeners that this daemon has, in the layout in which stock servers show theirs.
//!
//! Nothing is loaded at run time here. What stock servers have besides (tcp, vsock, serial, cpg) is not listed before it works.

use std::io::{self, Write};

use crate::config::Plugin;

/// Prints the list.
///
/// # Errors
/// Nobody reads it.
pub fn list(out: &mut dyn Write) -> io::Result<()> {
    for plugin in [Plugin::Backend, Plugin::Listener] {
        writeln!(out, "Available {}s:", plugin.key())?;
        writeln!(out, "    {} {}", plugin.supported(), env!("CARGO_PKG_VERSION"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_works_is_listed_and_nothing_else() {
        let mut out = Vec::new();
        super::list(&mut out).unwrap();
        let version = env!("CARGO_PKG_VERSION");
        let expected =
            format!("Available backends:\n    libvirt {version}\nAvailable listeners:\n    multicast {version}\n");
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
