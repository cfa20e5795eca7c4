//! The group of hosts alone, for tests: prints its events, and sends what a FIFO says.
//!
//! Commands, one a line: `send TEXT`, `big BYTES`, `stop SECONDS` (takes no events for so long) and
//! `fenced NAME SECONDS` (was it fenced after it was last heard, so long ago?).

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use fence_daemon::clock::Moment;
use fence_daemon::hosts::corosync;
use fence_daemon::hosts::proof::{self, LastHeard};
use fence_daemon::hosts::transport::{Event, Member, Transport};
use fence_daemon::observe::logging::{self, Destination};
use tokio::sync::mpsc;

/// How long a message may wait to be sent.
const PATIENCE: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let Some(fifo) = std::env::args().nth(1) else {
        say("usage: fence-daemon-group FIFO");
        return ExitCode::FAILURE;
    };
    match serve(fifo) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

/// Prints a line, whole.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn serve(fifo: String) -> std::io::Result<()> {
    let logging = logging::init(0, Destination::Foreground);
    logging.map_err(std::io::Error::other)?;
    let (commands, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        // Open for writing too, so that a writer's end is not this one's.
        let Ok(fifo) = File::options().read(true).write(true).open(fifo) else { return };
        for line in BufReader::new(fifo).lines().map_while(Result::ok) {
            let _ = commands.send(line);
        }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (group, mut events) = corosync::start()?;
        loop {
            tokio::select! {
                event = events.recv() => {
                    let Some(event) = event else { return Ok(()) };
                    say(&line(&event));
                }
                command = lines.recv() => {
                    let Some(command) = command else { return Ok(()) };
                    let (word, rest) = command.split_once(' ').unwrap_or((&command, ""));
                    match word {
                        "send" => send(&group, rest.as_bytes().to_vec()),
                        "big" => send(&group, vec![b'x'; rest.parse().unwrap_or(0)]),
                        "stop" => tokio::time::sleep(Duration::from_secs(rest.parse().unwrap_or(0))).await,
                        "fenced" => fenced(rest.to_owned()),
                        _ => say("what?"),
                    }
                }
            }
        }
    })
}

fn send(group: &corosync::Group, bytes: Vec<u8>) {
    let group = group.clone();
    tokio::spawn(async move {
        let begun = Moment::now();
        let result = group.send(bytes, begun.plus(PATIENCE)).await;
        let took = Moment::now().since(begun).as_millis();
        match result {
            Ok(()) => say(&format!("sent after {took} ms")),
            Err(error) => say(&format!("not sent after {took} ms: {error}")),
        }
    });
}

fn fenced(arguments: String) {
    tokio::task::spawn_blocking(move || {
        let Some((name, seconds)) = arguments.split_once(' ') else { return };
        let since = Duration::from_secs(seconds.parse().unwrap_or(0));
        let now = Moment::now();
        let heard = LastHeard { at: now.before(since), wall: SystemTime::now() - since };
        match proof::fenced_since(name, heard, now.plus(Duration::from_secs(20))) {
            Ok(Some(fenced)) => say(&format!("fenced {:?} {} s ago", fenced.how, fenced.ago.as_secs())),
            Ok(None) => say("fenced: no proof"),
            Err(error) => say(&format!("fenced: {error}")),
        }
    });
}

fn name(member: &Member) -> String {
    format!("{}:{}", member.node, member.pid)
}

fn names(members: &[Member]) -> String {
    members.iter().map(name).collect::<Vec<_>>().join(" ")
}

/// An event in a line, or two.
fn line(event: &Event) -> String {
    match event {
        Event::Joined(ours) => format!("joined {}", name(ours)),
        Event::Lost(why) => format!("lost: {why}"),
        Event::Configured(hosts) => {
            let hosts = hosts.iter().map(|host| format!("{}={}", host.node, host.name.as_deref().unwrap_or("?")));
            format!("configured {}", hosts.collect::<Vec<_>>().join(" "))
        }
        Event::Quorum { quorate, ring } => {
            let ring = ring.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
            format!("ring {ring}\nquorum {quorate}")
        }
        Event::Members { all, left } => {
            let left: String = left.iter().map(|(member, why)| format!("; {} left: {why}", name(member))).collect();
            format!("members {}{left}", names(all))
        }
        Event::Message { from, sent_after, bytes } => {
            let age = sent_after.map(|moment| Moment::now().since(moment).as_millis());
            let age = age.map_or("unknown".to_owned(), |age| age.to_string());
            let text = match bytes.len() {
                0..=100 => String::from_utf8_lossy(bytes).into_owned(),
                long => format!("{long} bytes"),
            };
            format!("message {} age {age}: {text}", name(from))
        }
        Event::Alive(from, None) => format!("alive {}", name(from)),
        Event::Alive(from, Some(vitals)) => {
            let clock = vitals.clock.map_or("unknown".to_owned(), |clock| clock.ahead_ms().to_string());
            format!("alive {} version {} clock ahead {clock} ms", name(from), vitals.software)
        }
        Event::Stalled(took) => format!("stalled {} ms", took.as_millis()),
        Event::Stock(members) => format!("stock {}", names(members)),
    }
}
