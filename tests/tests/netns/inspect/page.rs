//! Runs the commands of `docs/reference/inspect.md`.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use fence_lab::kernel::program_on;
use fence_lab::lab::BRIDGE;
use fence_lab::process::run;
use fence_lab::tools;
use serde_json::Value;

use super::{LIMIT, program};
use crate::bench::Bench;

/// The commands of a page, each after a `# ` in an indented block, and the meaning of the numbers
/// in them. `N: ... name NAME ...` is bpftool's line about program or map N.
struct Page {
    commands: Vec<String>,
    names: BTreeMap<u64, String>,
    btf: u64,
}

impl Page {
    fn read() -> Result<Self> {
        let path = tools::workspace().join("docs/reference/inspect.md");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let blocks = || text.lines().filter_map(|line| line.strip_prefix("    "));
        let commands = blocks().filter_map(|line| line.strip_prefix("# ")).map(str::to_owned).collect();
        let named = |line: &str| {
            let (number, rest) = line.split_once(": ")?;
            let name = rest.split_whitespace().skip_while(|word| *word != "name").nth(1)?;
            Some((number.parse().ok()?, name.to_owned()))
        };
        let btf = blocks().find_map(|line| line.trim().strip_prefix("btf_id ")?.parse().ok());
        Ok(Self { commands, names: blocks().filter_map(named).collect(), btf: btf.context("no btf_id in the page")? })
    }
}

/// bpftool's JSON output.
fn bpftool(bench: &Bench, arguments: &[&str]) -> Result<Value> {
    let output = bench.hypervisor.space().must("bpftool", &[&["-j"], arguments].concat())?;
    serde_json::from_str(&output.stdout).with_context(|| output.stdout.clone())
}

#[test]
fn the_commands_of_the_documentation_work() -> Result<()> {
    let bench = Bench::new()?;
    let server = bench.serve(&bench.config("auto"))?;
    bench.expect_via(&server, &bench.about_domain("off"), 0, "kernel")?;
    let page = Page::read()?;
    // The numbers of this lab's program and maps, by the names that the page's numbers have.
    let attached = program_on(&bench.hypervisor, BRIDGE)?.context("no program")?;
    let about = bpftool(&bench, &["prog", "show", "id", &attached.id.to_string()])?;
    let mut numbers = BTreeMap::from([(attached.name, attached.id)]);
    for id in about["map_ids"].as_array().context("no maps")?.iter().filter_map(Value::as_u64) {
        let map = bpftool(&bench, &["map", "show", "id", &id.to_string()])?;
        numbers.insert(map["name"].as_str().unwrap_or_default().to_owned(), id);
    }
    let here = |word: &str| -> Result<String> {
        let Ok(number) = word.parse::<u64>() else { return Ok(word.to_owned()) };
        if number == page.btf {
            return Ok(about["btf_id"].as_u64().context("no types")?.to_string());
        }
        let name = page.names.get(&number).with_context(|| format!("the page does not say what {number} is"))?;
        numbers.get(name).map(u64::to_string).with_context(|| format!("there is no {name} here: {numbers:?}"))
    };
    // `fence-daemon` on the page stands for this build with this lab's configuration.
    let ours = format!("{} -f {}", program()?.display(), bench.hypervisor.path("fence_virt.conf"));
    let mut printed = BTreeMap::new();
    // tcpdump runs for ever, so `capture` runs and ends it. Only a host with systemd has a journal:
    // `cluster/service.rs` reads it.
    let elsewhere = |command: &&String| ["tcpdump ", "journalctl "].iter().any(|program| command.starts_with(program));
    for command in page.commands.iter().filter(|command| !elsewhere(command)) {
        let words: Result<Vec<_>> = command.split_whitespace().map(here).collect();
        let line = words.with_context(|| command.clone())?.join(" ").replacen("fence-daemon", &ours, 1);
        let done = run(bench.hypervisor.space(), Command::new("sh").args(["-c", &line]), LIMIT)?;
        // The daemon knows the process of each running domain.
        let may_be_empty = line.contains("select(");
        let is_right = done.code == Some(0) && done.stderr.is_empty() && (may_be_empty || !done.stdout.is_empty());
        ensure!(is_right, "{line}: {:?} {}", done.code, done.stderr);
        printed.insert(command.as_str(), done.stdout);
    }
    ensure!(printed.len() >= 11, "the page's commands are not found: {:?}", page.commands);
    // The page promises types, names and lines of source.
    for (start, words) in [
        ("fence-daemon status", "Recent requests"),
        ("fence-daemon status --json | jq '.kernel", "0"),
        ("bpftool map dump", "\"drop_digest\": 0"),
        ("bpftool map dump", "\"last_right_ns\""),
        ("bpftool map dump", "\"strict_source\": 1"),
        ("bpftool btf dump", "struct Counters {"),
        ("bpftool prog dump", "fence-ebpf/src/main.rs"),
    ] {
        let mut said = printed.iter().filter(|(command, _)| command.starts_with(start));
        ensure!(said.any(|(_, printed)| printed.contains(words)), "no {words} of {start}: {printed:?}");
    }
    Ok(())
}
