//! The figures as a table, and docs/measured/rate-limit.md.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::floods::Floods;
use super::measure::{Cost, Figures, Kind, REPEAT};
use crate::machine::Fact;
use crate::pages;

/// Other traffic is to cost at most so many times what an empty program does.
const ORDINARY: f64 = 1.5;
/// A wrong SHA-256 digest is to cost at most so many times the same compressions in portable code.
const DIGEST: f64 = 2.5;
/// What would be still better.
const DIGEST_WISHED: f64 = 1.8;

impl Figures {
    /// The ratio of a frame's cost to what it is compared with.
    #[must_use]
    pub fn ratio(&self, cost: &Cost) -> Option<f64> {
        match cost.kind {
            Kind::Ordinary => Some(cost.median() / self.empty.median()),
            Kind::Digest => Some(self.more(cost) / self.portable.median()),
            Kind::Refused => None,
        }
    }

    /// What a frame costs more than in an empty program.
    fn more(&self, cost: &Cost) -> f64 {
        cost.median() - self.empty.median()
    }

    fn worst(&self, chosen: impl Fn(&&Cost) -> bool) -> f64 {
        self.frames.iter().filter(chosen).filter_map(|cost| self.ratio(cost)).fold(0.0, f64::max)
    }
}

/// The table in Markdown, which reads well enough on a terminal.
#[must_use]
pub fn table(figures: &Figures) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "| frame | ns | more than an empty program | ratio | to |\n|---|--:|--:|--:|---|");
    for cost in &figures.frames {
        let to = match cost.kind {
            Kind::Ordinary => "an empty program",
            Kind::Digest => "three compressions of SHA-256 in portable Rust",
            Kind::Refused => "",
        };
        let ratio = figures.ratio(cost).map_or_else(String::new, |ratio| format!("{ratio:.2}"));
        let (name, median, more) = (cost.name, cost.median(), figures.more(cost));
        let _ = writeln!(text, "| {name} | {median:.1} | {more:.1} | {ratio} | {to} |");
    }
    let (empty, portable) = (figures.empty.median(), figures.portable.median());
    let _ =
        writeln!(text, "\nThe empty program: {empty:.1} ns. Three compressions in portable Rust: {portable:.1} ns.\n");

    let _ = writeln!(text, "| target | wanted | got | |\n|---|--:|--:|---|");
    let mut target = |what: &str, wanted: f64, got: f64| {
        let met = if got <= wanted { "met" } else { "**missed**" };
        let _ = writeln!(text, "| {what} | at most {wanted} × | {got:.2} × | {met} |");
    };
    let sha256 = figures.worst(|cost| cost.name == "wrong SHA-256");
    target("other traffic, beside an empty program", ORDINARY, figures.worst(|cost| cost.kind == Kind::Ordinary));
    target("a wrong SHA-256, beside portable code", DIGEST, sha256);
    target("the same, if it can be had", DIGEST_WISHED, sha256);

    let (size, effort) = (figures.size, figures.effort);
    let _ = writeln!(text, "\n| the program | |\n|---|--:|");
    let mut line = |what: &str, is: String| {
        let _ = writeln!(text, "| {what} | {is} |");
    };
    line("BPF instructions", (size.translated / 8).to_string());
    line("machine code", format!("{} bytes", size.compiled));
    line("instructions verified, of 1,000,000 allowed", effort.instructions.to_string());
    line("verifier's states: most at one instruction, in all, most at once", {
        format!("{}, {}, {}", effort.states_at_one, effort.states, effort.peak_states)
    });
    line("verified and compiled in", format!("{:.0} ms", figures.load_time.as_secs_f64() * 1e3));
    text
}

/// The page, in which the figures are to be filled.
pub(crate) const PAGE: &str = include_str!("../pages/rate-limit.md");

/// Writes `rate-limit.md` into a folder.
pub fn write(folder: &Path, figures: &Figures, floods: &Floods, facts: &[Fact], rounds: usize) -> Result<()> {
    let (rounds, repeat) = (rounds.to_string(), REPEAT.to_string());
    let machine = pages::machine(facts, &["libvirt", "QEMU", "fence_virtd"]);
    let (figures, floods) = (table(figures), floods.table());
    let values =
        [("rounds", &rounds), ("repeat", &repeat), ("machine", &machine), ("figures", &figures), ("floods", &floods)];
    let text = pages::fill(PAGE, &values.map(|(name, value)| (name, value.as_str())));
    std::fs::write(folder.join("rate-limit.md"), text).with_context(|| format!("rate-limit.md in {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rate_limit::verifier::Effort;
    use fence_lab::loaded::Size;

    #[test]
    fn ratios_are_reported_beside_the_right_thing_and_a_missed_target_is_said() {
        let cost = |name, kind, ns: f64| Cost { name, kind, samples: vec![ns + 1.0, ns, ns - 1.0] };
        let figures = Figures {
            empty: cost("empty", Kind::Ordinary, 30.0),
            portable: cost("portable", Kind::Digest, 600.0),
            frames: vec![cost("ARP", Kind::Ordinary, 60.0), cost("wrong SHA-256", Kind::Digest, 1230.0)],
            size: Size { translated: 80, compiled: 100, verified: 12 },
            effort: Effort { instructions: 12, states_at_one: 1, states: 2, peak_states: 3 },
            load_time: Duration::from_millis(30),
        };
        let text = table(&figures);
        assert!(text.contains("| ARP | 60.0 | 30.0 | 2.00 |"), "{text}");
        assert!(text.contains("| wrong SHA-256 | 1230.0 | 1200.0 | 2.00 |"), "{text}");
        assert_eq!(text.matches("**missed**").count(), 2, "{text}");
    }
}
