//! The server under test: `fence-daemon`, or fence_virtd, which shows whether a test (and the lab)
//! is right.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use fence_common::hash::HashKind;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::client::Family;
use crate::lab::{BRIDGE, COMMAND_LIMIT, Hypervisor};
use crate::process::{Finished, Process, poll_until, run};
use crate::timings::Fence;
use crate::tools;

/// How long a server may take until it serves, on a loaded machine.
pub const START_LIMIT: Duration = Duration::from_secs(60);
/// How long a server may take to end after SIGTERM.
pub const STOP_LIMIT: Duration = Duration::from_secs(40);

/// Where an installation has `fence-daemon`.
pub const INSTALLED: &str = "/usr/sbin/fence-daemon";
/// Where an installation has the executable of its commands.
pub const COMMANDS_INSTALLED: &str = "/usr/libexec/fence-xdp/fence-daemon-commands";

/// The executable of the commands of the daemon at this path, as a build leaves it.
#[must_use]
pub fn commands_beside(daemon: &Path) -> PathBuf {
    daemon.with_file_name("fence-daemon-commands")
}

/// The build of `fence-daemon` with fault points, as named by `FENCE_DAEMON_FAULTS_BIN`, or as
/// built in this workspace.
///
/// # Errors
/// It is not there; the error says how to build it.
pub fn faults() -> Result<PathBuf> {
    let built = || tools::target_directory().join("debug/fence-daemon-faults");
    let path = std::env::var_os("FENCE_DAEMON_FAULTS_BIN").map_or_else(built, PathBuf::from);
    ensure!(path.is_file(), "no {}: run `cargo xtask test libvirt`", path.display());
    Ok(path)
}

/// Which server is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// `fence-daemon`, at this path.
    Ours(PathBuf),
    /// Debian's `fence_virtd`.
    Stock,
}

impl Which {
    /// The program's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ours(_) => "fence-daemon",
            Self::Stock => "fence_virtd",
        }
    }

    /// `fence-daemon` as named by `FENCE_DAEMON_BIN`, or as built in this workspace.
    ///
    /// # Errors
    /// It is not there; the error says how to build it.
    pub fn ours() -> Result<Self> {
        let built = || tools::target_directory().join("debug/fence-daemon");
        Self::at(&std::env::var_os("FENCE_DAEMON_BIN").map_or_else(built, PathBuf::from))
    }

    /// `fence-daemon` at this path, with the executable of its commands beside it.
    pub fn at(path: &Path) -> Result<Self> {
        for executable in [path, &commands_beside(path)] {
            ensure!(executable.is_file(), "no {}: run `cargo xtask build`", executable.display());
        }
        Ok(Self::Ours(std::path::absolute(path)?))
    }

    /// Our executables: where an installation has each, and its content.
    ///
    /// # Errors
    /// They cannot be read, or this is the stock server.
    pub fn executables(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let Self::Ours(daemon) = self else { bail!("the stock server is not built here") };
        let read = |path: &Path| std::fs::read(path).with_context(|| path.display().to_string());
        Ok([(INSTALLED, read(daemon)?), (COMMANDS_INSTALLED, read(&commands_beside(daemon))?)])
    }

    /// What a program's arguments name: `fence_virtd`, `fence-daemon` at a path, or [`Self::ours`].
    pub fn chosen(daemon: Option<&Path>, stock: bool) -> Result<Self> {
        if stock { Ok(Self::Stock) } else { daemon.map_or_else(Self::ours, Self::at) }
    }

    /// [`Self::ours`], or fence_virtd if the environment says `FENCE_LAB_SERVER=stock` (to prove a
    /// test).
    pub fn from_env() -> Result<Self> {
        match std::env::var("FENCE_LAB_SERVER").as_deref() {
            Ok("stock") => {
                tools::find("fence_virtd")?;
                Ok(Self::Stock)
            }
            Ok("ours") | Err(_) => Self::ours(),
            Ok(other) => bail!("FENCE_LAB_SERVER is `ours` or `stock`, not `{other}`"),
        }
    }
}

