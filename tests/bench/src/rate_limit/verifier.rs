//! What the kernel's verifier says about its work.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The verifier's last line, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    /// Instructions walked through, of a million that are allowed.
    pub instructions: u64,
    /// States remembered at the worst instruction.
    pub states_at_one: u64,
    /// States in all.
    pub states: u64,
    /// Most states at once: what its memory went for.
    pub peak_states: u64,
}

impl Effort {
    fn parse(log: &str) -> Option<Self> {
        let line = log.lines().rev().find(|line| line.starts_with("processed "))?;
        let after = |name: &str| {
            let mut words = line.split_whitespace().skip_while(|word| *word != name);
            words.nth(1)?.parse().ok()
        };
        Some(Self {
            instructions: after("processed")?,
            states_at_one: after("max_states_per_insn")?,
            states: after("total_states")?,
            peak_states: after("peak_states")?,
        })
    }
}

/// Everything happens in a mount namespace with a bpffs of its own: the pin is gone with the shell.
const SCRIPT: &str = r#"set -eu; mount -t bpf none /mnt; bpftool -d prog load "$1" /mnt/program 2>&1"#;

/// Lets `bpftool` load the object, and reads what the verifier prints.
pub fn ask(object: &Path) -> Result<Effort> {
    let output = Command::new("unshare").args(["--mount", "sh", "-c", SCRIPT, "sh"]).arg(object).output();
    let output = output.context("unshare cannot be run. Remedy: apt-get install util-linux")?;
    let log = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success(),
        "bpftool does not load the object. Remedy: `apt-get install bpftool`, and be root"
    );
    Effort::parse(&log).context("no word from the verifier in bpftool's output")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_last_line_is_read() {
        let log = "libbpf: prog 'x'\n0: (b7) r0 = 2\nprocessed 56101 insns (limit 1000000) max_states_per_insn 7 \
                   total_states 273 peak_states 205 mark_read 0\n-- END PROG LOAD LOG --\n";
        let effort = Effort { instructions: 56_101, states_at_one: 7, states: 273, peak_states: 205 };
        assert_eq!(Effort::parse(log), Some(effort));
        assert_eq!(Effort::parse("no such line"), None);
    }
}
