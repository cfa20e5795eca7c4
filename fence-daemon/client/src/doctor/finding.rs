//! What a check has found, in the form that `--json` prints. `docs/reference/doctor.schema.json`
//! describes it, and a test compares.

use serde::Serialize;

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It cannot be told from here.
    Unknown,
    /// It works, or may work, and could bite.
    Warning,
    /// It does not work, or not as it must.
    Wrong,
}

impl State {
    /// In a word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warning => "warning",
            Self::Wrong => "WRONG",
        }
    }
}

/// One line of the doctor's: what was looked at, how it is, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name. Several findings may have the same.
    pub check: &'static str,
    /// How it is.
    pub state: State,
    /// What was seen.
    pub seen: String,
    /// What that means, and what to do; `null` where nothing is to be done.
    pub remedy: Option<String>,
    /// What to type, as root, in this order.
    pub commands: Vec<String>,
}

impl Finding {
    fn new(check: &'static str, state: State, seen: impl Into<String>, remedy: Option<String>) -> Self {
        Self { check, state, seen: seen.into(), remedy, commands: Vec::new() }
    }

    /// All is well.
    #[must_use]
    pub fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, State::Ok, seen, None)
    }

    /// It cannot be told; `remedy` says what would help, or who knows.
    #[must_use]
    pub fn unknown(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Unknown, seen, Some(remedy.into()))
    }

    /// It could bite.
    #[must_use]
    pub fn warning(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Warning, seen, Some(remedy.into()))
    }

    /// It is wrong.
    #[must_use]
    pub fn wrong(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Wrong, seen, Some(remedy.into()))
    }

    /// With one more command to type.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }
}

/// Where the doctor was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Where the daemon runs.
    Hypervisor,
    /// Where `fence_xvm` runs.
    Guest,
}

/// The version of the form of [`Diagnosis`].
pub const SCHEMA: u32 = 1;

/// All that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// [`SCHEMA`].
    pub schema: u32,
    /// This program's version.
    pub version: &'static str,
    /// Where it was asked.
    pub side: Side,
    /// The worst of the findings: `unknown` and `warning` are no failures.
    pub verdict: State,
    /// The findings, in the order of a request's way.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// Findings, judged together.
    #[must_use]
    pub fn new(side: Side, findings: Vec<Finding>) -> Self {
        let verdict = findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok);
        Self { schema: SCHEMA, version: env!("CARGO_PKG_VERSION"), side, verdict, findings }
    }

    /// How many findings are in this state.
    #[must_use]
    pub fn count(&self, state: State) -> usize {
        self.findings.iter().filter(|finding| finding.state == state).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_the_documented_form() {
        let schema = serde_json::from_str(include_str!("../../../../docs/reference/doctor.schema.json")).unwrap();
        let schema = jsonschema::validator_for(&schema).unwrap();
        let findings = vec![
            Finding::ok("key", "a"),
            Finding::warning("clock", "b", "c"),
            Finding::unknown("firewall", "d", "e"),
            Finding::wrong("own name", "f", "g").command("h"),
        ];
        let mut told = serde_json::to_value(Diagnosis::new(Side::Guest, findings)).unwrap();
        assert!(schema.is_valid(&told), "{told:#}");
        assert_eq!((&told["verdict"], &told["findings"][3]["commands"][0]), (&"wrong".into(), &"h".into()));
        told["findings"][0]["check"] = "zork".into();
        assert!(!schema.is_valid(&told));
        assert_eq!(Diagnosis::new(Side::Guest, Vec::new()).verdict, State::Ok);
    }
}
