//! The setup of every test in this set: a hypervisor, guests, a key and a server.

use anyhow::{Context, Result, bail, ensure};
use fence_lab::client::Client;
use fence_lab::kernel::{self, Counters};
use fence_lab::lab::{Guest, Hypervisor, Space};
use fence_lab::process::Finished;
use fence_lab::server::{Config, Server, Which, commands_beside};

/// A key of the length that Debian's package makes, with every byte value in it, NUL included.
pub(crate) fn key() -> Vec<u8> {
    (0..4096_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// The domain of libvirt's test driver.
pub(crate) const DOMAIN: &str = "test";

/// A hypervisor with one guest, without a server yet.
pub(crate) struct Bench {
    pub(crate) hypervisor: Hypervisor,
    pub(crate) guest: Guest,
    pub(crate) key: String,
}

impl Bench {
    pub(crate) fn new() -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let guest = hypervisor.guest(1)?;
        let key = hypervisor.write("fence.key", &key())?;
        Ok(Self { hypervisor, guest, key })
    }

    /// The usual configuration with this value of `attach`.
    pub(crate) fn config(&self, attach: &'static str) -> Config {
        Config { attach: Some(attach), ..Config::new(&self.key) }
    }

    /// The usual configuration without the kernel program, and with a tcp listener that has these
    /// keys.
    pub(crate) fn with_tcp(&self, keys: &[(&'static str, &str)]) -> Config {
        let keys = keys.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        Config { tcp: Some(keys), ..self.config("off") }
    }

    /// Starts `fence-daemon` and waits until it serves.
    pub(crate) fn serve(&self, config: &Config) -> Result<Server> {
        Server::start(&self.hypervisor, &Which::ours()?, config)
    }

    /// Our executables in a directory that everybody may enter, other than the build's: the path
    /// of `fence-daemon` there.
    pub(crate) fn copied_program(&self) -> Result<String> {
        let Which::Ours(program) = Which::ours()? else { bail!("the stock server has no commands") };
        for executable in [&program, &commands_beside(&program)] {
            let copied = ["-m", "755", "-t", &self.hypervisor.path(""), &executable.to_string_lossy()];
            self.hypervisor.space().must("install", &copied)?;
        }
        Ok(self.hypervisor.path("fence-daemon"))
    }

    /// A client with this lab's key.
    pub(crate) fn client(&self, op: &str) -> Client {
        Client::new(op, &self.key)
    }

    /// A client that asks about [`DOMAIN`].
    pub(crate) fn about_domain(&self, op: &str) -> Client {
        self.client(op).domain(DOMAIN)
    }

    pub(crate) fn counters(&self) -> Result<Counters> {
        kernel::counters(&self.hypervisor)
    }

    /// Runs a client and checks its exit code.
    pub(crate) fn expect(&self, server: &Server, space: &Space, client: &Client, code: i32) -> Result<Finished> {
        let answer = client.run(space)?;
        ensure!(
            answer.code == Some(code),
            "fence_xvm {}: exit code {:?} instead of {code}; it printed: {}{}\nthe server's log: {}",
            client.arguments().join(" "),
            answer.code,
            answer.stdout,
            answer.stderr,
            server.log(),
        );
        Ok(answer)
    }

    /// Runs a client in the guest, and checks its exit code and how the request reached the daemon
    /// according to its log.
    pub(crate) fn expect_via(&self, server: &Server, client: &Client, code: i32, via: &str) -> Result<Finished> {
        let position = server.log_position();
        let answer = self.expect(server, self.guest.space(), client, code)?;
        let fence = server.next_fence(position)?;
        ensure!(fence.get("via") == Some(via), "came via {:?}, not {via}", fence.get("via"));
        Ok(answer)
    }
}

/// The state of the test driver's domain in a host list.
pub(crate) fn listed(list: &Finished) -> Result<&str> {
    let line = list.stdout.lines().find(|line| line.split_whitespace().next() == Some(DOMAIN));
    let line = line.with_context(|| format!("no `{DOMAIN}` in the list: {}{}", list.stdout, list.stderr))?;
    line.split_whitespace().last().context("an empty line")
}
