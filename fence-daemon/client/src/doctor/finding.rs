//! The findings, in the form that `--json` prints. A test compares it with
//! `docs/reference/doctor.schema.json`.

use serde::Serialize;

/// The state of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// The doctor cannot find out.
    Unknown,
    /// It works now, but may fail.
    Warning,
    /// It does not work.
    Wrong,
}

impl State {
    /// The name, as in the output.
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

/// One finding: what was checked, its state, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name. Several findings may have the same.
    pub check: &'static str,
    /// The state.
    pub state: State,
    /// What the check found.
    pub seen: String,
    /// What it means, and what to do; `null` if nothing is to be done.
    pub remedy: Option<String>,
    /// What to type, as root, in this order.
    pub commands: Vec<String>,
}

impl Finding {
    fn new(check: &'static str, state: State, seen: impl Into<String>, remedy: Option<String>) -> Self {
        Self { check, state, seen: seen.into(), remedy, commands: Vec::new() }
    }

    /// A finding that all is well.
    #[must_use]
    pub fn ok(check: &'static str, seen: impl Into<String>) -> Self {
        Self::new(check, State::Ok, seen, None)
    }

    /// A finding that is unknown; `remedy` says how to find out.
    #[must_use]
    pub fn unknown(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Unknown, seen, Some(remedy.into()))
    }

    /// A finding that may fail.
    #[must_use]
    pub fn warning(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Warning, seen, Some(remedy.into()))
    }

    /// A finding that something is wrong.
    #[must_use]
    pub fn wrong(check: &'static str, seen: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(check, State::Wrong, seen, Some(remedy.into()))
    }

    /// Adds a command to type.
    #[must_use]
    pub fn command(mut self, command: impl Into<String>) -> Self {
        self.commands.push(command.into());
        self
    }
}

/// Where the doctor runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// Where the daemon runs.
    Hypervisor,
    /// Where `fence_xvm` runs.
    Guest,
}

/// The version of [`Diagnosis`].
pub const SCHEMA: u32 = 1;

/// All findings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// [`SCHEMA`].
    pub schema: u32,
    /// This program's version.
    pub version: &'static str,
    /// Where the doctor runs.
    pub side: Side,
    /// The worst state: `unknown` and `warning` are no failures.
    pub verdict: State,
    /// The findings, in the order of a request's way.
    pub findings: Vec<Finding>,
}

impl Diagnosis {
    /// Computes the verdict of findings.
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
