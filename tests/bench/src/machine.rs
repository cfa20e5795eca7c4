//! The machine that was measured on: what matters for the times, and nothing that names it.

use std::fs;
use std::process::Command;

use fence_lab::tools;

/// A line of the description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fact {
    /// What it is about.
    pub what: &'static str,
    /// What there is.
    pub is: String,
}

/// Facts about this machine.
#[must_use]
pub fn describe() -> Vec<Fact> {
    let fact = |what, is: Option<String>| Fact { what, is: is.unwrap_or_else(|| "unknown".to_owned()) };
    vec![
        fact("processor", field("/proc/cpuinfo", "model name")),
        fact("cores", std::thread::available_parallelism().ok().map(|cores| cores.to_string())),
        fact("memory", field("/proc/meminfo", "MemTotal").and_then(|text| gibibytes(&text))),
        fact("load when it began", fs::read_to_string("/proc/loadavg").ok().and_then(|text| first_word(&text))),
        fact("kernel", fs::read_to_string("/proc/sys/kernel/osrelease").ok().and_then(|text| first_word(&text))),
        fact("system", field("/etc/os-release", "PRETTY_NAME")),
        fact("libvirt", version("libvirtd", &["--version"])),
        fact("QEMU", version("qemu-system-x86_64", &["--version"]).map(|text| format!("{text}, TCG (no KVM)"))),
        fact("fence_virtd", version("dpkg-query", &["-W", "-f", "${Version}", "fence-virtd"])),
    ]
}

/// The value of the first line `NAME: VALUE` or `NAME=VALUE` of a file.
fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    let value = line.trim_start_matches(name).trim_start().trim_start_matches([':', '=']);
    Some(value.trim().trim_matches('"').to_owned())
}

fn first_word(text: &str) -> Option<String> {
    text.split_whitespace().next().map(str::to_owned)
}

/// "24683460 kB" in GiB.
fn gibibytes(text: &str) -> Option<String> {
    let kibibytes: f64 = first_word(text)?.parse().ok()?;
    Some(format!("{:.1} GiB", kibibytes / 1024.0 / 1024.0))
}

/// The version in the first line that a program prints: its first word with a digit.
fn version(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(tools::find(program).ok()?).args(arguments).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let word = text.split_whitespace().find(|word| word.starts_with(|character: char| character.is_ascii_digit()))?;
    Some(word.trim_matches(['(', ')', ',']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_gibibytes_and_fields_are_found() {
        assert_eq!(gibibytes("25165824 kB").as_deref(), Some("24.0 GiB"));
        assert!(field("/proc/meminfo", "MemTotal").unwrap().ends_with("kB"));
        assert_eq!(field("/proc/meminfo", "NoSuchThing"), None);
    }
}
