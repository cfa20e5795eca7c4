//! Starts: a server's reaction to a file and to flags. It serves, and which clients, or exits with
//! a status.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fence_common::hash::HashKind;
use fence_common::wire::{DEFAULT_PORT, Op};
use fence_lab::client::Family;
use fence_lab::lab::{Guest, Hypervisor};
use fence_lab::peer::Peer;
use fence_lab::server::{Config, START_LIMIT, Server, Which};
use fence_lab::testdriver::{State, TestDomain, node, uuid};

use crate::report::{self, Compared};
use crate::scene::Expected;
use crate::talk;

/// Makes the file from a good one.
type Edit = fn(String) -> String;

/// A start.
#[derive(Clone)]
struct Start {
    name: &'static str,
    expected: Expected,
    edit: Edit,
    /// The digests of the client that sends a request once the server serves.
    asks: (HashKind, HashKind),
    /// The arguments; `FILE` stands for the file's path.
    arguments: &'static [&'static str],
}

impl Start {
    fn new(name: &'static str, expected: Expected, edit: Edit) -> Self {
        let asks = (HashKind::Sha256, HashKind::Sha256);
        Self { name, expected, edit, asks, arguments: &["-F", "-f", "FILE"] }
    }

    fn with(self, arguments: &'static [&'static str]) -> Self {
        Self { arguments, ..self }
    }

    fn unsigned(self) -> Self {
        Self { asks: (HashKind::None, HashKind::None), ..self }
    }
}

/// The time within which a server must serve or end.
const LIMIT: Duration = Duration::from_secs(8);
/// The result of a server that does neither.
const WAITS: &str = "neither serves nor ends";
/// The path of a PID file that the arguments name.
const PID_FILE: &str = "/run/lab/other.pid";
const SERVES: &str = "serves, status is reply 0";

fn serves() -> Expected {
    Expected::both(SERVES)
}

fn exits(code: i32) -> Expected {
    Expected::both(format!("exit {code}"))
}

/// Only fence_virtd serves.
fn only_stock(id: &'static str, code: i32) -> Expected {
    Expected::differ(id, SERVES, format!("exit {code}"))
}

/// Inserts text at the end of the multicast section: a repeated key's last value wins.
fn listener(file: String, key: &str) -> String {
    file.replacen("\t}\n}\nbackends", &format!("\t\t{key}\n\t}}\n}}\nbackends"), 1)
}

/// Inserts text into the first section.
fn global(file: String, key: &str) -> String {
    file.replacen("fence_virtd {", &format!("fence_virtd {{\n\t{key}"), 1)
}

fn more(file: String, section: &str) -> String {
    format!("{file}{section}\n")
}

/// A mistake that both servers reject, with different exit statuses.
fn refused() -> Expected {
    Expected::differ("exit-status", "exit 1", "exit 255")
}