/// A fence_virt.conf with one multicast listener and the libvirt backend.
#[derive(Clone, Debug)]
pub struct Config {
    /// libvirt connections, in order.
    pub uris: Vec<String>,
    /// The listener's interface.
    pub interface: String,
    /// The listener's key file.
    pub key_file: String,
    /// `key_file2`, ours only.
    pub key_file2: Option<String>,
    /// The listener's family.
    pub family: Family,
    /// The weakest digest of a request.
    pub hash: HashKind,
    /// The digest of the callback.
    pub auth: HashKind,
    /// `port`, if it is not the default.
    pub port: Option<u16>,
    /// `attach`, ours only: fence_virtd ignores it.
    pub attach: Option<&'static str>,
    /// `strict_source`, ours only.
    pub strict_source: Option<&'static str>,
    /// `alone`, ours only.
    pub alone: Option<&'static str>,
    /// The keys of section `tcp`, if there is a tcp listener. fence_virtd serves it alone, ours
    /// beside multicast.
    pub tcp: Option<Vec<(&'static str, String)>>,
    /// The keys of section `serial`, likewise.
    pub serial: Option<Vec<(&'static str, String)>>,
    /// More of section `fence_virtd`'s keys, ours only.
    pub daemon: Vec<(&'static str, &'static str)>,
    /// The name of the backend and of its section.
    pub backend_name: &'static str,
    /// More of the backend's keys, ours only.
    pub backend: Vec<(&'static str, &'static str)>,
    /// More sections (`groups { ... }`).
    pub more: String,
}

impl Config {
    /// The usual one: libvirt's in-process test driver, the bridge, IPv4, SHA-256.
    #[must_use]
    pub fn new(key_file: &str) -> Self {
        Self {
            uris: vec!["test:///default".to_owned()],
            interface: BRIDGE.to_owned(),
            key_file: key_file.to_owned(),
            key_file2: None,
            family: Family::V4,
            hash: HashKind::Sha256,
            auth: HashKind::Sha256,
            port: None,
            attach: None,
            strict_source: None,
            alone: None,
            tcp: None,
            serial: None,
            daemon: Vec::new(),
            backend_name: "libvirt",
            backend: Vec::new(),
            more: String::new(),
        }
    }

    /// The file's text for fence-daemon.
    #[must_use]
    pub fn render(&self) -> String {
        let also = [("tcp", self.tcp.is_some()), ("serial", self.serial.is_some())];
        let also = also.iter().filter(|(_, is_there)| *is_there).map(|(name, _)| *name);
        self.render_with(&["multicast"].into_iter().chain(also).collect::<Vec<_>>().join(","))
    }

    fn render_with(&self, listeners: &str) -> String {
        let mut listener = vec![
            ("interface", self.interface.clone()),
            ("key_file", self.key_file.clone()),
            ("family", self.family.name().to_owned()),
            ("hash", self.hash.name().to_owned()),
            ("auth", self.auth.name().to_owned()),
        ];
        listener.extend(self.key_file2.clone().map(|path| ("key_file2", path)));
        listener.extend(self.port.map(|port| ("port", port.to_string())));
        listener.extend(self.attach.map(|attach| ("attach", attach.to_owned())));
        listener.extend(self.strict_source.map(|strict| ("strict_source", strict.to_owned())));
        listener.extend(self.alone.map(|alone| ("alone", alone.to_owned())));
        let lines = |pairs: Vec<(String, String)>| -> String {
            pairs.iter().map(|(key, value)| format!("\t\t{key} = \"{value}\";\n")).collect()
        };
        let uri = |(index, uri): (usize, &String)| {
            (if index == 0 { "uri".to_owned() } else { format!("uri{index}") }, uri.clone())
        };
        let others = [("tcp", &self.tcp), ("serial", &self.serial)].into_iter().filter_map(|(name, keys)| {
            let keys = keys.as_ref()?.iter().map(|(key, value)| ((*key).to_owned(), value.clone()));
            Some(format!("\t{name} {{\n{}\t}}\n", lines(keys.collect())))
        });
        let others: String = others.collect();
        let backend = self.uris.iter().enumerate().map(uri);
        let backend = backend.chain(self.backend.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())));
        let name = self.backend_name;
        format!(
            "fence_virtd {{\n\tlistener = \"{listeners}\";\n\tbackend = \"{name}\";\n{}}}\n\
             listeners {{\n\tmulticast {{\n{}\t}}\n{others}}}\n\
             backends {{\n\t{name} {{\n{}\t}}\n}}\n{}",
            lines(self.daemon.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()),
            lines(listener.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
            lines(backend.collect()),
            self.more,
        )
    }
}

/// A running server. Dropping it kills it.
#[derive(Debug)]
pub struct Server {
    process: Process,
    which: Which,
    port: u16,
    hypervisor: Hypervisor,
}

impl Server {
    /// Starts a server and does not wait until it serves: for starts that are to fail, or to wait.
    pub fn spawn(hypervisor: &Hypervisor, which: &Which, config: &Config, arguments: &[&str]) -> Result<Self> {
        let text = match (which, &config.tcp, &config.serial) {
            (Which::Stock, Some(_), _) => config.render_with("tcp"),
            (Which::Stock, None, Some(_)) => config.render_with("serial"),
            _ => config.render(),
        };
        let file = hypervisor.write("fence_virt.conf", text.as_bytes())?;
        let port = config.port.unwrap_or(fence_common::wire::DEFAULT_PORT);
        Self::spawn_with_file(hypervisor, which, &file, port, arguments)
    }

