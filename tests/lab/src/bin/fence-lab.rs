//! A hypervisor and a guest on a machine that has neither. `cargo xtask run` shows it where there
//! is no libvirt.
//!
//! The program makes a lab (network namespaces with a bridge virbr0) and starts the daemon on
//! libvirt's in-process test driver. The stock client in the guest sends one request after the
//! other, and a table shows where the time went. Without `--once` the lab then stays up for
//! requests by hand.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use fence_common::wire::DEFAULT_PORT;
use fence_lab::client::Client;
use fence_lab::interrupt::Interrupt;
use fence_lab::kernel;
use fence_lab::lab::{BRIDGE, Guest, HYPERVISOR_V4, Hypervisor};
use fence_lab::process::Finished;
use fence_lab::program::{self, say};
use fence_lab::server::{Config, Server, Which};
use fence_lab::timings::Fence;
use fence_lab::tools;
use nix::sys::signal::Signal;

/// A fencing lab on this machine: a bridge, a guest, the daemon, and the stock client.
#[derive(Parser)]
#[command(about)]
struct Arguments {
    /// Send one round of requests, print the answers, and exit: 0 if each is the expected one, else
    /// 1
    #[arg(long)]
    once: bool,
    /// The daemon to run [default: $FENCE_DAEMON_BIN, or the one built in this workspace]
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Run Debian's fence_virtd instead, for comparison (it logs no times)
    #[arg(long, conflicts_with = "daemon")]
    stock: bool,
}

/// The domain that libvirt's test driver has.
const DOMAIN: &str = "test";

/// Each operation with its expected exit code.
const ROUND: [(&str, i32); 5] = [("list", 0), ("status", 0), ("off", 0), ("status", 2), ("on", 0)];

