//! Checks the host itself: privileges, clock, kernel, state directory, and what starts at boot.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::errno::Errno;
use nix::libc;
use nix::unistd::{AccessFlags, access};

use super::finding::Finding;
use super::program;
use super::sight;
use crate::probe::{Probe, Unsafe};

/// How long `systemctl` may take: it only reads files.
const SYSTEMCTL: Duration = Duration::from_secs(10);
/// The years that a correct clock may show.
const YEARS: std::ops::RangeInclusive<u64> = 2025..=2100;
/// The mean length of a year, in seconds.
const YEAR: u64 = 31_556_952;

/// Checks for root. Other users see little, and what they cannot see need not be wrong.
#[must_use]
pub fn privileges() -> Option<Finding> {
    let root = nix::unistd::geteuid().is_root();
    let remedy = "only root can see keys, sockets and other processes: run it again as root (sudo)";
    (!root).then(|| Finding::wrong("privileges", "this is not root", remedy))
}

/// The kernel's view of its clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sync {
    /// The clock is synchronised.
    Kept,
    /// Nothing synchronises the clock.
    Unkept,
    /// The kernel does not say.
    Untold,
}

/// Has the clock kept, where a service for that is installed or can be.
const KEEP_CLOCK: &str = "timedatectl set-ntp true || apt-get install systemd-timesyncd || dnf install chrony";
/// Sets the clock at once, and has it kept.
pub(super) const SET_CLOCK: &str =
    "chronyc makestep || timedatectl set-ntp true || apt-get install systemd-timesyncd || dnf install chrony";

/// Checks the clock.
#[must_use]
pub fn clock() -> Finding {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    judge_clock(now, synchronised())
}

fn synchronised() -> Sync {
    // SAFETY: needed because `adjtimex` wants a struct to fill in. Sound because it is plain
    // numbers, for which zero bytes are a value.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: needed because no safe wrapper has it. Sound because the pointer is to a live struct
    // of the kernel's layout, and `modes` of 0 asks without changing anything.
    match unsafe { libc::adjtimex(&raw mut timex) } {
        libc::TIME_ERROR => Sync::Unkept,
        -1 => Sync::Untold,
        _ if timex.status & libc::STA_UNSYNC != 0 => Sync::Unkept,
        _ => Sync::Kept,
    }
}

fn judge_clock(now: Duration, sync: Sync) -> Finding {
    let year = 1970 + now.as_secs() / YEAR;
    if !YEARS.contains(&year) {
        let remedy = "no log of this host can be compared with another's, and certificates of libvirt connections are not valid: set it, and \
                      have it kept by chrony or systemd-timesyncd";
        return Finding::wrong("clock", format!("this host's year is {year}"), remedy).command(SET_CLOCK);
    }
    match sync {
        Sync::Kept => Finding::ok("clock", "the kernel says that it is synchronised"),
        Sync::Unkept => Finding::warning(
            "clock",
            "the kernel says that it is not synchronised",
            "fencing works without (nothing of it depends on the time of day), but nobody can tell afterwards from the nodes' logs what came \
             first: run chrony or systemd-timesyncd here and in the guests",
        )
        .command(KEEP_CLOCK),
        Sync::Untold => Finding::unknown("clock", "the kernel does not say whether it is synchronised", "see `timedatectl` or `chronyc tracking`"),
    }
}

/// The kernel version that the kernel program needs. Without tcx (6.6) it is attached as XDP.
const NEEDED: (u32, u32) = (5, 12);
/// The capabilities that loading and attaching the program needs, by number and name.
const CAPABILITIES: [(u32, &str); 3] = [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")];
/// CAP_SYS_ADMIN includes BPF's two capabilities, as before Linux 5.8.
const SYS_ADMIN: u32 = 21;

/// Checks the kernel, and the capabilities of the daemon with this process ID.
#[must_use]
pub fn kernel(daemon: Option<u32>) -> Vec<Finding> {
    let release = sight::text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut findings = vec![judge_release(&release)];
    // With 0 the kernel interprets every BPF program.
    if sight::number("/proc/sys/net/core/bpf_jit_enable") == Some(0) {
        let remedy = "the kernel program is interpreted, many times slower";
        findings.push(
            Finding::warning("kernel", "net.core.bpf_jit_enable is 0", remedy)
                .command("sysctl -w net.core.bpf_jit_enable=1"),
        );
    }
    let status = daemon.and_then(|pid| sight::text(format!("/proc/{pid}/status")));
    findings.extend(status.as_deref().and_then(judge_capabilities));
    findings
}

fn judge_release(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|word| word.parse::<u32>().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        return Finding::unknown("kernel", format!("Linux {release}"), "its version is unknown");
    };
    if (major, minor) >= NEEDED {
        return Finding::ok("kernel", format!("Linux {release}"));
    }
    let remedy = "the kernel program cannot be loaded: requests come through the socket alone, and a flood costs the daemon's time";
    Finding::warning("kernel", format!("Linux {release} is older than {}.{}", NEEDED.0, NEEDED.1), remedy)
}