/// Correct files.
fn good_files() -> Vec<Start> {
    vec![
        Start::new("a good file", serves(), |file| file),
        Start::new("keys in capitals", serves(), |file| file.replace("interface =", "INTERFACE =")),
        Start::new("comments", serves(), |file| format!("# one\n{file}# two = \"{{\";\n")),
        Start::new("unknown keys", serves(), |file| listener(global(file, "colour = \"red\";"), "colour = \"red\";")),
        Start::new("an unknown section", serves(), |file| more(file, "colours { red = \"1\"; }")),
        Start::new("a repeated key", serves(), |file| listener(file, "auth = \"sha1\";\n\t\tauth = \"sha256\";")),
        Start::new("a group that permits", serves(), |file| {
            more(file, "groups { group { name = \"a\"; ip = \"192.168.122.11\"; uuid = \"test\"; } }")
        }),
        Start::new("a group with its name in its head", serves(), |file| {
            more(file, "groups { group = \"a\" { ip = \"192.168.122.11\"; uuid = \"test\"; } }")
        }),
        Start::new("a group that does not permit", Expected::both("serves, status is reply 3"), |file| {
            more(file, "groups { group { ip = \"192.168.122.99\"; uuid = \"test\"; } }")
        }),
        Start::new("a dead URI after one that lives", serves(), |file| {
            file.replace("uri = \"test", "uri1 = \"qemu:///system\"; uri = \"test")
        }),
        Start::new("a dead URI before one that lives", serves(), |file| {
            file.replace("uri = \"test", "uri = \"qemu:///system\"; uri1 = \"test")
        }),
        Start::new("a dead URI alone", Expected::differ("dead-uris", "exit 1", "serves, status is reply 1"), |file| {
            file.replace("test:///run/lab/node.xml", "qemu:///system")
        }),
        Start::new(
            "a URI that never answers before one that lives",
            Expected::differ("silent-uris", WAITS, SERVES),
            |file| {
                file.replace("uri = \"test", "uri = \"qemu+unix:///system?socket=/run/lab/silent.sock\"; uri1 = \"test")
            },
        ),
        Start::new(
            "a gap in the numbers of URIs",
            Expected::differ("uri-gaps", "serves, status is reply 2", SERVES),
            |file| file.replace("uri = \"test", "uri = \"test:///run/lab/empty.xml\"; uri7 = \"test"),
        ),
        Start::new("two listeners' sections", Expected::differ("two-sections", SERVES, "exit 255"), |file| {
            let section = "multicast { key_file = \"/run/lab/none\"; interface = \"virbr9\"; }";
            file.replacen("listeners {", &format!("listeners {{\n\t{section}"), 1)
        }),
        Start::new("the same section twice", serves(), |file| {
            let end = file.find("backends {").unwrap_or_default();
            let listeners =
                file.find("listeners {").and_then(|start| file.get(start..end)).unwrap_or_default().to_owned();
            more(file, &listeners)
        }),
        Start::new("Windows line ends", Expected::differ("line-ends", "exit 255", SERVES), |file| {
            file.replace('\n', "\r\n")
        }),
        Start::new("an interface that is not there", Expected::differ("missing-interface", SERVES, WAITS), |file| {
            listener(file, "interface = \"virbr9\";")
        }),
    ]
}

/// Files with mistakes.
fn bad_files() -> Vec<Start> {
    vec![
        Start::new("an empty file", exits(255), |_| String::new()),
        Start::new("no grammar", exits(255), |file| file.replace("listeners {", "listeners")),
        Start::new("a brace too few", exits(255), |file| format!("{file}groups {{")),
        Start::new("a value without quotes", exits(255), |file| file.replace("\"libvirt\"", "libvirt")),
        Start::new("no listener", exits(255), |file| file.replace("listener = \"multicast\";", "")),
        Start::new("no backend", exits(255), |file| file.replace("backend = \"libvirt\";", "")),
        Start::new("a word for a number", only_stock("number-words", 255), |file| global(file, "debug = \"yes\";")),
        Start::new("a listener that is none", refused(), |file| file.replace("\"multicast\"", "\"megaphone\"")),
        Start::new("a backend that is none", refused(), |file| file.replace("\"libvirt\"", "\"abacus\"")),
        Start::new("a hash that is none", refused(), |file| listener(file, "hash = \"md5\";")),
        Start::new("an auth that is none", refused(), |file| listener(file, "auth = \"md5\";")),
        Start::new("a family that is none", refused(), |file| listener(file, "family = \"ipx\";")),
        Start::new("an address that is none", refused(), |file| listener(file, "address = \"here\";")),
        Start::new("an address that is no group", refused(), |file| listener(file, "address = \"10.0.0.1\";")),
        Start::new("a port that is none", refused(), |file| listener(file, "port = \"many\";")),
        Start::new("a port that is too high", Expected::differ("high-ports", WAITS, "exit 255"), |file| {
            listener(file, "port = \"99999\";")
        }),
    ]
}

