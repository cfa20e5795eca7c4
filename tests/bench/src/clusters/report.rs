//! The page about the phases of fences in real clusters, by fence-daemon and by fence_virtd.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum as _;

use super::picture::{Lane, picture};
use crate::figures::Contender;
use crate::machine::Fact;
use crate::stats::{Sample, Samples, Unit, three};
use fence_lab::cluster::scenario::Scenario;
use fence_lab::cluster::timeline::{Phase, Timeline};

/// The two that are compared, in the order of the table.
pub const CONTENDERS: [Contender; 2] = [Contender::Ours, Contender::Stock];

/// `reboot_pause` for the lab's `token` of 1000 ms, in seconds. corosync misses a node after the
/// token, and a node needs half a second more to boot.
pub const PAUSE: &str = "3.5";

/// How often each scenario went how.
#[derive(Clone, Debug, Default)]
pub struct Results {
    timelines: BTreeMap<(Scenario, u8), Vec<Timeline>>,
    /// fence-daemon's with a pause of [`PAUSE`].
    with_pause: BTreeMap<Scenario, Vec<Timeline>>,
    failures: Vec<(Scenario, Contender, String)>,
}

fn place(contender: Contender) -> u8 {
    match contender {
        Contender::Ours => 0,
        Contender::Stock => 1,
        Contender::Bare => 2,
    }
}

impl Results {
    /// Adds what was seen of a scenario that went well.
    pub fn add(&mut self, scenario: Scenario, contender: Contender, timeline: Timeline) {
        self.timelines.entry((scenario, place(contender))).or_default().push(timeline);
    }

    /// Adds what was seen of one with fence-daemon and a pause of [`PAUSE`].
    pub fn add_with_pause(&mut self, scenario: Scenario, timeline: Timeline) {
        self.with_pause.entry(scenario).or_default().push(timeline);
    }

    /// Adds that one did not, and why.
    pub fn fail(&mut self, scenario: Scenario, contender: Contender, why: String) {
        self.failures.push((scenario, contender, why));
    }

    fn of(&self, scenario: Scenario, contender: Contender) -> &[Timeline] {
        self.timelines.get(&(scenario, place(contender))).map_or(&[], Vec::as_slice)
    }

    fn phase(&self, scenario: Scenario, contender: Contender, phase: Phase) -> Option<f64> {
        median(self.of(scenario, contender), |timeline| timeline.get(phase))
    }

    /// From the request to `phase`.
    fn since_asked(&self, scenario: Scenario, contender: Contender, phase: Phase) -> Option<f64> {
        let since = |timeline: &Timeline| timeline.get(phase)?.checked_sub(timeline.get(Phase::Asked)?);
        median(self.of(scenario, contender), since)
    }

    fn scenarios(&self) -> impl Iterator<Item = Scenario> + '_ {
        let has = |scenario: &Scenario| CONTENDERS.iter().any(|&contender| !self.of(*scenario, contender).is_empty());
        Scenario::value_variants().iter().copied().filter(has)
    }
}

/// The median of a time that timelines have.
fn median(timelines: &[Timeline], time: impl Fn(&Timeline) -> Option<Duration>) -> Option<f64> {
    let mut samples = Samples::default();
    for value in timelines.iter().filter_map(time) {
        samples.push(Sample { value: value.as_secs_f64(), at_least: false });
    }
    samples.median().map(|sample| sample.value)
}

fn show(seconds: Option<f64>) -> String {
    seconds.map_or_else(|| "–".to_owned(), |seconds| Unit::Time.show(seconds))
}