fn judge_capabilities(status: &str) -> Option<Finding> {
    // Those that it could have had at its start: it gives them up once the program is loaded.
    let set = status.lines().find_map(|line| line.strip_prefix("CapBnd:"))?;
    let set = u64::from_str_radix(set.trim(), 16).ok()?;
    let has = |number: u32| set >> number & 1 == 1;
    let missing: Vec<_> = CAPABILITIES
        .iter()
        .filter(|(number, name)| !has(*number) && (*name == "CAP_NET_ADMIN" || !has(SYS_ADMIN)))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return None;
    }
    let remedy = "the kernel program cannot be loaded or attached, and requests come through the socket alone: whatever starts the daemon keeps \
                  that from it (a unit's CapabilityBoundingSet=, a container)";
    let finding = Finding::warning("kernel", format!("the daemon lacks {}", missing.join(", ")), remedy);
    Some(finding.command("systemctl show -p CapabilityBoundingSet fence-daemon"))
}

/// Checks the state directory. The daemon records each claim there before it acts on a request.
#[must_use]
pub fn state_directory(directory: &Path, probe: &dyn Probe) -> Finding {
    const CHECK: &str = "state";
    // The daemon creates missing directories, so the nearest existing one is checked.
    let place = directory.ancestors().find(|place| place.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
    let shown = directory.display();
    if !place.is_dir() {
        let remedy = "it has to be a directory: remove what is there, or choose another `state_directory`";
        return Finding::wrong(CHECK, format!("{} is no directory", place.display()), remedy);
    }
    if let Some(Unsafe { error, remedy }) = probe.state_directory(directory) {
        return Finding::wrong(CHECK, error, "the daemon does not start with it").command(remedy);
    }
    let written = "claims are written there before requests are carried out, so that nobody is fenced twice";
    if let Err(error) = access(place, AccessFlags::W_OK | AccessFlags::X_OK) {
        let finding = Finding::wrong(
            CHECK,
            format!("cannot write to {}: {}", place.display(), io::Error::from(error)),
            format!("{written}: make it writable, or choose another `state_directory`"),
        );
        return if error == Errno::EROFS {
            finding.command(format!("mount -o remount,rw \"$(findmnt -n -o TARGET -T {})\"", place.display()))
        } else {
            finding
        };
    }
    if let Ok(about) = nix::sys::statvfs::statvfs(place)
        && about.blocks() > 0
        && about.blocks_available() == 0
    {
        return Finding::wrong(CHECK, format!("no space is left for {shown}"), format!("{written}: make room"))
            .command(format!("df {}", place.display()));
    }
    let there = if place == directory { "is there and can be written to" } else { "can be made" };
    Finding::ok(CHECK, format!("{shown} {there}"))
}

/// Checks what starts at boot, where systemd starts services.
#[must_use]
pub fn autostart() -> Vec<Finding> {
    if fs::metadata("/run/systemd/system").is_err() {
        return Vec::new();
    }
    let enabled = |unit: &str| {
        // `systemctl` reads the unit files: systemd itself may be busy.
        let said = program::run_with("systemctl", &["is-enabled", unit], &[("SYSTEMD_OFFLINE", "1")], SYSTEMCTL);
        said.ok().map(|said| said.stdout.trim().to_owned())
    };
    judge_autostart(enabled("fence-daemon.service").as_deref(), enabled("fence_virtd.service").as_deref())
}

/// Judges what `systemctl is-enabled` says of fence-daemon and of fence_virtd.
fn judge_autostart(ours: Option<&str>, stock: Option<&str>) -> Vec<Finding> {
    const CHECK: &str = "boot";
    let starts = |said: Option<&str>| {
        said.is_some_and(|said| matches!(said, "enabled" | "enabled-runtime" | "linked" | "alias" | "generated"))
    };
    let mut findings = Vec::new();
    if starts(stock) {
        let remedy = "both want the port at the next boot, and the first one gets it: only one of them may start";
        let finding = Finding::warning(CHECK, "fence_virtd starts at boot", remedy);
        findings.push(finding.command("systemctl disable --now fence_virtd"));
    }
    match ours {
        Some("enabled" | "enabled-runtime") => findings.push(Finding::ok(CHECK, "fence-daemon starts at boot")),
        Some("disabled") => findings.push(
            Finding::warning(
                CHECK,
                "fence-daemon does not start at boot",
                "this host fences nobody after the next boot until the daemon is started",
            )
            .command("systemctl enable fence-daemon"),
        ),
        _ => findings.push(Finding::unknown(
            CHECK,
            "systemd has no unit fence-daemon",
            "make sure that it starts at boot by other means",
        )),
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::super::finding::State;
    use super::*;
    use crate::probe::{Domain, NoRing, Obstacle, Ring, Unanswered};

    fn at(year: u64, sync: Sync) -> State {
        judge_clock(Duration::from_secs((year - 1970) * YEAR + 1000), sync).state
    }

    #[test]
    fn a_clock_that_is_off_by_years_is_wrong_and_one_that_nobody_keeps_doubtful() {
        assert_eq!(at(2026, Sync::Kept), State::Ok);
        assert_eq!(at(2026, Sync::Unkept), State::Warning);
        assert_eq!(at(2026, Sync::Untold), State::Unknown);
        for year in [1970, 2000, 2024, 2106] {
            assert_eq!(at(year, Sync::Kept), State::Wrong, "{year}");
        }
        let seen = judge_clock(Duration::ZERO, Sync::Kept).seen;
        assert!(seen.contains("1970"), "{seen}");
    }

    #[test]
    fn a_kernel_that_is_too_old_is_reported() {
        assert_eq!(judge_release("6.18.5-cloud-amd64").state, State::Ok);
        assert_eq!(judge_release("5.12.0-49-amd64").state, State::Ok);
        let old = judge_release("5.10.0");
        assert!(old.state == State::Warning && old.remedy.as_ref().unwrap().contains("cannot be loaded"), "{old:?}");
        assert_eq!(judge_release("of tomorrow").state, State::Unknown);
    }

    #[test]
    fn capabilities_that_are_missing_are_named() {
        let lacks = |set: &str| {
            judge_capabilities(&format!("Name:\tx\nCapEff:\t0\nCapBnd:\t{set}\n")).map(|finding| finding.seen)
        };
        assert_eq!(lacks("000001ffffffffff"), None);
        // Without CAP_SYS_ADMIN, with the three.
        assert_eq!(lacks("000000c000001000"), None);
        // With CAP_SYS_ADMIN and CAP_NET_ADMIN alone.
        assert_eq!(lacks("0000000000201000"), None);
        assert_eq!(lacks("0000000000200000").as_deref(), Some("the daemon lacks CAP_NET_ADMIN"));
        assert_eq!(lacks("0000008000001000").as_deref(), Some("the daemon lacks CAP_PERFMON"));
        assert_eq!(lacks("0000000000000000").as_deref(), Some("the daemon lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF"));
        assert_eq!(judge_capabilities("nonsense"), None);
    }

    #[test]
    fn two_that_start_at_boot_are_one_too_many() {
        let states =
            |ours, stock| -> Vec<State> { judge_autostart(ours, stock).iter().map(|finding| finding.state).collect() };
        assert_eq!(states(Some("enabled"), Some("disabled")), [State::Ok]);
        assert_eq!(states(Some("enabled"), Some("enabled")), [State::Warning, State::Ok]);
        assert_eq!(states(Some("disabled"), Some("not-found")), [State::Warning]);
        assert_eq!(states(Some("not-found"), None), [State::Unknown]);
    }

    /// A host where nothing is unsafe.
    struct Safe;

    impl Probe for Safe {
        fn domains(&self, _: &[String], _: Duration) -> Vec<(String, Result<Vec<Domain>, Unanswered>)> {
            Vec::new()
        }

        fn obstacle(&self, _: &str) -> Option<Obstacle> {
            None
        }

        fn state_directory(&self, path: &Path) -> Option<Unsafe> {
            path.ends_with("unsafe").then(|| Unsafe { error: "writable".to_owned(), remedy: "chmod".to_owned() })
        }

        fn ring(&self, _: Duration) -> Result<Ring, NoRing> {
            Err(NoRing::Overdue)
        }
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let found = state_directory(&dir.path().join("unsafe"), &Safe);
        assert_eq!((found.state, found.commands.as_slice()), (State::Wrong, &["chmod".to_owned()][..]));
    }

    #[test]
    fn a_directory_that_is_not_there_yet_can_be_made() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(state_directory(dir.path(), &Safe).state, State::Ok);
        let later = state_directory(&dir.path().join("a/b"), &Safe);
        assert!(later.state == State::Ok && later.seen.contains("can be made"), "{later:?}");
        fs::write(dir.path().join("file"), "").unwrap();
        assert_eq!(state_directory(&dir.path().join("file"), &Safe).state, State::Wrong);
        assert_eq!(state_directory(&dir.path().join("file/below"), &Safe).state, State::Wrong);
    }
}
