//! The results as a table on a terminal, and as a page with plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::figures::{self, Contender, Figure, Part, Results};
use super::machine::Fact;
use super::plot::{Bar, Plot, Row};
use super::stats::{Samples, Unit, three};

/// A line of the table, as text.
struct Line {
    title: String,
    ours: [String; 2],
    stock: [String; 2],
    bare: String,
    ratio: String,
    count: String,
}

fn line(results: &Results, figure: &Figure) -> Option<Line> {
    let of = |contender| results.get(&figure.id, contender);
    let pair = |samples: Option<&Samples>| {
        [samples.and_then(Samples::median), samples.and_then(Samples::p99)]
            .map(|sample| figure.unit.show_sample(sample))
    };
    let (ours, stock) = (of(Contender::Ours), of(Contender::Stock));
    if ours.is_none() && stock.is_none() {
        return None;
    }
    let count = |samples: Option<&Samples>| samples.map_or(0, Samples::len);
    let bare = of(Contender::Bare).and_then(Samples::median);
    let ratio = results.ratio(&figure.id);
    Some(Line {
        title: figure.title.clone(),
        ours: pair(ours),
        stock: pair(stock),
        bare: if bare.is_some() { figure.unit.show_sample(bare) } else { String::new() },
        ratio: ratio.map_or_else(
            || "–".to_owned(),
            |ratio| format!("{}{} ×", if ratio.at_least { "> " } else { "" }, three(ratio.value)),
        ),
        count: format!("{}/{}", count(ours), count(stock)),
    })
}

/// A target, what it applies to, and what became of it.
struct Judged {
    title: String,
    verdict: figures::Verdict,
    needed: &'static str,
}

fn judged(results: &Results) -> Vec<Judged> {
    let judge = |figure: &Figure| {
        let judge = |(target, needed): &(figures::Target, &'static str)| {
            let verdict = results.verdict(figure, target)?;
            Some(Judged { title: figure.title.clone(), verdict, needed })
        };
        figure.targets.iter().filter_map(judge).collect::<Vec<_>>()
    };
    figures::all().iter().flat_map(judge).collect()
}

/// The table for a terminal, and under it the targets.
#[must_use]
pub fn table(results: &Results) -> String {
    let mut text = format!(
        "\n{:<44} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>9}\n",
        "median and p99", "daemon", "p99", "virtd", "p99", "bare", "ratio", "samples"
    );
    for Line { title, ours, stock, bare, ratio, count } in
        figures::all().iter().filter_map(|figure| line(results, figure))
    {
        let _ = writeln!(
            text,
            "{title:<44} {:>10} {:>10} {:>10} {:>10} {bare:>10} {ratio:>9} {count:>9}",
            ours[0], ours[1], stock[0], stock[1]
        );
    }
    text.push('\n');
    for Judged { title, verdict, needed } in judged(results) {
        let _ = write!(text, "{:<6} {title}: {}: {}", met(verdict.met), verdict.wanted, verdict.got);
        text.push_str(&if verdict.met { "\n".to_owned() } else { format!(" (it would take {needed})\n") });
    }
    text
}