fn main() -> ExitCode {
    program::exit("fence-lab", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<bool> {
    let interrupt = Interrupt::watch()?;
    let which = Which::chosen(arguments.daemon.as_deref(), arguments.stock)?;
    tools::require(&["fence_xvm", "ip", "bpftool", "tini", "unshare"])?;

    say(&format!("making the lab: hypervisor {HYPERVISOR_V4} with bridge {BRIDGE}, one guest ..."));
    let hypervisor = Hypervisor::new()?;
    let guest = hypervisor.guest(1)?;
    let key = hypervisor.write("fence.key", &tools::random_bytes(4096)?)?;
    say(&format!("starting {}: libvirt's test:///default, {BRIDGE} ...", which.name()));
    let server = Server::start(&hypervisor, &which, &Config::new(&key))?;
    say(&format!("  {}", attachment(&hypervisor)?));

    say(&format!("fence_xvm in the guest ({}):\n", guest.v4));
    let mut table = Table::default();
    say(&table.header());
    let mut good = true;
    for (op, code) in ROUND {
        let (row, as_expected) = ask(&server, &guest, &key, op, code)?;
        say(&table.row(&row));
        good &= as_expected;
    }
    say(if good {
        "\nevery request was answered as it should be"
    } else {
        "\nNOT every request was answered as it should be"
    });
    if !good {
        say(&format!("the daemon's log:\n{}", server.log()));
    }
    if arguments.once {
        good &= stop(server)?;
        return Ok(good);
    }
    interrupt.rest();
    stay(&hypervisor, server, &key, &mut table, &interrupt)
}

fn attachment(hypervisor: &Hypervisor) -> Result<String> {
    Ok(match kernel::program_on(hypervisor, BRIDGE)? {
        Some(program) => format!("the program {} (id {}) is on {BRIDGE}", program.name, program.id),
        None => format!("no program on {BRIDGE}: requests come through the socket"),
    })
}

/// Sends one request; says whether it was answered as expected.
fn ask(server: &Server, guest: &Guest, key: &str, op: &str, code: i32) -> Result<(Row, bool)> {
    let mut client = Client::new(op, key);
    if op != "list" {
        client = client.domain(DOMAIN);
    }
    let position = server.log_position();
    let answer = client.run(guest.space())?;
    // A request that was not answered has no line to wait for.
    let fence =
        if server.tells_times() && answer.code == Some(code) { Some(server.next_fence(position)?) } else { None };
    let listed = op != "list" || answer.stdout.split_whitespace().any(|word| word == DOMAIN);
    let as_expected = answer.code == Some(code) && listed;
    Ok((Row::new(op, fence.as_ref(), Some((&answer, as_expected))), as_expected))
}

/// Ends the daemon as an init system would.
fn stop(server: Server) -> Result<bool> {
    let stock = !server.tells_times();
    let ended = server.stop(Signal::SIGTERM)?;
    let good = ended.code == Some(0) || stock;
    say(&format!(
        "the daemon ended {} after SIGTERM; the lab is being removed",
        ended.code.map_or("by a signal".to_owned(), |code| format!("with exit code {code}")),
    ));
    Ok(good)
}

/// Keeps the lab until Ctrl-C, and shows each request that arrives.
fn stay(
    hypervisor: &Hypervisor,
    mut server: Server,
    key: &str,
    table: &mut Table,
    interrupt: &Interrupt,
) -> Result<bool> {
    let enter = format!("nsenter --target {} --all", hypervisor.holder());
    say(&format!(
        "
The lab stays up until Ctrl-C. As root, from another terminal:

  send requests from the guest
    {enter} ip netns exec guest1 fence_xvm -k {key} -o list
    {enter} ip netns exec guest1 fence_xvm -k {key} -o off -H {DOMAIN}
  or from the hypervisor itself
    {enter} fence_xvm -k {key} -o list
  look inside
    {}
    {enter} tcpdump -ni vnet1 port {DEFAULT_PORT}
  a shell on the hypervisor
    {enter} bash
",
        kernel::LOOK_INSIDE.map(|command| format!("{enter} {command}")).join("\n    "),
    ));
    let mut position = server.log_position();
    while !interrupt.came() {
        if !server.is_running()? {
            say(&server.log());
            bail!("the daemon has ended by itself");
        }
        if let Some(fence) = server.wait_log(position, Duration::from_millis(200), Fence::parse) {
            position = server.log_position();
            say(&table.row(&Row::new(fence.get("op").unwrap_or("?"), Some(&fence), None)));
        }
    }
    say("");
    stop(server)
}

/// A line of the table.
struct Row(Vec<String>);

const HEADER: [&str; 10] = [
    "request",
    "via",
    "in kernel",
    "verified",
    "called back",
    "dead",
    "replied",
    "reply",
    "exit",
    "client's round trip",
];

impl Row {
    fn new(op: &str, fence: Option<&Fence>, answer: Option<(&Finished, bool)>) -> Self {
        let field = |name: &str| fence.and_then(|fence| fence.get(name)).unwrap_or("-").to_owned();
        let step = |name: &str| fence.and_then(|fence| fence.step(name)).map_or("-".to_owned(), short);
        // Times count from the packet's arrival in the kernel. The socket does not know that time.
        let arrived = if field("via") == "kernel" { "0".to_owned() } else { "-".to_owned() };
        let (exit, trip) = match answer {
            None => ("-".to_owned(), "-".to_owned()),
            Some((answer, good)) => {
                let code = answer.code.map_or("signal".to_owned(), |code| code.to_string());
                (if good { code } else { format!("{code} (wrong)") }, short(answer.elapsed))
            }
        };
        Self(vec![
            op.to_owned(),
            field("via"),
            arrived,
            step("verified"),
            step("called_back"),
            step("dead"),
            step("replied"),
            field("reply"),
            exit,
            trip,
        ])
    }
}

/// A time for people, three digits of it.
fn short(time: Duration) -> String {
    let (value, unit) = match time.as_secs_f64() * 1e6 {
        small if small < 1e3 => return format!("{small:.0} us"),
        middle if middle < 1e6 => (middle / 1e3, "ms"),
        large => (large / 1e6, "s"),
    };
    let digits = match value {
        small if small < 10.0 => 2,
        middle if middle < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// Prints rows as they come, in columns that fit the header and all that is usual.
struct Table {
    widths: [usize; HEADER.len()],
}

impl Default for Table {
    fn default() -> Self {
        let least = [7, 6, 0, 8, 8, 8, 8, 8, 4, 8];
        Self { widths: std::array::from_fn(|column| HEADER[column].len().max(least[column])) }
    }
}

impl Table {
    fn header(&self) -> String {
        self.row(&Row(HEADER.map(str::to_owned).to_vec()))
    }

    fn row(&self, row: &Row) -> String {
        let mut line = String::from(" ");
        for (column, (cell, width)) in row.0.iter().zip(self.widths).enumerate() {
            // Words to the left, times to the right. Writing to a string does not fail.
            let _ = match column {
                0 | 1 | 7 => write!(line, " {cell:<width$} "),
                _ => write!(line, " {cell:>width$} "),
            };
        }
        line.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_columns_align() {
        assert_eq!(short(Duration::from_nanos(12_400)), "12 us");
        assert_eq!(short(Duration::from_micros(2100)), "2.10 ms");
        assert_eq!(short(Duration::from_millis(310)), "310 ms");
        let table = Table::default();
        let fence = Fence::parse("op=off via=kernel reply=success verified=12us called_back=310us dead=- replied=2ms");
        let row = table.row(&Row::new("off", fence.as_ref(), None));
        assert_eq!(table.header().find("reply"), row.find("success"));
    }
}
