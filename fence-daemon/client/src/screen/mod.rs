//! What the commands print: tables, bars and words, as wide and colourful as standard output
//! allows.

pub mod bars;
pub mod table;
pub mod words;

use std::env;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use self::table::Screen;

/// Prints an error on standard error.
pub fn complain(what: impl Display) {
    // If even this fails, nothing is left to do.
    let _ = writeln!(io::stderr(), "{what}");
}

/// Prints on standard output. A reader that closes early (`head`) is no failure. Any other failure
/// is reported, and returns `false`.
pub fn print(text: &str) -> bool {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(format_args!("fence-daemon: cannot write the output: {error}"));
            false
        }
        Ok(()) | Err(_) => true,
    }
}

/// What standard output can show.
#[must_use]
pub fn screen() -> Screen {
    let output = io::stdout();
    if !output.is_terminal() {
        return Screen { unicode: speaks_unicode(), ..Screen::PLAIN };
    }
    let width = rustix::termios::tcgetwinsize(output.as_fd()).ok().map(|size| usize::from(size.ws_col));
    Screen { colours: wants_colours(), width: width.filter(|width| *width > 0), unicode: speaks_unicode() }
}

/// Whether the user wants colours on a terminal.
#[must_use]
pub fn wants_colours() -> bool {
    let unset = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    unset && env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Whether standard error shows colours, and the user wants them.
#[must_use]
pub fn stderr_colours() -> bool {
    wants_colours() && io::stderr().is_terminal()
}

/// Whether the locale is UTF-8. The first of these variables that is set decides.
#[must_use]
pub fn speaks_unicode() -> bool {
    let named =
        ["LC_ALL", "LC_CTYPE", "LANG"].iter().find_map(|name| env::var(name).ok().filter(|value| !value.is_empty()));
    named.is_some_and(|locale| {
        let locale = locale.to_ascii_lowercase();
        locale.ends_with("utf-8") || locale.ends_with("utf8")
    })
}
