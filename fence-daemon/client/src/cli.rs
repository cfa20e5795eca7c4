//! The command line: stock's short options with stock's meaning, a long one for each, and commands
//! that stock servers lack.
//!
//! The daemon reads its own options itself (`fence-daemon/src/options.rs`). They are here for the
//! help, and for the words about a command line that is wrong.
//!
//! One thing is unlike stock servers on purpose: wrong usage exits with 255, where they print their
//! help and exit with 0, as if the daemon had started.

use std::ffi::OsString;
use std::net::{AddrParseError, IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};

use fence_common::exit::EXIT_USAGE;
use fence_config::{self as config, Plugin};

use crate::history;

const ABOUT: &str = "Fence virtual machines and containers on request of their cluster mates";
const AFTER_HELP: &str = "\
Without a command this is the daemon. Options override the configuration file. Guests need nothing new: they keep their fence_xvm \
and their key.

Exit status:
  0    stopped by SIGTERM or SIGINT; without -F: started and in the background; a command: done
  1    the start or the command failed, another daemon runs, or -c has written nothing
  255  wrong usage or a wrong configuration
(`status` has more: see its own help.)

RUST_LOG, if set, chooses the log messages instead of -d: a level, or TARGET=LEVEL,...";

const GIVEN: &str = "Answers for -c, which then does not ask";

/// What the command line says.
#[derive(Clone, Debug, PartialEq, Eq, Parser)]
#[command(
    name = "fence-daemon",
    version,
    about = ABOUT,
    after_help = AFTER_HELP,
    args_override_self = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// Stay in the foreground and log to standard error
    #[arg(short = 'F', long)]
    pub foreground: bool,

    /// Read the configuration from FILE (-c: write it to FILE)
    #[arg(short = 'f', long = "config", value_name = "FILE", global = true)]
    #[arg(default_value = config::DEFAULT_PATH, value_parser = absolute)]
    pub config: PathBuf,

    /// Log more: 1 and up for what was ignored and why, 5 and up for everything
    #[arg(short = 'd', long, value_name = "LEVEL")]
    pub debug: Option<u32>,

    /// Wait at the start for the first libvirt connection too, not only for the network interface
    #[arg(short = 'w', long)]
    pub wait: bool,

    /// Write the process ID to FILE
    #[arg(short = 'p', long = "pidfile", value_name = "FILE", default_value = config::DEFAULT_PID_FILE, value_parser = absolute)]
    pub pid_file: PathBuf,

    /// Ask for the configuration, show it, write it when confirmed, and exit
    #[arg(short = 'c', long)]
    pub configure: bool,

    /// List the available listeners and backends, and exit
    #[arg(short = 'l', long)]
    pub list: bool,

    /// Answers for `-c`.
    #[command(flatten, next_help_heading = GIVEN)]
    pub given: Given,

    /// What to do instead of being the daemon.
    #[command(subcommand)]
    pub command: Option<Action>,
}

/// Answers for `-c` from the command line.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// The listeners, with commas between them
    #[arg(long, value_name = "LIST", requires = "configure")]
    pub listener: Option<String>,

    /// The interface that the guests are on, or none
    #[arg(long, value_name = "NAME", requires = "configure")]
    pub interface: Option<String>,

    /// The port that guests send to
    #[arg(long, value_name = "PORT", requires = "configure")]
    pub port: Option<String>,

    /// The multicast group that guests send to [default: 225.0.0.12, or ff05::3:1 with --family
    /// ipv6]; for tcp alone, the address that guests connect to
    #[arg(long, value_name = "ADDRESS", requires = "configure")]
    pub address: Option<String>,

    /// ipv4 or ipv6
    #[arg(long, value_name = "FAMILY", requires = "configure")]
    pub family: Option<String>,

    /// The key that hypervisors and guests share
    #[arg(long, value_name = "FILE", value_parser = absolute, requires = "configure")]
    pub key_file: Option<PathBuf>,

    /// The directory of the serial lines' sockets
    #[arg(long, value_name = "DIRECTORY", requires = "configure")]
    pub path: Option<String>,

    /// Which devices have serial lines: serial or vmchannel
    #[arg(long, value_name = "MODE", requires = "configure")]
    pub mode: Option<String>,

    /// Whom serial lines permit to fence: everyone, where the file has no groups
    #[arg(long, value_name = "WHOM", requires = "configure")]
    pub permit: Option<String>,

    /// A libvirt connection; again for more of them
    #[arg(long = "uri", value_name = "URI", requires = "configure")]
    pub uris: Vec<String>,

    /// The weakest digest that a request may carry: sha256, sha512, sha1, none
    #[arg(long, value_name = "DIGEST", requires = "configure")]
    pub hash: Option<String>,

    /// The digest of the callback: sha256, sha512, sha1, none
    #[arg(long, value_name = "DIGEST", requires = "configure")]
    pub auth: Option<String>,

    /// Create the key (and its directory) if it does not exist
    #[arg(long, requires = "configure")]
    pub create_key: bool,

    /// Ask nothing: missing answers come from the file, or are the defaults
    #[arg(long, requires = "configure")]
    pub yes: bool,
}

