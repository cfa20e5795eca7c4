//! Runs the commands of `docs/reference/inspect.md`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use fence_lab::cluster::corosync::KEY_PATH;
use fence_lab::kernel::{LOOK_INSIDE, program_on};
use fence_lab::lab::BRIDGE;
use fence_lab::process::poll_until;
use fence_lab::server::Config;
use serde_json::Value;

use super::{commands, page};
use crate::host::{Host, LIMIT};

/// The meaning of the numbers on the page.
struct Numbers {
    /// `N: ... name NAME ...` is bpftool's line about program or map N.
    names: BTreeMap<u64, String>,
    btf: u64,
}

impl Numbers {
    fn of(page: &str) -> Result<Self> {
        let blocks = || page.lines().filter_map(|line| line.strip_prefix("    "));
        let named = |line: &str| {
            let (number, rest) = line.split_once(": ")?;
            let name = rest.split_whitespace().skip_while(|word| *word != "name").nth(1)?;
            Some((number.parse().ok()?, name.to_owned()))
        };
        let btf = blocks().find_map(|line| line.trim().strip_prefix("btf_id ")?.parse().ok());
        Ok(Self { names: blocks().filter_map(named).collect(), btf: btf.context("no btf_id in the page")? })
    }
}

/// bpftool's JSON output.
fn bpftool(host: &Host, arguments: &str) -> Result<Value> {
    let output = host.must(&format!("bpftool -j {arguments}"))?;
    serde_json::from_str(&output).with_context(|| output.clone())
}

/// Fails unless a command of the page printed the page's lines, in their order, whatever the
/// numbers are. The page leaves lines out.
fn prints_its_block(page: &str, command: &str, printed: &str) -> Result<()> {
    let is_inside = |line: &&str| line.is_empty() || line.starts_with("    ") && !line.starts_with("    # ");
    let lines = page.lines().skip_while(|line| line.strip_prefix("    # ") != Some(command)).skip(1);
    let mut lines = lines.take_while(is_inside).filter(|line| !["", "..."].contains(&line.trim())).peekable();
    ensure!(lines.peek().is_some(), "the page does not say what {command} prints: {printed}");
    let shape = |line: &str| -> Vec<String> {
        let number = |word: &str| word.contains(|character: char| character.is_ascii_digit());
        // Where the sources are differs too.
        let file = |word: &str| word.strip_prefix("[file:")?.rsplit('/').next().map(str::to_owned);
        let short = |word: &str| file(word).unwrap_or_else(|| if number(word) { "N" } else { word }.to_owned());
        line.split_whitespace().map(short).collect()
    };
    let mut rest = printed.lines().map(shape);
    for line in lines {
        ensure!(rest.any(|printed| printed == shape(line)), "{command} does not print {line:?} there: {printed}");
    }
    Ok(())
}

/// What a line of the log always has: the message without the domain's identity, and the names of
/// the fields.
fn shape(line: &str) -> (&str, Vec<&str>) {
    let said = line.split_once("]: ").map_or(line, |(_, said)| said);
    let message = said.split(" op=").next().and_then(|message| message.split(" (").next());
    (message.unwrap_or_default(), said.split_whitespace().filter_map(|word| Some(word.split_once('=')?.0)).collect())
}

#[test]
fn the_commands_of_the_documentation_work() -> Result<()> {
    let host = Host::serving(&Config::new(KEY_PATH))?;
    host.wait_log("the kernel program is attached", 1)?;
    host.expect(&host.hypervisor().guest(1)?, "off", "test", 0)?;
    host.wait_log("op=off", 1)?;
    let page = page("reference/inspect.md")?;
    let known = Numbers::of(&page)?;
    // The numbers of this lab's program and maps, by the names that the page's numbers have.
    let attached = program_on(host.hypervisor(), BRIDGE)?.context("no program")?;
    let about = bpftool(&host, &format!("prog show id {}", attached.id))?;
    let mut numbers = BTreeMap::from([(attached.name, attached.id)]);
    for id in about["map_ids"].as_array().context("no maps")?.iter().filter_map(Value::as_u64) {
        let map = bpftool(&host, &format!("map show id {id}"))?;
        numbers.insert(map["name"].as_str().unwrap_or_default().to_owned(), id);
    }
    let here = |word: &str| -> Result<String> {
        let Ok(number) = word.parse::<u64>() else { return Ok(word.to_owned()) };
        if number == known.btf {
            return Ok(about["btf_id"].as_u64().context("no types")?.to_string());
        }
        let name = known.names.get(&number).with_context(|| format!("the page does not say what {number} is"))?;
        numbers.get(name).map(u64::to_string).with_context(|| format!("there is no {name} here: {numbers:?}"))
    };
    let mut printed = BTreeMap::new();
    // tcpdump runs for ever: `netns/inspect/capture.rs` runs and ends it.
    for command in commands(&page).into_iter().filter(|command| !command.starts_with("tcpdump ")) {
        let words: Result<Vec<_>> = command.split_whitespace().map(here).collect();
        let line = words.with_context(|| command.to_owned())?.join(" ");
        // The daemon knows the process of each running domain.
        let may_be_empty = line.contains("select(");
        let done = host.run(&line)?;
        let is_right = done.code == Some(0) && done.stderr.is_empty() && (may_be_empty || !done.stdout.is_empty());
        ensure!(is_right, "{line}: {:?} {}", done.code, done.stderr);
        if command.starts_with("bpftool ") {
            prints_its_block(&page, command, &done.stdout)?;
        }
        printed.insert(command, done.stdout);
    }
    let hinted = LOOK_INSIDE.iter().all(|command| printed.contains_key(command));
    ensure!(hinted && printed.len() >= 16, "the page's commands are not found: {:?}", printed.keys());
    // The page promises types, names and lines of source.
    for (start, words) in [
        ("fence-daemon status", "Recent requests"),
        ("fence-daemon status --json | jq '.kernel", "0"),
        ("bpftool map dump", "\"drop_digest\": 0"),
        ("bpftool map dump", "\"last_right_ns\""),
        ("bpftool map dump", "\"strict_source\": 1"),
        ("bpftool btf dump", "struct Counters {"),
        ("bpftool prog dump", "fence-ebpf/src/main.rs"),
        ("journalctl -u fence-daemon FENCE", "\"FENCE_REPLY\":\"success\""),
    ] {
        let mut said = printed.iter().filter(|(command, _)| command.starts_with(start));
        ensure!(said.any(|(_, printed)| printed.contains(words)), "no {words} of {start}: {printed:?}");
    }

    // The journal's lines have the page's form.
    host.expect(&host.hypervisor().guest(2)?, "off", "nobody", 1)?;
    for domain in ["test", "nobody"] {
        let is_it = |line: &&str| line.contains(" op=off ") && line.contains(&format!(" domain={domain} "));
        let shown = page.lines().find(is_it).with_context(|| format!("the page has no line about {domain}"))?;
        let log = poll_until("the log's line", LIMIT, || {
            let log = host.log();
            Ok(log.lines().any(|line| is_it(&line)).then_some(log))
        })?;
        let line = log.lines().find(is_it).unwrap_or_default();
        ensure!(shape(line) == shape(shown), "the page shows {shown}, the journal has {line}");
    }
    Ok(())
}