fn met(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

/// The page.
#[must_use]
pub fn markdown(results: &Results, facts: &[Fact], rounds: usize) -> String {
    let mut text = format!(
        "# Benchmarks

fence-daemon beside stock's `fence_virtd`, measured by `cargo xtask bench` (which wrote this page) in one run of {rounds} rounds. In every round
both servers have their turn on the same lab: network namespaces with a bridge, a real libvirtd, and QEMU guests and a container as victims.
The rounds alternate, so that whatever else the machine did hit both. Tests never look at times; this does.

![off](benchmarks/off.svg)
![reboot](benchmarks/reboot.svg)
![many at once](benchmarks/crowd.svg)

## The machine

| | |
|---|---|
"
    );
    for Fact { what, is } in facts {
        let _ = writeln!(text, "| {what} | {is} |");
    }
    text.push_str(
        "
## Figures

Medians, and the value that 99 of 100 samples do not exceed (of fewer than a hundred: the largest). Ratio: fence_virtd's median by fence-daemon's. Samples:
fence-daemon's and fence_virtd's. `>`: not over when the bench gave up.

| | fence-daemon | p99 | fence_virtd | p99 | bare SIGKILL | ratio | samples |
|---|--:|--:|--:|--:|--:|--:|--:|
",
    );
    for Line { title, ours, stock, bare, ratio, count } in
        figures::all().iter().filter_map(|figure| line(results, figure))
    {
        let _ = writeln!(
            text,
            "| {title} | {} | {} | {} | {} | {bare} | {ratio} | {count} |",
            ours[0], ours[1], stock[0], stock[1]
        );
    }
    text.push_str("\n## Targets\n\n| | wanted | got | |\n|---|---|--:|---|\n");
    for Judged { title, verdict, needed } in judged(results) {
        let end = if verdict.met { "met".to_owned() } else { format!("**missed**: it would take {needed}") };
        let _ = writeln!(text, "| {title} | {} | {} | {end} |", verdict.wanted, verdict.got);
    }
    text.push_str(HOW);
    text
}

const HOW: &str = "
## How it is measured

- **To reply**: from right before the request's datagram is sent to right after the reply byte, by a client of the bench's own in a guest's
  network namespace (`tests/lab/src/peer.rs`). It signs, listens and authenticates as `fence_xvm` does, but is no new process for every request. Only the
  line that says so is about whole runs of `fence_xvm`.
- **To dead**: until the bench's own pidfd of the victim's process (of a container: its first process) is readable, that is, until every thread is gone.
  A reply of success while that is not so ends the bench with an error.
- **To running again**: until libvirt's own record says that the domain runs, as another process. It is looked at every 2 ms. When the system inside is up again
  is another matter.
- **Bare SIGKILL**: from the signal, sent by the bench itself, to the same pidfd: what no server can beat.
- The guests: firmware only with 16 MiB; Linux (Debian's cloud kernel and busybox); firmware with 4 GiB of memory that QEMU has touched page by page; a libvirt-LXC
  container whose init ignores SIGTERM.
- **Silent callers** send a good request each, accept the call-back and say nothing. **Dead callers** send a good request from an address at which nobody
  answers ARP. Each has an address of its own. 0.3 s later an honest request is sent, and given up after 30 s, as a stock client would.
- **Start to ready**: until fence-daemon says that it is ready; until fence_virtd's port is bound. **To the first answer**: of a `monitor` that is sent every
  5 ms from the start on.
- **Resident memory** (`VmRSS`) and **wake-ups** (voluntary context switches of all threads) over 5 s of idleness after the first answer.
- Both servers use the same configuration file, with one libvirt connection. fence-daemon has all its defaults: the kernel program, memory locked, raised priority.
- The clients of a storm, 17 or 100 threads, share the machine with server and guests.
";

/// Writes the page and its plots.
pub fn write(folder: &Path, results: &Results, facts: &[Fact], rounds: usize) -> Result<()> {
    let plots = folder.join("benchmarks");
    fs::create_dir_all(&plots).with_context(|| format!("making {}", plots.display()))?;
    let write =
        |path: &Path, text: String| fs::write(path, text).with_context(|| format!("writing {}", path.display()));
    write(&folder.join("benchmarks.md"), markdown(results, facts, rounds))?;
    for (file, title, belongs) in [
        ("off.svg", "off: datagram to reply", (|figure| figure.id.ends_with("off.reply")) as fn(&Figure) -> bool),
        ("reboot.svg", "reboot: to reply, and to running again", |figure| {
            figure.id.ends_with("reboot.reply") || figure.id.ends_with("reboot.running")
        }),
        ("crowd.svg", "many at once", |figure| {
            matches!(figure.part, Part::Storm17 | Part::Storm100 | Part::Callers) && !figure.id.ends_with("each")
        }),
    ] {
        write(&plots.join(file), plot(results, title, belongs).render())?;
    }
    Ok(())
}

fn plot(results: &Results, title: &str, belongs: fn(&Figure) -> bool) -> Plot {
    let figures = figures::all();
    let rows = figures.iter().filter(|figure| belongs(figure) && figure.unit == Unit::Time).filter_map(|figure| {
        let bars = [Contender::Ours, Contender::Stock, Contender::Bare].into_iter().filter_map(|contender| {
            let samples = results.get(&figure.id, contender)?;
            Some(Bar { contender, median: samples.median()?, p99: samples.p99()? })
        });
        let bars: Vec<_> = bars.collect();
        (!bars.is_empty()).then(|| Row { title: figure.title.clone(), bars })
    });
    Plot { title: title.to_owned(), rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn results() -> Results {
        let mut results = Results::default();
        for (contender, value) in [(Contender::Ours, 0.005), (Contender::Stock, 0.21), (Contender::Bare, 0.002)] {
            results.add("idle.off.reply", contender, value);
        }
        results.add("own.memory", Contender::Ours, 30e6);
        results.add("own.memory", Contender::Stock, 20e6);
        results.add("silent.100", Contender::Ours, 0.001);
        results.add_time("silent.100", Contender::Stock, None, Duration::from_secs(30));
        results
    }

    #[test]
    fn the_table_has_what_was_measured_and_nothing_else() {
        let table = table(&results());
        let lines: Vec<Vec<_>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        let off = lines.iter().find(|line| line.starts_with(&["idle", "QEMU"])).unwrap();
        assert!(
            off.ends_with(&["5.00", "ms", "5.00", "ms", "210", "ms", "210", "ms", "2.00", "ms", "42.0", "×", "1/1"]),
            "{off:?}"
        );
        assert!(!table.contains("LXC"), "{table}");
        assert!(table.contains("> 30.0 s") && table.contains("> 30000 ×"), "{table}");
    }

    #[test]
    fn a_missed_target_is_told_with_what_it_would_take() {
        let table = table(&results());
        assert!(table.contains("met    idle QEMU guest, 16 MiB: off, to reply: at least 30 ×"), "{table}");
        assert!(table.contains("MISSED resident memory: at most 1 × fence_virtd's: 1.50 × (it would take "), "{table}");
        let page = markdown(&results(), &[Fact { what: "cores", is: "2".into() }], 3);
        assert!(page.contains("| cores | 2 |") && page.contains("**missed**: it would take "), "{page}");
    }

    #[test]
    fn the_page_and_its_plots_are_written() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), &results(), &[], 1).unwrap();
        let plot = fs::read_to_string(folder.path().join("benchmarks/off.svg")).unwrap();
        let page = fs::read_to_string(folder.path().join("benchmarks.md")).unwrap();
        assert!(plot.contains("idle QEMU guest"), "{plot}");
        for file in ["off", "reboot", "crowd"] {
            assert!(page.contains(&format!("(benchmarks/{file}.svg)")));
        }
    }
}