impl Given {
    /// The options that are keys of a listener, by their names.
    pub fn of_listener(&self) -> [(&'static str, &Option<String>); 9] {
        [
            ("interface", &self.interface),
            ("port", &self.port),
            ("family", &self.family),
            ("address", &self.address),
            ("hash", &self.hash),
            ("auth", &self.auth),
            ("path", &self.path),
            ("mode", &self.mode),
            ("permit", &self.permit),
        ]
    }
}

/// What there is to do besides being the daemon.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Action {
    /// Check the configuration and print it with every default filled in
    ///
    /// The output is a configuration file itself: every key that has an effect, with a comment
    /// where its value is a default. Warnings and mistakes go to standard error, with file and
    /// line. The key and the interface are checked as well. Nothing is changed or sent.
    ///
    /// Exit status, as of the daemon: 0 if it would start, 255 for a mistake in the file or no
    /// usable key.
    CheckConfig,

    /// Print what the systemd unit must permit for this configuration, beyond what it permits
    /// anyway
    ///
    /// The output is a drop-in of fence-daemon.service. A generator runs this command at each boot
    /// and `systemctl daemon-reload`. Nothing is changed.
    ///
    /// Exit status: 0, or 255 for a mistake in the file.
    DropIn,

    /// Show the running daemon's state: what it hears, what it has done, what is wrong
    ///
    /// Asks over the control socket, control.sock in the configuration's state_directory. Only root
    /// may.
    ///
    /// Exit status: 0 serving, 1 serving with something missing (or starting, or stopping), 3 no
    /// daemon answers, 4 its state is unknown.
    Status {
        /// Print the report as JSON on one line (see docs/reference/inspect.md)
        #[arg(long)]
        json: bool,
    },

    /// Find what keeps a fence from working, and say what to type against it
    ///
    /// On the hypervisor: configuration, key, daemon, interface, memberships, firewall, kernel
    /// program, libvirt, domains, the host. In a guest (--from-guest): key, fence_xvm, route,
    /// firewall, and a real request for a list by each way that the guest could use. Nothing is
    /// changed.
    ///
    /// Exit status: 0 nothing is wrong (there may be warnings), 1 something is.
    Doctor {
        /// Check a guest from inside, where fence_xvm is
        #[arg(long)]
        from_guest: bool,

        /// The guest's key [default: that of -f FILE, or fence_xvm's own]
        #[arg(long, value_name = "FILE", value_parser = absolute, requires = "from_guest")]
        key: Option<PathBuf>,

        /// Ask by tcp there, too (more than once if wanted) [default: at the gateways]
        #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = place, requires = "from_guest")]
        tcp: Vec<(IpAddr, Option<u16>)>,

        /// Ask by vsock, too: the host, or the CID given
        #[arg(long, value_name = "CID", requires = "from_guest", num_args = 0..=1, require_equals = true,
              default_missing_value = "2", value_parser = clap::value_parser!(u32).range(2..i64::from(u32::MAX)))]
        vsock: Option<u32>,

        /// Ask by this serial port, too, such as /dev/ttyS1
        #[arg(long, value_name = "DEVICE", value_parser = absolute, requires = "from_guest")]
        serial: Option<PathBuf>,

        /// Print the findings as JSON on one line (see docs/reference/doctor.md)
        #[arg(long)]
        json: bool,
    },

    /// Show what was asked, by whom, and what came of it, also by earlier daemons
    ///
    /// Reads the files in the configuration's history_directory, so it needs no running daemon. The
    /// oldest line comes first. Times are in UTC.
    ///
    /// Exit status: 0, or 1 if the files cannot be read or have no such number.
    #[command(args_conflicts_with_subcommands = true)]
    History {
        /// Not before TIME: how long ago (2h, 3days), or a date, or "2026-11-30 09:15:00" in UTC
        #[arg(long, value_name = "TIME", value_parser = history::since)]
        since: Option<u64>,

        /// About this domain, as requests spell it
        #[arg(long, value_name = "NAME")]
        domain: Option<String>,

        /// Of the client with this address, or in this domain
        #[arg(long, value_name = "ADDRESS")]
        source: Option<String>,

        /// Only what did not succeed
        #[arg(long)]
        failed: bool,

        /// Print the records as JSON, one a line (see docs/reference/history.md)
        #[arg(long)]
        json: bool,

        /// One of them.
        #[command(subcommand)]
        one: Option<OneRecord>,
    },

    /// Watch the running daemon: status and rates, renewed each second; q quits
    Top,

    /// Create the key that hypervisors and guests share
    ///
    /// 4096 random bytes, readable by root only. An existing key stays, unless --force is given.
    Keygen {
        /// The file to create [default: the configuration's key_file]
        #[arg(value_name = "PATH", value_parser = absolute)]
        path: Option<PathBuf>,

        /// Replace an existing key: every guest then needs the new one
        #[arg(long)]
        force: bool,

        /// Create missing directories
        #[arg(long)]
        parents: bool,
    },
}