/// The page.
#[must_use]
pub fn markdown(results: &Results, facts: &[Fact], rounds: usize) -> String {
    let mut text = format!(
        "# Fences in real clusters

What a fence takes where it counts: a cluster of two, corosync and Pacemaker and all, in libvirt's containers, whose fence device is `stonith:fence_xvm`. Written by
`cargo xtask bench clusters` in one run of {rounds} rounds, in each of which fence-daemon and stock's `fence_virtd` have their turn on a new cluster. The same
scenarios are tests (`cargo xtask test cluster`), which look at the order of things and never at times.

![phases](clusters/phases.svg)

## The machine

| | |
|---|---|
"
    );
    for Fact { what, is } in facts {
        let _ = writeln!(text, "| {what} | {is} |");
    }
    text.push_str("\n## Phases\n\nMedians, counted from the break. –: there is none, or it never came.\n\n| what is broken | server |");
    for phase in Phase::ALL {
        let _ = write!(text, " {} |", phase.title());
    }
    text.push_str(&format!("\n|---|---|{}\n", "--:|".repeat(Phase::ALL.len())));
    for scenario in results.scenarios() {
        for contender in CONTENDERS {
            let title = if contender == Contender::Ours { scenario.title() } else { "" };
            let _ = write!(text, "| {title} | {} |", contender.name());
            for phase in Phase::ALL {
                let _ = write!(text, " {} |", show(results.phase(scenario, contender, phase)));
            }
            text.push('\n');
        }
    }
    text.push_str(
        "\n## The server's part\n\nFrom the request on the wire to the victim's death, and to the reply. The rest is corosync's and Pacemaker's, and the node's boot. Ratio:\n\
         fence_virtd's by fence-daemon's.\n\n\
         | what is broken | to dead: fence-daemon | fence_virtd | ratio | to replied: fence-daemon | fence_virtd | ratio |\n|---|--:|--:|--:|--:|--:|--:|\n",
    );
    for scenario in results.scenarios() {
        let _ = write!(text, "| {} |", scenario.title());
        for phase in [Phase::Dead, Phase::Replied] {
            let [ours, stock] = CONTENDERS.map(|contender| results.since_asked(scenario, contender, phase));
            let ratio = ours.zip(stock).filter(|(ours, _)| *ours > 0.0);
            let ratio = ratio.map_or_else(|| "–".to_owned(), |(ours, stock)| format!("{} ×", three(stock / ours)));
            let _ = write!(text, " {} | {} | {ratio} |", show(ours), show(stock));
        }
        text.push('\n');
    }
    if results.scenarios().any(|scenario| scenario == Scenario::Duel) {
        text.push_str(
            "\n## Both shoot\n\nNodes that lose each other ask for each other's death within some milliseconds. One of them dies, with both servers: `fence_virtd` carries out one request after\n\
             the other, so a node that is shot first no longer answers the call-back of its own; fence-daemon serves both at once, and does nothing for a guest that is being fenced itself.\n\
             Which one lives is chance, and on two hypervisors neither server knows of the other's victim. So give the device a delay all the same, as Pacemaker asks for in clusters of two:\n\
             `priority-fencing-delay`, `pcmk_delay_base` or `pcmk_delay_max`.\n",
        );
    }
    if !results.failures.is_empty() {
        text.push_str("\n## What went wrong\n\n");
        for (scenario, contender, why) in &results.failures {
            let _ = writeln!(text, "- {}, {}: {why}", scenario.title(), contender.name());
        }
    }
    text.push_str(BACK_TOO_SOON);
    pauses(&mut text, results);
    text.push_str(HOW);
    text
}

/// What a pause changes.
fn pauses(text: &mut String, results: &Results) {
    if results.with_pause.is_empty() {
        return;
    }
    let phases = [Phase::Replied, Phase::Started, Phase::Back];
    text.push_str("\n| what is asked for | server |");
    for phase in phases {
        let _ = write!(text, " {} |", phase.title());
    }
    let _ = writeln!(text, "\n|---|---|{}", "--:|".repeat(phases.len()));
    for (scenario, paused) in &results.with_pause {
        let servers = [
            ("fence-daemon".to_owned(), results.of(*scenario, Contender::Ours)),
            (format!("fence-daemon, `reboot_pause = \"{PAUSE}\"`"), paused.as_slice()),
            ("fence_virtd".to_owned(), results.of(*scenario, Contender::Stock)),
        ];
        for (index, (server, timelines)) in servers.iter().enumerate() {
            let _ = write!(text, "| {} | {server} |", if index == 0 { scenario.title() } else { "" });
            for phase in phases {
                let _ = write!(text, " {} |", show(median(timelines, |timeline| timeline.get(phase))));
            }
            text.push('\n');
        }
    }
}

const BACK_TOO_SOON: &str = "
## Back too soon

Where somebody asks for a fence of a node that is well, or where its service alone has failed, corosync does not know of the death when the reply is there. It misses a node after `token` and
`consensus` (2.2 s here, 6.6 s where corosync.conf has no `token`), and until then, or until the node is back, it delivers nothing, not even that the node was fenced. A container that was
killed is back within a second. Pacemaker then takes it in first, which takes it some seconds, and starts the service after that, here or there. `fence_virtd` is spared this by being slow: it has
libvirt ask all processes of a container to end (SIGTERM), upon which corosync takes its leave, and kill it 1.6 s later. (A QEMU guest takes no leave, with either server.)

