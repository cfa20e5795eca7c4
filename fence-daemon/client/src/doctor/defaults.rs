//! Checks the flags of fence_virtd's service that fence-daemon's unit ignores: `FENCE_VIRTD_ARGS`
//! of `/etc/default/fence_virtd`.
//!
//! Debian's unit of `fence_virtd` reads that file. Ours does not, since an old `-f FILE` there
//! would silently choose another configuration. So this check reports the flags that matter.

use super::finding::Finding;
use super::sight;

/// The file in Debian's package, and in others'.
const FILES: [&str; 2] = ["/etc/default/fence_virtd", "/etc/sysconfig/fence_virtd"];

/// Reports the flags in these files.
#[must_use]
pub fn check() -> Vec<Finding> {
    FILES.iter().filter_map(|file| judge(file, &sight::text(file)?)).collect()
}

fn judge(file: &str, text: &str) -> Option<Finding> {
    let lost = lost(text)?;
    let seen = format!("FENCE_VIRTD_ARGS in {file} has `{lost}`");
    let remedy = format!(
        "fence-daemon's unit does not read that file. If the flags are still wanted, `systemctl edit fence-daemon` takes \
         `[Service]`, `ExecStart=` and `ExecStart=/usr/sbin/fence-daemon -F {lost}`, a line each"
    );
    Some(Finding::warning("configuration", seen, remedy))
}

/// The flags of the last assignment, except those that the unit has or does not need.
fn lost(text: &str) -> Option<String> {
    let assigned = |line: &str| {
        let line = line.trim();
        line.strip_prefix("export ").unwrap_or(line).trim_start().strip_prefix("FENCE_VIRTD_ARGS=").map(str::to_owned)
    };
    let value = text.lines().filter_map(assigned).next_back()?;
    // `-w` waits for libvirt, which is what fence-daemon does in any case; `-F` is the unit's own.
    let flags = value.replace(['"', '\''], " ");
    let flags: Vec<&str> = flags.split_whitespace().filter(|flag| !matches!(*flag, "-w" | "-F")).collect();
    (!flags.is_empty()).then(|| flags.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_with_an_effect_are_reported() {
        let told = |text: &str| judge("/etc/default/fence_virtd", text).map(|finding| finding.seen);
        for quiet in
            ["", "# FENCE_VIRTD_ARGS=\"-f /x\"", "FENCE_VIRTD_ARGS=-w", "FENCE_VIRTD_ARGS=\"-w -F\"", "OTHER=-f"]
        {
            assert_eq!(told(quiet), None, "{quiet}");
        }
        let last = told("FENCE_VIRTD_ARGS=-d9\nexport FENCE_VIRTD_ARGS='-w -f /etc/other.conf'\n").unwrap();
        assert!(last.contains("has `-f /etc/other.conf`"), "{last}");
    }
}