/// One record of the history.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum OneRecord {
    /// Draw one request's steps, and say why it failed and what to type
    Show {
        /// Its number, as the list shows it
        #[arg(value_name = "ID")]
        id: u64,

        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
}

/// Relative paths count from where the daemon was started, which it leaves for `/`.
fn absolute(path: &str) -> Result<PathBuf, std::io::Error> {
    std::path::absolute(path)
}

/// An IP address, with a port or without.
fn place(text: &str) -> Result<(IpAddr, Option<u16>), AddrParseError> {
    let with_port = text.parse::<SocketAddr>();
    with_port.map(|place| (place.ip(), Some(place.port()))).or_else(|_| text.parse().map(|ip| (ip, None)))
}

impl Cli {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// Wrong usage, or a request for help or the version: `error.print()` says it on the right
    /// stream, [`exit_code`] is what to exit with.
    pub fn read(args: impl IntoIterator<Item = impl Into<OsString> + Clone>) -> Result<Self, clap::Error> {
        let cli = Self::try_parse_from(args)?;
        let for_the_daemon = cli.foreground || cli.wait || cli.debug.is_some() || cli.configure || cli.list;
        if cli.command.is_some() && for_the_daemon {
            let why = "only -f goes with a command: the other options are the daemon's";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, why));
        }
        Ok(cli)
    }
}

/// What `-l` prints: the backends and listeners that this daemon has, in the layout in which stock
/// servers show theirs. What stock servers have besides is not listed before it works.
#[must_use]
pub fn list() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let plugins = [Plugin::Backend, Plugin::Listener];
    let lines = |plugin: Plugin| -> String {
        plugin.supported().iter().map(|name| format!("    {name} {version}\n")).collect()
    };
    plugins.map(|plugin| format!("Available {}s:\n{}", plugin.key(), lines(plugin))).concat()
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
    fn the_list_has_only_working_plugins() {
        let version = env!("CARGO_PKG_VERSION");
        let expected = format!(
            "Available backends:\n    libvirt {version}\n    cpg {version}\nAvailable listeners:\n    multicast {version}\n    tcp {version}\n    vsock {version}\n    serial {version}\n"
        );
        assert_eq!(list(), expected);
    }

    #[test]
    fn answers_are_for_the_questions_only() {
        let given =
            read("-c --interface virbr0 --port 1 --uri a: --uri b: --key-file /k --create-key --yes").unwrap().given;
        assert_eq!((given.interface.as_deref(), given.port.as_deref()), (Some("virbr0"), Some("1")));
        assert_eq!(
            (given.uris.as_slice(), given.create_key, given.yes),
            (&["a:".to_owned(), "b:".to_owned()][..], true, true)
        );
        for option in [
            "--interface x",
            "--port 1",
            "--address x",
            "--family x",
            "--key-file x",
            "--uri x",
            "--hash x",
            "--auth x",
        ] {
            assert_eq!(exit_code(&read(option).unwrap_err()), 255, "{option}");
            assert!(read(&format!("-c {option}")).is_ok(), "{option}");
        }
        assert!(read("--yes").is_err() && read("--create-key").is_err());
    }

    #[test]
    fn commands_take_the_configuration_and_none_of_the_daemons_options() {
        assert_eq!(read("").unwrap().command, None);
        for line in ["-f /x check-config", "check-config -f /x"] {
            let cli = read(line).unwrap();
            assert_eq!((cli.command, cli.config.as_path()), (Some(Action::CheckConfig), Path::new("/x")), "{line}");
        }
        let keygen = read("keygen /k --force").unwrap().command;
        assert_eq!(keygen, Some(Action::Keygen { path: Some("/k".into()), force: true, parents: false }));
        for line in [
            "-F check-config",
            "-c check-config",
            "-w keygen",
            "-d1 keygen",
            "-l keygen",
            "keygen a b",
            "check-config x",
        ] {
            assert_eq!(exit_code(&read(line).unwrap_err()), 255, "{line}");
        }
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
    fn the_help_names_every_option() {
        let help = read("-h").unwrap_err().to_string();
        for word in [
            "-F",
            "-f",
            "-d",
            "-w",
            "-p",
            "-c",
            "-l",
            "check-config",
            "keygen",
            "-h",
            "-V",
            "/etc/fence_virt.conf",
            "/var/run/fence_virtd.pid",
            "255",
        ] {
            assert!(help.contains(word), "{word}: {help}");
        }
    }
}
