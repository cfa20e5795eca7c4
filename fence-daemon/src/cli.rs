//! The command line: stock's short options with stock's meaning, and a long one for each.
//!
//! Subcommands (stock's `-c` and `-l` among them) come with their own issues; a `#[command(subcommand)]` field is all they need.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Parser;

use crate::config::{self, Config};

/// The exit code after wrong usage or a wrong configuration, as with stock servers.
pub const EXIT_USAGE: u8 = 255;
/// The exit code where the start failed for another reason, such as another daemon that runs already; as with stock servers.
pub const EXIT_START: u8 = 1;

/// Where stock servers keep their process ID.
pub const DEFAULT_PID_FILE: &str = "/var/run/fence_virtd.pid";

const ABOUT: &str = "Fence virtual machines and containers on request of their cluster mates";
const AFTER_HELP: &str = "\
Options override the configuration file. Guests need nothing new: they keep their fence_xvm and their key.

Exit status:
  0    stopped by SIGTERM or SIGINT; or, without -F, started and gone into the background
  1    the start failed, or another daemon runs already
  255  wrong usage or a wrong configuration

RUST_LOG, if set, chooses the log messages instead of -d (see tracing-subscriber's EnvFilter).";

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(name = "fence-daemon", version, about = ABOUT, after_help = AFTER_HELP, args_override_self = true)]
pub struct Cli {
    /// Stay in the foreground and log to standard error
    #[arg(short = 'F', long)]
    pub foreground: bool,

    /// Read the configuration from FILE
    #[arg(short = 'f', long = "config", value_name = "FILE", default_value = config::DEFAULT_PATH, value_parser = absolute)]
    pub config: PathBuf,

    /// Log more: 1 and up for what was ignored and why, 5 and up for everything
    #[arg(short = 'd', long, value_name = "LEVEL")]
    pub debug: Option<u32>,

    /// Wait at the start for the first libvirt connection too, not only for the network interface
    #[arg(short = 'w', long)]
    pub wait: bool,

    /// Write the process ID to FILE
    #[arg(short = 'p', long = "pidfile", value_name = "FILE", default_value = DEFAULT_PID_FILE, value_parser = absolute)]
    pub pid_file: PathBuf,
}

/// Relative paths count from where the daemon was started, which it leaves for `/`.
fn absolute(path: &str) -> Result<PathBuf, std::io::Error> {
    std::path::absolute(path)
}

impl Cli {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// Wrong usage, or a request for help or the version: `error.print()` says it on the right stream, [`exit_code`] is what to
    /// exit with.
    pub fn read(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        Self::try_parse_from(args)
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

/// What to exit with after [`Cli::read`]'s error.
#[must_use]
pub fn exit_code(error: &clap::Error) -> u8 {
    if error.use_stderr() { EXIT_USAGE } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        Cli::read(std::iter::once("fence-daemon").chain(line.split_whitespace()))
    }

    #[test]
    fn stock_options_mean_what_they_mean_there() {
        let nothing = read("").unwrap();
        assert_eq!((nothing.foreground, nothing.wait, nothing.debug), (false, false, None));
        assert_eq!(nothing.config, Path::new("/etc/fence_virt.conf"));
        assert_eq!(nothing.pid_file, Path::new("/var/run/fence_virtd.pid"));

        let all = read("-F -f /tmp/a.conf -d 3 -w -p /run/x.pid").unwrap();
        assert_eq!((all.foreground, all.wait, all.debug), (true, true, Some(3)));
        assert_eq!((all.config.as_path(), all.pid_file.as_path()), (Path::new("/tmp/a.conf"), Path::new("/run/x.pid")));
        assert_eq!(read("--foreground --config /tmp/a.conf --debug 3 --wait --pidfile /run/x.pid").unwrap(), all);

        assert_eq!(read("-d99").unwrap().debug, Some(99));
        assert_eq!(read("-Fwd2").unwrap(), Cli { foreground: true, wait: true, debug: Some(2), ..nothing });
        // An init script's arguments and an administrator's: the last one counts.
        assert_eq!(read("-w -d1 -w -d2").unwrap().debug, Some(2));
    }

    #[test]
    fn relative_paths_count_from_here() {
        let here = std::env::current_dir().unwrap();
        let cli = read("-f a.conf -p run/x.pid").unwrap();
        assert_eq!((cli.config, cli.pid_file), (here.join("a.conf"), here.join("run/x.pid")));
    }

    #[test]
    fn exit_codes_are_those_of_stock_servers() {
        for (line, code) in [
            ("-h", 0),
            ("--help", 0),
            ("-V", 0),
            ("-Z", 255),
            ("-d", 255),
            ("-d many", 255),
            ("-d -1", 255),
            ("-f", 255),
            ("-f=", 255),
            ("stray", 255),
        ] {
            assert_eq!(exit_code(&read(line).unwrap_err()), code, "{line}");
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

    #[test]
    fn the_help_names_every_option() {
        let help = read("-h").unwrap_err().to_string();
        for word in
            ["-F", "-f", "-d", "-w", "-p", "-h", "-V", "/etc/fence_virt.conf", "/var/run/fence_virtd.pid", "255"]
        {
            assert!(help.contains(word), "{word}: {help}");
        }
    }
}