/// Files whose protection is weaker than their author may think.
fn unprotected() -> Vec<Start> {
    let groups = |name, stock: &str, edit| Start::new(name, Expected::differ("vain-groups", stock, "exit 255"), edit);
    let denies = "serves, status is reply 3";
    vec![
        Start::new("a missing key file", exits(255), |file| listener(file, "key_file = \"/run/lab/none\";")).unsigned(),
        Start::new(
            "an empty key file",
            Expected::differ("vain-keys", "serves, status is no callback", "exit 255"),
            |file| listener(file, "key_file = \"/run/lab/empty.key\";"),
        )
        .unsigned(),
        Start::new("a directory for a key", only_stock("vain-keys", 255), |file| {
            listener(file, "key_file = \"/run/lab\";")
        })
        .unsigned(),
        Start::new("no digests and no key", Expected::differ("no-key-needed", "exit 255", SERVES), |file| {
            listener(file, "key_file = \"/run/lab/none\"; hash = \"none\"; auth = \"none\";")
        })
        .unsigned(),
        groups("no groups in `groups`", SERVES, |file| more(file, "groups { }")),
        groups("an empty group", SERVES, |file| more(file, "groups { group { } }")),
        groups("a group without ip", denies, |file| more(file, "groups { group { uuid = \"other\"; } }")),
        groups("a group without uuid", denies, |file| more(file, "groups { group { ip = \"192.168.122.99\"; } }")),
        groups("a group with an ip that is none", denies, |file| {
            more(file, "groups { group { ip = \"here\"; uuid = \"test\"; } }")
        }),
        groups("`groups` misspelled", SERVES, |file| {
            more(file, "group { ip = \"192.168.122.99\"; uuid = \"other\"; }")
        }),
    ]
}

fn flags() -> Vec<Start> {
    let file_of = |rest| format!("{SERVES}, a PID file with a number and {rest:?}");
    let pid_file = Expected::differ("pid-file", file_of(""), file_of("\n"));
    let usage = || Expected::differ("wrong-usage", "exit 0", "exit 255");
    vec![
        Start::new("no such file", exits(255), |file| file).with(&["-F", "-f", "/run/lab/none"]),
        Start::new("a flag that is none", usage(), |file| file).with(&["-F", "-Z", "-f", "FILE"]),
        Start::new("a flag without its value", usage(), |file| file).with(&["-F", "-f"]),
        Start::new("-h", exits(0), |file| file).with(&["-h"]),
        Start::new("-d99 as one word", serves(), |file| file).with(&["-F", "-d99", "-f", "FILE"]),
        Start::new("-d with its value apart", serves(), |file| file).with(&["-F", "-d", "5", "-f", "FILE"]),
        Start::new("-w", serves(), |file| file).with(&["-F", "-w", "-f", "FILE"]),
        Start::new("-p", pid_file, |file| file).with(&["-F", "-p", PID_FILE, "-f", "FILE"]),
        Start::new("a PID file that cannot be", exits(1), |file| file).with(&[
            "-F",
            "-p",
            "/run/lab/none/other.pid",
            "-f",
            "FILE",
        ]),
    ]
}

/// The lab in which all starts run, one after the other.
struct Place {
    hypervisor: Hypervisor,
    guest: Guest,
    good: String,
    /// A libvirtd that accepts connections and never answers.
    _silent: UnixListener,
}

impl Place {
    fn new() -> Result<Self> {
        let hypervisor = Hypervisor::new()?;
        let guest = hypervisor.guest(1)?;
        let key = hypervisor.write("fence.key", &talk::key())?;
        hypervisor.write("empty.key", b"")?;
        let node_file =
            hypervisor.write("node.xml", node(&[TestDomain::new("test", &uuid(1), State::Running)]).as_bytes())?;
        hypervisor.write("empty.xml", node(&[]).as_bytes())?;
        let good = Config { uris: vec![format!("test://{node_file}")], ..Config::new(&key) }.render();
        let silent = UnixListener::bind(hypervisor.outside("/run/lab/silent.sock")).context("a silent socket")?;
        Ok(Self { hypervisor, guest, good, _silent: silent })
    }