That costs time, and where corosync tells of the death when the node is back, Pacemaker may take it for another one and have the node fenced once more (seen in one of some ten).
[`reboot_pause`](configuration.md#reboot_pause) keeps the node away until it is missed: the service is up as soon as that is so, and the node is back later. It is no default because what is right for one
`token` is wrong for another: a node that is back just when it is missed is the worst of all (with a pause of 2.2 s here the service was up after 3 to 8 s), and where that takes longer than 3 s a node that is
back soon is the best.
";

const HOW: &str = "
## How it is measured

- Two containers with systemd, corosync (udpu, `token: 1000`) and Pacemaker of Debian, on `virbr0` of a hypervisor in namespaces of its own. The fence device is the stock client's, with
  `pcmk_host_map` and nothing else. A small service holds a lock on storage that both nodes share; it must never run twice. The node that runs it is the one that is broken.
- One observer on the host tells the times, of both servers by the same means, and asks neither (`tests/lab/src/cluster/watch.rs`): requests and replies by a packet socket, the death by a pidfd of
  the container's first process, which is readable when everything in it is dead; Pacemaker's log; the service's own log.
- **noticed**: the survivor's Pacemaker says that the node is lost, or will be fenced. **fence sent**: the first datagram of `fence_xvm`. **replied**: the byte of success. **service up**: its
  process runs again, on either node. **node back**: the survivor's Pacemaker sees the fenced node again, as a member.
- libvirtd **hangs** (SIGSTOP) until the service is up again, or for 15 s if that does not come before. The server is **restarted in the middle**: it is stopped before the break, killed when the request
  is on the wire, and started again; the client's next datagram comes two seconds after its first.
";

/// Writes the page and its picture.
pub fn write(folder: &Path, results: &Results, facts: &[Fact], rounds: usize) -> Result<()> {
    let pictures = folder.join("clusters");
    fs::create_dir_all(&pictures).with_context(|| format!("making {}", pictures.display()))?;
    let lanes: Vec<_> = results
        .scenarios()
        .flat_map(|scenario| CONTENDERS.map(|contender| (scenario, contender)))
        .map(|(scenario, contender)| Lane {
            title: scenario.title(),
            contender,
            times: Phase::ALL.map(|phase| results.phase(scenario, contender, phase)),
        })
        .collect();
    for (path, text) in
        [(pictures.join("phases.svg"), picture(&lanes)), (folder.join("clusters.md"), markdown(results, facts, rounds))]
    {
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let mut results = Results::default();
        for (contender, dead) in [(Contender::Ours, 2.05), (Contender::Stock, 4.0)] {
            let times = [Some(1.9), Some(2.0), Some(dead), Some(dead + 0.05), Some(dead + 0.2), Some(dead + 1.5)];
            results.add(
                Scenario::Frozen,
                contender,
                Timeline::new(times.map(|time| time.map(Duration::from_secs_f64))),
            );
        }
        results.fail(Scenario::Hung, Contender::Stock, "it never came".to_owned());
        results
    }

    #[test]
    fn the_page_has_both_servers_their_ratio_and_what_went_wrong() {
        let page = markdown(&results(), &[Fact { what: "cores", is: "2".into() }], 1);
        for part in [
            "| corosync frozen (SIGSTOP) | fence-daemon | 1.90 s | 2.00 s | 2.05 s |",
            "|  | fence_virtd | 1.90 s | 2.00 s | 4.00 s |",
            "| corosync frozen (SIGSTOP) | 50.0 ms | 2.00 s | 40.0 × |",
            "hangs, fence_virtd: it never came",
            "| cores | 2 |",
        ] {
            assert!(page.contains(part), "no {part} in {page}");
        }
        assert!(!page.contains("Both shoot") && !page.contains("reboot_pause ="));
    }

    #[test]
    fn a_pause_stands_beside_none_and_beside_the_other_server() {
        let mut results = results();
        let times = |service, back| {
            Timeline::new(
                [None, None, None, Some(0.5), Some(service), Some(back)].map(|time| time.map(Duration::from_secs_f64)),
            )
        };
        results.add(Scenario::Reboot, Contender::Ours, times(5.0, 1.5));
        results.add(Scenario::Reboot, Contender::Stock, times(3.0, 3.5));
        results.add_with_pause(Scenario::Reboot, times(2.25, 3.25));
        let page = markdown(&results, &[], 1);
        let rows = "| `stonith_admin --reboot` | fence-daemon | 500 ms | 5.00 s | 1.50 s |\n\
                    |  | fence-daemon, `reboot_pause = \"3.5\"` | 500 ms | 2.25 s | 3.25 s |\n\
                    |  | fence_virtd | 500 ms | 3.00 s | 3.50 s |\n\n## How it is measured";
        assert!(page.contains(rows), "{page}");
        assert!(page.contains(
            "\n\n| what is asked for | server | replied | service up | node back |\n|---|---|--:|--:|--:|\n"
        ));
    }
}
