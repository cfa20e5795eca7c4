//! Reads the keys that fence_virtd does not have: how domains are killed and rebooted, and how the
//! daemon competes for memory and processors.

use std::path::{Path, PathBuf};
use std::time::Duration;

use strum::VariantArray;

use super::contents::{Contents, Findings};
use super::error::Mistake;
use super::plugin::Plugin;
use super::raw::{Section, clip};
use super::resolved::{on_or_off, read};
use super::settings::{Alone, Options, PAUSE_MAX, PAUSE_MAX_ANSWERED, RebootReply, Stress};

/// The directory of what outlives the process, but not the host's next boot.
pub const STATE_DIRECTORY: &str = "/run/fence-xdp";

/// Reads from section `multicast` whether other hypervisors may hear the requests.
pub(super) fn alone(multicast: &Contents<'_>, findings: &mut Findings<'_>) -> Alone {
    choice(multicast, "alone", findings)
}

/// Reads from section `fence_virtd` how the daemon competes for memory and processors.
pub(super) fn stress(global: &Contents<'_>, findings: &mut Findings<'_>) -> Stress {
    let default = Stress::default();
    Stress {
        lock_memory: switch(global, "lock_memory", default.lock_memory, findings),
        priority: choice(global, "priority", findings),
        oom_protect: switch(global, "oom_protect", default.oom_protect, findings),
    }
}

/// Reads from section `libvirt` how domains are killed and rebooted, and from `fence_virtd` where
/// state is kept.
pub(super) fn options(global: &Contents<'_>, libvirt: &Contents<'_>, findings: &mut Findings<'_>) -> Options {
    let state = read(global.get("state_directory"), PathBuf::from(STATE_DIRECTORY), findings, |text| {
        let path = Path::new(text);
        if path.is_absolute() { Ok(path.to_owned()) } else { Err(Mistake::RelativePath(clip(text))) }
    });
    let reboot_reply = choice(libvirt, "reboot_reply", findings);
    Options {
        kill: choice(libvirt, "kill", findings),
        reboot_method: choice(libvirt, "reboot_method", findings),
        reboot_reply,
        reboot_pause: pause(libvirt, reboot_reply, findings),
        state: Some(state),
    }
}

/// Reads where the history is kept: in the state directory, unless the file says otherwise.
pub(super) fn history(global: &Contents<'_>, state: Option<&Path>, findings: &mut Findings<'_>) -> Option<PathBuf> {
    read(global.get("history_directory"), state.map(Path::to_owned), findings, |text| {
        let path = Path::new(text);
        if path.is_absolute() { Ok(Some(path.to_owned())) } else { Err(Mistake::RelativePath(clip(text))) }
    })
}

/// Reads how long domains stay off in a reboot. A client that waits for the start must get its
/// answer in time.
fn pause(libvirt: &Contents<'_>, reply: RebootReply, findings: &mut Findings<'_>) -> Duration {
    let most = match reply {
        RebootReply::Off => PAUSE_MAX,
        RebootReply::On => PAUSE_MAX_ANSWERED,
    };
    read(libvirt.get("reboot_pause"), Duration::ZERO, findings, |text| match seconds(text.trim()) {
        Some(pause) if pause <= most => Ok(pause),
        Some(pause) if pause <= PAUSE_MAX => Err(Mistake::PauseBeforeReply { value: clip(text), most }),
        Some(_) | None => Err(Mistake::Pause { value: clip(text), most: PAUSE_MAX }),
    })
}

/// Parses seconds, to the millisecond.
fn seconds(text: &str) -> Option<Duration> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let is_number = |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(fraction) || fraction.len() > 3 {
        return None;
    }
    // A floating point number would be a nanosecond off.
    let millis: u64 = format!("{fraction:0<3}").parse().ok()?;
    Duration::from_secs(whole.parse().ok()?).checked_add(Duration::from_millis(millis))
}

/// Prints seconds, to the millisecond, as in the file.
#[must_use]
pub fn in_seconds(time: Duration) -> String {
    match time.subsec_millis() {
        0 => time.as_secs().to_string(),
        millis => format!("{}.{millis:03}", time.as_secs()),
    }
}

fn switch(section: &Contents<'_>, key: &'static str, default: bool, findings: &mut Findings<'_>) -> bool {
    read(section.get(key), default, findings, |text| {
        on_or_off(text).ok_or_else(|| Mistake::Switch { key, value: clip(text) })
    })
}

impl Plugin {
    /// Reports that the file names none.
    pub(super) fn is_missing(self, section: Option<&Section<'_>>, findings: &mut Findings<'_>) {
        findings.mistake(section.map_or(&(0..0), |section| &section.name.span), Mistake::Missing(self));
    }
}

/// Parses one of several words in any case.
pub(super) fn choice<T: VariantArray + Into<&'static str> + Copy + Default>(
    section: &Contents<'_>,
    key: &'static str,
    findings: &mut Findings<'_>,
) -> T {
    read(section.get(key), T::default(), findings, |text| {
        let found = T::VARIANTS.iter().find(|choice| Into::<&str>::into(**choice).eq_ignore_ascii_case(text));
        let known = || T::VARIANTS.iter().map(|choice| (*choice).into()).collect();
        found.copied().ok_or_else(|| Mistake::Choice { key, value: clip(text), known: known() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_read_and_written() {
        for (text, millis) in [("0", 0), ("2", 2000), ("2.5", 2500), ("0.25", 250), ("1.100", 1100), ("00.001", 1)] {
            assert_eq!(seconds(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for millis in 0..=60_000 {
            let time = Duration::from_millis(millis);
            assert_eq!(seconds(&in_seconds(time)), Some(time));
        }
        let wrong =
            ["", "-1", "+1", ".5", "5.", "1e1", "inf", "NaN", "2s", "1,5", "0.0001", "1.2.3", "18446744073709551616"];
        for text in wrong {
            assert_eq!(seconds(text), None, "{text}");
        }
    }
}