    /// The result of a start, and the server's log.
    fn outcome(&self, which: &Which, start: &Start) -> Result<(String, String)> {
        let file = self.hypervisor.write("start.conf", (start.edit)(self.good.clone()).as_bytes())?;
        let arguments: Vec<_> =
            start.arguments.iter().map(|word| if *word == "FILE" { &file } else { *word }).collect();
        let mut server = Server::spawn_with(&self.hypervisor, which, DEFAULT_PORT, &arguments)?;
        let deadline = Instant::now() + LIMIT;
        while server.is_running()? && !server.is_ready()? {
            if Instant::now() > deadline {
                return Ok((WAITS.to_owned(), server.log()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        if !server.is_running()? {
            let ended = server.finish(Duration::from_secs(10))?;
            let code = ended.code.map_or_else(|| "by a signal".to_owned(), |code| code.to_string());
            return Ok((format!("exit {code}"), ended.stderr));
        }
        let (hash, auth) = start.asks;
        let said = format!("serves, status is {}", self.ask(hash, auth)?);
        let written = if start.arguments.contains(&PID_FILE) { self.pid_file() } else { String::new() };
        Ok((format!("{said}{written}"), server.log()))
    }

    /// The contents of the PID file, without the number itself.
    fn pid_file(&self) -> String {
        let path = self.hypervisor.outside(PID_FILE);
        let Ok(text) = std::fs::read_to_string(&path) else { return ", no PID file".to_owned() };
        let rest = text.trim_start_matches(|character: char| character.is_ascii_digit());
        format!(", a PID file with a number and {rest:?}")
    }

    fn ask(&self, hash: HashKind, auth: HashKind) -> Result<String> {
        let peer = Peer::new(&self.guest, &talk::key(), Family::V4)?.with_digests(hash, auth);
        let request = peer.request(Op::Status, "test")?;
        // fence_virtd listens a moment before it joins the group.
        for _ in 0..2 {
            peer.send(request)?;
            if let Some(mut call) = peer.called_back(talk::PERHAPS)? {
                return Ok(talk::described(&talk::conversation(&mut call, auth)?));
            }
        }
        Ok(talk::SILENCE.to_owned())
    }

    fn compare(&self, start: &Start) -> Result<Compared> {
        let of =
            |which: &Which| self.outcome(which, start).with_context(|| format!("{}: {}", start.name, which.name()));
        let (stock, ours) = (of(&Which::Stock)?, of(&Which::ours()?)?);
        let logs = [("fence_virtd", stock.1.as_str()), ("fence-daemon", ours.1.as_str())];
        Ok(report::compare_one(&format!("starts: {}", start.name), &start.expected, (&stock.0, &ours.0), logs, None))
    }
}

/// Starts a server while another one runs.
fn second_server() -> Result<Compared> {
    let place = Place::new()?;
    let start = Start::new("a second server", exits(1), |file| file);
    let of = |which: &Which| -> Result<(String, String)> {
        let arguments = ["-F", "-f", &place.hypervisor.write("first.conf", place.good.as_bytes())?];
        let mut first = Server::spawn_with(&place.hypervisor, which, DEFAULT_PORT, &arguments)?;
        first.wait_ready(START_LIMIT)?;
        let second = Server::spawn_with(&place.hypervisor, which, DEFAULT_PORT, &arguments)?;
        let ended = second.finish(START_LIMIT)?;
        Ok((format!("exit {}", ended.code.unwrap_or(-1)), ended.stderr))
    };
    let (stock, ours) = (of(&Which::Stock)?, of(&Which::ours()?)?);
    let logs = [("fence_virtd", stock.1.as_str()), ("fence-daemon", ours.1.as_str())];
    Ok(report::compare_one("starts: a second server", &start.expected, (&stock.0, &ours.0), logs, None))
}

/// Runs all starts with both servers and compares the results.
///
/// # Errors
/// The lab or a server could not be started.
pub(crate) fn play() -> Result<Vec<Compared>> {
    let place = Place::new()?;
    let starts = [good_files(), bad_files(), unprotected(), flags()].concat();
    let mut compared: Vec<_> = starts.iter().map(|start| place.compare(start)).collect::<Result<_>>()?;
    compared.push(second_server()?);
    Ok(compared)
}
