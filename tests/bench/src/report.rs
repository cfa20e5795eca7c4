//! The results as a table on a terminal, and as a page with plots.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::figures::{self, Contender, Figure, Part, Results};
use super::machine::Fact;
use super::pages;
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
    let bare = of(Contender::Bare).and_then(Samples::median);
    if ours.is_none() && stock.is_none() && bare.is_none() {
        return None;
    }
    let count = |samples: Option<&Samples>| samples.map_or(0, Samples::len);
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

/// The ratios that tell most, each beside what it is compared with.
const TELLING: [(&str, Contender); 8] = [
    ("idle.off.reply", Contender::Stock),
    ("idle.off.reply", Contender::Bare),
    ("idle.reboot.reply", Contender::Stock),
    ("idle.reboot.running", Contender::Stock),
    ("storm.17", Contender::Stock),
    ("status.raw", Contender::Stock),
    ("own.ready", Contender::Stock),
    ("own.memory", Contender::Stock),
];

/// These ratios alone: how many times as long the other one takes, or how much more it has.
#[must_use]
pub fn telling(results: &Results) -> String {
    let mut text = format!("\n{:<44} {:>12} {:>10} {:>10}\n", "medians", "fence-daemon", "other", "ratio");
    for (id, contender) in TELLING {
        let figure = figures::all().into_iter().find(|figure| figure.id == id);
        let (ours, other) = (results.median(id, Contender::Ours), results.median(id, contender));
        let (Some(figure), Some(ours), Some(other)) = (figure, ours, other) else { continue };
        let [ours_shown, other_shown] = [ours, other].map(|sample| figure.unit.show_sample(Some(sample)));
        let (title, ratio, name) = (&figure.title, three(other.value / ours.value), contender.name());
        let _ = writeln!(text, "{title:<44} {ours_shown:>12} {other_shown:>10} {ratio:>8} ×  {name}");
    }
    text
}

fn met(met: bool) -> &'static str {
    if met { "met" } else { "MISSED" }
}

/// The page, in which the figures are to be filled.
pub(crate) const PAGE: &str = include_str!("pages/benchmarks.md");

/// The page.
#[must_use]
pub fn markdown(results: &Results, facts: &[Fact], rounds: usize) -> String {
    let mut figures = String::from(
        "| | fence-daemon | p99 | fence_virtd | p99 | bare limit | ratio | samples |\n|---|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    for Line { title, ours, stock, bare, ratio, count } in
        figures::all().iter().filter_map(|figure| line(results, figure))
    {
        let _ = writeln!(
            figures,
            "| {title} | {} | {} | {} | {} | {bare} | {ratio} | {count} |",
            ours[0], ours[1], stock[0], stock[1]
        );
    }
    let mut targets = String::from("| | wanted | got | |\n|---|---|--:|---|\n");
    for Judged { title, verdict, needed } in judged(results) {
        let end = if verdict.met { "met".to_owned() } else { format!("**missed**: it would take {needed}") };
        let _ = writeln!(targets, "| {title} | {} | {} | {end} |", verdict.wanted, verdict.got);
    }
    let (rounds, machine) = (rounds.to_string(), pages::machine(facts, &[]));
    pages::fill(PAGE, &[("rounds", &rounds), ("machine", &machine), ("figures", &figures), ("targets", &targets)])
}

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
    fn the_telling_ratios_are_of_figures_that_there_are() {
        assert!(TELLING.iter().all(|(id, _)| figures::all().iter().any(|figure| figure.id == *id)));
        let text = telling(&results());
        assert!(text.contains("42.0 ×  fence_virtd") && text.contains("0.67 ×  fence_virtd"), "{text}");
    }

    #[test]
    fn a_missed_target_is_reported_with_what_it_would_take() {
        let table = table(&results());
        assert!(table.contains("met    idle QEMU guest, 16 MiB: off, to reply: at least 30 ×"), "{table}");
        assert!(table.contains("MISSED resident memory: at most 1 × fence_virtd's: 1.50 × (it would take "), "{table}");
        let page = markdown(&results(), &[Fact { what: "cores", is: "2".into() }], 3);
        assert!(page.contains("| cores | 2 |") && page.contains("**missed**: it would take "), "{page}");
        assert!(!page.contains('{'), "{page}");
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