    /// Like [`Self::spawn`], with an existing configuration file (a path inside the lab).
    pub fn spawn_with_file(
        hypervisor: &Hypervisor,
        which: &Which,
        file: &str,
        port: u16,
        arguments: &[&str],
    ) -> Result<Self> {
        Self::spawn_with(hypervisor, which, port, &[&["-F", "-f", file], arguments].concat())
    }

    /// Starts a server with exactly these arguments. `port` is where it would serve.
    pub fn spawn_with(hypervisor: &Hypervisor, which: &Which, port: u16, arguments: &[&str]) -> Result<Self> {
        let program = match which {
            Which::Ours(path) => path.clone(),
            Which::Stock => tools::find("fence_virtd")?,
        };
        let mut command = Command::new(program);
        command.args(arguments);
        let process = Process::start(hypervisor.space(), &mut command)?;
        Ok(Self { process, which: which.clone(), port, hypervisor: hypervisor.clone() })
    }

    /// Starts a server and waits until it serves.
    ///
    /// # Errors
    /// It ended, or did not say that it is ready: the error has what it logged.
    pub fn start(hypervisor: &Hypervisor, which: &Which, config: &Config) -> Result<Self> {
        let mut server = Self::spawn(hypervisor, which, config, &[])?;
        server.wait_ready(START_LIMIT)?;
        Ok(server)
    }

