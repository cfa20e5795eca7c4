//! Compares both servers' results with the expected ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use fence_lab::differences::{DOCUMENT, KnownDifference};

use crate::scene::{Case, Expected, Played};

/// The number of failures of a scene that are shown in full.
const TOLD: usize = 12;
/// The number of characters of a long result that are shown.
const SHOWN: usize = 400;
/// The number of lines of each log that are shown.
const LOG_LINES: usize = 4;

/// A case with both servers' results.
#[derive(Clone, Debug)]
pub(crate) struct Compared {
    /// The listed difference that the case showed.
    pub(crate) difference: Option<&'static str>,
    /// The failure, for a person.
    pub(crate) failure: Option<String>,
}

/// Compares the results of a scene's cases.
pub(crate) fn compare(scene: &str, cases: &[Case], stock: &Played, ours: &Played) -> Vec<Compared> {
    let results = stock.results.iter().zip(&ours.results);
    let compared = cases.iter().zip(results).map(|(case, results)| {
        let logs = [("fence_virtd", stock.log.as_str()), ("fence-daemon", ours.log.as_str())];
        compare_one(&format!("{scene}: {}", case.name), &case.expected, results, logs, case.domain.as_deref())
    });
    compared.collect()
}

/// Compares the results of one case. For a failure, the logs' lines about `domain` are shown.
pub(crate) fn compare_one(
    name: &str,
    expected: &Expected,
    (stock, ours): (&String, &String),
    logs: [(&str, &str); 2],
    domain: Option<&str>,
) -> Compared {
    let (wrong, difference) = judge(expected, stock, ours);
    let failure = wrong.map(|wrong| {
        let (shown_stock, shown_ours) = (around(stock, ours), around(ours, stock));
        let logs: String = logs.into_iter().map(|(of, log)| last_lines(of, log, domain)).collect();
        format!("{name}: {wrong}\n    fence_virtd:  {shown_stock}\n    fence-daemon: {shown_ours}\n{logs}")
    });
    Compared { difference, failure }
}

/// The failure, and the listed difference that was seen.
fn judge(expected: &Expected, stock: &str, ours: &str) -> (Option<String>, Option<&'static str>) {
    match expected {
        Expected::Same if stock == ours => (None, None),
        Expected::Same => (Some("an unlisted difference".to_owned()), None),
        Expected::Both(text) if stock == text && ours == text => (None, None),
        Expected::Both(text) if stock == ours => {
            (Some(format!("both servers agree, but `{}` was expected", short(text))), None)
        }
        Expected::Both(text) => {
            (Some(format!("an unlisted difference: `{}` was expected from both", short(text))), None)
        }
        Expected::Differ { id, stock: a, ours: b } if stock == a && ours == b => (None, Some(id)),
        Expected::Differ { id, stock: a, ours: b } => {
            (Some(format!("`{id}` must be `{}` and `{}`", short(a), short(b))), None)
        }
    }
}

fn short(text: &str) -> String {
    around(text, text)
}

/// The part of `text` where it begins to differ from `other`.
fn around(text: &str, other: &str) -> String {
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    let same = if text == other { 0 } else { text.chars().zip(other.chars()).take_while(|(a, b)| a == b).count() };
    let from = same.saturating_sub(SHOWN / 2);
    let part: String = text.chars().skip(from).take(SHOWN).collect();
    format!("[from character {from}] {part} [{} characters]", text.chars().count())
}

/// The last lines of a log; only those about `domain` if there are any.
fn last_lines(name: &str, log: &str, domain: Option<&str>) -> String {
    let mut all: Vec<_> = log.lines().collect();
    all.dedup();
    let about: Vec<_> = all.iter().copied().filter(|line| domain.is_some_and(|name| line.contains(name))).collect();
    let lines = if about.is_empty() { all } else { about };
    let mut text = String::new();
    for line in lines.iter().skip(lines.len().saturating_sub(LOG_LINES)) {
        let _ = writeln!(text, "    {name}'s log: {}", short(line));
    }
    text
}

/// The failures of a scene as one text, if there are any. A difference that the table does not list
/// is a failure.
pub(crate) fn failures(compared: &[Compared], listed: &[KnownDifference]) -> Option<String> {
    let failures: Vec<_> = compared.iter().filter_map(|case| case.failure.as_deref()).collect();
    let is_listed = |id: &&str| listed.iter().any(|row| row.id == *id && row.seen_by_suite);
    let seen: BTreeSet<_> = compared.iter().filter_map(|case| case.difference).collect();
    let missing: Vec<_> = seen.into_iter().filter(|id| !is_listed(id)).collect();
    let mut text = String::new();
    if !missing.is_empty() {
        let _ = writeln!(text, "{DOCUMENT} has no row of this suite for {}\n", missing.join(", "));
    }
    if failures.is_empty() {
        return (!text.is_empty()).then_some(text);
    }
    let _ = writeln!(text, "{} of {} cases failed\n", failures.len(), compared.len());
    text.push_str(&failures.iter().take(TOLD).copied().collect::<Vec<_>>().join("\n"));
    if failures.len() > TOLD {
        let _ = write!(text, "\n... and {} more", failures.len() - TOLD);
    }
    Some(text)
}

/// The suite's results so far.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    cases: usize,
    unlisted: usize,
    seen: BTreeMap<&'static str, usize>,
}

impl Summary {
    pub(crate) fn add(&mut self, compared: &[Compared]) {
        self.cases += compared.len();
        self.unlisted += compared.iter().filter(|case| case.failure.is_some()).count();
        for id in compared.iter().filter_map(|case| case.difference) {
            *self.seen.entry(id).or_default() += 1;
        }
    }

    /// The differences of the document that the suite should have seen and has not.
    pub(crate) fn unseen<'a>(&self, listed: &'a [KnownDifference]) -> Vec<&'a str> {
        let listed = listed.iter().filter(|row| row.seen_by_suite).map(|row| row.id.as_str());
        listed.filter(|id| !self.seen.contains_key(id)).collect()
    }

    /// The summary for a person.
    pub(crate) fn told(&self) -> String {
        let in_cases: usize = self.seen.values().sum();
        let mut text = format!(
            "\nconformance: {} cases, {} unlisted differences, {} listed differences seen in {in_cases} cases\n",
            self.cases,
            self.unlisted,
            self.seen.len()
        );
        for (id, count) in &self.seen {
            let _ = writeln!(text, "{count:>7}  {id}");
        }
        text
    }
}
