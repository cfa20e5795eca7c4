//! The daemon's own options, which are stock's.
//!
//! All else that people type, `--help` and every mistake included, is for the executable of the
//! [`commands`](crate::commands). It reads these options too (`cli` in `fence-daemon/client`), and
//! has the last word: what it rejects, this one does not take. `tests/command_line.rs` holds both
//! to the same reading.

use std::ffi::OsString;
use std::path::PathBuf;

use fence_config::{self as config, Config};
use lexopt::{Arg, Parser};

/// How the daemon was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DaemonOptions {
    /// It stays in the foreground.
    pub foreground: bool,
    /// The configuration file.
    pub config: PathBuf,
    /// The level of the log, if it is not the file's.
    pub debug: Option<u32>,
    /// It waits for the first libvirt connection too.
    pub wait: bool,
    /// The file of its process ID.
    pub pid_file: PathBuf,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self {
            foreground: false,
            config: config::DEFAULT_PATH.into(),
            debug: None,
            wait: false,
            pid_file: config::DEFAULT_PID_FILE.into(),
        }
    }
}

impl DaemonOptions {
    /// Reads a command line, without the program's name. `None` if anything in it is not an option
    /// of the daemon, or has no usable value.
    ///
    /// Of an option that is given twice the last one counts. Relative paths count from here.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Option<Self> {
        let mut options = Self::default();
        let mut parser = Parser::from_args(arguments);
        while let Some(argument) = parser.next().ok()? {
            match argument {
                Arg::Short('F') | Arg::Long("foreground") => options.foreground = true,
                Arg::Short('w') | Arg::Long("wait") => options.wait = true,
                Arg::Short('d') | Arg::Long("debug") => options.debug = Some(level(value(&mut parser)?)?),
                Arg::Short('f') | Arg::Long("config") => options.config = absolute(value(&mut parser)?)?,
                Arg::Short('p') | Arg::Long("pidfile") => options.pid_file = absolute(value(&mut parser)?)?,
                Arg::Short(_) | Arg::Long(_) | Arg::Value(_) => return None,
            }
        }
        Some(options)
    }

    /// Lets the command line override the file, as stock servers do: options can only switch on.
    pub fn apply_to(&self, config: &mut Config) {
        config.foreground |= self.foreground;
        config.wait_for_init |= self.wait;
        if let Some(level) = self.debug {
            config.debug = level;
        }
    }
}

/// The value of the option that was just read. A word of its own that looks like an option is none.
fn value(parser: &mut Parser) -> Option<OsString> {
    if let Some(attached) = parser.optional_value() {
        return Some(attached);
    }
    let word = parser.value().ok()?;
    let is_option = word.as_encoded_bytes().starts_with(b"-") && word != "-";
    (!is_option).then_some(word)
}

fn level(text: OsString) -> Option<u32> {
    let number: i64 = text.to_str()?.parse().ok()?;
    number.try_into().ok()
}

fn absolute(path: OsString) -> Option<PathBuf> {
    std::path::absolute(path.to_str()?).ok()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read(line: &str) -> Option<DaemonOptions> {
        DaemonOptions::read(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn an_option_is_short_or_long_and_the_last_one_counts() {
        assert_eq!(read(""), Some(DaemonOptions::default()));
        let all = read("-F -f /tmp/a.conf -d 3 -w -p /run/x.pid").unwrap();
        assert_eq!((all.foreground, all.wait, all.debug), (true, true, Some(3)));
        assert_eq!((all.config.as_path(), all.pid_file.as_path()), (Path::new("/tmp/a.conf"), Path::new("/run/x.pid")));
        assert_eq!(read("--foreground --config=/tmp/a.conf --debug 3 --wait --pidfile /run/x.pid"), Some(all.clone()));
        assert_eq!(read("-Fwd3 -f/b -f=/tmp/a.conf -p/run/x.pid"), Some(all));
    }

    #[test]
    fn nothing_else_is_for_the_daemon() {
        for line in
            ["status", "-F status", "-h", "-V", "-c", "-l", "-Z", "-d", "-d -1", "-f -w", "-f=", "--yes", "-F=1"]
        {
            assert_eq!(read(line), None, "{line}");
        }
    }

    #[test]
    fn the_command_line_overrides_the_file() {
        let file =
            b"fence_virtd { listener = \"multicast\"; backend = \"libvirt\"; debug = \"4\"; foreground = \"1\"; }";
        let source = config::Source::new(Path::new("f"), file);
        let (mut config, _) = config::parse(&source, config::Warnings::default()).unwrap();
        read("").unwrap().apply_to(&mut config);
        assert_eq!((config.debug, config.foreground, config.wait_for_init), (4, true, false));
        read("-d0 -w").unwrap().apply_to(&mut config);
        assert_eq!((config.debug, config.foreground, config.wait_for_init), (0, true, true));
    }
}