    /// Waits until the server serves, and ours also until the kernel program is attached or absent.
    /// The error has the log.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let ready = poll_until("the server to be ready", limit, || {
            if !self.process.is_running()? {
                bail!("it has ended");
            }
            Ok((self.is_ready()? && self.is_settled()).then_some(()))
        });
        ready.with_context(|| format!("its log: {}", self.log()))
    }

    /// Waits until ours has attached its kernel program, or has logged that there will be none.
    pub fn wait_settled(&self, limit: Duration) -> Result<()> {
        poll_until("the kernel program", limit, || Ok(self.is_settled().then_some(())))
            .with_context(|| format!("the server's log: {}", self.log()))
    }

    /// Whether ours has finished loading the kernel program. It is ready before that, and logs the
    /// outcome.
    fn is_settled(&self) -> bool {
        let lines = self.process.stderr().lines();
        let has = |words: &str| lines.iter().any(|line| line.contains(words));
        !has("program=loading") || has("the kernel program is attached") || has("without the kernel program")
    }

    /// Whether it serves. Ours logs it; for fence_virtd the socket shows it.
    pub fn is_ready(&self) -> Result<bool> {
        match self.which {
            Which::Ours(_) => Ok(self.process.stderr().lines().iter().any(|line| says_ready(line))),
            Which::Stock => {
                let suffix = format!(":{:04X}", self.port);
                let bound = |table: String| {
                    table
                        .lines()
                        .filter_map(|line| line.split_whitespace().nth(1))
                        .any(|local| local.ends_with(&suffix))
                };
                let tables = ["udp", "udp6", "tcp", "tcp6"];
                let found = tables.map(|table| self.hypervisor.proc_net(table).map(bound));
                found.into_iter().try_fold(false, |any, found| Ok(any || found?))
            }
        }
    }

    /// All that it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.stderr().text()
    }

    /// How many lines it has logged: a place to continue reading from.
    #[must_use]
    pub fn log_position(&self) -> usize {
        self.process.stderr().lines().len()
    }

    /// Waits for a log line from `position` on that `wanted` makes something of.
    pub fn wait_log<T>(&self, position: usize, limit: Duration, wanted: impl Fn(&str) -> Option<T>) -> Option<T> {
        self.process.stderr().wait_for(position, limit, wanted)
    }

    /// Waits for the line about the next fence after `position`.
    ///
    /// # Errors
    /// None came within some seconds.
    pub fn next_fence(&self, position: usize) -> Result<Fence> {
        self.wait_log(position, Duration::from_secs(10), Fence::parse)
            .with_context(|| format!("no line about the fence in the log: {}", self.log()))
    }

    /// `fence-daemon status` of our server, with the configuration file of [`Self::spawn`]: exit
    /// code and report.
    pub fn status(&self) -> Result<(Option<i32>, Value)> {
        let Which::Ours(program) = &self.which else { bail!("the stock server has no status") };
        let mut command = Command::new(program);
        command.args(["-f", &self.hypervisor.path("fence_virt.conf"), "status", "--json"]);
        let answer = run(self.hypervisor.space(), &mut command, COMMAND_LIMIT)?;
        Ok((answer.code, serde_json::from_str(&answer.stdout).with_context(|| answer.stderr)?))
    }

    /// Waits until ours reports this state of a domain: the domain's report.
    pub fn wait_domain(&self, domain: &str, state: &str) -> Result<Value> {
        poll_until(&format!("{domain} to be {state}"), START_LIMIT, || {
            let (_, report) = self.status()?;
            let uris = report["uris"].as_array().into_iter().flatten();
            let mut domains = uris.filter_map(|uri| uri["domains"].as_array()).flatten();
            Ok(domains.find(|found| found["name"] == domain && found["state"] == state).cloned())
        })
        .with_context(|| format!("the server's log: {}", self.log()))
    }

    /// Which server it is.
    #[must_use]
    pub fn which(&self) -> &Which {
        &self.which
    }

    /// Whether it logs a line about each fence.
    #[must_use]
    pub fn tells_times(&self) -> bool {
        matches!(self.which, Which::Ours(_))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for its end by itself.
    pub fn finish(self, limit: Duration) -> Result<Finished> {
        self.process.finish(limit)
    }

    /// Kills the server like a crash, and waits until its process has ended. The next one finds the
    /// PID file unlocked.
    pub fn crash(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        // Reaped as well: a server that looks for the number in a PID file finds zombies too.
        ensure!(self.process.ends_within(STOP_LIMIT)? && !self.process.is_running()?, "the server does not end");
        Ok(())
    }

    /// Sends a signal and waits for its end.
    pub fn stop(mut self, signal: Signal) -> Result<Finished> {
        self.process.signal(signal)?;
        self.process.finish(STOP_LIMIT)
    }
}

/// Whether a log line says that the server is ready ("already" and "not ready" do not).
fn says_ready(line: &str) -> bool {
    !line.contains("not ready") && line.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == "ready")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_a_word_of_its_own() {
        assert!(says_ready("2026-11-22T11:30:00Z  INFO ready interface=virbr0"));
        assert!(says_ready("INFO fence_daemon: ready: serving 225.0.0.12"));
        assert!(!says_ready("ERROR fence_virtd runs already"));
        assert!(!says_ready("INFO not ready yet"));
    }
}
